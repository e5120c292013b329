"""The operations listener and the control socket, over real connections, with a desk written for the test."""

import asyncio
import gzip
import hashlib
import json
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.metrics_core import Metric

from sidecar.adapters.operations_http import OperationsLimits, OperationsServer
from sidecar.adapters.operations_http.exposition import Exposition
from sidecar.core.errors import (
    ApprovalError,
    InvalidTransition,
    LockedOut,
    NotDurable,
    RecoveryBlocked,
    RuleFileError,
    StorageError,
)

NOW = datetime(2026, 1, 30, 14, 30, tzinfo=UTC).timestamp()
STATUS = {"switch": "trading/bot-0", "state": "ACTIVE", "durable": True}
TOKENS = {name: f"{name}-token-7d2f" for name in ("viewer", "webhook", "operator", "risk")}
READING = ["/api/v1/status", "/api/v1/triggers", "/api/v1/recovery", "/api/v1/health", "/api/v1/audit"]
OPEN = ["/", "/api/v1/access", "/openapi.json", "/metrics", "/-/healthy", "/-/ready", "/livez", "/readyz"]
KILL = {"reason": "drill"}
CHANGES: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "/api/v1/trigger", KILL),
    ("POST", "/api/v1/recovery", {"reason": "fixed", "by": "ann", "code": "c"}),
    ("POST", "/api/v1/recovery/approvals", {"by": "ann", "code": "c"}),
    ("DELETE", "/api/v1/recovery", None),
    ("POST", "/-/reload", None),
]


class FakeDesk:
    """Answers everything, notes what was asked, and raises what the test wants raised."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None
        self.objection: str | None = None
        self.events: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()
        self.subscribed = 0
        self.has_subscriber = asyncio.Event()
        self.delay = 0.0

    async def _take(self, what: str, **asked: Any) -> dict[str, Any]:
        self.asked.append((what, asked))
        await asyncio.sleep(self.delay)
        if self.error is not None:
            raise self.error
        return {**STATUS, "answer_to": what}

    def status(self) -> dict[str, Any]:
        return dict(STATUS)

    def triggers(self) -> dict[str, Any]:
        return {"triggers": []}

    def recovery(self) -> dict[str, Any]:
        return {"stage": "NONE"}

    async def health(self) -> dict[str, Any]:
        return {"healthy": True, "checks": []}

    async def audit(self, **asked: Any) -> list[dict[str, Any]]:
        await self._take("audit", **asked)
        return [{"seq": 1}]

    async def trigger(self, **asked: Any) -> dict[str, Any]:
        return await self._take("trigger", **asked)

    async def recover(self, **asked: Any) -> dict[str, Any]:
        return await self._take("recover", **asked)

    async def approve(self, **asked: Any) -> dict[str, Any]:
        return await self._take("approve", **asked)

    async def cancel(self, **asked: Any) -> dict[str, Any]:
        return await self._take("cancel", **asked)

    async def reload(self) -> None:
        await self._take("reload")

    def live(self) -> str | None:
        return self.objection

    def ready(self) -> str | None:
        return self.objection

    async def subscribe(self) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        self.subscribed += 1
        self.has_subscriber.set()
        try:
            yield "status", self.status()
            while True:
                yield await self.events.get()
        finally:
            self.subscribed -= 1


class Listening:
    """A server on both ways in, and a client for each."""

    def __init__(self, desk: FakeDesk, folder: Path) -> None:
        self.desk = desk
        self.socket = folder / "control" / "control.sock"
        self.server: OperationsServer
        self.address = ("", 0)
        self.tcp: aiohttp.ClientSession
        self.control: aiohttp.ClientSession

    async def ask(self, method: str, path: str, *, control: bool = False, token: str | None = None, **more: Any) -> Any:
        headers = {**more.pop("headers", {}), **({"Authorization": f"Bearer {TOKENS[token]}"} if token else {})}
        session, base = (
            (self.control, "http://localhost") if control else (self.tcp, f"http://127.0.0.1:{self.address[1]}")
        )
        async with session.request(method, base + path, headers=headers, **more) as response:
            response.body = await response.read()  # type: ignore[attr-defined]
            return response


def problem(response: Any, status: int) -> dict[str, Any]:
    assert response.status == status, response.body
    assert response.content_type == "application/problem+json"
    document: dict[str, Any] = json.loads(response.body)
    assert document["status"] == status
    assert {"type", "title", "detail"} <= document.keys()
    return document


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.yaml"
    path.write_text(tokens_yaml())
    return path


def rewrite(path: Path, text: str | None) -> None:
    if text is None:
        path.unlink()
    else:
        path.write_text(text)


def tokens_yaml(**more: str) -> str:
    return "".join(
        f"- {{name: {name}, roles: [{name}], sha256: {hashlib.sha256(text.encode()).hexdigest()}}}\n"
        for name, text in {**TOKENS, **more}.items()
    )


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    running: list[Listening] = []

    async def start(**settings: Any) -> Listening:
        registry = CollectorRegistry()
        Gauge("answer", "The answer.", registry=registry).set(42)
        desk = settings.pop("desk", None) or FakeDesk()
        listening = Listening(desk, tmp_path)
        listening.server = OperationsServer(desk=desk, registry=registry, wall=lambda: NOW, **settings)
        listening.address = await listening.server.start_tcp("127.0.0.1", 0)
        await listening.server.start_control(listening.socket)
        listening.tcp = aiohttp.ClientSession(auto_decompress=False)
        listening.control = aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(listening.socket)))
        running.append(listening)
        return listening

    yield start
    for listening in running:
        await listening.tcp.close()
        await listening.control.close()
        await listening.server.stop()


async def raw(listening: Listening, text: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*listening.address)
    writer.write(text)
    answer = await reader.read()
    writer.close()
    return answer


# Who may come in


@pytest.mark.parametrize(
    ("token", "name", "may"),
    [
        (None, None, (401, 401, 401)),
        ("viewer", "viewer", (200, 403, 403)),
        ("operator", "operator", (200, 200, 403)),
        ("risk", "risk", (200, 200, 200)),
        ("webhook", None, (403, 403, 403)),
    ],
)
async def test_access_tells_who_may_do_what_before_it_is_tried(
    start: Callable[..., Any], tokens_file: Path, token: str | None, name: str | None, may: tuple[int, ...]
) -> None:
    listening = await start(tokens_file=tokens_file)
    access = json.loads((await listening.ask("GET", "/api/v1/access", token=token)).body)
    assert (access["name"], access["tokens"]) == (name, True)
    acts = [access[act] for act in ("read", "stop", "recover")]
    assert tuple(act["status"] for act in acts) == may
    assert [act["allowed"] for act in acts] == [status == 200 for status in may]
    tried = await listening.ask("POST", "/api/v1/trigger", token=token, json=KILL)
    assert tried.status == access["stop"]["status"]
    if tried.status != 200:
        assert json.loads(tried.body)["detail"] == access["stop"]["detail"]


@pytest.mark.parametrize("path", [*OPEN, *READING])
async def test_reading_is_open_without_a_tokens_file(start: Callable[..., Any], path: str) -> None:
    listening = await start()
    assert (await listening.ask("GET", path)).status == 200


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
async def test_no_change_is_possible_over_tcp_without_a_tokens_file(
    start: Callable[..., Any], method: str, path: str, body: Any
) -> None:
    listening = await start()
    refused = problem(await listening.ask(method, path, json=body), 403)
    assert "tokens_file" in refused["detail"]
    assert listening.desk.asked == []


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
async def test_the_control_socket_asks_for_no_credentials(
    start: Callable[..., Any], tokens_file: Path, method: str, path: str, body: Any
) -> None:
    listening = await start(tokens_file=tokens_file)
    assert (await listening.ask(method, path, control=True, json=body)).status == 200
    assert len(listening.desk.asked) == 1


NEEDS = [
    *(("GET", path, None, {"viewer", "operator", "risk"}) for path in READING),
    *(
        (
            method,
            path,
            body,
            {"risk"} if path.startswith("/api/v1/recovery") and method == "POST" else {"operator", "risk"},
        )
        for method, path, body in CHANGES
    ),
]


@pytest.mark.parametrize("role", TOKENS)
@pytest.mark.parametrize(("method", "path", "body", "roles"), NEEDS)
async def test_a_role_may_do_its_own_and_what_it_includes_and_no_more(
    start: Callable[..., Any], tokens_file: Path, role: str, method: str, path: str, body: Any, roles: set[str]
) -> None:
    listening = await start(tokens_file=tokens_file)
    response = await listening.ask(method, path, token=role, json=body)
    if role in roles:
        assert response.status == 200
    else:
        problem(response, 403)
        assert listening.desk.asked == []


@pytest.mark.parametrize(
    "authorization", [None, "Bearer", "Bearer nobody", "Basic dXNlcjpwYXNz", "Bearer \xff", TOKENS["risk"]]
)
async def test_a_request_without_a_known_token_gets_401_and_a_challenge(
    start: Callable[..., Any], tokens_file: Path, authorization: str | None
) -> None:
    listening = await start(tokens_file=tokens_file)
    headers = {} if authorization is None else {"Authorization": authorization}
    for method, path, body in [("GET", "/api/v1/status", None), ("GET", "/api/v1/events", None), *CHANGES]:
        response = await listening.ask(method, path, json=body, headers=headers)
        problem(response, 401)
        assert response.headers["WWW-Authenticate"].startswith("Bearer")
    assert listening.desk.asked == []


@pytest.mark.parametrize("path", OPEN)
async def test_metrics_and_health_stay_open_with_a_tokens_file(
    start: Callable[..., Any], tokens_file: Path, path: str
) -> None:
    listening = await start(tokens_file=tokens_file)
    assert (await listening.ask("GET", path)).status == 200


async def test_a_changed_tokens_file_counts_with_the_next_request(start: Callable[..., Any], tokens_file: Path) -> None:
    listening = await start(tokens_file=tokens_file)
    assert (await listening.ask("GET", "/api/v1/status", token="viewer")).status == 200
    rewrite(tokens_file, tokens_yaml(viewer="another"))
    problem(await listening.ask("GET", "/api/v1/status", token="viewer"), 401)
    assert (await listening.ask("GET", "/api/v1/status", token="operator")).status == 200


async def test_a_tokens_file_that_turns_bad_or_vanishes_keeps_the_old_tokens_and_says_so(
    start: Callable[..., Any], tokens_file: Path
) -> None:
    listening = await start(tokens_file=tokens_file)
    assert listening.server.problems == ()
    rewrite(tokens_file, "- {name: eve, roles: [god], sha256: abc}\n")
    assert (await listening.ask("POST", "/api/v1/trigger", token="operator", json=KILL)).status == 200
    (reported,) = listening.server.problems
    assert f"{tokens_file}:1: [0].roles: 'god' is not a role" in reported
    assert f"{tokens_file}:1: [0].sha256: must be 64 lowercase" in reported
    rewrite(tokens_file, None)
    assert (await listening.ask("POST", "/api/v1/trigger", token="operator", json=KILL)).status == 200
    assert listening.server.problems != ()
    rewrite(tokens_file, tokens_yaml())
    await listening.server.refresh()
    assert listening.server.problems == ()


async def test_a_tokens_file_that_is_bad_from_the_start_lets_nobody_in(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    listening = await start(tokens_file=tmp_path / "nothing.yaml")
    assert listening.server.problems != ()
    for path in READING:
        problem(await listening.ask("GET", path, token="risk"), 401)
    assert (await listening.ask("GET", "/metrics")).status == 200


async def test_a_token_written_in_place_of_its_hash_is_never_shown(
    start: Callable[..., Any], tokens_file: Path
) -> None:
    rewrite(tokens_file, "- {name: eve, roles: [risk], sha256: my-secret-token}\n")
    listening = await start(tokens_file=tokens_file)
    assert "my-secret-token" not in "".join(listening.server.problems)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("{}", "must be a list"),
        ("- {}", "name: is missing"),
        ("hello", "must be a list"),
        ("- hello", "must be a mapping"),
        ("- {name: a, roles: [viewer], sha256: %s, role: risk}", "is not a key of a token"),
        ("- {name: a, roles: [], sha256: %s}", "at least one of"),
        ("- {name: a, roles: viewer, sha256: %s}", "must be a list with"),
        ("- {name: a, roles: [[viewer]], sha256: %s}", "is not a role"),
        ("- {name: a, roles: [viewer], sha256: %s}\n- {name: a, roles: [viewer], sha256: %s}", "has a token already"),
        ("- {name: a, roles: [viewer], sha256: %s}\n- {name: b, roles: [viewer], sha256: %s}", "is also that of 'a'"),
    ],
)
async def test_a_tokens_file_is_refused_with_the_reason(
    start: Callable[..., Any], tokens_file: Path, entry: str, reason: str
) -> None:
    rewrite(tokens_file, entry.replace("%s", "0" * 64))
    listening = await start(tokens_file=tokens_file)
    (reported,) = listening.server.problems
    assert reason in reported


# Hosts and origins


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("10.1.2.3:9781", 200),
        ("[::1]:9781", 200),
        ("localhost", 200),
        ("LocalHost:1", 200),
        ("kill.example.com", 200),
        ("Kill.Example.com.:80", 200),
        ("evil.example.com", 421),
        ("localhost.evil.com", 421),
        ("127.0.0.1.evil.com:9781", 421),
        ("2130706433", 421),
        ("user@localhost", 400),
        ("", 400),
    ],
)
async def test_only_addresses_localhost_and_our_names_are_hosts(
    start: Callable[..., Any], host: str, status: int
) -> None:
    listening = await start(hosts=["kill.example.com"])
    response = await listening.ask("GET", "/api/v1/status", headers={"Host": host})
    assert response.status == status
    if status != 200:
        problem(response, status)


async def test_a_foreign_host_gets_nothing_at_all_not_even_a_404(start: Callable[..., Any]) -> None:
    listening = await start()
    for path in ["/nothing", "/metrics", "/-/healthy"]:
        problem(await listening.ask("GET", path, headers={"Host": "evil.example.com"}), 421)


@pytest.mark.parametrize("head", [b"", b"Host: localhost\r\nHost: localhost\r\n"])
async def test_no_host_or_two_are_refused(start: Callable[..., Any], head: bytes) -> None:
    listening = await start()
    answer = await raw(listening, b"GET /metrics HTTP/1.1\r\n" + head + b"Connection: close\r\n\r\n")
    assert b" 400 Bad Request" in answer.splitlines()[0]
    assert b"application/problem+json" in answer


@pytest.mark.parametrize("origin", ["http://evil.example.com", "null", "http://127.0.0.1:1", "https://localhost"])
async def test_no_other_sites_page_can_change_anything(
    start: Callable[..., Any], tokens_file: Path, origin: str
) -> None:
    listening = await start(tokens_file=tokens_file)
    for method, path, body in CHANGES:
        problem(await listening.ask(method, path, token="risk", json=body, headers={"Origin": origin}), 403)
    assert listening.desk.asked == []


async def test_our_own_page_may_change_things_and_any_page_may_read(
    start: Callable[..., Any], tokens_file: Path
) -> None:
    listening = await start(tokens_file=tokens_file)
    own = {"Origin": f"http://127.0.0.1:{listening.address[1]}"}
    assert (await listening.ask("POST", "/api/v1/trigger", token="risk", json=KILL, headers=own)).status == 200
    other = {"Origin": "http://evil.example.com"}
    assert (await listening.ask("GET", "/api/v1/status", token="risk", headers=other)).status == 200


# What may be asked


async def test_a_kill_over_the_control_socket_takes_the_name_as_claimed(start: Callable[..., Any]) -> None:
    listening = await start()
    asked = {"reason": "  fat finger ", "by": "ann", "restriction": "reduce_only"}
    response = await listening.ask("POST", "/api/v1/trigger", control=True, json=asked)
    assert json.loads(response.body)["answer_to"] == "trigger"
    await listening.ask("POST", "/api/v1/trigger", control=True, json={"reason": "x", "by": None, "restriction": None})
    assert listening.desk.asked == [
        ("trigger", {"reason": "fat finger", "by": "ann", "by_verified": False, "restriction": "reduce_only"}),
        ("trigger", {"reason": "x", "by": "operator", "by_verified": False, "restriction": None}),
    ]


async def test_a_token_names_who_kills_and_cancels_whatever_is_claimed(
    start: Callable[..., Any], tokens_file: Path
) -> None:
    listening = await start(tokens_file=tokens_file)
    await listening.ask("POST", "/api/v1/trigger", token="operator", json={"reason": "x", "by": "boss"})
    await listening.ask("DELETE", "/api/v1/recovery", token="operator")
    assert listening.desk.asked == [
        ("trigger", {"reason": "x", "by": "operator", "by_verified": True, "restriction": None}),
        ("cancel", {"reason": "cancelled", "by": "operator", "by_verified": True}),
    ]


@pytest.mark.parametrize(
    ("length", "kept"), [(1000, "x" * 1000), (1001, "x" * 993 + "… (cut)"), (60_000, "x" * 993 + "… (cut)")]
)
async def test_a_long_reason_is_cut_and_does_not_stop_a_kill(start: Callable[..., Any], length: int, kept: str) -> None:
    listening = await start()
    response = await listening.ask("POST", "/api/v1/trigger", control=True, json={"reason": " " + "x" * length})
    assert (response.status, len(kept)) == (200, 1000)
    assert listening.desk.asked[0][1]["reason"] == kept


async def test_a_long_name_is_cut_and_does_not_stop_a_kill(start: Callable[..., Any]) -> None:
    listening = await start()
    asked = {"reason": "r", "by": "b" * 101}
    response = await listening.ask("POST", "/api/v1/trigger", control=True, json=asked)
    assert response.status == 200
    assert listening.desk.asked[0][1]["by"] == "b" * 93 + "… (cut)"


async def test_the_description_of_a_kill_names_no_longest_text(start: Callable[..., Any]) -> None:
    listening = await start()
    response = await listening.ask("GET", "/openapi.json", control=True)
    schemas = json.loads(response.body)["components"]["schemas"]
    assert "maxLength" not in json.dumps(schemas["TriggerQuestion"])
    assert "cut to 1000 characters" in schemas["TriggerQuestion"]["properties"]["reason"]["description"]
    assert schemas["RecoveryQuestion"]["properties"]["reason"]["maxLength"] == 1000


async def test_a_recovery_with_no_waivers_may_say_null(start: Callable[..., Any]) -> None:
    listening = await start()
    asked = {"reason": "r", "by": "bob", "code": "c", "waive": None}
    response = await listening.ask("POST", "/api/v1/recovery", control=True, json=asked)
    assert response.status == 200
    assert listening.desk.asked[0][1]["waive"] == []


async def test_a_control_character_neither_forges_a_log_line_nor_stops_a_kill(start: Callable[..., Any]) -> None:
    listening = await start()
    await listening.ask("POST", "/api/v1/trigger", control=True, json={"reason": "a\r\nb\x1b[2J", "by": "e\tve"})
    ((_, asked),) = listening.desk.asked
    assert (asked["reason"], asked["by"]) == ("a  b [2J", "e ve")


async def test_a_cancellation_may_say_who_and_why(start: Callable[..., Any]) -> None:
    listening = await start()
    await listening.ask("DELETE", "/api/v1/recovery", control=True, json={"by": "ann", "reason": "not yet"})
    assert listening.desk.asked == [("cancel", {"reason": "not yet", "by": "ann", "by_verified": False})]


async def test_a_recovery_brings_code_and_waivers_with_their_seconds(start: Callable[..., Any]) -> None:
    listening = await start()
    waive = [
        {"trigger": "drawdown", "threshold": -1, "until": "24h"},
        {"trigger": "loss", "until": "2026-01-30T15:30:00+00:00"},
    ]
    asked = {"reason": "fixed", "by": "ann", "code": " c ", "waive": waive}
    assert (await listening.ask("POST", "/api/v1/recovery", control=True, json=asked)).status == 200
    await listening.ask("POST", "/api/v1/recovery/approvals", control=True, json={"by": "bob", "code": "d"})
    assert listening.desk.asked == [
        (
            "recover",
            {
                "reason": "fixed",
                "by": "ann",
                "code": " c ",
                "waive": [
                    {"trigger": "drawdown", "threshold": -1.0, "seconds": 86_400.0},
                    {"trigger": "loss", "threshold": None, "seconds": 3600.0},
                ],
            },
        ),
        ("approve", {"by": "bob", "code": "d"}),
    ]
    assert isinstance(listening.desk.asked[0][1]["waive"][0]["seconds"], float)


WAIVES_REFUSED: list[Any] = [
    {},
    [{"trigger": "t"}],
    [{"trigger": "t", "until": "soon"}],
    [{"trigger": "t", "until": "0s"}],
    [{"trigger": "t", "until": "24"}],
    [{"trigger": "t", "until": 24}],
    [{"trigger": "t", "until": "2026-01-30T14:30:00Z"}],
    [{"trigger": "t", "until": "2026-01-30T15:30:00"}],
    [{"trigger": "t", "until": "2026-13-30T15:30:00Z"}],
    [{"trigger": "t", "until": "1h", "threshold": "-1"}],
    [{"trigger": "t", "until": "1h", "threshold": True}],
    [{"trigger": "", "until": "1h"}],
    [{"trigger": "t", "until": "1h", "extra": 1}],
]

BAD = [
    ("/api/v1/trigger", "", "empty"),
    ("/api/v1/trigger", "{", "JSON"),
    ("/api/v1/trigger", "[]", "object"),
    ("/api/v1/trigger", "null", "object"),
    ("/api/v1/trigger", "{}", "reason: Field required"),
    ("/api/v1/trigger", '{"reason": 1}', "reason: "),
    ("/api/v1/trigger", '{"reason": "  "}', "reason: "),
    ("/api/v1/recovery", json.dumps({"reason": "x" * 1001, "by": "a", "code": "c"}), "reason: "),
    ("/api/v1/recovery", json.dumps({"reason": "x", "by": "a" * 101, "code": "c"}), "by: "),
    ("/api/v1/recovery/approvals", json.dumps({"by": "a" * 101, "code": "c"}), "by: "),
    ("/api/v1/trigger", '{"reason": "x", "restriction": "none"}', "restriction: "),
    ("/api/v1/trigger", '{"reason": "x", "restrictions": "halt"}', "restrictions: "),
    ("/api/v1/trigger", '{"reason": "\\ud800"}', "JSON"),
    ("/api/v1/recovery", '{"reason": "x", "by": "a", "code": ""}', "code: "),
    ("/api/v1/recovery", json.dumps({"reason": "x", "by": "a", "code": "x" * 1025}), "code: "),
    ("/api/v1/recovery", '{"reason": "x", "code": "c"}', "by: Field required"),
    ("/api/v1/recovery/approvals", '{"by": "a"}', "code: Field required"),
    *(
        ("/api/v1/recovery", json.dumps({"reason": "x", "by": "a", "code": "c", "waive": waive}), "waive")
        for waive in WAIVES_REFUSED
    ),
    (
        "/api/v1/recovery",
        '{"reason":"x","by":"a","code":"c","waive":[{"trigger":"t","until":"1h","threshold":NaN}]}',
        "",
    ),
    (
        "/api/v1/recovery",
        '{"reason":"x","by":"a","code":"c","waive":[{"trigger":"t","until":"1h","threshold":1e999}]}',
        "",
    ),
]


@pytest.mark.parametrize(("path", "body", "reason"), BAD)
async def test_a_malformed_body_is_400_with_the_reason_and_reaches_nobody(
    start: Callable[..., Any], path: str, body: str, reason: str
) -> None:
    listening = await start()
    headers = {"Content-Type": "application/json"}
    document = problem(await listening.ask("POST", path, control=True, data=body, headers=headers), 400)
    assert reason in document["detail"]
    assert listening.desk.asked == []


async def test_every_fault_of_a_body_is_named_and_no_code_is_shown(start: Callable[..., Any]) -> None:
    listening = await start()
    body = {"by": 1, "code": ["hunter2"], "extra": "hunter2"}
    response = await listening.ask("POST", "/api/v1/recovery", control=True, json=body)
    assert len(problem(response, 400)["problems"]) == 4
    assert b"hunter2" not in response.body


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/json5", None])
async def test_a_body_that_is_not_json_is_415(start: Callable[..., Any], content_type: str | None) -> None:
    listening = await start()
    more: dict[str, Any] = {"headers": {"Content-Type": content_type}}
    if content_type is None:
        more = {"skip_auto_headers": ["Content-Type"]}
    problem(await listening.ask("POST", "/api/v1/trigger", control=True, data=b'{"reason": "x"}', **more), 415)
    assert listening.desk.asked == []


async def test_a_compressed_body_is_415(start: Callable[..., Any]) -> None:
    listening = await start()
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    body = gzip.compress(json.dumps(KILL).encode())
    problem(await listening.ask("POST", "/api/v1/trigger", control=True, data=body, headers=headers), 415)


async def test_a_json_body_with_a_charset_is_taken(start: Callable[..., Any]) -> None:
    listening = await start()
    headers = {"Content-Type": "application/json; charset=utf-8"}
    body = json.dumps(KILL)
    assert (await listening.ask("POST", "/api/v1/trigger", control=True, data=body, headers=headers)).status == 200


async def test_a_body_over_64_kib_is_413(start: Callable[..., Any]) -> None:
    listening = await start()
    problem(await listening.ask("POST", "/api/v1/trigger", control=True, json={"reason": "x" * 66_000}), 413)


async def test_the_audit_is_asked_for_with_times_types_and_a_limit(start: Callable[..., Any]) -> None:
    listening = await start()
    query = "?since=2026-01-30T14:30:00Z&until=2026-01-30T16:30:00%2B01:00&type=switch.killed,a&type=b&limit=7"
    response = await listening.ask("GET", "/api/v1/audit" + query)
    assert json.loads(response.body) == {"events": [{"seq": 1}]}
    await listening.ask("GET", "/api/v1/audit")
    assert listening.desk.asked == [
        (
            "audit",
            {
                "since": datetime(2026, 1, 30, 14, 30, tzinfo=UTC),
                "until": datetime(2026, 1, 30, 15, 30, tzinfo=UTC),
                "types": {"switch.killed", "a", "b"},
                "limit": 7,
            },
        ),
        ("audit", {"since": None, "until": None, "types": None, "limit": 100}),
    ]


@pytest.mark.parametrize(
    "query", ["since=yesterday", "until=1", "limit=0", "limit=10001", "limit=x", "sinse=1", "limit=-1"]
)
async def test_a_malformed_audit_question_is_400(start: Callable[..., Any], query: str) -> None:
    listening = await start()
    problem(await listening.ask("GET", f"/api/v1/audit?{query}"), 400)
    assert listening.desk.asked == []


# What the desk's errors mean

RAISED: list[tuple[Exception, int, dict[str, Any]]] = [
    (InvalidTransition("cannot: KILLED"), 409, {"detail": "cannot: KILLED"}),
    (RecoveryBlocked(["rule a is firing", "memory"]), 409, {"blockers": ["rule a is firing", "memory"]}),
    (ApprovalError("wrong code"), 403, {"detail": "wrong code"}),
    (LockedOut("wait", retry_after=29.2), 429, {}),
    (
        NotDurable("in force, NOT durable", status={"state": "KILLED", "durable": False, "restriction": "halt"}),
        503,
        {"state": "KILLED", "durable": False, "restriction": "halt"},
    ),
    (
        RuleFileError("a.yaml:1: x: bad\na.yaml:2: y: worse"),
        400,
        {"problems": ["a.yaml:1: x: bad", "a.yaml:2: y: worse"]},
    ),
    (ValueError("waive: no rule 'x'"), 400, {"detail": "waive: no rule 'x'"}),
    (StorageError("the folder cannot be read"), 503, {}),
    (TimeoutError(), 503, {}),
    (RuntimeError("secret internals"), 500, {"detail": "an internal error; the log has the details"}),
]


@pytest.mark.parametrize(("error", "status", "members"), RAISED)
@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
async def test_what_the_desk_raises_becomes_a_problem_document(
    start: Callable[..., Any], method: str, path: str, body: Any, error: Exception, status: int, members: dict[str, Any]
) -> None:
    listening = await start()
    listening.desk.error = error
    response = await listening.ask(method, path, control=True, json=body)
    document = problem(response, status)
    assert members.items() <= document.items()
    assert b"internals" not in response.body
    assert response.headers.get("Retry-After") == ("30" if status == 429 else None)


@pytest.mark.parametrize("path", ["/-/healthy", "/livez", "/-/ready", "/readyz"])
async def test_a_probe_fails_with_the_reason_and_recovers(start: Callable[..., Any], path: str) -> None:
    listening = await start()
    listening.desk.objection = "the evaluator stands still"
    assert problem(await listening.ask("GET", path), 503)["detail"] == "the evaluator stands still"
    listening.desk.objection = None
    assert (await listening.ask("GET", path)).status == 200


# HTTP


@pytest.mark.parametrize(("method", "path", "status", "allow"), [
    ("GET", "/nothing", 404, None),
    ("POST", "/api/v1/alertmanagers", 404, None),
    ("GET", "/api/v1/status/", 404, None),
    ("POST", "/api/v1/status", 405, "GET,HEAD"),
    ("GET", "/api/v1/trigger", 405, "POST"),
    ("PUT", "/api/v1/recovery", 405, "DELETE,GET,HEAD,POST"),
    ("GET", "/-/reload", 405, "POST"),
])  # fmt: skip
async def test_unknown_paths_and_methods_are_problem_documents(
    start: Callable[..., Any], method: str, path: str, status: int, allow: str | None
) -> None:
    listening = await start()
    for control in (False, True):
        response = await listening.ask(method, path, control=control)
        problem(response, status)
        assert response.headers.get("Allow") == allow


@pytest.mark.parametrize("path", [*OPEN, *READING, "/api/v1/events", "/nothing"])
async def test_every_answer_has_the_security_headers_and_head_has_no_body(start: Callable[..., Any], path: str) -> None:
    listening = await start()
    response = await listening.ask("HEAD", path)
    assert response.status == (404 if path == "/nothing" else 200)
    assert response.body == b""
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["X-Frame-Options"] == "DENY"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert response.headers["Server"] == "killswitch"
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert not [name for name in response.headers if name.startswith("Access-Control")]


@pytest.mark.parametrize(
    "request_",
    [
        b"nonsense\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 10_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n" + b"X: x\r\n" * 200 + b"\r\n",
        b"POST /api/v1/trigger HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
async def test_what_is_no_request_or_too_large_a_head_is_400_and_closed(
    start: Callable[..., Any], request_: bytes
) -> None:
    listening = await start()
    answer = await raw(listening, request_)
    assert b" 400 Bad Request" in answer.splitlines()[0]
    assert b"application/problem+json" in answer
    assert b"nosniff" in answer


LIVE = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


async def test_for_one_connection_too_many_the_one_that_has_waited_longest_makes_room(
    start: Callable[..., Any],
) -> None:
    listening = await start(limits=OperationsLimits(connections=2))
    first, second = [await asyncio.open_connection(*listening.address) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert (await raw(listening, LIVE)).startswith(b"HTTP/1.1 200")
    assert await first[0].read() == b""
    second[1].write(LIVE)
    assert (await second[0].read()).startswith(b"HTTP/1.1 200")
    for _, writer in (first, second):
        writer.close()


async def test_a_connection_that_is_being_answered_never_makes_room(start: Callable[..., Any]) -> None:
    listening = await start(limits=OperationsLimits(connections=1))
    async with listening.tcp.get(f"http://127.0.0.1:{listening.address[1]}/api/v1/events") as response:
        await read_event(response.content)
        assert await raw(listening, b"") == b""
        listening.desk.events.put_nowait(("status", {"still": "there"}))
        assert (await read_event(response.content))[1] == {"still": "there"}


async def test_a_connection_that_never_asks_is_closed(start: Callable[..., Any]) -> None:
    listening = await start(limits=OperationsLimits(idle_seconds=0.1))
    assert await asyncio.wait_for(raw(listening, b"GET /livez HTTP/1.1\r\nHos"), 5) == b""


async def test_an_answer_that_takes_too_long_is_503(start: Callable[..., Any]) -> None:
    listening = await start(limits=OperationsLimits(answer_seconds=0.05))
    listening.desk.delay = 30.0
    problem(await listening.ask("POST", "/-/reload", control=True), 503)


async def test_a_kill_goes_on_when_its_caller_hangs_up(start: Callable[..., Any], tokens_file: Path) -> None:
    listening = await start(tokens_file=tokens_file)
    listening.desk.delay = 0.2
    ended = asyncio.Event()
    take = listening.desk._take

    async def taking(what: str, **asked: Any) -> dict[str, Any]:
        answer: dict[str, Any] = await take(what, **asked)
        ended.set()
        return answer

    listening.desk._take = taking
    _, writer = await asyncio.open_unix_connection(str(listening.socket))
    body = json.dumps(KILL).encode()
    head = "POST /api/v1/trigger HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()
    await asyncio.wait_for(ended.wait(), 5)


@pytest.mark.parametrize("path", ["/metrics", "/nothing", "/api/v1/trigger"])
async def test_an_expectation_that_nobody_meets_is_a_problem_document(start: Callable[..., Any], path: str) -> None:
    listening = await start()
    response = await listening.ask("GET", path, headers={"Expect": "a-miracle"})
    problem(response, 417)
    assert response.headers["X-Frame-Options"] == "DENY"


async def test_in_each_turn_of_the_loop_one_question_is_worked_on(start: Callable[..., Any]) -> None:
    listening = await start()
    turns: list[int] = []
    turn = 0
    listening.desk.triggers = lambda: turns.append(turn) or {}
    readers = [await asyncio.open_connection(*listening.address) for _ in range(30)]
    await asyncio.sleep(0.05)
    for _, writer in readers:  # past the loop, so that all of them are there when it looks
        sock = writer.get_extra_info("socket")
        os.write(sock.fileno(), b"GET /api/v1/triggers HTTP/1.1\r\nHost: localhost\r\n\r\n")
    while len(turns) < len(readers):
        turn += 1
        await asyncio.sleep(0)
    assert len(set(turns)) == len(readers), "two in one turn"
    for _, writer in readers:
        writer.close()


async def test_a_caller_that_goes_away_gives_its_turn_to_the_next() -> None:
    from sidecar.adapters.operations_http.turns import Turns

    turns = Turns()
    waiting = [asyncio.create_task(turns.take()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    waiting[1].cancel()
    await asyncio.wait_for(waiting[2], 5)
    await asyncio.wait_for(turns.take(), 5)


# Metrics


async def test_scrapes_that_wait_share_one_rendering_that_began_after_they_came() -> None:
    registry = CollectorRegistry()
    shown = Gauge("answer", "The answer.", registry=registry)
    collected = 0

    class Counting:
        def collect(self) -> list[Any]:
            nonlocal collected
            collected += 1
            return []

    registry.register(Counting())  # type: ignore[arg-type]
    collected = 0
    exposition = Exposition(registry)
    await exposition._scraping.acquire()
    early = [asyncio.create_task(exposition.render(None, None)) for _ in range(20)]
    await asyncio.sleep(0)
    early[0].cancel()  # who hangs up takes nothing from the others
    shown.set(7)
    exposition._scraping.release()
    bodies = {(await scrape).body for scrape in early[1:]}
    assert bodies == {b"# HELP answer The answer.\n# TYPE answer gauge\nanswer 7.0\n"}
    assert collected == 1
    shown.set(8)
    assert b"answer 8.0" in (await exposition.render(None, None)).body


async def test_a_scrape_of_much_lets_the_loop_answer_others_in_between() -> None:
    turns = 0
    seen: list[int] = []

    class Slow:
        def collect(self) -> Iterator[Metric]:
            for number in range(4):
                until = time.perf_counter() + 0.001
                while time.perf_counter() < until:
                    pass
                seen.append(turns)
                yield Metric(f"slow_{number}", "Takes a millisecond.", "gauge")

    async def gate() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    registry = CollectorRegistry()
    registry.register(Slow())  # type: ignore[arg-type]  # it is described by what it collects
    seen.clear()
    other = asyncio.create_task(gate())
    try:
        await Exposition(registry).render(None, None)
    finally:
        other.cancel()
    assert len(set(seen)) == len(seen) == 4, f"turns of the loop before each family: {seen}"


async def test_metrics_come_in_both_formats_and_compressed(start: Callable[..., Any]) -> None:
    listening = await start()
    plain = await listening.ask("GET", "/metrics", headers={"Accept-Encoding": "identity"})
    assert plain.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert plain.body == b"# HELP answer The answer.\n# TYPE answer gauge\nanswer 42.0\n"
    asks = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5", "Accept-Encoding": "gzip"}
    openmetrics = await listening.ask("GET", "/metrics", headers=asks)
    assert openmetrics.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert openmetrics.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(openmetrics.body) == plain.body + b"# EOF\n"


# Events


async def read_event(reader: aiohttp.StreamReader) -> tuple[str, Any]:
    lines = (await asyncio.wait_for(reader.readuntil(b"\n\n"), 5)).decode().splitlines()
    return lines[0], json.loads(lines[1].removeprefix("data: ")) if lines[1] else None


async def test_a_reader_of_events_that_goes_away_is_no_failure(
    start: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    listening = await start()
    async with listening.control.get("http://localhost/api/v1/events") as response:
        listening.desk.events.put_nowait(("status", {}))
        await response.content.readuntil(b"\n\n")
    for _ in range(100):
        if listening.desk.subscribed == 0:
            break
        listening.desk.events.put_nowait(("status", {}))
        await asyncio.sleep(0.01)
    assert listening.desk.subscribed == 0
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_events_are_streamed_as_they_happen_with_signs_of_life_between(start: Callable[..., Any]) -> None:
    listening = await start(limits=OperationsLimits(heartbeat_seconds=0.05, answer_seconds=0.01))
    async with listening.control.get("http://localhost/api/v1/events") as response:
        assert response.content_type == "text/event-stream"
        assert await read_event(response.content) == ("event: status", STATUS)
        assert await asyncio.wait_for(response.content.readuntil(b"\n\n"), 5) == b": heartbeat\n\n"
        listening.desk.events.put_nowait(("transition", {"to": "KILLED"}))
        while (line := await asyncio.wait_for(response.content.readuntil(b"\n\n"), 5)).startswith(b":"):
            pass
        assert line == b'event: transition\ndata: {"to": "KILLED"}\n\n'
    for _ in range(100):
        if listening.desk.subscribed == 0:
            break
        listening.desk.events.put_nowait(("transition", {}))
        await asyncio.sleep(0.01)
    assert listening.desk.subscribed == 0


async def test_a_token_that_is_taken_away_ends_the_streams_opened_with_it(
    start: Callable[..., Any], tokens_file: Path
) -> None:
    listening = await start(tokens_file=tokens_file)
    host, port = listening.address
    url, headers = f"http://{host}:{port}/api/v1/events", {"Authorization": f"Bearer {TOKENS['viewer']}"}
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
        await read_event(response.content)
        rewrite(tokens_file, tokens_yaml(viewer="another"))
        listening.desk.events.put_nowait(("transition", {"to": "KILLED"}))
        assert await asyncio.wait_for(response.content.read(), 5) == b""
    assert listening.desk.subscribed == 0


async def test_a_reader_that_does_not_read_is_let_go(start: Callable[..., Any]) -> None:
    listening = await start(limits=OperationsLimits(write_seconds=0.1))
    _, writer = await asyncio.open_connection(*listening.address, limit=1)
    writer.write(b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await asyncio.wait_for(listening.desk.has_subscriber.wait(), 5)
    for _ in range(3000):
        if not listening.desk.subscribed:
            break
        for _ in range(20):
            listening.desk.events.put_nowait(("flood", {"filler": "x" * 10_000}))
        await asyncio.sleep(0.002)
    assert listening.desk.subscribed == 0
    writer.transport.abort()
    assert (await listening.ask("GET", "/livez")).status == 200


async def test_there_are_only_so_many_streams(start: Callable[..., Any]) -> None:
    listening = await start(limits=OperationsLimits(streams=1))
    async with listening.control.get("http://localhost/api/v1/events") as response:
        await read_event(response.content)
        problem(await listening.ask("GET", "/api/v1/events"), 503)


async def test_a_stop_ends_streams_and_idle_connections_soon(start: Callable[..., Any]) -> None:
    listening = await start()
    async with listening.control.get("http://localhost/api/v1/events") as response:
        await read_event(response.content)
        await listening.ask("GET", "/livez")
        await asyncio.wait_for(listening.server.stop(), 2)
    assert listening.desk.subscribed == 0
    with pytest.raises(aiohttp.ClientError):
        await listening.ask("GET", "/livez")


# The control socket's file


async def test_the_control_socket_is_for_its_user_alone_and_goes_with_the_server(start: Callable[..., Any]) -> None:
    before = os.umask(0)
    try:
        listening = await start()
        assert stat.S_IMODE(listening.socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(listening.socket.parent.stat().st_mode) == 0o700
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    await listening.server.stop()
    assert not listening.socket.exists()


async def test_a_socket_left_by_a_dead_process_is_replaced_and_a_served_one_is_not(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "control" / "control.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listening = await start()
    second = OperationsServer(desk=listening.desk, registry=CollectorRegistry())
    with pytest.raises(OSError, match="listens on the control socket already"):
        await second.start_control(path)
    await second.stop()
    assert (await listening.ask("GET", "/api/v1/status", control=True)).status == 200


async def test_a_file_in_place_of_the_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    path.write_text("mine")
    server = OperationsServer(desk=FakeDesk(), registry=CollectorRegistry())
    with pytest.raises(OSError, match="no socket"):
        await server.start_control(path)
    await server.stop()
    assert path.read_text() == "mine"


async def test_the_api_describes_what_it_serves(start: Callable[..., Any]) -> None:
    listening = await start()
    described = json.loads((await listening.ask("GET", "/openapi.json")).body)
    served = {(path, method.upper()) for path, methods in described["paths"].items() for method in methods}
    expected = {(path, "GET") for path in [*OPEN, *READING, "/api/v1/events"]} | {(c[1], c[0]) for c in CHANGES}
    assert expected | {("/api/v1/alertmanager", "POST")} == served
    trigger = described["components"]["schemas"]["TriggerQuestion"]
    assert trigger["required"] == ["reason"]
    assert trigger["additionalProperties"] is False
    references = [part.split('"')[0] for part in json.dumps(described).split('"#/components/schemas/')[1:]]
    assert set(references) <= described["components"]["schemas"].keys()
    assert {"RecoveryQuestion", "ApprovalQuestion", "CancelQuestion", "WaiveQuestion", "Problem"} <= set(references)


async def test_every_path_describes_who_may_ask_and_every_refusal_of_its_kind(start: Callable[..., Any]) -> None:
    listening = await start()
    paths = json.loads((await listening.ask("GET", "/openapi.json")).body)["paths"]
    for path, methods in paths.items():
        for method, said in methods.items():
            refusals = set(said["responses"]) - {"200"}
            assert {"400", "417", "421", "503"} <= refusals
            assert ("401" in refusals) == (path not in {"/-/healthy", "/-/ready", "/livez", "/readyz"})
            assert ({"408", "413", "415"} <= refusals) == ("requestBody" in said)
            changes = method != "get"
            assert [list(each) for each in said["security"] if not each] == (
                [] if changes or not said["security"] else [[]]
            )
            assert "429" not in refusals or path.startswith("/api/v1/recovery")
            for status in refusals:
                assert list(said["responses"][status]["content"]) == ["application/problem+json"]
    assert "Retry-After" in paths["/api/v1/recovery"]["post"]["responses"]["429"]["headers"]
    assert "WWW-Authenticate" in paths["/api/v1/status"]["get"]["responses"]["401"]["headers"]


def test_the_gates_description_is_what_the_code_says() -> None:
    from sidecar.adapters.gate_http import openapi

    committed = (Path(__file__).parents[2] / openapi.FILE).read_text()
    assert committed == openapi.text(), "run python -m sidecar.adapters.gate_http.openapi"
