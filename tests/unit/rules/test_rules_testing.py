"""The virtual clock: a rehearsal decides as the sidecar does, and says what was not as expected."""

from decimal import Decimal

import pytest

from sidecar.core.orders import Order, Side
from sidecar.core.policy import GatePolicy
from sidecar.core.states import Action, Restriction
from sidecar.core.transitions import Policies
from sidecar.rules.model import (
    AlertMatch,
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
from sidecar.rules.notation import expand
from sidecar.rules.readings import Answer, Series
from sidecar.rules.testing import (
    Check,
    Expectation,
    OrderCheck,
    Others,
    Rehearsal,
    RuleTest,
    Track,
    causes_text,
    evaluation_moments,
    evaluations,
    facts_of,
    run,
    shown,
)

BELOW = Threshold(query="x", operator=Operator.LT, threshold=-0.15)


def rule(condition=BELOW, trigger="dd", **more):
    return Rule(trigger=trigger, group="g", condition=condition, **more)


def rule_set(*rules, interval=1.0):
    return RuleSet(groups=(Group(name="g", interval=interval, rules=rules),))


def check(path, wanted):
    return Check(path=tuple(path.split(".")), wanted=wanted, origin="x.test.yaml:7")


def make_test(*rules, expect, interval=1.0, step=1.0, policies=None, **tracks):
    """Expectations are `{at: {path: wanted}}`; tracks are `trigger=notation` or a tuple of notations, one a series."""
    more = {key: tracks.pop(key) for key in ("others", "measured") if key in tracks}
    return RuleTest(
        name="a test",
        origin="x.test.yaml:1",
        rules=rule_set(*(rules or (rule(),)), interval=interval),
        step=step,
        tracks={
            name: tuple(
                Track(values=expand(one), labels={"n": str(index)})
                for index, one in enumerate((said,) if isinstance(said, str) else said)
            )
            for name, said in tracks.items()
        },
        expectations=tuple(
            Expectation(at=at, checks=tuple(check(path, wanted) for path, wanted in wants.items()))
            for at, wants in expect.items()
        ),
        policies=policies or Policies(),
        **more,
    )


def assert_passes(test, recorded=None):
    verdict = run(test) if recorded is None else run(test, recorded)
    assert verdict.passed, "\n".join(f"{one.at}: {one.what}: {one.wanted} / {one.seen}" for one in verdict.mismatches)


def test_a_breach_kills_and_the_kill_outlives_it():
    assert_passes(
        make_test(
            dd="-0.01x5 -0.16 -0.01x9",
            expect={
                5: {"state": "ACTIVE", "restriction": "none", "factor": 1.0, "gate.new": "allow", "causes": "none"},
                6: {
                    "state": "KILLED",
                    "restriction": "halt",
                    "factor": 0.0,
                    "causes": "dd: breach",
                    "gate.new": "deny",
                    "gate.reduce": "deny",
                    "gate.cancel": "allow",
                    "gate.reason": "killed",
                    "gate.trigger": "dd",
                    "triggers.dd.status": "firing",
                    "triggers.dd.value": -0.16,
                },
                9: {"state": "KILLED", "triggers.dd.status": "inactive", "triggers.dd.armed": True},
            },
        )
    )


def test_expectations_are_taken_in_order_of_time_however_they_are_written():
    assert_passes(make_test(dd="-0.01 -0.2", expect={1: {"state": "KILLED"}, 0: {"state": "ACTIVE"}}))


def test_an_expectation_that_is_not_met_says_what_was_seen_and_why():
    verdict = run(make_test(dd="-0.01 _", expect={1: {"state": "KILLED", "triggers.dd.health": "ok"}}))
    assert not verdict.passed
    state, health = verdict.mismatches
    assert (state.at, state.what, state.wanted, state.seen) == (1, "state", "KILLED", "ACTIVE")
    assert state.origin == "x.test.yaml:7"
    assert state.context == (
        "the switch: ACTIVE, restriction none, factor 1, causes none; gate: allow as active",
        "dd: inactive, health no_data, value -0.01, missing: the query returned nothing",
    )
    assert (health.what, health.seen) == ("triggers.dd.health", "no_data")
    assert health.context[1:] == state.context[1:]


def test_a_trigger_that_does_not_exist_matches_nothing():
    (mismatch,) = run(make_test(dd="0", expect={0: {"gate.colour": "red"}})).mismatches
    assert mismatch.seen is None


@pytest.mark.parametrize(
    ("said", "health"),
    [
        ("0 _", "no_data"),
        ("0", "no_data"),  # the sequence has ended
        ("0 stale", "no_data"),
        ("0 NaN", "error"),
        ("0 Inf", "error"),
        ("0 unreachable", "error"),
        ("0 failed", "error"),
        ("0 partial", "no_data"),
        ("0 0", "ok"),
    ],
)
def test_each_word_is_the_reading_it_stands_for(said, health):
    assert_passes(make_test(dd=said, expect={1: {"triggers.dd.health": health, "triggers.dd.armed": health == "ok"}}))


def test_one_partial_series_makes_the_whole_answer_partial():
    assert_passes(
        make_test(
            dd=("0 partial", "0 -0.2"),
            expect={1: {"triggers.dd.health": "no_data", "triggers.dd.status": "inactive", "state": "ACTIVE"}},
        )
    )


@pytest.mark.parametrize("said", ["0 _x99", "0 stalex99", "0 NaN NaN NaN failedx99", "0 partialx99"])
def test_an_answer_of_no_use_kills_after_hold_for(said):
    assert_passes(
        make_test(
            dd=said,
            expect={60: {"state": "ACTIVE"}, 61: {"state": "KILLED", "causes": "dd: no_data"}},
        )
    )


def test_an_unreachable_source_halts_and_lets_go():
    assert_passes(
        make_test(
            dd="0 unreachablex69 0x9",
            expect={
                60: {"restriction": "none"},
                61: {"restriction": "halt", "gate.reason": "halted", "state": "ACTIVE"},
                71: {"restriction": "none", "gate.new": "allow"},
            },
        )
    )


def test_the_gate_is_not_ready_before_a_fresh_reading_and_never_again():
    assert_passes(
        make_test(
            dd="_x3 0 _",
            expect={
                2: {"gate.new": "deny", "gate.cancel": "allow", "gate.reason": "not_ready", "state": "ACTIVE"},
                3: {"gate.new": "allow"},
                4: {"gate.new": "allow"},
            },
        )
    )


def test_a_test_without_rules_that_enforce_is_ready_at_once():
    warns = rule(action=Action.WARN, on_no_data=OnNoData(then=Action.WARN, unreachable=Action.WARN))
    assert_passes(make_test(warns, dd="_", expect={0: {"gate.new": "allow"}}))


def test_series_are_told_apart_and_a_source_speaks_for_all_of_them():
    one_only = rule(series=1)
    assert_passes(make_test(one_only, dd=("0 0", "_ 0"), expect={0: {"triggers.dd.health": "ok"}}))
    assert_passes(make_test(one_only, dd=("0 0", "_ 0"), expect={1: {"triggers.dd.health": "no_data"}}))
    assert_passes(make_test(dd=("0", "-0.2"), expect={0: {"state": "KILLED"}}))
    assert_passes(make_test(dd=("0 0", "0 unreachable"), expect={1: {"triggers.dd.health": "error"}}))
    assert_passes(make_test(dd=("0 0", "0 stale"), expect={1: {"triggers.dd.health": "no_data"}}))


def test_a_value_holds_from_its_step_to_the_next():
    assert_passes(make_test(dd="0 -0.2", step=5.0, expect={4: {"state": "ACTIVE"}, 5: {"state": "KILLED"}}))


def test_a_group_is_evaluated_in_its_own_interval():
    assert_passes(make_test(dd="0 -0.2x99", interval=5.0, expect={4: {"state": "ACTIVE"}, 5: {"state": "KILLED"}}))


def test_short_intervals_do_not_drift():
    test = make_test(
        dd="0x999 -0.2", interval=0.1, step=0.1, expect={99.9: {"state": "ACTIVE"}, 100: {"state": "KILLED"}}
    )
    assert_passes(test)
    assert list(evaluation_moments(test, "dd"))[-2:] == [99_900, 100_000]


def test_moments_are_those_of_the_group_that_the_trigger_is_in():
    groups = (
        Group(name="a", interval=1.0, rules=(rule(trigger="other"),)),
        Group(name="b", interval=15.0, rules=(rule(),)),
    )
    test = make_test(dd="0", expect={40: {"state": "ACTIVE"}})
    moved = RuleTest(
        name="", origin="", rules=RuleSet(groups=groups), step=1, tracks={}, expectations=test.expectations
    )
    assert list(evaluation_moments(moved, "dd")) == [0, 15_000, 30_000]
    assert evaluations(moved.rules, 40) == 41 + 3


def test_an_expression_fires_on_any_series_and_nothing_means_no():
    fires = rule(Expression(expr="x > 1"), action=Action.HALT)
    assert_passes(
        make_test(
            fires,
            dd="_ 5 _",
            expect={
                0: {"triggers.dd.status": "inactive", "triggers.dd.health": "ok"},
                1: {"restriction": "halt", "triggers.dd.step": None},
                2: {"restriction": "none", "triggers.dd.health": "ok"},
            },
        )
    )


def test_an_expression_that_wants_series_still_takes_an_empty_answer_for_no():
    assert_passes(
        make_test(
            rule(Expression(expr="x > 1"), series=1),
            dd="_ 5",
            expect={0: {"gate.new": "allow"}, 1: {"state": "KILLED"}},
        )
    )


def test_the_unix_time_of_heartbeats_counts_from_the_start():
    beat = rule(Heartbeat(query="beat", interval=1.0, max_missed=3))
    assert_passes(
        make_test(
            beat,
            dd="0+1x4 4x9",
            expect={7: {"triggers.dd.value": 3.0, "state": "ACTIVE"}, 8: {"triggers.dd.value": 4.0, "state": "KILLED"}},
        )
    )


def test_connectivity_is_looked_at_in_its_own_interval():
    venue = rule(Connectivity(query="up", interval=10.0, max_consecutive_failures=2), action=Action.HALT)
    assert_passes(
        make_test(
            venue,
            dd="1 0x99",
            expect={
                9: {"triggers.dd.value": 0.0},
                10: {"triggers.dd.value": 1.0},
                19: {"restriction": "none"},
                20: {"restriction": "halt"},
            },
        )
    )


def test_connectivity_is_looked_at_at_every_turn_until_it_has_been_seen():
    venue = rule(Connectivity(query="up", interval=10.0, max_consecutive_failures=2))
    assert_passes(make_test(venue, dd="_ _ 1", expect={1: {"gate.reason": "not_ready"}, 2: {"gate.new": "allow"}}))


def test_alerts_and_orders_are_counted_at_each_step_and_between_ticks():
    alert = rule(AlertMatch(match=("a=b",)), trigger="alert", action=Action.HALT)
    rate = rule(OrderRate(max_orders=10), trigger="rate")
    assert_passes(
        make_test(
            alert,
            rate,
            interval=10.0,
            alert="0 2 0",
            rate="10x2 11 0",
            expect={
                0: {"restriction": "none", "gate.new": "allow"},
                1: {"restriction": "halt", "triggers.alert.value": 2.0},
                2: {"restriction": "none"},
                3: {"state": "KILLED", "causes": "rate: breach"},
            },
        )
    )


def test_a_watchdog_takes_the_share_of_its_limit():
    assert_passes(make_test(rule(Watchdog()), dd="1 1.01", expect={0: {"state": "ACTIVE"}, 1: {"state": "KILLED"}}))


def test_a_rule_in_shadow_is_evaluated_and_does_nothing_and_one_that_is_off_is_not_evaluated():
    assert_passes(
        make_test(
            rule(shadow=True),
            rule(trigger="off", enabled=False),
            dd="-0.2",
            off="-0.2",
            expect={0: {"state": "ACTIVE", "triggers.dd.status": "firing", "triggers.off.health": "unknown"}},
        )
    )


@pytest.mark.parametrize(
    ("others", "seen"),
    [
        (Others.QUIET, {"triggers.dd.health": "ok", "gate.new": "allow"}),
        (Others.MISSING, {"triggers.dd.health": "no_data", "gate.reason": "not_ready"}),
        (Others.UNREACHABLE, {"triggers.dd.health": "error", "gate.reason": "not_ready"}),
    ],
)
def test_rules_without_results_are_what_the_test_says_of_others(others, seen):
    assert_passes(make_test(others=others, expect={5: seen}))


def test_what_has_no_query_is_never_missing():
    assert_passes(make_test(rule(Watchdog()), others=Others.MISSING, expect={0: {"gate.new": "allow"}}))


def test_measured_triggers_take_the_recorded_answers_and_fail_without():
    test = make_test(measured=frozenset({"dd"}), expect={0: {"state": "ACTIVE"}, 1: {"state": "KILLED"}})
    answers = {
        ("dd", at): Answer(series=(Series(value=value),), evaluated_at=at / 1000, oldest_sample=at / 1000)
        for at, value in ((0, 0.0), (1000, -0.2))
    }
    assert_passes(test, answers)
    silent = run(make_test(measured=frozenset({"dd"}), expect={0: {"triggers.dd.health": "ok"}}))
    assert "no answer was recorded" in silent.mismatches[0].context[1]


def test_steps_show_the_strictest_that_holds():
    ladder = Threshold(
        query="x",
        operator=Operator.LT,
        threshold=-0.15,
        steps=(
            Step(at=-0.13, action=Action.REDUCE_ONLY),
            Step(at=-0.05, action=Action.WARN),
            Step(at=-0.1, action=Action.THROTTLE, factor=0.5),
        ),
    )
    assert_passes(
        make_test(
            rule(ladder),
            dd="0 -0.06 -0.11 -0.14",
            expect={
                0: {"triggers.dd.step": None, "factor": 1.0},
                1: {"triggers.dd.step": "warn", "factor": 1.0},
                2: {"triggers.dd.step": "throttle", "factor": 0.5},
                3: {"triggers.dd.step": "reduce_only", "factor": 0.5, "restriction": "reduce_only"},
            },
        )
    )


def test_orders_are_decided_with_the_policies_of_the_test():
    policies = Policies(gate=GatePolicy(killed_policy=Restriction.REDUCE_ONLY, position_limits={"*": Decimal(100)}))
    order = Order(intent="new", symbol="A", side=Side.BUY, quantity=Decimal(60), position=Decimal(50))
    checks = tuple(
        check(path, wanted)
        for path, wanted in {"decision": "deny", "reason": "over_limit", "max_quantity": 50.0}.items()
    )
    good = make_test(dd="0", policies=policies, expect={0: {}})
    expectation = Expectation(at=0, checks=(), orders=(OrderCheck(order=order, checks=checks),))
    exit_ = Order(intent="new", symbol="A", side=Side.SELL, quantity=Decimal(50), position=Decimal(50))
    killed = Expectation(
        at=1,
        checks=(),
        orders=(OrderCheck(order=exit_, checks=(check("reason", "reducing"), check("decision", "deny"))),),
    )
    unlimited = Expectation(
        at=0, checks=(), orders=(OrderCheck(order=Order(intent="cancel"), checks=(check("max_quantity", None),)),)
    )
    verdict = run(
        RuleTest(
            name=good.name,
            origin=good.origin,
            rules=good.rules,
            step=1,
            tracks={"dd": (Track(values=expand("0 -0.2")),)},
            policies=policies,
            expectations=(expectation, unlimited, killed),
        )
    )
    (mismatch,) = verdict.mismatches
    assert (mismatch.what, mismatch.wanted, mismatch.seen) == ("order decision", "deny", "allow")
    assert "reducing" in mismatch.context[1]


def test_numbers_are_equal_up_to_their_last_digits_and_words_are_not_numbers():
    test = make_test(dd="0.1+0.2x1", expect={1: {"triggers.dd.value": 0.3}})
    assert_passes(test)
    for other in (None, 0.3000001, 0.2999999, -0.3, 1.2):
        assert not run(make_test(dd="0.3", expect={0: {"triggers.dd.value": other}})).passed
    assert not run(make_test(dd="0", expect={0: {"triggers.dd.value": 1e-9}})).passed


def test_without_steps_all_rules_are_evaluated_at_the_turns_of_their_group():
    asked = []
    alert, rate = rule(AlertMatch(match=("a=b",)), trigger="alert"), rule(OrderRate(), trigger="rate")

    def answering(one, now):
        asked.append((one.trigger, now.mono))

    rehearsal = Rehearsal(rules=rule_set(alert, rate), policies=Policies(), answering=answering)
    rehearsal.run_until(1)
    assert asked == [("alert", 0.0), ("rate", 0.0), ("alert", 1.0), ("rate", 1.0)]
    assert rehearsal.now.mono == 1.0
    assert facts_of(rehearsal)["state",] == "ACTIVE"


def test_a_rehearsal_without_rules_only_moves_its_clock():
    rehearsal = Rehearsal(rules=RuleSet(), policies=Policies(), answering=lambda *_: None)
    rehearsal.run_until(7)
    assert rehearsal.now.wall == 7.0


def test_facts_are_shown_as_they_are_written():
    assert [shown(one) for one in (None, True, 0.5, "KILLED")] == ["null", "true", "0.5", "KILLED"]
    assert causes_text({"b": "breach", "a": "no_data"}) == "a: no_data, b: breach"
    assert causes_text({}) == "none"
