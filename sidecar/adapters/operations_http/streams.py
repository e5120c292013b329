"""Server-sent events: every change as it happens, to clients that keep up; the others are let go.

A reader that stops reading must cost neither memory nor anybody's time, so each stream has a short queue and a time
limit on every write.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from aiohttp import web

from sidecar.adapters.operations_http.desk import Desk
from sidecar.adapters.operations_http.problems import Problem

_QUEUED_EVENTS: Final = 256

_Event = tuple[str, Mapping[str, Any]]


class Streams:
    """All event streams that are open.

    Args:
        desk: where events come from.
        limit: how many there may be at once.
        heartbeat: seconds after which a quiet stream gets a comment, so that both ends see that the other lives.
        write_seconds: how long one write may take.
    """

    def __init__(self, desk: Desk, *, limit: int, heartbeat: float, write_seconds: float) -> None:
        self._desk = desk
        self._limit = limit
        self._heartbeat = heartbeat
        self._write_seconds = write_seconds
        self._written: dict[str, tuple[Mapping[str, Any], bytes]] = {}
        self._open: set[asyncio.Task[Any]] = set()
        self._stopping = False

    async def serve(self, request: web.Request, admit: Callable[[], Awaitable[object]]) -> web.StreamResponse:
        """Send every event of the desk, which begins with a status, until either end has enough.

        Args:
            request: the question.
            admit: asked before each event whether the reader may still have it; raises Problem where not, which ends
                the stream: a token that is taken away counts no longer for what was opened with it.
        """
        if self._stopping or len(self._open) >= self._limit:
            raise Problem(503, f"{len(self._open)} event streams are open already; at most {self._limit}")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.force_close()
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        task = asyncio.ensure_future(self._run(request, response, admit))
        self._open.add(task)
        try:
            await asyncio.wait({task})
        finally:
            self._open.discard(task)
            task.cancel()
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
        return response

    def stop(self) -> None:
        """End all streams; their connections close."""
        self._stopping = True
        for task in self._open:
            task.cancel()

    async def _run(
        self, request: web.Request, response: web.StreamResponse, admit: Callable[[], Awaitable[object]]
    ) -> None:
        queue: asyncio.Queue[_Event | None] = asyncio.Queue(_QUEUED_EVENTS)
        pump = asyncio.create_task(_pump(self._desk.subscribe(), queue), name="event stream")
        try:
            while (chunk := await self._next(queue, pump)) is not None:
                await admit()
                await self._write(request, response, chunk)
        except Problem:
            return
        finally:
            pump.cancel()
            with suppress(asyncio.CancelledError):
                await pump

    async def _next(self, queue: asyncio.Queue[_Event | None], pump: asyncio.Task[None]) -> bytes | None:
        try:
            async with asyncio.timeout(self._heartbeat):
                event = await queue.get()
        except TimeoutError:
            return None if pump.done() else b": heartbeat\n\n"
        return None if event is None else self._lines(*event)

    def _lines(self, name: str, content: Mapping[str, Any]) -> bytes:
        # Many streams are told the same thing at the same moment: it is written once.
        known = self._written.get(name)
        if known is None or known[0] is not content:
            known = self._written[name] = (content, f"event: {name}\ndata: {json.dumps(content)}\n\n".encode())
        return known[1]

    async def _write(self, request: web.Request, response: web.StreamResponse, chunk: bytes) -> None:
        try:
            async with asyncio.timeout(self._write_seconds):
                await response.write(chunk)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the reader of an event stream does not read") from None


async def _pump(events: AsyncIterator[_Event], queue: asyncio.Queue[_Event | None]) -> None:
    """Fill the queue; end when it is full, for then the reader is too slow and had better start anew."""
    try:
        async for event in events:
            queue.put_nowait(event)
    except asyncio.QueueFull:
        while not queue.empty():
            queue.get_nowait()
    finally:
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()
        if queue.full():
            queue.get_nowait()
        queue.put_nowait(None)
