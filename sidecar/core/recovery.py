"""What a recovery waits for: the time in approval, cooldown and restart ladder, and the lock-out of wrong codes.

Everything here counts running seconds, so a step of the wall clock changes nothing and time spent down does not count.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum

from sidecar.core.errors import LockedOut
from sidecar.core.states import Instant, Stage, State
from sidecar.core.transitions import Policies, SwitchState, approvals_lapsed, next_step

COMPLETE_SHOWN_SECONDS = 60.0
"""How long a finished recovery is shown as COMPLETE, so that a scrape every 30 s sees it."""


class Due(StrEnum):
    """What the passing of time makes possible; whether it happens may depend on triggers, health and gates."""

    EXPIRE = "expire"
    VALIDATE = "validate"
    REOPEN = "reopen"
    STEP = "step"
    CONCLUDE = "conclude"
    END_WAIVER = "end_waiver"


def due(state: SwitchState, now: Instant, policies: Policies) -> Due | None:
    """What is due in the recovery at this moment; None if nothing is."""
    recovery = state.recovery
    if recovery is None:
        return None
    match recovery.stage:
        case Stage.PENDING:
            return Due.EXPIRE if _approvals_lapsed(state, now, policies) else None
        case Stage.VALIDATING:
            return Due.EXPIRE if _approvals_lapsed(state, now, policies) else Due.VALIDATE
        case Stage.COOLDOWN:
            return Due.REOPEN if cooldown_remaining(state, now) <= 0 else None
        case Stage.GRADUAL_RESTART:
            return Due.STEP if next_step_in(state, now, policies) == 0.0 else None
        case _:
            return Due.CONCLUDE if now.mono - recovery.stage_since >= COMPLETE_SHOWN_SECONDS else None


def _approvals_lapsed(state: SwitchState, now: Instant, policies: Policies) -> bool:
    return state.recovery is not None and approvals_lapsed(state.recovery, now, policies.recovery)


def ended_waivers(state: SwitchState, now: Instant) -> Iterator[str]:
    """Triggers whose waiver is over, by whichever clock got there first."""
    return (waiver.trigger for waiver in state.waivers if waiver.ended(now))


def cooldown_remaining(state: SwitchState, now: Instant) -> float:
    """Seconds of cooldown still to run; 0 outside the cooldown."""
    recovery = state.recovery
    if recovery is None or recovery.stage is not Stage.COOLDOWN:
        return 0.0
    return max(0.0, recovery.cooldown - (now.mono - recovery.stage_since))


def next_step_in(state: SwitchState, now: Instant, policies: Policies) -> float | None:
    """Seconds until the next restart step is due; None outside the ladder, and where no step is left."""
    recovery, step = state.recovery, next_step(state, policies.recovery)
    if recovery is None or step is None:
        return None
    return max(0.0, step.after - (now.mono - recovery.stage_since))


def needs_checkpoint(state: SwitchState) -> bool:
    """Whether running time is being counted that a restart must not lose."""
    counting = state.recovery is not None or bool(state.waivers)
    return counting or (state.last_kill_mono is not None and state.state is not State.DISABLED)


FREE_FAILURES = 5
FIRST_LOCKOUT_SECONDS = 30.0
LONGEST_LOCKOUT_SECONDS = 900.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempts:
    """Wrong codes given in one approver's name. `until` is in running seconds."""

    failures: int = 0
    until: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Lockouts:
    """Who gave wrong codes, and until when their codes are not read.

    From the fifth wrong code in a row on, each one locks its name out: 30 s, then twice as long each time, up to 15
    minutes. A right code forgets all that.
    """

    by_name: dict[str, Attempts] = field(default_factory=dict)

    def check(self, name: str, now: Instant) -> None:
        """Raise LockedOut where the name's codes are not read at the moment."""
        attempts = self.by_name.get(name, Attempts())
        if now.mono < attempts.until:
            wait = attempts.until - now.mono
            raise LockedOut(
                f"{attempts.failures} wrong approval codes: the next one is read in {wait:.0f} s", retry_after=wait
            )

    def failed(self, name: str, now: Instant) -> "Lockouts":
        """Count a wrong code."""
        failures = self.by_name.get(name, Attempts()).failures + 1
        excess = failures - FREE_FAILURES
        wait = 0.0 if excess < 0 else min(FIRST_LOCKOUT_SECONDS * 2.0 ** min(excess, 10), LONGEST_LOCKOUT_SECONDS)
        attempts = Attempts(failures=failures, until=now.mono + wait if wait else 0.0)
        return replace(self, by_name={**self.by_name, name: attempts})

    def succeeded(self, name: str) -> "Lockouts":
        """Forget a name's wrong codes after a right one."""
        return replace(self, by_name={key: value for key, value in self.by_name.items() if key != name})
