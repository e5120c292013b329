"""Alerts: what fires, what a resolve may end, what outlives a restart, and what the rules make of it at once."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from sidecar.adapters.operations_http import ReceivedAlert
from sidecar.app import alerts as alerts_module
from sidecar.app.alerts import LATE_SECONDS, Alert, AlertBook, Alerts, BookState, Resolve, Result, alert_key
from sidecar.app.evaluation import Evaluator
from sidecar.app.keeper import Keeper
from sidecar.core.compose import Overlay
from sidecar.core.document import state_document
from sidecar.core.errors import InvalidTransition, StorageError
from sidecar.core.events import Approval, BeginRecovery, Reopen, RequestRecovery, Waiver
from sidecar.core.policy import RecoveryPolicy, RestartStep
from sidecar.core.states import Action, Instant, Mode, Restriction, Stage, State
from sidecar.core.switch import Switch
from sidecar.core.transitions import Policies, SwitchState
from sidecar.rules.model import AlertMatch, Group, Rule, RuleSet, Threshold
from sidecar.rules.model import Operator as Comparison
from sidecar.rules.triggers import Status

NOW = Instant(mono=1000.0, wall=1_700_000_000.0)
LABELS = {"alertname": "Halt", "killswitch": "kill"}
EXPIRES = 3600.0


def known(
    start: float = 10.0, *, labels: dict[str, str] | None = None, fingerprint: str = "f", seen: float = 0.0
) -> Alert:
    return Alert(fingerprint=fingerprint, labels=labels or LABELS, summary="", starts_at=start, seen=seen)


KEY = known().key
ENDED = Resolve(starts_at=10.0, received=0.0)


# The book


def test_an_alert_that_is_sent_again_is_a_duplicate_that_counts_as_seen() -> None:
    book = AlertBook()
    assert book.fire(known(10.0, seen=1.0)) is Result.ACCEPTED
    assert book.fire(known(10.0, seen=2.0)) is Result.DUPLICATE
    assert book.firing[KEY].seen == 2.0


def test_a_newer_firing_without_a_resolve_between_is_a_new_one_and_an_older_one_is_a_duplicate() -> None:
    book = AlertBook()
    book.fire(known(10.0))
    assert book.fire(known(20.0)) is Result.ACCEPTED
    assert book.fire(known(15.0)) is Result.DUPLICATE
    assert book.firing[KEY].starts_at == 20.0


def test_a_resolve_ends_its_firing_and_a_second_one_is_a_duplicate() -> None:
    book = AlertBook()
    book.fire(known(10.0))
    assert book.resolve(KEY, 10.0, received=0.0) is Result.ACCEPTED
    assert book.firing == {}
    assert book.resolve(KEY, 10.0, received=0.0) is Result.DUPLICATE


@pytest.mark.parametrize("start", [9.0, 10.0])
def test_a_firing_that_is_not_newer_than_a_processed_resolve_is_ignored(start: float) -> None:
    book = AlertBook()
    book.fire(known(10.0))
    book.resolve(KEY, 10.0, received=0.0)
    assert book.fire(known(start)) is Result.IGNORED
    assert book.firing == {}


@pytest.mark.parametrize(
    ("late", "result"), [(0.0, Result.IGNORED), (LATE_SECONDS, Result.IGNORED), (LATE_SECONDS + 0.1, Result.ACCEPTED)]
)
def test_an_alert_that_comes_again_long_after_its_resolve_with_its_old_start_fires(late: float, result: Result) -> None:
    # Alertmanager takes it for over when Prometheus was cut off, and Prometheus sends it on with the start it had.
    book = AlertBook()
    book.fire(known(10.0))
    book.resolve(KEY, 10.0, received=50.0)
    assert book.fire(known(10.0, seen=50.0 + late)) is result
    assert (KEY in book.firing) is (result is Result.ACCEPTED)


def test_a_resolve_that_is_sent_again_makes_late_copies_of_it_late_again() -> None:
    book = AlertBook()
    book.resolve(KEY, 10.0, received=0.0)
    book.resolve(KEY, 10.0, received=500.0)
    assert book.fire(known(10.0, seen=500.0)) is Result.IGNORED


def test_a_resolve_that_arrives_before_its_firing_is_remembered() -> None:
    book = AlertBook()
    assert book.resolve(KEY, 10.0, received=0.0) is Result.IGNORED
    assert book.fire(known(10.0)) is Result.IGNORED
    assert book.fire(known(10.1)) is Result.ACCEPTED


def test_a_resolve_of_an_earlier_firing_ends_nothing() -> None:
    book = AlertBook()
    book.fire(known(20.0))
    assert book.resolve(KEY, 10.0, received=0.0) is Result.IGNORED
    assert KEY in book.firing


def test_an_older_resolve_does_not_set_back_what_is_remembered() -> None:
    book = AlertBook()
    book.resolve(KEY, 10.0, received=0.0)
    assert book.resolve(KEY, 5.0, received=0.0) is Result.DUPLICATE
    assert book.fire(known(10.0)) is Result.IGNORED


def test_an_alert_of_the_same_fingerprint_with_other_labels_is_another_alert() -> None:
    book = AlertBook()
    book.fire(known(10.0))
    other = known(10.0, labels={"alertname": "Other"})
    assert book.fire(other) is Result.ACCEPTED
    assert book.resolve(other.key, 10.0, received=0.0) is Result.ACCEPTED
    assert KEY in book.firing


def test_label_names_and_values_cannot_be_shifted_into_each_other() -> None:
    assert alert_key("f", {"ab": "c"}) != alert_key("f", {"a": "bc"})
    assert alert_key("f", {"a": "b", "c": "d"}) == alert_key("f", {"c": "d", "a": "b"})


def test_a_full_book_refuses_new_alerts_and_takes_known_ones() -> None:
    book = AlertBook(most=1)
    book.fire(known(10.0))
    assert book.fire(known(10.0, fingerprint="g")) is Result.REFUSED
    assert book.fire(known(11.0)) is Result.ACCEPTED
    book.resolve(KEY, 11.0, received=0.0)
    assert book.fire(known(10.0, fingerprint="g")) is Result.ACCEPTED


def test_resolves_are_remembered_within_bounds_the_newest_longest() -> None:
    book = AlertBook(most=2)
    for key in ("a", "b", "a", "c"):
        book.resolve(key, 1.0, received=0.0)
    assert list(book.state.resolved) == ["a", "c"]


def test_the_book_survives_json_and_what_was_seen_ages_by_running_time_only() -> None:
    book = AlertBook()
    book.fire(known(10.0, seen=NOW.mono - 60.0))
    book.resolve("gone", 5.0, received=NOW.mono - 90.0)
    document = json.loads(json.dumps(book.state.document(NOW)))
    later = Instant(mono=3.0, wall=NOW.wall + 86_400)
    state = BookState.from_document(document, later)
    assert state.resolved == {"gone": Resolve(starts_at=5.0, received=-87.0)}
    assert state.firing == {KEY: known(10.0, seen=-57.0)}


def test_a_resolve_that_was_stored_without_its_time_counts_as_long_ago() -> None:
    book = AlertBook()
    book.restore(BookState.from_document({"firing": [], "resolved": {KEY: 10.0}}, NOW))
    assert book.fire(known(10.0, seen=NOW.mono)) is Result.ACCEPTED
    json.dumps(book.state.document(NOW), allow_nan=False)


def test_a_document_from_before_alerts_were_kept_is_an_empty_book() -> None:
    assert BookState.from_document([], NOW) == BookState()


@pytest.mark.parametrize(
    "document",
    [
        {},
        None,
        "x",
        [1],
        {"firing": [{}], "resolved": {}},
        {"firing": [], "resolved": {"a": "x"}},
        {"firing": [], "resolved": {"a": {"starts_at": 1.0}}},
    ],
)
def test_a_document_that_cannot_be_read_is_an_error(document: Any) -> None:
    with pytest.raises(StorageError, match="stored alerts"):
        BookState.from_document(document, NOW)


def test_where_two_states_compete_whatever_fires_in_either_fires() -> None:
    one = BookState(firing={"a": known(1.0)}, resolved={"b": ENDED, "c": ENDED})
    other = BookState(firing={"b": known(1.0)}, resolved={"a": ENDED})
    both = one.stricter(other)
    assert set(both.firing) == {"a", "b"}
    assert both.resolved == {"c": ENDED}


def test_what_came_in_before_the_restore_counts_on_top_of_what_was_stored() -> None:
    book = AlertBook()
    book.fire(known(10.0, fingerprint="early"))
    book.fire(known(10.0, fingerprint="replayed"))
    book.resolve(KEY, 10.0, received=0.0)
    replayed = known(10.0, fingerprint="replayed").key
    book.restore(BookState(firing={KEY: known(10.0)}, resolved={replayed: ENDED}))
    assert set(book.firing) == {known(fingerprint="early").key}
    assert book.state.resolved[KEY] == ENDED


# With rules, a switch and a keeper


class FakeClock:
    def __init__(self) -> None:
        self.at = NOW

    def now(self) -> Instant:
        return self.at

    def jump(self, seconds: float) -> None:
        self.at = Instant(mono=self.at.mono + seconds, wall=self.at.wall + seconds)


class FakeMemory:
    def __init__(self) -> None:
        self.documents: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []

    async def write(self, document: dict[str, Any] | None, events: Sequence[dict[str, Any]]) -> None:
        self.events += events
        if document is not None:
            self.documents.append(document)


class NoSources:
    timeout = 1.0

    async def ask(self, rules: Sequence[Rule], receive: Any) -> None:
        """Nobody asks: the tests evaluate by hand."""


def rule(trigger: str = "external", action: Action = Action.KILL, **changes: Any) -> Rule:
    match = changes.pop("match", ('alertname="Halt"',))
    return Rule(trigger=trigger, group="g", condition=AlertMatch(match=match), action=action, **changes)


class World:
    """Everything that a webhook moves, without HTTP and without a disk."""

    def __init__(self, *rules: Rule, mode: Mode = Mode.ACTIVE, **recovery: Any) -> None:
        self.clock = FakeClock()
        policy = RecoveryPolicy(cooldown=60.0, steps=(RestartStep(factor=1.0),), **recovery)
        self.switch = Switch(name="s", mode=mode, state=SwitchState(since=NOW.wall), policies=Policies(recovery=policy))
        self.keeper = Keeper(switch=self.switch, clock=self.clock, document=self._document)
        self.evaluator = Evaluator(
            keeper=self.keeper, clock=self.clock, sources=NoSources(), pod="p", warnings_count=True
        )
        self.alerts = Alerts(keeper=self.keeper, clock=self.clock, evaluator=self.evaluator)
        self.memory = FakeMemory()
        self.keeper.attach(self.memory, SwitchState(since=NOW.wall))
        self.keeper.cover(Overlay())
        self.configure()
        self.load(*(rules or (rule(),)))

    def _document(self, state: SwitchState, now: Instant) -> dict[str, Any]:
        return {**state_document(state, now), "alerts": self.alerts.book.state.document(now)}

    def configure(self, *match: str, **labels: str) -> None:
        self.alerts.configure(match=match, expires=EXPIRES, switch_labels=labels)

    def load(self, *rules: Rule) -> None:
        groups = (Group(name="g", interval=1.0, rules=rules),)
        self.evaluator.load(RuleSet(groups=groups), opened=True)
        self.alerts.load(self.evaluator.rules)

    async def tick(self) -> None:
        for one in self.evaluator.rules.rules:
            if one.enabled and isinstance(one.condition, AlertMatch):
                self.evaluator.receive(one, await self.alerts.probe(one))

    async def send(self, *alerts: ReceivedAlert, truncated: bool = False, trusted: bool = True) -> dict[str, int]:
        counts = await self.alerts.receive(alerts, truncated=truncated, trusted=trusted)
        return {result.value: count for result, count in counts.items() if count}

    async def recover(self, *waivers: Waiver) -> None:
        now = self.clock.now()
        approval = Approval(by="bob", by_verified=True, granted=now.wall, granted_mono=now.mono)
        self.keeper.apply(RequestRecovery(by="bob", reason="fixed", approval=approval, waivers=waivers))
        assert await self.keeper.loosen(BeginRecovery())

    async def reopen(self) -> None:
        self.clock.jump(61.0)
        await self.tick()
        assert await self.keeper.loosen(Reopen())

    def state(self) -> State:
        return self.switch.state.state

    def restriction(self) -> Restriction:
        return self.switch.snapshot().restriction

    def status(self, trigger: str = "external") -> Status:
        return self.evaluator.triggers[trigger].status

    def blockers(self) -> list[str]:
        return self.evaluator.blockers(())

    def causes(self) -> list[tuple[str | None, int]]:
        return [(cause.trigger, cause.count) for cause in self.switch.state.causes]

    async def settle(self) -> None:
        assert await self.keeper.settled(2.0)


def sent(
    *, firing: bool = True, start: float = 10.0, fingerprint: str = "f", summary: str = "stop", **labels: str
) -> ReceivedAlert:
    return ReceivedAlert(
        firing=firing,
        labels={**LABELS, **labels},
        annotations={"summary": summary},
        starts_at=start,
        fingerprint=fingerprint,
    )


@pytest.fixture
async def make() -> AsyncIterator[Any]:
    tasks: list[asyncio.Task[None]] = []

    def make(*rules: Rule, **settings: Any) -> World:
        world = World(*rules, **settings)
        tasks.append(asyncio.create_task(world.keeper.run()))
        return world

    yield make
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_firing_alert_kills_at_once_and_is_part_of_the_durable_state(make: Any) -> None:
    world = make()
    assert await world.send(sent()) == {"accepted": 1}
    assert world.state() is State.KILLED
    assert world.switch.state.causes[0].code.value == "alert"
    await world.settle()
    (stored,) = world.memory.documents[-1]["alerts"]["firing"]
    assert (stored["fingerprint"], stored["labels"]) == ("f", LABELS)
    firing = [event for event in world.memory.events if event["type"] == "alert.firing"]
    assert firing[0]["data"]["triggers"] == ["external"]


async def test_a_rule_without_an_alert_is_armed_and_clear_after_its_first_turn(make: Any) -> None:
    world = make()
    await world.tick()
    assert world.evaluator.triggers["external"].armed
    assert world.blockers() == []


async def test_repeated_alerts_are_no_further_causes(make: Any) -> None:
    world = make()
    await world.send(sent())
    epoch = world.switch.state.epoch
    world.clock.jump(5.0)
    assert await world.send(sent(), sent()) == {"duplicate": 2}
    await world.tick()
    assert world.causes() == [("external", 1)]
    assert world.switch.state.epoch == epoch


async def test_another_alert_of_the_same_rule_is_one_more_cause_and_voids_a_recovery(make: Any) -> None:
    world = make()
    await world.send(sent())
    world.clock.jump(5.0)
    now = world.clock.now()
    approval = Approval(by="bob", by_verified=True, granted=now.wall, granted_mono=now.mono)
    world.keeper.apply(RequestRecovery(by="bob", reason="fixed", approval=approval))
    await world.send(sent(fingerprint="g", pod="other"))
    assert world.causes() == [("external", 2)]
    assert world.switch.state.stage is Stage.NONE


async def test_a_resolve_clears_the_trigger_and_leaves_the_kill(make: Any) -> None:
    world = make()
    await world.send(sent())
    assert world.blockers() == ["rule external is firing"]
    assert await world.send(sent(firing=False)) == {"accepted": 1}
    assert await world.send(sent(firing=False)) == {"duplicate": 1}
    assert world.status() is Status.INACTIVE
    assert world.state() is State.KILLED
    assert world.blockers() == []


async def test_a_halt_lifts_when_its_last_alert_is_resolved(make: Any) -> None:
    world = make(rule(action=Action.HALT))
    await world.send(sent(), sent(fingerprint="g", pod="b"))
    assert (world.state(), world.restriction()) == (State.ACTIVE, Restriction.HALT)
    await world.send(sent(firing=False))
    assert world.restriction() is Restriction.HALT
    await world.send(sent(firing=False, fingerprint="g", pod="b"))
    assert world.restriction() is Restriction.NONE


@pytest.mark.parametrize("how", [{"trusted": False}, {"truncated": True}])
async def test_a_resolve_that_nobody_vouches_for_or_of_a_truncated_payload_lifts_nothing(
    make: Any, how: dict[str, bool]
) -> None:
    world = make(rule(action=Action.HALT))
    await world.send(sent())
    assert await world.send(sent(firing=False), **how) == {"ignored": 1}
    await world.tick()
    assert world.restriction() is Restriction.HALT
    # Nor is it remembered, or it could be used to make later alerts look old.
    assert await world.send(sent(firing=False, start=99.0, fingerprint="g"), **how) == {"ignored": 1}
    assert await world.send(sent(fingerprint="g")) == {"accepted": 1}


@pytest.mark.parametrize("how", [{"trusted": False}, {"truncated": True}])
async def test_a_firing_alert_kills_whoever_sends_it(make: Any, how: dict[str, bool]) -> None:
    world = make()
    assert await world.send(sent(), **how) == {"accepted": 1}
    assert world.state() is State.KILLED


async def test_one_of_our_own_alerts_never_triggers_anything(make: Any) -> None:
    world = make()
    assert await world.send(sent(killswitch_origin="sidecar"), sent(killswitch_origin="")) == {"ignored": 2}
    assert world.state() is State.ACTIVE


async def test_firings_of_a_payload_act_before_its_resolves_do(make: Any) -> None:
    world = make(rule(), rule("halts", Action.HALT))
    await world.send(sent(firing=False), sent())
    assert world.state() is State.KILLED
    assert world.status() is Status.INACTIVE


async def test_the_same_alert_kills_again_after_a_recovery(make: Any) -> None:
    world = make()
    await world.send(sent())
    await world.send(sent(firing=False))
    await world.recover()
    await world.reopen()
    assert world.state() is State.ACTIVE
    assert await world.send(sent()) == {"ignored": 1}  # a late copy of the one that was resolved
    assert world.state() is State.ACTIVE
    assert await world.send(sent(start=20.0)) == {"accepted": 1}
    assert world.state() is State.KILLED


async def test_an_alert_that_ended_only_because_nobody_repeated_it_kills_when_it_is_sent_on(make: Any) -> None:
    world = make()
    await world.send(sent())
    await world.send(sent(firing=False))
    await world.recover()
    await world.reopen()
    world.clock.jump(LATE_SECONDS)
    assert await world.send(sent()) == {"accepted": 1}
    assert world.state() is State.KILLED


async def test_a_resolve_that_has_grown_old_is_stored_as_old(make: Any) -> None:
    # Else a crash much later would make it young again, and an alert that is sent on would be ignored anew.
    world = make()
    await world.send(sent(firing=False))
    await world.tick()
    await world.settle()
    written = len(world.memory.documents)
    world.clock.jump(LATE_SECONDS + 1.0)
    await world.tick()
    await world.tick()
    await asyncio.sleep(0)  # nobody waits for what is written here, so `settle` does not either
    assert len(world.memory.documents) == written + 1
    assert world.memory.documents[-1]["alerts"]["resolved"][KEY]["received_elapsed"] > LATE_SECONDS


async def test_an_expired_alert_stops_blocking_a_recovery_but_lifts_nothing_before(make: Any) -> None:
    world = make(rule(), rule("halts", Action.HALT), rule("other", match=('alertname="Else"',)))
    await world.send(sent(), sent(fingerprint="g", pod="b"))
    await world.tick()
    world.clock.jump(EXPIRES)
    assert world.blockers() == ["rule external is firing", "rule halts is firing"]
    world.clock.jump(1.0)
    await world.tick()
    assert world.blockers() == []
    assert world.state() is State.KILLED
    assert world.status() is world.status("halts") is Status.FIRING
    await world.recover()
    await world.tick()
    assert world.state() is State.RECOVERING
    assert world.status() is Status.INACTIVE
    assert world.alerts.book.firing == {}
    await world.reopen()
    assert world.state() is State.ACTIVE
    assert world.restriction() is Restriction.NONE
    # Sent again, it fires again, although it is the same alert that began at the same time.
    assert await world.send(sent()) == {"accepted": 1}
    assert world.state() is State.KILLED


async def test_an_alert_that_is_sent_again_does_not_expire(make: Any) -> None:
    world = make()
    await world.send(sent())
    for _ in range(3):
        world.clock.jump(EXPIRES / 2)
        await world.send(sent())
    assert world.blockers() != []


async def test_one_live_alert_among_expired_ones_still_blocks(make: Any) -> None:
    world = make()
    await world.send(sent())
    world.clock.jump(EXPIRES + 1)
    await world.send(sent(fingerprint="g", pod="b"))
    assert world.blockers() == ["rule external is firing"]


async def test_a_waived_rule_stays_silent_through_a_recovery_and_its_live_alert_stays_known(make: Any) -> None:
    world = make()
    await world.send(sent())
    now = world.clock.now()
    waiver = Waiver(trigger="external", threshold=None, until=now.wall + 900, until_mono=now.mono + 900, by="bob")
    await world.recover(waiver)
    await world.tick()
    assert world.state() is State.RECOVERING
    assert world.status() is Status.FIRING


async def test_the_filter_decides_what_is_looked_at_and_the_rule_what_acts(make: Any) -> None:
    world = make(rule(match=('severity="critical"',)))
    world.configure('killswitch="kill"')
    assert await world.send(sent(severity="critical", killswitch="no")) == {"ignored": 1}
    assert await world.send(sent(severity="page")) == {"ignored": 1}
    assert world.alerts.book.firing == {}
    assert await world.send(sent(severity="critical")) == {"accepted": 1}


async def test_a_resolve_ends_its_firing_though_a_reload_changed_the_filter_meanwhile(make: Any) -> None:
    world = make(rule(action=Action.HALT))
    await world.send(sent())
    world.configure('severity="page"')
    assert await world.send(sent(firing=False)) == {"accepted": 1}
    assert world.restriction() is Restriction.NONE
    assert await world.send(sent(firing=False, fingerprint="g")) == {"ignored": 1}
    assert len(world.alerts.book.state.resolved) == 1


async def test_matchers_may_name_labels_of_the_switch_and_the_alert_speaks_first(make: Any) -> None:
    world = make(rule(match=('desk="fx"',)))
    assert await world.send(sent()) == {"ignored": 1}
    world.configure(desk="fx")
    assert await world.send(sent(desk="rates")) == {"ignored": 1}
    assert await world.send(sent()) == {"accepted": 1}


async def test_quoted_names_match_labels_of_the_alert_and_of_the_switch(make: Any) -> None:
    world = make(rule(match=('{"bot.größe"="a b", "desk"="fx"}',)))
    world.configure('"killswitch"="kill"', desk="fx")
    assert await world.send(sent(killswitch="kill", **{"bot.größe": "a"})) == {"ignored": 1}
    assert await world.send(sent(killswitch="kill", **{"bot.größe": "a b"})) == {"accepted": 1}


async def test_a_disabled_rule_does_nothing_and_fires_when_a_reload_enables_it(make: Any) -> None:
    world = make(rule(enabled=False), rule("other", match=('alertname="Else"',)))
    assert await world.send(sent()) == {"accepted": 1}
    assert world.state() is State.ACTIVE
    world.load(rule())
    await world.tick()
    assert world.state() is State.KILLED


async def test_a_rule_in_shadow_reports_and_does_not_act(make: Any) -> None:
    world = make(rule(shadow=True))
    await world.send(sent())
    assert world.state() is State.ACTIVE
    assert world.status() is Status.FIRING
    assert world.evaluator.counters.shadow_firings == {"external": 1}


async def test_for_holds_an_alert_back(make: Any) -> None:
    world = make(rule(for_=30.0))
    await world.send(sent())
    assert (world.state(), world.status()) == (State.ACTIVE, Status.PENDING)
    await world.send(sent(fingerprint="g", pod="b"))
    world.clock.jump(30.0)
    await world.tick()
    assert world.state() is State.KILLED


async def test_alerts_beyond_the_bound_are_refused_and_kill_all_the_same(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make(rule(), rule("other", match=('pod="b"',)))
    monkeypatch.setattr(world.alerts.book, "_most", 1)
    world.load(rule(action=Action.HALT), rule("other", match=('pod="b"',)))
    await world.send(sent())
    assert world.state() is State.ACTIVE
    assert await world.send(sent(fingerprint="g", pod="b")) == {"refused": 1}
    assert world.state() is State.KILLED
    assert world.alerts.results["refused"] == 1


async def test_many_alerts_leave_the_loop_its_turn_and_kill_in_the_first(make: Any) -> None:
    world = make()
    many = [sent(fingerprint=str(number), pod=str(number)) for number in range(3 * alerts_module._SLICE)]
    sending = asyncio.create_task(world.send(*many))
    await asyncio.sleep(0)
    assert world.state() is State.KILLED
    assert 0 < len(world.alerts.book.firing) < len(many)
    assert await sending == {"accepted": len(many)}


async def test_a_disabled_switch_takes_no_alerts(make: Any) -> None:
    world = make(mode=Mode.DISABLED)
    with pytest.raises(InvalidTransition, match="disabled"):
        await world.send(sent())


async def test_without_rules_no_alert_is_lost_by_calling_it_done(make: Any) -> None:
    world = make()
    world.evaluator.load(RuleSet(), opened=False)
    with pytest.raises(StorageError, match="no rules"):
        await world.send(sent())


async def test_a_restored_alert_fires_its_rule_at_its_first_turn(make: Any) -> None:
    world = make(rule(action=Action.HALT))
    stored = replace(known(), seen=NOW.mono)
    world.alerts.restore(BookState(firing={stored.key: stored}))
    await world.tick()
    assert world.restriction() is Restriction.HALT
    assert await world.send(sent(firing=False)) == {"accepted": 1}
    assert world.restriction() is Restriction.NONE


async def test_the_trigger_tells_how_many_alerts_fire(make: Any) -> None:
    world = make(rule(action=Action.HALT))
    await world.send(sent(), sent(fingerprint="g", pod="b"))
    assert world.evaluator.triggers["external"].value == 2.0


@pytest.mark.parametrize("start", [-62135596800.0, -7e10])
async def test_an_alert_from_before_all_time_is_taken(make: Any, start: float) -> None:
    world = make()
    assert await world.send(sent(start=start)) == {"accepted": 1}
    await world.settle()
    assert world.state() is State.KILLED


async def test_other_rules_are_left_alone(make: Any) -> None:
    condition = Threshold(query="up", operator=Comparison.LT, threshold=1.0)
    world = make(rule(), Rule(trigger="drawdown", group="g", condition=condition))
    await world.send(sent())
    assert world.evaluator.triggers["drawdown"].evaluated is None
