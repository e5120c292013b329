"""Whatever a source answers, in whatever order: bad data clears nothing, hides nothing and forgets nothing."""

import math
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.core.states import Action, Instant
from sidecar.rules.document import trigger_document, trigger_from_document
from sidecar.rules.model import OnNoData, Operator, Rule, Step, Threshold
from sidecar.rules.readings import Answer, Failure, Fresh, Reading, Series, take_reading
from sidecar.rules.triggers import Status, Trigger, demands, evaluate, is_clear

VALUES = st.sampled_from([-0.3, -0.16, -0.15, -0.12, -0.08, 0.0, 1.0, math.nan, math.inf, -math.inf])
ANSWERS = st.builds(
    lambda values, age, warned: Answer(
        series=tuple(Series(value=value) for value in values),
        evaluated_at=1e9,
        oldest_sample=1e9 - age,
        warnings=("half",) if warned else (),
    ),
    st.lists(VALUES, max_size=3),
    st.sampled_from([0.0, 1.0, 59.0, 61.0, -10.0, math.nan]),
    st.sampled_from([False, False, False, True]),
)
FAILURES = st.builds(
    lambda unreachable: Failure(reason="timeout", message="no answer", unreachable=unreachable), st.booleans()
)
LOOKS = st.lists(st.tuples(st.sampled_from([0.5, 1.0, 30.0, 100.0]), ANSWERS | FAILURES), min_size=1, max_size=15)
RULES = st.builds(
    lambda for_, keep, clear, then, unreachable: Rule(
        trigger="dd",
        group="g",
        condition=Threshold(
            query="dd",
            operator=Operator.LT,
            threshold=-0.15,
            clear=clear,
            steps=(Step(at=-0.075, fraction=0.5, action=Action.REDUCE_ONLY),),
        ),
        for_=for_,
        keep_firing_for=keep,
        on_no_data=OnNoData(then=then, unreachable=unreachable),
    ),
    st.sampled_from([0.0, 0.0, 20.0]),
    st.sampled_from([0.0, 20.0]),
    st.sampled_from([None, -0.10]),
    st.sampled_from(list(Action)),
    st.sampled_from(list(Action)),
)
History = list[tuple[Instant, Reading, Trigger]]


def history(rule: Rule, looks: list[tuple[float, Answer | Failure]]) -> History:
    now, trigger = Instant(mono=50.0, wall=1e9), Trigger()
    seen: History = []
    for seconds, answer in looks:
        now = Instant(mono=now.mono + seconds, wall=now.wall + seconds)
        reading = take_reading(answer, max_age=60.0, series=None, may_be_empty=False)
        trigger = evaluate(rule, reading, trigger, now)
        seen.append((now, reading, trigger))
    return seen


@given(rule=RULES, looks=LOOKS)
@settings(max_examples=150, deadline=None)
def test_only_a_fresh_look_at_good_values_is_ever_clear(
    rule: Rule, looks: list[tuple[float, Answer | Failure]]
) -> None:
    for _, reading, trigger in history(rule, looks):
        assert trigger.armed is isinstance(reading, Fresh)
        if is_clear(trigger):
            assert isinstance(reading, Fresh)
            assert all(math.isfinite(one.value) and one.value >= -0.15 for one in reading.series)


@given(rule=RULES, looks=LOOKS)
@settings(max_examples=150, deadline=None)
def test_what_fires_stops_only_at_a_fresh_look_without_a_breach(
    rule: Rule, looks: list[tuple[float, Answer | Failure]]
) -> None:
    for (_, _, before), (_, reading, after) in pairwise(history(rule, looks)):
        if before.status is not Status.INACTIVE and not isinstance(reading, Fresh):
            assert after.status is not Status.INACTIVE
        if before.status is Status.FIRING and after.status is not Status.FIRING:
            assert isinstance(reading, Fresh)
            assert all(one.value >= (-0.15 if rule.condition.clear is None else -0.10) for one in reading.series)  # type: ignore[union-attr]


@given(rule=RULES, looks=LOOKS)
@settings(max_examples=150, deadline=None)
def test_a_breach_in_whole_young_data_never_goes_unseen(
    rule: Rule, looks: list[tuple[float, Answer | Failure]]
) -> None:
    for (_, answer), (now, _, trigger) in zip(looks, history(rule, looks), strict=True):
        if not isinstance(answer, Answer) or answer.warnings or not answer.oldest_sample:
            continue
        young = 0 <= answer.evaluated_at - answer.oldest_sample <= 60
        if young and any(math.isfinite(one.value) and one.value < -0.15 for one in answer.series):
            assert trigger.status is not Status.INACTIVE
            if rule.for_ == 0:
                assert Action.KILL in [demand.action for demand in demands(rule, trigger, now)]


@given(rule=RULES, looks=LOOKS)
@settings(max_examples=150, deadline=None)
def test_blindness_lifts_nothing_and_waiting_lifts_nothing(
    rule: Rule, looks: list[tuple[float, Answer | Failure]]
) -> None:
    seen = history(rule, looks)
    for (then, _, before), (now, reading, after) in pairwise(seen):
        if not isinstance(reading, Fresh):
            asked = {(demand.action, demand.code) for demand in demands(rule, before, then)}
            asks = {(demand.action, demand.code) for demand in demands(rule, after, now)}
            assert asked <= asks
    last, _, trigger = seen[-1]
    later = Instant(mono=last.mono + 1000, wall=last.wall + 1000)
    assert len(demands(rule, trigger, last)) <= len(demands(rule, trigger, later))


@given(rule=RULES, looks=LOOKS, down=st.sampled_from([0.0, 5.0, 1e6]))
@settings(max_examples=150, deadline=None)
def test_a_restart_forgets_no_firing_and_counts_nothing_as_seen(
    rule: Rule, looks: list[tuple[float, Answer | Failure]], down: float
) -> None:
    now, _, trigger = history(rule, looks)[-1]
    document = trigger_document(trigger, now)
    after = Instant(mono=3.0, wall=now.wall + down)
    restored = Trigger() if document is None else trigger_from_document(document, after)
    assert restored.status is trigger.status
    assert not restored.ready
    assert not is_clear(restored)
    breaches = {(one.action, one.since) for one in demands(rule, trigger, now) if one.code.value == "breach"}
    assert {(one.action, one.since) for one in demands(rule, restored, after)} == breaches
