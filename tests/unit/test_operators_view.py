"""What an operator is shown must be what holds: under a waiver, after a reload, after a rollback, in every mode."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidecar.adapters.state_file import Restored
from sidecar.app.application import Application
from sidecar.app.reload import WAITING
from sidecar.app.restore import choose_start
from sidecar.app.status import trigger_document
from sidecar.core.document import state_document
from sidecar.core.events import Cause, CauseCode, Kill, Waiver
from sidecar.core.states import Instant, State
from sidecar.core.transitions import Policies, SwitchState
from sidecar.rules.model import Expression, Operator, Rule, Threshold
from sidecar.rules.triggers import Health, Level, Trigger, eased
from sidecar.settings.config import Settings, load_settings

NOW = Instant(mono=50.0, wall=1_700_000_000.0)
RULE = Rule(trigger="drawdown", group="g", condition=Threshold(query="drawdown", operator=Operator.LT, threshold=-0.15))
WAIVER = Waiver(trigger="drawdown", threshold=-0.2, until=NOW.wall + 60, until_mono=NOW.mono + 60, by="bob")


class StoppedClock:
    def now(self) -> Instant:
        return NOW


def settings(folder: Path, text: str = "") -> Settings:
    file = folder / "config.yaml"
    file.write_text(
        f"switch: {{name: s}}\nprometheus: {{urls: []}}\nrules: {{files: []}}\nstorage: {{dir: {folder}/state}}\n{text}"
    )
    return load_settings(file, {})


def app(given: Settings) -> Application:
    return Application(settings=given, environ={}, clock=StoppedClock(), probes={})


def test_the_used_share_of_a_limit_is_that_of_the_waived_one() -> None:
    shown = trigger_document(RULE, Trigger(value=-0.17), WAIVER)
    assert (shown["threshold"], shown["limit_used_ratio"]) == (-0.2, pytest.approx(0.85))
    assert trigger_document(RULE, Trigger(value=-0.17), None)["limit_used_ratio"] > 1.0


def test_a_waiver_eases_nothing_once_its_rule_has_become_another_kind() -> None:
    condition = eased(RULE, -0.2).condition
    assert isinstance(condition, Threshold)
    assert condition.threshold == -0.2
    other = replace(RULE, condition=Expression(expr="drawdown < -0.15"))
    assert eased(other, -0.2) is other
    assert eased(RULE, None) is RULE


def test_a_recovery_asks_more_than_a_waiver_of_a_rule_that_has_become_another_kind(tmp_path: Path) -> None:
    running = app(settings(tmp_path))
    other = replace(RULE, condition=Expression(expr="drawdown < -0.15"))
    firing = Level(pending_since=NOW.mono, firing_since=NOW.mono, firing_wall=NOW.wall)
    running.evaluator.triggers = {"drawdown": Trigger(health=Health.OK, main=firing, value=1.0)}
    assert running.evaluator._objection(other, WAIVER) == "rule drawdown is firing"


def test_a_state_that_was_rolled_back_starts_above_all_that_the_audit_has_seen() -> None:
    stored = {"switch": "s", "mode": "active", **state_document(SwitchState(epoch=32), NOW), "timers": {}}
    found = Restored(
        document=stored, source="state.json", note=None, alternative=None, behind_audit=True, audit_epoch=34
    )
    begun = choose_start(found, (), NOW, Policies())
    assert (begun.state.state, begun.state.causes[-1].code) == (State.KILLED, CauseCode.STATE_ROLLED_BACK)
    assert begun.state.epoch > 34


@pytest.mark.parametrize(("mode", "level"), [("active", "INFO"), ("shadow", "WARNING"), ("disabled", "WARNING")])
def test_a_mode_that_does_not_block_is_logged_loudly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str, level: str
) -> None:
    given = settings(tmp_path)
    (tmp_path / "config.yaml").write_text(
        (tmp_path / "config.yaml").read_text().replace("name: s", f"name: s, mode: {mode}")
    )
    running = app(load_settings(given.path, {}))
    with caplog.at_level(logging.INFO, "sidecar.app"):
        running._announce("sidecar.started")
    told: list[Any] = [(one.levelname, one.fields["mode"]) for one in caplog.records if hasattr(one, "fields")]
    assert (level, mode) in told


def test_only_a_change_that_waits_is_said_to_wait(tmp_path: Path) -> None:
    given = settings(tmp_path)
    running = app(given)
    running.keeper.apply(Kill(cause=Cause(code=CauseCode.OPERATOR, reason="enough", time=NOW.wall)))
    running.reloader._pending = given
    running.reloader._apply_pending()
    assert running.reloader.waiting is None
    for text in ("recovery: {cooldown: 1s}\n", "gate: {killed_policy: reduce_only}\n"):
        running.reloader._pending = settings(tmp_path, text)
        running.reloader._apply_pending()
        assert running.reloader.waiting == WAITING
