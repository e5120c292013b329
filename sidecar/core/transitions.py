"""The one transition table of the switch, and the one function that applies it.

The table says which event is possible in which state and where it leads; the small functions below it say what else
changes. An event that the table does not know for a state is refused and changes nothing. Loosening and tightening are
told apart here too, because they reach the gate at different times.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

from sidecar.core.errors import InvalidTransition
from sidecar.core.events import (
    Approval,
    Approve,
    CancelRecovery,
    Cause,
    CauseCode,
    Demand,
    EndWaiver,
    Event,
    EventKind,
    HealthLost,
    HoldRemoved,
    Kill,
    RefuseRecovery,
    RequestRecovery,
    StepBack,
    Waiver,
)
from sidecar.core.policy import GatePolicy, RecoveryPolicy, RestartStep
from sidecar.core.states import Action, Instant, Restriction, Stage, State

TABLE: dict[tuple[State, EventKind], State] = {
    (State.ACTIVE, EventKind.KILL): State.KILLED,
    (State.ACTIVE, EventKind.STEP): State.ACTIVE,
    (State.ACTIVE, EventKind.STEP_BACK): State.ACTIVE,
    (State.ACTIVE, EventKind.CONCLUDE): State.ACTIVE,
    (State.ACTIVE, EventKind.WAIVER_ENDED): State.ACTIVE,
    (State.ACTIVE, EventKind.HOLD): State.ACTIVE,
    (State.KILLED, EventKind.KILL): State.KILLED,
    (State.KILLED, EventKind.REQUEST): State.KILLED,
    (State.KILLED, EventKind.APPROVE): State.KILLED,
    (State.KILLED, EventKind.REFUSE): State.KILLED,
    (State.KILLED, EventKind.EXPIRE): State.KILLED,
    (State.KILLED, EventKind.CANCEL): State.KILLED,
    (State.KILLED, EventKind.BEGIN): State.RECOVERING,
    (State.KILLED, EventKind.WAIVER_ENDED): State.KILLED,
    (State.KILLED, EventKind.HOLD): State.KILLED,
    (State.RECOVERING, EventKind.KILL): State.KILLED,
    (State.RECOVERING, EventKind.CANCEL): State.KILLED,
    (State.RECOVERING, EventKind.HEALTH_LOST): State.KILLED,
    (State.RECOVERING, EventKind.REOPEN): State.ACTIVE,
    (State.RECOVERING, EventKind.WAIVER_ENDED): State.RECOVERING,
    (State.RECOVERING, EventKind.HOLD): State.RECOVERING,
}
"""Every pair that is possible, and the state it leads to. DISABLED has none: it ends with the process."""

LOOSENING = frozenset({EventKind.BEGIN, EventKind.REOPEN, EventKind.STEP})
"""Events that bring trading nearer: they count only once they are durable."""

BACKOFF_WINDOW_SECONDS = 24 * 3600.0
"""A kill within this time of the one before makes the next cooldown longer."""

MAX_CAUSES = 100
"""Causes without a rule that are kept with the state; the first and the newest stay, the audit log has all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """One attempt to trade again.

    Attributes:
        stage: how far it came.
        by, reason, requested: who asked, why, when (Unix seconds).
        approvals: so far.
        cooldown: seconds that this recovery has to wait in all.
        stage_since: running seconds when the stage began; reopening, for GRADUAL_RESTART.
        step_since: running seconds when the present restart step was taken.
    """

    stage: Stage
    by: str
    reason: str
    requested: float
    approvals: tuple[Approval, ...] = ()
    waivers: tuple[Waiver, ...] = ()
    cooldown: float = 0.0
    stage_since: float = 0.0
    step_since: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SwitchState:
    """All of the switch that must outlive the process.

    Attributes:
        state: where it stands.
        since: Unix seconds of the last change of state.
        epoch: counts durable changes.
        factor: position limit factor of state and restart ladder; 0 while KILLED or RECOVERING.
        kill_restriction: what the kill asks for; NONE while there is none.
        causes: of the present kill, oldest first.
        recovery: the attempt under way; None before and after.
        waivers: in force.
        held: what rules asked for when they were removed; an approved recovery lifts it.
        acknowledged: firings (trigger, cause code, since) that an approved recovery took into the bargain, where the
            policy does not ask for clear triggers; a new firing of the same rule is not among them.
        kills_in_a_row: kills from ACTIVE, each within 24 h of running time of the one before, beyond the first.
        last_kill_mono: running seconds of the last kill from ACTIVE; None if there was none.
    """

    state: State = State.ACTIVE
    since: float = 0.0
    epoch: int = 0
    factor: float = 1.0
    kill_restriction: Restriction = Restriction.NONE
    causes: tuple[Cause, ...] = ()
    recovery: Recovery | None = None
    waivers: tuple[Waiver, ...] = ()
    held: tuple[Demand, ...] = ()
    acknowledged: tuple[tuple[str, str, float], ...] = ()
    kills_in_a_row: int = 0
    last_kill_mono: float | None = None

    @property
    def stage(self) -> Stage:
        """The recovery's stage; NONE without one."""
        return self.recovery.stage if self.recovery else Stage.NONE


@dataclass(frozen=True, kw_only=True, slots=True)
class Policies:
    """The operator's decisions that transitions depend on."""

    recovery: RecoveryPolicy = field(default_factory=RecoveryPolicy)
    gate: GatePolicy = field(default_factory=GatePolicy)


def transition(state: SwitchState, event: Event, now: Instant, policies: Policies) -> SwitchState:
    """Apply one event.

    Returns the new state, with the epoch one higher, or the same object where the event changes nothing.

    Raises:
        InvalidTransition: the event is not possible in this state; the message names both.
    """
    target = TABLE.get((state.state, event.kind))
    if target is None:
        raise InvalidTransition(_refusal(state, event.kind))
    changed = _EFFECTS[event.kind](state, event, now, policies)
    if changed is state:
        return state
    since = now.wall if target is not state.state else state.since
    return replace(changed, state=target, since=since, epoch=state.epoch + 1)


def _refusal(state: SwitchState, kind: EventKind) -> str:
    name = kind.value.replace("_", " ")
    if state.state is State.DISABLED:
        return f"{name} is not possible: the switch was started with `mode: disabled` and takes no commands"
    return f"{name} is not possible while the switch is {state.state}"


def _kill(state: SwitchState, event: Kill, now: Instant, policies: Policies) -> SwitchState:
    # A kill that restricts nothing is no kill: whoever asks for NONE gets what a kill without a wish gets.
    asked = event.restriction or policies.gate.killed_policy or Restriction.HALT
    causes = () if state.state is State.ACTIVE else state.causes
    killed = replace(
        state,
        factor=0.0,
        kill_restriction=max(state.kill_restriction, asked),
        causes=_with_cause(causes, event.cause),
        recovery=None,
        waivers=(),  # they were part of an approval, and a kill voids all approvals
        acknowledged=(),
    )
    if state.state is not State.ACTIVE:
        return killed
    again = state.last_kill_mono is not None and now.mono - state.last_kill_mono < BACKOFF_WINDOW_SECONDS
    return replace(killed, last_kill_mono=now.mono, kills_in_a_row=state.kills_in_a_row + 1 if again else 0)


def _with_cause(causes: tuple[Cause, ...], new: Cause) -> tuple[Cause, ...]:
    for index, old in enumerate(causes):
        if new.trigger is not None and (old.trigger, old.code) == (new.trigger, new.code):
            return (*causes[:index], replace(new, count=old.count + 1), *causes[index + 1 :])
    evicted = _to_evict(causes) if new.trigger is None else None
    return (*(cause for index, cause in enumerate(causes) if index != evicted), new)


def _to_evict(causes: tuple[Cause, ...]) -> int | None:
    # Causes of rules are as many as there are rules and must stay, or a rule that fires on would kill anew at each
    # look. An operator's goes last: in shadow mode it alone holds the gate.
    anonymous = [index for index, cause in enumerate(causes) if cause.trigger is None]
    if len(anonymous) < MAX_CAUSES:
        return None
    later = [index for index in anonymous if index > 0]
    return next((index for index in later if causes[index].code is not CauseCode.OPERATOR), later[0])


def _request(state: SwitchState, event: RequestRecovery, now: Instant, policies: Policies) -> SwitchState:
    if state.recovery is not None:
        raise InvalidTransition(
            f"a recovery asked for by {state.recovery.by!r} is already {state.recovery.stage}; approve it or cancel it"
        )
    if len({waiver.trigger for waiver in event.waivers}) < len(event.waivers):
        raise InvalidTransition("a trigger is waived twice in one request; give one threshold and one end for each")
    if any(waiver.threshold is not None and not isfinite(waiver.threshold) for waiver in event.waivers):
        raise InvalidTransition("a waiver's threshold is not finite, so its rule could never fire; give a number")
    recovery = Recovery(
        stage=Stage.PENDING,
        by=event.by,
        reason=event.reason,
        requested=now.wall,
        approvals=(event.approval,) if event.approval else (),
        waivers=event.waivers,
        stage_since=now.mono,
    )
    return replace(state, recovery=_validating_if_approved(recovery, now, policies.recovery))


def _approve(state: SwitchState, event: Approve, now: Instant, policies: Policies) -> SwitchState:
    recovery = state.recovery
    if recovery is None:
        raise InvalidTransition(f"the switch is {state.state} and there is no recovery to approve; ask for one first")
    if recovery.stage is not Stage.PENDING:
        raise InvalidTransition(f"the recovery is {recovery.stage} and needs no further approval")
    if approvals_lapsed(recovery, now, policies.recovery):
        raise InvalidTransition("an earlier approval has lapsed; ask for the recovery anew")
    if any(approval.by == event.approval.by for approval in recovery.approvals):
        raise InvalidTransition(f"{event.approval.by!r} has approved this recovery already; another person is needed")
    recovery = replace(recovery, approvals=(*recovery.approvals, event.approval))
    return replace(state, recovery=_validating_if_approved(recovery, now, policies.recovery))


def approvals_lapsed(recovery: Recovery, now: Instant, policy: RecoveryPolicy) -> bool:
    """Whether any approval is older than the policy allows, on whichever clock is ahead."""
    return any(
        max(now.mono - approval.granted_mono, now.wall - approval.granted) > policy.approval_ttl
        for approval in recovery.approvals
    )


def _validating_if_approved(recovery: Recovery, now: Instant, policy: RecoveryPolicy) -> Recovery:
    if len(recovery.approvals) < approvals_needed(policy):
        return recovery
    return replace(recovery, stage=Stage.VALIDATING, stage_since=now.mono)


def approvals_needed(policy: RecoveryPolicy) -> int:
    """How many approvals a recovery takes."""
    return max(1, policy.approvals) if policy.require_approval else 0


def _refuse(state: SwitchState, event: RefuseRecovery, now: Instant, policies: Policies) -> SwitchState:  # noqa: ARG001
    recovery = _in_stage(state, Stage.VALIDATING, "refuse")
    if len(recovery.approvals) <= 1:
        return replace(state, recovery=None)
    earlier = replace(recovery, stage=Stage.PENDING, stage_since=now.mono, approvals=recovery.approvals[:-1])
    return replace(state, recovery=earlier)


def _expire(state: SwitchState, event: Event, now: Instant, policies: Policies) -> SwitchState:  # noqa: ARG001
    if state.stage is not Stage.VALIDATING:
        _in_stage(state, Stage.PENDING, "expire")
    return replace(state, recovery=None)


def _begin(state: SwitchState, event: Event, now: Instant, policies: Policies) -> SwitchState:  # noqa: ARG001
    recovery = _in_stage(state, Stage.VALIDATING, "begin")
    # Checks may take long, and a restart may have brought a stricter policy: the approvals must still be worth enough.
    if approvals_lapsed(recovery, now, policies.recovery):
        raise InvalidTransition("an approval has lapsed; ask for the recovery anew")
    missing = approvals_needed(policies.recovery) - len(recovery.approvals)
    if missing > 0:
        raise InvalidTransition(f"{missing} more approval(s) needed; cancel this recovery and ask for it anew")
    begun = replace(
        recovery,
        stage=Stage.COOLDOWN,
        stage_since=now.mono,
        cooldown=cooldown_after(policies.recovery, state.kills_in_a_row),
    )
    # A waiver that is over before it began is none; earlier ones ended with the kill.
    live = tuple(waiver for waiver in recovery.waivers if not waiver.ended(now))
    taken = () if policies.recovery.require_triggers_clear else tuple(_firings(state.causes))
    return replace(state, recovery=begun, waivers=live, held=(), acknowledged=taken)


def _firings(causes: tuple[Cause, ...]) -> Iterator[tuple[str, str, float]]:
    for cause in causes:
        if cause.trigger is not None:
            yield cause.trigger, cause.code.value, cause.time


def cooldown_after(policy: RecoveryPolicy, kills_in_a_row: int) -> float:
    """Seconds of cooldown after so many kills that followed each other within a day."""
    ceiling = max(policy.backoff_max, policy.cooldown)
    cooldown = policy.cooldown
    # Step by step, not as a power, which a long streak would make overflow; 64 doublings reach any ceiling.
    for _ in range(min(kills_in_a_row, 64)):
        cooldown = min(cooldown * max(policy.backoff_factor, 1.0), ceiling)
    return cooldown


def _cancel(state: SwitchState, event: CancelRecovery, now: Instant, policies: Policies) -> SwitchState:  # noqa: ARG001
    if state.recovery is None:
        raise InvalidTransition(f"the switch is {state.state} and there is no recovery to cancel")
    return _without_approval(state)


def _health_lost(state: SwitchState, event: HealthLost, now: Instant, policies: Policies) -> SwitchState:  # noqa: ARG001
    return _without_approval(state)


def _without_approval(state: SwitchState) -> SwitchState:
    return replace(state, recovery=None, waivers=(), acknowledged=())


def _reopen(state: SwitchState, event: Event, now: Instant, policies: Policies) -> SwitchState:  # noqa: ARG001
    recovery = _in_stage(state, Stage.COOLDOWN, "reopen")
    remaining = recovery.cooldown - (now.mono - recovery.stage_since)
    if remaining > 0:
        raise InvalidTransition(f"the cooldown lasts another {remaining:.0f} s")
    factor = policies.recovery.steps[0].factor
    reopened = replace(recovery, stage=_ladder_stage(factor), stage_since=now.mono, step_since=now.mono)
    return replace(state, recovery=reopened, factor=factor, kill_restriction=Restriction.NONE, causes=())


def _ladder_stage(factor: float) -> Stage:
    return Stage.COMPLETE if factor >= 1.0 else Stage.GRADUAL_RESTART


def next_step(state: SwitchState, policy: RecoveryPolicy) -> RestartStep | None:
    """The restart step that follows the present factor; None outside the ladder, and where the policy ends here."""
    if state.stage is not Stage.GRADUAL_RESTART:
        return None
    return next((step for step in policy.steps if step.factor > state.factor), None)


def _step(state: SwitchState, event: Event, now: Instant, policies: Policies) -> SwitchState:  # noqa: ARG001
    recovery = _in_stage(state, Stage.GRADUAL_RESTART, "step up")
    step = next_step(state, policies.recovery)
    if step is None or now.mono - recovery.stage_since < step.after:
        raise InvalidTransition("the next restart step is not due yet")
    # COMPLETE is shown for a while from here on; within the ladder `stage_since` stays the moment of reopening.
    stage = _ladder_stage(step.factor)
    since = now.mono if stage is Stage.COMPLETE else recovery.stage_since
    return replace(
        state, factor=step.factor, recovery=replace(recovery, stage=stage, stage_since=since, step_since=now.mono)
    )


def _step_back(state: SwitchState, event: StepBack, now: Instant, policies: Policies) -> SwitchState:  # noqa: ARG001
    recovery = _in_stage(state, Stage.GRADUAL_RESTART, "step back")
    lower = [step for step in policies.recovery.steps if step.factor < state.factor]
    step = lower[-1] if lower else policies.recovery.steps[0]
    back = replace(recovery, stage_since=now.mono - step.after, step_since=now.mono)
    return replace(state, factor=min(step.factor, state.factor), recovery=back)


def _conclude(state: SwitchState, event: Event, now: Instant, policies: Policies) -> SwitchState:  # noqa: ARG001
    _in_stage(state, Stage.COMPLETE, "conclude")
    return replace(state, recovery=None)


def _end_waiver(state: SwitchState, event: EndWaiver, now: Instant, policies: Policies) -> SwitchState:  # noqa: ARG001
    kept = tuple(waiver for waiver in state.waivers if waiver.trigger != event.trigger)
    return state if len(kept) == len(state.waivers) else replace(state, waivers=kept)


def _hold(state: SwitchState, event: HoldRemoved, now: Instant, policies: Policies) -> SwitchState:  # noqa: ARG001
    new = tuple(one for one in event.demands if one.action > Action.WARN and one not in state.held)
    return replace(state, held=(*state.held, *new)) if new else state


def _in_stage(state: SwitchState, stage: Stage, what: str) -> Recovery:
    if state.recovery is None or state.recovery.stage is not stage:
        raise InvalidTransition(f"cannot {what}: the recovery is {state.stage}, not {stage}")
    return state.recovery


_EFFECTS: dict[EventKind, Callable[[SwitchState, Any, Instant, Policies], SwitchState]] = {
    EventKind.KILL: _kill,
    EventKind.REQUEST: _request,
    EventKind.APPROVE: _approve,
    EventKind.REFUSE: _refuse,
    EventKind.EXPIRE: _expire,
    EventKind.BEGIN: _begin,
    EventKind.CANCEL: _cancel,
    EventKind.HEALTH_LOST: _health_lost,
    EventKind.REOPEN: _reopen,
    EventKind.STEP: _step,
    EventKind.STEP_BACK: _step_back,
    EventKind.CONCLUDE: _conclude,
    EventKind.WAIVER_ENDED: _end_waiver,
    EventKind.HOLD: _hold,
}


def restored_kill(code: CauseCode, reason: str, now: Instant, *, epoch: int, policies: Policies) -> SwitchState:
    """The state to start in when what was stored cannot be trusted: KILLED and halted, for the reason given.

    It may have been a halt that was lost, so `killed_policy` does not soften it.
    """
    cause = Cause(code=code, reason=reason, time=now.wall)
    fresh = SwitchState(since=now.wall, epoch=epoch)
    return transition(fresh, Kill(cause=cause, restriction=Restriction.HALT), now, policies)
