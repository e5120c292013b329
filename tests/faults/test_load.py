"""Many at once, while the switch is killed and recovers: every decision fits its moment, and nothing piles up."""

from __future__ import annotations

import json
import resource
import selectors
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.cast import ROOT, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.cast import Sidecar

pytestmark = pytest.mark.e2e

CONNECTIONS = 10_000
MORE_CONNECTIONS = 2_500  # 12,000 may be open
MEMORY_BYTES_A_CONNECTION = 8 * 1024
SECONDS = 20.0
MEMORY_BYTES = 12 * 1024 * 1024
QUESTION = b"GET /gate HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + 2000
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], wanted), max(before[1], wanted)))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def connected(port: int, count: int) -> list[socket.socket]:
    return [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(count)]


def answers_of_all(peers: list[socket.socket]) -> dict[bytes, int]:
    """Ask on every connection at once; returns how many answers began with which status line."""
    waiting = selectors.DefaultSelector()
    for peer in peers:
        peer.sendall(QUESTION)
        waiting.register(peer, selectors.EVENT_READ)
    found: dict[bytes, int] = {}
    deadline = time.monotonic() + 60
    while waiting.get_map() and time.monotonic() < deadline:
        for key, _ in waiting.select(1.0):
            peer = key.fileobj
            assert isinstance(peer, socket.socket)
            status = peer.recv(4096).partition(b"\r\n")[0]
            found[status] = found.get(status, 0) + 1
            waiting.unregister(peer)
    waiting.close()
    return found


def test_ten_thousand_connections_are_all_answered_and_cost_nothing_once_they_are_gone(
    many_descriptors: None, patient: Callable[..., Sidecar]
) -> None:
    switch = patient().start()
    switch.wait_gate(200, "active")
    assert switch.process is not None
    process = psutil.Process(switch.process.pid)
    before, descriptors = process.memory_info().rss, process.num_fds()
    peers = connected(switch.gate_port, CONNECTIONS)
    try:
        assert answers_of_all(peers) == {b"HTTP/1.1 200 OK": CONNECTIONS}
        taken = (process.memory_info().rss - before) / CONNECTIONS
        assert taken < MEMORY_BYTES_A_CONNECTION
        asked = time.monotonic()
        switch.kill_switch()
        took = time.monotonic() - asked
        assert answers_of_all(peers) == {b"HTTP/1.1 403 Forbidden": CONNECTIONS}
        print(
            f"\n{CONNECTIONS} connections: {taken:.0f} bytes each; a durable kill among them took {took * 1000:.0f} ms"
        )
    finally:
        for peer in peers:
            peer.close()
    wait_for(lambda: process.num_fds() <= descriptors + 5, "the connections to be gone")
    # They do not count any more either: together with these there would be too many.
    peers = connected(switch.gate_port, MORE_CONNECTIONS)
    assert answers_of_all(peers) == {b"HTTP/1.1 403 Forbidden": MORE_CONNECTIONS}
    for peer in peers:
        peer.close()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a trader was told; `number` counts the decisions of the sidecar."""

    asked: float
    told: float
    number: int
    decision: str
    reason: str
    state: str
    factor: float
    epoch: int | None


def answers_in(file: Path) -> Iterator[Answer]:
    with file.open() as lines:
        for line in lines:
            asked, told, identity, decision, reason, state, factor, epoch = json.loads(line)
            number = int(identity.rpartition("-")[2], 16)
            yield Answer(
                asked=asked,
                told=told,
                number=number,
                decision=decision,
                reason=reason,
                state=state,
                factor=factor,
                epoch=epoch,
            )


@dataclass(frozen=True, kw_only=True)
class Known:
    """Between these moments (monotonic seconds) the gate has to answer this."""

    begin: float
    end: float
    decision: str


def kill_and_recover(switch: Sidecar, until: float) -> Iterator[Known]:
    """Kill and recover in turn; what is certain meanwhile is given."""
    opened = time.monotonic()
    while time.monotonic() < until:
        time.sleep(0.3)
        asked = time.monotonic()
        yield Known(begin=opened, end=asked, decision="allow")
        switch.kill_switch()
        killed = time.monotonic()
        time.sleep(0.2)
        asked = time.monotonic()
        # Refused while a machine under such a load has Prometheus miss a scrape.
        wait_for(lambda: switch.recover().status == 200, "a recovery", patience=60)
        yield Known(begin=killed, end=asked, decision="deny")
        switch.wait_gate(200, "active", patience=60.0)
        opened = time.monotonic()


def test_every_decision_under_load_fits_the_state_of_its_moment_and_nothing_piles_up(
    patient: Callable[..., Sidecar], times: int, tmp_path: Path
) -> None:
    seconds = SECONDS * times
    recovery = {"cooldown": "100ms", "steps": [{"factor": 0.5}, {"factor": 1.0, "after": "200ms"}]}
    switch = patient(recovery=recovery, gate={"position_limits": {"*": 1000}}).start()
    switch.wait_gate(200, "active")
    assert switch.process is not None
    process = psutil.Process(switch.process.pid)
    result = tmp_path / "answers"
    arguments = [str(switch.gate_port), "64", str(result)]
    traders = subprocess.Popen([sys.executable, "tests/faults/traders.py", *arguments], cwd=ROOT)
    try:
        wait_for(lambda: result.exists() and result.stat().st_size > 100_000, "traders to trade", patience=60)
        list(kill_and_recover(switch, time.monotonic() + 1.0))  # whose scrypt takes its memory once
        settled, descriptors = process.memory_info().rss, process.num_fds()
        known = list(kill_and_recover(switch, time.monotonic() + seconds))
        grown, more = process.memory_info().rss - settled, process.num_fds() - descriptors
        assert traders.poll() is None
        traders.terminate()
        assert traders.wait(timeout=60) == 0
    finally:
        traders.kill()
        traders.wait()
    assert grown < MEMORY_BYTES, f"{grown} bytes more"
    assert abs(more) <= 8, f"{more} descriptors more"
    counts = check(result, known)
    kills = sum(1 for one in known if one.decision == "deny")
    print(
        f"\n{counts} decisions in {seconds:.0f} s, {kills} kills; memory {grown / 1024:+.0f} KiB, descriptors {more:+}"
    )
    assert kills >= 3
    assert switch.cli("audit", "verify").returncode == 0


def check(result: Path, known: list[Known]) -> dict[str, int]:
    """Hold every answer against what was certain at its time, and against every other answer."""
    counts = {"allow": 0, "deny": 0}
    states: dict[int, set[tuple[str, float]]] = {}
    ordered: list[tuple[int, float, float, int]] = []
    for answer in answers_in(result):
        counts[answer.decision] += 1
        assert (answer.decision == "allow") == (answer.state == "ACTIVE"), answer
        for span in known:
            if span.begin <= answer.asked and answer.told <= span.end:
                assert answer.decision == span.decision, (answer, span)
        if answer.epoch is not None:
            states.setdefault(answer.epoch, set()).add((answer.state, answer.factor))
        ordered.append((answer.number, answer.asked, answer.told, answer.epoch or -1))
    assert all(len(found) == 1 for found in states.values()), states  # an epoch stands for one state
    ordered.sort()
    numbers = [number for number, *_ in ordered]
    assert len(set(numbers)) == len(numbers)  # a decision has an id of its own
    newest, latest_asked = -1, float("-inf")
    for _, asked, told, epoch in ordered:
        assert told >= latest_asked, "a decision was numbered after one that was asked for when it had been told"
        latest_asked = max(latest_asked, asked)
        if epoch >= 0:
            assert epoch >= newest, "a decision by an older state came after one by a newer"
            newest = epoch
    assert min(counts.values()) > 0
    return counts
