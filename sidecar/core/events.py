"""What can happen to a switch: frozen records of who, what and why, each of a kind that the transition table knows.

An event says what somebody did or saw. Whether it changes anything is the table's decision, not the event's.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from sidecar.core.states import Action, Instant, Restriction


class EventKind(StrEnum):
    """The columns of the transition table."""

    KILL = "kill"
    REQUEST = "request_recovery"
    APPROVE = "approve"
    REFUSE = "refuse_recovery"
    EXPIRE = "approvals_expired"
    BEGIN = "begin_recovery"
    CANCEL = "cancel_recovery"
    HEALTH_LOST = "health_lost"
    REOPEN = "reopen"
    STEP = "step_up"
    STEP_BACK = "step_back"
    CONCLUDE = "conclude"
    WAIVER_ENDED = "waiver_ended"
    HOLD = "hold_removed"


class CauseCode(StrEnum):
    """Where a kill came from."""

    BREACH = "breach"
    NO_DATA = "no_data"
    ALERT = "alert"
    OPERATOR = "operator"
    STEP_GATE = "step_gate"
    RESTORED = "restored"
    STATE_LOST = "state_lost"
    STATE_ROLLED_BACK = "state_rolled_back"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cause:
    """One reason for a kill.

    Attributes:
        code: where it came from.
        reason: one sentence.
        time: Unix seconds.
        trigger: the rule, if a rule did it.
        by: who, if a person or program did it.
        by_verified: True where a credential proved `by`, False where it is only a claim.
        value, limit: what was read and what it was compared with.
        count: how often the same cause was seen since the kill.
    """

    code: CauseCode
    reason: str
    time: float
    trigger: str | None = None
    by: str | None = None
    by_verified: bool = False
    value: float | None = None
    limit: float | None = None
    count: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What a firing rule asks of the switch for as long as it fires.

    Attributes:
        trigger: the rule.
        action: what it asks for.
        factor: position limit factor of a throttle; None otherwise.
        code: whether it breached, could not see, or an alert fired.
        message: one sentence with the value and the limit.
        value, limit: what was read and what it was compared with.
        since: Unix seconds since when it holds; a later one is a new firing.
    """

    trigger: str
    action: Action
    factor: float | None = None
    code: CauseCode
    message: str
    value: float | None = None
    limit: float | None = None
    since: float

    def as_cause(self) -> Cause:
        """The cause that this demand gives for a kill."""
        return Cause(
            code=self.code,
            reason=self.message,
            time=self.since,
            trigger=self.trigger,
            by=f"rule {self.trigger}",
            by_verified=True,
            value=self.value,
            limit=self.limit,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Approval:
    """One person's yes to a recovery.

    Attributes:
        by: the approver's name.
        by_verified: True where the code belongs to that name, False where the name is only a claim.
        granted: Unix seconds.
        granted_mono: the same moment in running seconds.
    """

    by: str
    by_verified: bool
    granted: float
    granted_mono: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiver:
    """A rule that may go on firing for a while without stopping a recovery.

    Attributes:
        trigger: the rule.
        threshold: the new threshold that holds meanwhile; None leaves the rule without effect.
        until: Unix seconds of its end.
        until_mono: its end in running seconds; whichever clock comes first ends it.
        by: who asked for it.
    """

    trigger: str
    threshold: float | None
    until: float
    until_mono: float
    by: str

    def ended(self, now: Instant) -> bool:
        """Whether its time is over, by whichever clock got there first."""
        return now.mono >= self.until_mono or now.wall >= self.until


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """Stop: by a rule, an operator, a webhook, or by us because what we know cannot be trusted."""

    kind: ClassVar[EventKind] = EventKind.KILL
    cause: Cause
    restriction: Restriction | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestRecovery:
    """Somebody asks to trade again; their own approval comes with it where approval is required."""

    kind: ClassVar[EventKind] = EventKind.REQUEST
    by: str
    reason: str
    approval: Approval | None
    waivers: tuple[Waiver, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Approve:
    """One more person agrees."""

    kind: ClassVar[EventKind] = EventKind.APPROVE
    approval: Approval


@dataclass(frozen=True, kw_only=True, slots=True)
class RefuseRecovery:
    """The checks after the last approval did not pass; that approval does not count."""

    kind: ClassVar[EventKind] = EventKind.REFUSE
    blockers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpireApprovals:
    """An approval got too old before the recovery began."""

    kind: ClassVar[EventKind] = EventKind.EXPIRE


@dataclass(frozen=True, kw_only=True, slots=True)
class BeginRecovery:
    """All approvals are there, triggers are clear or waived, checks are healthy: the cooldown starts.

    Attributes:
        taken_as_clear: the causes of the kill that no rule can clear any more, in words.
    """

    kind: ClassVar[EventKind] = EventKind.BEGIN
    taken_as_clear: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class CancelRecovery:
    """Somebody takes the recovery back."""

    kind: ClassVar[EventKind] = EventKind.CANCEL
    by: str
    reason: str = "cancelled"
    by_verified: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthLost:
    """A check that the recovery depends on failed while it was under way."""

    kind: ClassVar[EventKind] = EventKind.HEALTH_LOST
    failures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reopen:
    """The cooldown is over, triggers are clear or waived, checks are healthy: trade at the first restart step."""

    kind: ClassVar[EventKind] = EventKind.REOPEN


@dataclass(frozen=True, kw_only=True, slots=True)
class StepUp:
    """The next restart step is due and its gates pass."""

    kind: ClassVar[EventKind] = EventKind.STEP


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBack:
    """A restart step's gate failed: back to the step before, whose time starts anew."""

    kind: ClassVar[EventKind] = EventKind.STEP_BACK
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Conclude:
    """The recovery has been complete for a while; nothing is left to show."""

    kind: ClassVar[EventKind] = EventKind.CONCLUDE


@dataclass(frozen=True, kw_only=True, slots=True)
class EndWaiver:
    """A waiver's time is over: its rule is armed again."""

    kind: ClassVar[EventKind] = EventKind.WAIVER_ENDED
    trigger: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HoldRemoved:
    """A rule was taken out while it restricted trading: what it asked for stays until an approved recovery."""

    kind: ClassVar[EventKind] = EventKind.HOLD
    demands: tuple[Demand, ...]


Event = (
    Kill
    | RequestRecovery
    | Approve
    | RefuseRecovery
    | ExpireApprovals
    | BeginRecovery
    | CancelRecovery
    | HealthLost
    | Reopen
    | StepUp
    | StepBack
    | Conclude
    | EndWaiver
    | HoldRemoved
)
