"""Decides in which state to start, given what was found on disk. When in doubt: KILLED, saying why."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sidecar.adapters.state_file import ForeignSwitch, FutureVersion, Loaded, Lost, Nothing, Restored
from sidecar.app.alerts import BookState
from sidecar.app.asked import Asked, asked_from_document
from sidecar.app.audit_trail import TYPES
from sidecar.core.document import lockouts_from_document, state_from_document
from sidecar.core.errors import StorageError
from sidecar.core.events import Cause, CauseCode, EventKind, Kill
from sidecar.core.recovery import Lockouts
from sidecar.core.states import Instant, State
from sidecar.core.transitions import Policies, SwitchState, restored_kill, transition
from sidecar.rules.document import trigger_from_document
from sidecar.rules.triggers import Trigger

_SEVERITY = {State.ACTIVE: 0, State.RECOVERING: 1, State.KILLED: 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What to start with.

    Attributes:
        state: of the switch.
        triggers: by rule, with their timers.
        asked: what rules asked for without a kill, should one of them be gone or of another type now.
        lockouts: of approvers.
        alerts: of Alertmanager.
        note: what was unusual, for log and audit; empty if nothing was.
        mode: the mode that the state was stored under; None where that is unknown.
        fresh: whether nothing was stored at all.
    """

    state: SwitchState
    triggers: dict[str, Trigger]
    lockouts: Lockouts
    asked: tuple[Asked, ...] = ()
    alerts: BookState = field(default_factory=BookState)
    note: str = ""
    mode: str | None = None
    fresh: bool = False


class CannotRestore(StorageError):  # noqa: N818 - named for what happened
    """What is stored may not be touched: it is a newer version's or another switch's. Orders stay denied meanwhile."""


def choose_start(loaded: Loaded, last_audited: Sequence[dict[str, Any]], now: Instant, policies: Policies) -> Start:
    """Decide where to start.

    Args:
        loaded: what the state folder held.
        last_audited: the newest audit events that name a state, oldest first; used only where no state is stored.
        now: the present moment.
        policies: for the restriction of a kill.

    Raises:
        CannotRestore: the files belong to another switch or a newer version.
    """
    match loaded:
        case Nothing():
            return _from_audit(loaded, last_audited, now, policies)
        case Restored():
            return _from_documents(loaded, last_audited, now, policies)
        case Lost():
            return _killed(CauseCode.STATE_LOST, loaded.reason, now, policies, epoch=_epoch_of(last_audited))
        case FutureVersion():
            raise CannotRestore(
                f"{loaded.path} was written in format version {loaded.found}; this sidecar reads version "
                f"{loaded.supported}: run the newer sidecar, or move the file away"
            )
        case ForeignSwitch():
            raise CannotRestore(
                f"{loaded.path} belongs to switch {loaded.found!r}, this is {loaded.expected!r}: give each switch "
                "its own storage.dir"
            )


def _from_documents(
    loaded: Restored, last_audited: Sequence[dict[str, Any]], now: Instant, policies: Policies
) -> Start:
    try:
        start = _from_document(loaded.document, now)
        if loaded.alternative is not None:
            # The save of one copy was cut off, so neither was acknowledged over the other: the stricter one counts.
            start = _stricter(start, _from_document(loaded.alternative, now))
    except StorageError as error:
        epoch = max(int(loaded.document["epoch"]), _epoch_of(last_audited))
        return _killed(CauseCode.STATE_LOST, str(error), now, policies, epoch=epoch)
    if loaded.behind_audit:
        # Above all that the audit has seen, or the next start would take this very state for rolled back again.
        return _rolled_back(start, max(loaded.audit_epoch or 0, _epoch_of(last_audited)), now, policies)
    return replace(start, note=loaded.note or "")


def _rolled_back(start: Start, audit_epoch: int, now: Instant, policies: Policies) -> Start:
    reason = "the stored state is older than the newest audit event: it was put back to an earlier day"
    # On top of what was stored: a halt that it remembers stays, whatever a kill means by policy.
    known = replace(start.state, epoch=max(start.state.epoch, audit_epoch))
    cause = Cause(code=CauseCode.STATE_ROLLED_BACK, reason=reason, time=now.wall)
    return replace(start, state=transition(known, Kill(cause=cause), now, policies), note=reason)


def _from_document(document: dict[str, Any], now: Instant) -> Start:
    return Start(
        state=state_from_document(document, now),
        triggers={name: trigger_from_document(one, now) for name, one in document.get("timers", {}).items()},
        asked=asked_from_document(document.get("asked", [])),
        lockouts=lockouts_from_document(document.get("lockouts", {}), now),
        alerts=BookState.from_document(document.get("alerts", []), now),
        mode=document.get("mode"),
    )


def _stricter(one: Start, other: Start) -> Start:
    def severity(start: Start) -> tuple[int, int, float]:
        return _SEVERITY.get(start.state.state, 2), start.state.kill_restriction, -start.state.factor

    chosen = max(one, other, key=severity)
    state = replace(chosen.state, epoch=max(one.state.epoch, other.state.epoch))
    alerts = chosen.alerts.stricter(other.alerts if chosen is one else one.alerts)
    asked = (*one.asked, *(asked for asked in other.asked if asked not in one.asked))
    return replace(chosen, state=state, asked=asked, lockouts=_longer(one.lockouts, other.lockouts), alerts=alerts)


def _longer(one: Lockouts, other: Lockouts) -> Lockouts:
    by_name = dict(other.by_name)
    for name, attempts in one.by_name.items():
        known = by_name.get(name, attempts)
        by_name[name] = max(attempts, known, key=lambda attempts: (attempts.failures, attempts.until))
    return Lockouts(by_name=by_name)


def _from_audit(loaded: Nothing, events: Sequence[dict[str, Any]], now: Instant, policies: Policies) -> Start:
    fresh = SwitchState(since=now.wall)
    if not loaded.audit_epoch:  # none at all, or a first start that never changed anything
        return Start(state=fresh, triggers={}, lockouts=Lockouts(), fresh=True)
    if not events:
        reason = f"both state files are gone; the audit knows epoch {loaded.audit_epoch}, but not in which state it was"
        return _killed(CauseCode.STATE_LOST, reason, now, policies, epoch=loaded.audit_epoch)
    last = events[-1]
    if last.get("to") == State.ACTIVE.value and (last.get("data") or {}).get("factor") == 1.0:
        held = _held_since(events)
        if held is None:
            return Start(state=replace(fresh, epoch=loaded.audit_epoch), triggers={}, lockouts=Lockouts())
        reason = (
            "both state files are gone, and the audit says that a rule that restricted orders was taken out at "
            f"{held}: what it asked for was to hold until an approved recovery"
        )
        return _killed(CauseCode.STATE_LOST, reason, now, policies, epoch=loaded.audit_epoch)
    reason = f"both state files are gone, and the audit says that the switch was {last.get('to')} at {last.get('time')}"
    return _killed(CauseCode.STATE_LOST, reason, now, policies, epoch=loaded.audit_epoch)


def _held_since(events: Sequence[dict[str, Any]]) -> str | None:
    """When a rule was taken out whose restriction no approved recovery has lifted since; None where none was."""
    for event in reversed(events):
        if event.get("type") == TYPES[EventKind.BEGIN]:
            return None
        if event.get("type") == TYPES[EventKind.HOLD]:
            return str(event.get("time"))
    return None


def _epoch_of(events: Sequence[dict[str, Any]]) -> int:
    return max((int((event.get("data") or {}).get("epoch", 0)) for event in events), default=0)


def _killed(code: CauseCode, reason: str, now: Instant, policies: Policies, *, epoch: int) -> Start:
    state = restored_kill(code, reason, now, epoch=epoch, policies=policies)
    return Start(state=state, triggers={}, lockouts=Lockouts(), note=reason)
