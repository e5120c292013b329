"""Changed files while it runs: a bad one changes nothing and is said loudly, a good one is in force within seconds."""

import json
import signal

import pytest

from tests.cast import wait_for

pytestmark = pytest.mark.e2e

RELOADED = "killswitch_config_last_reload_successful"


def test_a_broken_rule_file_keeps_the_old_rules_and_a_mended_one_is_taken_over(sidecar, drawdown):
    switch = sidecar(drawdown.rule())
    assert switch.metrics()[RELOADED] == 1
    switch.rules_file.write_text(
        "groups: [{name: desk, rules: [{trigger: portfolio_drawdown, type: expression, expr: up, typo: 1}]}]"
    )
    switch.signal(signal.SIGHUP)
    switch.wait_status("the failed reload", lambda status: not status["config"]["last_reload_successful"])
    status = switch.status()
    assert f"{switch.rules_file}:1" in status["config"]["error"]
    assert "typo" in status["config"]["error"]
    assert any("typo" in problem for problem in status["problems"])
    assert switch.metrics()[RELOADED] == 0
    assert switch.control("POST", "/-/reload").status == 400
    assert switch.gate().decided == (200, "active")
    assert switch.trigger_of()["status"] == "inactive"

    switch.write_rules(drawdown.rule(threshold=-0.10))
    switch.wait_status("the mended file, found by the poll", lambda status: status["config"]["last_reload_successful"])
    assert switch.metrics()[RELOADED] == 1
    assert switch.trigger_of()["threshold"] == -0.10
    assert not switch.audit("config.loosened")
    drawdown.set(-0.12)
    switch.wait_gate(403, "killed")


def test_the_old_rules_stay_armed_under_a_broken_file(sidecar, drawdown):
    switch = sidecar(drawdown.rule())
    switch.rules_file.write_text("groups: oops")
    switch.signal(signal.SIGHUP)
    switch.wait_status("the failed reload", lambda status: not status["config"]["last_reload_successful"])
    drawdown.set(-0.2)
    switch.wait_gate(403, "killed")


def test_a_config_map_swapped_by_its_symlink_is_noticed_without_a_signal(make_sidecar, shared_prometheus, drawdown):
    switch = make_sidecar(None, [shared_prometheus.url])
    rules = switch.folder / "rules"
    for number, threshold in ((1, -0.15), (2, -0.12)):
        switch.write_rules(drawdown.rule(threshold=threshold), file=rules / f"..{number}" / "rules.yaml")
    (rules / "..data").symlink_to("..1")
    (rules / "rules.yaml").symlink_to("..data/rules.yaml")
    switch.start()
    switch.wait_gate(200, "active")
    assert switch.trigger_of()["threshold"] == -0.15
    (rules / "..data_tmp").symlink_to("..2")
    (rules / "..data_tmp").replace(rules / "..data")
    switch.wait_status("the new rules", lambda _: switch.trigger_of()["threshold"] == -0.12, patience=7)
    assert switch.gate().decided == (200, "active")


def test_what_a_removed_rule_restricted_stays_restricted_until_a_recovery(sidecar, drawdown, heartbeat):
    heartbeat.set(1)
    rest = heartbeat.rule(trigger="stays", operator="lt", threshold=0)
    switch = sidecar(drawdown.rule(action="throttle", factor=0.5), rest)
    drawdown.set(-0.2)
    switch.wait_status("the throttle", lambda status: status["position_limit_factor"] == 0.5)
    switch.write_rules(rest)
    switch.signal(signal.SIGHUP)
    assert "rules.portfolio_drawdown" in switch.wait_audit("config.loosened")["data"]["changes"]
    switch.wait_audit("rule.held")
    drawdown.set(0.0)
    status = switch.status()
    assert status["position_limit_factor"] == 0.5
    switch.wait_status("the hold to be durable", lambda status: status["durable"])
    switch.restart()
    status = switch.wait_status("readiness", lambda status: status["ready"])
    assert status["position_limit_factor"] == 0.5
    assert switch.gate().headers["x-killswitch-factor"] in ("0.5", "0.50")


def test_a_rule_that_went_while_the_sidecar_was_down_leaves_its_restriction(sidecar, drawdown, heartbeat):
    heartbeat.set(1)
    rest = heartbeat.rule(trigger="stays", operator="lt", threshold=0)
    steps = [{"at": "50%", "action": "throttle", "factor": 0.5}]
    switch = sidecar(drawdown.rule(steps=steps), rest)
    drawdown.set(-0.1)
    switch.wait_status("the throttle", lambda status: status["position_limit_factor"] == 0.5)
    assert switch.wait_audit("trigger.restricts")["data"]["action"] == "throttle"
    stored = switch.state_folder / "state.json"
    wait_for(lambda: json.loads(stored.read_text())["asked"], "what the rule asks for on disk")
    switch.kill9()
    switch.write_rules(rest)
    switch.start()
    status = switch.wait_status("readiness", lambda status: status["ready"])
    assert status["position_limit_factor"] == 0.5
    switch.wait_audit("rule.held")


def test_a_disabled_and_a_loosened_rule_are_audited_as_such(sidecar, drawdown):
    switch = sidecar(drawdown.rule())
    switch.write_rules(drawdown.rule(threshold=-0.3))
    assert switch.control("POST", "/-/reload").status == 200
    event = switch.wait_audit("config.loosened")
    assert event["data"]["changes"] == {"rules.portfolio_drawdown.threshold": ["< -0.15", "< -0.3"]}
    assert switch.gate().decided == (200, "active")
    drawdown.set(-0.2)
    switch.wait_status("the new value", lambda _: switch.trigger_of()["value"] == -0.2)
    assert switch.gate().decided == (200, "active")


def test_a_reload_does_not_release_a_kill_and_keeps_a_running_for(sidecar, drawdown):
    switch = sidecar(drawdown.rule(**{"for": "3s"}))
    drawdown.set(-0.2)
    pending = switch.wait_status("a pending trigger", lambda _: switch.trigger_of()["status"] == "pending")
    assert pending["state"] == "ACTIVE"
    switch.write_rules(drawdown.rule(**{"for": "3s"}, labels={"severity": "critical"}))
    assert switch.control("POST", "/-/reload").status == 200
    assert switch.trigger_of()["status"] == "pending"
    switch.restart()
    switch.wait_gate(403, "killed", patience=4.5)
    switch.write_rules(drawdown.rule(threshold=-0.9))
    assert switch.control("POST", "/-/reload").status == 200
    switch.wait_status("the rule to clear", lambda _: switch.trigger_of()["status"] == "inactive")
    switch.assert_gate_stays(403, "killed", seconds=0.5)
