"""Measures the gates of the restart step that is due, each at its own pace, and says what they mean together."""

from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.app.clock import Clock
from sidecar.app.health import AsksQueries
from sidecar.core.policy import RestartStep, StepGate
from sidecar.core.step_gates import Outcome, Tally, Verdict, judge, judge_all
from sidecar.rules.model import Operator
from sidecar.rules.readings import Answer, Failed, Failure, Fresh, Missing, Partial, Reading, describe, take_reading


@dataclass(frozen=True, kw_only=True, slots=True)
class GateFinding:
    """What the gates of a step mean, and the sentence that says why."""

    verdict: Verdict
    why: str


PASSES = GateFinding(verdict=Verdict.PASS, why="")


class StepGateKeeper:
    """Keeps the tallies of one step at a time.

    Args:
        clock: where `now` comes from.
        ask: answers the gates' queries.
    """

    def __init__(self, *, clock: Clock, ask: AsksQueries) -> None:
        self._clock = clock
        self._ask = ask
        self._step: tuple[RestartStep, float] | None = None
        self._tallies: dict[int, Tally] = {}
        self._due: dict[int, float] = {}
        self._seen: dict[int, str] = {}

    async def look(self, step: RestartStep, since: float) -> GateFinding:
        """Measure what is due of a step's gates.

        Args:
            step: the step that is to be taken.
            since: running seconds when the step before was taken; another one begins new tallies.
        """
        if not step.gates:
            return PASSES
        if self._step != (step, since):
            self._step = (step, since)
            self._tallies, self._due, self._seen = {}, {}, {}
        await self._measure(step.gates)
        if self._step != (step, since):
            return GateFinding(verdict=Verdict.WAIT, why="another step became due meanwhile")
        return self._find(step.gates)

    def start_over(self) -> None:
        """Forget what was measured, each gate still at its own pace: for a step that can only wait, never go back."""
        self._tallies = {}

    async def _measure(self, gates: Sequence[StepGate]) -> None:
        now = self._clock.now().mono
        due = [index for index in range(len(gates)) if now >= self._due.get(index, now)]
        if not due:
            return
        answers = await self._ask([gates[index].query for index in due])
        for index, answer in zip(due, answers, strict=True):
            outcome, seen = _outcome(gates[index], answer)
            self._tallies[index] = self._tallies.get(index, Tally()).with_outcome(outcome)
            self._seen[index] = seen
            self._due[index] = now + gates[index].interval

    def _find(self, gates: Sequence[StepGate]) -> GateFinding:
        judged = [(gate, self._tallies.get(index, Tally())) for index, gate in enumerate(gates)]
        verdict = judge_all(judged)
        if verdict is Verdict.PASS:
            return PASSES
        reasons = [
            f"{_expectation(gate)}: {self._seen.get(index, 'not measured')}"
            for index, (gate, tally) in enumerate(judged)
            if judge(gate, tally) is verdict
        ]
        return GateFinding(verdict=verdict, why="; ".join(reasons))


def _expectation(gate: StepGate) -> str:
    return f"{gate.query} {Operator(gate.operator).symbol} {_shown(gate.threshold)}"


def _shown(number: float) -> str:
    # All digits: of two Unix times that differ by an hour the first six are the same.
    return repr(float(number)).removesuffix(".0")


def _outcome(gate: StepGate, answer: Answer | Failure) -> tuple[Outcome, str]:
    if isinstance(answer, Failure):
        return Outcome.ERROR, f"{answer.reason}: {answer.message}"
    reading = take_reading(answer, max_age=gate.max_age, series=None, may_be_empty=False)
    if not isinstance(reading, Fresh):
        return Outcome.INCONCLUSIVE, _unusable(reading)
    values = [one.value for one in reading.series]
    holds = all(Operator(gate.operator).holds(value, gate.threshold) for value in values)
    return Outcome.PASSED if holds else Outcome.FAILED, f"seen {', '.join(map(_shown, values[:5]))}"


def _unusable(reading: Reading) -> str:
    match reading:
        case Partial():
            return "; ".join(reading.warnings)
        case Missing():
            return "no data"
        case Failed() if reading.series:
            return str([one.value for one in reading.series])
        case _:
            return describe(reading)
