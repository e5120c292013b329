"""Gates of restart steps: what passes, what waits, what leads back, and that nothing unknown ever advances."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.app.step_gates import StepGateKeeper
from sidecar.core.policy import RestartStep, StepGate
from sidecar.core.states import Instant
from sidecar.core.step_gates import Outcome, Tally, Verdict, judge, judge_all
from sidecar.rules.readings import Answer, Failure, Series

GATE = StepGate(query="errors", operator="lt", threshold=1.0)


def tally(*outcomes: Outcome) -> Tally:
    result = Tally()
    for outcome in outcomes:
        result = result.with_outcome(outcome)
    return result


PASSED, ERROR, UNKNOWN, FAILED = Outcome.PASSED, Outcome.ERROR, Outcome.INCONCLUSIVE, Outcome.FAILED


@pytest.mark.parametrize(
    ("limits", "outcomes", "verdict"),
    [
        ({}, [], Verdict.WAIT),
        ({}, [PASSED], Verdict.PASS),
        ({}, [FAILED], Verdict.STEP_BACK),
        ({"on_failure": "kill"}, [FAILED], Verdict.KILL),
        ({"failure_limit": 1}, [FAILED], Verdict.WAIT),
        ({"failure_limit": 1}, [FAILED, PASSED], Verdict.PASS),
        ({"failure_limit": 1}, [FAILED, PASSED, FAILED], Verdict.STEP_BACK),
        ({}, [UNKNOWN], Verdict.HOLD),
        ({}, [UNKNOWN, PASSED], Verdict.PASS),
        ({"inconclusive_limit": 2}, [UNKNOWN, UNKNOWN], Verdict.WAIT),
        ({"inconclusive_limit": 2}, [UNKNOWN, UNKNOWN, UNKNOWN], Verdict.HOLD),
        ({}, [ERROR, ERROR, ERROR, ERROR], Verdict.WAIT),
        ({}, [ERROR, ERROR, ERROR, ERROR, ERROR], Verdict.STEP_BACK),
        ({}, [ERROR, ERROR, ERROR, ERROR, UNKNOWN, ERROR], Verdict.HOLD),
        ({}, [ERROR] * 4 + [PASSED] + [ERROR] * 4, Verdict.WAIT),
        ({"consecutive_error_limit": 0, "failure_limit": 1}, [FAILED, PASSED], Verdict.PASS),
        ({"consecutive_error_limit": 0, "on_failure": "kill"}, [ERROR], Verdict.KILL),
    ],
)
def test_what_measurements_mean_for_a_step(
    limits: dict[str, object], outcomes: list[Outcome], verdict: Verdict
) -> None:
    gate = StepGate(query="q", operator="lt", threshold=1.0, **limits)  # type: ignore[arg-type]
    assert judge(gate, tally(*outcomes)) is verdict


def test_the_worst_of_several_gates_counts_and_no_gate_passes() -> None:
    assert judge_all([]) is Verdict.PASS
    assert judge_all([(GATE, tally(PASSED)), (GATE, tally(UNKNOWN)), (GATE, tally(FAILED))]) is Verdict.STEP_BACK
    assert judge_all([(GATE, tally(PASSED)), (GATE, tally(ERROR))]) is Verdict.WAIT


@given(
    st.lists(st.sampled_from([ERROR, UNKNOWN, FAILED]), max_size=20),
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(0, 30),
)
def test_nothing_but_a_pass_at_the_last_look_ever_advances(
    outcomes: list[Outcome], failures: int, inconclusive: int, errors: int
) -> None:
    gate = StepGate(
        query="q",
        operator="lt",
        threshold=1.0,
        failure_limit=failures,
        inconclusive_limit=inconclusive,
        consecutive_error_limit=errors,
    )
    assert judge(gate, tally(PASSED, *outcomes)) is not Verdict.PASS or not outcomes


class Clock:
    mono = 100.0

    def now(self) -> Instant:
        return Instant(mono=self.mono, wall=self.mono)


class Source:
    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.answers: dict[str, Answer | Failure] = {}

    async def __call__(self, queries: Sequence[str]) -> list[Answer | Failure]:
        self.asked.append(list(queries))
        return [self.answers[query] for query in queries]


def answer(*values: float, warnings: tuple[str, ...] = ()) -> Answer:
    series = tuple(Series(value=value) for value in values)
    return Answer(series=series, evaluated_at=1.0, oldest_sample=1.0, warnings=warnings)


def sampled(age: float) -> Answer:
    return Answer(series=(Series(value=0.5),), evaluated_at=1000.0, oldest_sample=1000.0 - age)


STEP = RestartStep(factor=0.75, after=60.0, gates=(GATE,))


@pytest.mark.parametrize(
    ("said", "verdict", "why"),
    [
        (answer(0.5, 0.9), Verdict.PASS, ""),
        (answer(0.5, 1.0), Verdict.STEP_BACK, "errors < 1: seen 0.5, 1"),
        (answer(), Verdict.HOLD, "errors < 1: no data"),
        (answer(float("nan")), Verdict.HOLD, "errors < 1: [nan]"),
        (answer(0.5, warnings=("half of it",)), Verdict.HOLD, "errors < 1: half of it"),
        (sampled(60.0), Verdict.PASS, ""),
        (sampled(299.0), Verdict.HOLD, "errors < 1: stale: the sample is 299.0 s old, more than 60 s"),
        (
            sampled(-60.0),
            Verdict.HOLD,
            "errors < 1: future: the sample is 60.0 s in the future of the server's own clock",
        ),
        (Failure(reason="timeout", message="late", unreachable=True), Verdict.WAIT, "errors < 1: timeout: late"),
    ],
)
async def test_an_answer_becomes_a_finding(said: Answer | Failure, verdict: Verdict, why: str) -> None:
    source = Source()
    source.answers["errors"] = said
    finding = await StepGateKeeper(clock=Clock(), ask=source).look(STEP, 1.0)
    assert (finding.verdict, finding.why) == (verdict, why)


async def test_a_finding_shows_all_digits_that_tell_what_was_seen_from_what_is_wanted() -> None:
    source = Source()
    gate = replace(GATE, query="time", operator="gt", threshold=1_795_864_568.25)
    source.answers["time"] = answer(1_795_864_567.5, 3.0)
    finding = await StepGateKeeper(clock=Clock(), ask=source).look(replace(STEP, gates=(gate,)), 1.0)
    assert finding.why == "time > 1795864568.25: seen 1795864567.5, 3"


async def test_a_gate_bears_samples_as_old_as_it_says() -> None:
    source = Source()
    source.answers["errors"] = sampled(299.0)
    step = RestartStep(factor=0.75, after=60.0, gates=(replace(GATE, max_age=300.0),))
    assert (await StepGateKeeper(clock=Clock(), ask=source).look(step, 1.0)).verdict is Verdict.PASS


async def test_a_gate_is_measured_at_its_own_pace_and_anew_for_another_step() -> None:
    source, clock = Source(), Clock()
    source.answers["errors"] = Failure(reason="timeout", message="late", unreachable=True)
    keeper = StepGateKeeper(clock=clock, ask=source)
    await keeper.look(STEP, 1.0)
    await keeper.look(STEP, 1.0)
    assert len(source.asked) == 1
    clock.mono += GATE.interval
    await keeper.look(STEP, 1.0)
    assert len(source.asked) == 2
    await keeper.look(STEP, 2.0)
    assert len(source.asked) == 3


async def test_a_step_without_gates_asks_nobody() -> None:
    source = Source()
    assert (await StepGateKeeper(clock=Clock(), ask=source).look(RestartStep(factor=1.0), 1.0)).verdict is Verdict.PASS
    assert source.asked == []
