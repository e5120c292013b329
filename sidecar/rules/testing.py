"""Rules on a virtual clock: what a whole sidecar would decide, second by second, from answers that are given to it.

Unit tests of rule files run here, and nothing of the decision is made anew for them: readings, triggers, demands and
the switch are the live ones. Only the clock and the answers are replaced. Knows no file, no source and no real time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import isclose
from types import MappingProxyType

from sidecar.core.compose import Overlay
from sidecar.core.orders import Decision, Intent, Order, decide, decide_blind
from sidecar.core.snapshot import Snapshot
from sidecar.core.states import Instant, Mode
from sidecar.core.switch import Switch
from sidecar.core.transitions import Policies, SwitchState
from sidecar.rules.model import AlertMatch, Connectivity, Expression, OrderRate, Rule, RuleSet, Threshold
from sidecar.rules.notation import Value, Word
from sidecar.rules.readings import Answer, Failure, Series, take_reading
from sidecar.rules.triggers import Health, Trigger, demands, evaluate

DUE_TOLERANCE_SECONDS = 0.5
"""A connectivity rule is looked at this much before its interval is over, as live, where ticks come a moment early."""

Answering = Callable[[Rule, Instant], Answer | Failure | None]
"""What a source says to a rule at a moment; None leaves the rule out, as if it had been seen and were fine."""

Recorded = Mapping[tuple[str, int], Answer | Failure]
"""Answers by trigger and virtual milliseconds."""

Fact = str | float | bool | None
Path = tuple[str, ...]

QUIET_TRIGGER = Trigger(health=Health.OK, ready=True)


class Others(StrEnum):
    """What the queries say that a test gives no results for."""

    QUIET = "quiet"
    MISSING = "missing"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """One series over time; a step beyond its end is nothing."""

    values: tuple[Value, ...]
    labels: Mapping[str, str] = field(default_factory=dict)

    def at(self, index: int) -> Value:
        """What it is at a step, counted from 0."""
        return self.values[index] if index < len(self.values) else Word.MISSING


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One fact that is expected.

    Attributes:
        path: which: `("state",)`, `("gate", "new")`, `("triggers", <name>, "status")`, as in the test file.
        wanted: its value.
        origin: file and line.
    """

    path: Path
    wanted: Fact
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderCheck:
    """An order, and what the gate is expected to say to it; the paths are `decision`, `reason`, `max_quantity`."""

    order: Order
    checks: tuple[Check, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Expectation:
    """What is expected at a moment, in seconds from the start, after all evaluations of that moment."""

    at: float
    checks: tuple[Check, ...]
    orders: tuple[OrderCheck, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One series of a Prometheus, both parts in promtool's notation."""

    series: str
    values: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleTest:
    """One test.

    Attributes:
        name, origin: what it is called, and its file and line.
        rules: the rules as they are tested.
        step: seconds between two values of a track.
        tracks: what each trigger's query returns over time.
        metrics: series that a real PromQL engine is asked about instead.
        measured: triggers whose answers are recorded from that engine.
        others: what all other queries say.
        policies: of the gate.
        expectations: in order of time.
    """

    name: str
    origin: str
    rules: RuleSet
    step: float
    tracks: Mapping[str, tuple[Track, ...]]
    metrics: tuple[Metric, ...] = ()
    measured: frozenset[str] = frozenset()
    others: Others = Others.QUIET
    policies: Policies = field(default_factory=Policies)
    expectations: tuple[Expectation, ...]

    @property
    def until(self) -> float:
        """Seconds from the start to the last expectation."""
        return max(expectation.at for expectation in self.expectations)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """One expectation that was not met.

    Attributes:
        at: seconds from the start.
        what: the fact, as a person would write it.
        wanted, seen: its two values.
        origin: file and line of the expectation.
        context: what the switch, the gate and the triggers in question were at that moment, a line each.
    """

    at: float
    what: str
    wanted: Fact
    seen: Fact
    origin: str
    context: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """How a test went."""

    test: RuleTest
    mismatches: tuple[Mismatch, ...]

    @property
    def passed(self) -> bool:
        """Whether all was as expected."""
        return not self.mismatches


def run(test: RuleTest, recorded: Recorded = MappingProxyType({})) -> Verdict:
    """Run one test.

    Args:
        test: the test.
        recorded: for its measured triggers, what the engine said at each moment of `evaluation_moments`.
    """
    rehearsal = Rehearsal(
        rules=test.rules, policies=test.policies, answering=_answering(test, recorded), step=test.step
    )
    mismatches: list[Mismatch] = []
    for expectation in sorted(test.expectations, key=lambda one: one.at):
        rehearsal.run_until(expectation.at)
        mismatches.extend(_mismatches(rehearsal, test, expectation))
    return Verdict(test=test, mismatches=tuple(mismatches))


def evaluation_moments(test: RuleTest, trigger: str) -> Iterator[int]:
    """Virtual milliseconds at which a trigger's group is evaluated up to the last expectation."""
    interval = next(
        _milliseconds(group.interval)
        for group in test.rules.groups
        if any(rule.trigger == trigger for rule in group.rules)
    )
    return iter(range(0, _milliseconds(test.until) + 1, interval))


def evaluations(rules: RuleSet, until: float) -> int:
    """About how many evaluations it takes to get to `until`, in seconds from the start."""
    return sum(int(until / group.interval + 1) * len(group.rules) for group in rules.groups)


@dataclass(kw_only=True, slots=True)
class _Round:
    """Rules that are evaluated together, how often, and when next, in milliseconds."""

    rules: tuple[Rule, ...]
    every: int
    due: int = 0


class Rehearsal:
    """A switch and its rules on a clock that starts at 0 and only moves when it is told to.

    Unix time is the virtual clock too: a heartbeat of 5 is one at five seconds from the start.

    Args:
        rules: what is evaluated, each group in its own interval, all of them at 0 first.
        policies: of gate and recovery.
        answering: what the sources say.
        step: seconds between two events for rules that are also told between the turns of their group (alerts, order
            rates); None has none.

    Attributes:
        rules: as given.
        switch: the switch.
        triggers: by name of their rule.
        now: the present moment.
    """

    def __init__(self, *, rules: RuleSet, policies: Policies, answering: Answering, step: float | None = None) -> None:
        self.switch = Switch(name="rehearsal", mode=Mode.ACTIVE, state=SwitchState(), policies=policies)
        self.triggers = {
            rule.trigger: Trigger(ready=isinstance(rule.condition, AlertMatch | OrderRate)) for rule in rules.rules
        }
        self.now = Instant(mono=0.0, wall=0.0)
        self.rules = rules
        self._answering = answering
        self._rounds = list(_rounds(rules, step))
        self._opened = False

    def run_until(self, at: float) -> None:
        """Evaluate all that is due up to and including this moment, in seconds from the start."""
        end = _milliseconds(at)
        while self._rounds and (moment := min(one.due for one in self._rounds)) <= end:
            self._move_to(moment)
            for one in self._rounds:
                if one.due == moment:
                    one.due += one.every
                    self._evaluate(one.rules)
            self._refresh()
        self._move_to(end)

    def snapshot(self) -> Snapshot:
        """What the gate answers from."""
        return self.switch.snapshot()

    def _move_to(self, milliseconds: int) -> None:
        seconds = milliseconds / 1000
        self.now = Instant(mono=seconds, wall=seconds)

    def _evaluate(self, rules: Sequence[Rule]) -> None:
        for rule in rules:
            if self._is_due(rule):
                self._take(rule, self._answering(rule, self.now))

    def _is_due(self, rule: Rule) -> bool:
        trigger = self.triggers[rule.trigger]
        # As live: one that is not ready is asked at every turn of its group, for the gate waits for it.
        if trigger.evaluated is None or not trigger.ready or not isinstance(rule.condition, Connectivity):
            return True
        return self.now.wall - trigger.evaluated >= rule.condition.interval - DUE_TOLERANCE_SECONDS

    def _take(self, rule: Rule, answer: Answer | Failure | None) -> None:
        if answer is None:
            self.triggers[rule.trigger] = QUIET_TRIGGER
            return
        reading = take_reading(
            answer,
            max_age=rule.max_age,
            series=rule.series,
            may_be_empty=isinstance(rule.condition, Expression | AlertMatch),
        )
        trigger = evaluate(rule, reading, self.triggers[rule.trigger], self.now)
        self.triggers[rule.trigger] = trigger
        if not rule.shadow:
            self.switch.demand(rule.trigger, demands(rule, trigger, self.now), self.now)

    def _refresh(self) -> None:
        waiting = [
            rule.trigger for rule in self.rules.rules if rule.enforcing and not self.triggers[rule.trigger].ready
        ]
        self._opened = self._opened or not waiting
        text = None if self._opened else f"rule {waiting[0]} has had no fresh reading since the start"
        self.switch.cover(Overlay(not_ready=text))


def _rounds(rules: RuleSet, step: float | None) -> Iterator[_Round]:
    enabled = [rule for rule in rules.rules if rule.enabled]
    for group in rules.groups:
        yield _Round(rules=tuple(rule for rule in group.rules if rule.enabled), every=_milliseconds(group.interval))
    told = tuple(rule for rule in enabled if isinstance(rule.condition, AlertMatch | OrderRate))
    if told and step is not None:
        yield _Round(rules=told, every=_milliseconds(step))


def _milliseconds(seconds: float) -> int:
    # Whole numbers, so that the thousandth tick of 0.1 s falls on the same moment as the hundredth second.
    return round(seconds * 1000)


def _answering(test: RuleTest, recorded: Recorded) -> Answering:
    def answering(rule: Rule, now: Instant) -> Answer | Failure | None:
        tracks = test.tracks.get(rule.trigger)
        if tracks is not None:
            index = _milliseconds(now.mono) // _milliseconds(test.step)
            return _scripted(rule, tracks, index, now)
        if rule.trigger in test.measured:
            return recorded.get((rule.trigger, _milliseconds(now.mono)), _NOT_RECORDED)
        return None if rule.query is None else _ANSWERS_OF_OTHERS[test.others](now)

    return answering


_NOT_RECORDED = Failure(reason="bad_response", message="no answer was recorded for this moment", unreachable=False)
_UNREACHABLE = Failure(reason="unreachable", message="so the test says", unreachable=True)
_FAILED = Failure(reason="query_error", message="so the test says", unreachable=False)

_ANSWERS_OF_OTHERS: Mapping[Others, Callable[[Instant], Answer | Failure | None]] = {
    Others.QUIET: lambda _: None,
    Others.MISSING: lambda now: Answer(series=(), evaluated_at=now.wall, oldest_sample=None),
    Others.UNREACHABLE: lambda _: _UNREACHABLE,
}


def _scripted(rule: Rule, tracks: Sequence[Track], index: int, now: Instant) -> Answer | Failure:
    said = [(track, track.at(index)) for track in tracks]
    words = {value for _, value in said if isinstance(value, Word)}
    if Word.UNREACHABLE in words:
        return _UNREACHABLE
    if Word.FAILED in words:
        return _FAILED
    series = tuple(
        # A stale series is there like any other. Its number does not matter, for its age alone decides.
        Series(value=0.0 if isinstance(value, Word) else value, labels=track.labels)
        for track, value in said
        if not isinstance(value, Word) or value is Word.STALE
    )
    if isinstance(rule.condition, AlertMatch):
        series = tuple(Series(value=1.0) for one in series for _ in range(int(one.value)))
    return Answer(
        series=series,
        evaluated_at=now.wall,
        oldest_sample=now.wall - rule.max_age - 1 if Word.STALE in words else now.wall,
        warnings=("so the test says",) if Word.PARTIAL in words else (),
    )


def _mismatches(rehearsal: Rehearsal, test: RuleTest, expectation: Expectation) -> Iterator[Mismatch]:
    facts = facts_of(rehearsal)
    for check in expectation.checks:
        if not _equal(facts.get(check.path), check.wanted):
            context = (_gate_line(facts), *_trigger_lines(rehearsal, test, check.path))
            yield _mismatch(expectation, check, ".".join(check.path), facts.get(check.path), context)
    for order in expectation.orders:
        decision = decide(rehearsal.snapshot(), rehearsal.switch.policies.gate, order.order)
        seen = _order_facts(decision)
        for check in order.checks:
            if not _equal(seen.get(check.path), check.wanted):
                context = (_gate_line(facts), f"the order: {decision.reason.code}: {decision.reason.message}")
                yield _mismatch(expectation, check, f"order {check.path[0]}", seen.get(check.path), context)


def _mismatch(expectation: Expectation, check: Check, what: str, seen: Fact, context: tuple[str, ...]) -> Mismatch:
    return Mismatch(at=expectation.at, what=what, wanted=check.wanted, seen=seen, origin=check.origin, context=context)


def _equal(seen: Fact, wanted: Fact) -> bool:
    if isinstance(seen, float) and isinstance(wanted, float):
        return isclose(seen, wanted, rel_tol=1e-9, abs_tol=1e-12)
    return seen == wanted


def facts_of(rehearsal: Rehearsal) -> dict[Path, Fact]:
    """All that an expectation may name, as it is now."""
    snapshot, policy = rehearsal.snapshot(), rehearsal.switch.policies.gate
    new = decide_blind(snapshot, policy, Intent.NEW)
    facts: dict[Path, Fact] = {
        ("state",): snapshot.state.value,
        ("restriction",): snapshot.restriction.label,
        ("factor",): snapshot.factor,
        ("causes",): causes_text({str(one.trigger): one.code.value for one in rehearsal.switch.state.causes}),
        ("gate", "new"): _word(new),
        ("gate", "reduce"): _word(decide_blind(snapshot, policy, Intent.REDUCE)),
        ("gate", "cancel"): _word(decide_blind(snapshot, policy, Intent.CANCEL)),
        ("gate", "reason"): new.reason.code.value,
        ("gate", "trigger"): new.reason.trigger,
    }
    for rule in rehearsal.rules.rules:
        facts.update(_trigger_facts(rule, rehearsal.triggers[rule.trigger]))
    return facts


def causes_text(causes: Mapping[str, str]) -> str:
    """Causes of a kill as one fact: `a: breach, b: no_data`, by name; `none` for none."""
    return ", ".join(f"{trigger}: {causes[trigger]}" for trigger in sorted(causes)) or "none"


def _trigger_facts(rule: Rule, trigger: Trigger) -> Iterator[tuple[Path, Fact]]:
    facts: dict[str, Fact] = {
        "status": trigger.status.value,
        "health": trigger.health.value,
        "armed": trigger.armed,
        "step": _step(rule, trigger),
        "value": trigger.value,
    }
    for name, fact in facts.items():
        yield ("triggers", rule.trigger, name), fact


def _step(rule: Rule, trigger: Trigger) -> str | None:
    if not isinstance(rule.condition, Threshold):
        return None
    levels = zip(rule.condition.steps, trigger.steps, strict=False)
    held = [step.action for step, level in levels if level.firing_since is not None]
    return max(held).label if held else None


def _word(decision: Decision) -> str:
    return "allow" if decision.allow else "deny"


def _order_facts(decision: Decision) -> dict[Path, Fact]:
    most = decision.max_quantity
    return {
        ("decision",): _word(decision),
        ("reason",): decision.reason.code.value,
        ("max_quantity",): None if most is None else float(most),
    }


def _gate_line(facts: Mapping[Path, Fact]) -> str:
    gate, reason = facts["gate", "new"], facts["gate", "reason"]
    return (
        f"the switch: {facts['state',]}, restriction {facts['restriction',]}, factor {shown(facts['factor',])}, "
        f"causes {facts['causes',]}; gate: {gate} as {reason}"
    )


def _trigger_lines(rehearsal: Rehearsal, test: RuleTest, path: Path) -> Iterator[str]:
    # For a fact of the whole switch any rule of the test may be the one that was meant.
    names = (path[1],) if path[0] == "triggers" else sorted({*test.tracks, *test.measured})
    for name in names:
        trigger = rehearsal.triggers[name]
        blind = f", {trigger.message}" if trigger.message else ""
        yield f"{name}: {trigger.status}, health {trigger.health}, value {shown(trigger.value)}{blind}"


def shown(fact: Fact) -> str:
    """Write a fact as it would stand in a test file."""
    if fact is None:
        return "null"
    if isinstance(fact, bool):
        return str(fact).lower()
    return f"{fact:g}" if isinstance(fact, float) else str(fact)
