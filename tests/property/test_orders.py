"""Properties of order decisions that no sequence of orders and fills may break."""

from dataclasses import dataclass
from decimal import Decimal

from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.core.orders import Intent, Order, Side, decide, decide_all, decide_blind
from sidecar.core.policy import GatePolicy
from sidecar.core.snapshot import ALL_CLEAR, Reason, ReasonCode, Snapshot
from sidecar.core.states import Mode, Restriction, Stage, State

QUANTITIES = st.integers(1, 2000).map(lambda n: Decimal(n) / 10)
SIDES = st.sampled_from(Side)
FACTORS = st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.75, 1.0])
SHARES = st.sampled_from([Decimal("0.1"), Decimal("0.5"), Decimal(1)])


def snapshot(restriction: Restriction, factor: float) -> Snapshot:
    reason = Reason(code=ReasonCode.REDUCE_ONLY, message="r") if restriction else ALL_CLEAR
    return Snapshot(
        switch="s",
        mode=Mode.ACTIVE,
        state=State.ACTIVE,
        stage=Stage.NONE,
        restriction=restriction,
        factor=factor,
        epoch=1,
        since=0.0,
        gate_restriction=restriction,
        gate_factor=factor,
        reason=reason,
    )


@dataclass
class Working:
    side: Side
    remaining: Decimal


class Market:
    """Asks for each order, keeps the allowed ones working, and fills them as told."""

    def __init__(self, position: Decimal, at: Snapshot, policy: GatePolicy) -> None:
        self.position, self.at, self.policy = position, at, policy
        self.working: list[Working] = []

    def open_quantity(self, side: Side, without: Working | None = None) -> Decimal:
        return sum((w.remaining for w in self.working if w.side is side and w is not without), Decimal(0))

    def ask(self, side: Side, quantity: Decimal, replaced: Working | None = None) -> bool:
        asked = Order(
            intent=Intent.NEW if replaced is None else Intent.REPLACE,
            symbol="X",
            side=side,
            quantity=quantity,
            position=self.position,
            open_quantity=self.open_quantity(side, replaced),
        )
        if not decide(self.at, self.policy, asked).allow:
            return False
        if replaced is not None:
            self.working.remove(replaced)
        self.working.append(Working(side, quantity))
        return True

    def fill(self, index: int, share: Decimal) -> None:
        filled = self.working[index]
        quantity = filled.remaining * share
        filled.remaining -= quantity
        self.position += quantity if filled.side is Side.BUY else -quantity
        if not filled.remaining:
            self.working.remove(filled)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("order"), SIDES, QUANTITIES),
        st.tuples(st.just("fill"), st.integers(0, 50), SHARES),
        st.tuples(st.just("replace"), st.integers(0, 50), QUANTITIES),
        st.tuples(st.just("cancel"), st.integers(0, 50), st.none()),
    ),
    max_size=30,
)


def play(market: Market, step: tuple[str, object, object]) -> None:
    kind, first, second = step
    if kind == "order":
        market.ask(first, second)
        return
    if not market.working:
        return
    index = first % len(market.working)
    if kind == "fill":
        market.fill(index, second)
    elif kind == "replace":
        replaced = market.working[index]
        market.ask(replaced.side, second, replaced)
    else:
        assert decide(market.at, market.policy, Order(intent=Intent.CANCEL)).allow
        del market.working[index]


@settings(max_examples=150, deadline=None)
@given(start=st.integers(-100, 100), limit=st.integers(1, 2000), factor=FACTORS, steps=STEPS)
def test_allowed_orders_and_fills_in_any_order_never_leave_factor_times_limit(start, limit, factor, steps):
    policy = GatePolicy(position_limits={"X": Decimal(limit)})
    bound = Decimal(limit) * Decimal(repr(factor))
    market = Market(bound * start / 100, snapshot(Restriction.NONE, factor), policy)
    for step in steps:
        play(market, step)
        assert abs(market.position) <= bound


@settings(max_examples=150, deadline=None)
@given(start=st.integers(-1000, 1000), steps=STEPS)
def test_under_reduce_only_the_position_never_grows_and_never_flips(start, steps):
    market = Market(Decimal(start), snapshot(Restriction.REDUCE_ONLY, 0.0), GatePolicy())
    for step in steps:
        before = market.position
        play(market, step)
        assert abs(market.position) <= abs(before)
        assert market.position * start >= 0


ORDERS = st.builds(
    Order,
    intent=st.sampled_from([Intent.NEW, Intent.REPLACE, Intent.CANCEL]),
    symbol=st.sampled_from(["", "X", "Y"]),
    side=SIDES,
    quantity=QUANTITIES,
    position=st.none() | st.integers(-500, 500).map(Decimal),
    open_quantity=st.integers(0, 100).map(Decimal),
    position_limit=st.none() | st.integers(0, 500).map(Decimal),
)
SNAPSHOTS = st.builds(snapshot, st.sampled_from(Restriction), FACTORS)
POLICIES = st.sampled_from([GatePolicy(), GatePolicy(position_limits={"X": Decimal(200), "*": Decimal("99.5")})])


@given(at=SNAPSHOTS, policy=POLICIES, order=ORDERS)
def test_max_quantity_is_the_largest_quantity_that_passes(at, policy, order):
    decision = decide(at, policy, order)
    most = decision.max_quantity
    if most is None or order.intent is Intent.CANCEL:
        return

    def passes(quantity: Decimal) -> bool:
        asked = Order(
            intent=order.intent,
            symbol=order.symbol,
            side=order.side,
            quantity=quantity,
            position=order.position,
            open_quantity=order.open_quantity,
            position_limit=order.position_limit,
        )
        return decide(at, policy, asked).allow

    assert most == 0 or passes(most)
    assert not passes(most + Decimal("0.001"))
    assert decision.allow == (order.quantity <= most)


@given(policy=POLICIES, order=ORDERS, factor=FACTORS)
def test_a_stricter_restriction_never_allows_more(policy, order, factor):
    answers = [decide(snapshot(restriction, factor), policy, order).allow for restriction in Restriction]
    assert answers == sorted(answers, reverse=True)


@given(policy=POLICIES, order=ORDERS, factors=st.tuples(FACTORS, FACTORS))
def test_a_smaller_factor_never_allows_more(policy, order, factors):
    low, high = (decide(snapshot(Restriction.NONE, factor), policy, order).allow for factor in sorted(factors))
    assert high or not low


@given(at=SNAPSHOTS, policy=POLICIES, orders=st.lists(ORDERS, min_size=1, max_size=8))
def test_a_list_never_allows_what_alone_would_be_denied(at, policy, orders):
    for order, decision in zip(orders, decide_all(at, policy, orders), strict=True):
        assert decide(at, policy, order).allow or not decision.allow
        assert decision.allow or order.intent is not Intent.CANCEL


@given(at=SNAPSHOTS, policy=POLICIES)
def test_a_blind_cancel_always_passes(at, policy):
    assert decide_blind(at, policy, Intent.CANCEL).allow
