"""Paths, the role that each needs, and how a question at it is put to the desk and its answer into HTTP.

Bodies and parameters are read by `questions`, callers let in by a `Door`; no decision is taken here.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from sidecar.adapters.operations_http.desk import Desk
from sidecar.adapters.operations_http.doors import Caller, Door
from sidecar.adapters.operations_http.exposition import Exposition
from sidecar.adapters.operations_http.problems import SECURITY_HEADERS, Problem, problem_of
from sidecar.adapters.operations_http.questions import (
    BODY_BYTES,
    ApprovalQuestion,
    CancelQuestion,
    RecoveryQuestion,
    TriggerQuestion,
    read_audit_question,
    read_question,
)
from sidecar.adapters.operations_http.streams import Streams
from sidecar.adapters.operations_http.tokens import Role

_WELCOME: Final = "killswitch: status at /api/v1/status\nmetrics at /metrics\n"

Handler = Callable[[web.Request, Caller], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """One path and method; `role` None is open to everybody, `limited` False may stay open for long."""

    method: str
    path: str
    role: Role | None
    handler: Handler
    limited: bool = True


class Routes:
    """All that can be asked.

    Args:
        desk: answers it.
        exposition: renders metrics.
        streams: serves events.
        wall: the time in Unix seconds, against which a waiver's end is read.
    """

    def __init__(self, *, desk: Desk, exposition: Exposition, streams: Streams, wall: Callable[[], float]) -> None:
        self._desk = desk
        self._exposition = exposition
        self._streams = streams
        self._wall = wall

    def table(self) -> tuple[Route, ...]:
        """Every route."""
        return (
            Route(method="GET", path="/", role=None, handler=self._welcome),
            Route(method="GET", path="/metrics", role=None, handler=self._metrics),
            Route(method="GET", path="/-/healthy", role=None, handler=self._live),
            Route(method="GET", path="/livez", role=None, handler=self._live),
            Route(method="GET", path="/-/ready", role=None, handler=self._ready),
            Route(method="GET", path="/readyz", role=None, handler=self._ready),
            Route(method="POST", path="/-/reload", role=Role.OPERATOR, handler=self._reload),
            Route(method="GET", path="/api/v1/status", role=Role.VIEWER, handler=self._status),
            Route(method="GET", path="/api/v1/triggers", role=Role.VIEWER, handler=self._triggers),
            Route(method="GET", path="/api/v1/health", role=Role.VIEWER, handler=self._health),
            Route(method="GET", path="/api/v1/audit", role=Role.VIEWER, handler=self._audit),
            Route(method="GET", path="/api/v1/events", role=Role.VIEWER, handler=self._events, limited=False),
            Route(method="POST", path="/api/v1/trigger", role=Role.OPERATOR, handler=self._trigger),
            Route(method="GET", path="/api/v1/recovery", role=Role.VIEWER, handler=self._recovery),
            Route(method="POST", path="/api/v1/recovery", role=Role.RISK, handler=self._recover),
            Route(method="DELETE", path="/api/v1/recovery", role=Role.OPERATOR, handler=self._cancel),
            Route(method="POST", path="/api/v1/recovery/approvals", role=Role.RISK, handler=self._approve),
        )

    # Open to everybody

    async def _welcome(self, request: web.Request, caller: Caller) -> web.Response:  # noqa: ARG002
        return _text(_WELCOME)

    async def _metrics(self, request: web.Request, caller: Caller) -> web.Response:  # noqa: ARG002
        exposed = await self._exposition.render(request.headers.get("Accept"), request.headers.get("Accept-Encoding"))
        headers = {"Content-Type": exposed.content_type, "Vary": "Accept, Accept-Encoding"}
        if exposed.gzipped:
            headers["Content-Encoding"] = "gzip"
        return web.Response(body=exposed.body, headers=headers)

    async def _live(self, request: web.Request, caller: Caller) -> web.Response:  # noqa: ARG002
        return _probe(self._desk.live(), "alive")

    async def _ready(self, request: web.Request, caller: Caller) -> web.Response:  # noqa: ARG002
        return _probe(self._desk.ready(), "ready")

    # Reading

    async def _status(self, request: web.Request, caller: Caller) -> web.Response:  # noqa: ARG002
        return _json(self._desk.status())

    async def _triggers(self, request: web.Request, caller: Caller) -> web.Response:  # noqa: ARG002
        return _json(self._desk.triggers())

    async def _recovery(self, request: web.Request, caller: Caller) -> web.Response:  # noqa: ARG002
        return _json(self._desk.recovery())

    async def _health(self, request: web.Request, caller: Caller) -> web.Response:  # noqa: ARG002
        return _json(await self._desk.health())

    async def _audit(self, request: web.Request, caller: Caller) -> web.Response:  # noqa: ARG002
        asked = read_audit_question(request.query, request.query.getall("type", []))
        events = await self._desk.audit(since=asked.since, until=asked.until, types=asked.types, limit=asked.limit)
        return _json({"events": list(events)})

    async def _events(self, request: web.Request, caller: Caller) -> web.StreamResponse:  # noqa: ARG002
        return await self._streams.serve(request)

    # Changing

    async def _trigger(self, request: web.Request, caller: Caller) -> web.Response:
        asked = await read_question(request, TriggerQuestion)
        status = await self._desk.trigger(
            reason=asked.reason,
            by=caller.by(asked.by),
            by_verified=caller.verified,
            restriction=asked.restriction,
        )
        return _json(status)

    async def _recover(self, request: web.Request, caller: Caller) -> web.Response:  # noqa: ARG002 - the code names who
        asked = await read_question(request, RecoveryQuestion)
        waive = asked.waivers(self._wall())
        return _json(await self._desk.recover(by=asked.by, reason=asked.reason, code=asked.code, waive=waive))

    async def _approve(self, request: web.Request, caller: Caller) -> web.Response:  # noqa: ARG002 - as above
        asked = await read_question(request, ApprovalQuestion)
        return _json(await self._desk.approve(by=asked.by, code=asked.code))

    async def _cancel(self, request: web.Request, caller: Caller) -> web.Response:
        asked = await read_question(request, CancelQuestion, optional=True)
        status = await self._desk.cancel(
            by=caller.by(asked.by), reason=asked.reason or "cancelled", by_verified=caller.verified
        )
        return _json(status)

    async def _reload(self, request: web.Request, caller: Caller) -> web.Response:  # noqa: ARG002
        await self._desk.reload()
        return _json({"reloaded": True})


def application(routes: tuple[Route, ...], door: Door, desk: Desk, *, seconds: float) -> web.Application:
    """Put the routes behind a door.

    Args:
        routes: what there is.
        door: who may come in.
        desk: asked for its status where an error has to show it.
        seconds: how long an answer may take to be made, and again to be sent.
    """

    @web.middleware
    async def guard(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            door.check(request)
            return await handler(request)
        except ConnectionError:
            raise  # the caller is gone: there is nobody to answer
        except Exception as error:  # noqa: BLE001 - every error becomes a problem document; defects are logged there
            return problem_of(error, desk.status).response()

    async def dress(_request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(SECURITY_HEADERS)

    app = web.Application(middlewares=[guard], client_max_size=BODY_BYTES)
    app.on_response_prepare.append(dress)
    for route in routes:
        add = app.router.add_get if route.method == "GET" else _adder(app, route.method)
        add(route.path, _endpoint(route, door, seconds))
    return app


def _adder(app: web.Application, method: str) -> Callable[..., web.AbstractRoute]:
    def add(path: str, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.AbstractRoute:
        return app.router.add_route(method, path, handler)

    return add


def _endpoint(route: Route, door: Door, seconds: float) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def endpoint(request: web.Request) -> web.StreamResponse:
        async with asyncio.timeout(seconds if route.limited else None):
            caller = await door.admit(request, route.role)
            response = await route.handler(request, caller)
        await _send(request, response, seconds)
        return response

    return endpoint


async def _send(request: web.Request, response: web.StreamResponse, seconds: float) -> None:
    # Sent here and not by the server, which would wait for ever for a reader that does not read.
    try:
        async with asyncio.timeout(seconds):
            await response.prepare(request)
            await response.write_eof()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the reader of an answer does not read") from None


def _probe(objection: str | None, word: str) -> web.Response:
    if objection is not None:
        raise Problem(503, objection)
    return _text(f"{word}\n")


def _text(text: str) -> web.Response:
    return web.Response(text=text, content_type="text/plain")


def _json(content: Mapping[str, Any]) -> web.Response:
    return web.Response(body=json.dumps(content, allow_nan=False).encode(), content_type="application/json")
