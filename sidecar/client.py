"""Ask the kill switch before each order: `ExecutionGate`, for trading code.

One self-contained file that may be copied into any project (Python 3.11+, standard library only). It must not import
anything else of the sidecar and it decides nothing that the sidecar has decided: whatever is not a fresh, whole and
well-formed "allow" is a denial. Only two things are settled here: cancels pass without a question, and an order is
checked against a state page, or a dead sidecar, by the same exact decimal arithmetic that the sidecar uses.

    gate = ExecutionGate(page="/run/killswitch/state.page")
    with gate:
        venue.send(order)

Ways to ask, their costs and what each can decide stand in docs/CLIENT.md.
"""

from __future__ import annotations

import asyncio
import decimal
import errno
import http.client
import io
import json
import mmap
import operator
import os
import re
import socket as sockets
import stat
import struct
import time
import urllib.parse
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from ipaddress import ip_address
from typing import Any, Final, Literal, NoReturn, ParamSpec, Protocol, Self, TypeVar

__all__ = ["ExecutionGate", "GateDecision", "TradingBlockedError"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

REASON_CODES: Final = frozenset(
    {
        "active", "disabled", "shadow", "cancel", "reducing", "killed", "recovering", "halted", "reduce_only",
        "over_limit", "blind_order", "not_ready", "stale", "bad_order", "internal_error",
    }
)  # fmt: skip
_LONGEST_TIMEOUT: Final = 60.0
# The reasons with which a sidecar allows what is asked here. `cancel` is none of them: nobody asks about cancels, so
# an answer about one answers a question that something on the way has changed.
_ALLOWING: Final = frozenset({"active", "disabled", "shadow", "reducing"})
# The sidecar lives and denies because it cannot vouch for what it knows: the factor beside such an answer is no factor.
_NOT_VOUCHED_FOR: Final = frozenset({"not_ready", "stale", "internal_error"})


@dataclass(frozen=True, kw_only=True, slots=True)
class GateDecision:
    """One answer about one order, from the sidecar or, where that is said, from this client.

    Attributes:
        allowed: whether the order may go out.
        code: one of the closed set of reason codes, `REASON_CODES`.
        message: the reason for a person.
        answered: False when no sidecar stood behind it: dead, unreachable, or a page that is stale.
        state: ACTIVE, KILLED, RECOVERING, DISABLED; None where unknown.
        restriction: none, reduce_only, halt; None where unknown.
        factor: position limit factor, 0.0 to 1.0; 0.0 where unknown.
        switch: name of the switch; None where unknown (a page carries none).
        decision_id: to find the decision in the sidecar's records; None for local decisions.
        max_quantity: what quantity would have passed, for `over_limit`; else mostly None.
        trigger, value, limit, since, release: why, and who can release, as the sidecar said it; None where it did not.
        epoch: the switch's count of durable changes; None where unknown.
    """

    allowed: bool
    code: str
    message: str
    answered: bool = True
    state: str | None = None
    restriction: str | None = None
    factor: float = 0.0
    switch: str | None = None
    decision_id: str | None = None
    max_quantity: Decimal | None = None
    trigger: str | None = None
    value: object = None
    limit: object = None
    since: object = None
    release: str | None = None
    epoch: int | None = None


class TradingBlockedError(Exception):
    """The order may not go out. `decision` holds the whole `GateDecision`; the text of the error is for people."""

    def __init__(self, decision: GateDecision) -> None:
        super().__init__(decision)
        self.decision = decision

    def __str__(self) -> str:
        said = self.decision
        known = [
            ("switch", said.switch), ("state", said.state), ("restriction", said.restriction), ("factor", said.factor),
            ("trigger", said.trigger), ("max_quantity", said.max_quantity), ("since", said.since),
            ("release", said.release), ("decision", said.decision_id),
        ]  # fmt: skip
        details = ", ".join(f"{name} {value}" for name, value in known if value is not None)
        return f"trading is blocked ({said.code}): {said.message} [{details}]"


class _NoAnswerError(Exception):
    """No fresh, whole answer of a sidecar could be had: it is dead, hangs, or is out of reach."""


class _BadAnswerError(Exception):
    """Something answered, but not as our sidecar does; who knows what it is."""


class _BadOrderError(Exception):
    """The order cannot be understood, so nothing can be said for it."""


class ExecutionGate:
    """Says whether an order may go out. Thread-safe; usable in a forked child as it is.

    Exactly one source must be given:

        page: path of the state page; reads 64 bytes of shared memory.
        socket: path of the gate's Unix socket.
        url: the gate's address as `http://127.0.0.1:9780`; an IP address or localhost, for the time that a name
            look-up takes cannot be limited.
        kill_switch: a `sidecar.KillSwitch` in this process.

    Args:
        timeout: seconds from the question to the whole answer, above 0 to 60; later is a denial. For `page` it can only
            shorten the 5 ms for which a page in mid-write is read again.
        expect_switch: deny unless the answer is of the switch with this name; not for `page`, which carries no name.
        on_stale: `halt` denies all but cancels when the sidecar is dead or out of reach; `reduce_only` then lets orders
            pass that truly reduce the position they give. An answer that denies is never overruled.

    An order is a mapping as `POST /v1/orders/check` takes: `intent`, `symbol`, `side`, `quantity`, `position`,
    `open_quantity`, `position_limit`, `reduce_only`; numbers are int, Decimal, decimal strings or float.

    Raises:
        ValueError: an argument is missing, out of range or does not fit the others.
        TypeError: `kill_switch` is no switch.
    """

    def __init__(
        self,
        *,
        page: str | os.PathLike[str] | None = None,
        socket: str | os.PathLike[str] | None = None,
        url: str | None = None,
        kill_switch: object | None = None,
        timeout: float = 0.1,
        expect_switch: str | None = None,
        on_stale: Literal["halt", "reduce_only"] = "halt",
    ) -> None:
        given = {"page": page, "socket": socket, "url": url, "kill_switch": kill_switch}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise ValueError(f"got {named or 'no source'}; give exactly one of page, socket, url and kill_switch")
        if isinstance(timeout, bool) or not 0 < timeout <= _LONGEST_TIMEOUT:
            raise ValueError(f"timeout is {timeout!r}; wanted seconds above 0, at most {_LONGEST_TIMEOUT:g}")
        if on_stale not in ("halt", "reduce_only"):
            raise ValueError(f"on_stale is {on_stale!r}; wanted 'halt' or 'reduce_only'")
        if page is not None and expect_switch is not None:
            raise ValueError("expect_switch does not go with page: a page carries no name; use socket or url")
        self._timeout = float(timeout)
        self._reduce_when_dead = on_stale == "reduce_only"
        self._closed = False
        self._page: _PageReader | None = None
        if page is not None:
            self._page = _PageReader(os.fspath(page), patience=min(self._timeout, _PAGE_PATIENCE))
            self._source: _Source = self._page
        elif kill_switch is not None:
            self._source = _InProcess(kill_switch, expect_switch)
        else:
            self._source = _HttpSource(_Endpoint.of(socket=socket, url=url), expect_switch)

    def check_can_execute(self, order: Mapping[str, Any] | None = None) -> Literal[True]:
        """Return True if the order may go out.

        Args:
            order: None asks as `/gate` does, of unknown size; from a page that passes only at factor 1. A cancel passes
                without a question, always.

        Raises:
            TradingBlockedError: it may not, or nobody could say so in time.
        """
        # The one question that a bot asks a million times: an unchanged page costs a copy, a compare and a clock.
        if order is None and self._page is not None and self._page.unchanged_and_free():
            return True
        return _passed(self._decide(order, time.monotonic() + self._timeout))

    async def check_can_execute_async(self, order: Mapping[str, Any] | None = None) -> Literal[True]:
        """Do as `check_can_execute`, without holding up the event loop.

        A page and an in-process switch are read at once; questions over a socket wait in a thread.

        Raises:
            TradingBlockedError: it may not, or nobody could say so in time.
        """
        if not self._source.waits or _is_cancel(order):
            return self.check_can_execute(order)
        asking = asyncio.to_thread(self._decide, order, time.monotonic() + self._timeout)
        try:
            # The thread keeps the deadline itself; this one is for an executor that has no thread left.
            decision = await asyncio.wait_for(asking, self._timeout + _LOOP_GRACE)
        except TimeoutError:
            decision = self._unanswered(order, f"no thread of the event loop's executor within {self._timeout} s")
        return _passed(decision)

    def is_blocked(self) -> bool:
        """Return whether an order of unknown size would be denied now; over HTTP it counts as an order's question."""
        return not self._decide(None, time.monotonic() + self._timeout).allowed

    def get_block_reason(self) -> str | None:
        """Return why an order of unknown size would be denied now, for a person; None if it would pass."""
        decision = self._decide(None, time.monotonic() + self._timeout)
        return None if decision.allowed else str(TradingBlockedError(decision))

    def execute_with_gate(self, func: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call `func` if an order of unknown size may go out, and return what it returns.

        Raises:
            TradingBlockedError: it may not; `func` was not called.
        """
        self.check_can_execute()
        return func(*args, **kwargs)

    @property
    def position_limit_factor(self) -> float:
        """The factor for position limits now, 0.0 to 1.0; 0.0 under `halt` and whenever it is not surely known.

        Over HTTP it is asked with intent `reduce`, which does not count as an order's question.
        """
        try:
            if self._closed:
                return 0.0
            decision = self._source.standing(time.monotonic() + self._timeout)
        except Exception:  # noqa: BLE001 - whatever breaks here must shrink positions, not the caller
            return 0.0
        if decision.restriction in (None, "halt") or decision.code in _NOT_VOUCHED_FOR:
            return 0.0
        return decision.factor

    def close(self) -> None:
        """Let go of connections and of the page; from then on all but cancels is denied. A second call does nothing."""
        self._closed = True
        self._source.close()

    def __enter__(self) -> Self:
        """Pass if an order of unknown size may go out; leaving the block does not close the gate."""
        self.check_can_execute()
        return self

    def __exit__(self, *_: object) -> None:
        return None

    async def __aenter__(self) -> Self:
        """Pass if an order of unknown size may go out, without holding up the event loop."""
        await self.check_can_execute_async()
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    def _decide(self, order: object, deadline: float) -> GateDecision:
        try:
            if _is_cancel(order):
                return _CANCEL_PASSES
            if self._closed:
                return _refusal("internal_error", "this gate was closed; make a new ExecutionGate")
            if order is not None and not isinstance(order, Mapping):
                return _refusal("bad_order", f"an order is {type(order).__name__}; wanted one mapping, or None")
            return self._source.decide(order, deadline)
        except _NoAnswerError as error:
            return self._unanswered(order, str(error))
        except _BadAnswerError as error:
            return _refusal("internal_error", str(error))
        except _BadOrderError as error:
            return _refusal("bad_order", str(error))
        except Exception as error:  # noqa: BLE001 - an error of ours, or of a foreign mapping, must deny and not surprise
            return _refusal("internal_error", f"the client failed: {error!r}")

    def _unanswered(self, order: object, why: str) -> GateDecision:
        if self._reduce_when_dead and isinstance(order, Mapping):
            try:
                if _Order.of(order).truly_reduces():
                    passed = f"the sidecar does not answer ({why}); the order truly reduces the position"
                    return GateDecision(allowed=True, code="reducing", message=passed, answered=False)
            except _BadOrderError as error:
                why = f"{why}; and the order: {error}"
        return _refusal("stale", why, answered=False)


_CANCEL_PASSES: Final = GateDecision(allowed=True, code="cancel", message="cancels always pass")


def _passed(decision: GateDecision) -> Literal[True]:
    if not decision.allowed:
        raise TradingBlockedError(decision)
    return True


def _refusal(code: str, message: str, *, answered: bool = True) -> GateDecision:
    return GateDecision(allowed=False, code=code, message=message, answered=answered)


def _is_cancel(order: object) -> bool:
    return isinstance(order, Mapping) and order.get("intent") == "cancel"


class _Source(Protocol):
    """Where decisions come from."""

    waits: bool
    """Whether a question may block the calling thread for longer than an event loop can afford."""

    def decide(self, order: Mapping[str, Any] | None, deadline: float) -> GateDecision:
        """Decide about an order by `deadline` (of time.monotonic)."""

    def standing(self, deadline: float) -> GateDecision:
        """Say how the switch stands, without counting as an order's question."""

    def close(self) -> None:
        """Let go of what is open."""


# Bounds that no market needs and that keep the arithmetic below exact.
_MOST_DIGITS: Final = 40
_LARGEST_EXPONENT: Final = 30
_LONGEST_SYMBOL: Final = 64
_DECIMAL_TEXT: Final = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?", re.ASCII)
_KEYS: Final = frozenset(
    {"intent", "symbol", "side", "quantity", "position", "open_quantity", "position_limit", "reduce_only"}
)
_SIGN_OF_SIDE: Final = {"buy": 1, "sell": -1}
_ZERO: Final = Decimal(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Order:
    """A new or replacing order, all numbers exact; `position` and `limit` are None where they were not given."""

    sign: int
    quantity: Decimal
    open_quantity: Decimal
    position: Decimal | None
    limit: Decimal | None

    @classmethod
    def of(cls, order: Mapping[str, Any]) -> Self:
        """Read a mapping as strictly as the sidecar does; absent intent means `new`.

        Raises:
            _BadOrderError: a value is missing, of another kind, or out of range.
        """
        _refuse_strange_words(order)
        side = order.get("side")
        if not isinstance(side, str) or side not in _SIGN_OF_SIDE:
            raise _BadOrderError(f"side is {side!r:.80}; wanted 'buy' or 'sell'")
        quantity = _number(order, "quantity")
        if quantity is None or quantity <= _ZERO:
            raise _BadOrderError(f"quantity is {order.get('quantity')!r}; wanted a number above 0")
        open_quantity = _number(order, "open_quantity")
        if open_quantity is None and "open_quantity" in order:
            # Who does not know what is working must not be told that all of it fits.
            raise _BadOrderError("open_quantity is None; leave it out for 0, or count the working orders of this side")
        limit = _number(order, "position_limit")
        for name, value in (("open_quantity", open_quantity), ("position_limit", limit)):
            if value is not None and value < _ZERO:
                raise _BadOrderError(f"{name} is {order.get(name)!r}; wanted a number of 0 or more")
        return cls(
            sign=_SIGN_OF_SIDE[side],
            quantity=quantity,
            open_quantity=_ZERO if open_quantity is None else open_quantity,
            position=_number(order, "position"),
            limit=limit,
        )

    def truly_reduces(self) -> bool:
        """Return whether |position| becomes smaller, and the sign stays, with all that is open filled as well."""
        if self.position is None or not self.position or (self.position > _ZERO) is (self.sign > 0):
            return False
        return _exact().add(self.quantity, self.open_quantity) <= self.position.copy_abs()

    def room(self, cap: Decimal) -> Decimal:
        """Return the largest quantity that this order could have with |position| after it at most `cap`."""
        exact = _exact()
        along = self.position_along_the_side()
        return max(_ZERO, exact.subtract(exact.subtract(cap, along), self.open_quantity))

    def after(self) -> Decimal:
        """Return |position| with this order and all that is open filled."""
        exact = _exact()
        filled = exact.add(self.quantity, self.open_quantity)
        return exact.add(self.position_along_the_side(), filled).copy_abs()

    def position_along_the_side(self) -> Decimal:
        """Return the position, above 0 where this order would grow it."""
        if self.position is None:
            raise _BadOrderError("position is missing; wanted the signed position before the order")
        return self.position if self.sign > 0 else self.position.copy_negate()


def _refuse_strange_words(order: Mapping[str, Any]) -> None:
    strange = [key for key in order if key not in _KEYS]
    if strange:
        # A misspelt position_limit that is ignored would be an order without a limit.
        raise _BadOrderError(f"{strange[0]!r:.80} is no key of an order; known are {', '.join(sorted(_KEYS))}")
    intent = order.get("intent")
    if intent is not None and intent not in ("new", "replace"):
        raise _BadOrderError(f"intent is {intent!r:.80}; wanted 'new', 'replace' or 'cancel'")
    symbol = order.get("symbol")
    if symbol is not None and not (isinstance(symbol, str) and len(symbol) <= _LONGEST_SYMBOL):
        raise _BadOrderError(f"symbol is {symbol!r:.80}; wanted a text of at most {_LONGEST_SYMBOL} characters")
    claim = order.get("reduce_only")
    if claim is not None and not isinstance(claim, bool):
        raise _BadOrderError(f"reduce_only is {claim!r:.80}; wanted True or False")


def _exact() -> decimal.Context:
    # Made anew: contexts are not to be shared by threads, and the trading code may have bent its own. Bounded numbers
    # never need 500 digits; if they did, Inexact would raise and the order be denied.
    return decimal.Context(prec=500, traps=[decimal.InvalidOperation, decimal.Inexact, decimal.Overflow])


def _number(order: Mapping[str, Any], name: str) -> Decimal | None:
    given = order.get(name)
    if given is None:
        return None
    value = _decimal(given)
    if value is None:
        wanted = f"a finite number (int, Decimal, decimal text or float) of at most {_MOST_DIGITS} digits"
        raise _BadOrderError(f"{name} is {given!r:.80}; wanted {wanted}")
    return value


def _decimal(given: object) -> Decimal | None:
    """Return the number exactly as written (a float as its shortest text), None for what is none."""
    if isinstance(given, bool):
        return None
    if isinstance(given, Decimal):
        value = given
    elif isinstance(given, float):
        value = Decimal(float.__repr__(given))
    elif isinstance(given, str):
        if len(given) > 2 * _MOST_DIGITS or not _DECIMAL_TEXT.fullmatch(given):
            return None
        value = Decimal(given)
    else:
        whole = _whole(given)
        if whole is None:
            return None
        value = Decimal(whole)
    return value if _is_bounded(value) else None


def _whole(given: object) -> int | None:
    try:
        whole = operator.index(given)  # type: ignore[arg-type]  # that is the question; numpy's integers answer it
    except TypeError:
        return None
    return whole if whole.bit_length() <= 256 else None


def _is_bounded(value: Decimal) -> bool:
    if not value.is_finite():
        return False
    _, digits, exponent = value.as_tuple()
    small = isinstance(exponent, int) and exponent >= -_LARGEST_EXPONENT and value.adjusted() <= _LARGEST_EXPONENT
    return small and len(digits) <= _MOST_DIGITS


_STATES: Final = ("ACTIVE", "KILLED", "RECOVERING", "DISABLED")
_RESTRICTIONS: Final = ("none", "reduce_only", "halt")
_STOPPED: Final = {"KILLED": "killed", "RECOVERING": "recovering"}
_BLOCKED_AS: Final = {
    "killed": "the switch is KILLED",
    "recovering": "the switch is RECOVERING and still blocks",
    "halted": "the switch is halted by a rule, is not ready, or its evaluator stands still; ask the gate for which",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Standing:
    """How the switch stands, from a page."""

    state: str
    restriction: str
    factor: float
    epoch: int

    def decide(self, mapping: Mapping[str, Any] | None) -> GateDecision:
        """Apply the rules, in their order: halt, reduce only, reducing, limit."""
        if self.restriction == "halt":
            code = _STOPPED.get(self.state, "halted")
            return self._says(code, _BLOCKED_AS[code])
        if mapping is None:
            return self._decide_blind()
        order = _Order.of(mapping)
        return self._says_yes() if self._is_disabled() else self._decide_order(order)

    def _is_disabled(self) -> bool:
        return self.state == "DISABLED" and self.restriction == "none"

    def _decide_blind(self) -> GateDecision:
        if self.restriction != "none":
            return self._says_reduce_only("the question named no order")
        if self.factor <= 0.0:
            return self._says("over_limit", "the position limit factor is 0: no limit leaves room for an order")
        if self.factor < 1.0:
            # The page does not say whether the gate lets orders of unknown size pass meanwhile, so here they do not.
            return self._says(
                "blind_order",
                f"the position limit factor is {self.factor:g}; check each order with its quantity, position and limit",
            )
        return self._says_yes()

    def _decide_order(self, order: _Order) -> GateDecision:
        if order.truly_reduces():
            return self._says("reducing", "the order truly reduces the position", allowed=True)
        if self.restriction != "none":
            if order.position is None:
                return self._says_reduce_only("the order does not give its position")
            return self._says_reduce_only("this one does not, or would flip the position with what is open")
        if order.limit is None:
            if self.factor >= 1.0:
                return self._says_yes()
            message = f"position_limit is missing; with factor {self.factor} a page alone cannot tell what may pass"
            return self._says("bad_order", message)
        return self._decide_limited(order, order.limit)

    def _decide_limited(self, order: _Order, limit: Decimal) -> GateDecision:
        cap = _exact().multiply(Decimal(repr(self.factor)), limit)
        after = order.after()
        if after <= cap:
            return self._says_yes()
        message = f"the position would be {after}, above {cap} = factor {self.factor} x limit {limit}"
        reducible = _ZERO
        if order.position_along_the_side() < _ZERO:
            reducible = max(_ZERO, -_exact().add(order.position_along_the_side(), order.open_quantity))
        return self._says("over_limit", message, max_quantity=max(order.room(cap), reducible), limit=cap)

    def _says_reduce_only(self, but: str) -> GateDecision:
        code = _STOPPED.get(self.state, "reduce_only")
        return self._says(code, f"only orders that truly reduce the position they give pass; {but}")

    def _says_yes(self) -> GateDecision:
        if self.state == "DISABLED":
            return self._says("disabled", "the kill switch is disabled", allowed=True)
        if self.state in _STOPPED:
            return self._says(
                "shadow", f"the switch is {self.state} in shadow mode, where that blocks none", allowed=True
            )
        return self._says("active", "trading is allowed", allowed=True)

    def _says(
        self,
        code: str,
        message: str,
        *,
        allowed: bool = False,
        max_quantity: Decimal | None = None,
        limit: Decimal | None = None,
    ) -> GateDecision:
        return GateDecision(
            allowed=allowed,
            code=code,
            message=message,
            state=self.state,
            restriction=self.restriction,
            factor=self.factor,
            epoch=self.epoch,
            max_quantity=max_quantity,
            limit=limit,
        )


_PAGE_SIZE: Final = 64
_PAGE_MAGIC: Final = b"KSWPAGE1"
# Magic, sequence, heartbeat, state, restriction, factor, epoch, lease, CRC-32 of bytes 0-55, zero.
_PAGE: Final = struct.Struct("<8sQQIIdQQII")
_CRC_COVERS: Final = 56
# A write takes microseconds, but its process may lose the CPU in the middle of it.
_PAGE_PATIENCE: Final = 0.005
_NEVER: Final = (b"", 0, -1, False)


class _PageReader:
    """Reads a state page; takes no lock, so that neither threads nor a fork can leave one held."""

    waits = False

    def __init__(self, path: str, *, patience: float) -> None:
        self._path = path
        self._patience = patience
        self._closed = False
        self._map: mmap.mmap | None = None
        self._file: tuple[int, int] | None = None
        # The last copy that passed all tests, with what the quick look needs of it: heartbeat, lease, free.
        # One tuple, replaced as a whole: threads see the old or the new one, never parts of both.
        self._seen: tuple[bytes, int, int, bool] = _NEVER
        self._given_up_on = b""

    def unchanged_and_free(self) -> bool:
        """Return True if all 64 bytes are those of the last validated copy, which allowed an order, and still fresh.

        Equal bytes have an equal CRC, so nothing needs to be validated again. False only means: look properly.
        """
        page = self._map
        if page is None:
            return False
        seen, heartbeat, lease, free = self._seen
        try:
            return page[:] == seen and 0 <= time.monotonic_ns() - heartbeat <= lease and free
        except ValueError:  # closed by another thread meanwhile
            return False

    def decide(self, order: Mapping[str, Any] | None, deadline: float) -> GateDecision:
        """Decide from the page and the order's own numbers."""
        return self._read(deadline).decide(order)

    def standing(self, deadline: float) -> GateDecision:
        """Say how the switch stands."""
        return self._read(deadline).decide(None)

    def close(self) -> None:
        """Let go of the mapping."""
        self._closed = True
        self._seen = _NEVER
        page, self._map = self._map, None
        if page is not None:
            page.close()

    def _read(self, deadline: float) -> _Standing:
        if self._map is None:
            self._open()
        try:
            return self._read_mapped(deadline)
        except _NoAnswerError:
            # Writers never replace the file; but a volume may have been made anew under a bot that lived on.
            if not self._was_replaced():
                raise
            self._open()
            return self._read_mapped(deadline)

    def _open(self) -> None:
        if self._closed:
            raise _BadAnswerError("this gate was closed; make a new ExecutionGate")
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode) or found.st_size < _PAGE_SIZE:
                    kind = f"{found.st_size} bytes, mode {found.st_mode:o}"
                    raise _NoAnswerError(f"{self._path} is no state page: {kind}")
                fresh = mmap.mmap(fd, _PAGE_SIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            finally:
                os.close(fd)
        except OSError as error:
            raise _NoAnswerError(f"no state page at {self._path}: {error.strerror}; is the sidecar running?") from error
        # The old mapping goes when the last thread that still copies from it is done.
        self._map, self._file = fresh, (found.st_dev, found.st_ino)
        self._let_go_if_closed()

    def _let_go_if_closed(self) -> None:
        # Asked again after a new mapping is in place: a thread that closed the gate meanwhile cannot have seen it.
        if self._closed:
            self._map = None

    def _was_replaced(self) -> bool:
        try:
            found = os.stat(self._path)  # noqa: PTH116 - on the way of a denied order; Path costs as much as the call
        except OSError:
            return False
        return (found.st_dev, found.st_ino) != self._file

    def _read_mapped(self, deadline: float) -> _Standing:
        copy, now = self._whole_copy(deadline)
        _, _, heartbeat, state, restriction, factor, epoch, lease, _, _ = _PAGE.unpack(copy)
        age = now - heartbeat
        # 0 is a sidecar that stopped, even where the machine has not been up for as long as a lease.
        if heartbeat == 0 or not 0 <= age <= lease:
            how = "0: the sidecar stopped or just started" if heartbeat == 0 else f"{age / 1e6:.1f} ms old"
            raise _NoAnswerError(f"the heartbeat in {self._path} is {how}; the lease is {lease / 1e6:.1f} ms")
        standing = _standing(state=state, restriction=restriction, factor=factor, epoch=epoch)
        # Exactly what `decide` lets pass without an order; anything more would answer the second check otherwise.
        free = standing.restriction == "none" and standing.factor >= 1.0
        self._seen = (copy, heartbeat, lease, free)
        return standing

    def _whole_copy(self, deadline: float) -> tuple[bytes, int]:
        """Return a copy that is no half-written page, and the clock after it."""
        until = min(time.monotonic() + self._patience, deadline)
        tries = 0
        while True:
            copy = self._copy()
            now = time.monotonic_ns()
            if _is_whole(copy):
                return copy, now
            tries += 1
            # A page that stayed the same through a whole wait belongs to a dead writer: do not wait for it again.
            if copy == self._given_up_on or time.monotonic() >= until:
                self._given_up_on = copy
                raise _NoAnswerError(f"{self._path} is damaged or was left half-written")
            time.sleep(0 if tries < 20 else 0.0001)

    def _copy(self) -> bytes:
        page = self._map
        if page is None:
            raise _BadAnswerError("this gate was closed; make a new ExecutionGate")
        try:
            return page[:]
        except ValueError as error:
            raise _BadAnswerError("this gate was closed; make a new ExecutionGate") from error


def _is_whole(copy: bytes) -> bool:
    magic, sequence, _, _, _, _, _, _, crc, zero = _PAGE.unpack(copy)
    return magic == _PAGE_MAGIC and not sequence & 1 and zero == 0 and crc == zlib.crc32(copy[:_CRC_COVERS])


def _standing(*, state: int, restriction: int, factor: float, epoch: int) -> _Standing:
    if state >= len(_STATES) or restriction >= len(_RESTRICTIONS) or not 0.0 <= factor <= 1.0:
        raise _BadAnswerError(f"the page says state {state}, restriction {restriction}, factor {factor}: unknown to us")
    return _Standing(state=_STATES[state], restriction=_RESTRICTIONS[restriction], factor=factor, epoch=epoch)


_MOST_ANSWER_BYTES: Final = 65536
_MOST_IDLE: Final = 32
_LOOP_GRACE: Final = 0.05
_DEFAULT_PORT: Final = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class _Endpoint:
    """Where the gate listens: `address` is a path for AF_UNIX, else (host, port)."""

    family: int
    address: str | tuple[str, int]
    host: str
    prefix: str
    shown: str

    @classmethod
    def of(cls, *, socket: str | os.PathLike[str] | None, url: str | None) -> Self:
        """Read one of a socket path and a URL.

        Raises:
            ValueError: the URL is none that can be asked.
        """
        if socket is not None:
            path = os.fspath(socket)
            return cls(family=sockets.AF_UNIX, address=path, host="localhost", prefix="", shown=path)
        wanted = "wanted http://127.0.0.1:9780: http, an IP address or localhost, a port and perhaps a path"
        parts = urllib.parse.urlsplit(str(url))
        if parts.scheme != "http" or parts.query or parts.fragment or "@" in parts.netloc or not parts.hostname:
            raise ValueError(f"url is {url!r}; {wanted}")
        if not re.fullmatch(r"[!-~]*", parts.path, re.ASCII):
            raise ValueError(f"url is {url!r}: its path needs percent-encoding; {wanted}")
        try:
            ip = ip_address("127.0.0.1" if parts.hostname == "localhost" else parts.hostname)
            port = _DEFAULT_PORT if parts.port is None else parts.port
        except ValueError as error:
            raise ValueError(f"url is {url!r} ({error}); {wanted}; the time of a name look-up has no limit") from error
        return cls(
            family=sockets.AF_INET if ip.version == 4 else sockets.AF_INET6,
            address=(str(ip), port),
            host=parts.netloc,
            prefix=parts.path.rstrip("/"),
            shown=str(url),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes


class _HttpSource:
    """Asks the gate over HTTP/1.1 with kept connections, each question under one deadline."""

    waits = True

    def __init__(self, endpoint: _Endpoint, expect_switch: str | None) -> None:
        self._endpoint = endpoint
        self._expect_switch = expect_switch
        self._closed = False
        # Threads take from and give back to the right; both are atomic.
        self._idle: deque[_Link] = deque()

    def decide(self, order: Mapping[str, Any] | None, deadline: float) -> GateDecision:
        """Ask about an order, or as `/gate` does."""
        if order is None:
            answer = self._ask(_request(self._endpoint, "GET", "/gate"), "GET", deadline)
            return self._gate_decision(answer)
        body = _order_json(order)
        answer = self._ask(_request(self._endpoint, "POST", "/v1/orders/check", body), "POST", deadline)
        return self._order_decision(answer)

    def standing(self, deadline: float) -> GateDecision:
        """Ask as an exit would, which the runaway-order brake does not count."""
        question = _request(self._endpoint, "GET", "/gate", intent="reduce")
        return self._gate_decision(self._ask(question, "GET", deadline))

    def close(self) -> None:
        """Close what is idle; connections in use close when their answer is in."""
        self._closed = True
        while self._idle:
            try:
                self._idle.pop().close()
            except IndexError:  # another thread took the last one
                return

    def _ask(self, question: bytes, method: str, deadline: float) -> _Answer:
        link = self._kept_link()
        if link is not None:
            try:
                return self._ask_over(link, question, method, deadline)
            except _ClosedUnansweredError:
                # The server closed it for idleness while the question was on its way. Asking changes nothing but the
                # brake's count, so it may be asked again, once, on a connection of its own.
                pass
        try:
            link = _Link.connect(self._endpoint, deadline)
            return self._ask_over(link, question, method, deadline)
        except _ClosedUnansweredError as error:
            raise _NoAnswerError(f"the gate at {self._endpoint.shown} closed the connection unanswered") from error
        except OSError as error:
            raise self._no_answer(error) from error

    def _ask_over(self, link: _Link, question: bytes, method: str, deadline: float) -> _Answer:
        reusable = False
        try:
            answer, reusable = link.ask(question, method, deadline)
        except (_ClosedUnansweredError, _BadAnswerError, _NoAnswerError):
            raise
        except OSError as error:
            raise self._no_answer(error) from error
        except (http.client.HTTPException, ValueError) as error:
            raise _BadAnswerError(f"{self._endpoint.shown} answers no HTTP: {error!r:.200}") from error
        finally:
            if reusable and not self._closed and len(self._idle) < _MOST_IDLE:
                self._idle.append(link)
            else:
                link.close()
        return answer

    def _no_answer(self, error: OSError) -> _NoAnswerError:
        if isinstance(error, TimeoutError):
            return _NoAnswerError(f"no whole answer of the gate at {self._endpoint.shown} in time")
        return _NoAnswerError(f"the gate at {self._endpoint.shown} is out of reach: {error.strerror or error!r}")

    def _kept_link(self) -> _Link | None:
        while True:
            try:
                link = self._idle.pop()
            except IndexError:
                return None
            if link.is_quiet():
                return link
            link.close()

    def _gate_decision(self, answer: _Answer) -> GateDecision:
        if answer.status not in (http.client.OK, http.client.FORBIDDEN):
            raise _BadAnswerError(f"{self._endpoint.shown} answers with status {answer.status}; wanted 200 or 403")
        in_header = _only(answer.headers, "X-Killswitch-Switch")
        verdict, message, in_body = _said_in(answer)
        switch = in_body or in_header
        self._check_switch(switch, [in_header])
        allowed = answer.status == http.client.OK
        code = _code(_only(answer.headers, "X-Killswitch-Reason"))
        restriction = _only(answer.headers, "X-Killswitch-Restriction")
        if allowed:
            _refuse_contradiction(verdict=verdict, code=code, restriction=restriction)
        return GateDecision(
            allowed=allowed,
            code=code,
            message=message or f"the gate says {code}",
            state=_only(answer.headers, "X-Killswitch-State"),
            restriction=restriction,
            factor=_factor(_only(answer.headers, "X-Killswitch-Factor")),
            switch=switch,
            decision_id=_only(answer.headers, "X-Killswitch-Decision-Id"),
        )

    def _order_decision(self, answer: _Answer) -> GateDecision:
        if answer.status == http.client.BAD_REQUEST:
            problem = _json_object(answer.body)
            raise _BadOrderError(f"the gate says: {problem.get('detail') or problem.get('title')!s:.500}")
        if answer.status != http.client.OK:
            raise _BadAnswerError(f"{self._endpoint.shown} answers with status {answer.status}; wanted 200")
        said = _json_object(answer.body)
        decision = _decision_of(said)
        self._check_switch(decision.switch, answer.headers.get_all("X-Killswitch-Switch", []))
        return decision

    def _check_switch(self, name: str | None, in_headers: Sequence[str | None]) -> None:
        """Check the whole name, and those in headers, which do not carry every character."""
        if not name or not all(in_headers):
            raise _BadAnswerError(f"{self._endpoint.shown} names no switch: it is no kill switch's gate")
        wanted = self._expect_switch
        if wanted is None:
            return
        strange = [header for header in in_headers if header != _in_header(wanted)]
        if name != wanted or strange:
            seen = name if name != wanted else strange[0]
            raise _BadAnswerError(f"{self._endpoint.shown} is the gate of {seen!r}; wanted {wanted!r}")


class _ClosedUnansweredError(Exception):
    """The connection ended before the first byte of an answer."""


class _Link:
    """One connection. Belongs to the process that made it and, while in use, to one thread."""

    __slots__ = ("_pid", "_socket")

    def __init__(self, connected: sockets.socket) -> None:
        self._socket = connected
        self._pid = os.getpid()

    @classmethod
    def connect(cls, endpoint: _Endpoint, deadline: float) -> Self:
        """Connect.

        Raises:
            OSError: it could not, or not in time.
        """
        connection = sockets.socket(endpoint.family, sockets.SOCK_STREAM)
        try:
            while True:
                connection.settimeout(_left(deadline))
                try:
                    connection.connect(endpoint.address)
                    break
                except BlockingIOError:
                    time.sleep(0.001)  # a Unix socket's full backlog is reported at once, not waited for
            if endpoint.family != sockets.AF_UNIX:
                connection.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1)
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    def is_quiet(self) -> bool:
        """Return whether the connection is ours (not a parent's) and neither closed nor holding bytes nobody asked for.

        Left-over bytes would be taken for the answer to the next question.
        """
        if self._pid != os.getpid():
            return False
        try:
            self._socket.settimeout(0)
            self._socket.recv(1, sockets.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def ask(self, question: bytes, method: str, deadline: float) -> tuple[_Answer, bool]:
        """Send the question and return the whole answer, and whether the connection can carry another.

        Raises:
            _ClosedUnansweredError: closed before the first byte of the answer.
            _NoAnswerError: the answer was cut off.
            _BadAnswerError: the answer is too large.
            OSError, http.client.HTTPException, ValueError: connection or answer are broken.
        """
        wire = _Wire(self._socket, deadline)
        try:
            self._socket.settimeout(_left(deadline))
            self._socket.sendall(question)
            # HTTPResponse asks nothing of a socket but a file to read from.
            response = http.client.HTTPResponse(wire, method=method)  # type: ignore[arg-type]
            response.begin()
            body = response.read(_MOST_ANSWER_BYTES)
        except (ConnectionError, http.client.IncompleteRead) as error:
            if not wire.received:
                raise _ClosedUnansweredError from error
            raise _NoAnswerError("the gate closed the connection in the middle of its answer") from error
        cut_off = bool(response.length) or not wire.has_header_end()
        reusable = not response.will_close and response.isclosed()
        response.close()
        if cut_off:
            raise _NoAnswerError("the gate closed the connection in the middle of its answer")
        return _Answer(status=response.status, headers=response.headers, body=body), reusable

    def close(self) -> None:
        """Close this process' hold on the connection; a parent's stays open."""
        self._socket.close()


class _Wire(io.RawIOBase):
    """What comes over a socket, by one deadline for the whole answer however slowly it drips, and of limited size."""

    def __init__(self, connection: sockets.socket, deadline: float) -> None:
        super().__init__()
        self._connection = connection
        self._deadline = deadline
        self.received = bytearray()

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Give http.client the file that it asks of a socket."""
        return io.BufferedReader(self, buffer_size=4096)

    def readable(self) -> bool:
        """Return True, as io.BufferedReader wants to know."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Receive into `buffer` what is there, waiting no longer than the deadline."""
        self._connection.settimeout(_left(self._deadline))
        count = self._connection.recv_into(buffer)
        self.received += memoryview(buffer)[:count]
        if len(self.received) > _MOST_ANSWER_BYTES:
            raise _BadAnswerError(f"the answer is longer than {_MOST_ANSWER_BYTES} bytes: it is no gate's")
        return count

    def has_header_end(self) -> bool:
        """Return whether the empty line after the headers came; http.client takes the end of a stream for one."""
        return b"\r\n\r\n" in self.received or b"\n\n" in self.received


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(errno.ETIMEDOUT, "the time for this question is over")
    return left


def _request(endpoint: _Endpoint, method: str, path: str, body: bytes = b"", *, intent: str = "new") -> bytes:
    lines = [f"{method} {endpoint.prefix}{path} HTTP/1.1", f"Host: {endpoint.host}"]
    if method == "POST":
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    else:
        lines.append(f"X-Order-Intent: {intent}")
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body


def _order_json(order: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(dict(order), allow_nan=False, default=_json_number).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise _BadOrderError(f"the order cannot be sent: {error}") from error


def _json_number(value: object) -> str | int:
    number = None if isinstance(value, str) else _decimal(value)
    if number is None:
        raise TypeError(f"{value!r:.80} is no finite number of at most {_MOST_DIGITS} digits")
    return format(number, "f")


def _only(headers: http.client.HTTPMessage, name: str) -> str | None:
    values = headers.get_all(name, [])
    if len(values) > 1:
        raise _BadAnswerError(f"the answer has {len(values)} headers {name}; wanted one")
    return str(values[0]).strip() if values else None


def _in_header(name: str) -> str:
    """Write a name as the gate does in a header: latin-1, with a question mark for what does not fit."""
    printable = "".join(character if character.isprintable() else "?" for character in name)
    return printable.encode("latin-1", "replace").decode("latin-1").strip()


def _code(said: object) -> str:
    if not isinstance(said, str) or said not in REASON_CODES:
        raise _BadAnswerError(f"the answer's reason is {said!r:.80}; wanted one of {sorted(REASON_CODES)}")
    return said


def _factor(said: object) -> float:
    if isinstance(said, str) and _DECIMAL_TEXT.fullmatch(said):
        said = float(said)
    if isinstance(said, bool) or not (isinstance(said, int | float) and 0 <= said <= 1):
        raise _BadAnswerError(f"the answer's position limit factor is {said!r:.80}; wanted 0.0 to 1.0")
    return float(said)


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        said = json.loads(body, object_pairs_hook=_without_twins, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _BadAnswerError(f"the answer is no JSON: {error!r:.200}") from error
    if not isinstance(said, dict):
        raise _BadAnswerError(f"the answer is a JSON {type(said).__name__}; wanted an object")
    return said


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _said_in(answer: _Answer) -> tuple[str, str | None, str | None]:
    """Return decision, message and switch of the gate's answer where its body says them; else what the status says."""
    try:
        said = _json_object(answer.body)
    except _BadAnswerError:
        return "allow" if answer.status == http.client.OK else "deny", None, None
    return str(said.get("decision")), _text(_field(said.get("reason"), "message")), _text(said.get("switch"))


def _refuse_contradiction(*, verdict: str, code: str, restriction: str | None) -> None:
    """Refuse an allow that says at the same time why it is none: it is not what our sidecar answered."""
    if verdict != "allow" or code not in _ALLOWING or restriction == "halt":
        raise _BadAnswerError(
            f"the answer allows with decision {verdict!r:.80}, reason {code!r} and restriction {restriction!r:.80}"
        )


def _decision_of(said: object) -> GateDecision:
    """Read the fields of a decision from a JSON object, another mapping or an object with such attributes."""
    verdict = _text(_field(said, "decision"))
    if verdict not in ("allow", "deny"):
        raise _BadAnswerError(f"the answer's decision is {verdict!r:.80}; wanted 'allow' or 'deny'")
    reason = _field(said, "reason")
    code = _code(_text(_field(reason, "code")))
    restriction = _text(_field(said, "restriction"))
    if verdict == "allow":
        _refuse_contradiction(verdict=verdict, code=code, restriction=restriction)
    most = _field(said, "max_quantity")
    epoch = _field(said, "epoch")
    return GateDecision(
        allowed=verdict == "allow",
        code=code,
        message=_text(_field(reason, "message")) or f"the gate says {code}",
        state=_text(_field(said, "state")),
        restriction=restriction,
        factor=_factor(_field(said, "position_limit_factor")),
        switch=_text(_field(said, "switch")),
        decision_id=_text(_field(said, "decision_id")),
        max_quantity=None if most is None else _decimal(most),
        trigger=_text(_field(reason, "trigger")),
        value=_field(reason, "value"),
        limit=_field(reason, "limit"),
        since=_field(reason, "since"),
        release=_text(_field(reason, "release")),
        epoch=epoch if isinstance(epoch, int) and not isinstance(epoch, bool) else None,
    )


def _field(said: object, name: str) -> Any:
    if isinstance(said, Mapping):
        return said.get(name)
    return getattr(said, name, None)


def _text(said: object) -> str | None:
    said = getattr(said, "value", said)  # an enumeration's member
    return said if isinstance(said, str) else None


class _InProcess:
    """Asks a `sidecar.KillSwitch`, known only by its method `decide(order_or_none)`."""

    waits = False

    def __init__(self, kill_switch: object, expect_switch: str | None) -> None:
        ask = getattr(kill_switch, "decide", None)
        if not callable(ask):
            raise TypeError(f"kill_switch is {kill_switch!r:.80}; wanted a sidecar.KillSwitch, with decide(order)")
        self._ask = ask
        self._expect_switch = expect_switch

    def decide(self, order: Mapping[str, Any] | None, deadline: float) -> GateDecision:  # noqa: ARG002 - does not wait
        """Ask the switch."""
        decision = _decision_of(self._ask(order))
        if self._expect_switch is not None and decision.switch != self._expect_switch:
            raise _BadAnswerError(f"kill_switch is {decision.switch!r}; wanted {self._expect_switch!r}")
        return decision

    def standing(self, deadline: float) -> GateDecision:
        """Ask the switch about an order of unknown size."""
        return self.decide(None, deadline)

    def close(self) -> None:
        """Leave the switch alone: it is its owner's."""
