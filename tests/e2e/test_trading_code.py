"""What trading code and operators see of a running, killed, dead and stopped sidecar."""

import os
import signal
import subprocess
import time

import pytest

from sidecar.client import ExecutionGate, TradingBlockedError

pytestmark = pytest.mark.e2e


def denied(gate, order=None):
    """The reason code with which the client denies; None where it allows."""
    try:
        gate.check_can_execute(order)
    except TradingBlockedError as blocked:
        return blocked.decision.code
    return None


@pytest.fixture
def gates():
    """Opens the three ways in of trading code, by name."""
    opened = []

    def open_all(switch):
        given = {
            "page": {"page": switch.page},
            "socket": {"socket": switch.gate_socket, "expect_switch": switch.name},
            "url": {"url": f"http://127.0.0.1:{switch.gate_port}", "expect_switch": switch.name},
        }
        made = {name: ExecutionGate(**source, timeout=1.0) for name, source in given.items()}
        opened.extend(made.values())
        return made

    yield open_all
    for gate in opened:
        gate.close()


def test_trading_code_sees_a_kill_and_a_restart_on_every_way_in(sidecar, gates, drawdown, wait):
    switch = sidecar(recovery={"cooldown": "0s", "steps": [{"factor": 0.5}, {"factor": 1.0, "after": "1h"}]})
    ways = gates(switch)
    assert {name: denied(gate) for name, gate in ways.items()} == dict.fromkeys(ways)
    assert {gate.position_limit_factor for gate in ways.values()} == {1.0}

    drawdown.set(-0.2)
    switch.wait_gate(403, "killed")
    assert {name: denied(gate) for name, gate in ways.items()} == dict.fromkeys(ways, "killed")
    assert {name: denied(gate, {"intent": "cancel"}) for name, gate in ways.items()} == dict.fromkeys(ways)
    assert "drawdown" in ways["socket"].get_block_reason()
    assert {gate.position_limit_factor for gate in ways.values()} == {0.0}

    drawdown.set(-0.01)
    wait(lambda: switch.recover().status == 200, "the recovery")
    switch.wait_gate(200, "active")
    assert {gate.position_limit_factor for gate in ways.values()} == {0.5}
    order = {"intent": "new", "symbol": "AAPL", "side": "buy", "quantity": 600, "position": 0, "position_limit": 1000}
    assert {name: denied(gate, order) for name, gate in ways.items()} == dict.fromkeys(ways, "over_limit")
    assert {name: denied(gate, order | {"quantity": 500}) for name, gate in ways.items()} == dict.fromkeys(ways)


def test_a_dead_sidecar_denies_on_every_way_in_and_its_successor_allows_again(sidecar, gates, wait):
    switch = sidecar()
    ways = gates(switch)
    assert not any(map(denied, ways.values()))
    inode = switch.page.stat().st_ino
    switch.kill9()
    died = time.monotonic()
    assert denied(ways["socket"]) == "stale"
    assert denied(ways["url"]) == "stale"
    wait(lambda: denied(ways["page"]) == "stale", "the page to be stale", patience=1.5)  # the lease is 1 s
    assert time.monotonic() - died <= 1.5
    assert denied(ways["page"], {"intent": "cancel"}) is None
    exit_only = ExecutionGate(page=switch.page, on_stale="reduce_only")
    assert denied(exit_only, {"symbol": "AAPL", "side": "sell", "quantity": 10, "position": 100}) is None
    assert denied(exit_only, {"symbol": "AAPL", "side": "buy", "quantity": 10, "position": 100}) == "stale"
    exit_only.close()

    switch.start()
    assert switch.page.stat().st_ino == inode  # rewritten in place: the old mapping shows the new sidecar
    switch.wait_gate(200, "active")
    wait(lambda: denied(ways["page"]) is None, "the page to be fresh again")
    assert denied(ways["socket"]) is None


def test_a_restarted_sidecar_whose_state_is_not_known_yet_denies_on_the_page(sidecar, gates, wait):
    switch = sidecar()
    page = gates(switch)["page"]
    switch.kill9()
    (switch.folder / "rules" / "rules.yaml").unlink()
    switch.start()
    assert denied(page) is not None
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        assert denied(page) is not None


def test_an_orderly_stop_makes_the_page_stale_at_once(sidecar, gates):
    switch = sidecar()
    page = gates(switch)["page"]
    assert denied(page) is None
    assert switch.terminate() == 0
    assert denied(page) == "stale"


def test_a_sidecar_that_was_stopped_and_goes_on_serves_nothing_old(sidecar, gates, drawdown, wait):
    switch = sidecar()
    ways = gates(switch)
    assert not any(map(denied, ways.values()))
    switch.signal(signal.SIGSTOP)
    wait(lambda: denied(ways["page"]) == "stale", "the page to be stale", patience=1.5)
    assert denied(ways["socket"]) == "stale"
    drawdown.set(-0.5)  # the breach happens while it cannot look
    time.sleep(0.7)
    switch.signal(signal.SIGCONT)
    answers = []
    deadline = time.monotonic() + 10
    while (not answers or answers[-1] != "killed") and time.monotonic() < deadline:
        answers.append(denied(ways["url"]))
    assert answers[-1] == "killed"
    assert None not in answers  # no allow from before the stop


def test_metrics_are_one_hot_valid_and_complete_after_a_kill_and_a_restart(sidecar, drawdown):
    switch = sidecar()
    drawdown.set(-0.2)
    switch.wait_status("the kill to be durable", lambda s: s["state"] == "KILLED" and s["durable"])
    breach = switch.metrics()
    assert breach["killswitch_breach_to_block_seconds_count"] == 1
    assert 0 < breach["killswitch_breach_to_block_seconds_sum"] < 2
    assert breach['killswitch_transitions_total{from="ACTIVE",to="KILLED"}'] == 1
    switch.restart()
    switch.wait_gate(403, "killed")
    status = switch.wait_status("durable", lambda status: status["durable"])
    assert switch.states() == {"ACTIVE": 0.0, "KILLED": 1.0, "RECOVERING": 0.0, "DISABLED": 0.0}
    metrics = switch.metrics()
    assert metrics[f'killswitch_position_limit_factor{{switch="{switch.name}"}}'] == 0.0
    assert metrics[f'killswitch_epoch{{switch="{switch.name}"}}'] == status["epoch"]
    restrictions = {name: value for name, value in metrics.items() if name.startswith("killswitch_restriction{")}
    assert sorted(restrictions.values()) == [0.0, 0.0, 1.0]
    assert metrics['killswitch_gate_decisions_total{decision="deny",reason="killed"}'] >= 1
    text = switch.operations("/metrics").body
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert checked.returncode == 0, checked


def test_commands_without_a_running_sidecar_fail_and_say_that_nothing_happened(make_sidecar, shared_prometheus):
    switch = make_sidecar(None, [shared_prometheus.url])
    trigger = switch.cli("trigger", "--reason", "stop", "--confirm")
    assert trigger.returncode == 1
    assert "NOTHING was blocked" in trigger.stderr
    assert "KILLED" not in trigger.stdout
    for command in (["status"], ["recover", "--reason", "r", "--by", "bob"], ["health"], ["audit"]):
        done = switch.cli(*command, stdin=f"{switch.code}\n")
        assert done.returncode == 1, (command, done)
        assert done.stderr


def test_a_trigger_by_hand_asks_for_confirmation_and_reports_the_state_it_reached(sidecar):
    switch = sidecar()
    unsure = switch.cli("trigger", "--reason", "stop")
    assert unsure.returncode == 2
    assert switch.gate().decided == (200, "active")
    done = switch.cli("trigger", "--reason", "fat finger", "--by", "alice", "--confirm")
    assert done.returncode == 0
    assert "KILLED" in done.stdout
    assert switch.gate().decided == (403, "killed")
    cause = switch.status()["causes"][0]
    assert (cause["code"], cause["by"], cause["by_verified"]) == ("operator", "alice", False)
    event = switch.wait_audit("switch.killed")
    assert (event["by"], event["reason"], event["from"], event["to"]) == ("alice", "fat finger", "ACTIVE", "KILLED")


def test_the_operations_listener_takes_no_commands_without_credentials(sidecar):
    switch = sidecar()
    for path, body in (("/api/v1/trigger", {"reason": "x"}), ("/-/reload", None), ("/api/v1/recovery", {"by": "b"})):
        assert switch.operations(path, method="POST", body=body).status == 403
    assert switch.gate().decided == (200, "active")
    assert switch.operations("/api/v1/status").document["state"] == "ACTIVE"
    assert switch.operations("/-/ready").status == 200


def test_files_of_the_run_folders_have_the_modes_that_keep_others_out(sidecar):
    switch = sidecar()
    modes = [os.stat(path).st_mode & 0o777 for path in (switch.gate_socket, switch.page, switch.control_socket)]  # noqa: PTH116
    assert modes == [0o666, 0o644, 0o600]
