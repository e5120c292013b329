from dataclasses import replace
from typing import Any

import pytest

from sidecar.app.clock import stamp
from sidecar.app.status import recovery_document, status_document, trigger_document
from sidecar.core.compose import Overlay, compose
from sidecar.core.events import Approval, Cause, CauseCode, Demand, Waiver
from sidecar.core.orders import Intent, decide_blind
from sidecar.core.policy import RecoveryPolicy
from sidecar.core.states import Action, Instant, Mode, Restriction, Stage, State
from sidecar.core.transitions import Policies, Recovery, SwitchState
from sidecar.rules.model import Heartbeat, Operator, Rule, Step, Threshold
from sidecar.rules.triggers import Health, Level, Trigger

NOW = Instant(mono=1000.0, wall=1_700_000_000.0)
POLICIES = Policies(recovery=RecoveryPolicy(cooldown=300.0))
CAUSE = Cause(code=CauseCode.BREACH, reason="dd", time=NOW.wall, trigger="dd", by="rule dd", value=-0.2, limit=-0.15)
KILLED = SwitchState(
    state=State.KILLED, since=NOW.wall, epoch=4, factor=0.0, kill_restriction=Restriction.HALT, causes=(CAUSE,)
)
COOLDOWN = replace(
    KILLED,
    state=State.RECOVERING,
    recovery=Recovery(
        stage=Stage.COOLDOWN,
        by="bob",
        reason="fixed",
        requested=NOW.wall,
        approvals=(Approval(by="bob", by_verified=True, granted=NOW.wall, granted_mono=NOW.mono),),
        cooldown=600.0,
        stage_since=NOW.mono - 100.0,
    ),
)


def status(state: SwitchState, *demands: Demand, **extra: Any) -> dict[str, Any]:
    snapshot = compose("s", Mode.ACTIVE, state, demands, Overlay())
    return status_document(
        snapshot=snapshot,
        state=state,
        decision=decide_blind(snapshot, POLICIES.gate, Intent.NEW),
        demands=demands,
        now=NOW,
        policies=POLICIES,
        step_waits_for=None,
        extra=extra,
    )


def test_a_moment_is_written_in_utc_with_milliseconds() -> None:
    assert stamp(1_700_000_000.1234) == "2023-11-14T22:13:20.123Z"
    assert stamp(None) is None


def test_a_killed_switch_says_who_why_and_what_the_gate_answers() -> None:
    document = status(KILLED, ready=True)
    assert (document["state"], document["restriction"], document["stage"], document["epoch"]) == (
        "KILLED",
        "halt",
        "NONE",
        4,
    )
    assert document["causes"][0]["trigger"] == "dd"
    assert document["causes"][0]["time"] == "2023-11-14T22:13:20.000Z"
    assert document["gate"]["decision"] == "deny"
    assert document["gate"]["reason"]["code"] == "killed"
    assert document["ready"] is True


def test_what_holds_right_now_is_listed_with_its_numbers() -> None:
    demand = Demand(
        trigger="dd", action=Action.THROTTLE, factor=0.5, code=CauseCode.BREACH, message="m", value=-0.1, since=NOW.wall
    )
    waiver = Waiver(trigger="other", threshold=None, until=NOW.wall + 60.0, until_mono=NOW.mono + 60.0, by="bob")
    document = status(replace(SwitchState(), waivers=(waiver,)), demand)
    assert document["position_limit_factor"] == 0.5
    assert document["demands"][0]["action"] == "throttle"
    assert document["waivers"] == [
        {"trigger": "other", "threshold": None, "until": "2023-11-14T22:14:20.000Z", "by": "bob"}
    ]


def test_without_a_recovery_its_document_still_says_what_one_would_take() -> None:
    document = recovery_document(KILLED, NOW, POLICIES)
    assert (document["stage"], document["by"], document["approvals"]) == ("NONE", None, [])
    assert (document["approvals_needed"], document["cooldown_seconds"]) == (1, 300.0)
    assert document["next_step"] is None


def test_a_kill_soon_after_another_shows_the_longer_cooldown_that_its_recovery_will_take() -> None:
    assert recovery_document(replace(KILLED, kills_in_a_row=1), NOW, POLICIES)["cooldown_seconds"] == 600.0


def test_a_cooldown_shows_what_is_left_of_it() -> None:
    document = recovery_document(COOLDOWN, NOW, POLICIES)
    assert (document["cooldown_seconds"], document["cooldown_remaining_seconds"]) == (600.0, 500.0)
    assert document["approvals"] == [{"by": "bob", "by_verified": True, "time": "2023-11-14T22:13:20.000Z"}]


def test_a_recovery_that_waits_for_approval_shows_what_it_would_waive() -> None:
    waived = Waiver(trigger="dd", threshold=-0.25, until=NOW.wall + 60, until_mono=NOW.mono + 60, by="bob")
    asked = Recovery(stage=Stage.PENDING, by="bob", reason="fixed", requested=NOW.wall, waivers=(waived,))
    document = status(replace(KILLED, recovery=asked))
    assert document["waivers"] == []
    assert document["recovery"]["waivers"] == [
        {"trigger": "dd", "threshold": -0.25, "until": stamp(NOW.wall + 60), "by": "bob"}
    ]


def test_a_cooldown_that_is_over_shows_what_it_waits_for_and_not_before() -> None:
    def waits_for(now: Instant) -> object:
        return recovery_document(COOLDOWN, now, POLICIES, "rule dd is firing")["waits_for"]

    assert waits_for(NOW) is None
    assert waits_for(Instant(mono=NOW.mono + 500.0, wall=NOW.wall)) == "rule dd is firing"
    assert recovery_document(KILLED, NOW, POLICIES, "rule dd is firing")["waits_for"] is None


def test_a_gradual_restart_shows_its_next_step_and_what_it_waits_for() -> None:
    assert COOLDOWN.recovery is not None
    restarting = replace(
        COOLDOWN,
        state=State.ACTIVE,
        factor=0.5,
        recovery=replace(COOLDOWN.recovery, stage=Stage.GRADUAL_RESTART, stage_since=NOW.mono - 600.0),
    )
    document = recovery_document(restarting, NOW, POLICIES, "errors < 1: seen 5")
    assert document["next_step"] == {"factor": 0.75, "in_seconds": 3000.0, "waits_for": "errors < 1: seen 5"}


def test_no_approval_needed_is_shown_as_none_needed() -> None:
    policies = Policies(recovery=RecoveryPolicy(require_approval=False))
    assert recovery_document(KILLED, NOW, policies)["approvals_needed"] == 0


# Triggers

STEPS = (Step(at=-0.1, action=Action.THROTTLE, factor=0.5), Step(at=-0.13, action=Action.REDUCE_ONLY))
RULE = Rule(
    trigger="dd",
    group="g",
    condition=Threshold(query="q", operator=Operator.LT, threshold=-0.2, steps=STEPS),
    labels=(("severity", "critical"),),
)
FIRING = Level(firing_since=1.0, firing_wall=NOW.wall)


def test_a_trigger_shows_the_strictest_step_that_holds_and_how_much_of_the_limit_is_used() -> None:
    trigger = Trigger(steps=(FIRING, FIRING), value=-0.15, health=Health.OK, ready=True, evaluated=NOW.wall)
    document = trigger_document(RULE, trigger, None)
    assert (document["step"], document["limit_used_ratio"], document["armed"]) == (
        "reduce_only",
        pytest.approx(0.75),
        True,
    )
    assert (document["type"], document["operator"], document["threshold"]) == ("threshold", "lt", -0.2)
    assert document["labels"] == {"severity": "critical"}


def test_a_waiver_shows_its_own_threshold_and_a_full_one_leaves_the_rules() -> None:
    eased = Waiver(trigger="dd", threshold=-0.3, until=0.0, until_mono=0.0, by="bob")
    assert trigger_document(RULE, Trigger(), eased)["threshold"] == -0.3
    full = trigger_document(RULE, Trigger(), replace(eased, threshold=None))
    assert (full["threshold"], full["waived"]) == (-0.2, True)


def test_a_disabled_rule_is_never_armed_and_one_without_steps_has_none() -> None:
    rule = replace(RULE, enabled=False, condition=Heartbeat(query="b"))
    document = trigger_document(rule, Trigger(health=Health.OK), None)
    assert (document["armed"], document["step"], document["operator"]) == (False, None, None)
