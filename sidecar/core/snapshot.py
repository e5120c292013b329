"""One immutable picture of the switch: what the gate answers from, what status and metrics show.

A new one is made for each change; nobody ever sees half of one.
"""

from dataclasses import dataclass
from enum import StrEnum

from sidecar.core.states import Mode, Restriction, Stage, State


class ReasonCode(StrEnum):
    """Why the gate answered as it did: a closed set, safe as a metric label."""

    ACTIVE = "active"
    DISABLED = "disabled"
    SHADOW = "shadow"
    CANCEL = "cancel"
    REDUCING = "reducing"
    KILLED = "killed"
    RECOVERING = "recovering"
    HALTED = "halted"
    REDUCE_ONLY = "reduce_only"
    OVER_LIMIT = "over_limit"
    BLIND_ORDER = "blind_order"
    NOT_READY = "not_ready"
    STALE = "stale"
    BAD_ORDER = "bad_order"
    INTERNAL_ERROR = "internal_error"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """Why orders are restricted, in full.

    Attributes:
        code: one of the closed set.
        message: one sentence for a person at 3 a.m.
        trigger: the rule behind it, if any.
        value: what was read.
        limit: what it was compared with.
        since: Unix seconds since when it holds.
        release: who or what can lift it.
    """

    code: ReasonCode
    message: str
    trigger: str | None = None
    value: float | None = None
    limit: float | None = None
    since: float | None = None
    release: str = ""


ALL_CLEAR = Reason(code=ReasonCode.ACTIVE, message="no restriction")


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The switch at one moment.

    Attributes:
        switch: its name.
        mode: active, shadow or disabled.
        state, stage: where it stands.
        restriction, factor: the worst of all reasons of the switch itself (kill, recovery, firing rules).
        epoch: counts durable changes.
        since: Unix seconds of the last change of state.
        gate_restriction, gate_factor: what the gate enforces: as above, and stricter while not ready or stale, or
            nothing in shadow mode.
        reason: why the gate restricts; code `active` where it does not.
        would_be: in shadow mode, what an enforcing gate would answer from; None otherwise.
    """

    switch: str
    mode: Mode
    state: State
    stage: Stage
    restriction: Restriction
    factor: float
    epoch: int
    since: float
    gate_restriction: Restriction
    gate_factor: float
    reason: Reason
    would_be: "Snapshot | None" = None
