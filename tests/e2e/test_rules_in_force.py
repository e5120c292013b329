"""Rules on real metrics: every action and type that this version evaluates fires, restricts, and lifts by itself."""

import time

import pytest

pytestmark = pytest.mark.e2e

LIMITS = {"position_limits": {"AAPL": 1000}}
BUY = {"intent": "new", "symbol": "AAPL", "side": "buy", "position": 0}
EXIT = {"intent": "new", "symbol": "AAPL", "side": "sell", "position": 100}


def test_steps_warn_throttle_and_allow_only_exits_on_the_way_to_the_kill(sidecar, drawdown):
    steps = [
        {"at": "50%", "action": "warn"},
        {"at": "75%", "action": "throttle", "factor": 0.5},
        {"at": "90%", "action": "reduce_only"},
    ]
    switch = sidecar(drawdown.rule(threshold=-0.2, steps=steps), gate=LIMITS)
    assert switch.order(**BUY, quantity=1000)["decision"] == "allow"

    drawdown.set(-0.1)
    switch.wait_status("the warning", lambda status: [one["action"] for one in status["demands"]] == ["warn"])
    assert switch.order(**BUY, quantity=1000)["decision"] == "allow"

    drawdown.set(-0.15)
    switch.wait_status("the throttle", lambda status: status["position_limit_factor"] == 0.5)
    refused = switch.order(**BUY, quantity=501)
    assert (refused["decision"], refused["reason"]["code"], refused["max_quantity"]) == ("deny", "over_limit", 500)
    assert switch.order(**BUY, quantity=500, unix=True)["decision"] == "allow"
    assert switch.gate().decided == (200, "active")
    assert switch.metrics()[f'killswitch_position_limit_factor{{switch="{switch.name}"}}'] == 0.5

    drawdown.set(-0.185)
    switch.wait_gate(403, "reduce_only")
    assert switch.order(**BUY, quantity=1)["reason"]["code"] == "reduce_only"
    assert switch.order(**EXIT, quantity=100)["reason"]["code"] == "reducing"
    assert switch.order(**EXIT, quantity=201)["decision"] == "deny"
    used = switch.metrics()['killswitch_trigger_limit_used_ratio{trigger="portfolio_drawdown"}']
    assert used == pytest.approx(0.925)

    drawdown.set(-0.01)
    status = switch.wait_status("all to lift", lambda status: not status["demands"])
    assert (status["restriction"], status["position_limit_factor"]) == ("none", 1.0)
    assert switch.gate().decided == (200, "active")
    drawdown.set(-0.25)
    switch.wait_gate(403, "killed")
    assert switch.order(**EXIT, quantity=100)["decision"] == "deny"


def test_hysteresis_keeps_a_halt_until_the_value_is_well_again(sidecar, drawdown):
    switch = sidecar(drawdown.rule(action="halt", clear=-0.10))
    drawdown.set(-0.2)
    switch.wait_gate(403, "halted")
    drawdown.set(-0.12)
    switch.wait_status("the new value", lambda _: switch.trigger_of()["value"] == -0.12)
    assert switch.gate().decided == (403, "halted")
    drawdown.set(-0.05)
    switch.wait_gate(200, "active")
    assert switch.status()["state"] == "ACTIVE"


def test_for_waits_and_a_value_that_recovers_in_time_does_not_kill(sidecar, drawdown):
    switch = sidecar(drawdown.rule(**{"for": "2s"}))
    drawdown.set(-0.2)
    switch.wait_status("pending", lambda _: switch.trigger_of()["status"] == "pending")
    drawdown.set(-0.1)
    switch.wait_status("inactive", lambda _: switch.trigger_of()["status"] == "inactive")
    drawdown.set(-0.2)
    switch.wait_status("pending again", lambda _: switch.trigger_of()["status"] == "pending")
    began = time.monotonic()
    switch.wait_gate(403, "killed")
    assert 1.5 <= time.monotonic() - began <= 4


def test_a_reduce_only_kill_lets_exits_pass(sidecar, drawdown):
    switch = sidecar(drawdown.rule(), gate={"killed_policy": "reduce_only"})
    drawdown.set(-0.2)
    switch.wait_status("the kill", lambda status: status["state"] == "KILLED")
    assert switch.gate().status == 403
    assert switch.order(**EXIT, quantity=50)["decision"] == "allow"
    assert switch.order(**EXIT, quantity=101)["decision"] == "deny"
    assert switch.order(**BUY, quantity=1)["decision"] == "deny"
    switch.restart()
    switch.wait_status("readiness", lambda status: status["ready"])
    assert switch.order(**EXIT, quantity=50)["decision"] == "allow"
    switch.kill_switch(restriction="halt")
    assert switch.order(**EXIT, quantity=50)["decision"] == "deny"


def test_a_heartbeat_that_stops_kills_after_the_missed_beats(make_sidecar, shared_prometheus, heartbeat, wait):
    rule = {
        "trigger": "trading_heartbeat",
        "type": "heartbeat",
        "query": heartbeat.selector,
        "interval": "1s",
        "max_missed": 2,
    }
    heartbeat.beat()
    switch = make_sidecar([rule], [shared_prometheus.url]).start()
    switch.wait_gate(200, "active")
    switch.assert_gate_stays(200, "active", seconds=2.5)
    last = time.time()
    heartbeat.set(last)
    switch.wait_gate(403, "killed")
    assert time.time() - last >= 2.0
    cause = switch.status()["causes"][0]
    assert (cause["code"], cause["trigger"]) == ("breach", "trading_heartbeat")
    assert switch.recover().status == 409
    heartbeat.beat()
    wait(lambda: switch.recover().status == 200, "a recovery with a beating heart")


def test_an_expression_fires_on_any_series_and_an_empty_answer_is_inactive(sidecar, drawdown):
    rule = {"trigger": "deep", "type": "expression", "expr": f"{drawdown.selector} < -0.15", "action": "halt"}
    switch = sidecar(rule)
    assert switch.trigger_of("deep")["status"] == "inactive"
    assert switch.gate().decided == (200, "active")
    drawdown.set(-0.3)
    switch.wait_gate(403, "halted")
    drawdown.set(-0.1)
    switch.wait_gate(200, "active")


def test_a_direct_scrape_without_prometheus_blocks_within_a_second(make_sidecar, exporter, drawdown):
    rule = drawdown.rule(source="scrape:trader", query=drawdown.selector)
    scrape = [{"name": "trader", "url": f"http://{exporter.address}/metrics", "interval": "100ms", "timeout": "100ms"}]
    switch = make_sidecar([rule], [], scrape=scrape).start()
    switch.wait_gate(200, "active")
    began = time.monotonic()
    drawdown.set(-0.2)
    switch.wait_gate(403, "killed")
    assert time.monotonic() - began <= 1.0
    assert switch.metrics()['killswitch_source_up{source="scrape:trader"}'] == 1
    drawdown.set(0.0)
    exporter.fail("error")
    switch.wait_status("the source to be down", lambda status: not status["sources"][0]["up"])
    assert switch.recover().status == 409


def test_a_waived_trigger_may_go_on_firing_and_rearms_at_its_new_threshold(sidecar, drawdown):
    switch = sidecar(drawdown.rule(), recovery={"cooldown": "500ms"})
    drawdown.set(-0.2)
    switch.wait_gate(403, "killed")
    waived = switch.cli(
        *("recover", "--reason", "limit raised", "--by", "bob", "--waive", "portfolio_drawdown=-0.3:24h"),
        stdin=f"{switch.code}\n",
    )
    assert waived.returncode == 0, waived
    switch.wait_gate(200, "active")
    assert switch.status()["waivers"][0]["threshold"] == -0.3
    assert switch.metrics()['killswitch_trigger_waived{trigger="portfolio_drawdown"}'] == 1
    switch.restart()
    switch.wait_gate(200, "active")
    assert switch.status()["waivers"][0]["threshold"] == -0.3
    drawdown.set(-0.31)
    switch.wait_gate(403, "killed")
    assert switch.status()["waivers"] == []


def test_a_shadow_rule_reports_and_never_acts(sidecar, drawdown):
    switch = sidecar(drawdown.rule(shadow=True), {**drawdown.rule(threshold=-0.9), "trigger": "real"})
    drawdown.set(-0.5)
    switch.wait_audit("trigger.shadow")
    assert switch.trigger_of()["status"] == "firing"
    assert switch.gate().decided == (200, "active")
    assert switch.status()["state"] == "ACTIVE"
    shadowed = f'killswitch_trigger_shadow_firings_total{{trigger="{switch.trigger_of()["trigger"]}"}}'
    assert switch.metrics()[shadowed] == 1.0
    assert switch.metrics()['killswitch_trigger_shadow_firings_total{trigger="real"}'] == 0.0


def test_one_broken_query_keeps_no_other_rule_from_killing(sidecar, drawdown):
    broken = {
        "trigger": "broken",
        "type": "threshold",
        "query": f'{drawdown.selector} * on() group_left() {{__name__=~"up|scrape_duration_seconds"}}',
        "operator": "lt",
        "threshold": -5,
        "shadow": True,
    }
    switch = sidecar(broken, drawdown.rule())
    switch.wait_status("the broken rule to say so", lambda _: switch.trigger_of("broken")["health"] == "error")
    assert switch.gate().decided == (200, "active")
    drawdown.set(-0.2)
    switch.wait_gate(403, "killed")
