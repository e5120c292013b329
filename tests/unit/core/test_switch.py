"""The holder of state: tightenings are in force at once, loosenings only when committed, firing rules kill once."""

from dataclasses import replace

import pytest

from sidecar.core.compose import Overlay
from sidecar.core.errors import InvalidTransition, InvariantViolation
from sidecar.core.events import (
    Approval,
    BeginRecovery,
    Cause,
    CauseCode,
    Demand,
    EndWaiver,
    HoldRemoved,
    Kill,
    Reopen,
    RequestRecovery,
    StepUp,
    Waiver,
)
from sidecar.core.policy import GatePolicy, RecoveryPolicy
from sidecar.core.snapshot import ReasonCode
from sidecar.core.states import Action, Instant, Mode, Restriction, Stage, State
from sidecar.core.switch import Change, Proposal, Switch
from sidecar.core.transitions import MAX_CAUSES, Policies, SwitchState

NOW = Instant(mono=10_000.0, wall=1_700_000_000.0)
LATER = Instant(mono=NOW.mono + 300, wall=NOW.wall + 300)
LAX = Policies(recovery=RecoveryPolicy(require_triggers_clear=False))


def make(
    state: SwitchState | None = None, *, mode: Mode = Mode.ACTIVE, policies: Policies | None = None, ready: bool = True
) -> Switch:
    switch = Switch(name="fx/bot-0", mode=mode, state=state or SwitchState(), policies=policies or Policies())
    if ready:
        switch.cover(Overlay())
    return switch


def kill(reason: str = "looks wrong") -> Kill:
    return Kill(cause=Cause(code=CauseCode.OPERATOR, reason=reason, time=NOW.wall, by="ann"))


def asks(trigger: str, action: Action = Action.KILL, since: float = 1.0, code: CauseCode = CauseCode.BREACH) -> Demand:
    return Demand(trigger=trigger, action=action, code=code, message=f"{trigger} fires", since=since, factor=0.5)


def request(*waivers: Waiver) -> RequestRecovery:
    approval = Approval(by="ann", by_verified=True, granted=NOW.wall, granted_mono=NOW.mono)
    return RequestRecovery(by="ann", reason="fixed", approval=approval, waivers=waivers)


def waive(trigger: str, threshold: float | None = None) -> Waiver:
    return Waiver(trigger=trigger, threshold=threshold, until=NOW.wall + 9e4, until_mono=NOW.mono + 9e4, by="ann")


def loosen(switch: Switch, event: BeginRecovery | Reopen | StepUp, now: Instant = NOW) -> None:
    proposal = switch.apply(event, now)
    assert isinstance(proposal, Proposal)
    assert switch.commit(proposal)


def begin(switch: Switch, *waivers: Waiver) -> None:
    switch.apply(request(*waivers), NOW)
    loosen(switch, BeginRecovery())


def test_a_new_switch_denies_until_it_is_told_that_its_state_is_known() -> None:
    for mode in (Mode.ACTIVE, Mode.SHADOW):
        snapshot = make(mode=mode, ready=False).snapshot()
        assert (snapshot.gate_restriction, snapshot.reason.code) == (Restriction.HALT, ReasonCode.NOT_READY)


def test_a_tightening_is_in_force_when_apply_returns() -> None:
    switch = make()
    change = switch.apply(kill(), NOW)
    assert isinstance(change, Change)
    assert switch.state is change.after
    assert switch.snapshot().gate_restriction is Restriction.HALT
    assert (change.before.state, change.after.state, change.at) == (State.ACTIVE, State.KILLED, NOW)


def test_an_event_without_effect_gives_no_change() -> None:
    switch = make()
    assert switch.apply(EndWaiver(trigger="dd"), NOW) is None
    assert switch.state.epoch == 0


def test_a_refused_event_changes_nothing() -> None:
    switch = make()
    before = switch.state
    with pytest.raises(InvalidTransition):
        switch.apply(Reopen(), NOW)
    assert switch.state is before


def test_a_loosening_counts_only_when_committed() -> None:
    switch = make()
    switch.apply(kill(), NOW)
    switch.apply(request(), NOW)
    proposal = switch.apply(BeginRecovery(), NOW)
    assert isinstance(proposal, Proposal)
    assert switch.state.state is State.KILLED
    assert switch.commit(proposal)
    assert switch.state.stage is Stage.COOLDOWN
    assert not switch.commit(proposal)


def test_a_proposal_is_void_once_anything_moved_and_its_epoch_is_not_used_again() -> None:
    switch = make()
    switch.apply(kill(), NOW)
    begin(switch)
    proposal = switch.apply(Reopen(), LATER)
    assert isinstance(proposal, Proposal)
    change = switch.apply(kill("again"), LATER)
    assert isinstance(change, Change)
    assert change.after.epoch > proposal.change.after.epoch
    assert not switch.commit(proposal)
    assert switch.state.state is State.KILLED


def test_of_two_proposals_only_one_counts() -> None:
    switch = make()
    switch.apply(kill(), NOW)
    switch.apply(request(), NOW)
    first, second = switch.apply(BeginRecovery(), NOW), switch.apply(BeginRecovery(), NOW)
    assert isinstance(first, Proposal)
    assert isinstance(second, Proposal)
    assert switch.commit(second)
    assert not switch.commit(first)


def test_a_restamped_state_is_newer_than_any_proposal_and_voids_it() -> None:
    switch = make()
    switch.apply(kill(), NOW)
    switch.apply(request(), NOW)
    proposal = switch.apply(BeginRecovery(), NOW)
    assert isinstance(proposal, Proposal)
    switch.restamp()
    assert switch.state.epoch > proposal.change.after.epoch
    assert not switch.commit(proposal)


def test_epochs_go_on_from_the_restored_one() -> None:
    switch = make(SwitchState(epoch=41))
    switch.apply(kill(), NOW)
    assert switch.state.epoch == 42


# What firing rules ask for


@pytest.mark.parametrize(
    ("action", "restriction", "factor"),
    [
        (Action.THROTTLE, Restriction.NONE, 0.5),
        (Action.REDUCE_ONLY, Restriction.REDUCE_ONLY, 1.0),
        (Action.HALT, Restriction.HALT, 1.0),
    ],
)
def test_a_soft_restriction_comes_and_goes_without_an_epoch(
    action: Action, restriction: Restriction, factor: float
) -> None:
    switch = make()
    assert switch.demand("vol", [asks("vol", action)], NOW) == ()
    snapshot = switch.snapshot()
    assert (snapshot.gate_restriction, snapshot.gate_factor, snapshot.epoch) == (restriction, factor, 0)
    assert switch.demand("vol", [], NOW) == ()
    snapshot = switch.snapshot()
    assert (snapshot.gate_restriction, snapshot.gate_factor, snapshot.epoch) == (Restriction.NONE, 1.0, 0)


def test_a_firing_kill_rule_kills_once_however_often_it_is_looked_at() -> None:
    switch = make()
    assert len(switch.demand("dd", [asks("dd")], NOW)) == 1
    epoch = switch.state.epoch
    assert switch.demand("dd", [asks("dd")], NOW) == ()
    assert switch.kill_as_demanded(NOW) == ()
    assert switch.state.epoch == epoch


def test_a_kill_does_not_lift_when_its_rule_clears() -> None:
    switch = make()
    switch.demand("dd", [asks("dd")], NOW)
    switch.demand("dd", [], NOW)
    assert switch.snapshot().gate_restriction is Restriction.HALT


def test_a_new_firing_is_one_more_cause_and_ends_a_recovery_that_waits() -> None:
    switch = make()
    switch.demand("dd", [asks("dd", since=1.0)], NOW)
    switch.apply(request(), NOW)
    assert len(switch.demand("dd", [asks("dd", since=2.0)], NOW)) == 1
    assert switch.state.recovery is None
    assert switch.state.causes[0].count == 2


def test_the_same_firing_leaves_a_recovery_that_waits_alone() -> None:
    switch = make()
    switch.demand("dd", [asks("dd")], NOW)
    switch.apply(request(waive("dd")), NOW)
    assert switch.demand("dd", [asks("dd")], NOW) == ()
    assert switch.state.stage is Stage.VALIDATING


def test_two_kill_demands_of_one_rule_do_not_take_turns_for_ever() -> None:
    switch = make()
    both = [asks("dd", since=5.0), asks("dd", since=1.0)]
    assert len(switch.demand("dd", both, NOW)) == 1
    assert switch.demand("dd", both, NOW) == ()
    assert switch.state.causes[0].time == 5.0


def test_a_breach_and_missing_data_of_one_rule_are_two_causes() -> None:
    switch = make()
    switch.demand("dd", [asks("dd"), asks("dd", code=CauseCode.NO_DATA)], NOW)
    assert [cause.code for cause in switch.state.causes] == [CauseCode.BREACH, CauseCode.NO_DATA]
    assert switch.kill_as_demanded(NOW) == ()


def test_more_firing_rules_than_kept_causes_do_not_kill_for_ever() -> None:
    switch = make()
    for number in range(MAX_CAUSES + 50):
        switch.demand(f"rule{number}", [asks(f"rule{number}")], NOW)
    assert switch.kill_as_demanded(NOW) == ()


def test_a_rule_that_goes_on_firing_kills_a_recovery_that_did_not_waive_it() -> None:
    switch = make()
    switch.demand("dd", [asks("dd")], NOW)
    begin(switch)
    assert len(switch.kill_as_demanded(NOW)) == 1
    assert switch.state.state is State.KILLED


def test_a_rule_that_goes_on_firing_after_reopening_halts_at_once_and_kills() -> None:
    switch = make()
    begin_and_reopen(switch)
    switch._demands["dd"] = (asks("dd"),)  # white box: a demand that nobody has looked at yet
    assert switch.snapshot().gate_restriction is Restriction.HALT
    assert len(switch.kill_as_demanded(LATER)) == 1


def begin_and_reopen(switch: Switch, *waivers: Waiver) -> None:
    if switch.state.state is State.ACTIVE:
        switch.apply(kill(), NOW)
    begin(switch, *waivers)
    loosen(switch, Reopen(), LATER)


def test_a_wholly_waived_rule_asks_for_nothing_until_its_waiver_ends() -> None:
    switch = make()
    switch.demand("dd", [asks("dd"), asks("dd", Action.HALT)], NOW)
    begin_and_reopen(switch, waive("dd"))
    assert switch.demand("dd", [asks("dd"), asks("dd", Action.HALT)], LATER) == ()
    assert switch.demands == ()
    assert switch.snapshot().gate_restriction is Restriction.NONE
    switch.apply(EndWaiver(trigger="dd"), LATER)
    assert switch.snapshot().gate_restriction is Restriction.HALT
    assert len(switch.kill_as_demanded(LATER)) == 1


def test_a_rule_waived_to_a_threshold_acts_at_its_next_look_and_not_on_the_last() -> None:
    switch = make()
    switch.demand("dd", [asks("dd")], NOW)
    begin(switch, waive("dd", -0.25))
    assert switch.kill_as_demanded(NOW) == ()
    assert len(switch.demand("dd", [asks("dd", since=2.0)], NOW)) == 1


def test_other_rules_are_not_covered_by_a_waiver() -> None:
    switch = make()
    switch.demand("dd", [asks("dd")], NOW)
    begin(switch, waive("dd"))
    assert len(switch.demand("vol", [asks("vol")], NOW)) == 1


def test_an_acknowledged_firing_does_not_kill_again_and_a_new_one_does() -> None:
    switch = make(policies=LAX)
    switch.demand("dd", [asks("dd", since=1.0)], NOW)
    begin_and_reopen(switch)
    assert switch.demand("dd", [asks("dd", since=1.0)], LATER) == ()
    assert switch.state.state is State.ACTIVE
    assert len(switch.demand("dd", [asks("dd", since=2.0)], LATER)) == 1


def test_a_milder_step_of_an_acknowledged_firing_goes_on_restricting() -> None:
    switch = make(policies=LAX)
    both = [asks("dd"), asks("dd", Action.REDUCE_ONLY)]
    switch.demand("dd", both, NOW)
    begin_and_reopen(switch)
    switch.demand("dd", both, LATER)
    assert switch.snapshot().gate_restriction is Restriction.REDUCE_ONLY


def test_a_softer_killed_policy_stays_soft_while_the_rule_fires_on() -> None:
    switch = make(policies=Policies(gate=GatePolicy(killed_policy=Restriction.REDUCE_ONLY)))
    switch.demand("dd", [asks("dd")], NOW)
    assert switch.snapshot().gate_restriction is Restriction.REDUCE_ONLY


def test_what_a_removed_rule_asked_for_holds_until_an_approved_recovery() -> None:
    switch = make()
    switch.demand("vol", [asks("vol", Action.REDUCE_ONLY)], NOW)
    gone = switch.drop_demands("vol")
    assert switch.snapshot().gate_restriction is Restriction.NONE
    switch.apply(HoldRemoved(demands=gone), NOW)
    assert switch.snapshot().gate_restriction is Restriction.REDUCE_ONLY
    assert switch.drop_demands("vol") == ()
    begin_and_reopen(switch)
    assert switch.snapshot().gate_restriction is Restriction.NONE


# Modes


def test_shadow_runs_the_whole_machine_and_opens_the_gate() -> None:
    switch = make(mode=Mode.SHADOW)
    switch.demand("dd", [asks("dd")], NOW)
    snapshot = switch.snapshot()
    assert (snapshot.state, snapshot.factor, snapshot.gate_restriction) == (State.KILLED, 0.0, Restriction.NONE)
    switch.apply(kill(), NOW)
    assert switch.snapshot().gate_restriction is Restriction.HALT


def test_disabled_takes_no_commands_and_blocks_nothing() -> None:
    killed = make()
    killed.apply(kill(), NOW)
    switch = make(killed.state, mode=Mode.DISABLED)
    assert switch.demand("dd", [asks("dd")], NOW) == ()
    with pytest.raises(InvalidTransition, match="mode: disabled"):
        switch.apply(kill(), NOW)
    assert switch.snapshot().gate_restriction is Restriction.NONE


@pytest.mark.parametrize("mode", [Mode.ACTIVE, Mode.SHADOW])
def test_a_stored_disabled_state_opens_no_switch_that_enforces(mode: Mode) -> None:
    with pytest.raises(InvariantViolation, match="DISABLED"):
        make(replace(SwitchState(), state=State.DISABLED), mode=mode)


def test_an_overlay_is_kept_as_given() -> None:
    switch = make()
    switch.cover(Overlay(stale="stopped"))
    assert switch.overlay.stale == "stopped"
    assert switch.snapshot().reason.code is ReasonCode.STALE


# Restoring


def test_a_kill_before_the_stored_state_was_known_stays_as_strict_as_it_was_asked_for() -> None:
    switch = make(policies=Policies(gate=GatePolicy(killed_policy=Restriction.REDUCE_ONLY)))
    switch.apply(replace(kill("early"), restriction=Restriction.HALT), NOW)
    (change,) = switch.restore(SwitchState(epoch=41), LATER)
    assert (switch.state.state, switch.state.kill_restriction) == (State.KILLED, Restriction.HALT)
    assert [cause.reason for cause in switch.state.causes] == ["early"]
    assert change.after.epoch == 42


def test_a_stored_kill_is_taken_over_and_needs_no_change() -> None:
    stored = make()
    stored.apply(kill("stored"), NOW)
    switch = make()
    assert switch.restore(stored.state, LATER) == ()
    assert switch.state is stored.state


def test_an_early_kill_ends_a_stored_recovery() -> None:
    stored = make()
    stored.apply(kill("stored"), NOW)
    begin(stored)
    switch = make()
    switch.apply(kill("early"), NOW)
    switch.restore(stored.state, LATER)
    assert (switch.state.state, switch.state.recovery) == (State.KILLED, None)
    assert [cause.reason for cause in switch.state.causes] == ["stored", "early"]


def test_a_disabled_switch_takes_nothing_over_but_the_epoch() -> None:
    stored = make()
    stored.apply(kill(), NOW)
    switch = make(mode=Mode.DISABLED)
    assert switch.restore(stored.state, LATER) == ()
    assert switch.state.state is State.DISABLED
    assert switch.state.causes == ()
    assert switch.snapshot().epoch == stored.state.epoch == 1


def test_a_stored_disabled_state_is_not_taken_over() -> None:
    switch = make()
    with pytest.raises(InvariantViolation, match="DISABLED"):
        switch.restore(SwitchState(state=State.DISABLED), LATER)
    assert switch.state.state is State.ACTIVE


def test_epochs_go_on_above_one_that_somebody_else_has_seen() -> None:
    switch = make()
    switch.raise_epoch(41)
    change = switch.apply(kill(), NOW)
    assert isinstance(change, Change)
    assert change.after.epoch == 42
    switch.raise_epoch(7)
    later = switch.apply(kill("again"), NOW)
    assert isinstance(later, Change)
    assert later.after.epoch == 43
