"""Which alerts of ours hold: one for every transition and every lasting trouble, over when it is over."""

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml

from sidecar.adapters.notifier import Notifier, OwnAlert
from sidecar.app.evaluation import Evaluator
from sidecar.app.keeper import Keeper
from sidecar.app.notifications import ENDED_SECONDS, LOOSENED_SECONDS, Board, Notifications
from sidecar.core.compose import Overlay
from sidecar.core.document import state_document
from sidecar.core.events import (
    Approval,
    BeginRecovery,
    CancelRecovery,
    Cause,
    CauseCode,
    Kill,
    Reopen,
    RequestRecovery,
    StepUp,
)
from sidecar.core.policy import RecoveryPolicy, RestartStep
from sidecar.core.states import Action, Instant, Mode
from sidecar.core.switch import Proposal, Switch
from sidecar.core.transitions import Policies, SwitchState
from sidecar.rules.model import Group, OnNoData, Operator, Rule, RuleSet, Threshold
from sidecar.rules.readings import Answer, Failure, Series
from sidecar.settings.config import Notify

ROOT = Path(__file__).resolve().parents[2]
NOW = Instant(mono=1000.0, wall=1_700_000_000.0)


class FakeClock:
    def __init__(self) -> None:
        self.at = NOW

    def now(self) -> Instant:
        return self.at

    def jump(self, seconds: float) -> None:
        self.at = Instant(mono=self.at.mono + seconds, wall=self.at.wall + seconds)


class FakeNotifier:
    def __init__(self) -> None:
        self.shown: list[tuple[OwnAlert, ...]] = []
        self.pushes = 0

    def show(self, alerts: Sequence[OwnAlert], *, at_once: bool) -> None:
        self.shown.append(tuple(alerts))
        self.pushes += at_once


class NoSources:
    timeout = 1.0

    async def ask(self, rules: Sequence[Rule], receive: Any) -> None:
        """Nobody asks: the tests evaluate by hand."""


@dataclass
class FakeSources:
    found: list[tuple[str, bool, str]] = field(default_factory=list)

    def states(self) -> list[tuple[str, bool, str]]:
        return self.found


class World:
    """An application as far as notifications look at it."""

    def __init__(self, *rules: Rule, mode: Mode = Mode.ACTIVE, approvals: int = 1) -> None:
        self.clock = FakeClock()
        recovery = RecoveryPolicy(
            cooldown=60.0,
            approvals=approvals,
            steps=(RestartStep(factor=0.5), RestartStep(factor=0.75, after=10.0), RestartStep(factor=1.0, after=20.0)),
        )
        state = SwitchState(since=NOW.wall)
        self.switch = Switch(name="desk/bot-0", mode=mode, state=state, policies=Policies(recovery=recovery))
        self.switch.cover(Overlay())
        self.keeper = Keeper(switch=self.switch, clock=self.clock, document=state_document)
        self.evaluator = Evaluator(
            keeper=self.keeper, clock=self.clock, sources=NoSources(), pod="p", warnings_count=True
        )
        self.evaluator.load(RuleSet(groups=(Group(name="g", interval=1.0, rules=rules),)), opened=True)
        self.sources = FakeSources()
        self.app = SimpleNamespace(
            clock=self.clock,
            switch=self.switch,
            keeper=self.keeper,
            evaluator=self.evaluator,
            sources=self.sources,
            storage_error=None,
            memory=SimpleNamespace(audit_error=None),
            opened=True,
            started=NOW,
            reloader=SimpleNamespace(error=None, loosened=None),
            settings=SimpleNamespace(
                switch=SimpleNamespace(labels={"desk": "fx", "empty": ""}),
                alertmanager=SimpleNamespace(notify=SimpleNamespace(runbook_url="https://wiki.example/RUNBOOK.md")),
            ),
        )
        self.notifier = FakeNotifier()
        self.notifications = Notifications(cast("Any", self.app), cast("Notifier", self.notifier))

    def look(self) -> dict[str, OwnAlert]:
        """Look once; the alerts shown last that hold, by name."""
        self.notifications.look()
        return {one.labels["alertname"]: one for one in self.last() if one.ends_at is None}

    def last(self) -> tuple[OwnAlert, ...]:
        return self.notifier.shown[-1] if self.notifier.shown else ()

    def kill(self, reason: str = "enough") -> None:
        self.keeper.apply(Kill(cause=Cause(code=CauseCode.OPERATOR, reason=reason, time=self.clock.now().wall)))

    def request(self) -> None:
        now = self.clock.now()
        approval = Approval(by="bob", by_verified=True, granted=now.wall, granted_mono=now.mono)
        self.keeper.apply(RequestRecovery(by="bob", reason="fixed", approval=approval))

    def loosen(self, event: BeginRecovery | Reopen | StepUp) -> None:
        proposal = self.switch.apply(event, self.clock.now())
        assert isinstance(proposal, Proposal)
        assert self.switch.commit(proposal)


def drawdown(**changes: Any) -> Rule:
    return Rule(
        trigger="drawdown",
        group="g",
        condition=Threshold(query="dd", operator=Operator.LT, threshold=-0.15),
        **changes,
    )


def value(number: float) -> Answer:
    return Answer(series=(Series(value=number),), evaluated_at=NOW.wall, oldest_sample=NOW.wall)


def test_all_well_has_nothing_to_say() -> None:
    world = World(drawdown())
    assert world.look() == {}
    assert world.notifier.shown == []


def test_a_kill_is_told_with_labels_for_routing_and_annotations_for_people() -> None:
    world = World()
    world.kill("fat finger")
    alert = world.look()["KillswitchKilled"]
    assert alert.labels == {
        "alertname": "KillswitchKilled",
        "switch": "desk/bot-0",
        "severity": "critical",
        "killswitch_origin": "sidecar",
        "desk": "fx",
    }
    assert alert.annotations["summary"] == "desk/bot-0: trading is stopped (halt)"
    assert "fat finger" in alert.annotations["description"]
    assert alert.annotations["runbook_url"] == "https://wiki.example/RUNBOOK.md#killswitchkilled"
    assert alert.starts_at == NOW.wall


def test_the_way_from_kill_to_full_trading_is_told_step_by_step() -> None:
    world = World()
    seen: list[set[str]] = []

    def look() -> None:
        seen.append({"/".join(filter(None, (name, one.labels.get("factor")))) for name, one in world.look().items()})

    world.kill()
    look()
    world.request()
    world.loosen(BeginRecovery())
    look()
    world.clock.jump(60.0)
    world.loosen(Reopen())
    look()
    world.clock.jump(10.0)
    world.loosen(StepUp())
    look()
    world.clock.jump(10.0)
    world.loosen(StepUp())
    look()
    assert seen == [
        {"KillswitchKilled"},
        {"KillswitchRecovering"},
        {"KillswitchRestartStep/0.5"},
        {"KillswitchRestartStep/0.75"},
        {"KillswitchRecovered"},
    ]
    over = {one.labels["alertname"]: one.ends_at for one in world.last() if one.ends_at is not None}
    assert over["KillswitchKilled"] == NOW.wall


def test_a_recovery_that_waits_for_another_person_is_told_until_it_is_taken_back() -> None:
    world = World(approvals=2)
    world.kill()
    world.request()
    pending = world.look()["KillswitchApprovalPending"]
    assert "(1 of 2)" in pending.annotations["summary"]
    world.keeper.apply(CancelRecovery(by="bob"))
    assert set(world.look()) == {"KillswitchKilled"}


def test_a_kill_in_shadow_mode_is_told_as_what_it_is() -> None:
    world = World(drawdown(), mode=Mode.SHADOW)
    world.evaluator.receive(world.evaluator.rules.rules[0], value(-0.2))
    assert set(world.look()) == {"KillswitchShadowKill", "KillswitchTriggerFiring", "KillswitchShadowMode"}


def test_a_disabled_switch_says_so() -> None:
    assert set(World(mode=Mode.DISABLED).look()) == {"KillswitchDisabled"}


def test_a_firing_rule_is_told_with_its_own_labels_and_annotations_filled_in() -> None:
    world = World(
        drawdown(
            action=Action.HALT,
            labels=(("severity", "page"), ("switch", "forged"), ("team", "x")),
            annotations=(("summary", "Drawdown {{ value }}"), ("runbook_url", "https://wiki/dd")),
        )
    )
    world.evaluator.receive(world.evaluator.rules.rules[0], value(-0.2))
    alert = world.look()["KillswitchTriggerFiring"]
    assert alert.labels["trigger"] == "drawdown"
    assert (alert.labels["severity"], alert.labels["team"], alert.labels["action"]) == ("page", "x", "halt")
    assert alert.labels["switch"] == "desk/bot-0"
    assert alert.annotations["summary"] == "Drawdown -0.2"
    assert alert.annotations["runbook_url"] == "https://wiki/dd"
    world.evaluator.receive(world.evaluator.rules.rules[0], value(0.0))
    assert world.look() == {}


def test_a_rule_in_shadow_tells_that_it_would_have_killed() -> None:
    world = World(drawdown(shadow=True))
    world.evaluator.receive(world.evaluator.rules.rules[0], value(-0.2))
    alert = world.look()["KillswitchShadowKill"]
    assert (alert.labels["trigger"], alert.labels["severity"]) == ("drawdown", "warning")


def test_a_rule_that_can_see_nothing_is_told_as_blind() -> None:
    world = World(drawdown(on_no_data=OnNoData(hold_for=0.0, unreachable=Action.HALT)))
    gone = Failure(reason="unreachable", message="no route", unreachable=True)
    world.evaluator.receive(world.evaluator.rules.rules[0], gone)
    alert = world.look()["KillswitchTriggerBlind"]
    assert (alert.labels["action"], alert.labels["severity"]) == ("halt", "critical")
    assert "no route" in alert.annotations["description"]


def test_a_lost_source_is_told_and_one_that_was_never_asked_is_not() -> None:
    world = World()
    world.sources.found = [("prometheus", False, "refused"), ("scrape:trader", False, ""), ("scrape:b", True, "")]
    assert [one.labels["source"] for one in world.look().values()] == ["prometheus"]
    world.sources.found = [("prometheus", True, "")]
    assert world.look() == {}


def test_what_cannot_be_written_is_told() -> None:
    world = World()
    world.app.memory.audit_error = "disk full"
    world.keeper.last_write_error = "disk full"
    assert set(world.look()) == {"KillswitchAuditNotWritten", "KillswitchStateNotDurable"}


def test_a_start_is_given_some_time_before_it_is_told_as_trouble() -> None:
    world = World()
    world.app.opened, world.app.memory, world.app.storage_error = False, None, "not open yet"
    world.switch.cover(Overlay(not_ready="no reading yet"))
    assert world.look() == {}
    world.clock.jump(61.0)
    assert set(world.look()) == {"KillswitchStateNotDurable", "KillswitchNotReady"}


def test_a_failed_part_and_stale_rules_are_told() -> None:
    world = World()
    world.switch.cover(Overlay(internal_error="a task ended", stale="group g"))
    assert set(world.look()) == {"KillswitchDegraded", "KillswitchStale"}


def test_what_a_reload_loosened_is_told_for_a_while_and_a_failed_reload_until_the_next() -> None:
    world = World()
    world.app.reloader.loosened = (world.clock.now(), "rules.drawdown")
    world.app.reloader.error = "rules.yaml:1: no"
    assert set(world.look()) == {"KillswitchConfigLoosened", "KillswitchReloadFailed"}
    world.app.reloader.error = None
    world.clock.jump(LOOSENED_SECONDS)
    assert world.look() == {}


def test_an_unchanged_picture_is_shown_once() -> None:
    world = World()
    world.kill()
    for _ in range(3):
        world.look()
        world.clock.jump(1.0)
    assert len(world.notifier.shown) == 1


def test_one_more_cause_is_told_with_the_next_push_and_names_its_rule() -> None:
    world = World(drawdown(annotations=(("summary", "Drawdown {{ value }}"),)))
    world.kill("fat finger")
    assert "triggers" not in world.look()["KillswitchKilled"].annotations
    world.evaluator.receive(world.evaluator.rules.rules[0], value(-0.2))
    pushes = world.notifier.pushes
    alert = world.look()["KillswitchKilled"]
    assert alert.annotations["description"].startswith("fat finger; drawdown: Drawdown -0.2. Only")
    assert alert.annotations["triggers"] == "drawdown"
    assert "trigger" not in alert.labels
    assert world.notifier.pushes == pushes + 1, "for the rule that fires"
    world.evaluator.receive(world.evaluator.rules.rules[0], value(-0.3))
    assert "-0.3" in world.look()["KillswitchTriggerFiring"].annotations["summary"]
    assert world.notifier.pushes == pushes + 1, "a value that moves is no news"


def test_an_alert_that_prometheus_raises_too_is_as_severe_there() -> None:
    rules = yaml.safe_load((ROOT / "rules" / "prometheus" / "killswitch.rules.yaml").read_text(encoding="utf-8"))
    theirs = {
        rule["alert"]: {rule["labels"]["severity"]}
        for group in rules["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }
    source = (ROOT / "sidecar" / "app" / "notifications.py").read_text(encoding="utf-8")
    shared = set(re.findall(r'"(Killswitch\w+)"', source)) & theirs.keys()
    ours: dict[str, set[str]] = {}
    for world in _every_trouble():
        for name, alert in world.look().items():
            ours.setdefault(name, set()).add(alert.labels["severity"])
    assert "KillswitchSourceDown" in shared
    assert {name: ours.get(name) for name in shared} == {name: theirs[name] for name in shared}


def _every_trouble() -> list[World]:
    """Worlds in which, taken together, every alert holds that Prometheus knows too."""
    shadow, disabled = World(mode=Mode.SHADOW), World(mode=Mode.DISABLED)
    shadow_kill = World(drawdown(shadow=True))
    shadow_kill.evaluator.receive(shadow_kill.evaluator.rules.rules[0], value(-0.2))
    waiting = World(approvals=2)
    waiting.kill()
    waiting.request()
    troubled = World()
    troubled.sources.found = [("prometheus", False, "refused")]
    troubled.app.memory.audit_error = "disk full"
    troubled.keeper.last_write_error = "disk full"
    troubled.app.reloader.loosened = (troubled.clock.now(), "rules.drawdown")
    troubled.app.reloader.error = "rules.yaml:1: no"
    troubled.switch.cover(Overlay(not_ready="no reading yet"))
    return [shadow, disabled, shadow_kill, waiting, troubled]


async def test_a_transition_is_looked_at_in_the_next_turn_of_the_loop() -> None:
    world = World()
    task = asyncio.create_task(world.notifications.run())
    await asyncio.sleep(0)
    assert world.notifier.shown == []
    world.kill()
    for _ in range(5):
        await asyncio.sleep(0)
    assert world.last()[0].labels["alertname"] == "KillswitchKilled"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_defect_in_what_is_said_is_logged_once_and_stops_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.app.notifications.LOOK_SECONDS", 0.001)
    world = World()
    del world.app.sources
    caplog.set_level(logging.ERROR)
    task = asyncio.create_task(world.notifications.run())
    await asyncio.sleep(0.05)
    assert not task.done()
    assert [record.message for record in caplog.records] == ["notifications.defect"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_every_alert_has_a_heading_where_its_runbook_url_points() -> None:
    root = Path(__file__).parents[2]
    named = set(re.findall(r'"(Killswitch[A-Za-z]+)"', (root / "sidecar/app/notifications.py").read_text()))
    assert Notify().runbook_url == "docs/RUNBOOK.md"
    headings = set(re.findall(r"^### (Killswitch\w+)$", (root / Notify().runbook_url).read_text(), re.MULTILINE))
    assert len(named) > 15
    assert named <= headings


# The board


def own(name: str = "A", *, starts: float = NOW.wall) -> OwnAlert:
    return OwnAlert(labels={"alertname": name}, annotations={}, starts_at=starts)


def at(seconds: float) -> Instant:
    return Instant(mono=NOW.mono + seconds, wall=NOW.wall + seconds)


def test_an_alert_that_is_over_is_shown_for_a_while_and_then_forgotten() -> None:
    board = Board()
    assert board.update([own()], NOW)
    assert board.update([], at(10))
    assert [one.ends_at for one in board.alerts] == [NOW.wall + 10]
    assert not board.update([], at(10 + ENDED_SECONDS - 1))
    assert len(board.alerts) == 1
    board.update([], at(10 + ENDED_SECONDS))
    assert not board.alerts


def test_an_alert_that_begins_anew_is_news() -> None:
    board = Board()
    board.update([own()], NOW)
    assert not board.update([own()], at(1))
    assert board.update([own(starts=NOW.wall + 2)], at(2))
    board.update([], at(3))
    assert board.update([own()], at(4))


def test_an_alert_never_ends_before_it_began() -> None:
    board = Board()
    board.update([own(starts=NOW.wall + 5)], NOW)
    board.update([], at(1))
    assert board.alerts == (replace(own(starts=NOW.wall + 5), ends_at=NOW.wall + 5),)
