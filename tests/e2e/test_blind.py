"""Sources that fail: neither one bad reading nor a restarting Prometheus decides; lasting blindness stops trading."""

import math
import signal
import time

import pytest

pytestmark = pytest.mark.e2e

CONSTANT = {
    "trigger": "constant",
    "type": "threshold",
    "query": "vector(1)",
    "operator": "lt",
    "threshold": 0,
    "on_no_data": {"hold_for": "1500ms"},
}


def test_a_prometheus_that_dies_later_halts_after_the_hold_and_its_answer_lifts_that(make_sidecar, own_prometheus):
    own_prometheus.start()
    switch = make_sidecar([CONSTANT], [own_prometheus.url]).start()
    switch.wait_gate(200, "active")

    own_prometheus.signal(signal.SIGSTOP)  # takes connections and never answers
    began = time.monotonic()
    switch.wait_gate(403, "halted")
    assert time.monotonic() - began >= 1.5
    assert "no data" in switch.status()["gate"]["reason"]["message"]
    own_prometheus.signal(signal.SIGCONT)
    switch.wait_gate(200, "active")

    own_prometheus.kill()
    began = time.monotonic()
    switch.wait_gate(403, "halted")
    assert time.monotonic() - began >= 1.2
    switch.assert_gate_stays(403, "halted", seconds=2.0)
    status = switch.status()
    assert (status["state"], status["causes"], status["restriction"]) == ("ACTIVE", [], "halt")
    assert status["sources"] == [{"name": "prometheus", "up": False, "error": status["sources"][0]["error"]}]
    assert status["demands"][0]["code"] == "no_data"
    assert switch.metrics()['killswitch_source_up{source="prometheus"}'] == 0
    assert switch.gate(intent="cancel").status == 200
    own_prometheus.start()
    switch.wait_gate(200, "active")
    assert switch.status()["state"] == "ACTIVE"
    assert not switch.audit("switch.killed")


def test_a_recovery_whose_health_is_lost_ends_and_needs_approval_again(make_sidecar, own_prometheus):
    own_prometheus.start()
    switch = make_sidecar([CONSTANT], [own_prometheus.url], recovery={"cooldown": "60s"}).start()
    switch.wait_gate(200, "active")
    switch.kill_switch()
    assert switch.recover().status == 200
    own_prometheus.kill()
    switch.wait_gate(403, "killed")
    status = switch.status()
    assert (status["stage"], status["recovery"]["approvals"]) == ("NONE", [])
    assert switch.wait_audit("recovery.health_lost")
    refused = switch.recover()
    assert refused.status == 409
    assert any("sources_up" in blocker for blocker in refused.document["blockers"])


def test_of_several_prometheus_the_first_healthy_one_answers(make_sidecar, shared_prometheus, own_prometheus, drawdown):
    switch = make_sidecar([drawdown.rule()], [own_prometheus.url, shared_prometheus.url]).start()
    switch.wait_gate(200, "active")
    drawdown.set(-0.2)
    switch.wait_gate(403, "killed")


@pytest.mark.parametrize("fault", ["nan", "error"])
def test_one_bad_reading_neither_kills_nor_clears(sidecar, drawdown, exporter, fault):
    switch = sidecar(
        drawdown.rule(action="throttle", factor=0.5),
        {**drawdown.rule(threshold=-0.5), "trigger": "kills"},
    )
    drawdown.set(-0.2)
    switch.wait_status("the throttle", lambda status: status["position_limit_factor"] == 0.5)
    if fault == "nan":
        drawdown.set(math.nan)
    else:
        exporter.fail("error")
    switch.wait_status("the bad reading", lambda _: switch.trigger_of("kills")["health"] != "ok")
    trigger = switch.trigger_of()
    assert trigger["status"] == "firing"
    assert trigger["armed"] is False
    exporter.fail(None)
    drawdown.set(-0.2)
    switch.wait_status("good readings", lambda _: switch.trigger_of("kills")["health"] == "ok")
    status = switch.status()
    assert (status["state"], status["position_limit_factor"]) == ("ACTIVE", 0.5)
    assert not switch.audit("trigger.cleared", "switch.killed")
    drawdown.set(-0.01)
    switch.wait_status("the throttle to lift", lambda status: status["position_limit_factor"] == 1.0)


@pytest.mark.parametrize("fault", ["nan", "hang"])
def test_bad_data_for_longer_than_the_hold_kills_and_says_no_data(sidecar, drawdown, exporter, fault):
    switch = sidecar(drawdown.rule(annotations={"summary": "breach of the drawdown limit"}))
    began = time.monotonic()
    if fault == "nan":
        drawdown.set(math.nan)
    else:
        exporter.fail("hang")
    switch.wait_gate(403, "killed")
    assert time.monotonic() - began >= 2.0
    cause = switch.status()["causes"][0]
    assert (cause["code"], cause["trigger"]) == ("no_data", "portfolio_drawdown")
    assert "no data" in cause["reason"]
    assert "breach" not in cause["reason"]
    assert sum(value for name, value in switch.metrics().items() if "evaluation_failures_total" in name) > 0


def test_a_sample_older_than_max_age_is_no_reading_however_often_it_is_scraped(
    make_sidecar, shared_prometheus, heartbeat, wait
):
    # A metric whose samples always carry times of their own: of others Prometheus itself marks the end.
    rule = heartbeat.rule(max_age="3s", on_no_data={"hold_for": "1s", "then": "halt"})
    heartbeat.set(-0.01, at=time.time())
    switch = make_sidecar([rule], [shared_prometheus.url]).start()

    def opened():
        heartbeat.set(-0.01, at=time.time())
        return switch.gate().status == 200

    wait(opened, "the gate to open on young samples")
    switch.wait_gate(403, "halted")  # from here on every scrape finds the same sample
    trigger = switch.trigger_of()
    assert trigger["health"] == "no_data"
    assert "stale" in trigger["message"]
    assert trigger["sample_age_seconds"] is None or trigger["sample_age_seconds"] > 2.0
    wait(opened, "the gate to open again on young samples")
