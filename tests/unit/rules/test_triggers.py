"""Triggers over time: going bad and coming back, seeing and not seeing."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from sidecar.core.events import CauseCode
from sidecar.core.states import Action, Instant
from sidecar.rules.document import trigger_document, trigger_from_document
from sidecar.rules.model import (
    AlertMatch,
    Condition,
    Connectivity,
    Expression,
    Heartbeat,
    OnNoData,
    Operator,
    OrderRate,
    Rule,
    Step,
    Threshold,
    Watchdog,
)
from sidecar.rules.readings import Ambiguous, Failed, Fresh, Missing, Partial, Reading, Series, Stale
from sidecar.rules.triggers import (
    Health,
    Status,
    Trigger,
    demands,
    eased,
    evaluate,
    explain,
    fill,
    is_clear,
    limit_of,
    limit_used,
    with_threshold,
)

WALL = 1_700_000_000.0
DRAWDOWN = Threshold(query="dd", operator=Operator.LT, threshold=-0.15)
UNREACHABLE = Failed(reason="unreachable", message="connection refused", unreachable=True)
BAD: Sequence[Reading] = (
    Missing(),
    Stale(age=61.0, max_age=60.0),
    Ambiguous(seen=2, wanted=1),
    Partial(warnings=("half",)),
    Failed(reason="not_a_number", message="the value is nan"),
    UNREACHABLE,
)


def at(seconds: float) -> Instant:
    return Instant(mono=1000.0 + seconds, wall=WALL + seconds)


def rule(condition: Condition = DRAWDOWN, **changes: object) -> Rule:
    return replace(Rule(trigger="dd", group="g", condition=condition), **changes)  # type: ignore[arg-type]


def fresh(*values: float, when: float = 0.0, age: float | None = 1.0) -> Fresh:
    return Fresh(series=tuple(Series(value=value) for value in values), evaluated_at=WALL + when, age=age)


def nan_beside(*values: float) -> Failed:
    series = (Series(value=math.nan), *(Series(value=value) for value in values))
    return Failed(reason="not_a_number", message="the value is nan", series=series)


def play(one: Rule, *looks: tuple[float, Reading | float], start: Trigger | None = None) -> Trigger:
    """Evaluate at the given seconds; a bare number stands for one fresh series of that value."""
    trigger = start or Trigger()
    for seconds, seen in looks:
        reading = fresh(seen, when=seconds) if isinstance(seen, float) else seen
        trigger = evaluate(one, reading, trigger, at(seconds))
    return trigger


def actions(one: Rule, trigger: Trigger, seconds: float) -> list[Action]:
    return [demand.action for demand in demands(one, trigger, at(seconds))]


# Thresholds


def test_a_trigger_knows_nothing_before_its_first_evaluation() -> None:
    trigger = Trigger()
    assert (trigger.status, trigger.health, trigger.armed, trigger.ready) == (
        Status.INACTIVE,
        Health.UNKNOWN,
        False,
        False,
    )
    assert not is_clear(trigger)
    assert demands(rule(), trigger, at(0)) == ()


def test_a_breach_fires_at_once_and_clears_when_it_is_over() -> None:
    firing = play(rule(), (0, -0.16))
    assert (firing.status, firing.health, firing.value, firing.sample_age) == (Status.FIRING, Health.OK, -0.16, 1.0)
    (demand,) = demands(rule(), firing, at(0))
    assert (demand.action, demand.code, demand.since) == (Action.KILL, CauseCode.BREACH, WALL)
    assert (demand.value, demand.limit, demand.message) == (-0.16, -0.15, "dd: -0.16 < -0.15")
    assert not is_clear(firing)
    back = play(rule(), (5, -0.14), start=firing)
    assert (back.status, actions(rule(), back, 5), is_clear(back)) == (Status.INACTIVE, [], True)


def test_the_threshold_itself_is_no_breach_of_lt() -> None:
    assert play(rule(), (0, -0.15)).status is Status.INACTIVE


def test_any_series_is_enough_and_the_worst_is_shown() -> None:
    trigger = evaluate(rule(), fresh(0.1, -0.2, -0.01), Trigger(), at(0))
    assert (trigger.status, trigger.value) == (Status.FIRING, -0.2)


def test_firing_again_is_a_new_firing_with_its_own_since() -> None:
    again = play(rule(), (0, -0.2), (5, 0.0), (10, -0.2), (15, -0.3))
    assert demands(rule(), again, at(15))[0].since == WALL + 10


def test_for_waits_and_a_break_starts_it_anew() -> None:
    waiting = rule(for_=10.0)
    pending = play(waiting, (0, -0.2), (9.9, -0.2))
    assert (pending.status, actions(waiting, pending, 9.9), is_clear(pending)) == (Status.PENDING, [], False)
    assert play(waiting, (10, -0.2), start=pending).status is Status.FIRING
    broken = play(waiting, (9.95, 0.0), (10, -0.2), (19.9, -0.2), start=pending)
    assert broken.status is Status.PENDING
    assert play(waiting, (20, -0.2), start=broken).status is Status.FIRING


@pytest.mark.parametrize("bad", BAD, ids=repr)
def test_a_look_that_failed_resets_neither_for_nor_a_firing(bad: Reading) -> None:
    waiting = rule(for_=10.0)
    assert play(waiting, (0, -0.2), (5, bad), (10, -0.2)).status is Status.FIRING
    blind = play(rule(), (0, -0.2), (5, bad))
    assert (blind.status, blind.armed, is_clear(blind)) == (Status.FIRING, False, False)
    assert actions(rule(), blind, 5) == [Action.KILL]
    assert (blind.value, blind.message != "") == (-0.2, True)


def test_for_never_matures_on_bad_readings_alone() -> None:
    assert play(rule(for_=10.0), (0, -0.2), (100, Missing())).status is Status.PENDING


def test_keep_firing_for_counts_from_the_first_clear_look() -> None:
    keeping = rule(keep_firing_for=10.0)
    kept = play(keeping, (0, -0.2), (5, 0.0), (14.9, 0.0))
    assert kept.status is Status.FIRING
    assert play(keeping, (15, 0.0), start=kept).status is Status.INACTIVE


def test_a_breach_while_firing_is_kept_starts_the_keeping_anew_in_the_same_firing() -> None:
    keeping = rule(keep_firing_for=10.0)
    kept = play(keeping, (0, -0.2), (5, 0.0), (10, -0.2), (15, 0.0), (24.9, 0.0))
    assert kept.status is Status.FIRING
    assert demands(keeping, kept, at(24.9))[0].since == WALL
    assert play(keeping, (25, 0.0), start=kept).status is Status.INACTIVE


def test_time_without_sight_is_not_time_of_being_clear() -> None:
    keeping = rule(keep_firing_for=10.0)
    assert play(keeping, (0, -0.2), (5, Missing()), (500, 0.0)).status is Status.FIRING


@pytest.mark.parametrize(
    ("operator", "threshold", "clear", "bad", "between", "good"),
    [
        (Operator.LT, -0.15, -0.10, -0.16, -0.12, -0.10),
        (Operator.LE, -0.15, -0.10, -0.15, -0.11, -0.10),
        (Operator.GT, 0.10, 0.05, 0.11, 0.07, 0.05),
        (Operator.GE, 0.10, 0.05, 0.10, 0.06, 0.05),
    ],
)
def test_between_threshold_and_clear_it_goes_on_firing_but_does_not_begin(
    operator: Operator, threshold: float, clear: float, bad: float, between: float, good: float
) -> None:
    slow = rule(Threshold(query="q", operator=operator, threshold=threshold, clear=clear))
    assert play(slow, (0, between)).status is Status.INACTIVE
    firing = play(slow, (0, bad), (5, between))
    assert firing.status is Status.FIRING
    assert play(slow, (10, good), start=firing).status is Status.INACTIVE


def test_keeping_starts_only_beyond_clear() -> None:
    slow = rule(replace(DRAWDOWN, clear=-0.10), keep_firing_for=10.0)
    kept = play(slow, (0, -0.2), (1, -0.05), (9, -0.12), (12, -0.05), (21.9, -0.05))
    assert kept.status is Status.FIRING
    assert play(slow, (22, -0.05), start=kept).status is Status.INACTIVE


@pytest.mark.parametrize(("operator", "bad", "good"), [(Operator.EQ, 1.0, 2.0), (Operator.NE, 2.0, 1.0)])
def test_equality_has_no_hysteresis(operator: Operator, bad: float, good: float) -> None:
    one = rule(Threshold(query="q", operator=operator, threshold=1.0, clear=5.0))
    firing = play(one, (0, bad))
    assert firing.status is Status.FIRING
    assert play(one, (1, good), start=firing).status is Status.INACTIVE


# Steps

STEPPED = rule(
    replace(
        DRAWDOWN,
        steps=(
            Step(at=-0.075, fraction=0.5, action=Action.WARN),
            Step(at=-0.1125, fraction=0.75, action=Action.THROTTLE, factor=0.5),
            Step(at=-0.135, fraction=0.9, action=Action.REDUCE_ONLY),
        ),
    )
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (-0.07, []),
        (-0.075, [Action.WARN]),
        (-0.12, [Action.WARN, Action.THROTTLE]),
        (-0.14, [Action.WARN, Action.THROTTLE, Action.REDUCE_ONLY]),
        (-0.16, [Action.KILL, Action.WARN, Action.THROTTLE, Action.REDUCE_ONLY]),
    ],
)
def test_steps_hold_on_the_way_to_the_threshold(value: float, expected: list[Action]) -> None:
    trigger = play(STEPPED, (0, value))
    assert actions(STEPPED, trigger, 0) == expected
    assert actions(STEPPED, play(STEPPED, (5, 0.0), start=trigger), 5) == []


def test_a_step_says_its_own_limit_and_factor() -> None:
    throttle = demands(STEPPED, play(STEPPED, (0, -0.12)), at(0))[1]
    assert (throttle.factor, throttle.limit) == (0.5, -0.1125)
    assert throttle.message == "dd: -0.12 has reached -0.1125 on the way to -0.15"


def test_steps_of_a_changed_rule_start_anew() -> None:
    trigger = play(STEPPED, (0, -0.12))
    assert len(play(rule(), (5, -0.12), start=trigger).steps) == 0


# What stands beside a value that is no number


def test_a_nan_hides_no_breach_beside_it() -> None:
    trigger = play(rule(), (0, nan_beside(-0.2)))
    assert (trigger.status, trigger.health, trigger.value) == (Status.FIRING, Health.ERROR, -0.2)
    assert actions(rule(), trigger, 0) == [Action.KILL]
    assert not trigger.ready


def test_a_nan_hides_no_step_beside_it_and_lifts_none() -> None:
    partly = play(STEPPED, (0, nan_beside(-0.12)))
    assert actions(STEPPED, partly, 0) == [Action.WARN, Action.THROTTLE]
    assert partly.value == -0.12
    later = play(STEPPED, (5, nan_beside(0.0)), start=partly)
    assert actions(STEPPED, later, 5) == [Action.WARN, Action.THROTTLE]
    assert later.value == -0.12


def test_good_values_beside_a_nan_clear_nothing() -> None:
    trigger = play(rule(), (0, -0.2), (5, nan_beside(0.0)))
    assert (trigger.status, trigger.armed) == (Status.FIRING, False)


def test_a_breach_beside_a_nan_counts_for_for() -> None:
    waiting = rule(for_=10.0)
    assert play(waiting, (0, nan_beside(-0.2)), (10, nan_beside(-0.2))).status is Status.FIRING


def test_blindness_counts_beside_a_seen_breach() -> None:
    soft = rule(action=Action.WARN)
    trigger = play(soft, (0, 0.0), (1, nan_beside(-0.2)), (61, nan_beside(-0.2)))
    assert actions(soft, trigger, 61) == [Action.WARN, Action.KILL]


def test_nothing_but_nan_is_blind() -> None:
    assert play(rule(), (0, nan_beside())).status is Status.INACTIVE
    assert play(rule(), (0, nan_beside(math.inf, -math.inf))).status is Status.INACTIVE


def test_an_expression_fires_on_any_series_even_nan() -> None:
    one = rule(Expression(expr="x"))
    trigger = play(one, (0, nan_beside()))
    assert (trigger.status, trigger.health) == (Status.FIRING, Health.ERROR)


def test_a_beat_that_is_no_number_may_have_been_the_newest() -> None:
    one = rule(Heartbeat(query="beat"))
    trigger = play(one, (0, nan_beside(WALL - 1e6)))
    assert (trigger.status, trigger.health) == (Status.INACTIVE, Health.ERROR)


# Blindness


@pytest.mark.parametrize(
    ("bad", "health", "action"),
    [
        (BAD[0], Health.NO_DATA, Action.KILL),
        (BAD[1], Health.NO_DATA, Action.KILL),
        (BAD[2], Health.NO_DATA, Action.KILL),
        (BAD[3], Health.NO_DATA, Action.KILL),
        (BAD[4], Health.ERROR, Action.KILL),
        (BAD[5], Health.ERROR, Action.HALT),
    ],
)
def test_bad_readings_act_after_hold_for_as_the_rule_says(bad: Reading, health: Health, action: Action) -> None:
    blind = play(rule(), (0, 0.0), (5, bad))
    assert (blind.health, blind.status, is_clear(blind)) == (health, Status.INACTIVE, False)
    assert actions(rule(), blind, 64.9) == []
    assert actions(rule(), blind, 65) == [action]
    (demand,) = demands(rule(), blind, at(65))
    assert (demand.code, demand.since) == (CauseCode.NO_DATA, WALL + 5)
    assert "for more than 60 s" in demand.message
    back = play(rule(), (70, 0.0), start=blind)
    assert (back.blindness, back.message, actions(rule(), back, 200), is_clear(back)) == (None, "", [], True)


def test_blindness_counts_from_its_first_bad_reading_whatever_kind() -> None:
    blind = play(rule(), (0, 0.0), (5, Missing()), (30, BAD[4]), (60, BAD[1]))
    assert actions(rule(), blind, 65) == [Action.KILL]


def test_a_restarting_source_stops_but_does_not_latch() -> None:
    blind = play(rule(), (0, 0.0), (5, UNREACHABLE), (400, UNREACHABLE))
    assert actions(rule(), blind, 400) == [Action.HALT]
    answering = play(rule(), (405, Missing()), start=blind)
    assert actions(rule(), answering, 405) == [Action.HALT]
    assert actions(rule(), answering, 464.9) == [Action.HALT]
    assert actions(rule(), answering, 465) == [Action.HALT, Action.KILL]


def test_a_source_that_goes_away_does_not_lift_what_its_useless_answers_led_to() -> None:
    odd = rule(on_no_data=OnNoData(then=Action.HALT, unreachable=Action.WARN))
    blind = play(odd, (0, 0.0), (5, Missing()), (70, Missing()), (75, UNREACHABLE), (80, UNREACHABLE))
    assert actions(odd, blind, 80) == [Action.WARN, Action.HALT]


def test_a_source_that_comes_and_goes_does_not_put_it_off_for_ever() -> None:
    looks: list[tuple[float, Reading]] = [(second, (Missing(), UNREACHABLE)[second % 2]) for second in range(119)]
    blind = play(rule(), (-1, 0.0), *looks)
    assert actions(rule(), blind, 118) == [Action.HALT]
    blind = play(rule(), (119, UNREACHABLE), (120, Missing()), start=blind)
    assert actions(rule(), blind, 120) == [Action.HALT, Action.KILL]


def test_time_of_being_unreachable_puts_off_what_useless_answers_lead_to_by_as_much() -> None:
    # Away from 35 to 65: thirty seconds of useless answers before, so thirty more are wanted after.
    looks = [(5.0, Missing()), (35.0, UNREACHABLE), (50.0, UNREACHABLE), (65.0, Missing())]
    blind = play(rule(on_no_data=OnNoData(unreachable=Action.WARN)), (0, 0.0), *looks)
    assert [actions(rule(), blind, seconds).count(Action.KILL) for seconds in (94.9, 95.0)] == [0, 1]
    away = play(rule(), *((60.0 + seconds, UNREACHABLE) for seconds in (0.0, 100.0)), start=play(rule(), (0, 0.0)))
    assert actions(rule(), away, 400) == [Action.HALT]
    away = play(rule(), (20, UNREACHABLE), (90, UNREACHABLE), start=play(rule(), (0, 0.0), (10, Missing())))
    assert Action.KILL not in actions(rule(), away, 400)  # ten seconds of answers, however long it has been away


def test_what_is_said_of_blindness_is_the_latest_look() -> None:
    def said(*looks: tuple[float, Reading]) -> str:
        blind = play(rule(), (0, 0.0), *looks)
        return demands(rule(), blind, at(500))[0].message

    assert "connection refused" in said((5, UNREACHABLE))
    assert "connection refused" in said((5, Missing()), (10, UNREACHABLE))
    assert "the value is nan" in said((5, UNREACHABLE), (10, BAD[4]))


def test_nothing_is_done_before_a_first_fresh_reading() -> None:
    for bad in BAD:
        blind = play(rule(), (0, bad), (1e6, bad))
        assert (actions(rule(), blind, 1e6), blind.ready, is_clear(blind)) == ([], False, False)


def test_a_rule_that_a_reload_added_has_its_hold_for_to_become_ready() -> None:
    added = Trigger(graced=True)
    blind = play(rule(), (0, Missing()), start=added)
    assert actions(rule(), blind, 59.9) == []
    assert actions(rule(), blind, 60) == [Action.KILL]
    assert play(rule(), (30, 0.0), start=blind).ready


@pytest.mark.parametrize(
    ("own", "no_data", "expected"), [(0.5, None, 0.5), (0.5, 0.25, 0.25), (0.5, 0.0, 0.0), (None, 0.3, 0.3)]
)
def test_a_blind_throttle_takes_its_own_factor_even_zero(
    own: float | None, no_data: float | None, expected: float
) -> None:
    throttled = rule(factor=own, on_no_data=OnNoData(then=Action.THROTTLE, factor=no_data))
    blind = play(throttled, (0, 0.0), (1, Missing()))
    assert demands(throttled, blind, at(61))[0].factor == expected


def test_a_fresh_reading_of_nothing_is_missing() -> None:
    conditions: list[Condition] = [DRAWDOWN, Heartbeat(query="b"), Watchdog(), Connectivity(query="up"), OrderRate()]
    for condition in conditions:
        trigger = play(rule(condition), (0, fresh()))
        assert (trigger.health, trigger.ready, trigger.armed) == (Health.NO_DATA, False, False)


# The other kinds


def test_an_expression_fires_on_any_series_and_clears_on_none() -> None:
    one = rule(Expression(expr="up == 0"))
    firing = play(one, (0, fresh(0.0, 0.0)))
    assert (firing.status, firing.value) == (Status.FIRING, 2.0)
    assert demands(one, firing, at(0))[0].message == "dd: the expression returned 2 series"
    back = play(one, (5, fresh()), start=firing)
    assert (back.status, is_clear(back)) == (Status.INACTIVE, True)


def test_an_alert_gives_a_cause_of_its_own_kind() -> None:
    one = rule(AlertMatch(match=('a="b"',)))
    firing = play(one, (0, 1.0))
    (demand,) = demands(one, firing, at(0))
    assert (demand.code, demand.message, demand.limit) == (
        CauseCode.ALERT,
        "dd: 1 matching alert(s) of Alertmanager firing",
        None,
    )
    assert play(one, (1, fresh()), start=firing).status is Status.INACTIVE


@pytest.mark.parametrize(("age", "status"), [(0.0, Status.INACTIVE), (180.0, Status.INACTIVE), (180.5, Status.FIRING)])
def test_a_heartbeat_fires_beyond_its_deadline(age: float, status: Status) -> None:
    trigger = play(rule(Heartbeat(query="beat")), (0, WALL - age))
    assert (trigger.status, trigger.value) == (status, age)


def test_a_heartbeat_comes_back_with_the_newest_of_several_beats() -> None:
    one = rule(Heartbeat(query="beat"))
    dead = play(one, (0, fresh(WALL - 1e6, WALL - 181.0)))
    assert dead.status is Status.FIRING
    assert "the last beat is 181 s old, more than 180 s" in demands(one, dead, at(0))[0].message
    assert play(one, (1, fresh(WALL - 1e6, WALL, when=1)), start=dead).status is Status.INACTIVE


@pytest.mark.parametrize(("ahead", "health"), [(5.0, Health.OK), (5.5, Health.ERROR), (1e9, Health.ERROR)])
def test_a_beat_from_the_future_is_failed_and_clears_nothing(ahead: float, health: Health) -> None:
    one = rule(Heartbeat(query="beat"))
    dead = play(one, (0, WALL - 1e6))
    trigger = play(one, (0, WALL + ahead), start=dead)
    assert trigger.health is health
    assert trigger.status is (Status.INACTIVE if health is Health.OK else Status.FIRING)


def test_a_beat_from_the_future_leads_to_what_useless_answers_lead_to() -> None:
    one = rule(Heartbeat(query="beat"))
    blind = play(one, (0, WALL), (5, fresh(WALL + 1e6, when=5)))
    assert actions(one, blind, 65) == [Action.KILL]
    assert "future: the last beat is" in demands(one, blind, at(65))[0].message


@pytest.mark.parametrize(
    "condition", [DRAWDOWN, Heartbeat(query="b"), Watchdog(), Connectivity(query="up"), Expression(expr="x")]
)
def test_the_age_of_what_was_read_is_shown(condition: Condition) -> None:
    assert evaluate(rule(condition), fresh(1.0, age=7.5), Trigger(), at(0)).sample_age == 7.5


def test_a_throttle_takes_the_rules_own_factor() -> None:
    one = rule(action=Action.THROTTLE, factor=0.3)
    assert [(demand.action, demand.factor) for demand in demands(one, play(one, (0, -0.2)), at(0))] == [
        (Action.THROTTLE, 0.3)
    ]


@pytest.mark.parametrize(("operator", "shown"), [(Operator.EQ, 2.0), (Operator.NE, 2.5)])
def test_of_several_values_the_one_that_breaches_is_shown(operator: Operator, shown: float) -> None:
    one = rule(Threshold(query="q", operator=operator, threshold=2.0))
    trigger = evaluate(one, fresh(2.0, 2.5), Trigger(), at(0))
    assert (trigger.status, trigger.value) == (Status.FIRING, shown)


def test_connectivity_counts_failures_in_a_row() -> None:
    one = rule(Connectivity(tcp="venue:443"))
    twice = play(one, (0, 0.0), (30, 0.0))
    assert (twice.status, twice.failures, twice.value) == (Status.INACTIVE, 2, 2.0)
    assert play(one, (60, 1.0), (90, 0.0), (120, 0.0), start=twice).status is Status.INACTIVE
    down = play(one, (60, 0.0), start=twice)
    assert (down.status, demands(one, down, at(60))[0].limit) == (Status.FIRING, 3.0)
    assert "failed 3 times in a row" in demands(one, down, at(60))[0].message
    back = play(one, (90, 1.0), start=down)
    assert (back.status, back.failures) == (Status.INACTIVE, 0)


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0])
def test_connectivity_takes_nothing_but_one_as_up(value: float) -> None:
    assert play(rule(Connectivity(query="up")), (0, fresh(1.0, value))).failures == 1


@pytest.mark.parametrize("bad", BAD, ids=repr)
def test_a_question_that_cannot_be_answered_neither_counts_nor_forgives(bad: Reading) -> None:
    one = rule(Connectivity(query="up"))
    trigger = play(one, (0, 0.0), (30, 0.0), (60, bad))
    assert (trigger.failures, trigger.status) == (2, Status.INACTIVE)
    assert play(one, (90, 0.0), start=trigger).status is Status.FIRING


def test_a_venue_seen_down_beside_a_nan_counts() -> None:
    one = rule(Connectivity(query="up"))
    assert play(one, (0, nan_beside(0.0)), (30, nan_beside(0.0)), (60, nan_beside(0.0))).status is Status.FIRING
    assert play(one, (0, 0.0), (30, nan_beside(1.0))).failures == 1


@pytest.mark.parametrize(
    ("condition", "at_limit", "beyond"), [(Watchdog(), 1.0, 1.01), (OrderRate(max_orders=100), 100.0, 101.0)]
)
def test_a_rate_or_share_fires_beyond_its_limit(condition: Condition, at_limit: float, beyond: float) -> None:
    one = rule(condition)
    assert play(one, (0, at_limit)).status is Status.INACTIVE
    firing = play(one, (0, fresh(0.0, beyond)))
    assert (firing.status, firing.value) == (Status.FIRING, beyond)
    assert demands(one, firing, at(0))[0].message == "dd fires"
    assert play(one, (1, at_limit), start=firing).status is Status.INACTIVE


# Waivers


def test_a_waived_rule_rearms_at_its_new_threshold() -> None:
    waived = with_threshold(STEPPED, -0.30)
    assert isinstance(waived.condition, Threshold)
    assert [step.at for step in waived.condition.steps] == pytest.approx([-0.15, -0.225, -0.27])
    firing = play(STEPPED, (0, -0.16))
    eased = play(waived, (1, -0.16), start=firing)
    assert (eased.status, actions(waived, eased, 1)) == (Status.INACTIVE, [Action.WARN])
    again = play(waived, (2, -0.31), start=eased)
    assert demands(waived, again, at(2))[0].since == WALL + 2
    assert play(STEPPED, (3, -0.16), start=eased).status is Status.FIRING


def test_a_waived_firing_ends_at_the_first_look_whatever_kept_it() -> None:
    sticky = rule(replace(DRAWDOWN, clear=-0.05), keep_firing_for=3600.0)
    firing = play(sticky, (0, -0.16))
    assert play(with_threshold(sticky, -0.30), (1, -0.16), start=firing).status is Status.INACTIVE


def test_absolute_steps_do_not_outlive_a_waiver() -> None:
    absolute = rule(replace(DRAWDOWN, steps=(Step(at=-0.1, action=Action.HALT),)))
    waived = with_threshold(absolute, -0.30)
    assert actions(waived, play(waived, (0, -0.16)), 0) == []


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf])
def test_a_rule_cannot_be_waived_to_no_number(threshold: float) -> None:
    with pytest.raises(ValueError, match="give a finite number"):
        with_threshold(rule(), threshold)


def test_only_a_threshold_rule_has_a_threshold_to_waive_to() -> None:
    with pytest.raises(ValueError, match="of type heartbeat and has no threshold"):
        with_threshold(rule(Heartbeat(query="beat")), 1.0)


# Restarts


def restart(trigger: Trigger, before: float, after: float) -> Trigger:
    document = trigger_document(trigger, at(before))
    return Trigger() if document is None else trigger_from_document(document, at(after))


def test_a_restored_firing_trigger_asks_at_once_and_clears_only_on_a_fresh_reading() -> None:
    restored = restart(play(rule(), (0, -0.2)), 5, 900)
    assert (restored.status, restored.health, restored.ready) == (Status.FIRING, Health.UNKNOWN, False)
    (demand,) = demands(rule(), restored, at(900))
    assert (demand.since, demand.value) == (WALL, -0.2)
    assert not is_clear(restored)
    blind = play(rule(), (901, Missing()), start=restored)
    assert actions(rule(), blind, 901) == [Action.KILL]
    assert play(rule(), (902, 0.0), start=restored).status is Status.INACTIVE


def test_a_restored_pending_trigger_goes_on_from_the_time_it_had() -> None:
    waiting = rule(for_=10.0)
    restored = restart(play(waiting, (0, -0.2)), 6, 1000)
    assert play(waiting, (1003.9, -0.2), start=restored).status is Status.PENDING
    assert play(waiting, (1004, -0.2), start=restored).status is Status.FIRING


def test_a_restored_keeping_goes_on_from_the_time_it_had() -> None:
    keeping = rule(keep_firing_for=10.0)
    restored = restart(play(keeping, (0, -0.2), (5, 0.0)), 11, 1000)
    assert play(keeping, (1003.9, 0.0), start=restored).status is Status.FIRING
    assert play(keeping, (1004, 0.0), start=restored).status is Status.INACTIVE


def test_a_restored_trigger_without_its_moment_still_asks() -> None:
    firing = play(rule(), (0, -0.2))
    odd = replace(firing, main=replace(firing.main, firing_wall=None))
    assert demands(rule(), odd, at(0))[0].since == 0.0


# Words and numbers for people


@pytest.mark.parametrize(
    ("condition", "limit"),
    [
        (DRAWDOWN, -0.15),
        (Heartbeat(query="b"), 180.0),
        (Connectivity(query="up"), 3.0),
        (OrderRate(), 100.0),
        (Watchdog(), 1.0),
        (Expression(expr="x"), None),
    ],
)
def test_a_rule_knows_its_limit(condition: Condition, limit: float | None) -> None:
    assert limit_of(condition) == limit


@pytest.mark.parametrize(
    ("condition", "trigger", "used"),
    [
        (DRAWDOWN, Trigger(value=-0.075), 0.5),
        (DRAWDOWN, Trigger(value=0.5), 0.0),
        (DRAWDOWN, Trigger(), None),
        (Threshold(query="q", operator=Operator.GT, threshold=-1.0), Trigger(value=1.0), None),
        (Threshold(query="q", operator=Operator.GT, threshold=0.0), Trigger(value=1.0), None),
        (Heartbeat(query="b"), Trigger(value=90.0), 0.5),
        (Heartbeat(query="b"), Trigger(value=-3.0), 0.0),
        (OrderRate(), Trigger(value=50.0), 0.5),
        (Watchdog(), Trigger(value=0.9), 0.9),
        (Connectivity(query="up"), Trigger(value=2.0, failures=2), 2 / 3),
        (Connectivity(query="up"), Trigger(value=2.0, failures=1), 1 / 3),
        (Expression(expr="x"), Trigger(value=1.0), None),
    ],
)
def test_how_much_of_its_limit_a_rule_has_used(condition: Condition, trigger: Trigger, used: float | None) -> None:
    assert limit_used(rule(condition), trigger) == (None if used is None else pytest.approx(used))


def test_a_limit_without_a_number_has_no_use() -> None:
    one = rule(AlertMatch(match=()))
    assert limit_used(one, Trigger(value=1.0)) is None


def test_a_rules_own_summary_is_filled_in() -> None:
    told = rule(annotations=(("summary", "{{ trigger }} at {{value}} beyond {{ threshold }}"),))
    assert explain(told, -0.2) == "dd at -0.2 beyond -0.15"
    assert explain(told, None) == "dd at unknown beyond -0.15"
    step = Step(at=-0.1, action=Action.WARN)
    assert explain(told, -0.12, step) == "dd: -0.12 has reached -0.1 on the way to -0.15"
    assert fill("{{ threshold }}!", rule(Expression(expr="x")), 1.0) == "!"
    assert explain(rule(), None) == "dd: unknown < -0.15"


def test_a_waiver_eases_a_threshold_and_nothing_else() -> None:
    drawdown = rule()
    assert limit_of(eased(drawdown, -0.2).condition) == -0.2
    assert eased(drawdown, None) is drawdown
    other = rule(Expression(expr="up == 0"))
    assert eased(other, -0.2) is other
