"""One look at a metric: what a source answered, and what that answer is worth to a rule.

Prometheus' own answer is never trusted by its shape alone: a value may be old, not a number, one series too many, or
one part of a whole. Each of these is a type of its own here, and only `Fresh` counts as knowledge.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, isnan
from typing import assert_never

FUTURE_TOLERANCE_SECONDS = 5.0
"""How far a sample or a beat may lie in the future before it is failed; covers ordinary differences of two clocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One series of an instant answer."""

    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a source said to one query.

    Attributes:
        series: the result, possibly empty; values may be NaN or infinite.
        evaluated_at: the server's evaluation time, Unix seconds.
        oldest_sample: time of the oldest sample that the query looked at, Unix seconds; None if it looked at none.
        warnings: what the server said against its own answer; not empty means that the answer is partial.
    """

    series: tuple[Series, ...]
    evaluated_at: float
    oldest_sample: float | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why there is no answer.

    Attributes:
        reason: one word of a closed set, used as a metric label.
        message: for people; holds no secret.
        unreachable: True when the source did not answer at all, False when it answered something useless.
    """

    reason: str
    message: str
    unreachable: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Fresh:
    """Finite values, young enough, as many as wanted; `age` is the oldest sample's in seconds, None without one."""

    series: tuple[Series, ...]
    evaluated_at: float
    age: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stale:
    """An answer whose oldest sample is older than the rule allows."""

    age: float
    max_age: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Missing:
    """The source answered, and there was nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ambiguous:
    """Another number of series than the rule expects."""

    seen: int
    wanted: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Partial:
    """The source warns that its answer is not the whole one."""

    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """No usable answer: not a number, from the future, an error, or no answer at all (`unreachable`).

    Attributes:
        reason: one of FAILURE_REASONS.
        message: for people.
        unreachable: True when the source did not answer at all.
        series: for `not_a_number` the whole answer: a value that is no number hides no breach in the ones beside it.
    """

    reason: str
    message: str
    unreachable: bool = False
    series: tuple[Series, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Newest:
    """The newest moment that fresh answers to one rule have told of, and when that was.

    An answer says itself how old its samples are, by the clock of its source. A cache in between repeats a young answer
    for ever, and a server whose clock goes back an hour finds the samples of an hour ago and calls them young. So our
    own running time is counted from the newest moment heard of: what does not move beyond it grows old.

    Attributes:
        moment: of the oldest sample in the newest answer, else of its evaluation; Unix seconds of the source.
        heard: running seconds, ours.
    """

    moment: float
    heard: float

    def behind(self, answer: Answer | Failure, now: float) -> float:
        """Seconds by which an answer is older than what could be known at `now` (running seconds); 0 if it is news."""
        if isinstance(answer, Failure) or _moment(answer) > self.moment:
            return 0.0
        return self.moment - _moment(answer) + now - self.heard


def newest(known: Newest | None, answer: Answer, now: float) -> Newest:
    """Take a fresh answer into account, received at `now` (running seconds)."""
    if known is not None and _moment(answer) <= known.moment:
        return known
    return Newest(moment=_moment(answer), heard=now)


def _moment(answer: Answer) -> float:
    return answer.evaluated_at if answer.oldest_sample is None else answer.oldest_sample


Reading = Fresh | Stale | Missing | Ambiguous | Partial | Failed

FAILURE_REASONS = (
    "stale",
    "missing",
    "ambiguous",
    "partial",
    "not_a_number",
    "future",
    "unreachable",
    "timeout",
    "http_error",
    "bad_response",
    "query_error",
    "wrong_type",
    "too_large",
)
"""The closed set of `reason` labels: what can keep a reading from being fresh."""


def take_reading(
    answer: Answer | Failure,
    *,
    max_age: float,
    series: int | None,
    may_be_empty: bool,
    warnings_count: bool = True,
    behind: float = 0.0,
) -> Reading:
    """Judge an answer by a rule's demands on its data.

    Args:
        answer: what the source said.
        max_age: seconds; an older sample is stale.
        series: how many series there must be; None takes any number.
        may_be_empty: True where an empty result is an answer in itself, as for an alert-style expression.
        warnings_count: False takes an answer with warnings as whole.
        behind: seconds by which it is older than what this source has told before, from `Newest.behind`.
    """
    if isinstance(answer, Failure):
        return Failed(reason=answer.reason, message=answer.message, unreachable=answer.unreachable)
    if answer.warnings and warnings_count:
        return Partial(warnings=answer.warnings)
    if not answer.series and _is_missing(answer, series=series, may_be_empty=may_be_empty):
        return Missing()
    if answer.series and series is not None and len(answer.series) != series:
        return Ambiguous(seen=len(answer.series), wanted=series)
    age = None if answer.oldest_sample is None else answer.evaluated_at - answer.oldest_sample
    return _judge_values(answer, age, max_age, behind)


def _is_missing(answer: Answer, *, series: int | None, may_be_empty: bool) -> bool:
    # An alert-style expression answers "no" with nothing. Only who sets `series` says that its selectors must match.
    if may_be_empty:
        return series is not None and answer.oldest_sample is None
    return True


def _judge_values(answer: Answer, age: float | None, max_age: float, behind: float) -> Reading:
    if age is not None and isnan(age):
        return Failed(reason="bad_response", message="the time of the sample is not a number")
    if (known_age := max(behind, age or 0.0)) > max_age:
        return Stale(age=known_age, max_age=max_age)
    if age is not None and age < -FUTURE_TOLERANCE_SECONDS:
        return Failed(reason="future", message=f"the sample is {-age:.1f} s in the future of the server's own clock")
    for one in answer.series:
        if not isfinite(one.value):
            return Failed(reason="not_a_number", message=f"the value is {one.value}", series=answer.series)
    return Fresh(series=answer.series, evaluated_at=answer.evaluated_at, age=None if age is None else max(age, 0.0))


def describe(reading: Reading) -> str:
    """Say in a few words why a reading is not fresh; empty for a fresh one."""
    match reading:
        case Fresh():
            return ""
        case Stale():
            return f"stale: the sample is {reading.age:.1f} s old, more than {reading.max_age:g} s"
        case Missing():
            return "missing: the query returned nothing"
        case Ambiguous():
            return f"ambiguous: {reading.seen} series instead of {reading.wanted}"
        case Partial():
            return f"partial: the source warns {'; '.join(reading.warnings)}"
        case Failed():
            return f"{reading.reason}: {reading.message}"
        case _:
            assert_never(reading)


def failure_reason(reading: Reading) -> str | None:
    """The metric label for a reading that is not fresh, out of FAILURE_REASONS; None for a fresh one."""
    match reading:
        case Fresh():
            return None
        case Stale():
            return "stale"
        case Missing():
            return "missing"
        case Ambiguous():
            return "ambiguous"
        case Partial():
            return "partial"
        case Failed():
            return reading.reason
        case _:
            assert_never(reading)
