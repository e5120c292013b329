import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from sidecar.app.asked import asked_document, asked_from_document
from sidecar.app.evaluation import Evaluator, next_turn
from sidecar.app.keeper import Keeper
from sidecar.core.compose import Overlay
from sidecar.core.document import demands_document, state_document
from sidecar.core.events import Waiver
from sidecar.core.states import Action, Instant, Mode, Restriction, State
from sidecar.core.switch import Switch
from sidecar.core.transitions import Policies, SwitchState
from sidecar.rules.model import (
    AlertMatch,
    Connectivity,
    Expression,
    Group,
    OnNoData,
    Operator,
    OrderRate,
    Rule,
    RuleSet,
    Step,
    Threshold,
)
from sidecar.rules.readings import Answer, Failure, Series
from sidecar.rules.triggers import Health, Level, Status, Trigger

if TYPE_CHECKING:
    from sidecar.core.snapshot import Snapshot

DOWN = Failure(reason="unreachable", message="connection refused", unreachable=True)
NOTHING = Answer(series=(), evaluated_at=0.0, oldest_sample=None)


class FakeClock:
    def __init__(self) -> None:
        self.at = Instant(mono=1000.0, wall=1_700_000_000.0)

    def now(self) -> Instant:
        return self.at

    def jump(self, seconds: float) -> None:
        self.at = Instant(mono=self.at.mono + seconds, wall=self.at.wall + seconds)


class FakeSources:
    """Answers every rule with what the test has put down for it; can hang, and can fail."""

    timeout = 2.0

    def __init__(self) -> None:
        self.answers: dict[str, Answer | Failure] = {}
        self.asked: list[list[str]] = []
        self.hanging = False
        self.error: Exception | None = None

    async def ask(self, rules: Sequence[Rule], receive: Callable[[Rule, Answer | Failure], None]) -> None:
        self.asked.append([rule.trigger for rule in rules])
        if self.error is not None:
            raise self.error
        if self.hanging:
            await asyncio.Event().wait()
        for rule in rules:
            receive(rule, self.answers[rule.trigger])


def value(number: float, age: float = 1.0, at: float = 1_700_000_000.0) -> Answer:
    return Answer(series=(Series(value=number),), evaluated_at=at, oldest_sample=at - age)


def drawdown(name: str = "dd", **changes: Any) -> Rule:
    condition = Threshold(query="q", operator=Operator.LT, threshold=-0.15)
    return replace(Rule(trigger=name, group="g", condition=condition, origin="r.yaml:1"), **changes)


def rule_set(*rules: Rule, interval: float = 5.0) -> RuleSet:
    return RuleSet(groups=(Group(name="g", interval=interval, rules=rules),), content_hash="h")


class World:
    def __init__(self, *, mode: Mode = Mode.ACTIVE, state: SwitchState | None = None) -> None:
        self.clock = FakeClock()
        self.switch = Switch(name="s", mode=mode, state=state or SwitchState(), policies=Policies())
        self.keeper = Keeper(switch=self.switch, clock=self.clock, document=state_document)
        self.shown: list[Snapshot] = []
        self.keeper.observers.snapshot.append(self.shown.append)
        self.keeper.cover(Overlay())
        self.sources = FakeSources()
        self.evaluator = Evaluator(
            keeper=self.keeper, clock=self.clock, sources=self.sources, pod="ns/pod", warnings_count=True
        )

    @property
    def restriction(self) -> Restriction:
        return self.shown[-1].gate_restriction

    def load(self, *rules: Rule, opened: bool = False) -> None:
        self.evaluator.load(rule_set(*rules), opened=opened)

    async def look(self, **answers: Answer | Failure) -> None:
        self.sources.answers.update(answers)
        for group in self.evaluator.rules.groups:
            await self.evaluator.evaluate_group(group)

    def trigger(self, name: str = "dd") -> Trigger:
        return self.evaluator.triggers[name]

    def audited(self) -> list[str]:
        return [event["type"] for event in self.keeper._events]


# Readiness


async def test_a_rule_is_unready_until_its_first_fresh_reading() -> None:
    world = World()
    world.load(drawdown())
    assert world.evaluator.unready() == ["dd"]
    await world.look(dd=DOWN)
    assert world.evaluator.unready() == ["dd"]
    await world.look(dd=value(0.0))
    assert world.evaluator.unready() == []


async def test_missing_data_never_kills_before_the_first_fresh_reading() -> None:
    world = World()
    world.load(drawdown(on_no_data=OnNoData(hold_for=10.0)))
    for _ in range(5):
        await world.look(dd=NOTHING)
        world.clock.jump(60.0)
    assert world.switch.state.state is State.ACTIVE
    assert world.evaluator.unready() == ["dd"]


async def test_an_expression_is_ready_after_an_empty_answer_and_alerts_order_rate_and_shadow_rules_at_once() -> None:
    world = World()
    world.load(
        drawdown("ex", condition=Expression(expr="up == 0")),
        drawdown("al", condition=AlertMatch(match=('a="b"',))),
        drawdown("or", condition=OrderRate()),
        drawdown("sh", shadow=True),
        drawdown("off", enabled=False),
    )
    assert world.evaluator.unready() == ["ex"]
    await world.look(ex=NOTHING, sh=DOWN, al=NOTHING, **{"or": value(0.0)})
    assert world.evaluator.unready() == []


async def test_a_rule_that_a_reload_adds_is_not_unready_but_acts_on_no_data_after_its_hold() -> None:
    world = World()
    world.load(drawdown())
    await world.look(dd=value(0.0))
    world.load(drawdown(), drawdown("new", on_no_data=OnNoData(hold_for=60.0, then=Action.HALT)), opened=True)
    assert world.evaluator.unready() == []
    await world.look(new=NOTHING)
    world.clock.jump(59.0)
    await world.look(new=NOTHING)
    assert world.restriction is Restriction.NONE
    world.clock.jump(1.0)
    await world.look(new=NOTHING)
    assert world.restriction is Restriction.HALT


@pytest.mark.parametrize(
    "before",
    [
        drawdown(condition=Expression(expr="x")),
        drawdown(shadow=True),
        drawdown(enabled=False),
        drawdown(action=Action.WARN, on_no_data=OnNoData(then=Action.WARN, unreachable=Action.WARN)),
    ],
    ids=["another type", "shadow", "disabled", "warning only"],
)
async def test_a_rule_that_a_reload_makes_enforcing_or_changes_in_type_acts_on_no_data(before: Rule) -> None:
    world = World()
    world.load(before)
    await world.look(dd=NOTHING)
    world.load(drawdown(on_no_data=OnNoData(hold_for=60.0)), opened=True)
    assert world.evaluator.unready() == []
    await world.look(dd=NOTHING)
    world.clock.jump(61.0)
    await world.look(dd=NOTHING)
    assert world.switch.state.state is State.KILLED


# What answers do


async def test_a_breach_kills_in_the_turn_of_its_answer_and_is_measured() -> None:
    world = World()
    seconds: list[float] = []
    world.evaluator.on_kill.append(seconds.append)
    world.load(drawdown())
    await world.look(dd=value(0.0))
    await world.look(dd=value(-0.2, age=0.75, at=world.clock.now().wall))
    assert world.switch.state.state is State.KILLED
    assert world.restriction is Restriction.HALT
    assert seconds == [pytest.approx(0.75)]
    assert world.audited() == ["switch.killed", "trigger.firing"]


async def test_a_halt_holds_while_the_rule_fires_and_lifts_by_itself() -> None:
    world = World()
    world.load(drawdown(action=Action.HALT))
    await world.look(dd=value(-0.2))
    assert world.restriction is Restriction.HALT
    await world.look(dd=DOWN)
    assert world.restriction is Restriction.HALT
    await world.look(dd=value(0.0))
    assert world.restriction is Restriction.NONE
    assert world.audited() == ["trigger.firing", "trigger.cleared"]


async def test_steps_restrict_on_the_way_to_the_threshold() -> None:
    world = World()
    steps = (Step(at=-0.1, action=Action.THROTTLE, factor=0.5), Step(at=-0.14, action=Action.REDUCE_ONLY))
    condition = Threshold(query="q", operator=Operator.LT, threshold=-0.15, steps=steps)
    world.load(drawdown(condition=condition))
    await world.look(dd=value(-0.12))
    assert world.shown[-1].gate_factor == 0.5
    await world.look(dd=value(-0.145))
    assert world.restriction is Restriction.REDUCE_ONLY
    await world.look(dd=value(-0.145))
    await world.look(dd=value(0.0))
    assert world.shown[-1].gate_factor == 1.0
    assert world.audited() == ["trigger.restricts", "trigger.restricts", "trigger.lifted"]


async def test_a_blind_rule_that_halts_is_audited_when_it_halts_and_when_it_lifts() -> None:
    world = World()
    world.load(drawdown())
    await world.look(dd=value(0.0))
    await world.look(dd=DOWN)
    world.clock.jump(61.0)
    await world.look(dd=DOWN)
    assert world.restriction is Restriction.HALT
    assert world.audited() == ["trigger.restricts"]
    await world.look(dd=value(0.0, at=world.clock.now().wall))
    assert world.restriction is Restriction.NONE
    assert world.audited() == ["trigger.restricts", "trigger.lifted"]


async def test_a_shadow_rule_says_what_it_would_do_once_and_does_nothing() -> None:
    world = World()
    world.load(drawdown(shadow=True))
    for _ in range(3):
        await world.look(dd=value(-0.2))
    assert world.restriction is Restriction.NONE
    assert world.switch.state.state is State.ACTIVE
    assert world.audited().count("trigger.shadow") == 1
    assert world.evaluator.counters.shadow_firings == {"dd": 1}
    await world.look(dd=value(0.0))
    await world.look(dd=value(-0.2))
    assert world.evaluator.counters.shadow_firings == {"dd": 2}


async def test_cooldown_limits_reports_and_never_the_action() -> None:
    world = World()
    world.load(drawdown(action=Action.HALT, cooldown=60.0))
    for _ in range(3):
        await world.look(dd=value(-0.2))
        assert world.restriction is Restriction.HALT
        await world.look(dd=value(0.0))
        world.clock.jump(10.0)
    assert world.audited().count("trigger.firing") == 1
    world.clock.jump(60.0)
    await world.look(dd=value(-0.2, at=world.clock.now().wall))
    assert world.audited().count("trigger.firing") == 2


def reports(world: World) -> list[str]:
    return [kind for kind in world.audited() if kind in ("trigger.firing", "trigger.cleared")]


async def test_a_firing_that_began_within_the_cooldown_is_reported_once_the_cooldown_is_over() -> None:
    world = World()
    world.load(drawdown(action=Action.HALT, cooldown=60.0))
    await world.look(dd=value(-0.2))
    await world.look(dd=value(0.0))
    for seconds in (10.0, 49.0):
        world.clock.jump(seconds)
        await world.look(dd=value(-0.2, at=world.clock.now().wall))
    assert reports(world) == ["trigger.firing", "trigger.cleared"]
    for _ in range(3):
        world.clock.jump(1.0)
        await world.look(dd=value(-0.2, at=world.clock.now().wall))
    assert reports(world) == ["trigger.firing", "trigger.cleared", "trigger.firing"]
    await world.look(dd=value(0.0, at=world.clock.now().wall))
    assert reports(world) == ["trigger.firing", "trigger.cleared"] * 2


async def test_a_firing_that_was_not_reported_is_not_reported_as_cleared() -> None:
    world = World()
    world.load(drawdown(action=Action.HALT, cooldown=60.0))
    for number in (-0.2, 0.0, -0.2, 0.0):
        await world.look(dd=value(number))
    assert reports(world) == ["trigger.firing", "trigger.cleared"]


async def test_a_firing_from_before_a_restart_is_not_reported_again_but_as_cleared() -> None:
    world = World()
    world.load(drawdown(action=Action.HALT))
    fired = Trigger(main=Level(pending_since=1.0, firing_since=1.0, firing_wall=1.0))
    world.evaluator.restore({"dd": fired})
    await world.look(dd=value(-0.2))
    assert reports(world) == []
    await world.look(dd=value(0.0))
    assert reports(world) == ["trigger.cleared"]


async def test_a_reload_that_makes_another_type_of_a_rule_forgets_that_its_firing_was_reported() -> None:
    world = World()
    world.load(drawdown(action=Action.HALT))
    await world.look(dd=value(-0.2))
    world.load(drawdown(action=Action.HALT, condition=Expression(expr="x")), opened=True)
    await world.look(dd=NOTHING)
    assert reports(world) == ["trigger.firing"]


async def test_what_breaks_a_waivers_threshold_is_reported_with_that_one() -> None:
    world = World(state=SwitchState(waivers=(waiver("dd", -0.25),)))
    world.load(drawdown())
    await world.look(dd=value(-0.3))
    events = world.keeper._events
    limits = [event["data"]["limit"] for event in events if event["type"] == "trigger.firing"]
    assert limits == [-0.25]
    assert [event["type"] for event in events] == ["switch.killed", "trigger.firing"]


async def test_evaluations_and_failures_are_counted_by_reason() -> None:
    world = World()
    world.load(drawdown())
    await world.look(dd=value(0.0))
    await world.look(dd=DOWN)
    await world.look(dd=NOTHING)
    await world.look(dd=value(0.0, age=100.0))
    counters = world.evaluator.counters
    assert counters.evaluations == {"dd": 4}
    assert counters.failures == {"dd": {"unreachable": 1, "missing": 1, "stale": 1}}


async def test_what_was_counted_for_a_rule_is_forgotten_with_it() -> None:
    world = World()
    world.load(drawdown(), drawdown("gone"))
    await world.look(dd=DOWN, gone=DOWN)
    world.load(drawdown(), opened=True)
    assert set(world.evaluator.counters.evaluations) == {"dd"}
    assert set(world.evaluator.counters.failures) == {"dd"}


async def test_an_answer_with_warnings_counts_only_where_they_are_ignored() -> None:
    world = World()
    world.load(drawdown())
    await world.look(dd=replace(value(0.0), warnings=("partial",)))
    assert world.trigger().health is Health.NO_DATA
    world.evaluator.warnings_count = False
    await world.look(dd=replace(value(0.0), warnings=("partial",)))
    assert world.trigger().armed


async def test_disabled_rules_are_not_asked_and_a_probe_only_at_its_own_interval() -> None:
    world = World()
    world.load(
        drawdown("off", enabled=False),
        drawdown("venue", condition=Connectivity(tcp="v:1", interval=30.0)),
    )
    world.sources.answers["venue"] = value(1.0)
    for _ in range(7):
        await world.look()
        world.clock.jump(5.0)
    assert [asked for asked in world.sources.asked if asked] == [["venue"], ["venue"]]


# Reload


async def test_a_reload_keeps_the_timers_of_an_unchanged_rule() -> None:
    world = World()
    world.load(drawdown(for_=60.0))
    await world.look(dd=value(-0.2))
    world.clock.jump(40.0)
    world.load(drawdown(for_=60.0), opened=True)
    assert world.trigger().status is Status.PENDING
    world.clock.jump(20.0)
    await world.look(dd=value(-0.2))
    assert world.switch.state.state is State.KILLED


async def test_an_answer_for_a_rule_that_a_reload_changed_meanwhile_is_dropped() -> None:
    world = World()
    old = drawdown()
    world.load(old)
    world.load(drawdown(condition=Threshold(query="q2", operator=Operator.LT, threshold=-0.5)), opened=True)
    world.evaluator.receive(old, value(-0.2))
    assert world.switch.state.state is State.ACTIVE
    assert world.evaluator.counters.evaluations == {}


@pytest.mark.parametrize(
    "changed",
    [None, drawdown(enabled=False), drawdown(shadow=True), drawdown(condition=Expression(expr="x"))],
    ids=["removed", "disabled", "shadow", "another type"],
)
async def test_what_a_rule_held_when_a_reload_took_it_out_stays_without_a_gap(changed: Rule | None) -> None:
    world = World()
    world.load(drawdown(action=Action.THROTTLE, factor=0.25), drawdown("other"))
    await world.look(dd=value(-0.2), other=value(0.0))
    world.shown.clear()
    rest = (drawdown("other"),) if changed is None else (changed, drawdown("other"))
    world.load(*rest, opened=True)
    assert {snapshot.gate_factor for snapshot in world.shown} == {0.25}
    assert [demand.trigger for demand in world.switch.state.held] == ["dd"]


async def test_a_warning_of_a_rule_that_is_taken_out_does_not_stay() -> None:
    world = World()
    world.load(drawdown(action=Action.WARN, on_no_data=OnNoData(then=Action.WARN, unreachable=Action.WARN)))
    await world.look(dd=value(-0.2))
    assert len(world.switch.demands) == 1
    world.load(drawdown(enabled=False), opened=True)
    assert world.switch.demands == ()
    assert world.switch.state.held == ()


async def test_a_waived_rule_that_is_taken_out_leaves_nothing_behind() -> None:
    waiver = Waiver(trigger="dd", threshold=None, until=2e9, until_mono=1e9, by="bob")
    world = World(state=SwitchState(waivers=(waiver,)))
    world.load(drawdown(action=Action.HALT))
    await world.look(dd=value(-0.2))
    assert world.restriction is Restriction.NONE
    world.load(drawdown("other"), opened=True)
    assert world.restriction is Restriction.NONE


@pytest.mark.parametrize(
    "now",
    [None, drawdown(enabled=False), drawdown(condition=Expression(expr="x"))],
    ids=["removed", "disabled", "another type"],
)
async def test_what_a_rule_held_that_went_while_the_sidecar_was_down_stays(now: Rule | None) -> None:
    before = World()
    before.load(drawdown(action=Action.THROTTLE, factor=0.25), drawdown("other"))
    await before.look(dd=value(-0.2), other=value(0.0))
    asked = asked_from_document(asked_document(before.evaluator.asked()))
    assert [(one.demand.trigger, one.demand.factor) for one in asked] == [("dd", 0.25)]
    world = World()
    world.evaluator.restore({"dd": FIRING}, asked)
    assert list(world.evaluator.asked()) == list(asked)  # no rule file could be read yet
    world.load(*(rule for rule in (now, drawdown("other")) if rule is not None))
    assert [demand.trigger for demand in world.switch.state.held] == ["dd"]
    assert list(world.evaluator.asked()) == []
    if now is not None and now.enforcing:
        assert world.trigger().status is Status.INACTIVE


async def test_what_an_older_version_stored_without_the_type_of_its_rule_is_read() -> None:
    before = World()
    before.load(drawdown(action=Action.THROTTLE, factor=0.25))
    await before.look(dd=value(-0.2))
    asked = asked_from_document(demands_document(one.demand for one in before.evaluator.asked()))
    assert [(one.demand.trigger, one.kind) for one in asked] == [("dd", None)]
    same, gone = World(), World()
    same.evaluator.restore({}, asked)
    same.load(drawdown(action=Action.THROTTLE, factor=0.25))
    assert same.switch.state.held == ()
    gone.evaluator.restore({}, asked)
    gone.load(drawdown("other"))
    assert [demand.trigger for demand in gone.switch.state.held] == ["dd"]


async def test_what_a_rule_that_is_still_there_asked_for_is_its_own_to_say_again() -> None:
    before = World()
    before.load(drawdown(action=Action.THROTTLE, factor=0.25))
    await before.look(dd=value(-0.2))
    world = World()
    world.load(drawdown(action=Action.THROTTLE, factor=0.25))
    world.evaluator.restore({}, tuple(before.evaluator.asked()))
    assert world.switch.state.held == ()


# Restoring timers


FIRING = Trigger(main=Level(pending_since=900.0, firing_since=900.0, firing_wall=1_699_999_900.0), value=-0.2)


async def test_a_trigger_that_fired_before_a_restart_fires_until_a_fresh_reading_says_otherwise() -> None:
    world = World()
    world.load(drawdown(action=Action.HALT))
    world.evaluator.restore({"dd": FIRING})
    assert world.restriction is Restriction.HALT
    assert world.evaluator.unready() == ["dd"]
    await world.look(dd=DOWN)
    assert world.restriction is Restriction.HALT
    await world.look(dd=value(0.0))
    assert world.restriction is Restriction.NONE


async def test_stored_timers_wait_for_rules_that_could_not_be_read_at_the_start() -> None:
    world = World()
    world.evaluator.restore({"dd": FIRING, "gone": FIRING})
    world.evaluator.load(RuleSet(), opened=False)
    assert {name for name, _ in world.evaluator.timers()} == {"dd", "gone"}
    world.load(drawdown(action=Action.HALT))
    assert world.restriction is Restriction.HALT
    assert {name for name, _ in world.evaluator.timers()} == {"dd"}


async def test_stored_timers_that_come_late_do_not_undo_what_fires_now() -> None:
    world = World()
    world.load(drawdown(action=Action.HALT, for_=0.0))
    await world.look(dd=value(-0.2))
    world.evaluator.restore({"dd": Trigger(main=Level(pending_since=990.0))})
    assert world.trigger().status is Status.FIRING
    assert world.restriction is Restriction.HALT


async def test_stored_timers_that_come_late_leave_what_the_rule_has_seen() -> None:
    world = World()
    world.load(drawdown(for_=60.0))
    await world.look(dd=value(-0.2))
    world.evaluator.restore({"dd": Trigger(main=Level(pending_since=950.0))})
    assert world.trigger().main.pending_since == 950.0
    assert world.trigger().ready
    assert world.trigger().armed


async def test_a_disabled_switch_restores_no_demands_and_survives_the_reload_that_removes_their_rule() -> None:
    world = World(mode=Mode.DISABLED)
    world.load(drawdown(action=Action.HALT))
    world.evaluator.restore({"dd": FIRING})
    world.load(drawdown("other"), opened=True)
    assert world.restriction is Restriction.NONE


# Recovery


async def test_blockers_are_rules_that_fire_or_cannot_see() -> None:
    world = World()
    world.load(drawdown(), drawdown("blind"), drawdown("fine"), drawdown("sh", shadow=True))
    await world.look(dd=value(-0.2), blind=DOWN, fine=value(0.0), sh=value(-0.9))
    blockers = world.evaluator.blockers(())
    assert len(blockers) == 2
    assert "dd is firing: value -0.2, threshold -0.15" in blockers[0]
    assert "blind cannot see" in blockers[1]


def waiver(name: str, threshold: float | None) -> Waiver:
    return Waiver(trigger=name, threshold=threshold, until=2e9, until_mono=1e9, by="bob")


async def test_a_full_waiver_overlooks_a_rule_and_one_with_a_threshold_judges_by_that() -> None:
    world = World()
    world.load(drawdown())
    await world.look(dd=value(-0.2))
    assert world.evaluator.blockers((waiver("dd", None),)) == []
    assert world.evaluator.blockers((waiver("dd", -0.25),)) == []
    (objection,) = world.evaluator.blockers((waiver("dd", -0.18),))
    assert "fires even at -0.18" in objection
    await world.look(dd=DOWN)
    assert world.evaluator.blockers((waiver("dd", None),)) == []
    (objection,) = world.evaluator.blockers((waiver("dd", -0.25),))
    assert "cannot see" in objection


async def test_under_a_waivers_threshold_the_rule_is_evaluated_at_that_and_rearms_when_it_ends() -> None:
    world = World(state=SwitchState(waivers=(waiver("dd", -0.25),)))
    world.load(drawdown())
    await world.look(dd=value(-0.2))
    assert world.switch.state.state is State.ACTIVE
    world.switch.restore(SwitchState(), world.clock.now())
    await world.look(dd=value(-0.2))
    assert world.switch.state.state is State.KILLED


# Staleness and running


async def test_a_group_is_stale_after_three_intervals_and_the_sources_time() -> None:
    world = World()
    world.load(drawdown())
    world.sources.hanging = True
    world.evaluator.start()
    try:
        world.clock.jump(17.0)
        assert world.evaluator.stale(world.clock.now()) is None
        world.clock.jump(0.1)
        assert "'g'" in (world.evaluator.stale(world.clock.now()) or "")
        assert world.evaluator.never_evaluated() == ["g"]
    finally:
        await world.evaluator.stop()


async def test_reloads_do_not_hide_a_group_that_never_completes() -> None:
    world = World()
    world.load(drawdown())
    await world.look(dd=value(0.0))
    world.sources.hanging = True
    for _ in range(4):
        world.load(drawdown(), opened=True)
        world.evaluator.start()
        await asyncio.sleep(0)
        world.clock.jump(5.0)
    try:
        assert world.evaluator.stale(world.clock.now()) is not None
    finally:
        await world.evaluator.stop()


async def test_each_group_is_evaluated_at_once_and_completes() -> None:
    world = World()
    world.load(drawdown())
    world.sources.answers["dd"] = value(0.0)
    took: list[tuple[str, float]] = []
    world.evaluator.on_evaluation.append(lambda name, seconds: took.append((name, seconds)))
    world.evaluator.start()
    try:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert world.evaluator.never_evaluated() == []
        assert [name for name, _ in took] == ["g"]
        assert world.evaluator.failed() is None
    finally:
        await world.evaluator.stop()


async def test_a_group_whose_evaluation_raises_is_reported_as_failed() -> None:
    world = World()
    world.load(drawdown())
    world.sources.error = RuntimeError("defect")
    world.evaluator.start()
    try:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert "defect" in (world.evaluator.failed() or "")
    finally:
        await world.evaluator.stop()


def test_two_groups_of_one_name_are_two() -> None:
    world = World()
    groups = (
        Group(name="g", interval=1.0, rules=(drawdown("a"),)),
        Group(name="g", interval=1.0, rules=(drawdown("b"),)),
    )
    world.evaluator.load(RuleSet(groups=groups), opened=False)
    assert world.evaluator.group_names() == ["g", "g (2)"]


@pytest.mark.parametrize(
    ("due", "now", "wanted"),
    [
        (10.0, 4.0, (10.0, 0)),  # the first look was early: the jittered moment is still to come
        (10.0, 10.5, (15.0, 0)),
        (10.0, 14.9, (15.0, 0)),
        (10.0, 15.0, (20.0, 1)),
        (10.0, 32.0, (35.0, 4)),
    ],
)
def test_the_next_turn_keeps_the_beat_and_counts_what_was_missed(
    due: float, now: float, wanted: tuple[float, int]
) -> None:
    assert next_turn(due, now, 5.0) == wanted


def test_the_offset_of_a_pod_is_the_same_after_a_restart_within_the_interval_and_not_that_of_another_pod() -> None:
    group = Group(name="g", interval=5.0, rules=())
    one, again, other = World(), World(), World()
    other.evaluator._pod = "ns/another"
    assert one.evaluator._jitter(group) == again.evaluator._jitter(group)
    assert one.evaluator._jitter(group) != other.evaluator._jitter(group)
    assert 0.0 <= one.evaluator._jitter(group) < 5.0


async def test_running_timers_are_those_worth_saving() -> None:
    world = World()
    world.load(drawdown(for_=60.0), drawdown("quiet"))
    await world.look(dd=value(-0.2), quiet=value(0.0))
    assert list(world.evaluator.running_timers()) == ["dd"]


async def test_an_answer_that_is_repeated_for_ever_grows_old_by_our_own_clock() -> None:
    world = World()
    world.load(drawdown())
    await world.look(dd=value(-0.01))
    assert world.trigger().armed
    world.clock.jump(59.0)
    await world.look(dd=value(-0.01))
    assert world.trigger().armed
    world.clock.jump(2.0)
    await world.look(dd=value(-0.01))
    assert not world.trigger().armed
    assert world.evaluator.counters.failures["dd"] == {"stale": 1}
    await world.look(dd=value(-0.01, at=world.clock.now().wall))
    assert world.trigger().armed


async def test_a_server_whose_clock_goes_back_is_believed_only_once_another_takes_its_place() -> None:
    world = World()
    world.load(drawdown())
    await world.look(dd=value(-0.01))
    an_hour_ago = value(-0.01, at=value(0.0).evaluated_at - 3600.0)
    await world.look(dd=an_hour_ago)
    assert not world.trigger().armed
    world.evaluator.forget_newest()
    await world.look(dd=an_hour_ago)
    assert world.trigger().armed


async def test_what_is_looked_at_by_ourselves_is_not_compared_with_an_earlier_look_for_our_clock_may_be_set_back() -> (
    None
):
    world = World()
    world.load(drawdown(source="scrape:trader"))
    await world.look(dd=value(-0.01))
    await world.look(dd=value(-0.01, at=value(0.0).evaluated_at - 3600.0))
    assert world.trigger().armed


async def test_a_rule_that_a_reload_changes_starts_with_its_first_answer_and_one_that_stays_does_not() -> None:
    world = World()
    world.load(drawdown())
    await world.look(dd=value(-0.01))
    an_hour_ago = value(-0.01, at=value(0.0).evaluated_at - 3600.0)
    world.load(drawdown())
    await world.look(dd=an_hour_ago)
    assert not world.trigger().armed
    world.load(drawdown(max_age=61.0))
    await world.look(dd=an_hour_ago)
    assert world.trigger().armed
