"""Says every change in the audit log's words: what happened, from where to where, by whom and why."""

from collections.abc import Mapping
from typing import Any

from sidecar.app.clock import stamp, utc
from sidecar.core.events import (
    Approve,
    BeginRecovery,
    CancelRecovery,
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
from sidecar.core.states import Instant, State
from sidecar.core.switch import Change

AuditEvent = dict[str, Any]

CAUSE_ADDED = "switch.cause_added"

TYPES: Mapping[EventKind, str] = {
    EventKind.KILL: "switch.killed",
    EventKind.REQUEST: "recovery.requested",
    EventKind.APPROVE: "recovery.approved",
    EventKind.REFUSE: "recovery.refused",
    EventKind.EXPIRE: "recovery.expired",
    EventKind.BEGIN: "recovery.started",
    EventKind.CANCEL: "recovery.cancelled",
    EventKind.HEALTH_LOST: "recovery.health_lost",
    EventKind.REOPEN: "switch.reopened",
    EventKind.STEP: "restart.step",
    EventKind.STEP_BACK: "restart.step_back",
    EventKind.CONCLUDE: "recovery.concluded",
    EventKind.WAIVER_ENDED: "waiver.ended",
    EventKind.HOLD: "rule.held",
}

CHANGES = frozenset({*TYPES.values(), CAUSE_ADDED})
"""The types of events that changed the switch: they alone say in which state it was left."""


def audit_event(
    kind: str, now: Instant, *, by: str | None = None, reason: str | None = None, **data: object
) -> AuditEvent:
    """An event that changed no state: a refusal, a wrong code, a reload, a start."""
    return {"type": kind, "time": utc(now.wall), "by": by, "reason": reason, "data": data}


def change_event(change: Change) -> AuditEvent:
    """The audit event of a change of the switch."""
    before, after = change.before, change.after
    kind = TYPES[change.event.kind]
    if change.event.kind is EventKind.KILL and before.state is State.KILLED:
        kind = CAUSE_ADDED
    by, reason = _who_and_why(change.event)
    return {
        "type": kind,
        "time": utc(change.at.wall),
        "from": before.state.value,
        "to": after.state.value,
        "by": by,
        "reason": reason,
        "data": {
            "epoch": after.epoch,
            "stage": after.stage.value,
            "factor": after.factor,
            "restriction": after.kill_restriction.label,
            **_details(change.event),
        },
    }


def _who_and_why(event: Event) -> tuple[str | None, str | None]:
    match event:
        case Kill():
            return event.cause.by, event.cause.reason
        case RequestRecovery() | CancelRecovery():
            return event.by, event.reason
        case Approve():
            return event.approval.by, None
        case RefuseRecovery():
            return None, "; ".join(event.blockers)
        case HealthLost():
            return None, "; ".join(event.failures)
        case StepBack():
            return None, event.reason
        case EndWaiver():
            return None, f"the waiver of rule {event.trigger} is over"
        case HoldRemoved():
            return None, "a rule was removed while it restricted trading"
        case _:
            return None, None


def _details(event: Event) -> dict[str, Any]:
    match event:
        case Kill():
            cause = event.cause
            return {
                "code": cause.code.value,
                "trigger": cause.trigger,
                "value": cause.value,
                "limit": cause.limit,
                "by_verified": cause.by_verified,
            }
        case RequestRecovery():
            verified = event.approval.by_verified if event.approval else None
            return {"by_verified": verified, "waive": [_waiver(waiver) for waiver in event.waivers]}
        case Approve():
            return {"by_verified": event.approval.by_verified}
        case BeginRecovery():
            return {"taken_as_clear": list(event.taken_as_clear)}
        case HoldRemoved():
            return {"rules": [demand.trigger for demand in event.demands]}
        case _:
            return {}


def _waiver(waiver: Waiver) -> dict[str, Any]:
    return {"trigger": waiver.trigger, "threshold": waiver.threshold, "until": stamp(waiver.until)}
