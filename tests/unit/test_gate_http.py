import asyncio
import contextlib
import http.client
import json
import os
import socket
import stat
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidecar.adapters.gate_http import GateLimits, GateServer, connection
from sidecar.adapters.gate_http.connection import path_of
from sidecar.client import ExecutionGate, TradingBlockedError
from sidecar.core.policy import GatePolicy
from sidecar.core.snapshot import ALL_CLEAR, Reason, ReasonCode, Snapshot
from sidecar.core.states import Mode, Restriction, Stage, State

KILLED = Reason(code=ReasonCode.KILLED, message="killed by ops")
SHORT = GateLimits(head_seconds=0.05, body_seconds=0.05, idle_seconds=0.3, connections=3)
QUESTION = b"GET /gate HTTP/1.1\r\n\r\n"
ORDER = b'{"side":"buy","quantity":1}'


def snapshot(restriction=Restriction.NONE, reason=ALL_CLEAR) -> Snapshot:
    return Snapshot(
        switch="s",
        mode=Mode.ACTIVE,
        state=State.KILLED if restriction else State.ACTIVE,
        stage=Stage.NONE,
        restriction=restriction,
        factor=1.0,
        epoch=1,
        since=0.0,
        gate_restriction=restriction,
        gate_factor=0.0 if restriction else 1.0,
        reason=reason,
    )


OPEN = snapshot()
SHUT = snapshot(Restriction.HALT, KILLED)


class Gate:
    """A gate on a free port, and raw conversations with it."""

    def __init__(self, server: GateServer, port: int) -> None:
        self.server, self.port = server, port

    async def talk(self, *parts: bytes, pause: float = 0.0) -> bytes:
        """Send the parts, end the sending half, and return all that comes back until the gate closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)
            writer.write_eof()
            return await asyncio.wait_for(reader.read(), 5)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def ask(self, *parts: bytes, pause: float = 0.0) -> tuple[int, dict[str, str], bytes]:
        answers = parse_all(await self.talk(*parts, pause=pause))
        assert len(answers) == 1, answers
        return answers[0]

    async def still_answers(self) -> bool:
        return (await self.ask(b"GET /gate HTTP/1.1\r\n\r\n"))[0] == 200


def parse_all(data: bytes, *, bodies: bool = True) -> list[tuple[int, dict[str, str], bytes]]:
    answers = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        size = int(headers.get("Content-Length", 0)) if bodies else 0
        answers.append((int(status.split()[1]), headers, data[:size]))
        data = data[size:]
    return answers


@contextlib.asynccontextmanager
async def running(at=OPEN, policy=None, **options):
    server = GateServer(switch="s", **options)
    if at is not None:
        server.update(at, policy or GatePolicy())
    _, port = await server.start_tcp("127.0.0.1", 0)
    try:
        yield Gate(server, port)
    finally:
        await server.stop(1.0)


@pytest.fixture
async def gate():
    async with running() as running_gate:
        yield running_gate


def post(body: bytes, *more: bytes) -> bytes:
    head = [b"POST /v1/orders/check HTTP/1.1", b"Content-Length: %d" % len(body), *more]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


METHODS = (
    b"GET HEAD POST PUT DELETE OPTIONS PATCH TRACE PROPFIND PURGE QUERY REPORT BREW get SETUP SOURCE PRI X-1".split()
)


@pytest.mark.parametrize("at", [OPEN, SHUT], ids=["open", "shut"])
async def test_every_method_and_path_below_gate_gets_200_or_403(at):
    async with running(at) as gate:
        for method in [*METHODS, b"CONNECT"]:
            for path in (b"/gate", b"/gate/", b"/gate/a/b?c=d", b"/gate?x=1", b"http://h:1/gate/a"):
                if method == b"CONNECT" and not path.startswith(b"/"):
                    continue  # a CONNECT has no such target
                data = await gate.talk(method + b" " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
                ((status, headers, body),) = parse_all(data, bodies=method != b"HEAD")
                assert status == (200 if at is OPEN else 403), (method, path)
                assert headers["X-Killswitch-Reason"] == ("active" if at is OPEN else "killed")
                assert headers["Cache-Control"] == "no-store"
                assert bool(body) == (method != b"HEAD")


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([], 403),
        ([b"X-Order-Intent: new"], 403),
        ([b"X-Order-Intent: cancel"], 200),
        ([b"x-ORDER-intent:   CanceL  "], 200),
        ([b"X-Order-Intent:"], 403),
        ([b"X-Order-Intent: cancel, cancel"], 403),
        ([b"X-Order-Intent: cancelled"], 403),
        ([b"X-Order-Intent: reduce"], 403),
        ([b"X-Order-Intent: cancel", b"X-Order-Intent: cancel"], 403),
        ([b"X-Order-Intent: cancel", b"X-Order-Intent: new"], 403),
        ([b"X-Order-Intent: new", b"X-Order-Intent: cancel"], 403),
        ([b"X-Order-Intent:", b"X-Order-Intent: cancel"], 403),
        ([b"X-Order-Intent: new", b"X-Order-Intent: cancel", b"X-Order-Intent: cancel"], 403),
    ],
)
async def test_only_one_clear_intent_counts(lines, status):
    async with running(SHUT) as gate:
        assert (await gate.ask(b"\r\n".join([b"GET /gate HTTP/1.1", *lines]) + b"\r\n\r\n"))[0] == status


async def test_a_trailer_is_no_intent():
    async with running(SHUT) as gate:
        chunked = (
            b"POST /gate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Order-Intent: cancel\r\n\r\n"
        )
        answers = parse_all(await gate.talk(chunked + b"GET /gate HTTP/1.1\r\n\r\n"))
        assert [answer[0] for answer in answers] == [403, 403]


async def test_the_answer_does_not_wait_for_the_body(gate):
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
    writer.write(b"POST /gate HTTP/1.1\r\nContent-Length: 5\r\n\r\n")
    assert b" 200 " in await asyncio.wait_for(reader.readline(), 5)
    writer.write(b"helloGET /nothing HTTP/1.1\r\n\r\n")
    writer.write_eof()
    assert b" 404 " in await asyncio.wait_for(reader.read(), 5)
    writer.close()


async def test_a_body_that_nobody_reads_may_not_be_endless(gate):
    start = b"POST /gate HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
    writer.write(start)
    with contextlib.suppress(ConnectionError):
        for _ in range(100):
            writer.write(b"x" * 65536)
            await writer.drain()
    with contextlib.suppress(ConnectionError):
        await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert await gate.still_answers()


async def test_pipelined_questions_are_answered_in_order(gate):
    many = 700  # more than one slice of bytes
    asked = [b"GET /gate/%d HTTP/1.1\r\n\r\n" % n if n % 2 else b"GET /no/%d HTTP/1.1\r\n\r\n" % n for n in range(many)]
    answers = parse_all(await gate.talk(b"".join(asked)))
    assert [answer[0] for answer in answers] == [404 if n % 2 == 0 else 200 for n in range(many)]


async def test_questions_behind_a_long_list_wait_for_their_turn(gate):
    orders = b"[" + b",".join([ORDER] * 500) + b"]"
    after = b"GET /gate HTTP/1.1\r\n\r\n" + post(ORDER) + b"GET /none HTTP/1.1\r\n\r\n" + post(b"[]")
    answers = parse_all(await gate.talk(post(orders) + after * 3))
    assert [answer[0] for answer in answers] == [200, *[200, 200, 404, 400] * 3]
    assert len(json.loads(answers[0][2])) == 500
    assert isinstance(json.loads(answers[2][2]), dict)


async def test_a_list_is_answered_to_a_peer_that_has_stopped_sending_byte_by_byte(gate):
    body = b"[" + b",".join([ORDER] * 100) + b"]"
    request = post(body)
    status, _, answer = await gate.ask(request[:50], request[50:200], request[200:], pause=0.01)
    assert (status, len(json.loads(answer))) == (200, 100)


async def test_a_request_may_come_in_any_pieces(gate):
    request = b"\r\n" + post(ORDER, b"X-A: b")
    status, _, _ = await gate.ask(*[request[at : at + 1] for at in range(len(request))])
    assert status == 200


@pytest.mark.parametrize(
    ("start", "connection"),
    [
        (b"GET /gate HTTP/1.1\r\n", "keep-alive"),
        (b"GET /gate HTTP/1.1\r\nConnection: close\r\n", "close"),
        (b"GET /gate HTTP/1.0\r\n", "close"),
        (b"GET /gate HTTP/1.0\r\nConnection: keep-alive\r\n", "keep-alive"),
        (b"POST /gate HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n", "close"),
    ],
)
async def test_the_connection_is_kept_as_asked(gate, start, connection):
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
    writer.write(start + b"\r\n")
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert f"Connection: {connection}\r\n".encode() in head
    if connection == "close" and b"POST" not in start:
        await asyncio.wait_for(reader.read(), 5)
    writer.close()


async def test_expect_continue_is_answered_before_the_body_of_a_check(gate):
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
    writer.write(b"POST /v1/orders/check HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(ORDER))
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5) == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(ORDER)
    assert b" 200 " in await asyncio.wait_for(reader.readline(), 5)
    writer.close()


async def test_a_wish_to_upgrade_is_ignored_and_the_body_read(gate):
    upgrade = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk")
    answers = parse_all(await gate.talk(post(ORDER, *upgrade) + post(b"[" + ORDER + b"]") + post(ORDER, *upgrade)))
    assert [answer[0] for answer in answers] == [200, 200, 200]
    websocket = b"GET /gate HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\nX-Order-Intent: cancel\r\n\r\n"
    assert (await gate.ask(websocket))[1]["X-Killswitch-Reason"] == "cancel"


async def test_a_chunked_check_is_read(gate):
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (ORDER[:5], ORDER[5:])) + b"0\r\n\r\n"
    request = b"POST /v1/orders/check?x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    assert (await gate.ask(request))[0] == 200


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /gates HTTP/1.1\r\n\r\n", 404),
        (b"GET /Gate HTTP/1.1\r\n\r\n", 404),
        (b"OPTIONS * HTTP/1.1\r\n\r\n", 404),
        (b"CONNECT a.b:80 HTTP/1.1\r\n\r\n", 404),
        (b"GET /?/gate HTTP/1.1\r\n\r\n", 404),
        (b"GET http://host?/gate HTTP/1.1\r\n\r\n", 404),
        (b"GET /v1/orders/check HTTP/1.1\r\n\r\n", 405),
        (b"BREW /v1/orders/check HTTP/1.1\r\n\r\n", 405),
        (post(b""), 400),
        (post(b"[]"), 400),
        (post(b"{}"), 400),
        (post(b"[" + b" " * 262_144 + b"]"), 413),
        (b"POST /v1/orders/check HTTP/1.1\r\nContent-Length: 262145\r\n\r\n", 413),
        (b"POST /v1/orders/check HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n40001\r\n" + b" " * 262_145, 413),
        (b"GET /gate HTTP/1.1\r\nA: " + b"x" * 16_400 + b"\r\n\r\n", 431),
        (b"GET /gate/" + b"x" * 16_400 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET /gate HTTP/1.1\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431),
        (b"GET /gate HTTP/1.1\r\nA: " + b"x" * 300_000, 431),
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"GET /ga te HTTP/1.1\r\n\r\n", 400),
        (b"GET /gate HTTP/1.1\r\nA\r\n\r\n", 400),
        (b"POST /v1/orders/check HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST /v1/orders/check HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}", 400),
        (b"POST /v1/orders/check HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /v1/orders/check HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
    ids=range(27),
)
async def test_what_is_no_question_is_a_problem_that_denies(gate, request_bytes, status):
    answered, headers, body = await gate.ask(request_bytes)
    assert answered == status
    assert headers["Content-Type"] == "application/problem+json"
    problem = json.loads(body)
    assert (problem["status"], problem["decision"]) == (status, "deny")
    assert headers.get("Allow") == ("POST" if status == 405 else None)
    assert await gate.still_answers()


async def test_sixteen_kib_of_headers_are_read(gate):
    head = b"GET /gate HTTP/1.1\r\n" + b"".join(b"A%02d: %s\r\n" % (n, b"x" * 150) for n in range(99)) + b"\r\n"
    assert (await gate.ask(head))[0] == 200


async def test_the_same_bytes_again_get_the_answer_of_now():
    async with running(OPEN) as gate:
        reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)

        async def ask(request: bytes, method: bytes = b"GET") -> str:
            writer.write(method + b" /gate HTTP/1.1\r\n" + request)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            ((_, headers, _),) = parse_all(head, bodies=False)
            if method != b"HEAD":
                await reader.readexactly(int(headers["Content-Length"]))
            return headers["X-Killswitch-Reason"]

        cancel, new = b"X-Order-Intent: cancel\r\n\r\n", b"X-Order-Intent: newest\r\n\r\n"
        assert [await ask(request) for request in (new, new, cancel, cancel, new, new)] == [
            *["active"] * 2,
            *["cancel"] * 2,
            *["active"] * 2,
        ]
        gate.server.update(SHUT, GatePolicy())
        assert [await ask(request) for request in (new, cancel, new, new)] == ["killed", "cancel", "killed", "killed"]
        assert [await ask(new, b"HEAD") for _ in range(3)] == ["killed"] * 3
        with_body = b"Content-Length: 30\r\n\r\n"
        assert await ask(with_body) == "killed"
        writer.write(b"GET /gate HTTP/1.1\r\n\r\n".ljust(30))  # a body that looks like a question
        assert await ask(cancel) == "cancel"
        gate.server.set_admit(lambda intent: KILLED)
        gate.server.update(OPEN, GatePolicy())
        assert [await ask(new), await ask(new), await ask(cancel)] == ["killed", "killed", "cancel"]
        writer.close()


async def test_bytes_that_were_a_question_are_no_question_inside_a_body(gate):
    question = b"GET /gate HTTP/1.1\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
    for _ in range(2):
        writer.write(question)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        await reader.readexactly(int(parse_all(head, bodies=False)[0][1]["Content-Length"]))
    writer.write(b"POST /v1/orders/check HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(question))
    await asyncio.sleep(0.02)
    writer.write(question)
    assert b" 400 " in await asyncio.wait_for(reader.readline(), 5)
    writer.close()


async def test_nothing_after_close_is_answered(gate):
    data = await gate.talk(b"GET /gate HTTP/1.1\r\nConnection: close\r\n\r\nGET /gate HTTP/1.1\r\n\r\n")
    assert len(parse_all(data)) == 1


async def test_a_broken_request_after_a_good_one_gets_its_own_answer(gate):
    data = await gate.talk(b"GET /gate HTTP/1.1\r\n\r\nBREW\r\n\r\nGET /gate HTTP/1.1\r\n\r\n")
    assert [answer[0] for answer in parse_all(data)] == [200, 400]


async def test_no_answer_allows_other_origins(gate):
    for request in (b"GET /gate", b"OPTIONS /gate", b"OPTIONS /v1/orders/check"):
        _, headers, _ = await gate.ask(request + b" HTTP/1.1\r\nOrigin: http://evil\r\n\r\n")
        assert not any(name.lower().startswith("access-control") for name in headers)


async def test_the_client_knows_a_switch_by_a_name_that_no_header_can_carry():
    async with running(replace(OPEN, switch="取引/bot-é")) as gate:
        url = f"http://127.0.0.1:{gate.port}"
        expecting = ExecutionGate(url=url, expect_switch="取引/bot-é", timeout=5.0)
        assert await expecting.check_can_execute_async()
        assert await expecting.check_can_execute_async({"side": "buy", "quantity": 1})
        other = ExecutionGate(url=url, expect_switch="取消/bot-é", timeout=5.0)
        for order in (None, {"side": "buy", "quantity": 1}):
            with pytest.raises(TradingBlockedError, match="is the gate of '取引/bot-é'; wanted '取消/bot-é'"):
                await other.check_can_execute_async(order)
        expecting.close()
        other.close()


async def test_before_the_first_snapshot_the_gate_denies_all_but_cancels():
    async with running(None) as gate:
        assert (await gate.ask(b"GET /gate HTTP/1.1\r\n\r\n"))[1]["X-Killswitch-Reason"] == "not_ready"
        assert (await gate.ask(b"GET /gate HTTP/1.1\r\nX-Order-Intent: cancel\r\n\r\n"))[0] == 200


async def test_a_new_snapshot_holds_from_the_next_question_on(gate):
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
    for at, status in ((OPEN, b" 200 "), (SHUT, b" 403 "), (OPEN, b" 200 ")):
        gate.server.update(at, GatePolicy())
        writer.write(b"HEAD /gate HTTP/1.1\r\n\r\n")
        assert status in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    writer.close()


@pytest.mark.parametrize(
    "started",
    [b"GET /ga", b"G", b"GET /gate HTTP/1.1\r\nA: b\r\n", b"POST /gate HTTP/1.1\r\nContent-Length: 9\r\n\r\nx"],
)
async def test_a_slow_request_is_cut_off(started):
    async with running(limits=SHORT) as gate:
        reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
        started_at = asyncio.get_running_loop().time()
        writer.write(started)
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 5)
        assert asyncio.get_running_loop().time() - started_at < 0.25
        writer.close()


async def test_bytes_that_trickle_in_do_not_win_time():
    async with running(limits=SHORT) as gate:
        reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                writer.write(b"G" if _ == 0 else b"E")
                await asyncio.sleep(0.01)
                await writer.drain()
        assert reader.at_eof() or reader.exception()
        writer.close()


async def test_an_idle_connection_is_closed_in_the_end():
    async with running(limits=SHORT) as gate:
        reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
        await asyncio.sleep(0.15)
        writer.write(b"HEAD /gate HTTP/1.1\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


async def test_too_many_connections_are_closed_at_once():
    async with running(limits=GateLimits(connections=2)) as gate:
        kept = [await asyncio.open_connection("127.0.0.1", gate.port) for _ in range(2)]
        for reader, writer in kept:
            writer.write(b"HEAD /gate HTTP/1.1\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(OSError):  # which one depends on how far the connection has come
            assert await gate.talk(b"GET /gate HTTP/1.1\r\n\r\n") == b""
        assert (gate.server.statistics().connections, gate.server.statistics().connections_refused) == (2, 1)
        for _, writer in kept:
            writer.close()


async def test_connections_that_were_opened_and_forgotten_make_room(monkeypatch):
    monkeypatch.setattr(connection, "_SILENT_SECONDS", 0.05)
    async with running(limits=GateLimits(connections=3)) as gate:
        streams = [await asyncio.open_connection("127.0.0.1", gate.port) for _ in range(3)]
        await asyncio.sleep(0.1)
        reader, writer = streams[0]
        writer.write(b"GET /gate HTTP/1.1\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        assert await gate.still_answers()
        writer.write(b"GET /gate HTTP/1.1\r\n\r\n")
        assert b"HTTP/1.1 200" in await asyncio.wait_for(reader.readuntil(b"OK\r\n"), 5), "who asks is not silent"
        assert [await streams[number][0].read() for number in (1, 2)] == [b"", b""]
        for _, each in streams:
            each.close()


@pytest.mark.parametrize("questions", [100, 300])  # less than is parsed in one go, and more
async def test_of_all_that_is_piled_up_one_piece_is_worked_on_in_each_turn(gate, monkeypatch, questions):
    turns, turn = [], 0

    async def count():
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    pump = connection.GateConnection._pump
    monkeypatch.setattr(connection.GateConnection, "_pump", lambda each: (turns.append(turn), pump(each)))
    counting = asyncio.create_task(count())
    answers = await asyncio.gather(*(gate.talk(QUESTION * questions) for _ in range(10)))
    counting.cancel()
    assert [len(parse_all(answer)) for answer in answers] == [questions] * 10
    assert len(turns) >= questions * len(QUESTION) * 10 / 1024
    assert len(set(turns)) == len(turns), "two pieces in one turn"


async def test_a_large_list_waits_behind_what_is_piled_up_and_small_questions_do_not(gate):
    order = b'{"intent":"new","symbol":"A","side":"buy","quantity":1,"position":0}'
    body = b"[" + b",".join([order] * 900) + b"]"
    status, _, answer = await gate.ask(post(body))
    assert (status, answer.count(b'"allow"')) == (200, 900)


async def test_a_peer_that_does_not_read_is_not_read_from(gate):
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.port, limit=1024)
    asked = 20_000
    writer.write(b"GET /gate HTTP/1.1\r\n\r\n" * asked)
    await asyncio.sleep(0.2)
    answered = sum(gate.server.statistics().decisions.values())
    assert answered < asked
    count = 0
    while count < asked:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]))
        count += 1
    writer.close()


async def test_decisions_and_durations_are_counted(gate):
    await gate.talk(b"GET /gate HTTP/1.1\r\n\r\n" * 3 + post(b"[" + ORDER + b"," + ORDER + b"]") + post(b"{}"))
    await gate.talk(b"GET /gate HTTP/1.1\r\nX-Order-Intent: cancel\r\n\r\n" + b"GET / HTTP/1.1\r\n\r\n")
    statistics = gate.server.statistics()
    counted = {pair: count for pair, count in statistics.decisions.items() if count}
    assert counted == {("allow", "active"): 5, ("deny", "bad_order"): 1, ("allow", "cancel"): 1}
    assert sum(statistics.duration_counts) == 6
    assert statistics.duration_sum > 0


async def test_a_failure_inside_is_no_allowance(gate, monkeypatch, caplog):
    def fail(key):
        raise RuntimeError("broken")

    monkeypatch.setattr(gate.server._desk, "answer", fail)
    status, _, body = await gate.ask(b"GET /gate HTTP/1.1\r\n\r\n")
    assert (status, json.loads(body)["reason"]["code"]) == (403, "internal_error")
    assert (await gate.ask(b"GET /gate HTTP/1.1\r\nX-Order-Intent: cancel\r\n\r\n"))[0] == 200
    assert "gate.answer_failed" in caplog.text


async def test_stop_ends_idle_connections_and_lets_a_list_finish():
    server = GateServer(switch="s")
    server.update(OPEN, GatePolicy())
    _, port = await server.start_tcp("127.0.0.1", 0)
    idle, idle_writer = await asyncio.open_connection("127.0.0.1", port)
    busy, busy_writer = await asyncio.open_connection("127.0.0.1", port)
    busy_writer.write(post(b"[" + b",".join([ORDER] * 1000) + b"]"))
    async with asyncio.timeout(5):
        while not any(connection._busy for connection in server._roster.open):  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0)
    await server.stop(5.0)
    assert await idle.read() == b""
    ((status, _, body),) = parse_all(await busy.read())
    assert (status, len(json.loads(body))) == (200, 1000)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    idle_writer.close()
    busy_writer.close()


async def test_stop_does_not_wait_longer_than_its_grace():
    async with running() as gate:
        reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
        writer.write(b"GET /ga")
        await asyncio.sleep(0.02)
        await asyncio.wait_for(gate.server.stop(0.05), 2)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory() as name:  # a short path: sockets have at most 107 characters
        yield Path(name)


async def ask_unix(path: Path) -> bytes:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(b"GET /gate HTTP/1.1\r\nConnection: close\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return answer


@pytest.mark.parametrize("mask", [0o000, 0o077])
async def test_the_unix_socket_is_open_to_every_user_whatever_the_umask(folder, mask):
    path = folder / "run" / "gate.sock"
    server = GateServer(switch="s")
    before = os.umask(mask)
    try:
        await server.start_unix(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    assert b"not_ready" in await ask_unix(path)
    await server.stop(1.0)
    assert not path.exists()


async def test_a_socket_left_by_a_dead_process_is_replaced(folder):
    path = folder / "gate.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = GateServer(switch="s")
    await server.start_unix(path)
    assert b"403" in await ask_unix(path)
    await server.stop(1.0)


async def test_a_socket_that_is_served_and_a_file_that_is_none_are_left_alone(folder):
    path = folder / "gate.sock"
    first, second = GateServer(switch="s"), GateServer(switch="s")
    await first.start_unix(path)
    with pytest.raises(OSError, match="listens on the gate's socket already"):
        await second.start_unix(path)
    assert b"403" in await ask_unix(path)
    (folder / "file").write_text("x")
    with pytest.raises(OSError, match="is no socket"):
        await second.start_unix(folder / "file")
    assert (folder / "file").read_text() == "x"
    await first.stop(1.0)
    await second.stop(1.0)


async def test_the_socket_of_a_successor_is_not_removed(folder):
    path = folder / "gate.sock"
    server = GateServer(switch="s")
    await server.start_unix(path)
    path.unlink()
    path.write_text("another's")
    await server.stop(1.0)
    assert path.read_text() == "another's"


async def test_an_ordinary_client_keeps_its_connection(gate):
    def talk():
        client = http.client.HTTPConnection("127.0.0.1", gate.port, timeout=5)
        client.connect()
        sock = client.sock
        seen = []
        for _ in range(3):
            client.request("GET", "/gate", headers={"X-Order-Intent": "new"})
            reply = client.getresponse()
            seen.append((reply.status, json.loads(reply.read())["decision"]))
            client.request("POST", "/v1/orders/check", body=ORDER, headers={"Content-Type": "text/plain"})
            reply = client.getresponse()
            seen.append((reply.status, json.loads(reply.read())["decision"]))
        assert client.sock is sock
        client.close()
        return seen

    assert await asyncio.to_thread(talk) == [(200, "allow")] * 6


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/gate", b"/gate"),
        (b"/gate/a?b/c#d", b"/gate/a"),
        (b"http://h:1/gate", b"/gate"),
        (b"http://h", b"/"),
        (b"http://h?/gate", b"/"),
        (b"*", b"/"),
        (b"", b"/"),
    ],
)
def test_the_path_of_a_target(target, path):
    assert path_of(target) == path


PIECES = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [
            b"GET /gate HTTP/1.1\r\n",
            b"POST /v1/orders/check HTTP/1.1\r\n",
            b"CONNECT /gate HTTP/1.1\r\n",
            b"FOO /gate HTTP/1.1\r\n",
            b"Content-Length: 4\r\n",
            b"Transfer-Encoding: chunked\r\n",
            b"Connection: Upgrade\r\nUpgrade: x\r\n",
            b"Connection: close\r\n",
            b"Expect: 100-continue\r\n",
            b"X-Order-Intent: cancel\r\n",
            b"\r\n",
            b"0\r\n\r\n",
            b"[{}]",
            b"[" + b",".join([ORDER] * 40) + b"]",
        ]
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversations=st.lists(st.lists(PIECES, max_size=12), max_size=4))
def test_whatever_is_sent_the_next_question_is_answered(conversations):
    async def play():
        async with running() as gate:
            for pieces in conversations:
                data = b""
                with contextlib.suppress(ConnectionError):
                    data = await gate.talk(b"".join(pieces[:6]), *pieces[6:])
                for status, headers, _ in parse_all(data.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")):
                    assert status in {200, 400, 404, 405, 413, 431}, headers
            assert await gate.still_answers()

    asyncio.run(play())
