"""What is not known is not allowed: until state and rules are known the gate denies, latches nothing, and says why."""

import shutil

import pytest

pytestmark = pytest.mark.e2e


def assert_denies_without_a_kill(switch, why):
    """Orders are denied, cancels pass, nothing is latched, the process is up and says why."""
    for unix in (False, True):
        assert switch.gate(unix=unix).decided == (403, "not_ready")
        assert switch.gate(intent="cancel", unix=unix).decided == (200, "cancel")
    assert switch.order(intent="cancel")["decision"] == "allow"
    reducing = {"intent": "new", "symbol": "AAPL", "side": "sell", "quantity": 10, "position": 100}
    assert switch.order(**reducing)["reason"]["code"] == "not_ready"
    status = switch.status()
    assert (status["state"], status["causes"], status["ready"]) == ("ACTIVE", [], False)
    assert why in status["not_ready_reason"]
    assert status["gate"]["decision"] == "deny"
    assert switch.operations("/-/healthy").status == 200
    shown = switch.cli("status")
    assert shown.returncode == 3
    assert why.split()[0] in shown.stdout


def test_without_a_rule_file_the_gate_denies_and_opens_when_one_appears(make_sidecar, shared_prometheus, drawdown):
    switch = make_sidecar(None, [shared_prometheus.url]).start()
    assert_denies_without_a_kill(switch, "no rules are loaded")
    switch.write_rules(drawdown.rule())
    switch.wait_gate(200, "active")
    assert switch.status()["ready"]


def test_with_a_broken_rule_file_the_gate_denies_and_opens_when_it_is_mended(make_sidecar, shared_prometheus, drawdown):
    switch = make_sidecar([drawdown.rule(threshold="much")], [shared_prometheus.url]).start()
    assert_denies_without_a_kill(switch, "threshold")
    assert switch.metrics()["killswitch_config_last_reload_successful"] == 0
    switch.write_rules(drawdown.rule())
    assert switch.control("POST", "/-/reload").status == 200
    switch.wait_gate(200, "active")


def test_with_a_file_in_the_state_folders_place_the_gate_denies_and_opens_when_it_is_usable(
    make_sidecar, shared_prometheus, drawdown
):
    switch = make_sidecar([drawdown.rule()], [shared_prometheus.url])
    switch.state_folder.write_text("not a folder")
    switch.start()
    assert_denies_without_a_kill(switch, str(switch.state_folder))
    assert any(str(switch.state_folder) in problem for problem in switch.status()["problems"])
    assert set(switch.states().values()) == {0.0}
    assert switch.recover().status == 503  # nobody knows yet what there is to recover from
    switch.state_folder.unlink()
    switch.wait_gate(200, "active")
    switch.wait_status("the state in the metrics", lambda _: switch.states()["ACTIVE"] == 1.0)


def test_a_kill_before_the_state_folder_is_usable_holds_and_becomes_durable_later(
    make_sidecar, shared_prometheus, drawdown
):
    switch = make_sidecar([drawdown.rule()], [shared_prometheus.url])
    switch.state_folder.write_text("not a folder")
    switch.start()
    answer = switch.control("POST", "/api/v1/trigger", {"reason": "stop", "by": "alice"})
    assert (answer.status, answer.document["state"], answer.document["durable"]) == (503, "KILLED", False)
    switch.state_folder.unlink()
    status = switch.wait_status("the kill to be durable", lambda status: status["durable"])
    assert (status["state"], status["causes"][0]["reason"]) == ("KILLED", "stop")
    switch.restart()
    switch.wait_gate(403, "killed")
    assert [cause["reason"] for cause in switch.status()["causes"]] == ["stop"]


def test_a_prometheus_that_is_dead_from_the_start_kills_nothing_and_its_first_answer_opens(
    make_sidecar, own_prometheus
):
    rule = {
        "trigger": "constant",
        "type": "threshold",
        "query": "vector(1)",
        "operator": "lt",
        "threshold": 0,
        "on_no_data": {"hold_for": "1s"},
    }
    switch = make_sidecar([rule], [own_prometheus.url]).start()
    assert_denies_without_a_kill(switch, "rule constant")
    switch.assert_gate_stays(403, "not_ready", seconds=2.5)
    assert_denies_without_a_kill(switch, "rule constant")
    assert switch.status()["sources"][0]["up"] is False
    assert switch.operations("/-/ready").status == 200
    own_prometheus.start()
    switch.wait_gate(200, "active")


def test_every_enforcing_rule_must_have_seen_its_metric_before_the_gate_opens(
    make_sidecar, shared_prometheus, drawdown, heartbeat
):
    drawdown.drop()
    rules = [
        drawdown.rule(),
        {"trigger": "looks_on", "type": "threshold", "query": "absent_metric", "operator": "gt", "threshold": 1},
    ]
    rules[1] |= {"shadow": True}
    switch = make_sidecar(rules, [shared_prometheus.url]).start()
    switch.wait_status("a first evaluation", lambda _: switch.trigger_of()["health"] == "no_data")
    assert_denies_without_a_kill(switch, "rule portfolio_drawdown")
    switch.assert_gate_stays(403, "not_ready", seconds=2.5)
    assert switch.status()["state"] == "ACTIVE"
    drawdown.set(0.0)
    switch.wait_gate(200, "active")


def test_a_first_reading_that_breaches_kills_at_once(make_sidecar, shared_prometheus, drawdown):
    drawdown.set(-0.5)
    switch = make_sidecar([drawdown.rule()], [shared_prometheus.url]).start()
    switch.wait_gate(403, "killed")
    switch.wait_status("the kill to be durable", lambda status: status["durable"])
    shutil.rmtree(switch.folder / "rules")  # not even without its rules does it forget
    switch.restart()
    status = switch.wait_status("the stored state", lambda status: status["state"] == "KILLED")
    assert status["causes"][0]["trigger"] == "portfolio_drawdown"
    assert switch.gate().status == 403
