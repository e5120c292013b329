"""Paths, the role that each needs, and how a question at it is put to the desk and its answer into HTTP.

Bodies and parameters are read by `questions`, callers let in by a `Door`; no decision is taken here.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from sidecar.adapters.operations_http.desk import Desk
from sidecar.adapters.operations_http.doors import Caller, Door, access_of
from sidecar.adapters.operations_http.exposition import Exposition
from sidecar.adapters.operations_http.headers import dress
from sidecar.adapters.operations_http.listener import Connection
from sidecar.adapters.operations_http.page import INDEX, PageFile, load
from sidecar.adapters.operations_http.problems import Problem, problem_of
from sidecar.adapters.operations_http.questions import (
    AUDIT_PARAMETERS,
    BODY_BYTES,
    ApprovalQuestion,
    CancelQuestion,
    Question,
    RecoveryQuestion,
    TriggerQuestion,
    read_audit_question,
    read_question,
)
from sidecar.adapters.operations_http.streams import Streams
from sidecar.adapters.operations_http.tokens import Role
from sidecar.adapters.operations_http.turns import Turns
from sidecar.adapters.operations_http.web_access import WebAccess
from sidecar.adapters.operations_http.webhook import WebhookQuestion, read_payload

_DOOR: Final = web.AppKey("door", Door)
HEALTH_PATHS: Final = frozenset({"/-/healthy", "/-/ready", "/livez", "/readyz"})
"""Open to whoever reaches a listener: a kubelet has no credentials."""

_METRICS: Final = "text/plain, application/openmetrics-text"

Handler = Callable[[web.Request, Caller], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """One path and method; positional, so that the table of them can be read as one.

    Attributes:
        method, path: what is asked; GET takes HEAD along.
        role: who may, over TCP; None is everybody.
        handler: answers it.
        summary: one sentence for the description of the API.
        body: what it reads; None if nothing.
        media_type: of the answer.
        limited: False where an answer may go on for as long as it likes.
        described: False for a file of the page, which is no part of the API.
        answer: the schema of what it answers, by its name in `answers`; None for text.
        refusals: what it may answer beyond what follows from its role and body.
        parameters: of its query, as OpenAPI writes them.
    """

    method: str
    path: str
    role: Role | None
    handler: Handler
    summary: str
    body: type[Question] | None = None
    media_type: str = "application/json"
    limited: bool = True
    described: bool = True
    answer: str | None = None
    refusals: frozenset[int] = frozenset()
    parameters: tuple[Mapping[str, Any], ...] = ()


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
        self._page = load()
        self._description: bytes | None = None

    def table(self) -> tuple[Route, ...]:
        """Every route."""
        text, stream = "text/plain", "text/event-stream"
        return (
            Route("GET", "/", None, self._page_file(INDEX), "The web page.", media_type="text/html"),
            *(self._page_route(name) for name in sorted(self._page) if name != INDEX),
            Route("GET", "/openapi.json", None, self._openapi, "This description.", answer="Description"),
            Route("GET", "/metrics", None, self._metrics, "Metrics for Prometheus.", media_type=_METRICS),
            Route("GET", "/-/healthy", None, self._live, "Whether the process lives.", media_type=text),
            Route("GET", "/livez", None, self._live, "Whether the process lives.", media_type=text),
            Route("GET", "/-/ready", None, self._ready, "Whether the sidecar is up.", media_type=text),
            Route("GET", "/readyz", None, self._ready, "Whether the sidecar is up.", media_type=text),
            Route(
                "POST",
                "/-/reload",
                Role.OPERATOR,
                self._reload,
                "Read configuration and rules again.",
                answer="Reloaded",
            ),
            Route(
                "GET", "/api/v1/access", None, self._access, "Who you are here, and what you may do.", answer="Access"
            ),
            Route("GET", "/api/v1/status", Role.VIEWER, self._status, "The whole switch.", answer="Status"),
            Route(
                "GET",
                "/api/v1/triggers",
                Role.VIEWER,
                self._triggers,
                "Every rule with its trigger.",
                answer="Triggers",
            ),
            Route(
                "GET",
                "/api/v1/health",
                Role.VIEWER,
                self._health,
                "The health checks of a recovery, run now.",
                answer="Health",
            ),
            Route(
                "GET",
                "/api/v1/audit",
                Role.VIEWER,
                self._audit,
                "The newest audit events, newest last.",
                answer="Audit",
                parameters=AUDIT_PARAMETERS,
            ),
            Route(
                "GET",
                "/api/v1/events",
                Role.VIEWER,
                self._events,
                "Server-sent events.",
                media_type=stream,
                limited=False,
            ),
            Route(
                "POST",
                "/api/v1/trigger",
                Role.OPERATOR,
                self._trigger,
                "Stop trading, now.",
                body=TriggerQuestion,
                answer="Status",
                refusals=frozenset({409}),
            ),
            Route(
                "POST",
                "/api/v1/alertmanager",
                Role.WEBHOOK,
                self._alertmanager,
                "Take alerts from Alertmanager's webhook, version 4.",
                body=WebhookQuestion,
                answer="Taken",
                refusals=frozenset({409}),
            ),
            Route("GET", "/api/v1/recovery", Role.VIEWER, self._recovery, "The recovery under way.", answer="Recovery"),
            Route(
                "POST",
                "/api/v1/recovery",
                Role.RISK,
                self._recover,
                "Ask for a recovery, with its first approval.",
                body=RecoveryQuestion,
                answer="Status",
                refusals=frozenset({409, 429}),
            ),
            Route(
                "DELETE",
                "/api/v1/recovery",
                Role.OPERATOR,
                self._cancel,
                "Take the recovery back.",
                body=CancelQuestion,
                answer="Status",
                refusals=frozenset({409}),
            ),
            Route(
                "POST",
                "/api/v1/recovery/approvals",
                Role.RISK,
                self._approve,
                "Approve the recovery that waits.",
                body=ApprovalQuestion,
                answer="Status",
                refusals=frozenset({409, 429}),
            ),
        )

    # Open to everybody

    def _page_route(self, name: str) -> Route:
        media_type = self._page[name].media_type
        return Route("GET", f"/page/{name}", None, self._page_file(name), "", media_type=media_type, described=False)

    def _page_file(self, name: str) -> Handler:
        file: PageFile = self._page[name]

        async def answer(request: web.Request, caller: Caller) -> web.Response:  # noqa: ARG001
            return web.Response(body=file.body, content_type=file.media_type, charset="utf-8")

        return answer

    async def _access(self, request: web.Request, caller: Caller) -> web.Response:  # noqa: ARG002
        return _json(await access_of(request.app[_DOOR], request))

    async def _openapi(self, request: web.Request, caller: Caller) -> web.Response:  # noqa: ARG002
        # Made when it is first asked for, and kept as text: it is seldom wanted and costs some milliseconds.
        from sidecar.adapters.operations_http.openapi import describe

        if self._description is None:
            described = [route for route in self.table() if route.described]
            self._description = json.dumps(describe(described, HEALTH_PATHS)).encode()
        return web.Response(body=self._description, content_type="application/json")

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
        return await self._streams.serve(request, lambda: request.app[_DOOR].admit(request, Role.VIEWER))

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

    async def _alertmanager(self, request: web.Request, caller: Caller) -> web.Response:
        try:
            asked = await read_question(request, WebhookQuestion, read=read_payload)
        except Problem:
            self._desk.webhook_turned_away("malformed")
            raise
        answer = await self._desk.alertmanager(
            alerts=asked.received(), truncated=bool(asked.truncatedAlerts), trusted=caller.trusted
        )
        return _json(answer)

    async def _reload(self, request: web.Request, caller: Caller) -> web.Response:  # noqa: ARG002
        await self._desk.reload()
        return _json({"reloaded": True})


def application(
    routes: tuple[Route, ...], door: Door, desk: Desk, *, access: WebAccess | None, seconds: float
) -> web.Application:
    """Put the routes behind a door.

    Args:
        routes: what there is.
        door: who may come in.
        desk: asked for its status where an error has to show it.
        access: names further headers of every answer; None has none.
        seconds: how long an answer may take to be made, and again to be sent.
    """

    @web.middleware
    async def guard(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        with _answering(request):
            try:
                door.check(request)
                if request.match_info.http_exception is not None and request.path not in HEALTH_PATHS:
                    await door.admit(request, None)  # what there is not is no business of strangers either
                return await handler(request)
            except ConnectionError:
                raise  # the caller is gone: there is nobody to answer
            except Exception as error:  # noqa: BLE001 - every error becomes a problem document; defects are logged there
                return problem_of(error, desk.status).response()

    turns = Turns()

    async def dress_answer(_request: web.Request, response: web.StreamResponse) -> None:
        dress(response.headers, {} if access is None else access.config.headers)

    app = web.Application(middlewares=[guard], client_max_size=BODY_BYTES)
    app[_DOOR] = door
    app.on_response_prepare.append(dress_answer)
    for route in routes:
        add = app.router.add_get if route.method == "GET" else _adder(app, route.method)
        add(route.path, _endpoint(route, door, desk, seconds, turns))
    return app


def _adder(app: web.Application, method: str) -> Callable[..., web.AbstractRoute]:
    def add(path: str, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.AbstractRoute:
        return app.router.add_route(method, path, handler)

    return add


def _endpoint(
    route: Route, door: Door, desk: Desk, seconds: float, turns: Turns
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def endpoint(request: web.Request) -> web.StreamResponse:
        async with asyncio.timeout(seconds if route.limited else None):
            if route.method == "GET" and route.path not in HEALTH_PATHS:
                await turns.take()
            caller = await _admitted(request, route, door, desk)
            response = await route.handler(request, caller)
        await _send(request, response, seconds)
        return response

    return endpoint


def _answering(request: web.Request) -> AbstractContextManager[None]:
    connection = request.protocol
    return connection.answering() if isinstance(connection, Connection) else nullcontext()


async def _admitted(request: web.Request, route: Route, door: Door, desk: Desk) -> Caller:
    if route.path in HEALTH_PATHS:
        return Caller(trusted=False)
    try:
        return await door.admit(request, route.role)
    except Problem:
        if route.role is Role.WEBHOOK:
            desk.webhook_turned_away("refused")
        raise


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
