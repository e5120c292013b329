"""What is on disk decides at a restart; what is damaged, foreign, newer, full or hanging never opens the gate."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e


@pytest.fixture
def killed(sidecar):
    """A sidecar that an operator killed and that has ended; with its state folder."""
    switch = sidecar()
    switch.kill_switch(reason="before the damage")
    switch.kill9()
    return switch


def started(switch):
    switch.start()
    return switch.wait_status("the stored state", lambda status: status["durable"] or not status["ready"])


@pytest.mark.parametrize("damage", ["missing", "one letter"])
def test_a_damaged_state_file_is_made_good_by_the_other_copy(killed, damage):
    state = killed.state_folder / "state.json"
    if damage == "missing":
        state.unlink()
    else:
        state.write_text(state.read_text().replace("before the damage", "before the damagf"))
    status = started(killed)
    assert (status["state"], [cause["reason"] for cause in status["causes"]]) == ("KILLED", ["before the damage"])
    assert killed.gate().status == 403
    assert killed.wait_audit("state.restored", count=2)["data"]["state"] == "KILLED"
    killed.wait_status("a new copy", lambda status: status["durable"])
    assert json.loads(state.read_text())["state"] == "KILLED"


def test_with_both_copies_damaged_it_starts_killed_and_says_so(sidecar):
    switch = sidecar()
    switch.wait_status("the first state", lambda status: status["durable"])
    switch.kill9()
    for name in ("state.json", "state.json.bak"):
        (switch.state_folder / name).write_bytes(b"{}")
    status = started(switch)
    assert (status["state"], [cause["code"] for cause in status["causes"]]) == ("KILLED", ["state_lost"])
    switch.wait_gate(403, "killed")
    assert switch.recover().status == 200


@pytest.mark.parametrize(
    ("change", "named"),
    [({"version": 99}, ("99", "1")), ({"switch": "e2e/another"}, ("e2e/another", "e2e/c"))],
    ids=["of a newer version", "of another switch"],
)
def test_a_state_that_is_not_ours_is_left_alone_and_the_gate_denies(killed, change, named):
    """The checksum of a changed file no longer fits, so it is made anew as the sidecar makes it."""
    from sidecar.adapters.state_file import encode

    files = [killed.state_folder / name for name in ("state.json", "state.json.bak")]
    for file in files:
        document = json.loads(file.read_text())
        if "switch" in change:
            kept = {key: value for key, value in document.items() if key not in ("version", "checksum")}
            file.write_bytes(encode({**kept, **change}, switch=change["switch"]))
        else:
            file.write_text(json.dumps({**document, **change}))
    before = [file.read_bytes() for file in files]
    killed.start()
    killed.wait_gate(403, "not_ready")
    status = killed.status()
    assert all(name in status["not_ready_reason"] for name in named), status["not_ready_reason"]
    assert killed.gate(intent="cancel").status == 200
    assert set(killed.states().values()) == {0.0}
    assert killed.control("POST", "/api/v1/trigger", {"reason": "stop"}).status == 503
    killed.assert_gate_stays(403, killed.gate().reason, seconds=0.5)
    assert killed.terminate() == 0
    assert [file.read_bytes() for file in files] == before


def test_a_state_put_back_to_an_earlier_day_is_killed(sidecar):
    switch = sidecar()
    switch.wait_status("the first state", lambda status: status["durable"])
    old = switch.folder / "old"
    old.mkdir()
    for name in ("state.json", "state.json.bak"):
        shutil.copy(switch.state_folder / name, old)
    switch.kill_switch(reason="newer than the copy")
    switch.wait_audit("switch.killed")
    switch.kill9()
    shutil.copy(old / "state.json.bak", switch.state_folder)
    (switch.state_folder / "state.json").write_bytes(b"cut off")
    status = started(switch)
    assert status["state"] == "KILLED"
    assert switch.gate().status == 403
    switch.kill9()
    for name in ("state.json", "state.json.bak"):
        shutil.copy(old / name, switch.state_folder)
    status = started(switch)
    assert (status["state"], status["causes"][0]["code"]) == ("KILLED", "state_rolled_back")


def test_without_its_files_but_with_its_audit_a_kill_is_not_forgotten(killed):
    for name in ("state.json", "state.json.bak"):
        (killed.state_folder / name).unlink()
    status = started(killed)
    assert (status["state"], status["causes"][0]["code"]) == ("KILLED", "state_lost")


def test_a_second_sidecar_on_the_same_folder_exits_and_disturbs_nothing(sidecar, make_sidecar, shared_prometheus):
    switch = sidecar()
    epoch, page = switch.status()["epoch"], switch.page.stat().st_ino
    second = make_sidecar(None, [shared_prometheus.url])
    second.config = json.loads(json.dumps(switch.config))
    second.write_config()
    second.launch()
    assert second.process.wait(timeout=15) == 1
    second.process = None
    assert "held by another sidecar" in second.log_file.read_text()
    assert switch.gate().decided == (200, "active")
    assert switch.gate(unix=True).decided == (200, "active")
    assert (switch.status()["epoch"], switch.page.stat().st_ino) == (epoch, page)
    from sidecar.client import ExecutionGate

    gate = ExecutionGate(page=switch.page)
    assert gate.check_can_execute()
    gate.close()
    assert switch.kill_switch()["state"] == "KILLED"


@pytest.fixture
def hang():
    """Makes every fsync of a process wait, by strace; calling the result's `release` ends that."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    tracers = []

    class Hang:
        def __init__(self, pid):
            self.process = subprocess.Popen(
                [
                    *("strace", "-f", "-qq", "-o", "/dev/null", "-p", str(pid), "-e", "trace=fsync,fdatasync"),
                    *("-e", "inject=fsync,fdatasync:delay_enter=60s"),
                ],
                stderr=subprocess.PIPE,
            )
            tracers.append(self)

        def release(self):
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGINT)
            try:
                self.process.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.communicate()

    yield Hang
    for tracer in tracers:
        tracer.release()


def is_traced(pid):
    """Whether every thread of a process has a tracer."""
    texts = [(task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return all("TracerPid:\t0\n" not in text for text in texts)


def test_a_storage_that_hangs_delays_no_kill_and_the_answer_says_not_durable(sidecar, hang, wait, drawdown):
    switch = sidecar()
    switch.wait_status("the first state", lambda status: status["durable"])
    slow = hang(switch.process.pid)
    wait(lambda: is_traced(switch.process.pid), "strace to hold every thread")

    began = time.monotonic()
    answer = switch.control("POST", "/api/v1/trigger", {"reason": "stop", "by": "alice"})
    assert 1.9 <= time.monotonic() - began <= 3.5
    assert (answer.status, answer.document["state"], answer.document["durable"]) == (503, "KILLED", False)
    assert switch.gate().decided == (403, "killed")
    assert switch.status()["durable"] is False
    assert switch.states()["KILLED"] == 0.0  # exported only once it is durable
    by_hand = switch.cli("trigger", "--reason", "stop again", "--confirm")
    assert by_hand.returncode == 1
    assert "blocked, NOT durable" in by_hand.stdout + by_hand.stderr

    slow.release()
    status = switch.wait_status("the kill to be durable", lambda status: status["durable"])
    assert status["state"] == "KILLED"
    assert switch.states()["KILLED"] == 1.0
    switch.restart()
    switch.wait_gate(403, "killed")
    assert [cause["reason"] for cause in switch.status()["causes"]] == ["stop", "stop again"]


def test_a_storage_that_hangs_keeps_a_recovery_from_opening_the_gate(sidecar, hang, wait):
    switch = sidecar(recovery={"cooldown": "1s"})
    switch.kill_switch()
    assert switch.recover().status == 200
    slow = hang(switch.process.pid)
    wait(lambda: is_traced(switch.process.pid), "strace to hold every thread")
    switch.assert_gate_stays(403, "recovering", seconds=2.5)
    slow.release()
    switch.wait_gate(200, "active")


def test_a_kill_while_a_loosening_hangs_in_the_storage_wins(sidecar, hang, wait):
    switch = sidecar(recovery={"cooldown": "1s"})
    switch.kill_switch()
    assert switch.recover().status == 200
    slow = hang(switch.process.pid)
    wait(lambda: is_traced(switch.process.pid), "strace to hold every thread")
    switch.assert_gate_stays(403, "recovering", seconds=1.5)  # the reopening is on its way to the disk
    assert switch.control("POST", "/api/v1/trigger", {"reason": "no, stop"}).status == 503
    assert switch.gate().decided == (403, "killed")
    slow.release()
    switch.wait_status("the kill to be durable", lambda status: status["durable"])
    assert switch.gate().decided == (403, "killed")
    switch.restart()
    switch.wait_gate(403, "killed")
    assert switch.status()["stage"] == "NONE"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few pages."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_delays_no_kill_and_the_kill_is_written_once_there_is_room(sidecar, small_disk):
    switch = sidecar(storage={"dir": str(small_disk / "state")})
    switch.wait_status("the first state", lambda status: status["durable"])
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(b"\0" * 512 * 1024)
    answer = switch.control("POST", "/api/v1/trigger", {"reason": "stop"})
    assert (answer.status, answer.document["durable"]) == (503, False)
    assert "space" in answer.document["detail"]
    assert switch.gate().decided == (403, "killed")
    assert any("space" in problem for problem in switch.status()["problems"])
    assert switch.metrics()["killswitch_state_write_failures_total"] > 0
    ballast.unlink()
    switch.wait_status("the kill to be durable", lambda status: status["durable"])
    switch.wait_audit("switch.killed")
    switch.restart()
    switch.wait_gate(403, "killed")
    assert switch.cli("audit", "verify").returncode == 0
