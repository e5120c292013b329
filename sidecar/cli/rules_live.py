"""What a live Prometheus says about the queries of rules: taken or refused, data or none, how many series, how fresh.

Asks only, one query after the other. A rule may be right and its exporter down: what is told is how things are now.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sidecar.adapters.history import History, HistoryError, Sample
from sidecar.cli.outcomes import Failure
from sidecar.rules.model import Expression, Heartbeat, Rule, RuleSet, Threshold
from sidecar.settings.http_config import split_userinfo
from sidecar.settings.promql import Selector, parse
from sidecar.settings.quantities import format_duration

if TYPE_CHECKING:
    from sidecar.settings.config import Prometheus

ASK_SECONDS: Final = 15.0
"""Longer than the sidecar itself would wait: here a slow query is to be told from a wrong one."""

_LOSS: Final = re.compile(r"drawdown", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong now (`is_problem`), or doubtful, about one rule."""

    origin: str
    trigger: str
    text: str
    is_problem: bool

    def __str__(self) -> str:
        return f"{self.origin}: {self.trigger}: {self.text}"


def ask_about(rules: RuleSet, url: str, configured: "Prometheus | None") -> tuple[Finding, ...]:
    """Ask the server about every rule that queries Prometheus; disabled rules too, for they may be enabled one day.

    Args:
        rules: what to ask about.
        url: base URL of the server.
        configured: its credentials are used if it names this server, and never sent to another one.

    Raises:
        Failure: the server cannot be asked at all.
    """
    try:
        history = history_of(url, configured)
    except HistoryError as error:
        raise Failure(f"Prometheus was not asked: {error.message}") from None
    try:
        asked = (rule for rule in rules.rules if rule.query is not None and rule.source == "prometheus")
        return tuple(finding for rule in asked for finding in _findings(rule, history))
    finally:
        history.close()


def history_of(url: str, configured: "Prometheus | None") -> History:
    """Open a server's past, with the configured credentials if they are for this very server.

    Raises:
        HistoryError: credentials or certificates cannot be used.
    """
    known = {split_userinfo(one)[0].rstrip("/"): one for one in (configured.urls if configured else ())}
    own = known.get(url.rstrip("/"))
    if configured is None or own is None:
        return History(url, timeout=ASK_SECONDS)
    return History(own, timeout=ASK_SECONDS, headers=configured.headers, http=configured.http)


def _findings(rule: Rule, history: History) -> Iterator[Finding]:
    def told(text: str, *, is_problem: bool = True) -> Finding:
        return Finding(origin=rule.origin, trigger=rule.trigger, text=text, is_problem=is_problem)

    query = rule.query or ""
    try:
        samples = _asked(history, query)
        if isinstance(samples, str):
            yield told(samples)
            return
        for text, is_problem in _doubts_about(rule, samples):
            yield told(text, is_problem=is_problem)
        for selector in parse(query).selectors:
            for text, is_problem in _doubts_about_age(rule, selector, history):
                yield told(text, is_problem=is_problem)
    except HistoryError as error:
        raise Failure(f"Prometheus does not answer, so nothing more was checked: {error.message}") from None


def _asked(history: History, query: str) -> list[Sample] | str:
    """The samples, or why the query itself gets none; an error of the server as a whole is raised."""
    try:
        return history.instant(query)
    except HistoryError as error:
        if error.reason in ("query_error", "wrong_type", "too_large"):
            return f"the server does not take it: {error.message}"
        if error.reason == "partial":
            return f"the answer is not the whole one: {error.message}"
        raise


def _doubts_about(rule: Rule, samples: list[Sample]) -> Iterator[tuple[str, bool]]:
    count = len(samples)
    if rule.series is not None and count != rule.series:
        yield f"returns {count} series now, wanted are {rule.series}", True
    elif not samples and not isinstance(rule.condition, Expression):
        yield "returns no data now", True
    if isinstance(rule.condition, Expression):
        return
    for sample in samples:
        if not math.isfinite(sample.value):
            yield f"returns {sample.value:g} now for {_labels(sample)}, which is no reading", True
        elif isinstance(rule.condition, Heartbeat):
            yield from _doubt_about_beat(sample)
        elif isinstance(rule.condition, Threshold):
            yield from _doubt_about_value(rule.condition, sample)


def _doubt_about_beat(sample: Sample) -> Iterator[tuple[str, bool]]:
    age = sample.timestamp - sample.value
    if age < -5 or abs(age) > 10 * 365 * 86_400:
        yield f"returns {sample.value:.15g} now, which is not the Unix time in seconds of the last beat", True


def _doubt_about_value(condition: Threshold, sample: Sample) -> Iterator[tuple[str, bool]]:
    # The data tells what the rule's text alone cannot: which sign the exporter gives a loss.
    if _LOSS.search(condition.query) and sample.value > 0:
        meant = "drawdowns are ratios with losses negative"
        yield (
            f"returns {sample.value:g} now for {_labels(sample)}: {meant}; is the sign of the metric the other one?",
            False,
        )
    elif condition.operator.holds(sample.value, condition.threshold):
        sign = condition.operator.symbol
        yield f"would fire now: {sample.value:g} {sign} {condition.threshold:g} for {_labels(sample)}", False


def _doubts_about_age(rule: Rule, selector: Selector, history: History) -> Iterator[tuple[str, bool]]:
    seen = _asked(history, f"count({selector.text})")
    if isinstance(seen, str):
        return
    if not seen:
        if isinstance(rule.condition, Expression):
            yield f"{selector.text} matches nothing now: the rule cannot fire, and looks healthy", False
        return
    spacing = _spacing(selector, history)
    if spacing is None or rule.max_age >= 2 * spacing:
        return
    apart = f"samples of {selector.text} are about {format_duration(round(spacing, 1))} apart"
    age = f"max_age is {format_duration(rule.max_age)}"
    if rule.max_age < spacing:
        yield f"{apart}, {age}: it would be stale most of the time; at least twice the distance is wanted", True
    else:
        yield f"{apart}, {age}: one late scrape makes it stale; at least twice the distance is wanted", False


def _spacing(selector: Selector, history: History) -> float | None:
    """Mean seconds between samples over the last ten minutes, of the series with the fewest; None where it has one."""
    times = f"timestamp({selector.text})[10m:1s]"
    first_to_last = f"(max_over_time({times}) - min_over_time({times}))"
    answer = _asked(history, f"max({first_to_last} / (changes({times}) > 0))")
    if isinstance(answer, str) or not answer or not math.isfinite(answer[0].value):
        return None
    return answer[0].value


def _labels(sample: Sample) -> str:
    labels = ", ".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()) if name != "__name__")
    return f"{{{labels}}}"
