"""Every state with every event, and what each possible pair changes."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from sidecar.core.diagram import mermaid
from sidecar.core.document import state_document, state_from_document
from sidecar.core.errors import InvalidTransition
from sidecar.core.events import (
    Approval,
    Approve,
    BeginRecovery,
    CancelRecovery,
    Cause,
    CauseCode,
    Conclude,
    Demand,
    EndWaiver,
    Event,
    EventKind,
    ExpireApprovals,
    HealthLost,
    HoldRemoved,
    Kill,
    RefuseRecovery,
    Reopen,
    RequestRecovery,
    StepBack,
    StepUp,
    Waiver,
)
from sidecar.core.policy import GatePolicy, RecoveryPolicy, RestartStep
from sidecar.core.states import Action, Instant, Restriction, Stage, State
from sidecar.core.transitions import (
    MAX_CAUSES,
    TABLE,
    Policies,
    Recovery,
    SwitchState,
    approvals_lapsed,
    approvals_needed,
    cooldown_after,
    next_step,
    restored_kill,
    transition,
)

NOW = Instant(mono=10_000.0, wall=1_700_000_000.0)
POLICIES = Policies()
DAY = 86_400.0


def at(seconds: float) -> Instant:
    return Instant(mono=NOW.mono + seconds, wall=NOW.wall + seconds)


def operator_cause(reason: str = "looks wrong", when: float = NOW.wall) -> Cause:
    return Cause(code=CauseCode.OPERATOR, reason=reason, time=when, by="ann")


def rule_cause(trigger: str, when: float = NOW.wall, code: CauseCode = CauseCode.BREACH) -> Cause:
    return Cause(code=code, reason=f"{trigger} fires", time=when, trigger=trigger)


def approval(by: str = "ann", when: Instant = NOW) -> Approval:
    return Approval(by=by, by_verified=True, granted=when.wall, granted_mono=when.mono)


def waiver(trigger: str, threshold: float | None = None, until: Instant | None = None) -> Waiver:
    end = until or at(DAY)
    return Waiver(trigger=trigger, threshold=threshold, until=end.wall, until_mono=end.mono, by="ann")


def hold(trigger: str, action: Action = Action.REDUCE_ONLY) -> Demand:
    return Demand(trigger=trigger, action=action, code=CauseCode.BREACH, message="m", since=1.0)


def request(*waivers: Waiver, when: Instant = NOW) -> RequestRecovery:
    return RequestRecovery(by="ann", reason="fixed", approval=approval(when=when), waivers=waivers)


def run(state: SwitchState, *events: Event, now: Instant = NOW, policies: Policies = POLICIES) -> SwitchState:
    for event in events:
        state = transition(state, event, now, policies)
    return state


def policy(**changes: object) -> Policies:
    return Policies(recovery=replace(RecoveryPolicy(), **changes))  # type: ignore[arg-type]


DUAL = policy(approvals=2)
ACTIVE = SwitchState(epoch=7)
KILLED = run(ACTIVE, Kill(cause=operator_cause()))
PENDING = run(KILLED, request(), policies=DUAL)
VALIDATING = run(KILLED, request())
COOLDOWN = run(VALIDATING, BeginRecovery())
LADDER = run(COOLDOWN, Reopen(), now=at(300))
COMPLETE = run(LADDER, StepUp(), StepUp(), now=at(300 + 7200))
DISABLED = SwitchState(state=State.DISABLED)
SITUATIONS = {
    "active": ACTIVE,
    "killed": KILLED,
    "pending": PENDING,
    "validating": VALIDATING,
    "cooldown": COOLDOWN,
    "ladder": LADDER,
    "complete": COMPLETE,
    "disabled": DISABLED,
}
LATER = at(300 + 3600)
WAIVED = {name: replace(state, waivers=(waiver("dd"),)) for name, state in SITUATIONS.items()}
"""The same with a waiver in force, so that its end changes something."""

EVENTS: dict[EventKind, Event] = {
    EventKind.KILL: Kill(cause=operator_cause("again")),
    EventKind.REQUEST: RequestRecovery(by="bob", reason="fixed", approval=approval("bob", LATER)),
    EventKind.APPROVE: Approve(approval=approval("bob", LATER)),
    EventKind.REFUSE: RefuseRecovery(blockers=("dd fires",)),
    EventKind.EXPIRE: ExpireApprovals(),
    EventKind.BEGIN: BeginRecovery(),
    EventKind.CANCEL: CancelRecovery(by="ann"),
    EventKind.HEALTH_LOST: HealthLost(failures=("memory",)),
    EventKind.REOPEN: Reopen(),
    EventKind.STEP: StepUp(),
    EventKind.STEP_BACK: StepBack(reason="slippage"),
    EventKind.CONCLUDE: Conclude(),
    EventKind.WAIVER_ENDED: EndWaiver(trigger="dd"),
    EventKind.HOLD: HoldRemoved(demands=(hold("gone"),)),
}

# What each situation does with each event: the state it leads to; every pair that is not here is refused.
EXPECTED: dict[str, dict[EventKind, State]] = {
    "active": {EventKind.KILL: State.KILLED, EventKind.WAIVER_ENDED: State.ACTIVE, EventKind.HOLD: State.ACTIVE},
    "killed": {
        EventKind.KILL: State.KILLED,
        EventKind.REQUEST: State.KILLED,
        EventKind.WAIVER_ENDED: State.KILLED,
        EventKind.HOLD: State.KILLED,
    },
    "pending": {
        EventKind.KILL: State.KILLED,
        EventKind.APPROVE: State.KILLED,
        EventKind.EXPIRE: State.KILLED,
        EventKind.CANCEL: State.KILLED,
        EventKind.WAIVER_ENDED: State.KILLED,
        EventKind.HOLD: State.KILLED,
    },
    "validating": {
        EventKind.KILL: State.KILLED,
        EventKind.REFUSE: State.KILLED,
        EventKind.EXPIRE: State.KILLED,
        EventKind.BEGIN: State.RECOVERING,
        EventKind.CANCEL: State.KILLED,
        EventKind.WAIVER_ENDED: State.KILLED,
        EventKind.HOLD: State.KILLED,
    },
    "cooldown": {
        EventKind.KILL: State.KILLED,
        EventKind.CANCEL: State.KILLED,
        EventKind.HEALTH_LOST: State.KILLED,
        EventKind.REOPEN: State.ACTIVE,
        EventKind.WAIVER_ENDED: State.RECOVERING,
        EventKind.HOLD: State.RECOVERING,
    },
    "ladder": {
        EventKind.KILL: State.KILLED,
        EventKind.STEP: State.ACTIVE,
        EventKind.STEP_BACK: State.ACTIVE,
        EventKind.WAIVER_ENDED: State.ACTIVE,
        EventKind.HOLD: State.ACTIVE,
    },
    "complete": {
        EventKind.KILL: State.KILLED,
        EventKind.CONCLUDE: State.ACTIVE,
        EventKind.WAIVER_ENDED: State.ACTIVE,
        EventKind.HOLD: State.ACTIVE,
    },
    "disabled": {},
}

PATIENT = policy(approval_ttl=DAY, approvals=1)
PAIRS = [(name, kind) for name in SITUATIONS for kind in EventKind]


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[1] in EXPECTED[pair[0]]])
def test_a_possible_pair_leads_where_the_table_says(name: str, kind: EventKind) -> None:
    before = WAIVED[name]
    policies = replace(PATIENT, recovery=replace(PATIENT.recovery, approvals=2)) if name == "pending" else PATIENT
    after = transition(before, EVENTS[kind], LATER, policies)
    assert after.state is EXPECTED[name][kind]
    assert after.epoch == before.epoch + 1
    assert after.since == (before.since if after.state is before.state else LATER.wall)
    assert (after.factor == 0.0) == (after.state in (State.KILLED, State.RECOVERING))


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[1] not in EXPECTED[pair[0]]])
def test_any_other_pair_is_refused_and_changes_nothing(name: str, kind: EventKind) -> None:
    before = WAIVED[name]
    kept = replace(before)
    with pytest.raises(InvalidTransition) as refused:
        transition(before, EVENTS[kind], LATER, PATIENT)
    assert before == kept
    assert str(refused.value)


@pytest.mark.parametrize(
    ("state", "kind"), [(state, kind) for state in State for kind in EventKind if (state, kind) not in TABLE]
)
def test_a_pair_outside_the_table_is_refused_by_naming_state_and_event(state: State, kind: EventKind) -> None:
    with pytest.raises(InvalidTransition) as refused:
        transition(SwitchState(state=state), EVENTS[kind], NOW, POLICIES)
    message = str(refused.value)
    assert kind.value.replace("_", " ") in message
    assert ("mode: disabled" if state is State.DISABLED else state.value) in message


def test_every_event_kind_has_its_record() -> None:
    assert {event.kind for event in EVENTS.values()} == set(EventKind)
    assert all(event.kind is kind for kind, event in EVENTS.items())


def test_only_begin_and_reopen_lead_towards_trading() -> None:
    out = {(source, kind) for (source, kind), target in TABLE.items() if source is State.KILLED and target != source}
    back = {(source, kind) for (source, kind), target in TABLE.items() if target is State.ACTIVE and source != target}
    assert out == {(State.KILLED, EventKind.BEGIN)}
    assert back == {(State.RECOVERING, EventKind.REOPEN)}


# Kills


@pytest.mark.parametrize("policy_restriction", [Restriction.REDUCE_ONLY, Restriction.HALT])
def test_a_kill_without_a_wish_restricts_as_the_policy_says(policy_restriction: Restriction) -> None:
    policies = Policies(gate=GatePolicy(killed_policy=policy_restriction))
    assert run(ACTIVE, Kill(cause=operator_cause()), policies=policies).kill_restriction is policy_restriction


@pytest.mark.parametrize("asked", [Restriction.REDUCE_ONLY, Restriction.HALT])
def test_a_kill_restricts_as_it_asks(asked: Restriction) -> None:
    assert run(ACTIVE, Kill(cause=operator_cause(), restriction=asked)).kill_restriction is asked


@pytest.mark.parametrize("killed_policy", Restriction)
def test_a_kill_never_restricts_nothing(killed_policy: Restriction) -> None:
    policies = Policies(gate=GatePolicy(killed_policy=killed_policy))
    killed = run(ACTIVE, Kill(cause=operator_cause(), restriction=Restriction.NONE), policies=policies)
    assert killed.kill_restriction is (killed_policy or Restriction.HALT)


@pytest.mark.parametrize("order", [(Restriction.HALT, Restriction.REDUCE_ONLY), (Restriction.REDUCE_ONLY, None)])
def test_a_second_kill_adds_a_cause_and_keeps_the_stricter(order: tuple[Restriction, Restriction | None]) -> None:
    first, second = order
    killed = run(
        ACTIVE,
        Kill(cause=operator_cause("one"), restriction=first),
        Kill(cause=operator_cause("two"), restriction=second),
    )
    assert killed.kill_restriction is Restriction.HALT
    assert [cause.reason for cause in killed.causes] == ["one", "two"]
    assert killed.since == NOW.wall


def test_a_kill_from_active_forgets_the_causes_of_the_last_one() -> None:
    stale = replace(ACTIVE, causes=(operator_cause("old"),))
    assert [cause.reason for cause in run(stale, Kill(cause=operator_cause("new"))).causes] == ["new"]


def test_a_repeated_cause_of_a_rule_counts_in_its_place() -> None:
    killed = run(
        ACTIVE,
        Kill(cause=rule_cause("a")),
        Kill(cause=rule_cause("b")),
        Kill(cause=rule_cause("a", when=NOW.wall + 1)),
        Kill(cause=rule_cause("a", code=CauseCode.NO_DATA)),
    )
    assert [(one.trigger, one.code, one.count, one.time - NOW.wall) for one in killed.causes] == [
        ("a", CauseCode.BREACH, 2, 1.0),
        ("b", CauseCode.BREACH, 1, 0.0),
        ("a", CauseCode.NO_DATA, 1, 0.0),
    ]
    again = run(killed, Kill(cause=rule_cause("b", when=NOW.wall + 2)))
    assert [(one.trigger, one.count) for one in again.causes] == [("a", 2), ("b", 2), ("a", 1)]


def test_causes_without_a_rule_are_bounded_and_keep_the_first_and_the_newest() -> None:
    state = ACTIVE
    for number in range(MAX_CAUSES + 20):
        state = run(state, Kill(cause=operator_cause(str(number))))
    assert len(state.causes) == MAX_CAUSES
    assert (state.causes[0].reason, state.causes[-1].reason) == ("0", str(MAX_CAUSES + 19))


def test_causes_of_rules_are_never_evicted() -> None:
    state = ACTIVE
    for number in range(MAX_CAUSES * 2):
        state = run(state, Kill(cause=rule_cause(f"rule{number}")))
    for number in range(MAX_CAUSES * 2):
        state = run(state, Kill(cause=operator_cause(str(number))))
    assert sum(cause.trigger is not None for cause in state.causes) == MAX_CAUSES * 2
    assert len(state.causes) == MAX_CAUSES * 3


def test_an_operators_cause_outlives_other_nameless_ones() -> None:
    state = run(ACTIVE, Kill(cause=rule_cause("dd")), Kill(cause=operator_cause("mine")))
    for number in range(MAX_CAUSES + 5):
        state = run(state, Kill(cause=Cause(code=CauseCode.STEP_GATE, reason=str(number), time=0.0)))
    assert [cause.reason for cause in state.causes if cause.code is CauseCode.OPERATOR] == ["mine"]


@pytest.mark.parametrize("name", ["pending", "validating", "cooldown", "ladder", "complete"])
def test_a_kill_voids_recovery_approvals_waivers_and_acknowledgements(name: str) -> None:
    state = replace(WAIVED[name], acknowledged=(("dd", "breach", 1.0),))
    killed = run(state, Kill(cause=rule_cause("dd")), now=LATER)
    assert (killed.state, killed.factor, killed.recovery) == (State.KILLED, 0.0, None)
    assert (killed.waivers, killed.acknowledged) == ((), ())


@pytest.mark.parametrize(("gap", "in_a_row"), [(0.0, 1), (DAY - 1, 1), (DAY, 0), (2 * DAY, 0)])
def test_kills_from_active_within_a_day_are_counted(gap: float, in_a_row: int) -> None:
    reopened = replace(KILLED, state=State.ACTIVE, factor=1.0)
    assert run(reopened, Kill(cause=operator_cause()), now=at(gap)).kills_in_a_row == in_a_row


def test_a_wall_clock_step_does_not_change_the_backoff() -> None:
    reopened = replace(KILLED, state=State.ACTIVE, factor=1.0)
    jumped = Instant(mono=NOW.mono + 10, wall=NOW.wall + 30 * DAY)
    assert run(reopened, Kill(cause=operator_cause()), now=jumped).kills_in_a_row == 1


@pytest.mark.parametrize("name", ["killed", "cooldown"])
def test_a_kill_that_is_not_from_active_is_not_counted(name: str) -> None:
    again = run(SITUATIONS[name], Kill(cause=operator_cause()), now=at(5))
    assert (again.kills_in_a_row, again.last_kill_mono) == (0, NOW.mono)


# Approvals


def test_one_approval_is_enough_by_default() -> None:
    assert (VALIDATING.stage, VALIDATING.state, VALIDATING.factor) == (Stage.VALIDATING, State.KILLED, 0.0)


def test_two_approvals_need_two_people() -> None:
    assert PENDING.stage is Stage.PENDING
    with pytest.raises(InvalidTransition, match="'ann' has approved this recovery already"):
        run(PENDING, Approve(approval=approval("ann")), policies=DUAL)
    approved = run(PENDING, Approve(approval=approval("bob")), policies=DUAL)
    assert approved.stage is Stage.VALIDATING


def test_no_recovery_can_be_asked_for_beside_another() -> None:
    with pytest.raises(InvalidTransition, match="asked for by 'ann' is already PENDING"):
        run(PENDING, request(), policies=DUAL)


def test_a_request_is_kept_as_it_was_made() -> None:
    recovery = run(KILLED, request(waiver("dd")), now=at(60), policies=DUAL).recovery
    assert recovery is not None
    assert (recovery.by, recovery.reason, recovery.requested) == ("ann", "fixed", NOW.wall + 60)
    assert (recovery.stage, recovery.stage_since, recovery.approvals) == (Stage.PENDING, NOW.mono + 60, (approval(),))
    assert recovery.waivers == (waiver("dd"),)
    second = run(run(KILLED, request(), policies=DUAL), Approve(approval=approval("bob")), now=at(90), policies=DUAL)
    assert second.recovery is not None
    assert (second.recovery.stage, second.recovery.stage_since) == (Stage.VALIDATING, NOW.mono + 90)
    refused = run(second, RefuseRecovery(blockers=("dd",)), now=at(95), policies=DUAL)
    assert refused.recovery is not None
    assert (refused.recovery.stage, refused.recovery.stage_since) == (Stage.PENDING, NOW.mono + 95)
    assert refused.recovery.approvals == (approval(),)


def test_there_must_be_something_to_approve_or_cancel() -> None:
    with pytest.raises(InvalidTransition, match="KILLED and there is no recovery to approve"):
        run(KILLED, Approve(approval=approval()))
    with pytest.raises(InvalidTransition, match="KILLED and there is no recovery to cancel"):
        run(KILLED, CancelRecovery(by="ann"))


def test_a_complete_set_of_approvals_takes_no_more() -> None:
    with pytest.raises(InvalidTransition, match="needs no further approval"):
        run(VALIDATING, Approve(approval=approval("bob")))


def test_a_lapsed_approval_cannot_be_joined() -> None:
    with pytest.raises(InvalidTransition, match="lapsed"):
        run(PENDING, Approve(approval=approval("bob", at(901))), now=at(901), policies=DUAL)


@pytest.mark.parametrize(
    ("now", "lapsed"),
    [
        (at(900), False),
        (at(900.1), True),
        (Instant(mono=NOW.mono + 901, wall=NOW.wall - DAY), True),
        (Instant(mono=NOW.mono, wall=NOW.wall + 901), True),
    ],
)
def test_an_approval_lapses_by_whichever_clock_is_ahead(now: Instant, lapsed: bool) -> None:
    assert VALIDATING.recovery is not None
    assert approvals_lapsed(VALIDATING.recovery, now, RecoveryPolicy()) is lapsed


def test_a_recovery_does_not_begin_on_an_approval_that_lapsed_while_checks_ran() -> None:
    with pytest.raises(InvalidTransition, match="lapsed"):
        run(VALIDATING, BeginRecovery(), now=at(901))
    expired = run(VALIDATING, ExpireApprovals(), now=at(901))
    assert (expired.state, expired.recovery) == (State.KILLED, None)


def test_a_recovery_does_not_begin_with_fewer_approvals_than_a_stricter_policy_asks_for() -> None:
    with pytest.raises(InvalidTransition, match=re.escape("1 more approval(s) needed")):
        run(VALIDATING, BeginRecovery(), policies=DUAL)


@pytest.mark.parametrize(("required", "approvals", "needed"), [(True, 2, 2), (True, 1, 1), (True, 0, 1), (False, 2, 0)])
def test_required_approval_means_at_least_one(required: bool, approvals: int, needed: int) -> None:
    assert approvals_needed(RecoveryPolicy(require_approval=required, approvals=approvals)) == needed


def test_a_request_without_an_approval_waits_where_one_is_required() -> None:
    asked = RequestRecovery(by="ann", reason="fixed", approval=None)
    assert run(KILLED, asked).stage is Stage.PENDING
    assert run(KILLED, asked, policies=policy(require_approval=False)).stage is Stage.VALIDATING


def test_a_refusal_takes_back_the_last_approval_only() -> None:
    refused = RefuseRecovery(blockers=("dd",))
    assert run(VALIDATING, refused).recovery is None
    dual = run(PENDING, Approve(approval=approval("bob")), refused, policies=DUAL)
    assert dual.recovery is not None
    assert dual.stage is Stage.PENDING
    assert [one.by for one in dual.recovery.approvals] == ["ann"]


def test_a_new_cause_ends_a_recovery_that_waits() -> None:
    assert run(PENDING, Kill(cause=rule_cause("dd"))).recovery is None


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), float("-inf")])
def test_a_waiver_to_no_number_is_refused(threshold: float) -> None:
    with pytest.raises(InvalidTransition, match="not finite"):
        run(KILLED, request(waiver("dd", threshold)))


def test_a_trigger_cannot_be_waived_twice_in_one_request() -> None:
    with pytest.raises(InvalidTransition, match="waived twice"):
        run(KILLED, request(waiver("dd", -0.2), waiver("dd")))


# Cooldown


def test_begin_puts_waivers_in_force_and_lifts_what_removed_rules_held() -> None:
    over = Waiver(trigger="over", threshold=None, until=NOW.wall, until_mono=NOW.mono + 5, by="ann")
    state = replace(KILLED, held=(hold("gone"),))
    begun = run(state, request(waiver("dd", -0.2), over), BeginRecovery())
    assert [one.trigger for one in begun.waivers] == ["dd"]
    assert begun.held == ()
    assert (begun.state, begun.stage, begun.factor) == (State.RECOVERING, Stage.COOLDOWN, 0.0)
    assert begun.kill_restriction is KILLED.kill_restriction


def test_waivers_are_not_in_force_before_the_recovery_begins() -> None:
    assert run(KILLED, request(waiver("dd"))).waivers == ()


def test_firings_are_acknowledged_only_where_clear_triggers_are_not_required() -> None:
    killed = run(ACTIVE, Kill(cause=operator_cause()), Kill(cause=rule_cause("dd", when=5.0)))
    strict = run(killed, request(), BeginRecovery())
    lax = run(killed, request(), BeginRecovery(), policies=policy(require_triggers_clear=False))
    assert strict.acknowledged == ()
    assert lax.acknowledged == (("dd", "breach", 5.0),)


@pytest.mark.parametrize("event", [CancelRecovery(by="ann"), HealthLost(failures=("x",))])
def test_a_recovery_that_ends_voids_all_its_approval_gave(event: Event) -> None:
    state = replace(COOLDOWN, waivers=(waiver("dd"),), acknowledged=(("dd", "breach", 1.0),))
    ended = run(state, event)
    assert (ended.state, ended.recovery, ended.waivers, ended.acknowledged) == (State.KILLED, None, (), ())
    assert ended.causes == state.causes
    assert ended.kill_restriction is state.kill_restriction


@pytest.mark.parametrize(
    ("kills", "factor", "most", "seconds"),
    [
        (0, 2.0, 3600.0, 300.0),
        (1, 2.0, 3600.0, 600.0),
        (2, 2.0, 3600.0, 1200.0),
        (9, 2.0, 3600.0, 3600.0),
        (10**9, 2.0, 3600.0, 3600.0),
        (10**9, 1e300, 3600.0, 3600.0),
        (5, 1.0, 3600.0, 300.0),
        (5, 0.1, 3600.0, 300.0),
        (5, 2.0, 60.0, 300.0),
    ],
)
def test_cooldown_backs_off_up_to_a_ceiling_and_never_shrinks(
    kills: int, factor: float, most: float, seconds: float
) -> None:
    assert cooldown_after(RecoveryPolicy(backoff_factor=factor, backoff_max=most), kills) == seconds


def test_the_cooldown_counts_running_time_only() -> None:
    with pytest.raises(InvalidTransition, match="another 1 s"):
        run(COOLDOWN, Reopen(), now=Instant(mono=NOW.mono + 299.4, wall=NOW.wall + DAY))
    assert run(COOLDOWN, Reopen(), now=Instant(mono=NOW.mono + 300, wall=NOW.wall - DAY)).state is State.ACTIVE


def test_a_policy_change_does_not_shorten_a_cooldown_that_runs() -> None:
    with pytest.raises(InvalidTransition, match="cooldown lasts"):
        run(COOLDOWN, Reopen(), now=at(200), policies=policy(cooldown=10.0))


# The ladder


def test_reopening_takes_the_first_step_and_ends_the_kill() -> None:
    assert (LADDER.factor, LADDER.stage, LADDER.kill_restriction) == (0.5, Stage.GRADUAL_RESTART, Restriction.NONE)
    assert LADDER.causes == ()


def test_a_ladder_of_one_step_is_complete_at_once() -> None:
    reopened = run(COOLDOWN, Reopen(), now=at(300), policies=policy(steps=(RestartStep(factor=1.0),)))
    assert (reopened.factor, reopened.stage) == (1.0, Stage.COMPLETE)


def test_steps_count_from_reopening() -> None:
    with pytest.raises(InvalidTransition, match="not due yet"):
        run(LADDER, StepUp(), now=at(300 + 3599))
    second = run(LADDER, StepUp(), now=at(300 + 3600))
    assert (second.factor, second.stage) == (0.75, Stage.GRADUAL_RESTART)
    with pytest.raises(InvalidTransition, match="not due yet"):
        run(second, StepUp(), now=at(300 + 7199))
    third = run(second, StepUp(), now=at(300 + 7200))
    assert (third.factor, third.stage) == (1.0, Stage.COMPLETE)
    assert run(third, Conclude(), now=at(9000)).recovery is None


def test_a_step_back_takes_the_step_before_and_starts_its_time_anew() -> None:
    second = run(LADDER, StepUp(), now=at(3900))
    back = run(second, StepBack(reason="slippage"), now=at(4000))
    assert (back.factor, back.stage) == (0.5, Stage.GRADUAL_RESTART)
    with pytest.raises(InvalidTransition, match="not due yet"):
        run(back, StepUp(), now=at(4000 + 3599))
    assert run(back, StepUp(), now=at(4000 + 3600)).factor == 0.75


def test_a_step_back_goes_to_the_step_below_and_not_to_the_first() -> None:
    steps = tuple(RestartStep(factor=0.2 * number, after=600.0 * number) for number in range(1, 6))
    policies = policy(steps=steps)
    state = run(COOLDOWN, Reopen(), now=at(300), policies=policies)
    state = run(state, StepUp(), StepUp(), now=at(300 + 1800), policies=policies)
    assert state.factor == pytest.approx(0.6)
    back = run(state, StepBack(reason="slippage"), now=at(5000), policies=policies)
    assert back.factor == pytest.approx(0.4)
    assert back.recovery is not None
    # It stands where the ladder stood when that step was taken: the next one is 600 s away.
    assert (back.recovery.stage_since, back.recovery.step_since) == (NOW.mono + 5000 - 1200, NOW.mono + 5000)
    again = run(back, StepUp(), now=at(5000 + 600), policies=policies)
    assert again.factor == pytest.approx(0.6)
    with pytest.raises(InvalidTransition, match="not due yet"):
        run(back, StepUp(), now=at(5000 + 599), policies=policies)


def test_every_move_of_the_ladder_keeps_its_moments() -> None:
    reopened = run(COOLDOWN, Reopen(), now=at(300))
    assert (reopened.kill_restriction, reopened.causes) == (Restriction.NONE, ())
    second = run(reopened, StepUp(), now=at(300 + 3600))
    third = run(second, StepUp(), now=at(300 + 7200))
    moments = [(one.recovery.stage_since, one.recovery.step_since) for one in (reopened, second, third) if one.recovery]
    assert moments == [(10_300.0, 10_300.0), (10_300.0, 13_900.0), (17_500.0, 17_500.0)]


@pytest.mark.parametrize("first", [0.5, 0.8])
def test_a_step_back_never_raises_the_factor(first: float) -> None:
    policies = policy(steps=(RestartStep(factor=first), RestartStep(factor=1.0, after=60.0)))
    assert run(LADDER, StepBack(reason="slippage"), policies=policies).factor == 0.5


def test_the_ladder_goes_on_by_factor_when_its_steps_change() -> None:
    changed = RecoveryPolicy(steps=(RestartStep(factor=0.2), RestartStep(factor=0.9, after=10.0)))
    step = next_step(LADDER, changed)
    assert step is not None
    assert step.factor == 0.9


def test_the_ladder_ends_where_the_policy_ends() -> None:
    short = policy(steps=(RestartStep(factor=0.25), RestartStep(factor=0.5, after=10.0)))
    assert next_step(LADDER, short.recovery) is None
    with pytest.raises(InvalidTransition, match="not due yet"):
        run(LADDER, StepUp(), now=at(10 * DAY), policies=short)


@pytest.mark.parametrize("name", ["active", "killed", "cooldown", "complete"])
def test_there_is_no_next_step_outside_the_ladder(name: str) -> None:
    assert next_step(SITUATIONS[name], RecoveryPolicy()) is None


# Waivers and holds


def test_the_end_of_an_unknown_waiver_changes_nothing() -> None:
    state = replace(ACTIVE, waivers=(waiver("dd"),))
    assert run(state, EndWaiver(trigger="other")) is state
    assert run(state, EndWaiver(trigger="dd")).waivers == ()


def test_only_what_restricted_is_held_and_only_once() -> None:
    assert run(ACTIVE, HoldRemoved(demands=())) is ACTIVE
    assert run(ACTIVE, HoldRemoved(demands=(hold("w", Action.WARN),))) is ACTIVE
    once = run(ACTIVE, HoldRemoved(demands=(hold("a"), hold("w", Action.WARN))))
    assert once.held == (hold("a"),)
    assert run(once, HoldRemoved(demands=(hold("a"),))) is once


def test_held_restrictions_survive_a_kill() -> None:
    held = run(ACTIVE, HoldRemoved(demands=(hold("a"),)), Kill(cause=operator_cause()))
    assert held.held == (hold("a"),)


def test_an_untrusted_store_starts_killed_above_the_known_epoch() -> None:
    # A halt may have been lost: what a kill means by policy does not soften this one.
    lenient = Policies(gate=GatePolicy(killed_policy=Restriction.REDUCE_ONLY))
    state = restored_kill(CauseCode.STATE_LOST, "both copies are damaged", NOW, epoch=41, policies=lenient)
    assert (state.state, state.factor, state.kill_restriction) == (State.KILLED, 0.0, Restriction.HALT)
    assert (state.epoch, state.causes[0].code, state.since) == (42, CauseCode.STATE_LOST, NOW.wall)
    assert (state.causes[0].reason, state.causes[0].time) == ("both copies are damaged", NOW.wall)


def test_a_demand_gives_its_cause() -> None:
    demand = Demand(
        trigger="dd",
        action=Action.KILL,
        code=CauseCode.BREACH,
        message="dd < -0.15",
        value=-0.2,
        limit=-0.15,
        since=5.0,
    )
    assert demand.as_cause() == Cause(
        code=CauseCode.BREACH,
        reason="dd < -0.15",
        time=5.0,
        trigger="dd",
        by="rule dd",
        by_verified=True,
        value=-0.2,
        limit=-0.15,
    )


def test_a_recovery_has_no_stage_before_it_is_asked_for() -> None:
    assert SwitchState().stage is Stage.NONE
    assert SwitchState(recovery=Recovery(stage=Stage.PENDING, by="a", reason="r", requested=0.0)).stage is Stage.PENDING


# The picture


def test_the_documented_diagram_is_current() -> None:
    document = Path(__file__).parents[3] / "docs" / "STATES.md"
    drawn = re.findall(r"```mermaid\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert drawn == [mermaid()]


def test_a_diagram_shows_every_pair_and_marks_what_loosens() -> None:
    table = {(State.ACTIVE, EventKind.KILL): State.KILLED, (State.KILLED, EventKind.BEGIN): State.RECOVERING}
    assert mermaid(table).splitlines()[3:] == [
        "    ACTIVE --> KILLED: kill",
        "    KILLED --> RECOVERING: begin recovery *",
    ]


def test_what_a_removed_rule_held_comes_back_from_the_disk_with_its_numbers() -> None:
    numbers = replace(hold("a", Action.THROTTLE), factor=0.5, value=-0.12, limit=-0.1)
    held = replace(ACTIVE, held=(numbers, hold("b")))
    assert state_from_document(state_document(held, NOW), NOW).held == held.held
