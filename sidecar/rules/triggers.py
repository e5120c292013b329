"""What a rule and one reading make of a trigger: status, health and timers, and what the rule then asks of the switch.

Prometheus' meaning of `for` and `keep_firing_for`, with one deliberate difference: a look that failed resets neither.
Status (does it fire) and health (can it see) are kept apart, and only a fresh reading ever clears anything.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from math import isfinite

from sidecar.core.events import CauseCode, Demand
from sidecar.core.states import Action, Instant
from sidecar.rules.model import (
    AlertMatch,
    Condition,
    Connectivity,
    Expression,
    Heartbeat,
    OrderRate,
    Rule,
    Step,
    Threshold,
    Watchdog,
)
from sidecar.rules.readings import FUTURE_TOLERANCE_SECONDS, Failed, Fresh, Missing, Reading, describe

WATCHDOG_LIMIT = 1.0
"""A watchdog's value is the larger of its shares of the allowed memory and CPU, so its limit is the whole."""


class Status(StrEnum):
    """Whether a trigger fires."""

    INACTIVE = "inactive"
    PENDING = "pending"
    FIRING = "firing"


class Health(StrEnum):
    """Whether a trigger can see; UNKNOWN until its first evaluation."""

    OK = "ok"
    NO_DATA = "no_data"
    ERROR = "error"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """One condition over time: the rule's own, or one of its steps.

    Attributes:
        pending_since: running seconds since when it has been breached without a break; None if it is not.
        clear_since: running seconds of the first look that found a firing one clear; None while it is not. As in
            Prometheus, `keep_firing_for` counts from there.
        firing_since: running seconds since when it fires; None if it does not.
        firing_wall: Unix seconds of the same moment.
    """

    pending_since: float | None = None
    clear_since: float | None = None
    firing_since: float | None = None
    firing_wall: float | None = None


QUIET = Level()


@dataclass(frozen=True, kw_only=True, slots=True)
class Blindness:
    """How long a trigger has not seen, and why.

    Attributes:
        since: running seconds of the first bad reading after the last fresh one.
        since_wall: Unix seconds of the same moment.
        answering_since: running seconds since when the source answers, but nothing usable, moved on by all the time in
            which it was unreachable; None if it has not answered at all.
        unreachable_since: running seconds since when it does not answer; None while it does.
        unreachable_seen: whether the source was unreachable at any time of this blindness.
        message: what the last bad reading was.
    """

    since: float
    since_wall: float
    answering_since: float | None
    unreachable_since: float | None
    unreachable_seen: bool
    message: str

    def answered_for(self, now: Instant) -> float | None:
        """Seconds that the source has answered with nothing usable; they only grow. None if it never answered."""
        if self.answering_since is None:
            return None
        return (now.mono if self.unreachable_since is None else self.unreachable_since) - self.answering_since


@dataclass(frozen=True, kw_only=True, slots=True)
class Trigger:
    """A rule's running state after its last evaluation.

    Attributes:
        health: whether it can see.
        main: the rule's own condition.
        steps: its milder steps, in the order of the rule.
        blindness: None while it can see.
        ready: whether it has had a fresh reading since this process started.
        graced: whether a reload added it, so that blindness counts from its first evaluation on.
        value: what was read last; for a heartbeat the age in seconds, for an expression the number of series, for
            connectivity the failures in a row.
        sample_age: seconds; None where unknown.
        failures: consecutive failures of a connectivity probe.
        evaluated: Unix seconds of the last evaluation; None before the first.
        message: what is wrong with its data; empty while it is well.
    """

    health: Health = Health.UNKNOWN
    main: Level = QUIET
    steps: tuple[Level, ...] = ()
    blindness: Blindness | None = None
    ready: bool = False
    graced: bool = False
    value: float | None = None
    sample_age: float | None = None
    failures: int = 0
    evaluated: float | None = None
    message: str = ""

    @property
    def status(self) -> Status:
        """Whether it fires."""
        if self.main.firing_since is not None:
            return Status.FIRING
        return Status.INACTIVE if self.main.pending_since is None else Status.PENDING

    @property
    def armed(self) -> bool:
        """Whether its last evaluation gave a fresh reading."""
        return self.health is Health.OK


def evaluate(rule: Rule, reading: Reading, previous: Trigger, now: Instant) -> Trigger:
    """Evaluate a rule once.

    Args:
        rule: the rule, with a waiver's threshold already in place where there is one.
        reading: what its source said.
        previous: its trigger after the evaluation before; `Trigger()` at first.
        now: the moment of this evaluation.
    """
    judged = _judge(rule, reading, previous)
    if isinstance(judged, _Blind):
        return _blinded(judged, rule, previous, now)
    return replace(
        previous,
        health=Health.OK,
        main=_advance(previous.main, judged.breached, judged.cleared, rule, now),
        steps=tuple(
            _advance(level, breached, not breached, rule, now)
            for level, breached in zip(_levels(previous.steps, len(judged.steps)), judged.steps, strict=True)
        ),
        blindness=None,
        ready=True,
        value=judged.value,
        sample_age=judged.age,
        failures=judged.failures,
        evaluated=now.wall,
        message="",
    )


def demands(rule: Rule, trigger: Trigger, now: Instant) -> tuple[Demand, ...]:
    """What the rule asks of the switch at this moment, given its trigger; of one in shadow, what it would ask."""
    return (*_breach_demands(rule, trigger), *_blind_demands(rule, trigger, now))


def is_clear(trigger: Trigger) -> bool:
    """Whether a rule stands in nobody's way: inactive, and its last look was a good one."""
    return trigger.status is Status.INACTIVE and trigger.health is Health.OK


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    breached: bool
    cleared: bool
    value: float | None
    age: float | None
    steps: tuple[bool, ...] = ()
    failures: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Blind:
    health: Health
    unreachable: bool
    message: str
    # What the usable part of the answer shows all the same. It can only tighten.
    breached: bool = False
    steps: tuple[bool, ...] = ()
    value: float | None = None
    failures: int = 0


def _judge(rule: Rule, reading: Reading, previous: Trigger) -> _Seen | _Blind:
    if isinstance(reading, Fresh):
        return _judge_fresh(rule.condition, reading, previous)
    blind = replace(_blind(reading), failures=previous.failures)
    usable = _usable_part(rule.condition, reading)
    seen = None if usable is None else _judge_fresh(rule.condition, usable, previous)
    if not isinstance(seen, _Seen):
        return blind
    return replace(
        blind,
        breached=seen.breached,
        steps=seen.steps,
        value=seen.value if seen.breached or any(seen.steps) else None,
        failures=max(previous.failures, seen.failures),
    )


def _usable_part(condition: Condition, reading: Reading) -> Fresh | None:
    # A breach among finite values stands, whatever stands beside them; an expression fires on any series, even NaN. Of
    # heartbeats nothing can be said: the one that is no number may have been the newest.
    if not isinstance(reading, Failed) or isinstance(condition, Heartbeat):
        return None
    series = reading.series
    if not isinstance(condition, Expression):
        series = tuple(one for one in series if isfinite(one.value))
    return Fresh(series=series, evaluated_at=0.0, age=None) if series else None


def _judge_fresh(condition: Condition, reading: Fresh, previous: Trigger) -> _Seen | _Blind:
    if not reading.series and not isinstance(condition, Expression | AlertMatch):
        return _blind(Missing())
    match condition:
        case Threshold():
            return _judge_threshold(condition, reading)
        case Heartbeat():
            return _judge_heartbeat(condition, reading)
        case OrderRate():
            return _judge_above(float(condition.max_orders), reading)
        case Watchdog():
            return _judge_above(WATCHDOG_LIMIT, reading)
        case Connectivity():
            return _judge_connectivity(condition, reading, previous)
        case _:
            return _judge_presence(reading)


def _blind(reading: Reading) -> _Blind:
    no_data = isinstance(reading, Missing) or not isinstance(reading, Failed)
    unreachable = isinstance(reading, Failed) and reading.unreachable
    health = Health.NO_DATA if no_data else Health.ERROR
    return _Blind(health=health, unreachable=unreachable, message=describe(reading))


def _judge_threshold(condition: Threshold, reading: Fresh) -> _Seen:
    values = [one.value for one in reading.series]
    breached = any(condition.operator.holds(value, condition.threshold) for value in values)
    return _Seen(
        breached=breached,
        cleared=not breached and all(_is_clear_value(condition, value) for value in values),
        value=condition.operator.worst(values, condition.threshold),
        age=reading.age,
        steps=tuple(any(_reaches(condition, step, value) for value in values) for step in condition.steps),
    )


def _is_clear_value(condition: Threshold, value: float) -> bool:
    if condition.clear is None:
        return True
    if condition.operator.points_down:
        return value >= condition.clear
    if condition.operator.points_up:
        return value <= condition.clear
    return not condition.operator.holds(value, condition.threshold)


def _reaches(condition: Threshold, step: Step, value: float) -> bool:
    return condition.operator.holds(value, step.at) or value == step.at


def _judge_heartbeat(condition: Heartbeat, reading: Fresh) -> _Seen | _Blind:
    age = reading.evaluated_at - max(one.value for one in reading.series)
    if age < -FUTURE_TOLERANCE_SECONDS:
        return _Blind(health=Health.ERROR, unreachable=False, message=f"future: the last beat is {-age:.1f} s ahead")
    breached = age > condition.limit
    return _Seen(breached=breached, cleared=not breached, value=age, age=reading.age)


def _judge_above(limit: float, reading: Fresh) -> _Seen:
    value = max(one.value for one in reading.series)
    return _Seen(breached=value > limit, cleared=value <= limit, value=value, age=reading.age)


def _judge_presence(reading: Fresh) -> _Seen:
    breached = bool(reading.series)
    return _Seen(breached=breached, cleared=not breached, value=float(len(reading.series)), age=reading.age)


def _judge_connectivity(condition: Connectivity, reading: Fresh, previous: Trigger) -> _Seen:
    # A query that cannot be answered says nothing about the venue; a probe that fails is the very thing looked for, and
    # its adapter reports that as a value of 0.
    up = all(one.value == 1.0 for one in reading.series)
    failures = 0 if up else previous.failures + 1
    breached = failures >= condition.max_consecutive_failures
    return _Seen(
        breached=breached,
        cleared=up,
        value=float(failures),
        age=reading.age,
        failures=failures,
    )


def _levels(levels: tuple[Level, ...], count: int) -> tuple[Level, ...]:
    return levels if len(levels) == count else (QUIET,) * count


def _advance(level: Level, breached: bool, cleared: bool, rule: Rule, now: Instant) -> Level:  # noqa: FBT001
    if breached:
        pending_since = now.mono if level.pending_since is None else level.pending_since
        breached_level = replace(level, pending_since=pending_since, clear_since=None)
        if level.firing_since is None and now.mono - pending_since >= rule.for_:
            return replace(breached_level, firing_since=now.mono, firing_wall=now.wall)
        return breached_level
    if level.firing_since is None:
        return QUIET
    if not cleared:
        return replace(level, clear_since=None)  # hysteresis: between threshold and `clear` it goes on firing
    clear_since = now.mono if level.clear_since is None else level.clear_since
    if now.mono - clear_since < rule.keep_firing_for:
        return replace(level, clear_since=clear_since)
    return QUIET


def _blinded(blind: _Blind, rule: Rule, previous: Trigger, now: Instant) -> Trigger:
    return replace(
        previous,
        health=blind.health,
        main=_tighten(previous.main, blind.breached, rule, now),
        steps=tuple(
            _tighten(level, breached, rule, now)
            for level, breached in zip(_levels(previous.steps, len(blind.steps)), blind.steps, strict=True)
        )
        or previous.steps,
        value=previous.value if blind.value is None else blind.value,
        blindness=_still_blind(previous.blindness, blind, now),
        failures=blind.failures,
        evaluated=now.wall,
        message=blind.message,
    )


def _still_blind(before: Blindness | None, blind: _Blind, now: Instant) -> Blindness:
    if before is None:
        return Blindness(
            since=now.mono,
            since_wall=now.wall,
            answering_since=None if blind.unreachable else now.mono,
            unreachable_since=now.mono if blind.unreachable else None,
            unreachable_seen=blind.unreachable,
            message=blind.message,
        )
    if blind.unreachable:
        since = now.mono if before.unreachable_since is None else before.unreachable_since
        return replace(before, unreachable_since=since, unreachable_seen=True, message=blind.message)
    # Unreachability stops the clock of what follows from useless answers but does not set it back: a source that comes
    # and goes must not put that off for ever, nor one that goes away lift it.
    away = 0.0 if before.unreachable_since is None else now.mono - before.unreachable_since
    answering_since = now.mono if before.answering_since is None else before.answering_since + away
    return replace(before, answering_since=answering_since, unreachable_since=None, message=blind.message)


def _tighten(level: Level, breached: bool, rule: Rule, now: Instant) -> Level:  # noqa: FBT001
    return _advance(level, breached, cleared=False, rule=rule, now=now) if breached else level


def _breach_demands(rule: Rule, trigger: Trigger) -> Iterator[Demand]:
    if trigger.main.firing_since is not None:
        yield _demand(rule, trigger, rule.action, rule.factor, trigger.main)
    if isinstance(rule.condition, Threshold):
        for step, level in zip(rule.condition.steps, trigger.steps, strict=False):
            if level.firing_since is not None:
                yield _demand(rule, trigger, step.action, step.factor, level, step=step)


def _demand(
    rule: Rule, trigger: Trigger, action: Action, factor: float | None, level: Level, step: Step | None = None
) -> Demand:
    return Demand(
        trigger=rule.trigger,
        action=action,
        factor=factor,
        code=CauseCode.ALERT if isinstance(rule.condition, AlertMatch) else CauseCode.BREACH,
        message=explain(rule, trigger.value, step),
        value=trigger.value,
        limit=limit_of(rule.condition) if step is None else step.at,
        since=level.firing_wall or 0.0,
    )


def _blind_demands(rule: Rule, trigger: Trigger, now: Instant) -> Iterator[Demand]:
    blindness = trigger.blindness
    # Before its first fresh reading a rule keeps the gate at not_ready instead; only one that a reload added counts.
    if blindness is None or not (trigger.ready or trigger.graced):
        return
    policy = rule.on_no_data
    if blindness.unreachable_seen and now.mono - blindness.since >= policy.hold_for:
        yield _no_data(rule, policy.unreachable, blindness)
    answered = blindness.answered_for(now)
    if answered is not None and answered >= policy.hold_for:
        yield _no_data(rule, policy.then, blindness)


def _no_data(rule: Rule, action: Action, blindness: Blindness) -> Demand:
    return Demand(
        trigger=rule.trigger,
        action=action,
        factor=rule.factor if rule.on_no_data.factor is None else rule.on_no_data.factor,
        code=CauseCode.NO_DATA,
        message=f"no data for rule {rule.trigger} for more than {rule.on_no_data.hold_for:g} s: {blindness.message}",
        since=blindness.since_wall,
    )


def limit_of(condition: Condition) -> float | None:
    """The number that a rule's value is compared with; None for rules without one."""
    match condition:
        case Threshold():
            return condition.threshold
        case Heartbeat():
            return condition.limit
        case Connectivity():
            return float(condition.max_consecutive_failures)
        case OrderRate():
            return float(condition.max_orders)
        case Watchdog():
            return WATCHDOG_LIMIT
        case _:
            return None


def limit_used(rule: Rule, trigger: Trigger) -> float | None:
    """How much of its limit a rule's value has used, 1.0 at the threshold; None where that means nothing."""
    value, limit = trigger.value, limit_of(rule.condition)
    if value is None or not limit:
        return None
    match rule.condition:
        case Threshold():
            away = rule.condition.operator.points_away_from_zero(limit)
            return max(0.0, value / limit) if away else None
        case Connectivity():
            return trigger.failures / limit
        case _:
            return max(0.0, value / limit)


def explain(rule: Rule, value: float | None, step: Step | None = None) -> str:
    """One sentence on why a rule fires: its own summary with the numbers filled in, or the bare comparison."""
    summary = dict(rule.annotations).get("summary")
    if summary and step is None:
        return fill(summary, rule, value)
    shown = "unknown" if value is None else f"{value:g}"
    match rule.condition:
        case Threshold() if step is not None:
            return f"{rule.trigger}: {shown} has reached {step.at:g} on the way to {rule.condition.threshold:g}"
        case Threshold():
            return f"{rule.trigger}: {shown} {rule.condition.operator.symbol} {rule.condition.threshold:g}"
        case Heartbeat():
            return f"{rule.trigger}: the last beat is {shown} s old, more than {rule.condition.limit:g} s"
        case Expression():
            return f"{rule.trigger}: the expression returned {shown} series"
        case AlertMatch():
            return f"{rule.trigger}: {shown} matching alert(s) of Alertmanager firing"
        case Connectivity():
            return f"{rule.trigger}: failed {rule.condition.max_consecutive_failures} times in a row or more"
        case _:
            return f"{rule.trigger} fires"


def fill(template: str, rule: Rule, value: float | None) -> str:
    """Fill `{{ value }}`, `{{ threshold }}` and `{{ trigger }}` into an annotation."""
    limit = limit_of(rule.condition)
    words = {
        "value": "unknown" if value is None else f"{value:g}",
        "threshold": "" if limit is None else f"{limit:g}",
        "trigger": rule.trigger,
    }
    for word, text in words.items():
        for form in (f"{{{{ {word} }}}}", f"{{{{{word}}}}}"):
            template = template.replace(form, text)
    return template


def eased(rule: Rule, threshold: float | None) -> Rule:
    """The rule under a waiver to this threshold; itself where there is none.

    Itself too where it is not of type threshold: a reload has made it another kind since, and the waiver eases nothing.
    """
    if threshold is None or not isinstance(rule.condition, Threshold):
        return rule
    return with_threshold(rule, threshold)


def with_threshold(rule: Rule, threshold: float) -> Rule:
    """The rule as it stands under a waiver: another threshold, steps moved in proportion, no hysteresis.

    It neither waits for `clear` nor keeps firing: what it did at the old threshold must end at the first look at the
    new one, or the waived firing itself would end the recovery that waived it.

    Raises:
        ValueError: the rule is not of type threshold and has none to replace, or the new one is not finite.
    """
    if not isinstance(rule.condition, Threshold):
        raise ValueError(  # noqa: TRY004 - the operator's value is wrong, not a caller's type
            f"rule {rule.trigger!r} is of type {rule.kind} and has no threshold to waive to"
        )
    if not isfinite(threshold):
        raise ValueError(f"{threshold!r} is not a threshold for rule {rule.trigger!r}; give a finite number")
    steps = tuple(
        replace(step, at=threshold * step.fraction) for step in rule.condition.steps if step.fraction is not None
    )
    condition = replace(rule.condition, threshold=threshold, clear=None, steps=steps)
    return replace(rule, condition=condition, keep_firing_for=0.0)
