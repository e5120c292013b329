"""A Prometheus that answers as the script says: rightly, until it is told to fail in one of the ways servers do.

It answers the chains of `sidecar.adapters.prometheus.batch` on loopback, from one value for every query, with raw
sockets below, because no HTTP server would do what is done here.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import socketserver
import struct
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_TERM = re.compile(r'label_replace\(\(\n(.*?)\n\),"__ks__","(\w+)","",""\)', re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One question on its connection: its terms by tag, and the server that was asked."""

    connection: socket.socket
    terms: dict[str, str]
    server: ScriptedPrometheus

    def series(self, value: str | None = None, *, clock: float = 0.0, age: float = 0.1) -> list[dict[str, Any]]:
        """The result that a healthy server gives; `clock` seconds are added to its time."""
        now = time.time() + clock
        shown = self.server.value if value is None else value
        values = {"t": str(now), "s": str(now - age), "q": shown}
        return [{"metric": {"__ks__": tag}, "value": [now, values[tag[0]]]} for tag in self.terms]

    def reply(self, result: list[dict[str, Any]], **envelope: Any) -> None:
        data = {"resultType": "vector", "result": result}
        self.send(200, json.dumps({"status": "success", "data": data, **envelope}).encode())

    def send(self, status: int, body: bytes, *, kind: str = "application/json", length: int | None = None) -> None:
        """Send a whole response; `length` is what its header says, where that is not so."""
        size = len(body) if length is None else length
        head = f"HTTP/1.1 {status} Said\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n\r\n"
        self.connection.sendall(head.encode() + body)

    def until_over(self) -> None:
        """Say nothing more until the fault is over."""
        self.server.over.wait(60)


Behaviour = "Callable[[Exchange], None]"


@dataclass(kw_only=True)
class ScriptedPrometheus:
    """The server; `value` is what every query gives, `behaviour` how a question is met (None: rightly)."""

    value: str = "-0.01"
    behaviour: Callable[[Exchange], None] | None = None
    asked: int = 0
    over: threading.Event = field(default_factory=threading.Event)
    port: int = 0
    _server: socketserver.ThreadingTCPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        scripted = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError, ValueError):
                    while _converse(self.request, scripted):
                        pass

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def fail(self, behaviour: Callable[[Exchange], None] | None) -> None:
        """Meet questions like this from now on; None ends it."""
        self.behaviour = behaviour
        released, self.over = self.over, threading.Event()
        released.set()


def _converse(connection: socket.socket, server: ScriptedPrometheus) -> bool:
    """Meet one question; False once the connection is of no more use."""
    head = b""
    while b"\r\n\r\n" not in head:
        piece = connection.recv(65536)
        if not piece:
            return False
        head += piece
    head, _, body = head.partition(b"\r\n\r\n")
    wanted = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]  # aiohttp sends one
    while len(body) < wanted:
        body += connection.recv(65536)
    server.asked += 1
    query = urllib.parse.parse_qs(body.decode())["query"][0]
    exchange = Exchange(connection=connection, terms={tag: text for text, tag in _TERM.findall(query)}, server=server)
    if server._server is None:
        return False  # stopped: what is still connected is cut off
    if server.behaviour is None:
        exchange.reply(exchange.series())
        return True
    server.behaviour(exchange)
    return False


# What servers do


def reset(exchange: Exchange) -> None:
    exchange.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def hang(exchange: Exchange) -> None:
    exchange.until_over()


def drip(exchange: Exchange) -> None:
    """Slow loris, as a server: a good answer, a byte at a time, that never ends in time."""
    exchange.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
    while not exchange.server.over.wait(0.05):
        exchange.connection.sendall(b" ")


def unavailable(exchange: Exchange) -> None:
    exchange.send(503, b"Service Unavailable", kind="text/plain")


def login_page(exchange: Exchange) -> None:
    exchange.send(200, b"<html><body>Please log in</body></html>", kind="text/html")


def cut_off(exchange: Exchange) -> None:
    body = json.dumps({"status": "success", "data": {"resultType": "vector", "result": exchange.series()}}).encode()
    exchange.send(200, body[: len(body) // 2], length=len(body))


def cut_off_json(exchange: Exchange) -> None:
    body = json.dumps({"status": "success", "data": {"resultType": "vector", "result": exchange.series()}}).encode()
    exchange.send(200, body[: len(body) // 2])


def partial(exchange: Exchange) -> None:
    exchange.reply(exchange.series(), warnings=["fetch from store-2: connection refused"])


def empty(exchange: Exchange) -> None:
    exchange.reply([one for one in exchange.series() if one["metric"]["__ks__"] == "t"])


def nothing_at_all(exchange: Exchange) -> None:
    exchange.reply([])


def saying(value: str) -> Callable[[Exchange], None]:
    """A healthy server whose every query gives this value."""

    def say(exchange: Exchange) -> None:
        exchange.reply(exchange.series(value))

    return say


def twice(exchange: Exchange) -> None:
    """Two series where there was one, as after a rename of a label."""
    doubled = [
        {**one, "metric": {**one["metric"], "shard": str(number)}}
        for one in exchange.series()
        for number in range(2 if one["metric"]["__ks__"][0] == "q" else 1)
    ]
    exchange.reply(doubled)


def native_histogram(exchange: Exchange) -> None:
    result = exchange.series()
    for one in result:
        if one["metric"]["__ks__"][0] == "q":
            moment = one.pop("value")[0]
            one["histogram"] = [moment, {"count": "3", "sum": "1", "buckets": [[0, "0.5", "1", "3"]]}]
    exchange.reply(result)


def old_samples(exchange: Exchange) -> None:
    exchange.reply(exchange.series(age=3600.0))


def future_samples(exchange: Exchange) -> None:
    exchange.reply(exchange.series(age=-3600.0))


def clock(seconds: float) -> Callable[[Exchange], None]:
    """A server whose clock is wrong by so much, and whose samples are as it sees them."""

    def answer(exchange: Exchange) -> None:
        exchange.reply(exchange.series(clock=seconds))

    return answer


def frozen() -> Callable[[Exchange], None]:
    """A cache in between that gives the same good answer for ever."""
    kept: list[list[dict[str, Any]]] = []

    def answer(exchange: Exchange) -> None:
        kept[1:] = []
        if not kept:
            kept.append(exchange.series())
        exchange.reply(kept[0])

    return answer


def huge(exchange: Exchange) -> None:
    """100 MB of JSON."""
    size = 100_000_000
    exchange.connection.sendall(
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n".encode()
        + b'{"status":"success","data":{"resultType":"vector","result":['
    )
    piece = b'{"metric":{"__ks__":"q0"},"value":[1,"1"]},' * 1000
    for _ in range(size // len(piece)):
        exchange.connection.sendall(piece)


def huge_chunked(exchange: Exchange) -> None:
    """The same without a length that would warn."""
    exchange.connection.sendall(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    piece = b" " * 65536
    for _ in range(100_000_000 // len(piece)):
        exchange.connection.sendall(b"10000\r\n" + piece + b"\r\n")
