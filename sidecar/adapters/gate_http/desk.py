"""Where questions are answered: from the newest snapshot, without waiting, counting what was said.

The answers to `/gate` are few (an intent, with or without body, keeping or closing the connection), so all of them
are written when the snapshot changes and a question costs a lookup, a count and a decision id. Lists of orders are
worked off in steps, so that a thousand orders never hold up the next question. Knows bytes and decisions, no sockets.
"""

import logging
import os
from bisect import bisect_left
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from math import inf
from time import monotonic

from sidecar.adapters.gate_http.answers_json import DecisionWriter
from sidecar.adapters.gate_http.orders_json import OrderError, OrderReader
from sidecar.adapters.gate_http.responses import JSON, response_head
from sidecar.core.errors import InvariantViolation
from sidecar.core.orders import CANCEL_PASSES, Decision, Intent, Order, Tally, decide, decide_blind
from sidecar.core.policy import GatePolicy
from sidecar.core.snapshot import Reason, ReasonCode, Snapshot
from sidecar.core.states import Mode, Restriction, Stage, State

_log = logging.getLogger(__name__)

Admit = Callable[[str], Reason | None]
"""Asked for every `new` and `replace` question with its intent; a reason denies this very question."""

DURATION_BOUNDS = (25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 100e-3)

STALE = Reason(
    code=ReasonCode.STALE,
    message="the sidecar was stopped or stalled and has not looked anew yet",
    release="lifts by itself with the next look",
)

_ALLOWING = (ReasonCode.ACTIVE, ReasonCode.DISABLED, ReasonCode.SHADOW, ReasonCode.CANCEL, ReasonCode.REDUCING)
_ORDERS_PER_STEP = 32
_QUESTIONS_PER_STEP = 128
_ATTEMPTS = 4
_COUNTER_DIGITS = 12


class GateIntent(IntEnum):
    """What a `/gate` question is about, as a number that finds the prepared answer."""

    NEW = 0
    REDUCE = 1
    CANCEL = 2


_CORE_INTENTS = {GateIntent.NEW: Intent.NEW, GateIntent.REDUCE: Intent.REDUCE, GateIntent.CANCEL: Intent.CANCEL}

# A prepared answer: what stands before the decision id, between its two places and after; None for an answer without
# a body; and the cell that counts it. A plain tuple, because it is unpacked for every question.
_Prepared = tuple[bytes, bytes, bytes | None, list[int]]


def gate_key(intent: int, *, head: bool, close: bool) -> int:
    """The number of a prepared answer: below 4 are all those for a new order."""
    return intent << 2 | head << 1 | close


@dataclass(frozen=True, kw_only=True, slots=True)
class GateStatistics:
    """What was answered since the start.

    Attributes:
        decisions: how many, by `("allow" | "deny", reason code)`; every pair that can occur is there from the start.
        duration_bounds: upper bounds of the buckets, seconds.
        duration_counts: answers per bucket, not cumulative, one more than bounds: the last is beyond all of them. One
            observation an answer: a list of orders is one answer with many decisions.
        duration_sum: seconds, of all of them.
        connections: open now.
        connections_refused: closed at once because there were too many.
    """

    decisions: Mapping[tuple[str, str], int]
    duration_bounds: Sequence[float]
    duration_counts: Sequence[int]
    duration_sum: float
    connections: int
    connections_refused: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _View:
    """One snapshot with all that was written ahead for it; `failure` is set where it could not be used."""

    snapshot: Snapshot
    policy: GatePolicy
    writer: DecisionWriter
    prepared: tuple[_Prepared, ...]
    allows_new: bool
    failure: Reason | None = None


class Desk:
    """Answers questions from the snapshot last given to `update`; denies all but cancels before the first."""

    def __init__(self, switch: str, admit: Admit | None = None) -> None:
        self.admit = admit
        self._cells: dict[tuple[str, str], list[int]] = {}
        for code in ReasonCode:
            self._cell("allow" if code in _ALLOWING else "deny", code)
        self._durations = [0] * (len(DURATION_BOUNDS) + 1)
        self._duration_sum = 0.0
        self._number = 0
        # Unique to this process, so that a decision id found in a log names one answer also after a restart.
        self._identity_prefix = os.urandom(4).hex().encode() + b"-"
        self._lease_until = inf
        self._lapsed: _View | None = None
        self._view = self._prepare(_before_first(switch), GatePolicy())
        self._prepared = self._view.prepared
        self._failure = self._prepare_failure().prepared

    def update(self, snapshot: Snapshot, policy: GatePolicy) -> None:
        """Answer from this snapshot from now on. Never raises: what cannot be used is denied as `internal_error`."""
        try:
            view = self._prepare(snapshot, policy)
        except Exception:  # noqa: BLE001 - whatever is wrong with it, the answer must become no before anything else happens
            _log.exception("gate.snapshot_unusable")
            view = self._prepare_failure()
        self._lapsed = None
        self._view = view
        self._prepared = view.prepared

    def renew(self, now: float) -> None:
        """Rely on the snapshot for another lease from `now` (monotonic seconds) on.

        Once this has been called, an answer later than a lease after the last call is a denial as `stale`: after the
        process was stopped and goes on, nothing old is served first.
        """
        self._lease_until = now + self._view.policy.lease_ms / 1000.0
        if self._lapsed is not None:
            self._view, self._lapsed = self._lapsed, None
            self._prepared = self._view.prepared

    def _heed_lease(self) -> None:
        if monotonic() > self._lease_until:
            self._lapse()

    def _lapse(self) -> None:
        snapshot = self._view.snapshot
        if self._lapsed is not None or snapshot.mode is not Mode.ACTIVE:
            return
        if snapshot.gate_restriction is Restriction.HALT:
            return  # what it denies for says more
        stale = replace(snapshot, gate_restriction=Restriction.HALT, reason=STALE)
        self._lapsed, self._view = self._view, self._prepare(stale, self._view.policy)
        self._prepared = self._view.prepared

    def answer(self, key: int) -> bytes:
        """Answer a `/gate` question with a whole HTTP response."""
        if monotonic() > self._lease_until:
            self._lapse()
        if self.admit is not None and key < 4:
            objection = self._consult(Intent.NEW)
            if objection is not None and self._view.allows_new:
                return self._fill(self._prepare_objection(objection, key))
        return self._fill(self._prepared[key])

    def answer_failure(self, key: int) -> bytes:
        """Answer a `/gate` question after a failure of our own: denied, unless it is a cancel."""
        return self._fill(self._failure[key])

    def observe(self, seconds: float) -> None:
        """Count how long an answer took, from the arrival of the question."""
        self._durations[bisect_left(DURATION_BOUNDS, seconds)] += 1
        self._duration_sum += seconds

    def check(self, body: bytes) -> Generator[None, None, tuple[int, bytes]]:
        """Decide on the order or orders in a body; return status and document. Yields where others may take a turn.

        All orders of a list are decided on one snapshot, the newest at the end: if it changes meanwhile, the decisions
        are taken again, so that nothing is allowed after the gate has closed.
        """
        try:
            return (yield from self._check(body))
        except OrderError as error:
            reason = Reason(code=ReasonCode.BAD_ORDER, message=str(error), release="the caller, by a well-formed order")
            return 400, self.problem(400, "The order is malformed", reason)
        except Exception:  # noqa: BLE001 - an answer is owed, and it is no
            _log.exception("gate.check_failed")
            return 500, self.problem(500, "The gate failed", _internal_error())

    def problem(self, status: int, title: str, reason: Reason) -> bytes:
        """A problem document that is also a denial; counted as one where it answers an order."""
        decision = Decision(allow=False, reason=reason)
        if status in {400, 413, 500}:
            self._count(decision)
        return self._view.writer.problem(decision, self._identity(), status=status, title=title)

    def statistics(self, connections: int, refused: int) -> GateStatistics:
        """What was answered so far."""
        return GateStatistics(
            decisions={pair: cell[0] for pair, cell in self._cells.items()},
            duration_bounds=DURATION_BOUNDS,
            duration_counts=tuple(self._durations),
            duration_sum=self._duration_sum,
            connections=connections,
            connections_refused=refused,
        )

    def _fill(self, prepared: _Prepared) -> bytes:
        before, between, after, cell = prepared
        cell[0] += 1
        number = self._number = self._number + 1
        identity = self._identity_prefix + b"%012x" % number
        if after is None:
            return before + identity + between
        return b"".join((before, identity, between, identity, after))

    def _identity(self) -> str:
        self._number += 1
        return (self._identity_prefix + b"%012x" % self._number).decode()

    def _cell(self, word: str, code: ReasonCode) -> list[int]:
        return self._cells.setdefault((word, code.value), [0])

    def _count(self, decision: Decision) -> None:
        self._cell("allow" if decision.allow else "deny", decision.reason.code)[0] += 1

    def _consult(self, intent: Intent) -> Reason | None:
        if self.admit is None:
            return None
        try:
            return self.admit(intent.value)
        except Exception:  # noqa: BLE001 - a brake that fails is a brake that holds
            _log.exception("gate.admit_failed")
            return _internal_error()

    def _check(self, body: bytes) -> Generator[None, None, tuple[int, bytes]]:
        reader = OrderReader(body)
        orders = []
        for order in reader:
            orders.append(order)
            if len(orders) % _ORDERS_PER_STEP == 0:
                yield
        objections = yield from self._consult_all(orders)
        for attempt in range(_ATTEMPTS):
            self._heed_lease()
            # A snapshot that changes faster than a list is decided: decide in one go, and be late rather than wrong.
            patient = attempt < _ATTEMPTS - 1
            documents = yield from self._decide(self._view, orders, objections, patient=patient)
            if documents is not None:
                text = f"[{','.join(documents)}]" if reader.is_list else documents[0]
                return 200, text.encode()
        raise InvariantViolation("the last attempt at a list makes no pause, so that no snapshot can overtake it")

    def _decide(
        self, view: _View, orders: Sequence[Order], objections: Sequence[Reason | None], *, patient: bool
    ) -> Generator[None, None, list[str] | None]:
        tally = Tally(view.snapshot, view.policy)
        decisions = []
        documents = []
        for order, objection in zip(orders, objections, strict=True):
            decision = _decide_one(view, tally, order, objection)
            decisions.append(decision)
            documents.append(view.writer.document(decision, self._identity()))
            if patient and len(documents) % _ORDERS_PER_STEP == 0:
                yield
                self._heed_lease()  # the process may have been stopped for an hour in this very pause
                if self._view is not view:
                    return None
        for decision in decisions:
            self._count(decision)
        return documents

    def _consult_all(self, orders: Sequence[Order]) -> Generator[None, None, list[Reason | None]]:
        if self.admit is None:
            return [None] * len(orders)
        objections: list[Reason | None] = []
        for order in orders:
            objections.append(None if order.intent is Intent.CANCEL else self._consult(order.intent))
            if len(objections) % _QUESTIONS_PER_STEP == 0:
                yield
        return objections

    def _prepare(self, snapshot: Snapshot, policy: GatePolicy) -> _View:
        decisions = [decide_blind(snapshot, policy, _CORE_INTENTS[intent]) for intent in GateIntent]
        return self._write(snapshot, policy, decisions, None)

    def _prepare_objection(self, objection: Reason, key: int) -> _Prepared:
        try:
            return self._one(self._view, Decision(allow=False, reason=objection), key)
        except Exception:  # noqa: BLE001 - a reason that cannot be written is still a reason to deny
            _log.exception("gate.objection_unusable")
            return self._prepare_failure().prepared[key]

    def _prepare_failure(self) -> _View:
        before = self._view.snapshot
        reason = _internal_error()
        shut = replace(before, gate_restriction=Restriction.HALT, gate_factor=0.0, reason=reason, would_be=None)
        denied = Decision(allow=False, reason=reason)
        return self._write(shut, self._view.policy, [denied, denied, CANCEL_PASSES], reason)

    def _write(
        self, snapshot: Snapshot, policy: GatePolicy, decisions: Sequence[Decision], failure: Reason | None
    ) -> _View:
        writer = DecisionWriter(snapshot, policy)
        draft = _View(
            snapshot=snapshot, policy=policy, writer=writer, prepared=(), allows_new=decisions[0].allow, failure=failure
        )
        prepared = tuple(
            self._one(draft, decisions[intent], gate_key(intent, head=head, close=close))
            for intent in GateIntent
            for head in (False, True)
            for close in (False, True)
        )
        return replace(draft, prepared=prepared)

    def _one(self, view: _View, decision: Decision, key: int) -> _Prepared:
        before, after = (part.encode() for part in view.writer.parts(decision))
        head = response_head(
            200 if decision.allow else 403,
            len(before) + len(self._identity_prefix) + _COUNTER_DIGITS + len(after),
            close=bool(key & 1),
            content_type=JSON,
            headers=(
                ("X-Killswitch-Switch", view.snapshot.switch),
                ("X-Killswitch-State", view.snapshot.state.value),
                ("X-Killswitch-Restriction", view.snapshot.gate_restriction.label),
                ("X-Killswitch-Factor", repr(view.snapshot.gate_factor)),
                ("X-Killswitch-Reason", decision.reason.code.value),
            ),
        )
        start = head + b"\r\nX-Killswitch-Decision-Id: "
        cell = self._cell("allow" if decision.allow else "deny", decision.reason.code)
        if key & 2:
            return start, b"\r\n\r\n", None, cell
        return start, b"\r\n\r\n" + before, after, cell


def _decide_one(view: _View, tally: Tally, order: Order, objection: Reason | None) -> Decision:
    if order.intent is Intent.CANCEL:
        return CANCEL_PASSES
    if view.failure is not None:
        return Decision(allow=False, reason=view.failure)
    try:
        if objection is None:
            return tally.decide(order)
        decision = decide(view.snapshot, view.policy, order)
        return Decision(allow=False, reason=objection) if decision.allow else decision
    except Exception:  # noqa: BLE001 - one order that cannot be decided is denied; the others still get their answer
        _log.exception("gate.decision_failed")
        return Decision(allow=False, reason=_internal_error())


def _internal_error() -> Reason:
    return Reason(
        code=ReasonCode.INTERNAL_ERROR,
        message="the gate failed while answering; see the sidecar's log",
        release="a sidecar that works again",
    )


def _before_first(switch: str) -> Snapshot:
    return Snapshot(
        switch=switch,
        mode=Mode.ACTIVE,
        state=State.ACTIVE,
        stage=Stage.NONE,
        restriction=Restriction.NONE,
        factor=1.0,
        epoch=0,
        since=0.0,
        gate_restriction=Restriction.HALT,
        gate_factor=0.0,
        reason=Reason(
            code=ReasonCode.NOT_READY,
            message="the sidecar is starting: its state is not restored yet",
            release="the end of the start",
        ),
    )
