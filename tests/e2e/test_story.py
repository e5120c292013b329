"""The main job on the real Prometheus: breach, block, crash, approved recovery, restart in steps."""

import signal
import time

import pytest

pytestmark = pytest.mark.e2e


def killed_facts(status):
    cause = status["causes"][0]
    return {
        "since": status["since"],
        "restriction": status["restriction"],
        "cause": {name: cause[name] for name in ("code", "trigger", "reason", "time", "value", "limit", "by")},
    }


def test_breach_kills_survives_sigkill_and_trading_comes_back_only_by_approval_in_steps(sidecar, drawdown):
    switch = sidecar(drawdown.rule(annotations={"summary": "Drawdown {{ value }} is beyond {{ threshold }}"}))
    assert switch.gate().decided == (200, "active")

    drawdown.set(-0.2)
    answer = switch.wait_gate(403, "killed")
    assert answer.headers["x-killswitch-state"] == "KILLED"
    assert answer.headers["x-killswitch-restriction"] == "halt"
    assert float(answer.headers["x-killswitch-factor"]) == 0.0
    assert switch.gate(unix=True).decided == (403, "killed")
    assert switch.gate(intent="cancel").decided == (200, "cancel")
    before = switch.wait_status("the kill to be durable", lambda status: status["durable"])
    assert before["causes"][0]["trigger"] == "portfolio_drawdown"
    assert before["causes"][0]["code"] == "breach"
    assert before["causes"][0]["reason"] == "Drawdown -0.2 is beyond -0.15"
    assert (before["causes"][0]["value"], before["causes"][0]["limit"]) == (-0.2, -0.15)

    switch.restart()
    assert switch.gate().status == 403
    after = switch.status()
    assert after["state"] == "KILLED"
    assert killed_facts(after) == killed_facts(before)
    switch.wait_gate(403, "killed")
    assert switch.cli("status").returncode == 3
    assert switch.cli("check").returncode == 3

    refused = switch.cli("recover", "--reason", "hope", "--by", "bob", stdin=f"{switch.wrong_code}\n")
    assert refused.returncode == 4, refused
    assert switch.wait_audit("approval.failed")["by"] == "bob"
    assert switch.wrong_code not in str(switch.audit())

    blocked = switch.recover()
    assert blocked.status == 409
    assert any("portfolio_drawdown" in blocker for blocker in blocked.document["blockers"])
    assert switch.status()["state"] == "KILLED"
    assert switch.audit("recovery.refused")

    drawdown.set(-0.02)
    switch.wait_status("the rule to clear", lambda _: switch.trigger_of()["status"] == "inactive")
    assert killed_facts(switch.status())["since"] == before["since"]
    asked = time.monotonic()
    allowed = switch.cli("recover", "--reason", "positions reconciled", "--by", "bob", stdin=f"{switch.code}\n")
    assert allowed.returncode == 0, allowed
    assert "RECOVERING" in allowed.stdout
    status = switch.status()
    assert (status["state"], status["stage"], status["position_limit_factor"]) == ("RECOVERING", "COOLDOWN", 0.0)
    assert status["recovery"]["approvals"][0]["by"] == "bob"
    assert switch.gate().decided == (403, "recovering")
    assert switch.gate(intent="cancel").decided == (200, "cancel")

    answer = switch.wait_gate(200, "active")
    assert time.monotonic() - asked >= 2.0
    assert float(answer.headers["x-killswitch-factor"]) == 0.5
    reopened = time.monotonic()
    assert switch.status()["stage"] == "GRADUAL_RESTART"
    switch.wait_status("the second step", lambda status: status["position_limit_factor"] == 0.75)
    assert time.monotonic() - reopened >= 1.2
    done = switch.wait_status("full trading", lambda status: status["position_limit_factor"] == 1.0)
    assert time.monotonic() - reopened >= 2.7
    assert (done["state"], done["stage"], done["causes"]) == ("ACTIVE", "COMPLETE", [])
    assert switch.cli("status").returncode == 0
    assert switch.cli("check").returncode == 0

    kinds = [event["type"] for event in switch.audit()]
    story = ["switch.killed", "approval.failed", "recovery.refused", "recovery.started", "switch.reopened"]
    assert [kind for kind in kinds if kind in story] == story
    assert kinds.count("restart.step") == 2
    assert switch.cli("audit", "verify").returncode == 0


DOWN_SECONDS = 1.5
BOOT_SECONDS = 1.0
"""Running time that may pass between the start of the process and the first status that a test reads."""


def test_a_crash_in_the_cooldown_neither_shortens_it_nor_loses_the_approval(sidecar):
    switch = sidecar(recovery={"cooldown": "4s"})
    switch.kill_switch()
    assert switch.recover().status == 200
    before = switch.wait_status("some of the cooldown", lambda s: s["recovery"]["cooldown_remaining_seconds"] < 3.7)
    switch.kill9()
    time.sleep(DOWN_SECONDS)  # time while it is down does not count
    switch.start()
    after = switch.status()
    assert switch.gate().status == 403
    assert (after["state"], after["stage"]) == ("RECOVERING", "COOLDOWN")
    assert after["recovery"]["approvals"] == before["recovery"]["approvals"]
    left = after["recovery"]["cooldown_remaining_seconds"]
    assert before["recovery"]["cooldown_remaining_seconds"] - BOOT_SECONDS <= left <= 4.0
    started = time.monotonic()
    answer = switch.wait_gate(200, "active")
    assert time.monotonic() - started >= left - 0.2
    assert float(answer.headers["x-killswitch-factor"]) == 0.5


def test_an_orderly_stop_loses_nothing_of_the_cooldown_that_has_run(sidecar):
    switch = sidecar(recovery={"cooldown": "60s", "health": {"sources_up": False}})
    switch.kill_switch()
    assert switch.recover().status == 200
    before = switch.wait_status("some of the cooldown", lambda s: s["recovery"]["cooldown_remaining_seconds"] < 58.0)
    assert switch.terminate() == 0
    switch.start()
    switch.wait_gate(403, "recovering")
    left = switch.status()["recovery"]["cooldown_remaining_seconds"]
    assert left <= before["recovery"]["cooldown_remaining_seconds"]


def test_a_crash_in_the_gradual_restart_neither_raises_the_factor_nor_shortens_the_step(sidecar):
    switch = sidecar(recovery={"cooldown": "0s", "steps": [{"factor": 0.5}, {"factor": 1.0, "after": "4s"}]})
    switch.kill_switch()
    assert switch.recover().status == 200
    before = switch.wait_status(
        "some of the step", lambda s: s["recovery"]["next_step"] and s["recovery"]["next_step"]["in_seconds"] < 3.7
    )
    switch.kill9()
    time.sleep(DOWN_SECONDS)
    switch.start()
    after = switch.status()
    assert (after["state"], after["stage"], after["position_limit_factor"]) == ("ACTIVE", "GRADUAL_RESTART", 0.5)
    left = after["recovery"]["next_step"]["in_seconds"]
    assert before["recovery"]["next_step"]["in_seconds"] - BOOT_SECONDS <= left <= 4.0
    started = time.monotonic()
    answer = switch.wait_gate(200, "active")
    assert float(answer.headers["x-killswitch-factor"]) == 0.5
    switch.wait_status("full trading", lambda status: status["position_limit_factor"] == 1.0)
    assert time.monotonic() - started >= left - 0.2


def test_a_breach_in_the_cooldown_aborts_it_and_every_approval_is_void(sidecar, drawdown):
    switch = sidecar(recovery={"cooldown": "3s"})
    switch.kill_switch()
    assert switch.recover().status == 200
    assert switch.gate().decided == (403, "recovering")
    drawdown.set(-0.3)
    switch.wait_gate(403, "killed")
    status = switch.status()
    assert (status["state"], status["stage"]) == ("KILLED", "NONE")
    assert {cause["code"] for cause in status["causes"]} == {"operator", "breach"}
    drawdown.set(-0.01)
    switch.wait_status("the rule to clear", lambda _: switch.trigger_of()["status"] == "inactive")
    switch.assert_gate_stays(403, "killed", seconds=3.2)
    assert switch.control("POST", "/api/v1/recovery/approvals", {"by": "bob", "code": switch.code}).status == 409
    assert switch.recover(code=switch.wrong_code).status == 403
    assert switch.recover().status == 200
    assert switch.status()["recovery"]["cooldown_remaining_seconds"] > 2.0


def test_an_operators_kill_and_a_cancelled_recovery_void_the_approval_too(sidecar):
    switch = sidecar(recovery={"cooldown": "30s"})
    switch.kill_switch()
    assert switch.recover().status == 200
    assert switch.kill_switch(reason="not yet")["state"] == "KILLED"
    assert switch.status()["recovery"]["approvals"] == []
    assert switch.recover().status == 200
    cancelled = switch.cli("cancel-recovery", "--by", "alice", "--reason", "changed my mind")
    assert "KILLED" in cancelled.stdout
    status = switch.status()
    assert (status["state"], status["stage"], status["recovery"]["approvals"]) == ("KILLED", "NONE", [])
    assert switch.gate().decided == (403, "killed")


def test_a_reload_with_a_shorter_cooldown_waits_until_the_switch_is_active_again(sidecar):
    switch = sidecar(recovery={"cooldown": "30s"})
    switch.kill_switch()
    assert switch.recover().status == 200
    switch.write_config(recovery={"cooldown": "1s"})
    switch.signal(signal.SIGHUP)
    switch.wait_audit("config.reloaded")
    status = switch.status()
    assert status["state"] == "RECOVERING"
    assert status["recovery"]["cooldown_remaining_seconds"] > 20
    assert any("wait" in problem for problem in status["problems"])
    assert "recovery.cooldown" in switch.wait_audit("config.loosened")["data"]["changes"]
    switch.restart()
    assert switch.status()["recovery"]["cooldown_remaining_seconds"] > 20
    assert switch.gate().status == 403


def test_repeated_wrong_codes_lock_the_approver_out_and_a_restart_does_not_help(sidecar):
    switch = sidecar()
    switch.kill_switch()
    for _ in range(5):
        assert switch.recover(code=switch.wrong_code).status == 403
    locked = switch.recover()
    assert locked.status == 429
    assert int(locked.headers["retry-after"]) > 0
    switch.wait_audit("approval.locked_out")
    switch.wait_status("the lock-out to be durable", lambda status: status["durable"])
    switch.restart()
    switch.wait_gate(403, "killed")
    assert switch.recover().status == 429
    assert switch.cli("recover", "--reason", "again", "--by", "bob", stdin=f"{switch.code}\n").returncode == 4


def test_two_approvals_of_two_people_are_needed_where_two_are_configured(sidecar, killswitch, tmp_path):
    codes = {"bob": "correct-horse-battery", "carol": "staple-of-another-kind"}
    hashes = {name: killswitch("hash-code", stdin=f"{code}\n").stdout.split()[-1] for name, code in codes.items()}
    approvers = tmp_path / "approvers.yaml"
    approvers.write_text("".join(f"- {{name: {name}, code_hash: '{code}'}}\n" for name, code in hashes.items()))
    switch = sidecar(recovery={"approvals": 2, "approvers_file": str(approvers), "cooldown": "30s"})
    switch.kill_switch()
    assert switch.recover(by="bob", code=codes["bob"]).document["recovery"]["stage"] == "PENDING"
    assert switch.gate().decided == (403, "killed")
    again = switch.control("POST", "/api/v1/recovery/approvals", {"by": "bob", "code": codes["bob"]})
    assert again.status == 409
    foreign = switch.control("POST", "/api/v1/recovery/approvals", {"by": "carol", "code": codes["bob"]})
    assert foreign.status == 403
    switch.restart()  # an approval that was given outlives a crash
    switch.wait_status("readiness", lambda status: status["ready"])
    assert switch.gate().decided == (403, "killed")
    second = switch.cli("approve", "--by", "carol", stdin=f"{codes['carol']}\n")
    assert "RECOVERING" in second.stdout, second
    assert [one["by_verified"] for one in switch.status()["recovery"]["approvals"]] == [True, True]
