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
from sidecar.adapters.operations_http.doors import ControlDoor, Door, HealthDoor, PublicDoor
from sidecar.adapters.operations_http.exposition import Exposition
from sidecar.adapters.operations_http.listener import Connection, Listener, Roster
from sidecar.adapters.operations_http.routes import HEALTH_PATHS, Route, Routes, application
from sidecar.adapters.operations_http.streams import Streams
from sidecar.adapters.operations_http.tokens import TokensFile
from sidecar.adapters.operations_http.web_access import WebAccess
from sidecar.adapters.operations_http.webhook import WebhookAccess

log = logging.getLogger("sidecar.operations")

_SOCKET_MASK: Final = 0o177
_FOLDER_MODE: Final = 0o700
_BACKLOG: Final = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class OperationsLimits:
    """What callers may use.

    Attributes:
        connections: open at once on each way in; for one more, the one that has waited longest for its next request is
            closed.
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
        access: TLS, basic auth and headers of the TCP listener, loaded; None serves plain HTTP.
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
        access: WebAccess | None = None,
        limits: OperationsLimits | None = None,
        wall: Callable[[], float] = time,
    ) -> None:
        self._desk = desk
        self._limits = limits or OperationsLimits()
        self._hosts = hosts
        self._tokens = None if tokens_file is None else TokensFile(tokens_file)
        self._webhook = webhook or WebhookAccess()
        self._access = access
        self._streams = Streams(
            desk,
            limit=self._limits.streams,
            heartbeat=self._limits.heartbeat_seconds,
            write_seconds=self._limits.write_seconds,
        )
        self._routes = Routes(desk=desk, exposition=Exposition(registry), streams=self._streams, wall=wall).table()
        self._runners: list[web.AppRunner] = []
        self._listeners: list[Listener] = []
        self._doors: list[PublicDoor] = []
        self._control: asyncio.Server | None = None
        self._bound: tuple[Path, int] | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with the credentials, for the status; empty while nothing is."""
        sources = (self._access, self._tokens, self._webhook)
        found = (source.problem for source in sources if source is not None)
        return tuple(problem for problem in found if problem is not None)

    async def refresh(self) -> None:
        """Look at the credentials now and not with the next request. Never raises: see `problems`."""
        for source in (self._access, self._tokens, self._webhook):
            if source is not None:
                await source.refresh()

    async def start_tcp(self, host: str, port: int) -> tuple[str, int]:
        """Listen on a TCP address; return the one bound, of use where port was 0. Raise OSError."""
        await self.refresh()
        door = PublicDoor(hosts=self._hosts, tokens=self._tokens, webhook=self._webhook, access=self._access)
        self._doors.append(door)
        return await self._listen(host, port, await self._accept(door, self._routes, self._access), self._access)

    async def start_health(self, host: str, port: int) -> tuple[str, int]:
        """Listen on a TCP address for probes: health alone, in plain HTTP. Return the one bound. Raise OSError."""
        routes = tuple(route for route in self._routes if route.path in HEALTH_PATHS)
        return await self._listen(host, port, await self._accept(HealthDoor(hosts=self._hosts), routes, None), None)

    async def _listen(
        self, host: str, port: int, connect: Callable[[], asyncio.Protocol], access: WebAccess | None
    ) -> tuple[str, int]:
        listener = Listener(connect, access)
        self._listeners.append(listener)
        return await listener.open(host, port)

    async def start_control(self, path: str | Path) -> None:
        """Listen on a Unix socket that only this user may connect to, in a folder made for this user alone.

        A socket file left by a dead process is replaced. One that something listens on, or a file that is no socket,
        raises OSError and is left alone.
        """
        path = Path(path)
        path.parent.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
        _remove_stale(path)
        accept = await self._accept(ControlDoor(), self._routes, None)
        listener = _bind(path)
        try:
            loop = asyncio.get_running_loop()
            self._control = await loop.create_unix_server(accept, sock=listener, backlog=_BACKLOG)
        except BaseException:
            listener.close()
            raise
        self._bound = (path, path.lstat().st_ino)

    async def stop(self) -> None:
        """Stop listening, let answers under way go out for a moment, then close what remains."""
        self._remove_bound()
        for listener in self._listeners:
            await listener.close()
        if self._control is not None:
            self._control.close()
        self._streams.stop()
        for runner in self._runners:
            await runner.cleanup()
        for door in self._doors:
            door.stop()
        if self._control is not None:
            await self._control.wait_closed()
            self._control = None
        self._listeners.clear()
        self._runners.clear()
        self._doors.clear()

    async def _accept(
        self, door: Door, routes: tuple[Route, ...], access: WebAccess | None
    ) -> Callable[[], asyncio.Protocol]:
        app = application(routes, door, self._desk, access=access, seconds=self._limits.answer_seconds)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=self._limits.stop_seconds)
        await runner.setup()
        self._runners.append(runner)
        manager = runner.server
        if manager is None:
            raise RuntimeError("aiohttp's runner has no server after its setup")
        loop, roster, options = asyncio.get_running_loop(), Roster(self._limits.connections), self._connection_options()
        return lambda: Connection(manager, roster, access, loop=loop, **options)

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
