"""Evaluates rules: asks each group's sources together, turns answers into readings, triggers and demands on the switch.

One task a group, so a slow source delays only its own group. What a rule has to say reaches the gate in the same turn
of the loop in which its answer arrived.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Protocol

from sidecar.app.asked import Asked
from sidecar.app.audit_trail import audit_event
from sidecar.app.clock import Clock
from sidecar.app.keeper import Keeper
from sidecar.app.sources import PROMETHEUS
from sidecar.core.events import Demand, EventKind, HoldRemoved, Waiver
from sidecar.core.states import Action, Instant, Mode
from sidecar.core.switch import Change
from sidecar.rules.model import AlertMatch, Connectivity, Expression, Group, OrderRate, Rule, RuleSet, Threshold
from sidecar.rules.readings import (
    Answer,
    Failure,
    Fresh,
    Newest,
    Reading,
    Series,
    failure_reason,
    newest,
    take_reading,
)
from sidecar.rules.triggers import (
    QUIET,
    Status,
    Trigger,
    demands,
    eased,
    evaluate,
    explain,
    is_clear,
    limit_of,
    with_threshold,
)

log = logging.getLogger("sidecar.evaluation")


class Sources(Protocol):
    """Where answers come from."""

    async def ask(self, rules: Sequence[Rule], receive: Callable[[Rule, Answer | Failure], None]) -> None:
        """Ask for all rules at once; `receive` gets each answer as it arrives. Done when all have."""

    @property
    def timeout(self) -> float:
        """Seconds after which an ask has surely ended."""


@dataclass(kw_only=True, slots=True)
class Counters:
    """What metrics are made of; plain numbers, read by the collector."""

    evaluations: dict[str, int] = field(default_factory=dict)
    failures: dict[str, dict[str, int]] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)
    shadow_firings: dict[str, int] = field(default_factory=dict)

    def forget_all_but(self, rules: AbstractSet[str]) -> None:
        """Drop what was counted for rules that are gone, or every renaming would stay in memory."""
        for counts in (self.evaluations, self.failures, self.shadow_firings):
            for name in counts.keys() - rules:
                del counts[name]


class Evaluator:
    """Runs the rules of one rule set.

    Args:
        keeper: where demands go.
        clock: where `now` comes from.
        sources: where answers come from.
        pod: any text that differs between pods, so that a fleet does not ask in the same moment.
    """

    def __init__(self, *, keeper: Keeper, clock: Clock, sources: Sources, pod: str, warnings_count: bool) -> None:
        self.rules = RuleSet()
        self.triggers: dict[str, Trigger] = {}
        self.counters = Counters()
        self.on_evaluation: list[Callable[[str, float], None]] = []
        self.on_kill: list[Callable[[float], None]] = []
        self.excuses: list[Callable[[Rule], bool]] = []
        """Asked whether a recovery need not wait for what a rule fires for."""
        self.completed: dict[str, float] = {}
        self._keeper = keeper
        self._clock = clock
        self._sources = sources
        self._pod = pod
        self.warnings_count = warnings_count
        self._by_name: dict[str, Rule] = {}
        self._started: dict[str, float] = {}
        self._intervals: dict[str, float] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._reported: dict[str, float] = {}
        self._told: dict[str, float] = {}
        """Since when those fire whose firing was reported."""
        self._shadowing: set[str] = set()
        self._held: dict[str, Demand] = {}
        self._newest: dict[str, Newest] = {}
        self._stored: dict[str, Trigger] = {}
        self._asked: tuple[Asked, ...] = ()
        keeper.observers.change.append(self._on_change)

    # Rule sets

    def load(self, rules: RuleSet, *, opened: bool) -> None:
        """Take over a rule set; triggers of rules that stay keep their timers.

        Args:
            rules: the new rules.
            opened: whether the gate has been ready before. Only then do new rules get time to become ready with the
                gate open; at start, nothing opens before every rule has seen something.
        """
        old = {rule.trigger: rule for rule in self.rules.rules}
        new = {rule.trigger: rule for rule in rules.rules}
        self._hold_what_goes(old, new)
        before = self.triggers
        self.triggers = {}
        for name, rule in new.items():
            known = before.get(name)
            if known is None or (name in old and old[name].kind != rule.kind):
                known = Trigger(ready=isinstance(rule.condition, AlertMatch | OrderRate))
            if opened and rule.enforcing and not known.ready:
                known = replace(known, graced=True)
            self.triggers[name] = known
        self.rules = rules
        self._by_name = new
        self._reported = {name: at for name, at in self._reported.items() if name in new}
        self._told = {name: since for name, since in self._told.items() if name in new and self._is_told(name)}
        self._shadowing &= new.keys()
        self._held = {name: demand for name, demand in self._held.items() if name in new and new[name].enforcing}
        self._newest = {name: mark for name, mark in self._newest.items() if new.get(name) == old.get(name)}
        self.counters.forget_all_but(new.keys())
        self._keeper.publish()
        self._put_back()

    def forget_newest(self) -> None:
        """Judge the next answers as the first ones: another server gives them, with a clock of its own."""
        self._newest.clear()

    def restore(self, triggers: dict[str, Trigger], asked: Sequence[Asked] = ()) -> None:
        """Give the timers that were stored to the rules of these names, now or as soon as their files can be read.

        What a rule asked for that is gone by then, or of another type, holds until an approved recovery, as if a reload
        had removed it.
        """
        self._stored = dict(triggers)
        self._asked = tuple(asked)
        self._put_back()

    def _put_back(self) -> None:
        if not self._by_name:
            return  # no rule file could be read yet; what was stored must outlive that
        self._hold_what_went()
        stored, self._stored = self._stored, {}
        for name, timers in stored.items():
            rule, known = self._by_name.get(name), self.triggers.get(name)
            if rule is None or known is None or _fires(known):
                continue  # gone, or firing already: what is seen now counts, not what was
            self.triggers[name] = replace(
                known, main=timers.main, steps=timers.steps, value=timers.value, failures=timers.failures
            )
            if timers.main.firing_since is not None:
                self._told[name] = timers.main.firing_since  # by the process before this one
            if rule.enabled and not rule.shadow and self._keeper.switch.mode is not Mode.DISABLED:
                self._keeper.demand(name, demands(self._in_force(rule), self.triggers[name], self._clock.now()))

    def _hold_what_went(self) -> None:
        asked, self._asked = self._asked, ()
        gone = [one.demand for one in asked if self._is_gone(one)]
        for one in filter(self._is_of_another_type, asked):
            self._stored.pop(one.demand.trigger, None)  # its timers mean nothing to the new type
        if gone and self._keeper.switch.mode is not Mode.DISABLED:
            self._keeper.apply(HoldRemoved(demands=tuple(gone)))

    def _is_gone(self, asked: Asked) -> bool:
        rule = self._by_name.get(asked.demand.trigger)
        return rule is None or not rule.enforcing or self._is_of_another_type(asked)

    def _is_of_another_type(self, asked: Asked) -> bool:
        rule = self._by_name.get(asked.demand.trigger)
        return rule is not None and asked.kind not in (None, rule.kind)

    def asked(self) -> Iterator[Asked]:
        """What rules ask for without a kill, with what those did whose files could not be read yet."""
        yield from self._asked
        for name in self.triggers:
            soft = filter(_is_soft, self._keeper.switch.demands_of(name))
            yield from (Asked(demand=demand, kind=self._by_name[name].kind) for demand in soft)

    def timers(self) -> Iterator[tuple[str, Trigger]]:
        """All triggers whose timers are to be stored, with those that were and whose rules are not loaded yet."""
        yield from self._stored.items()
        yield from self.triggers.items()

    def _hold_what_goes(self, old: dict[str, Rule], new: dict[str, Rule]) -> None:
        waived = {waiver.trigger for waiver in self._keeper.switch.state.waivers if waiver.threshold is None}
        held: list[Demand] = []
        for name, rule in old.items():
            if name in new and new[name].enabled and not new[name].shadow and new[name].kind == rule.kind:
                continue
            dropped = self._keeper.switch.drop_demands(name)
            if name not in waived:
                held += [demand for demand in dropped if _is_soft(demand)]
        if held:
            self._keeper.apply(HoldRemoved(demands=tuple(held)))

    # Readiness and recovery

    def unready(self) -> list[str]:
        """Enforcing rules that have not had their first fresh reading, and that no reload added later."""
        return [
            rule.trigger
            for rule in self.rules.rules
            if rule.enforcing and not self.triggers[rule.trigger].ready and not self.triggers[rule.trigger].graced
        ]

    def stale(self, now: Instant) -> str | None:
        """Which group has not been evaluated for 3 × its interval and the sources' time limit; None if all have."""
        for group in self._distinct_groups():
            done = self.completed.get(group.name, self._started.get(group.name))
            allowed = 3 * group.interval + self._sources.timeout
            if done is not None and now.mono - done > allowed:
                return f"group {group.name!r} was last evaluated {now.mono - done:.1f} s ago; {allowed:g} s are allowed"
        return None

    def never_evaluated(self) -> list[str]:
        """Groups that have not completed their first evaluation since they were started."""
        return [name for name in self._tasks if name not in self.completed]

    def is_clear(self, rule: Rule) -> bool:
        """Whether it is enforced, inactive and sees."""
        return rule.enforcing and is_clear(self.triggers[rule.trigger])

    def blockers(self, waivers: Sequence[Waiver], killed_by: AbstractSet[str] = frozenset()) -> list[str]:
        """What stands in the way of a recovery: rules that are not clear and that none of `waivers` covers.

        Args:
            waivers: those of the recovery.
            killed_by: rules among the causes of the present kill. One of them that is no longer enforced cannot be seen
                to be clear, and would otherwise be waived by an edit of its file.
        """
        waived = {waiver.trigger: waiver for waiver in waivers}
        found = []
        for rule in self.rules.rules:
            if not rule.enforcing and rule.trigger in killed_by - waived.keys():
                found.append(f"rule {rule.trigger} killed and is not enforced any more; waive it, or enforce it again")
            elif rule.enforcing and (waived.get(rule.trigger) is None or waived[rule.trigger].threshold is not None):
                objection = self._objection(rule, waived.get(rule.trigger))
                found += [objection] if objection else []
        return found

    def _objection(self, rule: Rule, waiver: Waiver | None) -> str | None:
        trigger = self.triggers[rule.trigger]
        if not trigger.armed:
            return f"rule {rule.trigger} cannot see: {trigger.message or 'it has not been evaluated yet'}"
        if waiver is not None and waiver.threshold is not None and isinstance(rule.condition, Threshold):
            value = trigger.value if trigger.value is not None else waiver.threshold
            judged = evaluate(with_threshold(rule, waiver.threshold), _fresh(value), Trigger(), self._clock.now())
            return None if is_clear(judged) else f"rule {rule.trigger} fires even at {waiver.threshold:g}: {value:g}"
        if is_clear(trigger) or any(excuse(rule) for excuse in self.excuses):
            return None
        limit = limit_of(rule.condition)
        beyond = "" if limit is None or trigger.value is None else f": value {trigger.value:g}, threshold {limit:g}"
        return f"rule {rule.trigger} is {trigger.status}{beyond}"

    # Running

    def start(self) -> None:
        """Start a task for each group in place of those that run; each evaluates at once."""
        wanted = {group.name: group for group in self._distinct_groups()}
        for task in self._tasks.values():
            task.cancel()
        self._tasks = {}
        now = self._clock.now()
        # A group that stays is as stale as it was: else a reload every few seconds would hide one that never completes.
        same = {name for name, group in wanted.items() if self._intervals.get(name) == group.interval}
        self.completed = {name: at for name, at in self.completed.items() if name in same}
        self._started = {name: self._started.get(name, now.mono) if name in same else now.mono for name in wanted}
        self._intervals = {name: group.interval for name, group in wanted.items()}
        for group in wanted.values():
            self._tasks[group.name] = asyncio.create_task(self._run_group(group), name=f"group {group.name}")

    def group_names(self) -> list[str]:
        """The groups, each under a name of its own."""
        return [group.name for group in self._distinct_groups()]

    def _distinct_groups(self) -> Iterator[Group]:
        # A name is unique within its file only; two of the same name are two groups here too.
        seen: dict[str, int] = {}
        for group in self.rules.groups:
            count = seen[group.name] = seen.get(group.name, 0) + 1
            yield group if count == 1 else replace(group, name=f"{group.name} ({count})")

    async def stop(self) -> None:
        """End all group tasks."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def failed(self) -> str | None:
        """Say which group's task has ended, which none ever should; None while all run."""
        for name, task in self._tasks.items():
            if task.done():
                error = None if task.cancelled() else task.exception()
                return f"the evaluation of group {name!r} ended: {error!r}"
        return None

    async def _run_group(self, group: Group) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + self._jitter(group)
        while True:
            began = loop.time()
            await self.evaluate_group(group)
            ended = loop.time()
            for observer in self.on_evaluation:
                observer(group.name, ended - began)
            due, missed = next_turn(due, ended, group.interval)
            self.counters.missed[group.name] = self.counters.missed.get(group.name, 0) + missed
            await asyncio.sleep(max(0.0, due - loop.time()))

    def _jitter(self, group: Group) -> float:
        # The same pod always asks at the same offset, so a restart does not move it; a fleet spreads over the interval.
        digest = hashlib.sha256(f"{self._pod}/{group.name}".encode()).digest()
        return group.interval * int.from_bytes(digest[:4], "big") / 2**32

    async def evaluate_group(self, group: Group) -> None:
        """Evaluate every enabled rule of a group once."""
        now = self._clock.now()
        rules = [rule for rule in group.rules if rule.enabled and self._is_due(rule, now)]
        await self._sources.ask(rules, self.receive)
        self.completed[group.name] = self._clock.now().mono

    def _is_due(self, rule: Rule, now: Instant) -> bool:
        if not isinstance(rule.condition, Connectivity):
            return True
        trigger = self.triggers[rule.trigger]
        last = trigger.evaluated
        if not trigger.ready:
            return True  # the gate waits for its first fresh reading, so do not make it wait for the next turn
        # Half a second of grace: a group's tick a moment early must not put a probe off by a whole interval.
        return last is None or abs(now.wall - last) >= rule.condition.interval - 0.5

    def receive(self, rule: Rule, answer: Answer | Failure) -> None:
        """Evaluate one rule on its answer, and let the gate know in the same turn."""
        if self._by_name.get(rule.trigger) is not rule:
            return  # a reload took it away or changed it while the question was under way
        now = self._clock.now()
        reading = take_reading(
            answer,
            max_age=rule.max_age,
            series=rule.series,
            may_be_empty=isinstance(rule.condition, Expression | AlertMatch),
            warnings_count=self.warnings_count,
            behind=self._behind(rule, answer, now),
        )
        if isinstance(reading, Fresh) and isinstance(answer, Answer):
            self._newest[rule.trigger] = newest(self._newest.get(rule.trigger), answer, now.mono)
        self._count(rule, reading)
        before = self.triggers[rule.trigger]
        in_force = self._in_force(rule)  # once: a kill ends the waivers, and what it is reported with is what it broke
        trigger = evaluate(in_force, reading, before, now)
        self.triggers[rule.trigger] = trigger
        if rule.shadow:
            self._shadow(in_force, trigger, now)
        else:
            self._act(in_force, trigger, answer, now)
        self._report(in_force, before, trigger, now)

    def _behind(self, rule: Rule, answer: Answer | Failure, now: Instant) -> float:
        # What we look at ourselves is stamped by our own clock, which may be set back; no cache stands in between.
        if rule.query is None or rule.source != PROMETHEUS:
            return 0.0
        known = self._newest.get(rule.trigger)
        return 0.0 if known is None else known.behind(answer, now.mono)

    def renew(self, rule: Rule) -> None:
        """Let a trigger that fires count as firing anew, for something that is a cause of its own has come to it."""
        trigger = self.triggers[rule.trigger]
        if trigger.main.firing_since is not None:
            anew = replace(trigger.main, firing_wall=self._clock.now().wall)
            self.triggers[rule.trigger] = replace(trigger, main=anew)

    def quiet(self, rules: Iterable[Rule]) -> None:
        """Let triggers start afresh, for an approved recovery has just taken into account what they fired for."""
        for rule in rules:
            self._keeper.switch.drop_demands(rule.trigger)
            self.triggers[rule.trigger] = replace(self.triggers[rule.trigger], main=QUIET)
        self._keeper.publish()

    def _in_force(self, rule: Rule) -> Rule:
        for waiver in self._keeper.switch.state.waivers:
            if waiver.trigger == rule.trigger:
                return eased(rule, waiver.threshold)
        return rule

    def _act(self, rule: Rule, trigger: Trigger, answer: Answer | Failure, now: Instant) -> None:
        asked = demands(rule, trigger, now)
        killed = bool(self._keeper.demand(rule.trigger, asked))
        self._report_hold(rule, trigger, asked, now)
        if killed and isinstance(answer, Answer) and trigger.sample_age is not None:
            sampled = answer.evaluated_at - trigger.sample_age
            for observer in self.on_kill:
                observer(max(0.0, self._clock.now().wall - sampled))

    def _shadow(self, rule: Rule, trigger: Trigger, now: Instant) -> None:
        asked = [demand for demand in demands(rule, trigger, now) if demand.action > Action.WARN]
        if asked and rule.trigger not in self._shadowing:
            self._shadowing.add(rule.trigger)
            self.counters.shadow_firings[rule.trigger] = self.counters.shadow_firings.get(rule.trigger, 0) + 1
            self._keeper.audit(
                audit_event(
                    "trigger.shadow",
                    now,
                    by=f"rule {rule.trigger}",
                    reason=asked[0].message,
                    would=asked[0].action.label,
                )
            )
        elif not asked:
            self._shadowing.discard(rule.trigger)

    def _count(self, rule: Rule, reading: Reading) -> None:
        counters = self.counters
        counters.evaluations[rule.trigger] = counters.evaluations.get(rule.trigger, 0) + 1
        reason = failure_reason(reading)
        if reason is not None:
            by_reason = counters.failures.setdefault(rule.trigger, {})
            by_reason[reason] = by_reason.get(reason, 0) + 1

    def _report(self, rule: Rule, before: Trigger, after: Trigger, now: Instant) -> None:
        if before.status is not after.status:
            # Timers of a trigger that moved must outlive a crash; while it stands still, now and then is enough.
            self._keeper.checkpoint()
        if before.health is not after.health:
            log.info(
                "trigger.health",
                extra={"fields": {"trigger": rule.trigger, "health": after.health.value, "message": after.message}},
            )
        self._report_firing(rule, after, now)

    def _report_firing(self, rule: Rule, trigger: Trigger, now: Instant) -> None:
        """Audit a firing once, if need be only when the rule's cooldown is over, and that it cleared if it was."""
        name, since = rule.trigger, trigger.main.firing_since
        if since is None:
            if self._told.pop(name, None) is not None:
                self._audit_status("trigger.cleared", rule, trigger, now)
            return
        last = self._reported.get(name)
        if not self._is_told(name) and (last is None or now.mono - last >= rule.cooldown):
            self._reported[name] = now.mono
            self._told[name] = since
            self._audit_status("trigger.firing", rule, trigger, now)

    def _is_told(self, name: str) -> bool:
        since = self.triggers[name].main.firing_since
        return since is not None and self._told.get(name) == since

    def _report_hold(self, rule: Rule, trigger: Trigger, asked: Sequence[Demand], now: Instant) -> None:
        """Audit what restricts orders without being the rule's own action or a kill: a step, or no data."""
        own = (rule.action, rule.factor) if trigger.status is Status.FIRING else None
        soft = [demand for demand in asked if _is_soft(demand) and (demand.action, demand.factor) != own]
        strictest = max(soft, key=_strictness, default=None)
        before = self._held.get(rule.trigger)
        if (before and _strictness(before)) == (strictest and _strictness(strictest)):
            return
        self._keeper.checkpoint()
        by = f"rule {rule.trigger}"
        if strictest is None:
            del self._held[rule.trigger]
            self._keeper.audit(
                audit_event("trigger.lifted", now, by=by, reason=f"{by} asks for nothing more on the way")
            )
            return
        self._held[rule.trigger] = strictest
        self._keeper.audit(
            audit_event(
                "trigger.restricts",
                now,
                by=by,
                reason=strictest.message,
                trigger=rule.trigger,
                action=strictest.action.label,
                factor=strictest.factor,
                value=strictest.value,
                limit=strictest.limit,
            )
        )

    def _audit_status(self, kind: str, rule: Rule, trigger: Trigger, now: Instant) -> None:
        reason = explain(rule, trigger.value) if kind == "trigger.firing" else f"rule {rule.trigger} cleared"
        self._keeper.audit(
            audit_event(
                kind,
                now,
                by=f"rule {rule.trigger}",
                reason=reason,
                trigger=rule.trigger,
                action=rule.action.label,
                shadow=rule.shadow,
                value=trigger.value,
                limit=limit_of(rule.condition),
            )
        )

    def _on_change(self, change: Change) -> None:
        if change.event.kind is EventKind.BEGIN:
            for waiver in change.after.waivers:
                known = self.triggers.get(waiver.trigger)
                if known is not None and waiver.threshold is not None:
                    self.triggers[waiver.trigger] = replace(known, main=QUIET, steps=())

    @property
    def is_pending(self) -> bool:
        """Whether a rule is on its way to fire."""
        return any(trigger.status is Status.PENDING for trigger in self.triggers.values())

    def running_timers(self) -> Iterator[str]:
        """Triggers whose timers are running and should be saved now and then."""
        for name, trigger in self.triggers.items():
            if trigger.main != QUIET or any(level != QUIET for level in trigger.steps):
                yield name


def _is_soft(demand: Demand) -> bool:
    """Whether it restricts orders and lifts by itself."""
    return Action.WARN < demand.action < Action.KILL


def _strictness(demand: Demand) -> tuple[Action, float]:
    return demand.action, 0.0 if demand.factor is None else -demand.factor


def _fires(trigger: Trigger) -> bool:
    return any(level.firing_since is not None for level in (trigger.main, *trigger.steps))


def next_turn(due: float, now: float, interval: float) -> tuple[float, int]:
    """When a group is to be evaluated next, and how many of its turns have gone by; all in seconds of one clock."""
    if due > now:
        return due, 0
    missed = int((now - due) / interval)
    return due + (missed + 1) * interval, missed


def _fresh(value: float) -> Fresh:
    return Fresh(series=(Series(value=value),), evaluated_at=0.0, age=0.0)
