"""Whether one order may go: reduce-only and limit arithmetic in exact decimals, from a snapshot and nothing else.

The rules, in this order: a cancel always passes; `halt` denies; `reduce_only` passes what truly reduces the position;
otherwise what truly reduces passes, and what would leave |position| beyond factor × limit does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Context, Decimal, DivisionByZero, Inexact, InvalidOperation, Overflow
from enum import StrEnum

from sidecar.core.policy import GatePolicy
from sidecar.core.snapshot import Reason, ReasonCode, Snapshot
from sidecar.core.states import Mode, Restriction, State

ZERO = Decimal(0)

# Python's default context rounds to 28 digits, and a rounded sum may fall on the wrong side of a limit. This one never
# rounds: what does not fit 300 digits raises decimal.Inexact, and whoever asked fails closed.
_EXACT = Context(prec=300, traps=[InvalidOperation, Inexact, Overflow, DivisionByZero])


class Intent(StrEnum):
    """What an order is for. `reduce` is only ever a claim, made where no quantities are given."""

    NEW = "new"
    REPLACE = "replace"
    REDUCE = "reduce"
    CANCEL = "cancel"


class Side(StrEnum):
    """Which way an order moves the position."""

    BUY = "buy"
    SELL = "sell"


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """One order as asked about.

    Attributes:
        intent: new, replace or cancel.
        symbol: instrument; empty where the caller gave none.
        side: None only for a cancel.
        quantity: positive; for a replace the new total.
        position: signed present position; None where unknown.
        open_quantity: working orders on the same side, without the one being replaced.
        position_limit: the caller's own limit; the smaller of it and the configured one holds.
        reduce_only: the caller's flag to the venue; never loosens anything here.
    """

    intent: Intent
    symbol: str = ""
    side: Side | None = None
    quantity: Decimal = ZERO
    position: Decimal | None = None
    open_quantity: Decimal = ZERO
    position_limit: Decimal | None = None
    reduce_only: bool = False

    @property
    def truly_reduces(self) -> bool:
        """Whether |position| becomes smaller and keeps its sign, even with all working orders of this side filled."""
        if self.position is None or self.side is None or self.position == ZERO:
            return False
        opposite = (self.side is Side.SELL) == (self.position > ZERO)
        filled = _EXACT.add(self.quantity, self.open_quantity)
        return opposite and self.quantity > ZERO and filled <= self.position.copy_abs()

    @property
    def largest_reduction(self) -> Decimal:
        """The quantity up to which this order would truly reduce; zero where it cannot."""
        if self.position is None or self.side is None:
            return ZERO
        opposite = (self.side is Side.SELL) == (self.position > ZERO)
        if not opposite or self.position == ZERO:
            return ZERO
        return max(ZERO, _EXACT.subtract(self.position.copy_abs(), self.open_quantity))

    @property
    def flaw(self) -> str | None:
        """What makes this no order that could be decided on, in words; None where it is one. A cancel needs nothing."""
        if self.intent is Intent.CANCEL:
            return None
        if self.side is None:
            return "side is missing: give buy or sell"
        # Written so that a NaN, which compares as false or raises, never counts as a good number.
        if not (self.quantity.is_finite() and self.quantity > ZERO):
            return f"quantity {self.quantity} is not a positive number"
        if not (self.open_quantity.is_finite() and self.open_quantity >= ZERO):
            return f"open_quantity {self.open_quantity} is not a number from 0 on"
        if self.position is not None and not self.position.is_finite():
            return f"position {self.position} is not a finite number"
        if self.position_limit is not None and not (self.position_limit.is_finite() and self.position_limit >= ZERO):
            return f"position_limit {self.position_limit} is not a number from 0 on"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The gate's word on one order.

    Attributes:
        allow: whether it may go.
        reason: why, for both answers.
        max_quantity: what quantity would pass; None where no limit applies.
        limit: factor × position limit, where one applied.
    """

    allow: bool
    reason: Reason
    max_quantity: Decimal | None = None
    limit: Decimal | None = None


CANCEL_PASSES = Decision(allow=True, reason=Reason(code=ReasonCode.CANCEL, message="cancels always pass"))
REDUCING_PASSES = Reason(code=ReasonCode.REDUCING, message="the order truly reduces the position")


def decide(snapshot: Snapshot, policy: GatePolicy, order: Order) -> Decision:
    """Decide on one order with its quantities.

    Raises decimal.Inexact for numbers that no market has (more than 300 digits between largest and smallest).
    """
    if order.intent is Intent.CANCEL:
        return CANCEL_PASSES
    if _only_shadows(snapshot):
        return _shadowed(_enforce(snapshot.would_be or snapshot, policy, order))
    return _enforce(snapshot, policy, order)


def decide_blind(snapshot: Snapshot, policy: GatePolicy, intent: Intent) -> Decision:
    """Decide on a question that carries no size, as `/gate` asks it."""
    if intent is Intent.CANCEL:
        return CANCEL_PASSES
    if _only_shadows(snapshot):
        return _shadowed(_enforce_blind(snapshot.would_be or snapshot, policy, intent))
    return _enforce_blind(snapshot, policy, intent)


class Tally:
    """Decides on orders in turn, from one snapshot; each counts the allowed ones before it as working.

    An order without a symbol may be of any: it counts all before it of its side, and all after it count it.
    """

    def __init__(self, snapshot: Snapshot, policy: GatePolicy) -> None:
        self._snapshot = snapshot
        self._policy = policy
        self._by_symbol: dict[tuple[str, Side | None], Decimal] = {}
        self._by_side: dict[Side | None, Decimal] = {}

    def decide(self, order: Order) -> Decision:
        """Decide on the next order."""
        before = self._working_before(order)
        if before:
            order = replace(order, open_quantity=_EXACT.add(order.open_quantity, before))
        decision = decide(self._snapshot, self._policy, order)
        if decision.allow and order.intent is not Intent.CANCEL:
            key = (order.symbol, order.side)
            self._by_symbol[key] = _EXACT.add(self._by_symbol.get(key, ZERO), order.quantity)
            self._by_side[order.side] = _EXACT.add(self._by_side.get(order.side, ZERO), order.quantity)
        return decision

    def _working_before(self, order: Order) -> Decimal:
        if not order.symbol:
            return self._by_side.get(order.side, ZERO)
        same = self._by_symbol.get((order.symbol, order.side), ZERO)
        unnamed = self._by_symbol.get(("", order.side), ZERO)
        return _EXACT.add(same, unnamed)


def decide_all(snapshot: Snapshot, policy: GatePolicy, orders: Sequence[Order]) -> list[Decision]:
    """Decide on orders in turn; each counts the allowed ones before it, of its symbol and side, as working."""
    tally = Tally(snapshot, policy)
    return [tally.decide(order) for order in orders]


def _only_shadows(snapshot: Snapshot) -> bool:
    # In shadow mode a restriction on the snapshot itself is an operator's own kill, the one thing that blocks there.
    return snapshot.mode is Mode.SHADOW and snapshot.gate_restriction is Restriction.NONE


def _enforce(snapshot: Snapshot, policy: GatePolicy, order: Order) -> Decision:
    if snapshot.state is State.DISABLED:
        return Decision(allow=True, reason=snapshot.reason)
    if snapshot.gate_restriction is Restriction.HALT:
        return Decision(allow=False, reason=snapshot.reason, max_quantity=ZERO)
    if order.flaw is not None:
        return Decision(allow=False, reason=_bad_order(order.flaw))
    if snapshot.gate_restriction is Restriction.REDUCE_ONLY:
        return _decide_reduce_only(snapshot, order)
    return _decide_limited(snapshot, policy, order)


def _enforce_blind(snapshot: Snapshot, policy: GatePolicy, intent: Intent) -> Decision:
    if snapshot.state is State.DISABLED:
        return Decision(allow=True, reason=snapshot.reason)
    if snapshot.gate_restriction is Restriction.HALT:
        return Decision(allow=False, reason=snapshot.reason)
    objection = _blind_objection(snapshot, policy)
    if objection is None:
        return Decision(allow=True, reason=_active(snapshot))
    if intent is Intent.REDUCE and policy.trust_reduce_claim:
        return Decision(allow=True, reason=REDUCING_PASSES)
    return Decision(allow=False, reason=objection)


def _blind_objection(snapshot: Snapshot, policy: GatePolicy) -> Reason | None:
    if snapshot.gate_restriction is Restriction.REDUCE_ONLY:
        return snapshot.reason
    # A factor of 0 leaves no size that could pass unseen, whatever the policy says of the factors between.
    if snapshot.gate_factor >= 1.0 or (snapshot.gate_factor > 0.0 and policy.blind_orders):
        return None
    return _blind(snapshot)


def _decide_reduce_only(snapshot: Snapshot, order: Order) -> Decision:
    if order.truly_reduces:
        return Decision(allow=True, reason=REDUCING_PASSES, max_quantity=order.largest_reduction)
    return Decision(allow=False, reason=snapshot.reason, max_quantity=order.largest_reduction)


def _decide_limited(snapshot: Snapshot, policy: GatePolicy, order: Order) -> Decision:
    own_limit = applicable_limit(policy.position_limits, order)
    if own_limit is None:
        reason = REDUCING_PASSES if order.truly_reduces else _active(snapshot)
        return Decision(allow=True, reason=reason)
    limit = _EXACT.multiply(own_limit, Decimal(repr(snapshot.gate_factor)))
    if order.position is None:
        return Decision(allow=False, reason=_position_missing(own_limit), max_quantity=ZERO, limit=limit)
    toward = _EXACT.subtract if order.side is Side.BUY else _EXACT.add
    room = _EXACT.subtract(toward(limit, order.position), order.open_quantity)
    most = max(ZERO, room)  # what truly reduces fits in it too, for no limit is below zero
    if order.truly_reduces:
        return Decision(allow=True, reason=REDUCING_PASSES, max_quantity=most, limit=limit)
    # The position after filling this order and all working ones of its side: each partial fill on the way there lies
    # between today's position and that one, so the two ends bound everything in between.
    allow = order.quantity <= room
    reason = _active(snapshot) if allow else _over_limit(snapshot, own_limit, limit, most)
    return Decision(allow=allow, reason=reason, max_quantity=most, limit=limit)


def applicable_limit(limits: Mapping[str, Decimal], order: Order) -> Decimal | None:
    """The absolute limit for an order: the smaller of the configured and its own; None where there is neither.

    Without a symbol the strictest of all configured limits holds, for it may be any of them.
    """
    if not limits:
        return order.position_limit
    configured = limits.get(order.symbol, limits.get("*")) if order.symbol else min(limits.values())
    if configured is None:
        return order.position_limit
    return configured if order.position_limit is None else min(configured, order.position_limit)


def plain(number: Decimal) -> str:
    """Write a finite number with all its digits and nothing else: no exponent, no trailing zeros, no minus zero."""
    text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _shadowed(decision: Decision) -> Decision:
    if decision.allow:
        return decision
    reason = Reason(
        code=ReasonCode.SHADOW,
        message=f"shadow mode: would be denied as {decision.reason.code.value}: {decision.reason.message}",
        trigger=decision.reason.trigger,
        value=decision.reason.value,
        limit=decision.reason.limit,
        since=decision.reason.since,
        release="nothing is blocked in shadow mode but by an operator's own kill",
    )
    # No size: whoever sizes orders by what would pass would be held down by a shadow.
    return Decision(allow=True, reason=reason)


def _active(snapshot: Snapshot) -> Reason:
    if snapshot.gate_factor < 1.0:
        return Reason(
            code=ReasonCode.ACTIVE,
            message=f"trading at {snapshot.gate_factor:g} of the position limits: {snapshot.reason.message}",
            trigger=snapshot.reason.trigger,
            since=snapshot.reason.since,
            release=snapshot.reason.release,
        )
    return Reason(code=ReasonCode.ACTIVE, message=snapshot.reason.message)


def _blind(snapshot: Snapshot) -> Reason:
    return Reason(
        code=ReasonCode.BLIND_ORDER,
        message=f"the position limit factor is {snapshot.gate_factor:g} and this question carries no size; "
        "ask POST /v1/orders/check with quantity and position",
        trigger=snapshot.reason.trigger,
        since=snapshot.reason.since,
        release=snapshot.reason.release,
    )


def _bad_order(flaw: str) -> Reason:
    return Reason(code=ReasonCode.BAD_ORDER, message=flaw, release="the caller, by sending a well-formed order")


def _position_missing(limit: Decimal) -> Reason:
    return Reason(
        code=ReasonCode.BAD_ORDER,
        message=f"a position limit of {plain(limit)} applies; give the present position (signed) with the order",
        limit=float(limit),
        release="the caller, by sending position",
    )


def _over_limit(snapshot: Snapshot, own_limit: Decimal, limit: Decimal, most: Decimal) -> Reason:
    return Reason(
        code=ReasonCode.OVER_LIMIT,
        message=f"|position| would exceed {plain(limit)} ({snapshot.gate_factor:g} of {plain(own_limit)}); "
        f"at most {plain(most)} would pass",
        limit=float(limit),
        since=snapshot.reason.since if snapshot.gate_factor < 1.0 else None,
        release="a smaller order" if snapshot.gate_factor >= 1.0 else snapshot.reason.release,
    )
