"""Shadow watches, disabled stands aside, and neither makes a stored kill forgotten."""

import pytest

pytestmark = pytest.mark.e2e


def test_in_shadow_mode_rules_block_nothing_but_an_operators_kill_does(sidecar, drawdown):
    switch = sidecar(switch={"mode": "shadow"})
    drawdown.set(-0.2)
    switch.wait_status("the kill", lambda status: status["state"] == "KILLED")
    answer = switch.wait_gate(200, "shadow")
    assert answer.headers["x-killswitch-state"] == "KILLED"
    assert any("shadow" in problem for problem in switch.status()["problems"])
    assert switch.kill_switch()["state"] == "KILLED"
    assert switch.gate().decided == (403, "killed")
    switch.restart()
    switch.wait_gate(403, "killed")


def test_a_shadow_kill_blocks_once_the_mode_is_active(sidecar, drawdown):
    switch = sidecar(switch={"mode": "shadow"})
    drawdown.set(-0.2)
    switch.wait_status("the kill", lambda status: status["state"] == "KILLED" and status["durable"])
    switch.write_config(switch={"mode": "active"})
    drawdown.set(0.0)
    switch.restart()
    switch.wait_gate(403, "killed")


def test_disabled_allows_refuses_commands_and_keeps_the_stored_kill(sidecar):
    switch = sidecar()
    switch.kill_switch(reason="remember me")
    stored = (switch.state_folder / "state.json").read_bytes()
    switch.write_config(switch={"mode": "disabled"})
    assert switch.terminate() == 0
    stored = (switch.state_folder / "state.json").read_bytes()
    switch.start()
    switch.wait_gate(200, "disabled")
    status = switch.status()
    assert (status["state"], status["mode"]) == ("DISABLED", "disabled")
    assert any("disabled" in problem for problem in status["problems"])
    assert switch.cli("status").returncode == 0
    for reply in (switch.control("POST", "/api/v1/trigger", {"reason": "stop"}), switch.recover()):
        assert reply.status == 409
        assert "DISABLED" in reply.body.decode() or "disabled" in reply.body.decode()
    assert switch.cli("trigger", "--reason", "stop", "--confirm").returncode == 4
    switch.wait_status("the state in the metrics", lambda _: switch.states()["DISABLED"] == 1.0)
    assert switch.wait_audit("config.loosened")["data"]["changes"] == {"switch.mode": ["active", "disabled"]}
    assert switch.terminate() == 0
    assert (switch.state_folder / "state.json").read_bytes() == stored

    switch.write_config(switch={"mode": "active"})
    switch.start()
    switch.wait_gate(403, "killed")
    assert [cause["reason"] for cause in switch.status()["causes"]] == ["remember me"]
