"""Make one snapshot of everything that restricts a switch: the worst of all reasons wins.

Restriction by `max`, factor by `min`; among reasons of equal weight, the one that an operator should hear first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sidecar.core.events import Cause, CauseCode, Demand
from sidecar.core.snapshot import ALL_CLEAR, Reason, ReasonCode, Snapshot
from sidecar.core.states import Action, Mode, Restriction, State
from sidecar.core.transitions import SwitchState

RELEASE_BY_RECOVERY = "an approved recovery: killswitch recover --reason TEXT --by NAME"


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlay:
    """What keeps the gate shut although the switch itself may be fine; each text says why, None where it does not hold.

    Attributes:
        unrestored: what was in force before is not known yet; the one text that holds in shadow mode too, for that may
            have been an operator's own kill.
        not_ready: no rules are loaded, or a rule has not had its first reading.
        stale: evaluation has stopped.
        internal_error: a part of the sidecar has failed.
    """

    unrestored: str | None = None
    not_ready: str | None = None
    stale: str | None = None
    internal_error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One reason with what it weighs."""

    restriction: Restriction
    factor: float
    reason: Reason


def compose(name: str, mode: Mode, state: SwitchState, demands: Sequence[Demand], overlay: Overlay) -> Snapshot:
    """Compose the snapshot of a switch."""
    own = [*_of_state(state), *(_of_demand(demand, state) for demand in demands if _weighs(demand, state))]
    gate = worst([*own, *_of_overlay(overlay)])
    truth = worst(own)
    if state.state is State.DISABLED:
        truth = gate = _disabled()
    enforced = _snapshot(name, mode, state, truth, gate)
    if mode is not Mode.SHADOW or state.state is State.DISABLED or overlay.unrestored is not None:
        return enforced
    if any(cause.code is CauseCode.OPERATOR for cause in state.causes):
        return enforced
    # Also where nothing restricts at the moment: position limits are part of what shadow mode only watches.
    open_gate = Weight(restriction=Restriction.NONE, factor=1.0, reason=_shadow(gate))
    return _snapshot(name, mode, state, truth, open_gate, would_be=enforced)


def worst(weights: Sequence[Weight]) -> Weight:
    """The strictest restriction, the smallest factor, and the reason of the heaviest."""
    if not weights:
        return Weight(restriction=Restriction.NONE, factor=1.0, reason=ALL_CLEAR)
    # `max` keeps the first of equals, so the order of the list is the order in which an operator should hear of them.
    heaviest = max(weights, key=lambda weight: (weight.restriction, -weight.factor))
    return Weight(
        restriction=heaviest.restriction,
        factor=min(weight.factor for weight in weights),
        reason=heaviest.reason,
    )


def _snapshot(
    name: str, mode: Mode, state: SwitchState, truth: Weight, gate: Weight, would_be: Snapshot | None = None
) -> Snapshot:
    return Snapshot(
        switch=name,
        mode=mode,
        state=state.state,
        stage=state.stage,
        restriction=truth.restriction,
        factor=truth.factor,
        epoch=state.epoch,
        since=state.since,
        gate_restriction=gate.restriction,
        gate_factor=gate.factor,
        reason=gate.reason,
        would_be=would_be,
    )


def _of_state(state: SwitchState) -> Iterator[Weight]:
    if state.state in (State.KILLED, State.RECOVERING):
        reason = _killed(state) if state.state is State.KILLED else _recovering(state)
        # NONE cannot come from a kill; whatever stored it, a kill that restricts nothing is not to be believed.
        yield Weight(restriction=state.kill_restriction or Restriction.HALT, factor=0.0, reason=reason)
    elif state.factor < 1.0:
        yield Weight(restriction=Restriction.NONE, factor=state.factor, reason=_restarting(state))


def _killed(state: SwitchState) -> Reason:
    first = state.causes[0] if state.causes else None
    more = f" (and {len(state.causes) - 1} more)" if len(state.causes) > 1 else ""
    return Reason(
        code=ReasonCode.KILLED,
        message=f"killed by {_who(first)}: {first.reason}{more}" if first else "killed",
        trigger=first.trigger if first else None,
        value=first.value if first else None,
        limit=first.limit if first else None,
        since=state.since,
        release=RELEASE_BY_RECOVERY,
    )


def _who(cause: Cause) -> str:
    return cause.by or cause.code.value.replace("_", " ")


def _recovering(state: SwitchState) -> Reason:
    return Reason(
        code=ReasonCode.RECOVERING,
        message="an approved recovery is in its cooldown; orders are blocked as before",
        trigger=next((cause.trigger for cause in state.causes), None),
        since=state.since,
        release="the end of the cooldown, with triggers clear and checks healthy",
    )


def _restarting(state: SwitchState) -> Reason:
    return Reason(
        code=ReasonCode.ACTIVE,
        message="gradual restart after a kill",  # the gate says at which factor
        since=state.since,
        release="the next restart step",
    )


_DEMAND_CODES = {
    Action.THROTTLE: ReasonCode.ACTIVE,
    Action.REDUCE_ONLY: ReasonCode.REDUCE_ONLY,
    Action.HALT: ReasonCode.HALTED,
    Action.KILL: ReasonCode.HALTED,
}


def _weighs(demand: Demand, state: SwitchState) -> bool:
    if demand.action is Action.KILL:
        # The kill it asked for weighs as the policy says. Counted again here, it would be a halt that traps exits.
        return state.state not in (State.KILLED, State.RECOVERING)
    return demand.action > Action.WARN


def _of_demand(demand: Demand, state: SwitchState) -> Weight:
    return Weight(
        restriction=demand.action.restriction,
        factor=(demand.factor or 0.0) if demand.action is Action.THROTTLE else 1.0,
        reason=Reason(
            code=_DEMAND_CODES[demand.action],
            message=demand.message,
            trigger=demand.trigger,
            value=demand.value,
            limit=demand.limit,
            since=demand.since,
            release=_release_of(demand, state),
        ),
    )


def _release_of(demand: Demand, state: SwitchState) -> str:
    if demand in state.held:
        return f"rule {demand.trigger} was removed while it restricted trading; the next approved recovery lifts it"
    if demand.action is Action.KILL:
        return RELEASE_BY_RECOVERY
    return f"lifts by itself when rule {demand.trigger} clears"


def _of_overlay(overlay: Overlay) -> Iterator[Weight]:
    for code, text in (
        (ReasonCode.INTERNAL_ERROR, overlay.internal_error),
        (ReasonCode.NOT_READY, overlay.unrestored),
        (ReasonCode.NOT_READY, overlay.not_ready),
        (ReasonCode.STALE, overlay.stale),
    ):
        if text is not None:
            reason = Reason(code=code, message=text, release="lifts by itself when this is no longer so")
            yield Weight(restriction=Restriction.HALT, factor=1.0, reason=reason)


def _disabled() -> Weight:
    reason = Reason(
        code=ReasonCode.DISABLED,
        message="the switch is disabled: nothing is evaluated and nothing is blocked",
        release="a restart with `mode: active`",
    )
    return Weight(restriction=Restriction.NONE, factor=1.0, reason=reason)


def _shadow(gate: Weight) -> Reason:
    reason = gate.reason
    if gate.restriction is Restriction.NONE and gate.factor >= 1.0:
        return reason
    return Reason(
        code=ReasonCode.SHADOW,
        message=f"shadow mode: would be {reason.code.value}: {reason.message}",
        trigger=reason.trigger,
        value=reason.value,
        limit=reason.limit,
        since=reason.since,
        release="nothing is blocked in shadow mode but by an operator's own kill",
    )
