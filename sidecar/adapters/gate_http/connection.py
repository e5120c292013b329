"""One connection to the gate: HTTP/1.0 and 1.1 on a C parser, answers in the order of the questions, limits on all.

A `/gate` question is answered as soon as its headers are complete, in the same call that brought its last byte; its
body, if any, is thrown away. Whatever a peer sends, nothing is raised out of here: a request that cannot be read is
refused and its connection closed. Knows the desk's answers as bytes only.
"""

import asyncio
import logging
import math
import re
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from heapq import nsmallest
from time import monotonic
from typing import cast

import httptools

from sidecar.adapters.gate_http.desk import Desk, GateIntent, gate_key
from sidecar.adapters.gate_http.responses import CONTINUE, PROBLEM_JSON, response
from sidecar.core.snapshot import Reason, ReasonCode

_log = logging.getLogger(__name__)

_INTENT_HEADER = b"x-order-intent"
_EXPECT_HEADER = b"expect"
_NEW = int(GateIntent.NEW)
_INTENTS = {b"new": _NEW, b"reduce": int(GateIntent.REDUCE), b"cancel": int(GateIntent.CANCEL)}
_GATE = b"/gate"
_BELOW_GATE = b"/gate/"
_CHECK = b"/v1/orders/check"

# Bytes parsed in one go: 4 KiB hold at most some two hundred pipelined questions, which is under a millisecond.
_SLICE = 4096
_PIECE = 1024
# A question and what a peer may sensibly send behind it are answered at once; more of them take turns.
_AT_ONCE = 2
_END_OF_HEAD = b"\r\n\r\n"
# A body from here on takes long enough to read that it takes turns too.
_LARGE_BODY = 4096
_REQUEST_LINE = re.compile(rb"(?:\r?\n)*([!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}) \S+ HTTP/1\.[01]\r\n")

# Who asked within this time is not silent; and how many of the silent make room at once, for to find them takes time.
_SILENT_SECONDS = 1.0
_ROOM_FOR = 64

_IDLE, _HEAD, _BODY = range(3)
_SILENT = 0  # in place of a status: close without a word, the question was answered before


@dataclass(frozen=True, kw_only=True, slots=True)
class GateLimits:
    """What a peer may use; beyond it the request is refused or the connection closed.

    Attributes:
        head_bytes, headers: size of request line and headers together, and how many headers: 431.
        check_bytes: size of the body of an order check: 413.
        discard_bytes: size of a body that nobody reads, before the connection is closed.
        head_seconds, body_seconds: until a started request's head, then its body, must have come.
        idle_seconds: between requests; above the 60 s after which nginx and most clients' pools give up first.
        connections: open at once. For a further one those make room that have been silent longest; where all have asked
            within the last second, it is closed at once, which its client must take for a denial.
        backlog: connections that the kernel keeps until they are accepted.
    """

    head_bytes: int = 16 * 1024
    headers: int = 100
    check_bytes: int = 256 * 1024
    discard_bytes: int = 1024 * 1024
    head_seconds: float = 5.0
    body_seconds: float = 5.0
    idle_seconds: float = 90.0
    connections: int = 12_000
    backlog: int = 1024


@dataclass(kw_only=True, slots=True)
class Roster:
    """The open connections, and whether they are to end.

    Attributes:
        stopping: True tells every connection to close after its answer.
        refused: how many were closed at once because there were too many.
        on_empty: called when the last one has gone.
    """

    limit: int
    open: set["GateConnection"] = field(default_factory=set)
    stopping: bool = False
    refused: int = 0
    on_empty: Callable[[], None] | None = None
    _work: deque[Callable[[], None]] = field(default_factory=deque)
    _turning: bool = False

    def later(self, loop: asyncio.AbstractEventLoop, work: Callable[[], None]) -> None:
        """Do this piece of work in a later turn of the loop: one piece a turn, of all connections together.

        So a hundred peers who send a thousand questions at once each wait for one another, and a peer with one
        question waits for one piece.
        """
        self._work.append(work)
        if not self._turning:
            self._turning = True
            loop.call_soon(self._turn, loop)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._work.popleft()()
        finally:
            self._turning = bool(self._work)
            if self._turning:
                loop.call_soon(self._turn, loop)

    def enter(self, connection: "GateConnection") -> bool:
        """Take a connection in; False where there is no room."""
        if self.stopping or (len(self.open) >= self.limit and not self._make_room()):
            self.refused += 1
            return False
        self.open.add(connection)
        return True

    def _make_room(self) -> bool:
        """End connections that have been silent longest: a peer that opens them and forgets them shuts nobody out."""
        now = monotonic()
        silent = ((since, id(each), each) for each in self.open if (since := each.silent_since) < now - _SILENT_SECONDS)
        for _, _, connection in nsmallest(_ROOM_FOR, silent):
            connection.expire()
            self.leave(connection)
        return len(self.open) < self.limit

    def leave(self, connection: "GateConnection") -> None:
        """Forget a connection."""
        self.open.discard(connection)
        if not self.open and self.on_empty is not None:
            self.on_empty()


class _RefusedError(Exception):
    """Stops the parser; status and text stand on the connection, because the parser swallows what is raised in it."""


class GateConnection(asyncio.Protocol):
    """Speaks HTTP with one peer.

    Attributes:
        deadline: monotonic seconds after which `expire` is due.
    """

    __slots__ = (
        "_arrived",
        "_asked_key",
        "_backlog",
        "_begun",
        "_body",
        "_body_size",
        "_busy",
        "_close_after",
        "_desk",
        "_ended",
        "_expects",
        "_fault",
        "_head_fed",
        "_headers",
        "_intent",
        "_intent_seen",
        "_known_key",
        "_known_question",
        "_leaving",
        "_limits",
        "_loop",
        "_parser",
        "_peer_slow",
        "_pumping",
        "_queue",
        "_reading",
        "_roster",
        "_stage",
        "_transport",
        "_upgrading",
        "_url",
        "deadline",
    )

    _transport: asyncio.Transport
    _headers: list[tuple[bytes, bytes]]
    _body: bytearray | None
    _body_size: int
    _fault: tuple[int, str] | None
    _leaving: bool
    _busy: bool

    def __init__(self, desk: Desk, limits: GateLimits, roster: Roster, loop: asyncio.AbstractEventLoop) -> None:
        self._desk = desk
        self._limits = limits
        self._roster = roster
        self._loop = loop
        self._arrived = monotonic()
        self.deadline = self._arrived + limits.idle_seconds
        # The request that is being read.
        self._stage = _IDLE
        self._begin()
        # The connection.
        self._queue: deque[Callable[[], None]] = deque()  # answers owed while a list of orders is being decided
        self._backlog = b""  # bytes that came and are not parsed yet
        self._busy = False
        self._pumping = False
        self._peer_slow = False
        self._reading = True
        self._ended = False
        self._leaving = False
        # The question asked last on this connection, if it came whole and alone, and which prepared answer it gets.
        self._known_question = b""
        self._known_key = 0
        self._begun = 0
        self._asked_key: int | None = None
        self._parser = httptools.HttpRequestParser(self)

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection in, or close it at once if there are too many."""
        self._transport = cast(asyncio.Transport, transport)
        if not self._roster.enter(self):
            self._leaving = True
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the loop gives it
        """Forget the connection; whatever was still owed is owed no more."""
        self._leaving = True
        self._queue.clear()
        self._backlog = b""
        self._roster.leave(self)

    def data_received(self, data: bytes) -> None:
        """Parse what came, or keep it while the answer before it is still being worked on."""
        if self._leaving:
            self._discard(len(data))
        elif self._busy or self._backlog or len(data) > _SLICE or data.count(_END_OF_HEAD) > _AT_ONCE:
            self._backlog += data
            self._schedule_pump()
        elif data == self._known_question and self._stage == _IDLE and not self._roster.stopping:
            self._arrived = monotonic()
            self.deadline = self._arrived + self._limits.idle_seconds
            self._answer(self._known_key)
        else:
            self._arrived = monotonic()
            self._begun = 0
            self._asked_key = None
            idle = self._stage == _IDLE
            self._feed(data)
            if idle:
                self._remember(data)

    def _remember(self, data: bytes) -> None:
        """Remember the bytes of one whole `/gate` question: a bot sends the same again, and they mean the same again.

        Between two messages the parser has no memory, so what these bytes ask does not depend on what came before.
        """
        if self._asked_key is None or self._begun != 1 or self._stage != _IDLE or self._is_held():
            return
        self._known_question, self._known_key = data, self._asked_key

    def eof_received(self) -> bool:
        """Keep the half that is still open while an answer is owed on it."""
        self._ended = True
        return self._busy or bool(self._backlog)

    def pause_writing(self) -> None:
        """Read nothing more from a peer that does not read our answers."""
        self._peer_slow = True
        self._regulate()

    def resume_writing(self) -> None:
        """Go on with a peer that reads again."""
        self._peer_slow = False
        self._schedule_pump()

    @property
    def silent_since(self) -> float:
        """Monotonic seconds of the last question; infinite while one is being asked or answered."""
        waits = self._stage == _IDLE and not self._busy and not self._backlog
        return self.deadline - self._limits.idle_seconds if waits else math.inf

    # What the server calls.

    def expire(self) -> None:
        """Close a connection that is past its deadline."""
        self._leaving = True
        self._transport.abort()

    def retire(self) -> None:
        """Close now if nothing is owed; otherwise the answer that is owed will be the last."""
        if self._stage == _IDLE and not self._busy and not self._backlog:
            self._finish()

    # What the parser calls.

    def on_message_begin(self) -> None:
        """Forget the request before."""
        self._begin()
        self._begun += 1
        self._stage = _HEAD
        self.deadline = self._arrived + self._limits.head_seconds

    def on_url(self, url: bytes) -> None:
        """Take the request target, whole or in parts."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note the few headers that matter; trailers after a body never do."""
        if self._stage != _HEAD:
            return
        self._headers.append((name, value))
        length = len(name)
        if length == 14 and name.lower() == _INTENT_HEADER:
            self._note_intent(value)
        elif length == 6 and name.lower() == _EXPECT_HEADER:
            self._expects = True

    def on_headers_complete(self) -> None:
        """Answer, unless the answer depends on the body."""
        if len(self._headers) > self._limits.headers or (
            self._head_fed and self._head_size() > self._limits.head_bytes
        ):
            self._refuse(431, "more or longer headers than the gate reads")
        parser = self._parser
        if parser.should_upgrade():
            self._upgrading = True
            return
        self._stage = _BODY
        self.deadline = self._arrived + self._limits.body_seconds
        close = self._close_after = not parser.should_keep_alive() or self._roster.stopping
        url = self._url
        path = url if url == _GATE else path_of(url)
        if path == _GATE or path.startswith(_BELOW_GATE):
            # A peer that waits for "100 Continue" may send its body or not; without the connection nobody has to guess.
            close = self._close_after = close or self._expects
            key = self._asked_key = gate_key(self._intent, head=parser.get_method() == b"HEAD", close=close)
            if self._busy:
                self._queue.append(partial(self._answer, key))
            else:
                self._answer(key)
        else:
            self._route(path, parser.get_method())

    def on_body(self, chunk: bytes) -> None:
        """Keep the body of an order check, throw any other away, both within limits."""
        self._body_size += len(chunk)
        if self._body is None:
            if self._body_size > self._limits.discard_bytes:
                self._refuse(_SILENT, "")
        elif self._body_size > self._limits.check_bytes:
            self._refuse(413, f"more than {self._limits.check_bytes} bytes; ask in several requests")
        else:
            self._body += chunk

    def on_message_complete(self) -> None:
        """Decide on an order check; close where that was asked for."""
        if self._upgrading:
            return
        self._stage = _IDLE
        self.deadline = self._arrived + self._limits.idle_seconds
        if self._body is not None:
            close = self._close_after or self._roster.stopping
            self._do(partial(self._start_check, bytes(self._body), close))
            self._body = None
        elif self._close_after or self._roster.stopping:
            self._do(self._finish)

    # One request.

    def _begin(self) -> None:
        self._head_fed = 0
        self._url = b""
        self._headers = []
        self._intent = _NEW
        self._intent_seen = False
        self._expects = False
        self._upgrading = False
        self._close_after = False
        self._body = None
        self._body_size = 0
        self._fault = None

    def _note_intent(self, value: bytes) -> None:
        # Repeated, even with the same value, counts as new: which of them a proxy added is anybody's guess.
        self._intent = _NEW if self._intent_seen else _INTENTS.get(value.strip().lower(), _NEW)
        self._intent_seen = True

    def _head_size(self) -> int:
        return len(self._url) + sum(len(name) + len(value) + 4 for name, value in self._headers)

    def _route(self, path: bytes, method: bytes) -> None:
        if path != _CHECK:
            self._reply_problem(404, "the gate knows /gate, /gate/<anything> and POST /v1/orders/check", method)
        elif method != b"POST":
            self._reply_problem(405, "orders are checked with POST", method, (("Allow", "POST"),))
        elif self._announced_size() > self._limits.check_bytes:
            self._refuse(413, f"more than {self._limits.check_bytes} bytes; ask in several requests")
        else:
            self._body = bytearray()
            if self._expects:
                self._do(partial(self._write, CONTINUE))

    def _announced_size(self) -> int:
        # The parser has already refused a length that is repeated or no number.
        return next((int(value) for name, value in self._headers if name.lower() == b"content-length"), 0)

    def _reply_problem(
        self, status: int, detail: str, method: bytes, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        self._close_after = self._close_after or self._expects
        reply = self._problem(status, detail, close=self._close_after, head=method == b"HEAD", headers=headers)
        self._do(partial(self._write, reply))

    def _problem(
        self,
        status: int,
        detail: str,
        *,
        close: bool,
        head: bool = False,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> bytes:
        code = ReasonCode.INTERNAL_ERROR if status == 500 else ReasonCode.BAD_ORDER
        body = self._desk.problem(status, "No decision", Reason(code=code, message=detail, release="the caller"))
        return response(status, body, close=close, head=head, content_type=PROBLEM_JSON, headers=headers)

    def _refuse(self, status: int, detail: str) -> None:
        """Stop the parser; `_give_up` answers."""
        self._fault = (status, detail)
        raise _RefusedError

    # Answers, in order.

    def _do(self, answer: Callable[[], None]) -> None:
        if self._busy:
            self._queue.append(answer)
        else:
            answer()

    def _answer(self, key: int) -> None:
        try:
            reply = self._desk.answer(key)
        except Exception:  # noqa: BLE001 - a question was asked, and the answer to our own failure is no
            _log.exception("gate.answer_failed")
            reply = self._desk.answer_failure(key)
        self._transport.write(reply)
        now = monotonic()
        self._desk.observe(now - self._arrived)
        self._arrived = now  # for the next question of the same bytes

    def _write(self, reply: bytes) -> None:
        self._transport.write(reply)

    def _start_check(self, body: bytes, close: bool) -> None:  # noqa: FBT001 - called through partial only
        job = self._desk.check(body)
        if len(body) > _LARGE_BODY:
            self._postpone(job, close, self._arrived)
        else:
            self._advance(job, close, self._arrived)

    def _advance(self, job: Generator[None, None, tuple[int, bytes]], close: bool, since: float) -> None:  # noqa: FBT001
        """Take one step of deciding a list, and let others have their turn before the next."""
        if self._leaving:
            job.close()
            return
        try:
            next(job)
        except StopIteration as done:
            status, body = done.value
            kind = PROBLEM_JSON if status != 200 else "application/json"
            self._write(response(status, body, close=close, content_type=kind))
            self._desk.observe(monotonic() - since)
            if close:
                self._finish()
            elif self._busy:
                self._free()
            return
        self._postpone(job, close, since)

    def _postpone(self, job: Generator[None, None, tuple[int, bytes]], close: bool, since: float) -> None:  # noqa: FBT001
        self._busy = True
        self.deadline = math.inf
        self._regulate()
        self._roster.later(self._loop, partial(self._advance, job, close, since))

    def _free(self) -> None:
        """Give the answers that waited behind a list, then read on."""
        self._busy = False
        self._arrived = monotonic()
        self.deadline = self._arrived + self._limits.idle_seconds
        while self._queue and not self._is_held():
            self._queue.popleft()()
        if not self._is_held():
            self._schedule_pump()

    def _is_held(self) -> bool:
        return self._busy or self._leaving

    # Bytes.

    def _schedule_pump(self) -> None:
        self._regulate()
        if not self._pumping:
            self._pumping = True
            self._roster.later(self._loop, self._pump)

    def _pump(self) -> None:
        """Parse one slice of what came, and let others have their turn before the next."""
        self._pumping = False
        if self._busy or self._peer_slow or self._leaving:
            return
        if self._backlog:
            part, self._backlog = self._backlog[:_PIECE], self._backlog[_PIECE:]
            self._arrived = monotonic()
            self._feed(part)
        if self._is_held():
            return
        if self._backlog:
            self._schedule_pump()
        elif self._ended or (self._roster.stopping and self._stage == _IDLE):
            self._finish()
        else:
            self._regulate()

    def _regulate(self) -> None:
        """Read from the peer only while what came is parsed and what was answered is read."""
        wanted = not (self._busy or self._peer_slow or self._backlog)
        if wanted == self._reading or self._transport.is_closing():
            return
        self._reading = wanted
        if wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _feed(self, data: bytes) -> None:
        fresh = self._stage == _IDLE
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            if not (fresh and self._fault is None and self._feed_with_known_method(data)):
                self._give_up(error)
        else:
            self._limit_head(len(data))

    def _limit_head(self, size: int) -> None:
        """Refuse a head that goes on and on; the parser shows a header only when it is complete."""
        if self._stage != _HEAD:
            return
        # Counts what came before the head in the same bytes too, which is why one slice more is allowed here; a head
        # that is complete at last is measured exactly.
        self._head_fed += size
        if self._head_fed > self._limits.head_bytes + _SLICE:
            self._fault = (431, "more or longer headers than the gate reads")
            self._give_up(None)

    def _feed_with_known_method(self, data: bytes) -> bool:
        """Read a request whose method the parser does not know as if it were POST; the method decides nothing here."""
        line = _REQUEST_LINE.match(data)
        if line is None or self._leaving or _is_known_method(line[1]):
            return False
        self._parser = httptools.HttpRequestParser(self)
        self._stage = _IDLE
        path = path_of(data[line.end(1) + 1 : line.end()].split(b" ", 1)[0])
        method = b"PUT" if path == _CHECK else b"POST"  # so that the one path that wants POST still answers 405
        self._feed(method + data[line.end(1) :])
        return True

    def _go_on_without_upgrade(self, rest: bytes) -> None:
        """Read a request again without its wish to change the protocol: the parser would not read its body."""
        connect = self._parser.get_method() == b"CONNECT"
        close = connect or not self._parser.should_keep_alive()
        kept = [(name, value) for name, value in self._headers if name.lower() not in {b"upgrade", b"connection"}]
        kept.append((b"Connection", b"close" if close else b"keep-alive"))
        method = b"PUT" if connect else self._parser.get_method()
        target = self._url if self._url.startswith((b"/", b"http")) else b"*"
        lines = [method + b" " + target + b" HTTP/1.1", *(name + b": " + value for name, value in kept)]
        self._parser = httptools.HttpRequestParser(self)
        self._stage = _IDLE
        self._feed(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    # The end.

    def _give_up(self, error: Exception | None) -> None:
        """Refuse a request that cannot be read, and close: where the next one starts is not known."""
        if self._leaving:
            return
        answered = self._stage == _BODY and self._body is None and self._fault is None
        status, detail = self._fault or (400, f"this is not HTTP as the gate reads it: {error}")
        if isinstance(error, httptools.HttpParserCallbackError) and self._fault is None:
            _log.error("gate.request_failed", exc_info=error)
            status, detail = 500, "the gate failed while reading the request; see the sidecar's log"
        self._stage = _IDLE
        self._backlog = b""
        if status == _SILENT:
            self._do(self._finish)
            return
        if not answered:
            self._do(partial(self._write, self._problem(status, detail, close=True)))
        self._do(self._linger)

    def _finish(self) -> None:
        """Close after what was written has gone out."""
        self._leaving = True
        self._transport.close()

    def _linger(self) -> None:
        """Close, but first let the peer finish sending for a while: a reset would take our answer from its hands."""
        if self._leaving:
            return
        self._leaving = True
        self._backlog = b""
        self._body_size = 0
        self._regulate()
        self.deadline = monotonic() + self._limits.body_seconds
        if self._transport.can_write_eof() and not self._ended:
            self._transport.write_eof()
        else:
            self._transport.close()

    def _discard(self, size: int) -> None:
        self._body_size += size
        if self._body_size > self._limits.discard_bytes:
            self._transport.abort()


def path_of(target: bytes) -> bytes:
    """The path of a request target, `/path?query` or `http://host/path?query`."""
    path = target.partition(b"?")[0].partition(b"#")[0]
    if path.startswith(b"/"):
        return path
    authority = path.partition(b"://")[2]
    slash = authority.find(b"/")
    return authority[slash:] if slash >= 0 else b"/"


def _is_known_method(method: bytes) -> bool:
    """Whether the parser reads a plain request with this method; PRI it only takes as the start of HTTP/2."""
    if method == b"PRI":
        return False
    try:
        httptools.HttpRequestParser(object()).feed_data(method + b" / HTTP/1.1\r\n\r\n")
    except httptools.HttpParserUpgrade:
        return True
    except httptools.HttpParserError:
        return False
    return True
