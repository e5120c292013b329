"""Many queries as one: each term of an `or` chain carries a label that says whose result it is.

The server's own time rides along, so that an empty result has an evaluation time too, and so does the time of the
oldest sample behind each selector, because `min(x)` itself always carries the time of the question. Pure: text out,
decoded JSON in.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sidecar.rules.readings import Answer, Failure, Series
from sidecar.settings.promql import Kind, Selector

TAG: Final = "__ks__"
"""The label that tells the terms of a chain apart; taken out of every answer again."""

_CLOCK_TAG: Final = "t"


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """One question of a rule.

    Attributes:
        key: name of the rule; answers come back under it.
        text: PromQL that was parsed before.
        kind: type of its value, as parsed; only scalars and vectors are asked for.
        selectors: the selectors whose samples' age counts.
    """

    key: str
    text: str
    kind: Kind
    selectors: tuple[Selector, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Envelope:
    """What the API wraps around a result: decoded, and of the right outer shape."""

    result: list[Any]
    warnings: tuple[str, ...]


class MalformedResult(Exception):  # noqa: N818 - stays inside this package
    """The JSON is valid, but not what the API documents."""


@dataclass(slots=True)
class _Sorted:
    """The terms of a chain by owner, while they are being sorted out."""

    clock: float | None = None
    series: dict[str, list[Series]] = field(default_factory=dict)
    histograms: set[str] = field(default_factory=set)


def compose(queries: Sequence[Query]) -> str:
    """Write the one query that answers them all."""
    terms = [_tagged("vector(time())", _CLOCK_TAG)]
    terms.extend(_tagged(_as_vector(query), f"q{index}") for index, query in enumerate(queries))
    terms.extend(_tagged(_oldest(selector), f"s{index}") for selector, index in _numbered(queries).items())
    return _joined(terms)


def sort_out(envelope: Envelope, queries: Sequence[Query]) -> dict[str, Answer | Failure]:
    """Give each query its part of the answer to their chain; every query has one, possibly empty.

    Raises:
        MalformedResult: a part has no tag, no value, or no place.
    """
    found = _Sorted()
    for item in envelope.result:
        _sort_item(item, found)
    if found.clock is None:
        raise MalformedResult("the server's own time is missing from the answer")
    numbers = _numbered(queries)
    known = {f"q{index}" for index in range(len(queries))} | {f"s{index}" for index in numbers.values()}
    if strangers := (found.series.keys() | found.histograms) - known:
        raise MalformedResult(f"{min(strangers)!r} was not asked for")
    return {query.key: _answer(f"q{i}", query, found, numbers, envelope) for i, query in enumerate(queries)}


def _answer(
    tag: str, query: Query, found: _Sorted, numbers: Mapping[Selector, int], envelope: Envelope
) -> Answer | Failure:
    if tag in found.histograms:
        return Failure(
            reason="wrong_type", message="the result is a native histogram; a number was wanted", unreachable=False
        )
    assert found.clock is not None  # noqa: S101 - sort_out() has checked it; this tells the type checker
    times = [
        found.series[f"s{numbers[selector]}"][0].value + selector.offset
        for selector in query.selectors
        if f"s{numbers[selector]}" in found.series
    ]
    return Answer(
        series=tuple(found.series.get(tag, ())),
        evaluated_at=found.clock,
        oldest_sample=min(times, default=None),
        warnings=envelope.warnings,
    )


def _numbered(queries: Iterable[Query]) -> dict[Selector, int]:
    """Each distinct selector once, however many queries look at it."""
    distinct = dict.fromkeys(selector for query in queries for selector in query.selectors)
    return {selector: index for index, selector in enumerate(distinct)}


def _tagged(expression: str, tag: str) -> str:
    # The line ends close a comment inside the expression; without them it would swallow the rest of the chain.
    return f'label_replace((\n{expression}\n),"{TAG}","{tag}","","")'


def _as_vector(query: Query) -> str:
    return f"vector(\n{query.text}\n)" if query.kind == "scalar" else query.text


def _oldest(selector: Selector) -> str:
    newest = f"min(timestamp({selector.text}))"
    if not selector.reach:
        return newest
    # Without a current sample a range still has a value. How old its newest sample is nobody says, but it lies within
    # the range: the far end is the age that cannot be exceeded, so a rule may trust it or call the reading stale.
    far_end = f"time() - {selector.reach + selector.offset:.3f}"
    return f"{newest} or (count(last_over_time({selector.window})) * 0 + {far_end})"


def _joined(terms: Sequence[str]) -> str:
    # A balanced tree: in a plain chain every `or` copies all that stands left of it, which grows with the square.
    if len(terms) == 1:
        return terms[0]
    middle = len(terms) // 2
    return f"({_joined(terms[:middle])} or {_joined(terms[middle:])})"


def _sort_item(item: Any, found: _Sorted) -> None:
    try:
        labels = dict(item["metric"])
        tag = labels.pop(TAG)
        if "value" not in item and "histogram" in item:
            found.histograms.add(tag)
            return
        moment, text = item["value"]
        time, value = _finite(float(moment)), _number(text)
        if tag[0] == "s":
            _finite(value)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as exc:
        raise MalformedResult(f"a series is not of the documented shape ({type(exc).__name__})") from exc
    if tag == _CLOCK_TAG:
        found.clock = time
    else:
        found.series.setdefault(str(tag), []).append(Series(labels=labels, value=value))


def _number(text: Any) -> float:
    if not isinstance(text, str):  # the API writes numbers as strings: NaN and the infinities have no JSON
        raise TypeError
    return float(text)


def _finite(moment: float) -> float:
    if not math.isfinite(moment):  # no comparison with NaN is ever true: such a sample would never be too old
        raise ValueError
    return moment
