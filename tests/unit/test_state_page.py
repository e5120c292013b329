"""The writer's half of the state page, read back with an independent little reader."""

import os
import signal
import stat
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from sidecar.adapters.state_page import StatePage, StatePageError
from sidecar.client import ExecutionGate, TradingBlockedError

LEASE = 500_000_000
LAYOUT = struct.Struct("<8sQQIIdQQII")


def fields(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()[:64]
    names = ("magic", "sequence", "heartbeat", "state", "restriction", "factor", "epoch", "lease", "crc", "zero")
    found: dict[str, Any] = dict(zip(names, LAYOUT.unpack(raw), strict=True))
    found["crc_holds"] = found["crc"] == zlib.crc32(raw[:56])
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "state.page"


def test_a_new_page_says_halt_and_is_never_fresh(path: Path) -> None:
    StatePage.open(path, lease_ns=LEASE)
    found = fields(path)
    assert (found["magic"], found["restriction"], found["heartbeat"]) == (b"KSWPAGE1", 2, 0)
    assert (found["factor"], found["lease"], found["zero"], found["crc_holds"]) == (0.0, LEASE, 0, True)
    assert found["sequence"] == 2
    assert path.stat().st_size == 64


def test_every_published_field_stands_at_its_offset(path: Path) -> None:
    page = StatePage.open(path, lease_ns=LEASE)
    page.publish(state=1, restriction=1, factor=0.25, epoch=2**63 + 5, now_ns=123456789)
    raw = path.read_bytes()
    assert raw[0:8] == b"KSWPAGE1"
    assert struct.unpack_from("<Q", raw, 8) == (4,)
    assert struct.unpack_from("<Q", raw, 16) == (123456789,)
    assert struct.unpack_from("<I", raw, 24) == (1,)
    assert struct.unpack_from("<I", raw, 28) == (1,)
    assert struct.unpack_from("<d", raw, 32) == (0.25,)
    assert struct.unpack_from("<Q", raw, 40) == (2**63 + 5,)
    assert struct.unpack_from("<Q", raw, 48) == (LEASE,)
    assert struct.unpack_from("<I", raw, 56) == (zlib.crc32(raw[:56]),)
    assert raw[60:] == bytes(4)


def test_a_beat_changes_heartbeat_and_sequence_alone(path: Path) -> None:
    page = StatePage.open(path, lease_ns=LEASE)
    page.publish(state=0, restriction=0, factor=0.5, epoch=7, now_ns=1000)
    before = fields(path)
    page.beat(2000)
    after = fields(path)
    assert (after["heartbeat"], after["sequence"]) == (2000, 6)
    assert after["crc_holds"]
    same = ("state", "restriction", "factor", "epoch", "lease", "magic")
    assert [after[name] for name in same] == [before[name] for name in same]


def test_close_sets_the_heartbeat_to_zero_and_leaves_the_file(path: Path) -> None:
    page = StatePage.open(path, lease_ns=LEASE)
    page.publish(state=0, restriction=0, factor=1.0, epoch=1, now_ns=1000)
    page.close()
    page.close()
    found = fields(path)
    assert (found["heartbeat"], found["crc_holds"], found["restriction"]) == (0, True, 0)
    with pytest.raises(StatePageError, match="closed"):
        page.beat(1)


def test_a_new_writer_halts_the_page_of_the_old_one_in_place(path: Path) -> None:
    old = StatePage.open(path, lease_ns=LEASE)
    old.publish(state=0, restriction=0, factor=1.0, epoch=9, now_ns=time.monotonic_ns())
    inode, sequence = path.stat().st_ino, fields(path)["sequence"]
    StatePage.open(path, lease_ns=LEASE * 2)
    found = fields(path)
    assert path.stat().st_ino == inode
    assert (found["restriction"], found["heartbeat"], found["lease"], found["crc_holds"]) == (2, 0, LEASE * 2, True)
    assert found["sequence"] == sequence + 2


@pytest.mark.parametrize(
    ("left_behind", "after_first_write"), [(7, 8), (8, 10), (2**64 - 1, 0), (2**64 - 2, 0), (0, 2)]
)
def test_a_new_writer_continues_the_sequence_it_finds(path: Path, left_behind: int, after_first_write: int) -> None:
    path.parent.mkdir()
    path.write_bytes(b"KSWPAGE1" + struct.pack("<Q", left_behind) + bytes(48))
    page = StatePage.open(path, lease_ns=LEASE)
    assert fields(path)["sequence"] == after_first_write
    assert fields(path)["crc_holds"]
    page.beat(5)
    assert fields(path)["sequence"] == after_first_write + 2


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4096])
def test_a_file_of_any_size_is_taken_over_and_only_grown(path: Path, size: int) -> None:
    path.parent.mkdir()
    path.write_bytes(b"\xff" * size)
    inode = path.stat().st_ino
    StatePage.open(path, lease_ns=LEASE)
    assert (path.stat().st_ino, path.stat().st_size) == (inode, max(size, 64))
    assert fields(path)["crc_holds"]
    assert path.read_bytes()[64:] == b"\xff" * (size - 64)


def test_blocks_are_reserved_so_that_a_full_disk_cannot_kill_the_writer(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    os.truncate(path, 64)
    assert path.stat().st_blocks == 0
    page = StatePage.open(path, lease_ns=LEASE)
    os.fsync(page._fd)
    assert path.stat().st_blocks > 0


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_permissions_do_not_depend_on_the_umask(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "a" / "b" / "state.page"
    before = os.umask(umask)
    try:
        StatePage.open(path, lease_ns=LEASE)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    assert stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o755


def test_the_mode_of_an_existing_file_is_set_right(path: Path) -> None:
    path.parent.mkdir()
    path.touch(mode=0o600)
    StatePage.open(path, lease_ns=LEASE)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_symbolic_link_is_refused_and_its_target_untouched(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "victim"
    target.write_bytes(b"precious")
    path.parent.mkdir()
    path.symlink_to(target)
    with pytest.raises(StatePageError, match="symbolic link"):
        StatePage.open(path, lease_ns=LEASE)
    assert target.read_bytes() == b"precious"


def test_a_fifo_or_a_folder_in_its_place_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StatePageError, match="no regular file"):
        StatePage.open(tmp_path / "fifo", lease_ns=LEASE)
    with pytest.raises(StatePageError):
        StatePage.open(tmp_path, lease_ns=LEASE)


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StatePageError, match=r"file/state\.page") as caught:
        StatePage.open(tmp_path / "file" / "state.page", lease_ns=LEASE)
    assert caught.value.errno is not None


@pytest.mark.parametrize("lease", [0, -1, 2**64])
def test_a_lease_out_of_range_is_refused(path: Path, lease: int) -> None:
    with pytest.raises(ValueError, match="lease_ns"):
        StatePage.open(path, lease_ns=lease)
    assert not path.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"state": 4}, {"state": -1}, {"restriction": 3}, {"factor": 1.01}, {"factor": -0.1}, {"factor": float("nan")},
        {"factor": float("inf")}, {"epoch": -1}, {"epoch": 2**64}, {"now_ns": -1},
    ],
)  # fmt: skip
def test_a_snapshot_out_of_range_halts_the_page(path: Path, wrong: dict[str, float]) -> None:
    page = StatePage.open(path, lease_ns=LEASE)
    good = {"state": 0, "restriction": 0, "factor": 1.0, "epoch": 1, "now_ns": 5}
    page.publish(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shows halt"):
        page.publish(**(good | wrong))  # type: ignore[arg-type]
    page.beat(6)
    assert (fields(path)["restriction"], fields(path)["factor"]) == (2, 0.0)


def test_a_second_process_cannot_write_the_same_page(path: Path) -> None:
    page = StatePage.open(path, lease_ns=LEASE)
    page.publish(state=0, restriction=0, factor=1.0, epoch=1, now_ns=5)
    source = "import sys; from sidecar.adapters.state_page import StatePage; StatePage.open(sys.argv[1], lease_ns=1)"
    second = subprocess.run([sys.executable, "-c", source, str(path)], capture_output=True, text=True, check=False)
    assert "written by another process" in second.stderr
    assert fields(path)["heartbeat"] == 5


def test_a_writer_killed_between_any_two_stores_leaves_nothing_that_a_reader_accepts(path: Path) -> None:
    source = textwrap.dedent("""
        import os, signal, sys
        from sidecar.adapters.state_page import StatePage

        class DyingMap:
            def __init__(self, real, stores):
                self.real, self.left = real, stores
            def __setitem__(self, where, what):
                if self.left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.left -= 1
                self.real[where] = what

        page = StatePage.open(sys.argv[1], lease_ns=10**12)
        page.publish(state=0, restriction=0, factor=1.0, epoch=1, now_ns=int(sys.argv[3]))
        page._map = DyingMap(page._map, int(sys.argv[2]))
        page.publish(state=1, restriction=2, factor=0.0, epoch=2, now_ns=int(sys.argv[3]))
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    verdicts = []
    for stores in range(5):
        now = str(time.monotonic_ns())
        run = subprocess.run([sys.executable, "-c", source, str(path), str(stores), now], check=False)
        assert run.returncode == -signal.SIGKILL
        gate = ExecutionGate(page=path)
        try:
            gate.check_can_execute()
            verdicts.append("old")
        except TradingBlockedError as blocked:
            verdicts.append(blocked.decision.code)
    # Before the first store the old page stands; in the middle nothing does; after the last store the new one does.
    assert verdicts == ["old", "stale", "stale", "stale", "killed"]


def test_a_writer_killed_at_random_leaves_the_old_page_the_new_one_or_none(path: Path) -> None:
    source = textwrap.dedent("""
        import sys, time
        from sidecar.adapters.state_page import StatePage
        page = StatePage.open(sys.argv[1], lease_ns=10**12)
        print("ready", flush=True)
        epoch = 0
        while True:
            epoch += 1
            page.publish(state=epoch & 1, restriction=2 * (epoch & 1), factor=1.0 - (epoch & 1), epoch=epoch,
                         now_ns=time.monotonic_ns())
    """)
    reader = ExecutionGate(page=path)
    for delay_us in range(0, 4000, 200):
        with subprocess.Popen([sys.executable, "-c", source, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            until = time.monotonic_ns() + delay_us * 1000
            while time.monotonic_ns() < until:
                pass
            writer.kill()
        found = fields(path)
        try:
            reader.check_can_execute()
        except TradingBlockedError as blocked:
            said = blocked.decision
            whole_stop = (said.code, said.state, said.factor, said.epoch) == ("killed", "KILLED", 0.0, found["epoch"])
            assert whole_stop or (said.code == "stale" and (not found["crc_holds"] or found["heartbeat"] == 0))
        else:
            assert (found["crc_holds"], found["state"], found["restriction"], found["factor"]) == (True, 0, 0, 1.0)
    reader.close()
