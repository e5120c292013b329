"""The client against real local servers: whatever is not a whole and well-formed allow in time is a denial."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar import client
from sidecar.adapters.gate_http.responses import header_value
from sidecar.client import ExecutionGate, GateDecision, TradingBlockedError

SWITCH = "desk/trader-0"
HEADERS = {
    "X-Killswitch-Switch": SWITCH, "X-Killswitch-State": "ACTIVE", "X-Killswitch-Restriction": "none",
    "X-Killswitch-Factor": "0.75", "X-Killswitch-Reason": "active", "X-Killswitch-Decision-Id": "d1",
}  # fmt: skip
ALLOW = {
    "decision": "allow", "decision_id": "d2", "switch": SWITCH, "state": "ACTIVE", "restriction": "none",
    "position_limit_factor": 0.75, "max_quantity": 500,
    "reason": {"code": "active", "message": "no restriction", "trigger": None, "value": None, "limit": 500,
               "since": None, "release": ""},
    "epoch": 17, "valid_for_ms": 500,
}  # fmt: skip
DENY = ALLOW | {
    "decision": "deny",
    "reason": {"code": "over_limit", "message": "too much", "trigger": "dd", "value": -0.2, "limit": 500, "since": 12.5,
               "release": "a smaller order"},
}  # fmt: skip
LEAVE = {"intent": "new", "side": "sell", "quantity": 10, "position": 10}

Behaviour = Callable[[socket.socket, bytes], bool]


def response(status: int = 200, body: bytes = b"", headers: dict[str, str] | None = None, **extra: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in ((HEADERS if headers is None else headers) | extra).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def said(decision: dict[str, Any], status: int = 200) -> bytes:
    return response(status, json.dumps(decision).encode())


class Server:
    """A server on a raw socket: `behave(connection, request)` returns whether the connection lives on."""

    def __init__(self, listener: socket.socket, behave: Behaviour) -> None:
        self.listener = listener
        self.behave = behave
        self.requests: list[bytes] = []
        self.connections: list[socket.socket] = []
        self.stop = threading.Event()
        threading.Thread(target=self.run, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while (request := self.read(connection)) and self.behave(connection, request):
                pass

    def read(self, connection: socket.socket) -> bytes:
        request = b""
        while b"\r\n\r\n" not in request:
            part = connection.recv(65536)
            if not part:
                return b""
            request += part
        head, _, body = request.partition(b"\r\n\r\n")
        length = next((int(x[15:]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length:")), 0)
        while len(body) < length:
            body += connection.recv(65536)
        self.requests.append(head + b"\r\n\r\n" + body)
        return self.requests[-1]

    def close(self) -> None:
        self.stop.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def serve() -> Iterator[Callable[[bytes | Behaviour], Server]]:
    servers: list[Server] = []

    def start(answer: bytes | Behaviour) -> Server:
        listener = socket.create_server(("127.0.0.1", 0))
        servers.append(Server(listener, answer if callable(answer) else replying(answer)))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def gates() -> Iterator[Callable[..., ExecutionGate]]:
    made: list[ExecutionGate] = []

    def make(**arguments: Any) -> ExecutionGate:
        made.append(ExecutionGate(**({"timeout": 2.0} | arguments)))
        return made[-1]

    yield make
    for gate in made:
        gate.close()


def replying(answer: bytes) -> Behaviour:
    def behave(connection: socket.socket, _: bytes) -> bool:
        connection.sendall(answer)
        return True

    return behave


def refused(gate: ExecutionGate, order: Any = None) -> GateDecision:
    with pytest.raises(TradingBlockedError) as caught:
        gate.check_can_execute(order)
    return caught.value.decision


def test_a_question_without_an_order_is_a_get_of_the_gate(serve: Any, gates: Any) -> None:
    server = serve(response())
    gate = gates(url=server.url, expect_switch=SWITCH)
    assert gate.check_can_execute() is True
    assert server.requests[0].startswith(b"GET /gate HTTP/1.1\r\n")
    assert b"X-Order-Intent: new\r\n" in server.requests[0]
    assert gate.position_limit_factor == 0.75
    assert b"X-Order-Intent: reduce\r\n" in server.requests[1]
    assert len(server.connections) == 1


def test_the_smallest_factor_is_a_factor(serve: Any, gates: Any) -> None:
    server = serve(response(headers=HEADERS | {"X-Killswitch-Factor": repr(5e-324)}))
    assert gates(url=server.url).position_limit_factor == 5e-324


def test_a_path_prefix_is_kept(serve: Any, gates: Any) -> None:
    server = serve(response())
    gates(url=server.url + "/proxy/").check_can_execute()
    assert server.requests[0].startswith(b"GET /proxy/gate HTTP/1.1\r\n")


def test_an_order_is_posted_with_exact_numbers(serve: Any, gates: Any) -> None:
    server = serve(said(ALLOW))
    order = {
        "intent": "new",
        "symbol": "Ä",
        "side": "buy",
        "quantity": Decimal("1E+2"),
        "position": "0.1",
        "open_quantity": 3,
    }
    assert gates(url=server.url).check_can_execute(order) is True
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/orders/check HTTP/1.1\r\n")
    assert json.loads(body) == order | {"quantity": "100"}


def test_a_denied_order_says_why_and_who_can_release(serve: Any, gates: Any) -> None:
    decision = refused(gates(url=serve(said(DENY)).url), LEAVE)
    assert (decision.code, decision.trigger, decision.max_quantity, decision.limit) == (
        "over_limit",
        "dd",
        Decimal(500),
        500,
    )
    assert (decision.since, decision.release, decision.epoch) == (12.5, "a smaller order", 17)
    assert (decision.decision_id, decision.switch, decision.answered) == ("d2", SWITCH, True)
    text = str(TradingBlockedError(decision))
    assert "over_limit" in text
    assert "too much" in text
    assert "a smaller order" in text


def test_a_denying_gate_says_why_from_headers_and_body(serve: Any, gates: Any) -> None:
    headers = HEADERS | {"X-Killswitch-Reason": "killed", "X-Killswitch-State": "KILLED", "X-Killswitch-Factor": "0.0"}
    headers["X-Killswitch-Restriction"] = "halt"
    body = json.dumps({"reason": {"message": "drawdown"}}).encode()
    gate = gates(url=serve(response(403, body, headers)).url)
    decision = refused(gate)
    assert (decision.code, decision.state, decision.message) == ("killed", "KILLED", "drawdown")
    assert gate.is_blocked()
    assert "drawdown" in (gate.get_block_reason() or "")
    assert gate.position_limit_factor == 0.0


@pytest.mark.parametrize("code", ["not_ready", "stale", "internal_error"])
def test_the_factor_is_zero_where_the_sidecar_does_not_vouch_for_it(serve: Any, gates: Any, code: str) -> None:
    server = serve(response(403, headers=HEADERS | {"X-Killswitch-Reason": code}))
    assert gates(url=server.url).position_limit_factor == 0.0


def test_a_malformed_order_is_a_denial_with_the_gates_words(serve: Any, gates: Any) -> None:
    server = serve(response(400, b'{"title":"Bad Request","detail":"side is missing","decision":"deny"}'))
    decision = refused(gates(url=server.url), {"intent": "new"})
    assert decision.code == "bad_order"
    assert "side is missing" in decision.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Decimal("NaN"), object(), b"1", {1: 2}.keys(), 1j])
def test_an_order_that_cannot_be_sent_is_not_sent(serve: Any, gates: Any, value: object) -> None:
    server = serve(said(ALLOW))
    assert refused(gates(url=server.url), LEAVE | {"quantity": value}).code == "bad_order"
    assert not server.requests


GATE_ANSWERS = {
    "status 500": response(500),
    "status 204": response(204),
    "status 302": response(302, headers=HEADERS | {"Location": "/"}),
    "status 401": response(401),
    "another service's 200": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "another switch": response(headers=HEADERS | {"X-Killswitch-Switch": "other"}),
    "two switches": response(headers=HEADERS | {"x-killswitch-switch": "other"}),
    "an unknown reason": response(headers=HEADERS | {"X-Killswitch-Reason": "fine"}),
    "an allow for a reason to deny": response(headers=HEADERS | {"X-Killswitch-Reason": "killed"}),
    "an allow of a cancel that nobody asked about": response(headers=HEADERS | {"X-Killswitch-Reason": "cancel"}),
    "an allow under halt": response(headers=HEADERS | {"X-Killswitch-Restriction": "halt"}),
    "an allow whose body denies": response(200, b'{"decision":"deny"}'),
    "an allow whose body decides nothing": response(200, b'{"status":"ok"}'),
    "no reason": response(headers={"X-Killswitch-Switch": SWITCH, "X-Killswitch-Factor": "1.0"}),
    "a factor that is none": response(headers=HEADERS | {"X-Killswitch-Factor": "nan"}),
    "a factor in words": response(headers=HEADERS | {"X-Killswitch-Factor": "1_0"}),
    "a factor above 1": response(headers=HEADERS | {"X-Killswitch-Factor": "2"}),
    "garbage": b"\x00\xff\x13garbage\r\n\r\n" * 5,
    "old HTTP": b"OK\r\n",
    "an endless header": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000,
    "endless headers": b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 30_000,
    "a huge body": response(200, b"x" * 200_000),
    "nothing": b"",
    "half a status line": b"HTTP/1.1 20",
    "headers that break off": response()[:-2],
    "headers that break off in a value": response()[:-6],
    "a body that breaks off": response(200, b"0123456789")[:-3],
    "a chunked body that breaks off": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
        + "".join(f"{n}: {v}\r\n" for n, v in HEADERS.items()).encode()
        + b"\r\n5\r\nab"
    ),
    "an early hint and no more": b"HTTP/1.1 100 Continue\r\n\r\n",
}


@pytest.mark.parametrize("answer", GATE_ANSWERS.values(), ids=GATE_ANSWERS.keys())
def test_whatever_is_not_a_whole_allow_of_the_right_switch_denies(serve: Any, gates: Any, answer: bytes) -> None:
    def behave(connection: socket.socket, _: bytes) -> bool:
        connection.sendall(answer)
        return False

    gate = gates(url=serve(behave).url, expect_switch=SWITCH)
    assert refused(gate).code in ("internal_error", "stale")
    assert gate.is_blocked()
    assert gate.position_limit_factor == 0.0


ORDER_ANSWERS = {
    "status 500": said(ALLOW, 500),
    "status 403": said(ALLOW, 403),
    "status 400 without a body": response(400),
    "no body": response(),
    "no JSON": response(200, b"allow"),
    "bad text": response(200, b'{"decision":"\xff"}'),
    "a list": response(200, json.dumps([ALLOW]).encode()),
    "a text": response(200, b'"allow"'),
    "an unknown decision": said(ALLOW | {"decision": "Allow"}),
    "a decision that is true": said(ALLOW | {"decision": True}),
    "no decision": said({k: v for k, v in ALLOW.items() if k != "decision"}),
    "no reason": said(ALLOW | {"reason": None}),
    "an unknown code": said(ALLOW | {"reason": {"code": "fine"}}),
    "an allow for a reason to deny": said(ALLOW | {"reason": {"code": "over_limit"}}),
    "an allow of a cancel that nobody asked about": said(ALLOW | {"reason": {"code": "cancel"}}),
    "an allow under halt": said(ALLOW | {"restriction": "halt"}),
    "another switch": said(ALLOW | {"switch": "other"}),
    "no switch": said(ALLOW | {"switch": None}),
    "another switch in the header": response(
        200, json.dumps(ALLOW).encode(), HEADERS | {"X-Killswitch-Switch": "other"}
    ),
    "a factor that is true": said(ALLOW | {"position_limit_factor": True}),
    "a factor that is none": said(ALLOW | {"position_limit_factor": None}),
    "NaN": response(200, json.dumps(ALLOW | {"position_limit_factor": float("nan")}).encode()),
    "two decisions": response(200, b'{"decision":"deny",' + json.dumps(ALLOW).encode()[1:]),
    "deep nesting": response(200, b"[" * 30_000),
    "a cut body": said(ALLOW)[:-1],
}


@pytest.mark.parametrize("answer", ORDER_ANSWERS.values(), ids=ORDER_ANSWERS.keys())
def test_whatever_is_not_a_well_formed_allow_denies_the_order(serve: Any, gates: Any, answer: bytes) -> None:
    def behave(connection: socket.socket, _: bytes) -> bool:
        connection.sendall(answer)
        return False

    gate = gates(url=serve(behave).url, expect_switch=SWITCH)
    assert refused(gate, {"intent": "new"}).code in ("internal_error", "stale")


FOREIGN = "取引/bot\u200b-é"


def foreign(body: dict[str, Any] | None, header: str = "??/bot?-é") -> bytes:
    """An answer of the switch `FOREIGN`, whose name fits the body and not the header."""
    said_in_body = b"" if body is None else json.dumps(body).encode()
    head = response(200, said_in_body, HEADERS | {"X-Killswitch-Switch": "NAME"})
    return head.replace(b"NAME", header.encode("latin-1"))


def test_a_switch_whose_name_no_header_can_carry_is_known_by_the_body(serve: Any, gates: Any) -> None:
    server = serve(lambda connection, _: bool(connection.sendall(foreign(ALLOW | {"switch": FOREIGN}))))
    gate = gates(url=server.url, expect_switch=FOREIGN)
    assert gate.check_can_execute()
    assert gate.check_can_execute(LEAVE)
    assert gate.position_limit_factor > 0.0


@pytest.mark.parametrize(
    "answer",
    [
        foreign(None),
        foreign({"decision": "allow"}),
        foreign({"decision": "allow", "switch": 7}),
        foreign({"decision": "allow", "switch": "??/bot?-é"}),
        foreign({"decision": "allow", "switch": "other"}),
        foreign({"decision": "allow", "switch": FOREIGN}, header="other"),
        foreign({"decision": "allow", "switch": FOREIGN}, header=""),
    ],
)
def test_a_name_that_only_looks_like_the_expected_one_denies(serve: Any, gates: Any, answer: bytes) -> None:
    server = serve(lambda connection, _: bool(connection.sendall(answer)))
    assert refused(gates(url=server.url, expect_switch=FOREIGN)).code == "internal_error"


def test_the_name_in_the_body_is_the_switch_of_the_decision(serve: Any, gates: Any) -> None:
    body = {"switch": FOREIGN, "decision": "deny", "reason": {"message": "drawdown"}}
    answer = foreign(body).replace(b" 200 ", b" 403 ").replace(b"Reason: active", b"Reason: killed")
    server = serve(lambda connection, _: bool(connection.sendall(answer)))
    decision = refused(gates(url=server.url, expect_switch=FOREIGN))
    assert (decision.code, decision.switch) == ("killed", FOREIGN)


@given(st.text())
def test_a_name_is_expected_in_headers_as_the_gate_writes_it(name: str) -> None:
    assert client._in_header(name) == header_value(name)


def test_chunked_and_unframed_answers_are_whole_answers_too(serve: Any, gates: Any) -> None:
    head = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items()).encode()
    body = json.dumps(ALLOW).encode()
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n" + head + b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    )
    server = serve(chunked)
    gate = gates(url=server.url)
    assert gate.check_can_execute(LEAVE)
    assert gate.check_can_execute()
    assert len(server.connections) == 1

    def unframed(connection: socket.socket, _: bytes) -> bool:
        connection.sendall(b"HTTP/1.0 200 OK\r\n" + head + b"\r\n" + body)
        return False

    assert gates(url=serve(unframed).url).check_can_execute(LEAVE)


def took(gate: ExecutionGate, order: Any = None) -> tuple[float, GateDecision]:
    started = time.perf_counter()
    decision = refused(gate, order)
    return time.perf_counter() - started, decision


def hang(connection: socket.socket, _: bytes) -> bool:
    time.sleep(2)
    return False


def drip(connection: socket.socket, _: bytes) -> bool:
    for byte in said(ALLOW):
        connection.sendall(bytes([byte]))
        time.sleep(0.02)
    return False


def drip_the_body(connection: socket.socket, _: bytes) -> bool:
    whole = said(ALLOW)
    connection.sendall(whole[:-50])
    for byte in whole[-50:]:
        time.sleep(0.02)
        connection.sendall(bytes([byte]))
    return False


def hint_for_ever(connection: socket.socket, _: bytes) -> bool:
    for _turn in range(100):
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("behave", [hang, drip, drip_the_body, hint_for_ever])
@pytest.mark.parametrize("order", [None, LEAVE])
def test_no_whole_answer_in_time_is_a_denial_in_time(serve: Any, gates: Any, behave: Behaviour, order: Any) -> None:
    elapsed, decision = took(gates(url=serve(behave).url, timeout=0.15), order)
    assert (decision.code, decision.answered) == ("stale", False)
    assert 0.14 < elapsed < 0.8  # each of them would take a second or more


def test_a_late_answer_is_never_taken_for_the_next_questions(serve: Any, gates: Any) -> None:
    first = threading.Event()

    def late_allow_then_deny(connection: socket.socket, _: bytes) -> bool:
        if not first.is_set():
            first.set()
            time.sleep(0.15)
            connection.sendall(said(ALLOW))
        else:
            connection.sendall(said(DENY))
        return True

    gate = gates(url=serve(late_allow_then_deny).url, timeout=0.1)
    assert refused(gate, LEAVE).code == "stale"
    time.sleep(0.1)
    assert refused(gate, LEAVE).code == "over_limit"


def test_bytes_nobody_asked_for_are_never_an_answer(serve: Any, gates: Any) -> None:
    asked: list[bytes] = []

    def answer_twice(connection: socket.socket, request: bytes) -> bool:
        asked.append(request)
        connection.sendall(said(DENY) if len(asked) > 1 else said(ALLOW))
        time.sleep(0.05)
        connection.sendall(said(ALLOW))
        return True

    gate = gates(url=serve(answer_twice).url)
    assert gate.check_can_execute(LEAVE)
    time.sleep(0.1)
    assert refused(gate, LEAVE).code == "over_limit"


def test_a_kept_connection_that_the_server_closed_is_made_anew(serve: Any, gates: Any) -> None:
    def answer_once(connection: socket.socket, _: bytes) -> bool:
        connection.sendall(response())
        return False

    server = serve(answer_once)
    gate = gates(url=server.url)
    for _ in range(20):
        assert gate.check_can_execute()
    assert len(server.requests) == 20


def test_a_connection_closed_on_the_way_of_the_question_is_retried_once_and_no_more(serve: Any, gates: Any) -> None:
    """The server reads each connection's second question and closes without a byte, as when an idle close races."""
    seen: dict[socket.socket, int] = {}

    def one_answer_each(connection: socket.socket, _: bytes) -> bool:
        seen[connection] = seen.get(connection, 0) + 1
        if seen[connection] == 1:
            connection.sendall(response())
            return True
        return False

    server = serve(one_answer_each)
    gate = gates(url=server.url)
    assert gate.check_can_execute()
    assert gate.check_can_execute()
    assert [len(server.requests), len(server.connections)] == [3, 2]

    silent = serve(lambda connection, _: False)
    assert refused(gates(url=silent.url)).code == "stale"
    assert len(silent.requests) == 1


def test_an_answer_that_breaks_off_is_not_asked_for_again(serve: Any, gates: Any) -> None:
    answers = [response(), response()[:20]]

    def behave(connection: socket.socket, _: bytes) -> bool:
        connection.sendall(answers.pop(0))
        return bool(answers)

    server = serve(behave)
    gate = gates(url=server.url)
    assert gate.check_can_execute()
    assert gate.is_blocked()
    assert len(server.requests) == 2


def test_a_reset_connection_denies(serve: Any, gates: Any) -> None:
    def reset(connection: socket.socket, _: bytes) -> bool:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        return False

    assert refused(gates(url=serve(reset).url)).code == "stale"


def test_a_dead_sidecar_denies_and_one_that_came_back_allows(gates: Any) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = Server(listener, replying(response()))
    gate = gates(url=f"http://localhost:{port}")
    assert gate.check_can_execute()
    server.close()
    decision = refused(gate)
    assert (decision.code, decision.answered) == ("stale", False)
    assert "out of reach" in decision.message or "closed" in decision.message
    back = Server(socket.create_server(("127.0.0.1", port)), replying(response()))
    assert gate.check_can_execute()
    back.close()


def test_a_unix_socket_serves_as_well(gates: Any, tmp_path: Path) -> None:
    path = tmp_path / "gate.sock"
    gate = gates(socket=path)
    assert refused(gate).code == "stale"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    server = Server(listener, replying(said(ALLOW)))
    assert gate.check_can_execute(LEAVE)
    assert gate.check_can_execute()
    assert len(server.connections) == 1
    server.close()
    assert refused(gate).code == "stale"


def test_a_full_backlog_of_a_unix_socket_is_waited_for_until_the_deadline(gates: Any, tmp_path: Path) -> None:
    path = tmp_path / "gate.sock"
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as others:
        listener.bind(str(path))
        listener.listen(0)
        for _ in range(2):
            other = others.enter_context(socket.socket(socket.AF_UNIX))
            other.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                other.connect(str(path))
        elapsed, decision = took(gates(socket=path, timeout=0.1))
    assert decision.code == "stale"
    assert elapsed < 2.0  # there is nothing that would ever end it


def test_cancels_pass_without_a_question(gates: Any, serve: Any) -> None:
    server = serve(response(403))
    assert gates(url=server.url).check_can_execute({"intent": "cancel"}) is True
    assert gates(url="http://127.0.0.1:9").check_can_execute({"intent": "cancel", "quantity": "junk"}) is True
    assert not server.requests


def test_on_stale_lets_exits_out_of_a_dead_sidecar_but_overrules_no_answer(gates: Any, serve: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    dead = gates(url=f"http://127.0.0.1:{port}", on_stale="reduce_only")
    assert dead.check_can_execute(LEAVE)
    assert refused(dead, LEAVE | {"quantity": 11}).code == "stale"
    assert refused(dead).code == "stale"
    hanging = gates(url=serve(hang).url, on_stale="reduce_only", timeout=0.1)
    assert hanging.check_can_execute(LEAVE)
    for answer in (
        said(DENY),
        response(500),
        said(ALLOW | {"switch": "other"}),
        b"garbage\r\n\r\n",
        response(400, b"{}"),
    ):
        answering = gates(url=serve(answer).url, on_stale="reduce_only", expect_switch=SWITCH)
        assert refused(answering, LEAVE).answered


def test_threads_share_a_gate_and_each_gets_the_answer_to_its_own_question(serve: Any, gates: Any) -> None:
    def by_quantity(connection: socket.socket, request: bytes) -> bool:
        order = json.loads(request.partition(b"\r\n\r\n")[2])
        connection.sendall(said((ALLOW if order["quantity"] % 2 else DENY) | {"decision_id": str(order["quantity"])}))
        return True

    server = serve(by_quantity)
    gate = gates(url=server.url, timeout=10)
    wrong: list[object] = []

    def ask(first: int) -> None:
        for quantity in range(first, first + 50):
            decision = gate._decide(LEAVE | {"quantity": quantity}, time.monotonic() + 10)
            if (decision.allowed, decision.decision_id) != (bool(quantity % 2), str(quantity)):
                wrong.append(decision)

    threads = [threading.Thread(target=ask, args=(1000 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(server.connections) <= 8


def test_a_forked_child_asks_over_a_connection_of_its_own(serve: Any, gates: Any) -> None:
    server = serve(response())
    gate = gates(url=server.url)
    assert gate.check_can_execute()
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if gate.check_can_execute() and gate.check_can_execute() else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert gate.check_can_execute()
    assert [len(server.connections), len(server.requests)] == [2, 4]


def test_a_closed_gate_keeps_no_connection_and_denies(serve: Any) -> None:
    server = serve(response())
    gate = ExecutionGate(url=server.url, timeout=2)
    assert gate.check_can_execute()
    gate.close()
    assert refused(gate).code == "internal_error"
    assert len(server.requests) == 1
