"""Connections of the operations side: how they are taken in, how many there may be, and which have to make room.

Connections are accepted one a turn of the loop, so that a flood of them never holds up the gate, which lives on the
same loop. A TLS handshake costs more than any answer, so handshakes are also spaced out. When all places are taken, the
connection that has waited longest for its next request makes room: whoever opens connections and says nothing keeps
nobody out. Knows sockets and certificates, no requests.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from sidecar.adapters.operations_http.problems import Problem, problem_of_http
from sidecar.adapters.operations_http.web_access import WebAccess

if TYPE_CHECKING:
    import ssl

log = logging.getLogger("sidecar.operations")

_BACKLOG: Final = 128
_MOST_HANDSHAKES: Final = 64
_HANDSHAKE_SECONDS: Final = 5.0
_BETWEEN_HANDSHAKES: Final = 0.005  # seconds; a handshake with an RSA key takes the loop about a millisecond
_NO_ROOM_SECONDS: Final = 0.1  # after the process ran out of file descriptors


class Roster:
    """The connections of one way in.

    Args:
        most: open at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: set[Connection] = set()
        self._quiet: dict[Connection, None] = {}  # in the order in which they fell silent

    def enter(self, connection: "Connection") -> bool:
        """Take a connection in; False where all others are being answered."""
        if len(self._open) >= self._most and not self._make_room():
            log.warning("operations.connection_refused", extra={"fields": {"message": "too many connections are open"}})
            return False
        self._open.add(connection)
        self.quiet(connection)
        return True

    def busy(self, connection: "Connection") -> None:
        """A request of this connection is being answered."""
        self._quiet.pop(connection, None)

    def quiet(self, connection: "Connection") -> None:
        """This connection waits for a request from now on."""
        if connection in self._open:
            self._quiet[connection] = None

    def leave(self, connection: "Connection") -> None:
        """Forget a connection."""
        self._open.discard(connection)
        self._quiet.pop(connection, None)

    def _make_room(self) -> bool:
        oldest = next(iter(self._quiet), None)
        if oldest is None:
            return False
        self.leave(oldest)
        oldest.abort()
        return True


class Connection(web.RequestHandler):
    """A connection that counts, and whose protocol errors are problem documents too."""

    __slots__ = ("_access", "_roster")

    def __init__(self, manager: web.Server, roster: Roster, access: WebAccess | None, **options: Any) -> None:
        super().__init__(manager, **options)
        self._roster = roster
        self._access = access

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection in, or end it at once."""
        if self._access is not None and not self._access.admits(transport.get_extra_info("peercert")):
            log.warning(
                "operations.certificate_refused",
                extra={"fields": {"message": "a client certificate has no name that client_allowed_sans allows"}},
            )
            _abort(transport)
        elif self._roster.enter(self):
            super().connection_made(transport)
        else:
            _abort(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Give its place to others."""
        self._roster.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, unless the connection was never taken in."""
        if self.transport is not None:
            super().data_received(data)

    def abort(self) -> None:
        """End the connection without a word."""
        if self.transport is not None:
            _abort(self.transport)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Meanwhile a request of it is being answered, and it need not make room."""
        self._roster.busy(self)
        try:
            yield
        finally:
            self._roster.quiet(self)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer; what the library answers by itself, before any route is asked, is a problem document too."""
        if isinstance(resp, web.HTTPException):
            resp = problem_of_http(resp).response()
        return await super().finish_response(request, resp, start_time)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - may quote what was sent
    ) -> web.StreamResponse:
        """Answer what could not even be read as a request, and close."""
        if status < 500:
            log.debug("operations.bad_request", extra={"fields": {"error": type(exc).__name__}})
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
        response = problem.response({} if self._access is None else self._access.config.headers)
        response.force_close()
        return response


class Listener:
    """One TCP listener, plain or with TLS.

    Args:
        connect: makes the protocol of a connection.
        access: where its TLS comes from; None speaks plain HTTP.
    """

    def __init__(self, connect: Callable[[], asyncio.Protocol], access: WebAccess | None = None) -> None:
        self._connect = connect
        self._access = access
        self._sockets: list[socket.socket] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._handshakes: dict[asyncio.Task[None], None] = {}

    async def open(self, host: str, port: int) -> tuple[str, int]:
        """Listen on all addresses of the host; return the first one bound. Raise OSError."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            self._sockets.append(_bind(family, address))
        self._tasks = [asyncio.create_task(self._accept(each), name=f"accept {host}") for each in self._sockets]
        bound: tuple[str, int] = self._sockets[0].getsockname()[:2]
        return bound

    async def close(self) -> None:
        """Take no more connections; handshakes under way end without one."""
        tasks = [*self._tasks, *self._handshakes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for each in self._sockets:
            each.close()
        self._tasks, self._sockets = [], []

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("operations.accept_failed", extra={"fields": {"error": str(error)}})
                await asyncio.sleep(_NO_ROOM_SECONDS)
                continue
            accepted.setblocking(False)  # noqa: FBT003 - the library's signature
            while len(self._handshakes) >= _MOST_HANDSHAKES:
                next(iter(self._handshakes)).cancel()  # whoever is slow makes room
                await asyncio.sleep(0)
            task = asyncio.create_task(self._take(accepted), name="handshake")
            self._handshakes[task] = None
            task.add_done_callback(self._handshakes.pop)
            await asyncio.sleep(0 if self._access is None else _BETWEEN_HANDSHAKES)

    async def _take(self, accepted: socket.socket) -> None:
        context: ssl.SSLContext | None = None
        try:
            if self._access is not None:
                await self._access.refresh()
                context = self._access.context
        except BaseException:
            accepted.close()
            raise
        # From here on the socket is the transport's to close.
        loop, seconds = asyncio.get_running_loop(), None if context is None else _HANDSHAKE_SECONDS
        try:
            await loop.connect_accepted_socket(self._connect, accepted, ssl=context, ssl_handshake_timeout=seconds)
        except OSError as error:  # no TLS, no certificate, too slow, gone again: the caller's doing
            log.debug("operations.handshake_failed", extra={"fields": {"error": str(error)}})


def _abort(transport: asyncio.BaseTransport) -> None:
    if isinstance(transport, asyncio.WriteTransport):
        transport.abort()
    else:
        transport.close()


def _bind(family: int, address: Any) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)  # noqa: FBT003 - the library's signature
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {address[0]} port {address[1]}: {error.strerror}") from None
    except BaseException:
        listener.close()
        raise
    return listener
