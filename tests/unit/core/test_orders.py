from decimal import Decimal, Inexact

import pytest

from sidecar.core.orders import Intent, Order, Side, Tally, applicable_limit, decide, decide_all, decide_blind, plain
from sidecar.core.policy import GatePolicy
from sidecar.core.snapshot import ALL_CLEAR, Reason, ReasonCode, Snapshot
from sidecar.core.states import Mode, Restriction, Stage, State

KILLED = Reason(code=ReasonCode.KILLED, message="killed by ops", since=5.0, release="a recovery")
THROTTLED = Reason(code=ReasonCode.ACTIVE, message="throttled", trigger="vol", since=7.0, release="when vol clears")
LIMITS = GatePolicy(position_limits={"AAPL": Decimal(1000), "*": Decimal(500)})
NO_LIMITS = GatePolicy()


def snapshot(
    restriction=Restriction.NONE, factor=1.0, reason=ALL_CLEAR, mode=Mode.ACTIVE, state=State.ACTIVE, would_be=None
) -> Snapshot:
    return Snapshot(
        switch="s",
        mode=mode,
        state=state,
        stage=Stage.NONE,
        restriction=restriction,
        factor=factor,
        epoch=1,
        since=0.0,
        gate_restriction=restriction,
        gate_factor=factor,
        reason=reason,
        would_be=would_be,
    )


def order(quantity="100", side=Side.BUY, *, intent=Intent.NEW, symbol="AAPL", position="0", working="0", limit=None):
    return Order(
        intent=intent,
        symbol=symbol,
        side=side,
        quantity=Decimal(quantity),
        position=None if position is None else Decimal(position),
        open_quantity=Decimal(working),
        position_limit=None if limit is None else Decimal(limit),
    )


ACTIVE = snapshot()
HALF = snapshot(factor=0.5, reason=THROTTLED)
HALTED = snapshot(Restriction.HALT, 0.0, KILLED, state=State.KILLED)
REDUCE = snapshot(Restriction.REDUCE_ONLY, 0.0, KILLED, state=State.KILLED)


@pytest.mark.parametrize("at", [ACTIVE, HALF, HALTED, REDUCE], ids=["active", "half", "halted", "reduce_only"])
@pytest.mark.parametrize("policy", [LIMITS, NO_LIMITS])
def test_cancels_always_pass(at, policy):
    assert decide(at, policy, Order(intent=Intent.CANCEL)).allow
    assert decide(at, policy, Order(intent=Intent.CANCEL)).reason.code is ReasonCode.CANCEL
    assert decide_blind(at, policy, Intent.CANCEL).allow


def test_a_halt_denies_even_what_reduces():
    decision = decide(HALTED, LIMITS, order("10", Side.SELL, position="100"))
    assert (decision.allow, decision.reason, decision.max_quantity) == (False, KILLED, 0)


@pytest.mark.parametrize(
    ("position", "side", "quantity", "working", "allow", "most"),
    [
        ("100", Side.SELL, "100", "0", True, 100),  # to flat
        ("100", Side.SELL, "100.1", "0", False, 100),  # would flip
        ("100", Side.SELL, "60", "40", True, 60),
        ("100", Side.SELL, "61", "40", False, 60),  # would flip once the working ones fill
        ("100", Side.SELL, "1", "150", False, 0),
        ("100", Side.BUY, "1", "0", False, 0),  # would grow
        ("-100", Side.BUY, "100", "0", True, 100),
        ("-100", Side.BUY, "101", "0", False, 100),
        ("-100", Side.SELL, "1", "0", False, 0),
        ("0", Side.SELL, "1", "0", False, 0),
        ("0", Side.BUY, "1", "0", False, 0),
        (None, Side.SELL, "1", "0", False, 0),
        ("0.3", Side.SELL, "0.1", "0.2", True, Decimal("0.1")),
    ],
)
def test_reduce_only_passes_what_truly_reduces(position, side, quantity, working, allow, most):
    decision = decide(REDUCE, NO_LIMITS, order(quantity, side, position=position, working=working))
    assert (decision.allow, decision.max_quantity) == (allow, most)
    assert decision.reason.code is (ReasonCode.REDUCING if allow else ReasonCode.KILLED)


def test_the_callers_reduce_only_flag_loosens_nothing():
    claimed = Order(intent=Intent.NEW, side=Side.BUY, quantity=Decimal(1), position=Decimal(5), reduce_only=True)
    assert not decide(REDUCE, NO_LIMITS, claimed).allow


@pytest.mark.parametrize(
    ("at", "position", "side", "quantity", "working", "own", "code", "most"),
    [
        (ACTIVE, "0", Side.BUY, "1000", "0", None, ReasonCode.ACTIVE, 1000),
        (ACTIVE, "0", Side.BUY, "1000.01", "0", None, ReasonCode.OVER_LIMIT, 1000),
        (ACTIVE, "0", Side.SELL, "1000", "0", None, ReasonCode.ACTIVE, 1000),
        (ACTIVE, "0", Side.SELL, "1001", "0", None, ReasonCode.OVER_LIMIT, 1000),
        (HALF, "0", Side.BUY, "500", "0", None, ReasonCode.ACTIVE, 500),
        (HALF, "0", Side.BUY, "501", "0", None, ReasonCode.OVER_LIMIT, 500),
        (HALF, "-40", Side.BUY, "100", "0", "800", ReasonCode.ACTIVE, 440),
        (HALF, "-40", Side.BUY, "441", "0", "800", ReasonCode.OVER_LIMIT, 440),
        (HALF, "300", Side.BUY, "100", "100", None, ReasonCode.ACTIVE, 100),
        (HALF, "300", Side.BUY, "101", "100", None, ReasonCode.OVER_LIMIT, 100),
        (HALF, "800", Side.BUY, "1", "0", None, ReasonCode.OVER_LIMIT, 0),
        (HALF, "800", Side.SELL, "700", "0", None, ReasonCode.REDUCING, 1300),
        (HALF, "800", Side.SELL, "1300", "0", None, ReasonCode.ACTIVE, 1300),
        (HALF, "800", Side.SELL, "1301", "0", None, ReasonCode.OVER_LIMIT, 1300),
        (ACTIVE, "0", Side.BUY, "10", "0", "5", ReasonCode.OVER_LIMIT, 5),
        (ACTIVE, "0", Side.BUY, "10", "0", "5000", ReasonCode.ACTIVE, 1000),
    ],
)
def test_an_order_may_not_take_the_position_beyond_factor_times_limit(
    at, position, side, quantity, working, own, code, most
):
    decision = decide(at, LIMITS, order(quantity, side, position=position, working=working, limit=own))
    assert decision.reason.code is code
    assert decision.allow == (code is not ReasonCode.OVER_LIMIT)
    assert decision.max_quantity == most


def test_a_tenth_and_two_tenths_are_three_tenths():
    limit = GatePolicy(position_limits={"*": Decimal("0.3")})
    assert decide(ACTIVE, limit, order("0.1", position="0.2")).allow
    assert decide(snapshot(factor=0.1), GatePolicy(position_limits={"*": Decimal(3)}), order("0.3")).allow


def test_forty_digits_are_not_rounded_across_the_limit():
    limit = GatePolicy(position_limits={"*": Decimal(10**39)})
    assert decide(ACTIVE, limit, order(str(10**39 - 1), working="1")).allow
    assert not decide(ACTIVE, limit, order(str(10**39), working="1")).allow
    assert not decide(REDUCE, limit, order("1", Side.SELL, position=str(10**39), working=str(10**39))).allow


def test_numbers_that_no_market_has_raise_instead_of_being_rounded():
    with pytest.raises(Inexact):
        decide(ACTIVE, LIMITS, order("1", working="1e-320"))


def test_over_limit_says_what_would_pass_and_who_lifts_it():
    decision = decide(HALF, LIMITS, order("501"))
    assert "500 (0.5 of 1000); at most 500 would pass" in decision.reason.message
    assert (decision.reason.limit, decision.limit) == (500.0, Decimal(500))
    assert (decision.reason.since, decision.reason.release) == (7.0, "when vol clears")
    full = decide(ACTIVE, LIMITS, order("1001"))
    assert (full.reason.since, full.reason.release) == (None, "a smaller order")


def test_without_position_an_order_under_a_limit_is_bad():
    decision = decide(HALF, LIMITS, order(position=None))
    assert (decision.allow, decision.reason.code, decision.max_quantity) == (False, ReasonCode.BAD_ORDER, 0)
    assert (decision.limit, decision.reason.limit) == (Decimal(500), 1000.0)
    assert "a position limit of 1000 applies" in decision.reason.message
    assert decision.reason.release == "the caller, by sending position"


@pytest.mark.parametrize(
    ("position", "side", "working", "most"),
    [
        ("2000", Side.SELL, "0", 2500),  # through zero to the limit on the other side
        ("2000", Side.SELL, "600", 1900),
        ("2000", Side.BUY, "0", 0),  # beyond the limit already: no room is no negative one
        ("2000", Side.SELL, "2400", 100),
        ("-800", Side.BUY, "1400", 0),
    ],
)
def test_what_would_pass_from_beyond_the_limit_is_said(position, side, working, most):
    decision = decide(HALF, LIMITS, order("9000", side, position=position, working=working))
    assert (decision.allow, decision.max_quantity) == (False, most)
    assert decide(HALF, LIMITS, order(str(most), side, position=position, working=working)).allow is (most > 0)


def test_what_truly_reduces_passes_under_a_limit_and_says_it_too():
    decision = decide(HALF, LIMITS, order("100", Side.SELL, position="2000"))
    assert (decision.allow, decision.reason.code) == (True, ReasonCode.REDUCING)
    assert (decision.max_quantity, decision.limit) == (2500, Decimal(500))


def test_a_symbol_with_a_limit_of_0_may_only_be_reduced():
    banned = GatePolicy(position_limits={"AAPL": Decimal(0), "*": Decimal(500)})
    assert not decide(ACTIVE, banned, order("1")).allow
    assert decide(ACTIVE, banned, order("1", symbol="MSFT")).allow
    assert decide(ACTIVE, banned, order("5", Side.SELL, position="5")).allow
    assert not decide(ACTIVE, banned, order("6", Side.SELL, position="5")).allow


def test_without_a_limit_an_order_passes_and_the_factor_is_said():
    decision = decide(HALF, NO_LIMITS, order("1e6", position=None))
    assert (decision.allow, decision.max_quantity, decision.reason.code) == (True, None, ReasonCode.ACTIVE)
    assert "0.5" in decision.reason.message
    assert decide(HALF, NO_LIMITS, order("1", Side.SELL, position="5")).reason.code is ReasonCode.REDUCING


@pytest.mark.parametrize(
    "flawed",
    [
        order("0"),
        order("-1"),
        order("NaN"),
        order("Infinity"),
        order(side=None),
        order(working="-1"),
        order(working="NaN"),
        order(position="NaN"),
        order(position="-Infinity"),
        order(limit="-1"),
        order(limit="NaN"),
    ],
)
@pytest.mark.parametrize("at", [ACTIVE, REDUCE])
def test_an_order_that_is_none_is_denied_as_bad(flawed, at):
    decision = decide(at, NO_LIMITS, flawed)
    assert (decision.allow, decision.reason.code) == (False, ReasonCode.BAD_ORDER)


def test_a_cancel_has_no_flaw():
    assert Order(intent=Intent.CANCEL, quantity=Decimal("NaN")).flaw is None


def test_disabled_lets_everything_pass():
    at = snapshot(state=State.DISABLED, reason=Reason(code=ReasonCode.DISABLED, message="off"))
    for decision in (decide(at, LIMITS, order("1e9")), decide_blind(at, LIMITS, Intent.NEW)):
        assert (decision.allow, decision.reason.code) == (True, ReasonCode.DISABLED)


@pytest.mark.parametrize(
    ("at", "policy", "intent", "code"),
    [
        (ACTIVE, GatePolicy(blind_orders=False), Intent.NEW, ReasonCode.ACTIVE),
        (HALF, GatePolicy(), Intent.NEW, ReasonCode.ACTIVE),
        (HALF, GatePolicy(blind_orders=False), Intent.NEW, ReasonCode.BLIND_ORDER),
        (HALF, GatePolicy(blind_orders=False), Intent.REDUCE, ReasonCode.BLIND_ORDER),
        (HALF, GatePolicy(blind_orders=False, trust_reduce_claim=True), Intent.REDUCE, ReasonCode.REDUCING),
        (snapshot(factor=0.0), GatePolicy(), Intent.NEW, ReasonCode.BLIND_ORDER),
        (REDUCE, GatePolicy(), Intent.NEW, ReasonCode.KILLED),
        (REDUCE, GatePolicy(), Intent.REDUCE, ReasonCode.KILLED),
        (REDUCE, GatePolicy(trust_reduce_claim=True), Intent.REDUCE, ReasonCode.REDUCING),
        (REDUCE, GatePolicy(trust_reduce_claim=True), Intent.NEW, ReasonCode.KILLED),
        (HALTED, GatePolicy(trust_reduce_claim=True), Intent.REDUCE, ReasonCode.KILLED),
    ],
)
def test_blind_questions(at, policy, intent, code):
    decision = decide_blind(at, policy, intent)
    assert decision.reason.code is code
    assert decision.allow == (code in {ReasonCode.ACTIVE, ReasonCode.REDUCING})


@pytest.mark.parametrize("would_be", [HALTED, REDUCE, None])
def test_shadow_mode_says_what_would_be_and_blocks_nothing(would_be):
    at = snapshot(mode=Mode.SHADOW, would_be=would_be)
    decision = decide(at, LIMITS, order("5000"))
    assert (decision.allow, decision.reason.code) == (True, ReasonCode.SHADOW)
    assert "would be denied as" in decision.reason.message
    blind = decide_blind(at, LIMITS, Intent.NEW)
    assert blind.allow
    assert blind.reason.code is (ReasonCode.ACTIVE if would_be is None else ReasonCode.SHADOW)


def test_a_question_without_a_size_is_judged_in_shadow_mode_as_it_would_be():
    at = snapshot(mode=Mode.SHADOW, would_be=REDUCE)
    trusting = GatePolicy(trust_reduce_claim=True)
    assert decide_blind(at, trusting, Intent.REDUCE).reason.code is ReasonCode.REDUCING
    assert decide_blind(at, trusting, Intent.NEW).reason.code is ReasonCode.SHADOW


def test_a_denial_in_shadow_mode_keeps_its_numbers():
    at = snapshot(mode=Mode.SHADOW, would_be=snapshot(factor=0.5, reason=THROTTLED))
    decision = decide(at, LIMITS, order("5000"))
    assert (decision.allow, decision.max_quantity, decision.limit) == (True, None, None)
    assert (decision.reason.limit, decision.reason.since) == (500.0, 7.0)
    assert decision.reason.release == "nothing is blocked in shadow mode but by an operator's own kill"
    breach = Reason(code=ReasonCode.KILLED, message="m", trigger="dd", value=-0.2, limit=-0.15, since=9.0)
    killed = snapshot(Restriction.HALT, 0.0, breach, state=State.KILLED)
    told = decide(snapshot(mode=Mode.SHADOW, would_be=killed), LIMITS, order()).reason
    assert (told.trigger, told.value, told.limit, told.since) == ("dd", -0.2, -0.15, 9.0)


@pytest.mark.parametrize("blind_orders", [True, False])
def test_a_question_without_a_size_below_factor_1_is_told_who_holds_it_down(blind_orders):
    told = decide_blind(HALF, GatePolicy(blind_orders=blind_orders), Intent.NEW).reason
    assert (told.trigger, told.since, told.release) == ("vol", 7.0, "when vol clears")
    assert "0.5" in told.message


def test_trading_without_a_restriction_says_so_and_names_nobody():
    told = decide_blind(ACTIVE, NO_LIMITS, Intent.NEW).reason
    assert told == Reason(code=ReasonCode.ACTIVE, message=ALL_CLEAR.message)


def test_a_bad_order_is_told_its_flaw_and_that_it_is_the_callers():
    told = decide(ACTIVE, LIMITS, order("0")).reason
    assert told.message == "quantity 0 is not a positive number"
    assert told.release == "the caller, by sending a well-formed order"


def test_shadow_mode_reports_an_order_that_would_pass_as_it_is():
    at = snapshot(mode=Mode.SHADOW, would_be=HALF)
    assert decide(at, LIMITS, order("500")).reason.code is ReasonCode.ACTIVE


@pytest.mark.parametrize("would_be", [HALTED, None])
def test_an_operators_own_kill_blocks_in_shadow_mode(would_be):
    at = snapshot(Restriction.HALT, 0.0, KILLED, mode=Mode.SHADOW, state=State.KILLED, would_be=would_be)
    assert not decide(at, NO_LIMITS, order()).allow
    assert not decide_blind(at, NO_LIMITS, Intent.NEW).allow


@pytest.mark.parametrize(
    ("limits", "symbol", "own", "expected"),
    [
        ({}, "AAPL", None, None),
        ({}, "AAPL", "5", 5),
        ({"AAPL": 10, "*": 3}, "AAPL", None, 10),
        ({"AAPL": 10, "*": 3}, "MSFT", None, 3),
        ({"AAPL": 10}, "MSFT", None, None),
        ({"AAPL": 10}, "MSFT", "7", 7),
        ({"AAPL": 10, "*": 30}, "", None, 10),
        ({"AAPL": 10}, "AAPL", "7", 7),
        ({"AAPL": 10}, "AAPL", "70", 10),
    ],
)
def test_the_smaller_limit_holds(limits, symbol, own, expected):
    configured = {name: Decimal(value) for name, value in limits.items()}
    assert applicable_limit(configured, order(symbol=symbol, limit=own)) == expected


def allowed(orders, at=ACTIVE, policy=LIMITS):
    return [decision.allow for decision in decide_all(at, policy, orders)]


def test_each_order_of_a_list_counts_the_allowed_ones_before_it():
    assert allowed([order("600"), order("600"), order("400"), order("1")]) == [True, False, True, False]


def test_a_list_keeps_sides_and_symbols_apart():
    orders = [order("1000"), order("1000", Side.SELL), order("500", symbol="MSFT"), order("1", symbol="MSFT")]
    assert allowed(orders) == [True, True, True, False]


def test_an_order_without_symbol_may_be_of_any():
    unnamed = order("200", symbol="")
    assert allowed([order("400"), unnamed]) == [True, False]
    assert allowed([unnamed, order("900"), order("800")]) == [True, False, True]


def test_a_cancel_in_a_list_is_not_a_working_order():
    cancel = order("1000", intent=Intent.CANCEL)
    assert allowed([cancel, order("1000")]) == [True, True]


def test_a_list_adds_to_what_the_caller_says_is_working():
    tally = Tally(ACTIVE, LIMITS)
    assert tally.decide(order("300", working="500")).allow
    assert tally.decide(order("201", working="500")).max_quantity == 200


@pytest.mark.parametrize(
    ("number", "text"),
    [("500.0", "500"), ("1E+3", "1000"), ("0.10", "0.1"), ("-0.0", "0"), ("1e-7", "0.0000001"), ("100", "100")],
)
def test_numbers_are_written_plainly(number, text):
    assert plain(Decimal(number)) == text
