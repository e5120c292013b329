"""What an answer is worth: only finite, young, whole and expected values are fresh."""

import math

import pytest

from sidecar.rules.readings import (
    FAILURE_REASONS,
    Ambiguous,
    Answer,
    Failed,
    Failure,
    Fresh,
    Missing,
    Newest,
    Partial,
    Reading,
    Series,
    Stale,
    describe,
    failure_reason,
    newest,
    take_reading,
)

AT = 1_700_000_000.0


def answer(*values: float, age: float | None = 1.0, warnings: tuple[str, ...] = ()) -> Answer:
    return Answer(
        series=tuple(Series(value=value) for value in values),
        evaluated_at=AT,
        oldest_sample=None if age is None else AT - age,
        warnings=warnings,
    )


def read(
    seen: Answer | Failure, *, series: int | None = None, may_be_empty: bool = False, warnings_count: bool = True
) -> Reading:
    return take_reading(seen, max_age=60.0, series=series, may_be_empty=may_be_empty, warnings_count=warnings_count)


def test_finite_young_values_are_fresh() -> None:
    seen = answer(1.0, -2.0)
    assert read(seen) == Fresh(series=seen.series, evaluated_at=AT, age=1.0)


def test_a_value_without_a_sample_behind_it_has_no_age() -> None:
    reading = read(answer(1.0, age=None))
    assert isinstance(reading, Fresh)
    assert reading.age is None


@pytest.mark.parametrize(("age", "fresh"), [(60.0, True), (60.001, False), (1e9, False)])
def test_a_sample_older_than_max_age_is_stale(age: float, fresh: bool) -> None:
    reading = read(answer(1.0, age=age))
    assert isinstance(reading, Fresh if fresh else Stale)


@pytest.mark.parametrize(("ahead", "fresh"), [(0.5, True), (5.0, True), (5.1, False), (1e9, False)])
def test_a_sample_from_the_future_is_failed_beyond_five_seconds(ahead: float, fresh: bool) -> None:
    reading = read(answer(1.0, age=-ahead))
    if fresh:
        assert isinstance(reading, Fresh)
        assert reading.age == 0.0
    else:
        assert failure_reason(reading) == "future"


def test_a_sample_time_that_is_no_number_is_not_fresh() -> None:
    assert failure_reason(read(answer(1.0, age=math.nan))) == "bad_response"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("beside", [(), (1.0,)])
def test_a_value_that_is_no_finite_number_is_failed_and_keeps_what_stands_beside_it(
    bad: float, beside: tuple[float, ...]
) -> None:
    seen = answer(*beside, bad)
    reading = read(seen)
    assert isinstance(reading, Failed)
    assert (reading.reason, reading.unreachable, reading.series) == ("not_a_number", False, seen.series)


def test_nothing_is_missing() -> None:
    assert read(answer(age=None)) == Missing()
    assert read(answer(age=1.0)) == Missing()


def test_an_alert_style_expression_answers_no_with_nothing() -> None:
    assert isinstance(read(answer(age=None), may_be_empty=True), Fresh)
    assert isinstance(read(answer(age=1.0), may_be_empty=True, series=1), Fresh)


def test_an_expression_with_series_set_misses_selectors_that_match_nothing() -> None:
    assert read(answer(age=None), may_be_empty=True, series=1) == Missing()


def test_an_empty_expression_on_old_samples_is_stale_and_not_inactive() -> None:
    assert isinstance(read(answer(age=61.0), may_be_empty=True), Stale)


@pytest.mark.parametrize("may_be_empty", [True, False])
def test_another_number_of_series_is_ambiguous(may_be_empty: bool) -> None:
    assert read(answer(1.0, 2.0), series=1, may_be_empty=may_be_empty) == Ambiguous(seen=2, wanted=1)
    assert isinstance(read(answer(1.0, 2.0), series=2, may_be_empty=may_be_empty), Fresh)


def test_a_partial_answer_is_not_an_answer_unless_told_so() -> None:
    warned = answer(1.0, warnings=("one store is down",))
    assert read(warned) == Partial(warnings=("one store is down",))
    assert isinstance(read(warned, warnings_count=False), Fresh)


@pytest.mark.parametrize("unreachable", [True, False])
def test_no_answer_is_failed_as_the_source_says(unreachable: bool) -> None:
    failure = Failure(reason="timeout", message="no answer in 2 s", unreachable=unreachable)
    assert read(failure) == Failed(reason="timeout", message="no answer in 2 s", unreachable=unreachable)


@pytest.mark.parametrize(
    ("reading", "reason", "words"),
    [
        (Stale(age=61.0, max_age=60.0), "stale", "61.0 s old, more than 60 s"),
        (Missing(), "missing", "returned nothing"),
        (Ambiguous(seen=2, wanted=1), "ambiguous", "2 series instead of 1"),
        (Partial(warnings=("a", "b")), "partial", "a; b"),
        (Failed(reason="query_error", message="parse error"), "query_error", "query_error: parse error"),
    ],
)
def test_what_is_not_fresh_says_why_in_words_and_by_a_label(reading: Reading, reason: str, words: str) -> None:
    assert failure_reason(reading) == reason
    assert reason in FAILURE_REASONS
    assert words in describe(reading)


def test_a_fresh_reading_needs_no_words() -> None:
    fresh = read(answer(1.0))
    assert (describe(fresh), failure_reason(fresh)) == ("", None)


def test_a_first_answer_and_a_newer_one_are_news_and_a_repeated_one_grows_old() -> None:
    first = newest(None, answer(1.0, age=2.0), 100.0)
    assert first == Newest(moment=AT - 2.0, heard=100.0)
    assert newest(first, answer(1.0, age=1.0), 101.0) == Newest(moment=AT - 1.0, heard=101.0)
    assert newest(first, answer(1.0, age=2.0), 101.0) is first
    assert first.behind(answer(1.0, age=1.0), 1e9) == 0.0
    assert first.behind(answer(1.0, age=2.0), 130.0) == 30.0
    assert first.behind(answer(1.0, age=12.0), 130.0) == 40.0


def test_an_answer_without_a_sample_counts_by_its_time_of_evaluation() -> None:
    first = newest(None, answer(1.0, age=None), 100.0)
    assert first == Newest(moment=AT, heard=100.0)
    assert first.behind(answer(1.0, age=None), 107.0) == 7.0


def test_a_failure_is_not_old() -> None:
    seen = Failure(reason="unreachable", message="m", unreachable=True)
    assert Newest(moment=AT, heard=100.0).behind(seen, 1e9) == 0.0


@pytest.mark.parametrize(("age", "behind", "fresh"), [(1.0, 60.0, True), (1.0, 60.1, False), (61.0, 0.0, False)])
def test_what_lies_behind_what_was_told_before_is_as_old_as_that(age: float, behind: float, fresh: bool) -> None:
    reading = take_reading(answer(1.0, age=age), max_age=60.0, series=None, may_be_empty=False, behind=behind)
    assert reading == (
        Fresh(series=(Series(value=1.0),), evaluated_at=AT, age=age)
        if fresh
        else Stale(age=max(age, behind), max_age=60.0)
    )


def test_an_empty_answer_to_an_expression_grows_old_too() -> None:
    reading = take_reading(answer(age=None), max_age=60.0, series=None, may_be_empty=True, behind=61.0)
    assert reading == Stale(age=61.0, max_age=60.0)
