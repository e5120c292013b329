"""Alerts that Alertmanager sent: which of them fire, which rules they concern, and what a resolve may undo.

Alertmanager delivers at least once, twice, late and out of order, and sends no resolve for what is silenced. So a
firing alert always sets its rule firing, unless it can be the late copy of one whose end was just processed; a resolve
only ends a firing that it is not older than; and silence ends nothing.
"""

import asyncio
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from sidecar.adapters.operations_http import ReceivedAlert
from sidecar.app.audit_trail import audit_event
from sidecar.app.clock import Clock, stamp
from sidecar.app.evaluation import Evaluator
from sidecar.app.keeper import Keeper
from sidecar.core.errors import InvalidTransition, StorageError
from sidecar.core.events import EventKind
from sidecar.core.states import Instant, State
from sidecar.core.switch import Change
from sidecar.rules.matchers import Matcher, match_all, parse_matchers
from sidecar.rules.model import AlertMatch, Rule, RuleSet
from sidecar.rules.readings import Answer, Series

log = logging.getLogger("sidecar.alerts")

ORIGIN_LABEL = "killswitch_origin"
"""On every alert that a sidecar sends. One that carries it never triggers anything, or two switches would kill each
other for ever."""

MOST_ALERTS = 1000
"""Firing alerts that are kept, and resolves that are remembered: they are part of a file that is written at every kill,
and more of them than this concern no single switch."""

LATE_SECONDS = 120.0
"""Running seconds after a resolve within which a firing that is not newer may be its late copy. Copies are seconds to a
minute late. Later than this it is a breach that Alertmanager took for over, because nobody repeated it, and that
Prometheus sends again with its old start."""

_SLICE = 50  # alerts that are looked at before the gate has its turn again
_LONGEST_SUMMARY = 500


class Result(StrEnum):
    """What became of one alert; the values are those of a metric label."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    """One firing alert.

    Attributes:
        fingerprint: as Alertmanager gave it.
        labels: all of them.
        summary: of its annotations; empty if there was none.
        starts_at: Unix seconds; of several firings without a resolve between them, the newest.
        seen: running seconds of the last time it was sent.
    """

    fingerprint: str
    labels: Mapping[str, str]
    summary: str
    starts_at: float
    seen: float

    @property
    def key(self) -> str:
        """What tells alerts apart."""
        return alert_key(self.fingerprint, self.labels)


def alert_key(fingerprint: str, labels: Mapping[str, str]) -> str:
    """Tell alerts apart by labels too: whoever may send alerts must not replace one by naming its fingerprint."""
    digest = hashlib.sha256()
    for name, value in sorted(labels.items()):
        for part in (name, value):
            digest.update(f"{len(part)}:{part}".encode("utf-8", "surrogatepass"))
    return f"{fingerprint}/{digest.hexdigest()[:32]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolve:
    """The end of an alert that was processed.

    Attributes:
        starts_at: Unix seconds; the start of the newest firing that ended.
        received: running seconds of the last time it was sent.
    """

    starts_at: float
    received: float

    def makes_late(self, alert: Alert) -> bool:
        """Whether an alert can be a copy that was sent before this and arrives after it."""
        return alert.starts_at <= self.starts_at and alert.seen - self.received <= LATE_SECONDS


@dataclass(frozen=True, kw_only=True, slots=True)
class BookState:
    """What of the alerts outlives the process.

    Attributes:
        firing: alerts by their keys.
        resolved: by key, the newest firing whose end was processed.
    """

    firing: Mapping[str, Alert] = field(default_factory=dict)
    resolved: Mapping[str, Resolve] = field(default_factory=dict)

    def stricter(self, other: "BookState") -> "BookState":
        """What must be taken for firing where it is not known which of two states was the last."""
        firing = {**other.firing, **self.firing}
        return BookState(firing=firing, resolved={key: at for key, at in self.resolved.items() if key not in firing})

    def document(self, now: Instant) -> dict[str, Any]:
        """The durable form, JSON-able. Time while the sidecar is down does not count, so nothing expires by it."""
        return {
            "firing": [
                {
                    "fingerprint": alert.fingerprint,
                    "labels": dict(alert.labels),
                    "summary": alert.summary,
                    "starts_at": alert.starts_at,
                    "seen_elapsed": now.mono - alert.seen,
                }
                for alert in self.firing.values()
            ],
            "resolved": {
                key: {"starts_at": one.starts_at, "received_elapsed": now.mono - one.received}
                for key, one in self.resolved.items()
            },
        }

    @classmethod
    def from_document(cls, document: Any, now: Instant) -> "BookState":
        """Read a durable form back; raise StorageError where it cannot be read."""
        if document == []:  # how it was stored before there was anything to store
            return cls()
        try:
            alerts = [_alert(one, now) for one in document["firing"]]
            resolved = {str(key): _resolve(one, now) for key, one in document["resolved"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StorageError(f"the stored alerts cannot be read: {type(error).__name__} {error}") from error
        return cls(firing={alert.key: alert for alert in alerts}, resolved=resolved)


def _alert(document: Mapping[str, Any], now: Instant) -> Alert:
    return Alert(
        fingerprint=str(document["fingerprint"]),
        labels={str(name): str(value) for name, value in document["labels"].items()},
        summary=str(document["summary"]),
        starts_at=float(document["starts_at"]),
        seen=now.mono - float(document["seen_elapsed"]),
    )


def _resolve(document: Any, now: Instant) -> Resolve:
    if isinstance(document, int | float):  # how it was stored before its time was: it counts as long ago
        return Resolve(starts_at=float(document), received=now.mono - 2 * LATE_SECONDS)
    return Resolve(starts_at=float(document["starts_at"]), received=now.mono - float(document["received_elapsed"]))


class AlertBook:
    """All alerts that fire, and the last resolves, within bounds; no clock and no rules.

    Args:
        most: alerts that are kept, and resolves that are remembered.
    """

    def __init__(self, most: int = MOST_ALERTS) -> None:
        self._most = most
        self.firing: dict[str, Alert] = {}
        self._resolved: dict[str, Resolve] = {}

    @property
    def state(self) -> BookState:
        """What must outlive the process."""
        return BookState(firing=self.firing, resolved=self._resolved)

    def restore(self, stored: BookState) -> None:
        """Take over what was stored, beneath what has come in since."""
        early, resolves = self.firing, self._resolved
        self.firing, self._resolved = dict(stored.firing), dict(stored.resolved)
        for alert in early.values():
            self.fire(alert)
        for key, one in resolves.items():
            self.resolve(key, one.starts_at, received=one.received)

    def fire(self, alert: Alert) -> Result:
        """Note that an alert fires; REFUSED where there are too many already."""
        key = alert.key
        known = self.firing.get(key)
        if known is not None:
            self.firing[key] = replace(alert, starts_at=max(alert.starts_at, known.starts_at))
            return Result.ACCEPTED if alert.starts_at > known.starts_at else Result.DUPLICATE
        ended = self._resolved.get(key)
        if ended is not None and ended.makes_late(alert):
            return Result.IGNORED
        if len(self.firing) >= self._most:
            return Result.REFUSED
        self.firing[key] = alert
        return Result.ACCEPTED

    def resolve(self, key: str, starts_at: float, *, received: float) -> Result:
        """Note that the firing that began at `starts_at` has ended, and with it those before it.

        Args:
            key: of the alert.
            starts_at: Unix seconds.
            received: running seconds when this was sent.
        """
        known, last = self.firing.get(key), self._resolved.pop(key, None)
        newest = starts_at if last is None else max(last.starts_at, starts_at)
        self._resolved[key] = Resolve(starts_at=newest, received=received)
        # One that is forgotten lets a late firing through: that tightens, and Alertmanager resolves it again.
        while len(self._resolved) > self._most:
            del self._resolved[next(iter(self._resolved))]
        if known is not None and known.starts_at <= starts_at:
            del self.firing[key]
            return Result.ACCEPTED
        return Result.DUPLICATE if last is not None and last.starts_at >= starts_at else Result.IGNORED

    def drop(self, keys: Iterable[str]) -> None:
        """Forget alerts without a resolve; sent again, they fire again."""
        for key in keys:
            self.firing.pop(key, None)


@dataclass(kw_only=True, slots=True)
class _Touched:
    """A rule that alerts of one slice concern: whether one is new, and which there was no room for."""

    rule: Rule
    anew: bool = False
    unkept: list[Alert] = field(default_factory=list)


class Alerts:
    """Puts what the webhook receives into the book and lets the rules of type `alertmanager` act on it at once.

    Args:
        keeper: makes the book durable.
        clock: where `now` comes from.
        evaluator: evaluates the rules.
    """

    def __init__(self, *, keeper: Keeper, clock: Clock, evaluator: Evaluator) -> None:
        self.book = AlertBook()
        self.results: dict[str, int] = dict.fromkeys(("accepted", "ignored", "duplicate", "malformed", "refused"), 0)
        self._keeper = keeper
        self._clock = clock
        self._evaluator = evaluator
        self._filter: tuple[Matcher, ...] = ()
        self._switch_labels: Mapping[str, str] = {}
        self._expires = 0.0
        self._rules: list[tuple[Rule, tuple[Matcher, ...]]] = []
        self._by_rule: dict[str, dict[str, Alert]] = {}
        self._told_of_truncation = False
        self._young_until = float("inf")  # running seconds until which a resolve is stored that makes firings late
        keeper.observers.change.append(self._on_change)
        evaluator.excuses.append(self.only_expired)

    # What holds

    def configure(self, *, match: Iterable[str], expires: float, switch_labels: Mapping[str, str]) -> None:
        """Filter by these matchers from now on; what is in the book already stays in it."""
        self._filter = tuple(matcher for text in match for matcher in parse_matchers(text))
        self._switch_labels = dict(switch_labels)
        self._expires = expires
        self._sort()

    def load(self, rules: RuleSet) -> None:
        """Take over a rule set. Disabled rules are among them, so that enabling one finds what fires meanwhile."""
        self._rules = [
            (rule, tuple(matcher for text in rule.condition.match for matcher in parse_matchers(text)))
            for rule in rules.rules
            if isinstance(rule.condition, AlertMatch)
        ]
        self._sort()

    def restore(self, stored: BookState) -> None:
        """Take over what was stored."""
        self.book.restore(stored)
        if stored.resolved:
            self._young_until = self._clock.now().mono + LATE_SECONDS
        self._sort()

    def _sort(self) -> None:
        self._by_rule = {rule.trigger: {} for rule, _ in self._rules}
        for key, alert in self.book.firing.items():
            for rule in self._rules_of(alert.labels):
                self._by_rule[rule.trigger][key] = alert

    def _rules_of(self, labels: Mapping[str, str]) -> list[Rule]:
        seen = self._with_switch_labels(labels)
        return [rule for rule, matchers in self._rules if match_all(matchers, seen)]

    def _with_switch_labels(self, labels: Mapping[str, str]) -> Mapping[str, str]:
        # The alert's own word goes first: one for desk="rates" is none for us, though our own desk is fx.
        return {**self._switch_labels, **labels}

    def firing_for(self, trigger: str) -> Sequence[Alert]:
        """The alerts that a rule fires for."""
        return tuple(self._by_rule.get(trigger, {}).values())

    def only_expired(self, rule: Rule) -> bool:
        """Whether nothing that a rule fires for was sent again within `expires`, so that a recovery need not wait."""
        alerts, now = self.firing_for(rule.trigger), self._clock.now()
        return bool(alerts) and all(self._is_expired(alert, now) for alert in alerts)

    def _is_expired(self, alert: Alert, now: Instant) -> bool:
        return now.mono - alert.seen > self._expires

    async def probe(self, rule: Rule) -> Answer:
        """Answer a rule at its group's turn."""
        if self._clock.now().mono > self._young_until:
            self._young_until = float("inf")
            self._keeper.checkpoint()  # else a crash would make the resolves young again
        return self._answer(self.firing_for(rule.trigger))

    def _answer(self, alerts: Iterable[Alert]) -> Answer:
        series = tuple(Series(value=1.0, labels=alert.labels) for alert in alerts)
        return Answer(series=series, evaluated_at=self._clock.now().wall, oldest_sample=None)

    # What comes in

    async def receive(
        self, received: Sequence[ReceivedAlert], *, truncated: bool, trusted: bool
    ) -> Mapping[Result, int]:
        """Take over the alerts of one notification; rules have acted on them when this returns.

        Args:
            received: the alerts, as sent.
            truncated: whether Alertmanager left some out; then none is resolved.
            trusted: whether a credential proves the sender; without one nothing is resolved.

        Raises:
            InvalidTransition: the switch is disabled.
            StorageError: no rules are loaded, so nothing can be said about any alert yet.
        """
        if self._keeper.switch.state.state is State.DISABLED:
            raise InvalidTransition("the switch was started with `mode: disabled` and takes no alerts")
        if not self._evaluator.rules.rules:
            raise StorageError("no rules are loaded, so no alert can be judged yet; send it again")
        if truncated and not self._told_of_truncation:
            self._told_of_truncation = True
            log.warning("webhook.truncated", extra={"fields": {"message": "set max_alerts: 0 in the receiver"}})
        counts = dict.fromkeys(Result, 0)
        resolves = [alert for alert in received if not alert.firing]
        for part in (*_slices([alert for alert in received if alert.firing]), *_slices(resolves)):
            for result in self._take_slice(part, may_resolve=trusted and not truncated, trusted=trusted):
                counts[result] += 1
                self.results[result.value] += 1
            await asyncio.sleep(0)
        return counts

    def _take_slice(self, part: Sequence[ReceivedAlert], *, may_resolve: bool, trusted: bool) -> list[Result]:
        touched: dict[str, _Touched] = {}
        results = [self._take(alert, touched, may_resolve=may_resolve, trusted=trusted) for alert in part]
        for one in touched.values():
            if one.rule.enabled:
                if one.anew:
                    self._evaluator.renew(one.rule)
                self._evaluator.receive(one.rule, self._answer([*self.firing_for(one.rule.trigger), *one.unkept]))
        return results

    def _take(
        self, received: ReceivedAlert, touched: dict[str, _Touched], *, may_resolve: bool, trusted: bool
    ) -> Result:
        rules = [touched.setdefault(rule.trigger, _Touched(rule=rule)) for rule in self._rules_of(received.labels)]
        if not received.firing:
            return self._resolve(received, rules) if may_resolve else Result.IGNORED
        if ORIGIN_LABEL in received.labels or not rules or not self._is_wanted(received):
            return Result.IGNORED
        return self._fire(received, rules, trusted=trusted)

    def _is_wanted(self, received: ReceivedAlert) -> bool:
        return match_all(self._filter, self._with_switch_labels(received.labels))

    def _fire(self, received: ReceivedAlert, rules: Sequence[_Touched], *, trusted: bool) -> Result:
        alert = Alert(
            fingerprint=received.fingerprint,
            labels=received.labels,
            summary=received.annotations.get("summary", "")[:_LONGEST_SUMMARY],
            starts_at=received.starts_at,
            seen=self._clock.now().mono,
        )
        result = self.book.fire(alert)
        if result is Result.REFUSED:
            # There is no room to keep it. It fires its rules all the same, now: a kill stays, the rest ends unkept.
            for one in rules:
                one.unkept.append(alert)
            self._audit("alert.refused", alert, rules, trusted=trusted)
        elif result is not Result.IGNORED:
            for one in rules:
                one.anew = one.anew or result is Result.ACCEPTED
                self._by_rule[one.rule.trigger][alert.key] = self.book.firing[alert.key]
        if result is Result.ACCEPTED:
            self._audit("alert.firing", alert, rules, trusted=trusted)
            self._keeper.must_store()
        elif result is Result.DUPLICATE:
            self._keeper.checkpoint()  # when it was last sent
        return result

    def _resolve(self, received: ReceivedAlert, rules: Sequence[_Touched]) -> Result:
        key = alert_key(received.fingerprint, received.labels)
        known = self.book.firing.get(key)
        # One that fires is resolved whatever a reload has made of filter and rules since.
        if known is None and (not rules or not self._is_wanted(received)):
            return Result.IGNORED
        now = self._clock.now().mono
        self._young_until = now + LATE_SECONDS
        result = self.book.resolve(key, received.starts_at, received=now)
        if result is not Result.DUPLICATE:
            self._keeper.must_store()
        if result is Result.ACCEPTED and known is not None:
            self._audit("alert.resolved", known, rules, trusted=True)
            for one in rules:
                self._by_rule[one.rule.trigger].pop(key, None)
        return result

    def _audit(self, kind: str, alert: Alert, rules: Iterable[_Touched], *, trusted: bool) -> None:
        self._keeper.audit(
            audit_event(
                kind,
                self._clock.now(),
                by="alertmanager",
                reason=alert.summary or alert.labels.get("alertname"),
                by_verified=trusted,
                fingerprint=alert.fingerprint,
                starts_at=_time(alert.starts_at),
                labels=dict(alert.labels),
                triggers=[one.rule.trigger for one in rules],
            )
        )

    # What a recovery does

    def _on_change(self, change: Change) -> None:
        if change.event.kind is not EventKind.BEGIN:
            return
        # The approvers were not asked to wait for alerts that nobody sends any more; now those are forgotten. All of
        # them first, for a rule that is looked at early would find the others still firing and kill anew.
        now = self._clock.now()
        gone = [key for key, alert in self.book.firing.items() if self._is_expired(alert, now)]
        rules = [rule for rule, _ in self._rules if rule.enabled and self.only_expired(rule)]
        self.book.drop(gone)
        self._sort()
        if gone:
            self._evaluator.quiet(rules)
            self._keeper.must_store()


def _time(starts_at: float) -> str | None:
    try:
        return stamp(starts_at)
    except (ValueError, OverflowError):
        return None


def _slices(alerts: Sequence[ReceivedAlert]) -> Iterator[Sequence[ReceivedAlert]]:
    for start in range(0, len(alerts), _SLICE):
        yield alerts[start : start + _SLICE]
