"""Abuse of both listeners leaves the gate untouched: it answers rightly and soon while the abuse goes on.

docs/SECURITY.md lists these abuses with what each of them gets. All loads are bounded. The limits on time are wide, for
the tests share their machine with others; they are far below what each abuse would cause if it worked.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import bcrypt
import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.cast import Sidecar

pytestmark = pytest.mark.e2e

BRAKE = {"trigger": "runaway", "type": "order_rate", "max_orders": 1_000_000, "per": "1s"}
HOST = b"Host: localhost\r\n"
SOON_SECONDS = 3.0
USUALLY_SECONDS = 0.5


@dataclass
class Watch:
    """A bot that asks the gate all the time, and a kubelet that looks at the process."""

    sidecar: Sidecar
    gate: list[float] = field(default_factory=list)
    wrong: list[object] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        while not self._stop.wait(0.02):
            began = time.monotonic()
            try:
                reply = self.sidecar.gate(timeout=10)
                if reply.decided != (200, "active"):
                    self.wrong.append(reply)
            except OSError as error:
                self.wrong.append(error)
            self.gate.append(time.monotonic() - began)

    def probe(self) -> None:
        while not self._stop.wait(0.3):
            try:
                if self.sidecar.operations("/livez").status != 200:
                    self.wrong.append("not alive")
            except (OSError, http.client.HTTPException) as error:
                self.wrong.append(error)

    @contextlib.contextmanager
    def during(self, abuse: str) -> Iterator[None]:
        threads = [threading.Thread(target=each) for each in (self.look, self.probe)]
        self.gate, self.wrong = [], []
        self._stop.clear()
        for thread in threads:
            thread.start()
        try:
            yield
            time.sleep(0.3)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(30)
        assert self.wrong == [], f"{abuse}: {self.wrong[:3]}"
        assert len(self.gate) > 3, abuse
        assert max(self.gate) < SOON_SECONDS, f"{abuse}: {max(self.gate):.2f} s"
        assert median(self.gate) < USUALLY_SECONDS, f"{abuse}: {median(self.gate):.2f} s"


def connect(port: int, *, small_window: bool = False) -> socket.socket:
    made = socket.socket()
    if small_window:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.settimeout(10)
    made.connect(("127.0.0.1", port))
    return made


@contextlib.contextmanager
def many(port: int, count: int, **options: Any) -> Iterator[list[socket.socket]]:
    opened = [connect(port, **options) for _ in range(count)]
    try:
        yield opened
    finally:
        for each in opened:
            each.close()


def send(each: socket.socket, data: bytes) -> None:
    """Send what goes; an end that was closed is an answer too."""
    with contextlib.suppress(OSError):
        each.sendall(data)


def answers_to(port: int, sent: bytes) -> list[int]:
    """The status of each answer, up to the end of the connection."""
    with contextlib.closing(connect(port)) as each:
        send(each, sent)
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(OSError):
            while chunk := each.recv(65536):
                received += chunk
    # Not every "HTTP/1.1 " opens an answer: a refusal may quote the line that it refuses.
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def drip(port: int, path: bytes) -> None:
    """Slow-loris: heads that grow by a byte and never end."""
    with many(port, 150) as opened:
        for each in opened:
            send(each, b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"X-Slow: ")
        for _ in range(5):
            for each in opened:
                send(each, b"a")
            time.sleep(0.1)


def hoard(port: int) -> None:
    """Connections that say nothing, more than there are places."""
    with many(port, 300):
        time.sleep(0.5)


def pipeline(port: int, path: bytes) -> None:
    """Thousands of questions at once, with nobody who reads the answers."""
    question = b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"\r\n"
    with many(port, 20, small_window=True) as opened:
        for each in opened:
            each.setblocking(False)
            for _ in range(10):
                with contextlib.suppress(OSError):
                    each.send(question * 50)
        time.sleep(0.7)


def lists(port: int) -> None:
    """Lists of a thousand orders, many at a time."""
    order = {"intent": "new", "symbol": "A", "side": "buy", "quantity": 1, "position": 0}
    body = json.dumps([order] * 1000).encode()
    head = b"POST /v1/orders/check HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(body)
    with many(port, 20) as opened:
        for each in opened:
            each.setblocking(False)
            with contextlib.suppress(OSError):
                each.send(head + body)
        time.sleep(0.7)


def guess(port: int) -> None:
    """Wrong passwords, as fast as they are taken."""
    head = b"GET /metrics HTTP/1.1\r\n" + HOST + b"Authorization: Basic YW5uYTp3cm9uZw==\r\n\r\n"
    with many(port, 60) as opened:
        for each in opened:
            send(each, head)
        time.sleep(1.0)


MALFORMED = {
    "noise": bytes(range(256)) * 8,
    "nothing but line ends": b"\r\n" * 5000,
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a NUL in a header": b"GET /gate HTTP/1.1\r\n" + HOST + b"X: a\0b\r\n\r\n",
    "a head without end": b"GET /gate HTTP/1.1\r\n" + HOST + b"X: " + b"x" * 100_000,
    "a thousand headers": b"GET /gate HTTP/1.1\r\n" + HOST + b"X: x\r\n" * 1000 + b"\r\n",
    "a long path": b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "a negative length": b"POST /gate HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n",
    "a length that is none": b"POST /gate HTTP/1.1\r\n" + HOST + b"Content-Length: 1e3\r\n\r\n",
}

# What a proxy and we might read differently: where the first request ends decides whether there is a second one.
SECOND = b"GET /SECOND HTTP/1.1\r\n" + HOST + b"\r\n"
SMUGGLED = {
    "a length and chunks": b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "two lengths": b"Content-Length: 0\r\nContent-Length: 44\r\n\r\n" + SECOND,
    "chunks by another name": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SECOND,
    "chunks, then something else": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SECOND,
    "a space before the colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "a chunk of a size that is none": b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n" + SECOND,
    "a folded header": b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n" + SECOND,
}


def ambiguous(path: bytes, framing: bytes) -> bytes:
    return b"POST " + path + b" HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n" + framing


@pytest.fixture
def abused(make_sidecar: Callable[..., Sidecar]) -> Sidecar:
    sidecar = make_sidecar([BRAKE], [])
    sidecar.start()
    sidecar.wait_status("it to be ready", lambda status: status["ready"])
    return sidecar


def run(watch: Watch, abuses: Sequence[tuple[str, Callable[..., None], tuple[Any, ...]]]) -> None:
    for name, abuse, arguments in abuses:
        with watch.during(name):
            abuse(*arguments)


def test_abuse_of_either_listener_leaves_the_gate_untouched(abused: Sidecar) -> None:
    operations, gate = abused.operations_port, abused.gate_port
    run(
        Watch(abused),
        [
            ("slow heads at the operations listener", drip, (operations, b"/metrics")),
            ("slow heads at the gate", drip, (gate, b"/gate")),
            ("silent connections at the operations listener", hoard, (operations,)),
            ("silent connections at the gate", hoard, (gate,)),
            ("pipelined scrapes", pipeline, (operations, b"/metrics")),
            ("pipelined questions for the status", pipeline, (operations, b"/api/v1/status")),
            ("pipelined questions at the gate", pipeline, (gate, b"/gate")),
            ("lists of orders", lists, (gate,)),
        ],
    )
    assert abused.kill_switch()["durable"]
    assert abused.gate().decided == (403, "killed")
    assert not abused.logged("operations.request_failed")


def test_what_is_malformed_or_too_large_is_refused_and_closed(abused: Sidecar) -> None:
    watch = Watch(abused)
    with watch.during("malformed requests"):
        for name, sent in MALFORMED.items():
            for port in (abused.operations_port, abused.gate_port):
                found = answers_to(port, sent)
                assert set(found) <= {400, 404, 431}, f"{name} at {port}: {found}"
                assert len(found) <= 1, f"{name} at {port}: {found}"
    with watch.during("bodies that are too large"):
        body = b"x" * (2 << 20)
        lengths = b"Content-Length: %d\r\n\r\n" % len(body)
        chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body)
        assert answers_to(abused.gate_port, ambiguous(b"/v1/orders/check", lengths + body)) in ([413], [])
        assert answers_to(abused.gate_port, ambiguous(b"/v1/orders/check", chunked + body)) in ([413], [])
        for framing in (lengths, chunked):
            # Nobody may change anything here, so the body is not even read.
            assert answers_to(abused.operations_port, ambiguous(b"/api/v1/trigger", framing + body)) in ([403], [])
            found = answers_to(abused.operations_port, ambiguous(b"/api/v1/alertmanager", framing + body))
            assert found in ([403], [])
    assert abused.gate().decided == (200, "active")


@pytest.mark.parametrize("listener", ["operations", "gate"])
def test_no_request_hides_in_another(abused: Sidecar, listener: str) -> None:
    port, path = {
        "operations": (abused.operations_port, b"/api/v1/trigger"),
        "gate": (abused.gate_port, b"/v1/orders/check"),
    }[listener]
    for name, framing in SMUGGLED.items():
        found = answers_to(port, ambiguous(path, framing))
        assert len(found) <= 1, f"{name}: a second request was seen: {found}"
        assert set(found) <= {400, 403}, f"{name}: {found}"
    assert abused.gate().decided == (200, "active")
    assert abused.status()["state"] == "ACTIVE"


def test_guessing_passwords_does_not_slow_the_gate_or_those_who_are_known(make_sidecar: Callable[..., Sidecar]) -> None:
    sidecar = make_sidecar([BRAKE], [])
    web = sidecar.folder / "web.yaml"
    web.write_text(yaml.safe_dump({"basic_auth_users": {"anna": bcrypt.hashpw(b"right", bcrypt.gensalt(10)).decode()}}))
    sidecar.write_config(operations={"web_config": str(web)})
    sidecar.start()
    sidecar.wait_status("it to be ready", lambda status: status["ready"])
    known = {"Authorization": "Basic YW5uYTpyaWdodA=="}

    def scrape() -> int:
        connection = http.client.HTTPConnection("127.0.0.1", sidecar.operations_port, timeout=20)
        try:
            connection.request("GET", "/metrics", headers=known)
            return connection.getresponse().status
        finally:
            connection.close()

    assert scrape() == 200
    with Watch(sidecar).during("guesses"):
        flood = threading.Thread(target=guess, args=(sidecar.operations_port,))
        flood.start()
        time.sleep(0.2)
        assert [scrape() for _ in range(3)] == [200, 200, 200]
        flood.join(30)
