"""Whether one order may go: reduce-only and limit arithmetic in exact decimals, from a snapshot and nothing else.

The rules, in this order: a cancel always passes; `halt` denies; `reduce_only` passes what truly reduces the position;
otherwise what truly reduces passes, and what would leave |position| beyond factor × limit does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import StrEnum

from sidecar.core.policy import GatePolicy
from sidecar.core.snapshot import Reason, ReasonCode, Snapshot
from sidecar.core.states import Mode, Restriction, State

ZERO = Decimal(0)


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
        return opposite and self.quantity > ZERO and self.quantity + self.open_quantity <= abs(self.position)

    @property
    def largest_reduction(self) -> Decimal:
        """The quantity up to which this order would truly reduce; zero where it cannot."""
        if self.position is None or self.side is None:
            return ZERO
        opposite = (self.side is Side.SELL) == (self.position > ZERO)
        return max(ZERO, abs(self.position) - self.open_quantity) if opposite and self.position != ZERO else ZERO


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
    """Decide on one order with its quantities."""
    if order.intent is Intent.CANCEL:
        return CANCEL_PASSES
    if snapshot.would_be is not None:
        return _shadowed(decide(snapshot.would_be, policy, order), snapshot)
    if snapshot.state is State.DISABLED:
        return Decision(allow=True, reason=snapshot.reason)
    if snapshot.gate_restriction is Restriction.HALT:
        return Decision(allow=False, reason=snapshot.reason, max_quantity=ZERO)
    if snapshot.gate_restriction is Restriction.REDUCE_ONLY:
        return _decide_reduce_only(snapshot, order)
    return _decide_limited(snapshot, policy, order)


def decide_blind(snapshot: Snapshot, policy: GatePolicy, intent: Intent) -> Decision:
    """Decide on a question that carries no size, as `/gate` asks it."""
    if intent is Intent.CANCEL:
        return CANCEL_PASSES
    if snapshot.would_be is not None:
        return _shadowed(decide_blind(snapshot.would_be, policy, intent), snapshot)
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
    if snapshot.gate_factor < 1.0 and not policy.blind_orders:
        return _blind(snapshot)
    return None


def decide_all(snapshot: Snapshot, policy: GatePolicy, orders: Sequence[Order]) -> list[Decision]:
    """Decide on orders in turn; each counts the allowed ones before it, of its symbol and side, as working."""
    working: dict[tuple[str, Side | None], Decimal] = {}
    decisions = []
    for order in orders:
        key = (order.symbol, order.side)
        before = working.get(key, ZERO)
        decision = decide(snapshot, policy, replace(order, open_quantity=order.open_quantity + before))
        if decision.allow:
            working[key] = before + order.quantity
        decisions.append(decision)
    return decisions


def _decide_reduce_only(snapshot: Snapshot, order: Order) -> Decision:
    if order.truly_reduces:
        return Decision(allow=True, reason=REDUCING_PASSES, max_quantity=order.largest_reduction)
    return Decision(allow=False, reason=snapshot.reason, max_quantity=order.largest_reduction)


def _decide_limited(snapshot: Snapshot, policy: GatePolicy, order: Order) -> Decision:
    own_limit = applicable_limit(policy.position_limits, order)
    if own_limit is None:
        reason = REDUCING_PASSES if order.truly_reduces else _active(snapshot)
        return Decision(allow=True, reason=reason)
    limit = own_limit * Decimal(repr(snapshot.gate_factor))
    if order.position is None or order.side is None:
        return Decision(allow=False, reason=_position_missing(own_limit), max_quantity=ZERO, limit=limit)
    room = limit - order.position if order.side is Side.BUY else limit + order.position
    most = max(ZERO, room - order.open_quantity, order.largest_reduction)
    if order.truly_reduces:
        return Decision(allow=True, reason=REDUCING_PASSES, max_quantity=most, limit=limit)
    # The position after filling this order and all working ones of its side: each partial fill on the way there lies
    # between today's position and that one, so the two ends bound everything in between.
    allow = order.quantity + order.open_quantity <= room
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


def _shadowed(decision: Decision, snapshot: Snapshot) -> Decision:
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
    return Decision(allow=snapshot.mode is Mode.SHADOW, reason=reason, max_quantity=decision.max_quantity)


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


def _position_missing(limit: Decimal) -> Reason:
    return Reason(
        code=ReasonCode.BAD_ORDER,
        message=f"a position limit of {limit} applies; give the present position (signed) and the side with the order",
        limit=float(limit),
        release="the caller, by sending position",
    )


def _over_limit(snapshot: Snapshot, own_limit: Decimal, limit: Decimal, most: Decimal) -> Reason:
    return Reason(
        code=ReasonCode.OVER_LIMIT,
        message=f"|position| would exceed {limit} ({snapshot.gate_factor:g} of {own_limit}); at most {most} would pass",
        limit=float(limit),
        since=snapshot.reason.since if snapshot.gate_factor < 1.0 else None,
        release="a smaller order" if snapshot.gate_factor >= 1.0 else snapshot.reason.release,
    )
