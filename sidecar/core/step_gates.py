"""Whether a restart step may be taken: its gates are measured again and again, and what is unknown never advances.

A measurement passes, fails, is inconclusive (the source answers, but not with a usable number) or is an error (no
answer). Each gate says how many of the latter three it bears; the limits mean what they mean in an analysis of Argo
Rollouts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

from sidecar.core.policy import StepGate


class Outcome(IntEnum):
    """What one measurement of a gate said."""

    PASSED = 0
    ERROR = 1
    INCONCLUSIVE = 2
    FAILED = 3


class Verdict(IntEnum):
    """What a gate means for its step; of several gates the largest counts."""

    PASS = 0
    WAIT = 1
    HOLD = 2
    STEP_BACK = 3
    KILL = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """The measurements of one gate since its step became due.

    Attributes:
        failures, inconclusive: in all.
        errors: in a row.
        last: the newest outcome; None before the first.
    """

    failures: int = 0
    inconclusive: int = 0
    errors: int = 0
    last: Outcome | None = None

    def with_outcome(self, outcome: Outcome) -> "Tally":
        """Count one more measurement."""
        return replace(
            self,
            failures=self.failures + (outcome is Outcome.FAILED),
            inconclusive=self.inconclusive + (outcome is Outcome.INCONCLUSIVE),
            errors=self.errors + 1 if outcome is Outcome.ERROR else 0,
            last=outcome,
        )


def judge(gate: StepGate, tally: Tally) -> Verdict:
    """What a gate's measurements so far mean for its step.

    More failures, or more errors in a row, than the gate bears lead back (or to a kill); more inconclusive ones hold
    the step where it is until the gate passes.
    """
    if tally.failures > gate.failure_limit or tally.errors > gate.consecutive_error_limit:
        return Verdict.KILL if gate.on_failure == "kill" else Verdict.STEP_BACK
    if tally.last is Outcome.PASSED:
        return Verdict.PASS
    return Verdict.HOLD if tally.inconclusive > gate.inconclusive_limit else Verdict.WAIT


def judge_all(gates: Iterable[tuple[StepGate, Tally]]) -> Verdict:
    """What all gates of a step together mean for it."""
    return max((judge(gate, tally) for gate, tally in gates), default=Verdict.PASS)
