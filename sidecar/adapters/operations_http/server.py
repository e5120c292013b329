"""Listen on TCP and on the control socket, and keep connections within bounds.

Owns listeners, connections and their limits; answers come from `routes`, and who is let in is a door's decision.
"""

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any, Final

from aiohttp import web
from prometheus_client import CollectorRegistry

from sidecar.adapters.operations_http.desk import Desk
from sidecar.adapters.operations_http.doors import ControlDoor, Door, PublicDoor
from sidecar.adapters.operations_http.exposition import Exposition
from sidecar.adapters.operations_http.problems import Problem
from sidecar.adapters.operations_http.routes import Routes, application
from sidecar.adapters.operations_http.streams import Streams
from sidecar.adapters.operations_http.tokens import TokensFile
from sidecar.adapters.operations_http.webhook import WebhookAccess

log = logging.getLogger("sidecar.operations")

_SOCKET_MASK: Final = 0o177
_FOLDER_MODE: Final = 0o700
_BACKLOG: Final = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class OperationsLimits:
    """What callers may use.

    Attributes:
        connections: open at once on each of the two ways in; one more is closed at once.
        streams: event streams open at once.
        answer_seconds: for an answer to be made, and again to be sent.
        idle_seconds: a connection without a whole request is closed after this time.
        heartbeat_seconds: between two signs of life on a quiet event stream.
        write_seconds: for one write to an event stream.
        stop_seconds: for answers under way when the server stops.
        header_bytes: of the request line, and of one header.
        headers: how many.
    """

    connections: int = 256
    streams: int = 32
    answer_seconds: float = 30.0
    idle_seconds: float = 75.0
    heartbeat_seconds: float = 10.0
    write_seconds: float = 10.0
    stop_seconds: float = 3.0
    header_bytes: int = 8190
    headers: int = 64


class OperationsServer:
    """Metrics, health and API: `start_tcp` and `start_control` it, `stop` it. Everything runs on one event loop.

    Args:
        desk: the application.
        registry: what `/metrics` shows.
        hosts: names under which the TCP listener may be called, beside IP addresses and localhost.
        tokens_file: path of the credentials of the TCP listener; None leaves reading open and refuses every change.
        webhook: who may send alerts beside those with a token; by default nobody.
        limits: what callers may use.
        wall: the time in Unix seconds.
    """

    def __init__(
        self,
        desk: Desk,
        registry: CollectorRegistry,
        *,
        hosts: Collection[str] = (),
        tokens_file: str | Path | None = None,
        webhook: WebhookAccess | None = None,
        limits: OperationsLimits | None = None,
        wall: Callable[[], float] = time,
    ) -> None:
        self._desk = desk
        self._limits = limits or OperationsLimits()
        self._hosts = hosts
        self._tokens = None if tokens_file is None else TokensFile(tokens_file)
        self._webhook = webhook or WebhookAccess()
        self._streams = Streams(
            desk,
            limit=self._limits.streams,
            heartbeat=self._limits.heartbeat_seconds,
            write_seconds=self._limits.write_seconds,
        )
        self._routes = Routes(desk=desk, exposition=Exposition(registry), streams=self._streams, wall=wall).table()
        self._runners: list[web.AppRunner] = []
        self._servers: list[asyncio.Server] = []
        self._bound: tuple[Path, int] | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with the credentials, for the status; empty while nothing is."""
        found = (self._tokens.problem if self._tokens else None, self._webhook.problem)
        return tuple(problem for problem in found if problem is not None)

    async def refresh(self) -> None:
        """Look at the credentials now and not with the next request. Never raises: see `problems`."""
        await self._webhook.refresh()
        if self._tokens is not None:
            await self._tokens.refresh()

    async def start_tcp(self, host: str, port: int) -> tuple[str, int]:
        """Listen on a TCP address; return the one bound, of use where port was 0. Raise OSError."""
        await self.refresh()
        accept = await self._accept(PublicDoor(hosts=self._hosts, tokens=self._tokens, webhook=self._webhook))
        server = await asyncio.get_running_loop().create_server(accept, host, port, backlog=_BACKLOG)
        self._servers.append(server)
        bound: tuple[str, int] = server.sockets[0].getsockname()[:2]
        return bound

    async def start_control(self, path: str | Path) -> None:
        """Listen on a Unix socket that only this user may connect to, in a folder made for this user alone.

        A socket file left by a dead process is replaced. One that something listens on, or a file that is no socket,
        raises OSError and is left alone.
        """
        path = Path(path)
        path.parent.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
        _remove_stale(path)
        accept = await self._accept(ControlDoor())
        listener = _bind(path)
        try:
            server = await asyncio.get_running_loop().create_unix_server(accept, sock=listener, backlog=_BACKLOG)
        except BaseException:
            listener.close()
            raise
        self._servers.append(server)
        self._bound = (path, path.lstat().st_ino)

    async def stop(self) -> None:
        """Stop listening, let answers under way go out for a moment, then close what remains."""
        self._remove_bound()
        for server in self._servers:
            server.close()
        self._streams.stop()
        for runner in self._runners:
            await runner.cleanup()
        for server in self._servers:
            await server.wait_closed()
        self._servers.clear()
        self._runners.clear()

    async def _accept(self, door: Door) -> Callable[[], asyncio.Protocol]:
        app = application(self._routes, door, self._desk, seconds=self._limits.answer_seconds)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=self._limits.stop_seconds)
        await runner.setup()
        self._runners.append(runner)
        manager = runner.server
        if manager is None:
            raise RuntimeError("aiohttp's runner has no server after its setup")
        loop, most = asyncio.get_running_loop(), self._limits.connections
        options = self._connection_options()

        def accept() -> asyncio.Protocol:
            return _Turned() if len(manager.connections) >= most else _Connection(manager, loop=loop, **options)

        return accept

    def _connection_options(self) -> dict[str, Any]:
        return {
            "access_log": None,
            "logger": log,
            "keepalive_timeout": self._limits.idle_seconds,
            "max_line_size": self._limits.header_bytes,
            "max_field_size": self._limits.header_bytes,
            "max_headers": self._limits.headers,
            "lingering_time": 1.0,
            "auto_decompress": False,  # a small compressed body can stand for a very large one
        }

    def _remove_bound(self) -> None:
        """Remove our socket file, unless another process has put its own in its place."""
        if self._bound is None:
            return
        path, inode = self._bound
        self._bound = None
        try:
            if path.lstat().st_ino == inode:
                path.unlink()
        except FileNotFoundError:
            return


class _Connection(web.RequestHandler):
    """A connection whose protocol errors are problem documents too."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - may quote what was sent
    ) -> web.StreamResponse:
        """Answer what could not even be read as a request, and close."""
        if status < 500:
            log.debug("operations.bad_request", extra={"fields": {"error": repr(exc)}})
            problem = Problem(
                status, "this is no HTTP/1.1 request, has not exactly one Host header, or its head is too large"
            )
        elif isinstance(exc, ConnectionError):
            # The caller went away in the middle of an answer, as every reader of events does at its end: no failure.
            log.debug("operations.caller_gone", extra={"fields": {"error": repr(exc)}})
            problem = Problem(500, "the connection was lost")
        else:
            log.error("operations.request_failed", exc_info=exc)
            problem = Problem(status, "an internal error; the log has the details")
        if request.writer.output_size > 0:
            raise ConnectionError("part of the answer is sent already")
        response = problem.response()
        response.force_close()
        return response


class _Turned(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close it at once."""
        log.warning("operations.connection_refused", extra={"fields": {"message": "too many connections are open"}})
        transport.close()


def _bind(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(_SOCKET_MASK)  # the file must not be open to others even for the moment until a chmod
    try:
        listener.settimeout(0.0)
        listener.bind(str(path))
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "stands where the control socket should be and is no socket; remove it", str(path))
    if _is_served(path):
        raise OSError(errno.EADDRINUSE, "something listens on the control socket already; stop it first", str(path))
    path.unlink()


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            # A full backlog, no permission: whatever it is, nothing says that nobody listens.
            return True
    return True
