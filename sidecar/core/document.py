"""The switch's state as a plain document and back, so that a restart goes on exactly where it stopped.

Moments on the running clock mean nothing to the next process. They are stored as seconds elapsed (or left), so time
spent down does not count and a wall clock that was set back cannot shorten anything.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from sidecar.core.errors import StorageError
from sidecar.core.events import Approval, Cause, CauseCode, Demand, Waiver
from sidecar.core.recovery import Attempts, Lockouts
from sidecar.core.states import Action, Instant, Restriction, Stage, State
from sidecar.core.transitions import Recovery, SwitchState

Document = dict[str, Any]


def state_document(state: SwitchState, now: Instant) -> Document:
    """The durable form of a state, JSON-able."""
    return {
        "state": state.state.value,
        "since": state.since,
        "epoch": state.epoch,
        "factor": state.factor,
        "restriction": state.kill_restriction.label,
        "causes": [_cause_document(cause) for cause in state.causes],
        "recovery": None if state.recovery is None else _recovery_document(state.recovery, now),
        "waivers": [_waiver_document(waiver, now) for waiver in state.waivers],
        "held": demands_document(state.held),
        "acknowledged": [list(firing) for firing in state.acknowledged],
        "kills_in_a_row": state.kills_in_a_row,
        "last_kill_elapsed": None if state.last_kill_mono is None else now.mono - state.last_kill_mono,
    }


def state_from_document(document: Mapping[str, Any], now: Instant) -> SwitchState:
    """Read a durable form back.

    Raises:
        StorageError: a part is missing or of the wrong kind; the message names it.
    """
    try:
        return SwitchState(
            state=_state(document["state"]),
            since=float(document["since"]),
            epoch=int(document["epoch"]),
            factor=_factor(document["factor"]),
            kill_restriction=Restriction.from_label(document["restriction"]),
            causes=tuple(_cause(one) for one in document["causes"]),
            recovery=None if document["recovery"] is None else _recovery(document["recovery"], now),
            waivers=tuple(_waiver(one, now) for one in document["waivers"]),
            held=demands_from_document(document["held"]),
            acknowledged=tuple((str(one[0]), str(one[1]), float(one[2])) for one in document["acknowledged"]),
            kills_in_a_row=int(document["kills_in_a_row"]),
            last_kill_mono=_moment(document["last_kill_elapsed"], now),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"the stored state cannot be read: {type(error).__name__} {error}") from error


def _state(value: Any) -> State:
    state = State(value)
    if state is State.DISABLED:
        raise ValueError("DISABLED is never stored, for what was in force before would be forgotten")
    return state


def _factor(value: Any) -> float:
    factor = float(value)
    if not 0.0 <= factor <= 1.0:
        raise ValueError(f"factor {value!r} is not between 0 and 1")
    return factor


def _moment(elapsed: float | None, now: Instant) -> float | None:
    return None if elapsed is None else now.mono - float(elapsed)


def _cause_document(cause: Cause) -> Document:
    return {
        "code": cause.code.value,
        "reason": cause.reason,
        "time": cause.time,
        "trigger": cause.trigger,
        "by": cause.by,
        "by_verified": cause.by_verified,
        "value": cause.value,
        "limit": cause.limit,
        "count": cause.count,
    }


def _cause(document: Mapping[str, Any]) -> Cause:
    return Cause(
        code=CauseCode(document["code"]),
        reason=str(document["reason"]),
        time=float(document["time"]),
        trigger=_text(document["trigger"]),
        by=_text(document["by"]),
        by_verified=bool(document["by_verified"]),
        value=_number(document["value"]),
        limit=_number(document["limit"]),
        count=int(document["count"]),
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _recovery_document(recovery: Recovery, now: Instant) -> Document:
    return {
        "stage": recovery.stage.value,
        "by": recovery.by,
        "reason": recovery.reason,
        "requested": recovery.requested,
        "approvals": [
            {
                "by": approval.by,
                "by_verified": approval.by_verified,
                "granted": approval.granted,
                "elapsed": now.mono - approval.granted_mono,
            }
            for approval in recovery.approvals
        ],
        "waivers": [_waiver_document(waiver, now) for waiver in recovery.waivers],
        "cooldown": recovery.cooldown,
        "stage_elapsed": now.mono - recovery.stage_since,
        "step_elapsed": now.mono - recovery.step_since,
    }


def _recovery(document: Mapping[str, Any], now: Instant) -> Recovery:
    return Recovery(
        stage=Stage(document["stage"]),
        by=str(document["by"]),
        reason=str(document["reason"]),
        requested=float(document["requested"]),
        approvals=tuple(
            Approval(
                by=str(one["by"]),
                by_verified=bool(one["by_verified"]),
                granted=float(one["granted"]),
                granted_mono=now.mono - float(one["elapsed"]),
            )
            for one in document["approvals"]
        ),
        waivers=tuple(_waiver(one, now) for one in document["waivers"]),
        cooldown=float(document["cooldown"]),
        stage_since=now.mono - float(document["stage_elapsed"]),
        step_since=now.mono - float(document["step_elapsed"]),
    )


def _waiver_document(waiver: Waiver, now: Instant) -> Document:
    return {
        "trigger": waiver.trigger,
        "threshold": waiver.threshold,
        "until": waiver.until,
        "left": waiver.until_mono - now.mono,
        "by": waiver.by,
    }


def _waiver(document: Mapping[str, Any], now: Instant) -> Waiver:
    threshold = document["threshold"]
    return Waiver(
        trigger=str(document["trigger"]),
        threshold=None if threshold is None else float(threshold),
        until=float(document["until"]),
        until_mono=now.mono + float(document["left"]),
        by=str(document["by"]),
    )


def demands_document(demands: Iterable[Demand]) -> list[Document]:
    """The durable form of what rules ask for."""
    return [_demand_document(demand) for demand in demands]


def demands_from_document(document: Iterable[Mapping[str, Any]]) -> tuple[Demand, ...]:
    """Read what rules asked for back; raise StorageError where it cannot be read."""
    try:
        return tuple(_demand(one) for one in document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"a stored demand cannot be read: {type(error).__name__} {error}") from error


def _demand_document(demand: Demand) -> Document:
    return {
        "trigger": demand.trigger,
        "action": demand.action.label,
        "factor": demand.factor,
        "code": demand.code.value,
        "message": demand.message,
        "value": demand.value,
        "limit": demand.limit,
        "since": demand.since,
    }


def _demand(document: Mapping[str, Any]) -> Demand:
    return Demand(
        trigger=str(document["trigger"]),
        action=Action[str(document["action"]).upper()],
        factor=None if document["factor"] is None else _factor(document["factor"]),
        code=CauseCode(document["code"]),
        message=str(document["message"]),
        value=_number(document["value"]),
        limit=_number(document["limit"]),
        since=float(document["since"]),
    )


def lockouts_document(lockouts: Lockouts, now: Instant) -> Document:
    """The durable form of the lock-outs."""
    return {
        name: {"failures": attempts.failures, "left": max(0.0, attempts.until - now.mono)}
        for name, attempts in lockouts.by_name.items()
    }


def lockouts_from_document(document: Mapping[str, Any], now: Instant) -> Lockouts:
    """Read lock-outs back; raise StorageError where they cannot be read."""
    try:
        return Lockouts(
            by_name={
                str(name): Attempts(failures=int(one["failures"]), until=now.mono + float(one["left"]))
                for name, one in document.items()
            }
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"the stored lock-outs cannot be read: {type(error).__name__} {error}") from error
