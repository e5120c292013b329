"""Draws the switch as plain documents: what `/api/v1/status` and its siblings answer and the command line shows."""

from collections.abc import Mapping, Sequence
from typing import Any

from sidecar.app.clock import stamp
from sidecar.core.events import Cause, Demand, Waiver
from sidecar.core.orders import Decision
from sidecar.core.policy import RecoveryPolicy, StepGate
from sidecar.core.recovery import cooldown_remaining, next_step_in
from sidecar.core.snapshot import Reason, Snapshot
from sidecar.core.states import Instant, Stage
from sidecar.core.transitions import Policies, SwitchState, cooldown_after, next_step
from sidecar.rules.model import Rule, Threshold
from sidecar.rules.triggers import QUIET, Trigger, eased, limit_of, limit_used

Document = dict[str, Any]


def status_document(
    *,
    snapshot: Snapshot,
    state: SwitchState,
    decision: Decision,
    demands: Sequence[Demand],
    now: Instant,
    policies: Policies,
    step_waits_for: str | None,
    extra: Mapping[str, Any],
) -> Document:
    """The answer of `/api/v1/status`; `extra` holds what only the app knows (readiness, sources, problems, ...)."""
    return {
        "time": stamp(now.wall),
        "switch": snapshot.switch,
        "mode": snapshot.mode.value,
        "state": snapshot.state.value,
        "restriction": snapshot.restriction.label,
        "position_limit_factor": snapshot.factor,
        "stage": snapshot.stage.value,
        "since": stamp(snapshot.since),
        "epoch": snapshot.epoch,
        "causes": [_cause(cause) for cause in state.causes],
        "gate": {"decision": "allow" if decision.allow else "deny", "reason": reason_document(decision.reason)},
        "killed_policy": policies.gate.killed_policy.label,
        "recovery": recovery_document(state, now, policies, step_waits_for),
        "waivers": [_waiver(waiver) for waiver in state.waivers],
        "demands": [_demand(demand) for demand in demands],
        **extra,
    }


def recovery_document(
    state: SwitchState, now: Instant, policies: Policies, step_waits_for: str | None = None
) -> Document:
    """The recovery part of the status; with stage NONE where there is no recovery."""
    recovery, policy = state.recovery, policies.recovery
    return {
        "stage": state.stage.value,
        "by": recovery.by if recovery else None,
        "reason": recovery.reason if recovery else None,
        "requested": stamp(recovery.requested) if recovery else None,
        "approvals": [
            {"by": one.by, "by_verified": one.by_verified, "time": stamp(one.granted)}
            for one in (recovery.approvals if recovery else ())
        ],
        "waivers": [_waiver(waiver) for waiver in (recovery.waivers if recovery else ())],
        "approvals_needed": policy.approvals if policy.require_approval else 0,
        "approvals_lapse_in_seconds": _lapse(state, now, policy),
        "cooldown_seconds": _cooldown(state, policy),
        "cooldown_remaining_seconds": round(cooldown_remaining(state, now), 3),
        "waits_for": step_waits_for if state.stage is Stage.COOLDOWN and not cooldown_remaining(state, now) else None,
        "steps": [
            {"factor": step.factor, "after_seconds": step.after, "gates": [_gate(gate) for gate in step.gates]}
            for step in policy.steps
        ],
        "next_step": _next_step(state, now, policies, step_waits_for),
    }


def _gate(gate: StepGate) -> Document:
    return {"query": gate.query, "operator": gate.operator, "threshold": gate.threshold}


def _lapse(state: SwitchState, now: Instant, policy: RecoveryPolicy) -> float | None:
    """Seconds until the first approval lapses; None where none waits for another one."""
    if state.recovery is None or state.stage is not Stage.PENDING or not state.recovery.approvals:
        return None
    oldest = max(max(now.mono - one.granted_mono, now.wall - one.granted) for one in state.recovery.approvals)
    return round(max(0.0, policy.approval_ttl - oldest), 3)


def _cooldown(state: SwitchState, policy: RecoveryPolicy) -> float:
    if state.recovery is not None and state.stage is Stage.COOLDOWN:
        return state.recovery.cooldown
    return cooldown_after(policy, state.kills_in_a_row)


def _next_step(state: SwitchState, now: Instant, policies: Policies, waits_for: str | None) -> Document | None:
    step, seconds = next_step(state, policies.recovery), next_step_in(state, now, policies)
    if step is None or seconds is None:
        return None
    return {"factor": step.factor, "in_seconds": round(seconds, 3), "waits_for": waits_for}


def reason_document(reason: Reason) -> Document:
    """A reason as it stands in decisions and status."""
    return {
        "code": reason.code.value,
        "message": reason.message,
        "trigger": reason.trigger,
        "value": reason.value,
        "limit": reason.limit,
        "since": stamp(reason.since),
        "release": reason.release,
    }


def _cause(cause: Cause) -> Document:
    return {
        "code": cause.code.value,
        "trigger": cause.trigger,
        "reason": cause.reason,
        "by": cause.by,
        "by_verified": cause.by_verified,
        "time": stamp(cause.time),
        "value": cause.value,
        "limit": cause.limit,
        "count": cause.count,
    }


def _waiver(waiver: Waiver) -> Document:
    return {
        "trigger": waiver.trigger,
        "threshold": waiver.threshold,
        "until": stamp(waiver.until),
        "by": waiver.by,
    }


def _demand(demand: Demand) -> Document:
    return {
        "trigger": demand.trigger,
        "action": demand.action.label,
        "factor": demand.factor,
        "code": demand.code.value,
        "message": demand.message,
        "value": demand.value,
        "limit": demand.limit,
        "since": stamp(demand.since),
    }


def trigger_document(rule: Rule, trigger: Trigger, waiver: Waiver | None) -> Document:
    """One trigger of `/api/v1/triggers`."""
    condition = rule.condition
    return {
        "trigger": rule.trigger,
        "group": rule.group,
        "type": rule.kind,
        "query": rule.query,
        "enabled": rule.enabled,
        "shadow": rule.shadow,
        "enforcing": rule.enforcing,
        "action": rule.action.label,
        "status": trigger.status.value,
        "health": trigger.health.value,
        "armed": rule.enabled and trigger.armed,
        "ready": trigger.ready,
        "waived": waiver is not None,
        "step": _step_action(rule, trigger),
        "value": trigger.value,
        "threshold": limit_of(condition) if waiver is None or waiver.threshold is None else waiver.threshold,
        "operator": condition.operator.value if isinstance(condition, Threshold) else None,
        "limit_used_ratio": limit_used(eased(rule, None if waiver is None else waiver.threshold), trigger),
        "sample_age_seconds": trigger.sample_age,
        "since": stamp(trigger.main.firing_wall),
        "last_evaluation": stamp(trigger.evaluated),
        "message": trigger.message,
        "labels": dict(rule.labels),
        "annotations": dict(rule.annotations),
    }


def _step_action(rule: Rule, trigger: Trigger) -> str | None:
    if not isinstance(rule.condition, Threshold):
        return None
    steps = zip(rule.condition.steps, trigger.steps, strict=False)
    held = [step.action for step, level in steps if level != QUIET and level.firing_since is not None]
    return max(held).label if held else None
