"""Every way a Prometheus can fail, from real local servers; and that one query's fault stays its own."""

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from sidecar.adapters.prometheus import PrometheusSource, Query
from sidecar.adapters.prometheus import source as module
from sidecar.adapters.prometheus.exchange import MAX_BODY_BYTES
from sidecar.rules.readings import Answer, Failure
from sidecar.settings.http_config import Authorization, BasicAuth, HttpConfig
from sidecar.settings.promql import parse

TERM = re.compile(r'label_replace\(\(\n(.*?)\n\),"__ks__","(\w+)","",""\)', re.DOTALL)
SECRET = "s3cr3t-hunter2"
NOW = 1_700_000_000.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def ask(*texts: str) -> list[Query]:
    parsed = [parse(text) for text in texts]
    return [Query(key=one.text, text=one.text, kind=one.kind, selectors=one.selectors) for one in parsed]


def error(kind: str, message: str, status: int = 400) -> web.Response:
    return web.json_response({"status": "error", "errorType": kind, "error": message}, status=status)


class FakePrometheus:
    """Answers chains term by term: every metric is 1 and 10 s old, unless its name says otherwise."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.authorizations: list[str | None] = []
        self.forms: list[Any] = []
        self.delays: dict[str, float] = {}
        self.warns: set[str] = set()
        self.at_once = self.most_at_once = 0

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._answer(request)
        finally:
            self.at_once -= 1

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        form = await request.post()
        self.forms.append(form)
        self.authorizations.append(request.headers.get("Authorization"))
        terms = TERM.findall(str(form["query"]))
        queries = [text for text, tag in terms if tag.startswith("q")]
        self.asked.append(queries)
        await asyncio.sleep(max((self.delays.get(text, 0.0) for text in queries), default=0.0))
        if "broken" in queries:
            return error("execution", "found duplicate series for the match group", 422)
        if "huge" in queries:
            return web.Response(body=b"0" * (MAX_BODY_BYTES + 1), content_type="application/json")
        result = [{"metric": {"__ks__": tag}, "value": [NOW, _value(text)]} for text, tag in terms]
        body: dict[str, Any] = {"status": "success", "data": {"resultType": "vector", "result": result}}
        if warnings := [f"{text} is partial" for text in queries if text in self.warns]:
            body["warnings"] = warnings
        return web.json_response(body)


def _value(text: str) -> str:
    if "timestamp" in text:
        return str(NOW - 10)
    return {"not_a_number": "NaN", "infinite": "+Inf"}.get(text, "1")


@asynccontextmanager
async def serving(handler: Handler, *, path: str = "/api/v1/query") -> AsyncIterator[str]:

    async def handle(request: web.Request) -> web.StreamResponse:
        return await handler(request)

    app = web.Application(client_max_size=10 * 1024 * 1024)
    app.router.add_post(path, handle)
    runner = web.AppRunner(app, shutdown_timeout=0.05)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def speaking(
    behave: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """Serve raw bytes, for what no HTTP server would do."""

    async def behave_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await behave(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(behave_and_close, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await asyncio.sleep(0)


@asynccontextmanager
async def asking(*urls: str, timeout: float = 2.0, **settings: Any) -> AsyncIterator[PrometheusSource]:  # noqa: ASYNC109
    source = PrometheusSource(urls=urls, timeout=timeout, **settings)
    try:
        yield source
    finally:
        await source.close()


def refused_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(30)


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.02)


async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"status":"succ')
    await writer.drain()


async def not_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    await writer.drain()


async def zeros(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    while True:
        writer.write(b"0" * 65536)
        await writer.drain()


def replying(**reply: Any) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(**reply)

    return handler


async def only_failure(source: PrometheusSource, *texts: str) -> Failure:
    outcomes = list((await source.query(ask(*(texts or ("x", "y"))))).values())
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert isinstance(outcomes[0], Failure)
    return outcomes[0]


@pytest.mark.parametrize(
    ("behave", "reason", "unreachable"),
    [
        (hang, "timeout", True),
        (reset, "unreachable", True),
        (drip, "timeout", True),
        (break_off, "bad_response", False),
        (not_http, "bad_response", False),
    ],
)
async def test_a_server_that_breaks_the_line_is_named_for_what_it_did(behave: Any, reason: str, unreachable: bool):
    async with speaking(behave) as url, asking(url, timeout=0.4) as source:
        failure = await only_failure(source)
        assert (failure.reason, failure.unreachable, source.up) == (reason, unreachable, False)
        assert source._alone == {}


async def test_a_refused_connection_is_unreachable():
    async with asking(refused_url()) as source:
        failure = await only_failure(source)
        assert (failure.reason, failure.unreachable) == ("unreachable", True)


async def test_an_unknown_host_is_unreachable():
    async with asking("http://no-such-host.invalid:9090") as source:
        assert (await only_failure(source)).unreachable is True


SUCCESS = {"status": "success", "data": {"resultType": "vector", "result": []}}


@pytest.mark.parametrize(
    ("reply", "reason", "unreachable"),
    [
        ({"status": 503, "text": "Service Unavailable"}, "unreachable", True),
        ({"status": 502, "text": "<html>"}, "unreachable", True),
        ({"status": 504}, "unreachable", True),
        ({"status": 500, "text": "oops"}, "http_error", False),
        ({"status": 401, "text": "Unauthorized"}, "http_error", False),
        ({"status": 404, "text": "x" * 1_000_000}, "http_error", False),
        ({"status": 302, "headers": {"Location": "http://127.0.0.1:1/login"}}, "http_error", False),
        ({"status": 200, "text": "<html>log in</html>", "content_type": "text/html"}, "bad_response", False),
        ({"status": 200, "text": '{"status":"success","da', "content_type": "application/json"}, "bad_response", False),
        ({"status": 200, "text": "[" * 100_000}, "bad_response", False),
        ({"status": 200, "text": "null"}, "bad_response", False),
        ({"status": 200, "text": ""}, "bad_response", False),
        ({"status": 204}, "http_error", False),
        ({"status": 200, "text": '{"status":"success"}'}, "bad_response", False),
        ({"status": 200, "text": '{"status":"success","data":{"result":{}}}'}, "bad_response", False),
        ({"status": 200, "text": json.dumps(SUCCESS)}, "bad_response", False),
        ({"status": 200, "body": b"\x1f\x8b", "headers": {"Content-Encoding": "gzip"}}, "bad_response", False),
        ({"status": 200, "text": json.dumps({"status": "error", "error": "?"})}, "http_error", False),
    ],
)  # fmt: skip
async def test_an_answer_that_is_none_is_a_failure(reply: Any, reason: str, unreachable: bool):
    async with serving(replying(**reply)) as url, asking(url) as source:
        failure = await only_failure(source)
        assert (failure.reason, failure.unreachable, source.up) == (reason, unreachable, False)


@pytest.mark.parametrize(
    ("kind", "status", "reason", "unreachable", "up"),
    [
        ("bad_data", 400, "query_error", False, True),
        ("execution", 422, "query_error", False, True),
        ("timeout", 503, "timeout", False, True),
        ("canceled", 503, "timeout", False, True),
        ("unavailable", 503, "unreachable", True, False),
        ("internal", 500, "http_error", False, False),
    ],
)
async def test_an_error_of_the_api_is_told_by_its_kind(
    kind: str, status: int, reason: str, unreachable: bool, up: bool
):
    async def handler(request: web.Request) -> web.StreamResponse:
        return error(kind, "what Prometheus says", status)

    async with serving(handler) as url, asking(url) as source:
        failure = await only_failure(source, "x")
        assert (failure.reason, failure.unreachable, source.up) == (reason, unreachable, up)
        assert "what Prometheus says" in failure.message


@pytest.mark.parametrize("kind", ["scalar", "string", "matrix"])
async def test_a_result_of_another_type_is_refused(kind: str):
    body = {"status": "success", "data": {"resultType": kind, "result": [NOW, "1"]}}
    async with serving(replying(text=json.dumps(body))) as url, asking(url) as source:
        assert (await only_failure(source, "x")).reason == "wrong_type"


async def test_strings_and_ranges_are_refused_without_asking():
    fake = FakePrometheus()
    async with serving(fake) as url, asking(url) as source:
        outcomes = await source.query(ask('"7"', "x[5m]"))
        assert [o.reason for o in outcomes.values() if isinstance(o, Failure)] == ["wrong_type", "wrong_type"]
    assert fake.asked == []


async def test_an_endless_answer_is_cut_at_the_limit():
    async with speaking(zeros) as url, asking(url, timeout=10.0) as source:
        assert (await only_failure(source, "x")).reason == "too_large"


async def test_numbers_pass_as_they_are_and_carry_their_age():
    async with serving(FakePrometheus()) as url, asking(url) as source:
        outcomes = await source.query(ask("x", "not_a_number", "infinite", "scalar(x)"))
    answers = [one for one in outcomes.values() if isinstance(one, Answer)]
    assert [str(one.series[0].value) for one in answers] == ["1.0", "nan", "inf", "1.0"]
    assert {(one.evaluated_at, one.oldest_sample) for one in answers} == {(NOW, NOW - 10)}


async def test_no_queries_ask_nothing():
    async with asking(refused_url()) as source:
        assert await source.query([]) == {}


async def test_many_queries_go_out_in_few_requests_and_at_the_same_time():
    fake = FakePrometheus()
    texts = [f"x + {n}" for n in range(120)]
    fake.delays = dict.fromkeys(texts, 0.05)
    async with serving(fake) as url, asking(url) as source:
        outcomes = await source.query(ask(*texts))
    assert sorted(len(asked) for asked in fake.asked) == [20, 50, 50]
    assert fake.most_at_once == 3
    assert all(isinstance(one, Answer) for one in outcomes.values())


async def test_a_broken_query_fails_alone_and_goes_alone_from_then_on():
    fake = FakePrometheus()
    async with serving(fake) as url, asking(url) as source:
        outcomes = await source.query(ask("a", "broken", "b"))
        assert isinstance(outcomes["broken"], Failure)
        assert outcomes["broken"].reason == "query_error"
        assert isinstance(outcomes["a"], Answer)
        assert isinstance(outcomes["b"], Answer)
        assert len(fake.asked) == 4
        fake.asked.clear()
        await source.query(ask("a", "broken", "b"))
        assert sorted(fake.asked) == [["a", "b"], ["broken"]]
        fake.asked.clear()
        await source.query(ask("a", "mended", "b"))
        assert fake.asked == [["a", "mended", "b"]]


async def test_a_query_that_behaves_long_enough_is_asked_with_the_others_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "GOOD_ANSWERS_TO_REJOIN", 2)
    fake = FakePrometheus()
    fake.warns = {"a"}
    async with serving(fake) as url, asking(url) as source:
        await source.query(ask("a", "b", "c"))
        fake.warns = set()
        for _ in range(3):
            fake.asked.clear()
            await source.query(ask("a", "b", "c"))
    assert fake.asked == [["a", "b", "c"]]


async def test_a_query_with_a_huge_answer_costs_only_itself():
    async with serving(FakePrometheus()) as url, asking(url) as source:
        outcomes = await source.query(ask("a", "huge"))
    assert isinstance(outcomes["a"], Answer)
    assert isinstance(outcomes["huge"], Failure)
    assert outcomes["huge"].reason == "too_large"


async def test_a_slow_query_fails_alone_in_time_and_goes_alone_from_then_on():
    fake = FakePrometheus()
    fake.delays = {"slow": 5.0}
    async with serving(fake) as url, asking(url, timeout=0.6) as source:
        began = time.monotonic()
        outcomes = await source.query(ask("a", "slow", "b"))
        assert time.monotonic() - began < 1.2
        assert isinstance(outcomes["a"], Answer)
        assert isinstance(outcomes["b"], Answer)
        slow = outcomes["slow"]
        assert isinstance(slow, Failure)
        assert (slow.reason, slow.unreachable) == ("timeout", False)
        assert list(source._alone) == ["slow"]


async def test_answers_are_handed_on_as_they_arrive_and_each_only_once():
    fake = FakePrometheus()
    fake.delays = {"slow": 5.0}
    seen: list[tuple[str, float, bool]] = []
    async with serving(fake) as url, asking(url, timeout=2.0) as source:
        for deadline in (1.7, 1.0):
            seen.clear()
            began = time.monotonic()

            def arrived(key: str, outcome: Answer | Failure, began: float = began) -> None:
                seen.append((key, time.monotonic() - began, isinstance(outcome, Failure) and outcome.unreachable))

            outcomes = await source.query(ask("x[5m]", "a", "slow", "b"), arrived)
            assert list(outcomes) == ["x[5m]", "a", "slow", "b"]
            assert sorted(key for key, _, _ in seen) == ["a", "b", "slow", "x[5m]"]
            assert all(after < deadline for key, after, _ in seen if key != "slow")
            assert seen[-1][0] == "slow"
            assert not any(unreachable for _, _, unreachable in seen)


async def test_many_answers_leave_the_loop_room_for_the_gate_in_between():
    texts = [f"x + {number}" for number in range(3 * module.CHUNK_QUERIES)]
    turn, turns = 0, []
    loop = asyncio.get_running_loop()

    def count() -> None:
        nonlocal turn
        turn += 1
        loop.call_soon(count)

    async with serving(FakePrometheus()) as url, asking(url) as source:
        count()
        await source.query(ask(*texts), lambda key, outcome: turns.append(turn))
    assert len(turns) == len(texts)
    assert max(turns.count(one) for one in turns) <= module.HANDED_ON_AT_ONCE


async def test_what_a_cancelled_taker_leaves_behind_is_handed_on_by_the_next():
    answer = Answer(series=(), evaluated_at=NOW, oldest_sample=None, warnings=())
    seen: list[str] = []
    far = asyncio.get_running_loop().time() + 60.0
    round_ = module._Round(deadline=far, half_time=far, arrived=lambda key, outcome: seen.append(key))
    keys = [str(number) for number in range(2 * module.HANDED_ON_AT_ONCE)]
    takers = [asyncio.create_task(round_.take(dict.fromkeys(part, answer))) for part in (keys[:-1], keys[-1:])]
    await asyncio.sleep(0)
    assert seen == keys[: module.HANDED_ON_AT_ONCE]
    for taker in takers:
        taker.cancel()
    await asyncio.wait(takers)
    await round_.finish()
    assert seen == keys


async def test_a_chunk_that_is_late_but_whole_blames_nobody():
    fake = FakePrometheus()
    fake.delays = {"a": 0.7, "b": 0.7}
    async with serving(fake) as url, asking(url, timeout=1.2) as source:
        outcomes = await source.query(ask("a", "b"))
        assert all(isinstance(one, Answer) for one in outcomes.values())
        assert source._alone == {}


async def test_only_so_many_queries_are_asked_alone_at_once():
    fake = FakePrometheus()
    texts = ["broken", *(f"x + {n}" for n in range(30))]
    fake.delays = dict.fromkeys(texts, 0.02)
    async with serving(fake) as url, asking(url) as source:
        await source.query(ask(*texts))
    assert fake.most_at_once == 8


@pytest.mark.parametrize("refusal", [error("execution", "too many samples", 422), web.Response(status=413)])
async def test_queries_that_only_together_are_too_much_go_alone_from_then_on(refusal: web.Response):
    fake = FakePrometheus()

    async def handler(request: web.Request) -> web.StreamResponse:
        answer = await fake(request)
        return answer if len(fake.asked[-1]) == 1 else web.Response(status=refusal.status, body=refusal.body)

    async with serving(handler) as url, asking(url) as source:
        for requests in (3, 2):
            fake.asked.clear()
            outcomes = await source.query(ask("a", "b"))
            assert all(isinstance(one, Answer) for one in outcomes.values())
            assert len(fake.asked) == requests


async def test_queries_that_never_get_a_turn_time_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SINGLES_AT_ONCE", 1)
    fake = FakePrometheus()
    fake.delays = {"a": 5.0, "b": 5.0, "c": 5.0}
    async with serving(fake) as url, asking(url, timeout=0.4) as source:
        outcomes = await source.query(ask("a", "b", "c"))
    assert {one.reason for one in outcomes.values() if isinstance(one, Failure)} == {"timeout"}
    assert any("no turn" in one.message for one in outcomes.values() if isinstance(one, Failure))
    assert len(fake.asked) == 2


async def test_memory_of_lone_queries_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_REMEMBERED", 2)
    async with asking(refused_url()) as source:
        for text in "abc":
            source._suspect(text)
        assert list(source._alone) == ["b", "c"]


async def test_a_warning_is_pinned_on_the_query_it_belongs_to():
    fake = FakePrometheus()
    fake.warns = {"b"}
    async with serving(fake) as url, asking(url) as source:
        outcomes = await source.query(ask("a", "b", "c"))
        warnings = [one.warnings for one in outcomes.values() if isinstance(one, Answer)]
        assert warnings == [(), ("b is partial",), ()]
        fake.asked.clear()
        await source.query(ask("a", "b", "c"))
        assert sorted(fake.asked) == [["a", "c"], ["b"]]


async def test_warnings_everywhere_are_not_searched_for_a_culprit_at_every_tick():
    fake = FakePrometheus()
    fake.warns = {"a", "b", "c"}
    async with serving(fake) as url, asking(url) as source:
        for expected in (4, 1):
            fake.asked.clear()
            outcomes = await source.query(ask("a", "b", "c"))
            assert len(fake.asked) == expected
            assert all(isinstance(one, Answer) and one.warnings for one in outcomes.values())


async def test_remarks_on_style_are_no_warnings():
    result = [{"metric": {"__ks__": "t"}, "value": [NOW, "1"]}]
    body = {
        "status": "success", "data": {"resultType": "vector", "result": result},
        "warnings": ["PromQL info: metric might not be a counter"], "infos": ["PromQL info: too"],
    }  # fmt: skip
    async with serving(replying(text=json.dumps(body))) as url, asking(url) as source:
        answer = (await source.query(ask("x")))["x"]
    assert isinstance(answer, Answer)
    assert answer.warnings == ()


async def test_the_second_server_answers_when_the_first_refuses_and_is_asked_first_from_then_on():
    second = FakePrometheus()
    for broken in (replying(status=503), replying(text="<html>"), replying(status=401), replying(status=500)):
        async with serving(broken) as bad, serving(second) as good, asking(bad, good) as source:
            for _ in range(2):
                assert isinstance((await source.query(ask("x")))["x"], Answer)
            assert source._preferred == 1


async def test_the_second_server_answers_in_time_when_the_first_hangs():
    async with speaking(hang) as bad, serving(FakePrometheus()) as good, asking(bad, good, timeout=2.0) as source:
        outcomes = await source.query(ask("x", "y"))
        assert all(isinstance(one, Answer) for one in outcomes.values())
        began = time.monotonic()
        await source.query(ask("x", "y"))
        assert time.monotonic() - began < 0.9  # the share of the one that hangs is a second


async def test_a_query_error_is_not_shopped_around():
    first, second = FakePrometheus(), FakePrometheus()
    async with serving(first) as one, serving(second) as two, asking(one, two) as source:
        await source.query(ask("broken"))
    assert (len(first.asked), second.asked) == (1, [])


async def test_all_servers_down_is_unreachable_and_names_them_all():
    one, two = refused_url(), refused_url()
    async with asking(one, two) as source:
        failure = await only_failure(source)
    assert failure.unreachable is True
    assert one in failure.message
    assert two in failure.message


async def test_a_server_that_comes_back_is_asked_again():
    async with asking(refused_url()) as source:
        assert isinstance((await source.query(ask("x")))["x"], Failure)
        async with serving(FakePrometheus()) as url:
            source._endpoints[0]._url = url + "/api/v1/query"
            assert isinstance((await source.query(ask("x")))["x"], Answer)
            assert source.up is True
        assert isinstance((await source.query(ask("x")))["x"], Failure)
        assert source.up is False


async def test_a_connection_that_the_server_dropped_meanwhile_is_opened_again():
    fake = FakePrometheus()
    dropped = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal dropped
        if len(fake.asked) == 1 and not dropped:
            dropped = 1
            assert request.transport is not None
            request.transport.close()
        return await fake(request)

    async with serving(handler) as url, asking(url) as source:
        for _ in range(2):
            assert isinstance((await source.query(ask("x")))["x"], Answer)
    assert dropped == 1


async def test_a_path_prefix_is_kept_and_the_query_travels_in_the_body():
    fake = FakePrometheus()
    async with (
        serving(fake, path="/prom/api/v1/query") as url,
        asking(url + "/prom/", headers={"X-Scope": "a"}) as source,
    ):
        assert isinstance((await source.query(ask("x")))["x"], Answer)
    assert 0 < int(fake.forms[0]["timeout"].removesuffix("ms")) < 2000


async def test_credentials_come_from_the_url_or_the_configuration_and_are_never_shown(tmp_path: Path):
    fake = FakePrometheus()
    token = tmp_path / "token"
    token.write_text("one")
    http = HttpConfig(authorization=Authorization(credentials_file=str(token)))
    async with serving(fake) as url:
        with_user = url.replace("http://", f"http://me:{SECRET}@")
        async with asking(with_user) as source:
            await source.query(ask("x"))
        async with asking(with_user, http=http) as source:
            await source.query(ask("x"))
            token.write_text("three")
            await source.query(ask("x"))
            token.unlink()
            failure = await only_failure(source)
    assert fake.authorizations[0] is not None
    assert fake.authorizations[0].startswith("Basic ")
    assert fake.authorizations[1:] == ["Bearer one", "Bearer three"]
    assert (failure.reason, failure.unreachable) == ("unreachable", True)
    async with asking(with_user, http=HttpConfig(basic_auth=BasicAuth(username="me", password=SECRET))) as source:
        assert SECRET not in (await only_failure(source)).message


async def test_cancellation_passes_and_leaves_no_task_behind():
    async with speaking(hang) as url, asking(url, timeout=30.0) as source:
        before = asyncio.all_tasks()
        task = asyncio.create_task(source.query(ask("x", "y")))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert {one.get_name() for one in asyncio.all_tasks() - before if "_ask" in repr(one)} == set()


def test_a_source_without_a_server_is_a_mistake():
    with pytest.raises(ValueError, match="at least one"):
        PrometheusSource(urls=[], timeout=1.0)


async def test_credentials_that_a_server_repeats_are_blotted_out():
    async def careless(request: web.Request) -> web.Response:
        sent = f"you sent {request.headers['Authorization']} and {request.headers['X-Key']}: {SECRET} is wrong"
        return error("unauthorized", sent, 401)

    http = HttpConfig(basic_auth=BasicAuth(username="me", password=SECRET))
    async with serving(careless) as url, asking(url, http=http, headers={"X-Key": "header-secret"}) as source:
        (told,) = (await source.query(ask("x"))).values()
    shown = repr(told)
    assert "you sent … and …: … is wrong" in shown
    for secret in (SECRET, "header-secret", "bWU6"):
        assert secret not in shown
