"""Rules as values: operators, kinds, and which rules the gate depends on."""

import math

import pytest

from sidecar.core.states import Action
from sidecar.rules.model import (
    KINDS,
    AlertMatch,
    Condition,
    Connectivity,
    Expression,
    Group,
    Heartbeat,
    OnNoData,
    Operator,
    OrderRate,
    Rule,
    RuleSet,
    Step,
    Threshold,
    Watchdog,
)

DRAWDOWN = Threshold(query="dd", operator=Operator.LT, threshold=-0.15)
HARMLESS = OnNoData(then=Action.WARN, unreachable=Action.WARN)


def rule(condition: Condition = DRAWDOWN, *, action: Action = Action.KILL, on_no_data: OnNoData | None = None) -> Rule:
    return Rule(trigger="dd", group="g", condition=condition, action=action, on_no_data=on_no_data or OnNoData())


@pytest.mark.parametrize(
    ("operator", "below", "equal", "above", "symbol"),
    [
        (Operator.LT, True, False, False, "<"),
        (Operator.LE, True, True, False, "<="),
        (Operator.GT, False, False, True, ">"),
        (Operator.GE, False, True, True, ">="),
        (Operator.EQ, False, True, False, "=="),
        (Operator.NE, True, False, True, "!="),
    ],
)
def test_an_operator_compares_as_its_sign_says(
    operator: Operator, below: bool, equal: bool, above: bool, symbol: str
) -> None:
    assert [operator.holds(value, 1.0) for value in (0.0, 1.0, 2.0)] == [below, equal, above]
    assert operator.holds(math.nan, 1.0) is (operator is Operator.NE)
    assert operator.symbol == symbol


@pytest.mark.parametrize(
    ("operator", "threshold", "away"),
    [
        (Operator.LT, -0.15, True),
        (Operator.LE, -0.15, True),
        (Operator.LT, 0.15, False),
        (Operator.GT, 0.1, True),
        (Operator.GE, 0.1, True),
        (Operator.GT, -0.1, False),
        (Operator.GT, 0.0, False),
        (Operator.EQ, 1.0, False),
        (Operator.NE, -1.0, False),
    ],
)
def test_a_fraction_of_the_threshold_means_something_only_away_from_zero(
    operator: Operator, threshold: float, away: bool
) -> None:
    assert operator.points_away_from_zero(threshold) is away


@pytest.mark.parametrize(
    ("operator", "worst"),
    [(Operator.LT, -3.0), (Operator.GE, 5.0), (Operator.EQ, 1.0), (Operator.NE, -3.0)],
)
def test_the_value_shown_is_the_worst(operator: Operator, worst: float) -> None:
    assert operator.worst([1.0, -3.0, 5.0], 1.0) == worst


def test_where_none_breaches_the_first_value_is_shown() -> None:
    assert Operator.EQ.worst([2.0, 3.0], 1.0) == 2.0


@pytest.mark.parametrize(
    ("condition", "kind", "query"),
    [
        (DRAWDOWN, "threshold", "dd"),
        (Expression(expr="up == 0"), "expression", "up == 0"),
        (Heartbeat(query="beat"), "heartbeat", "beat"),
        (Watchdog(), "watchdog", None),
        (Connectivity(query="venue_up"), "connectivity", "venue_up"),
        (Connectivity(tcp="venue:443"), "connectivity", None),
        (AlertMatch(match=('a="b"',)), "alertmanager", None),
        (OrderRate(), "order_rate", None),
    ],
)
def test_a_rule_knows_its_kind_and_its_query(condition: Condition, kind: str, query: str | None) -> None:
    assert (rule(condition).kind, rule(condition).query) == (kind, query)
    assert isinstance(condition, KINDS[kind])


def test_a_heartbeat_is_missed_after_interval_times_max_missed() -> None:
    assert Heartbeat(query="beat").limit == 180.0


def test_a_rule_restricts_if_any_of_its_actions_does() -> None:
    assert rule().can_restrict
    assert not rule(action=Action.WARN, on_no_data=HARMLESS).can_restrict
    assert rule(action=Action.WARN, on_no_data=OnNoData(then=Action.WARN, unreachable=Action.THROTTLE)).can_restrict
    stepped = Threshold(
        query="dd", operator=Operator.LT, threshold=-0.15, steps=(Step(at=-0.1, action=Action.REDUCE_ONLY),)
    )
    assert rule(stepped, action=Action.WARN, on_no_data=HARMLESS).can_restrict
    assert not rule(OrderRate(), action=Action.WARN, on_no_data=HARMLESS).can_restrict


@pytest.mark.parametrize(
    ("enabled", "shadow", "enforcing"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_the_gate_depends_on_enabled_rules_outside_shadow(enabled: bool, shadow: bool, enforcing: bool) -> None:
    one = Rule(trigger="dd", group="g", condition=DRAWDOWN, enabled=enabled, shadow=shadow)
    assert one.enforcing is enforcing


def test_a_rule_set_lists_its_rules_in_order() -> None:
    first, second = rule(), rule(OrderRate())
    rules = RuleSet(
        groups=(Group(name="a", interval=1.0, rules=(first,)), Group(name="b", interval=5.0, rules=(second,)))
    )
    assert rules.rules == (first, second)
