"""docs/examples/state_page.h, compiled as C11 and as C++17, against the real writer and beside the Python client."""

import os
import re
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidecar.adapters.state_page import StatePage
from sidecar.client import ExecutionGate, TradingBlockedError
from tests.cast import ROOT, wait_for

pytestmark = pytest.mark.e2e

ALLOW, THROTTLED, REDUCE_ONLY, HALT, STALE = range(5)
LEASE = 3_600_000_000_000
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-Wshadow", "-Wconversion", "-Wsign-conversion", "-O2"]
COMPILERS = {"C11": ["gcc", "-std=c11"], "C++17": ["g++", "-std=c++17", "-x", "c++"]}
LAYOUT = struct.Struct("<8sQQIIdQQ")


@dataclass(frozen=True, kw_only=True)
class Answer:
    verdict: int
    state: int
    restriction: int
    factor: float
    epoch: int
    nanoseconds: int


class Probe:
    """The header in a process of its own, asked once a line."""

    def __init__(self, program: Path, page: Path) -> None:
        self.process = subprocess.Popen([program, page], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self) -> Answer:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        verdict, state, restriction, factor, epoch, took = self.process.stdout.readline().split()
        return Answer(
            verdict=int(verdict), state=int(state), restriction=int(restriction), factor=float(factor),
            epoch=int(epoch), nanoseconds=int(took),
        )  # fmt: skip

    def verdict(self) -> int:
        return self.ask().verdict

    def close(self) -> None:
        self.process.communicate(timeout=20)


@pytest.fixture(scope="module", params=COMPILERS.values(), ids=COMPILERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The probe, compiled with every warning an error."""
    built = tmp_path_factory.mktemp("probe") / "page_probe"
    source = ROOT / "tests" / "e2e" / "page_probe.c"
    command = [*request.param, *WARNINGS, "-I", str(ROOT / "docs" / "examples"), str(source), "-o", str(built)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return built


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.page"


@pytest.fixture
def page(path: Path) -> Iterator[StatePage]:
    page = StatePage.open(path, lease_ns=LEASE)
    publish(page)
    yield page
    page.close()


@pytest.fixture
def probe(program: Path, path: Path) -> Iterator[Probe]:
    probe = Probe(program, path)
    yield probe
    probe.close()


@pytest.fixture
def client(path: Path) -> Iterator[Callable[[], str | None]]:
    """What the Python client says of an order of unknown size: None where it passes, else the reason code."""
    gate = ExecutionGate(page=path)

    def code() -> str | None:
        try:
            gate.check_can_execute()
        except TradingBlockedError as blocked:
            return blocked.decision.code
        return None

    yield code
    gate.close()


def publish(page: StatePage, *, state: int = 0, restriction: int = 0, factor: float = 1.0, epoch: int = 1) -> None:
    page.publish(state=state, restriction=restriction, factor=factor, epoch=epoch, now_ns=time.monotonic_ns())


def handmade(path: Path, **changed: object) -> None:
    """Write in place a page with a right CRC, whatever it says."""
    said = {
        "magic": b"KSWPAGE1", "sequence": 2, "heartbeat": time.monotonic_ns(), "state": 0, "restriction": 0,
        "factor": 1.0, "epoch": 1, "lease": LEASE,
    } | changed  # fmt: skip
    raw = LAYOUT.pack(*said.values())
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.write(raw + struct.pack("<II", zlib.crc32(raw), 0))


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("restriction", range(3))
@pytest.mark.parametrize("state", range(4))
def test_it_agrees_with_the_python_client_in_every_state(
    page: StatePage, probe: Probe, client: Callable[[], str | None], state: int, restriction: int, factor: float
) -> None:
    publish(page, state=state, restriction=restriction, factor=factor, epoch=7)
    for _ in range(2):  # the second look finds the page unchanged
        said, code = probe.ask(), client()
        assert (said.state, said.restriction, said.factor, said.epoch) == (state, restriction, factor, 7)
        assert said.verdict == (ALLOW if factor == 1.0 else THROTTLED, REDUCE_ONLY, HALT)[restriction]
        assert (said.verdict == ALLOW) is (code is None)
        assert code != "stale"


FAR = (1 << 63) - 1
NOT_FRESH = {
    "an old heartbeat": lambda now: {"heartbeat": now - 10**9, "lease": 10**6},
    "older than the lease by a hair": lambda now: {"heartbeat": 1, "lease": now - 2},
    "a heartbeat from before a reboot": lambda now: {"heartbeat": now + 10**12},
    "a heartbeat of the far future": lambda now: {"heartbeat": FAR},
    "a heartbeat beyond all signed numbers": lambda now: {"heartbeat": FAR + 1 + now},
    "a heartbeat of the future with the largest lease": lambda now: {"heartbeat": now + 10**12, "lease": 2 * FAR + 1},
    "the largest heartbeat": lambda now: {"heartbeat": 2 * FAR + 1},
    "an orderly stop": lambda now: {"heartbeat": 0},
    "an orderly stop on a machine that has just started": lambda now: {"heartbeat": 0, "lease": FAR},
    "an orderly stop with the largest lease": lambda now: {"heartbeat": 0, "lease": 2 * FAR + 1},
    "no lease": lambda now: {"lease": 0},
    "another magic": lambda now: {"magic": b"KSWPAGE2"},
    "an odd sequence": lambda now: {"sequence": 3},
}


@pytest.mark.parametrize("said", NOT_FRESH.values(), ids=NOT_FRESH)
def test_it_calls_stale_what_nobody_vouches_for(
    path: Path, probe: Probe, client: Callable[[], str | None], said: Callable[[int], dict[str, object]]
) -> None:
    handmade(path)
    assert probe.verdict() == ALLOW
    assert client() is None
    handmade(path, **said(time.monotonic_ns()))
    assert [probe.verdict() for _ in range(3)] == [STALE] * 3
    assert client() == "stale"
    handmade(path, sequence=4)
    assert probe.verdict() == ALLOW
    assert client() is None


@pytest.mark.parametrize(
    "said",
    [
        {"state": 4},
        {"restriction": 3},
        {"factor": float("nan")},
        {"factor": -0.1},
        {"factor": 1.1},
        {"factor": float("inf")},
    ],
    ids=str,
)
def test_values_of_no_known_meaning_are_no_permission(
    path: Path, probe: Probe, client: Callable[[], str | None], said: dict[str, object]
) -> None:
    handmade(path, **said)
    assert probe.verdict() == HALT
    assert client() == "internal_error"


def test_damage_at_any_byte_is_no_permission_and_its_repair_is_one(path: Path, page: StatePage, probe: Probe) -> None:
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for offset in range(64):
            for bit in (0, 7):
                damaged = bytearray(whole)
                damaged[offset] ^= 1 << bit
                file.seek(0)
                file.write(damaged)
                assert probe.verdict() == STALE, (offset, bit)
                file.seek(0)
                file.write(whole)
                assert probe.verdict() == ALLOW, (offset, bit)


def test_a_page_left_half_written_is_waited_for_once(path: Path, page: StatePage, probe: Probe) -> None:
    handmade(path, sequence=9)
    first, *others = [probe.ask() for _ in range(6)]
    assert {one.verdict for one in (first, *others)} == {STALE}
    assert first.nanoseconds >= 5_000_000
    assert min(one.nanoseconds for one in others) < 2_500_000


def test_a_page_that_is_no_file_is_no_permission_until_there_is_one(path: Path, probe: Probe) -> None:
    assert probe.verdict() == STALE
    path.mkdir()
    assert probe.verdict() == STALE
    path.rmdir()
    os.mkfifo(path)
    assert probe.verdict() == STALE
    path.unlink()
    path.write_bytes(b"KSWPAGE1" * 7)
    assert probe.verdict() == STALE
    page = StatePage.open(path, lease_ns=LEASE)
    assert probe.verdict() == STALE
    publish(page)
    assert probe.verdict() == ALLOW
    page.close()
    assert probe.verdict() == STALE


def test_a_page_made_anew_elsewhere_is_found_when_the_old_one_is_stale(path: Path, probe: Probe) -> None:
    old = StatePage.open(path, lease_ns=LEASE)
    publish(old)
    assert probe.verdict() == ALLOW
    old.close()
    path.rename(path.with_suffix(".old"))
    assert probe.verdict() == STALE
    new = StatePage.open(path, lease_ns=LEASE)
    publish(new, factor=0.5)
    assert probe.verdict() == THROTTLED
    new.close()


def test_a_new_writer_makes_no_old_page_look_fresh(path: Path, probe: Probe) -> None:
    first = StatePage.open(path, lease_ns=LEASE)
    publish(first)
    assert probe.verdict() == ALLOW
    first.close()
    second = StatePage.open(path, lease_ns=LEASE)
    assert probe.verdict() == STALE
    publish(second, state=1, restriction=2, factor=0.0)
    assert probe.verdict() == HALT
    second.close()


WRITER = textwrap.dedent("""
    import sys, time
    from sidecar.adapters.state_page import StatePage
    page = StatePage.open(sys.argv[1], lease_ns=10**13)
    epoch = 0
    while True:
        epoch += 1
        odd = epoch & 1
        now = time.monotonic_ns()
        page.publish(state=odd, restriction=2 * odd, factor=0.25 if odd else 1.0, epoch=epoch, now_ns=now)
        if epoch == 1:
            print("ready", flush=True)
""")


@contextmanager
def writing(path: Path, source: str = WRITER) -> Iterator[subprocess.Popen[str]]:
    """A writer at full speed in a process of its own."""
    writer = subprocess.Popen([sys.executable, "-c", source, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        yield writer
    finally:
        writer.kill()
        writer.communicate(timeout=20)


def test_no_reader_accepts_a_mix_of_two_writes_at_full_speed(path: Path, program: Path) -> None:
    with writing(path):
        readers = [
            subprocess.Popen([program, path, "1000000", "500"], stdout=subprocess.PIPE, text=True) for _ in range(2)
        ]
        said = [reader.communicate(timeout=100)[0] for reader in readers]
    for line in said:
        found = {name: int(number) for name, number in re.findall(r"(\w+) (\d+)", line)}
        assert (found["torn"], found["backwards"]) == (0, 0), line
        assert found["reads"] >= 1_000_000, line
        assert found["changes"] >= 500, line  # the page was being written meanwhile


DYING_WRITER = textwrap.dedent("""
    import os, signal, sys, time
    from sidecar.adapters.state_page import StatePage

    class DyingMap:
        def __init__(self, real, stores):
            self.real, self.left = real, stores
        def __setitem__(self, where, what):
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
            self.real[where] = what

    page = StatePage.open(sys.argv[1], lease_ns=10**13)
    page.publish(state=0, restriction=0, factor=1.0, epoch=1, now_ns=time.monotonic_ns())
    page._map = DyingMap(page._map, int(sys.argv[2]))
    page.publish(state=1, restriction=2, factor=0.0, epoch=2, now_ns=time.monotonic_ns())
    os.kill(os.getpid(), signal.SIGKILL)
""")


def test_a_writer_killed_between_any_two_stores_leaves_the_old_page_the_new_one_or_none(
    path: Path, probe: Probe
) -> None:
    verdicts = []
    for stores in range(5):
        done = subprocess.run([sys.executable, "-c", DYING_WRITER, str(path), str(stores)], cwd=ROOT, check=False)
        assert done.returncode == -signal.SIGKILL
        verdicts.append(probe.verdict())
    assert verdicts == [ALLOW, STALE, STALE, STALE, HALT]


def test_it_sees_a_real_sidecar_stop_die_and_come_back(sidecar, program, wait) -> None:
    switch = sidecar()
    probe = Probe(program, switch.page)
    assert probe.verdict() == ALLOW
    switch.kill_switch()
    assert probe.verdict() == HALT
    assert probe.ask().state == 1
    switch.kill9()
    wait_for(lambda: probe.verdict() == STALE, "the page to be stale")
    switch.start()
    wait_for(lambda: probe.verdict() == HALT, "the page of the new sidecar")
    assert switch.terminate() == 0
    assert probe.verdict() == STALE
    probe.close()
