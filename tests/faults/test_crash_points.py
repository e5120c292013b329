"""A crash at every system call: what the sidecar writes is traced, and each disk that a crash could leave is read back.

The sidecar is the real one, under strace, living through kills, recoveries, cancellations, a ladder, firing alerts, and
an audit that is rotated and packed all the while. Whoever is outside notes what was answered, and when. For a crash
before each call that changes the disk, and for every view of that disk (a SIGKILL leaves all of it, a power cut may
leave less), the start of a new process is asked what it makes of it.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import shutil
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import pytest

from sidecar.adapters import audit_log
from sidecar.adapters.audit_log import AuditLog
from sidecar.adapters.state_file import StateFolder
from sidecar.app.audit_trail import CHANGES
from sidecar.app.restore import Start, choose_start
from sidecar.core.events import CauseCode
from sidecar.core.policy import RecoveryPolicy
from sidecar.core.states import Instant, State
from sidecar.core.transitions import Policies
from tests.cast import wait_for
from tests.faults.traced_disk import TRACED, Disk, Operation, View, read_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.cast import Metric, Prometheus, Sidecar

pytestmark = pytest.mark.e2e

POLICIES = Policies(recovery=RecoveryPolicy(cooldown=60.0))
NEVER_OF_A_CRASH = {CauseCode.STATE_LOST, CauseCode.STATE_ROLLED_BACK}
AUDIT_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What somebody outside was told as durable, and when (Unix seconds); `alerts` were stored by then, and fire on."""

    time: float
    epoch: int
    state: str
    restriction: str
    factor: float
    alerts: frozenset[str] = frozenset()


@dataclass(kw_only=True)
class Witness:
    """Asks the sidecar all the time, and keeps every durable answer."""

    sidecar: Sidecar
    seen: list[Seen] = field(default_factory=list)
    firing: frozenset[str] = frozenset()
    _over: threading.Event = field(default_factory=threading.Event)

    def note(self, status: dict[str, Any]) -> None:
        if status["durable"]:
            self.seen.append(
                Seen(
                    time=time.time(),
                    epoch=status["epoch"],
                    state=status["state"],
                    restriction=status["restriction"],
                    factor=status["position_limit_factor"],
                    alerts=self.firing,
                )
            )

    def watch(self) -> None:
        while not self._over.is_set():
            self.note(self.sidecar.status())
            time.sleep(0.01)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)
        self.seen.sort(key=lambda seen: seen.time)


@dataclass(frozen=True, kw_only=True)
class Story:
    """What was written, what was told, and every state there was, by epoch."""

    switch: str
    folder: str
    operations: Sequence[Operation]
    seen: Sequence[Seen]
    states: dict[int, tuple[str, float, str]]


def _firing(name: str, status: str = "firing") -> dict[str, Any]:
    alert = {
        "status": status,
        "labels": {"alertname": name, "killswitch": "kill"},
        "annotations": {},
        "startsAt": "2026-01-02T03:04:05Z",
        "endsAt": "2026-01-02T03:05:05Z" if status == "resolved" else "0001-01-01T00:00:00Z",
        "fingerprint": f"{name:0>16}",
    }
    return {"version": "4", "groupKey": "g", "status": status, "receiver": "r", "alerts": [alert], "truncatedAlerts": 0}


def _live(sidecar: Sidecar, witness: Witness) -> None:
    """Every kind of durable change, and enough of them to fill several audit files."""
    witness.note(sidecar.kill_switch("first"))
    witness.note(sidecar.recover().document)
    sidecar.wait_status("the whole ladder", lambda status: status["position_limit_factor"] == 1.0)
    for name in ("aaaa", "bbbb"):
        assert sidecar.control("POST", "/api/v1/alertmanager", _firing(name)).status == 200
        witness.firing |= {name}
        witness.note(sidecar.status())
    assert sidecar.recover().status == 409  # an alert is firing: refused, audited, nothing changed
    for name in ("aaaa", "bbbb"):
        witness.firing -= {name}  # from here on either may be on the disk
        witness.note(sidecar.status())
        assert sidecar.control("POST", "/api/v1/alertmanager", _firing(name, "resolved")).status == 200
    for number in range(6):
        witness.note(sidecar.recover().document)
        witness.note(sidecar.control("DELETE", "/api/v1/recovery").document)
        witness.note(sidecar.kill_switch(f"again {number}"))
    witness.note(sidecar.recover().document)
    sidecar.wait_status("the first step", lambda status: status["position_limit_factor"] == 0.5)
    witness.note(sidecar.kill_switch("within the ladder"))


@pytest.fixture(scope="module")
def _strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")


@pytest.fixture
def story(
    _strace: None, make_sidecar: Callable[..., Sidecar], shared_prometheus: Prometheus, drawdown: Metric
) -> Story:
    rules = [drawdown.rule(), {"trigger": "external", "type": "alertmanager", "match": ["killswitch=kill"]}]
    steps = [{"factor": 0.5}, {"factor": 1.0, "after": "500ms"}]
    recovery = {"cooldown": "1s", "backoff": {"factor": 1}, "steps": steps}
    storage = {"audit": {"max_bytes": f"{AUDIT_BYTES}B"}}
    sidecar = make_sidecar(rules, [shared_prometheus.url], recovery=recovery, storage=storage)
    output = sidecar.folder / "trace"
    options = ("-D", "-ff", "-qq", "-ttt", "-y", "-xx", "-s", "100000000", "--seccomp-bpf")
    sidecar.wrapper = ("strace", *options, "-e", f"trace={TRACED}", "-o", str(output))
    sidecar.start()
    sidecar.wait_status("the gate to open", lambda status: status["ready"])
    with Witness(sidecar=sidecar) as witness:
        _live(sidecar, witness)
    sidecar.kill9()
    events = audit_log.read(sidecar.state_folder / "audit", types=set(CHANGES))
    states = {
        int(event["data"]["epoch"]): (event["to"], event["data"]["factor"], event["data"]["restriction"])
        for event in events
        if event["to"] is not None and "restriction" in event["data"]
    }
    return Story(
        switch=sidecar.name,
        folder=str(sidecar.state_folder),
        operations=read_trace(sorted(sidecar.folder.glob("trace.*")), sidecar.state_folder),
        seen=witness.seen,
        states=states,
    )


@dataclass(frozen=True, kw_only=True)
class CrashPoint:
    """A crash before the operation with this number, as found afterwards; `told` is the last that anybody knew."""

    number: int
    view: View
    told: Seen | None


def _crash_points(story: Story) -> Iterator[CrashPoint]:
    """All that make a difference: the same disk with the same knowledge of it is looked at once."""
    disk = Disk(story.folder)
    told: Seen | None = None
    waiting = iter(story.seen)
    following = next(waiting, None)
    looked_at: set[object] = set()
    for number, operation in enumerate(story.operations):
        while following is not None and following.time < operation.time:
            told, following = following, next(waiting, None)
        for view in disk.views():
            key = (tuple(sorted(view.files.items())), view.folders, told and (told.epoch, told.alerts))
            if key not in looked_at:
                looked_at.add(key)
                yield CrashPoint(number=number, view=view, told=told)
        disk.take(operation)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a new process makes of a disk."""

    start: Start
    problems: tuple[str, ...]
    newest_audited: int


def _start_on(folder: Path, switch: str) -> Found:
    """Open, mend, read and judge, as a new process does."""
    now = datetime.now(UTC)
    state = StateFolder.open(folder, switch=switch)
    try:
        audit = AuditLog.open(folder / "audit", max_bytes=AUDIT_BYTES, retention_seconds=None, now=now)
        try:
            loaded = state.load(newest_audit_epoch=audit.newest_epoch())
            audited = [one for one in audit_log.read(folder / "audit", types=set(CHANGES), limit=200) if one.get("to")]
            start = choose_start(loaded, audited, Instant(mono=1000.0, wall=now.timestamp()), POLICIES)
            report = audit_log.verify(folder / "audit")
            problems = tuple(f"{problem.file}:{problem.line}: {problem.what}" for problem in report.problems)
            return Found(start=start, problems=problems, newest_audited=audit.newest_epoch() or 0)
        finally:
            audit.close()
    finally:
        state.close()


def _strictness(state: tuple[str, float, str]) -> tuple[int, float]:
    return ["ACTIVE", "RECOVERING", "KILLED"].index(state[0]), -state[1]


def _is(told: Seen | None, epoch: int) -> bool:
    return told is not None and told.epoch == epoch


def _complaints(found: Found, point: CrashPoint, story: Story) -> Iterator[str]:
    """What is wrong with a start, given what had been told by then."""
    state, told = found.start.state, point.told
    yield from (f"audit: {problem}" for problem in found.problems)
    yield from (f"{cause.code} is no cause for a crash" for cause in state.causes if cause.code in NEVER_OF_A_CRASH)
    then = story.states.get(state.epoch)
    back = (state.state.value, state.factor, state.kill_restriction.label)
    # A save that was cut between its two copies was told to nobody: the stricter of the two is right then.
    if then is not None and back != then and (_strictness(back) < _strictness(then) or _is(told, state.epoch)):
        yield f"epoch {state.epoch} was {then} and comes back as {back}"
    if told is None:
        return
    if state.epoch < told.epoch:
        yield f"epoch {told.epoch} had been told as durable, and {state.epoch} came back"
    # A loosening is durable first and in force after, and its line says that it is in force: it may be one behind. The
    # approval that it rests on is not, and the line of the restart names the state that was found.
    behind = 0 if told.state == State.KILLED.value else 1
    if found.newest_audited < told.epoch - behind:
        yield f"epoch {told.epoch} had been told, and the audit knows {found.newest_audited}"
    firing = {alert.labels["alertname"] for alert in found.start.alerts.firing.values()}
    yield from (f"alert {name} had been stored, and does not fire" for name in told.alerts - firing)
    if told.state != State.ACTIVE.value and state.state is State.ACTIVE and state.epoch == told.epoch:
        yield f"{told.state} had been told, and ACTIVE came back"


# Each run of `make faults` lives as many lives, none of which writes quite the same.
@pytest.mark.parametrize("life", range(max(1, int(os.environ.get("FAULTS", "1")) // 5)))
def test_no_crash_at_any_system_call_loses_what_was_told(story: Story, tmp_path: Path, life: int) -> None:
    counts: dict[str, int] = {}
    complaints: list[str] = []
    epochs: set[int] = set()
    for number, point in enumerate(_crash_points(story)):
        folder = tmp_path / str(number)
        folder.mkdir()
        point.view.write(folder)
        found = _start_on(folder, story.switch)
        operation = story.operations[point.number]
        where = f"{point.view.kind} before {operation.call} {[path[-40:] for path in operation.paths]}"
        complaints += [f"{where}: {complaint}" for complaint in _complaints(found, point, story)]
        counts[point.view.kind] = counts.get(point.view.kind, 0) + 1
        epochs.add(found.start.state.epoch)
        shutil.rmtree(folder)
    print(f"\n{sum(counts.values())} crash points on {len(story.operations)} system calls: {counts}")
    assert complaints == []
    # The story was told to the end, and crashes were looked at all along it.
    assert sum(counts.values()) >= 1000
    # Whatever was told was on some disk. Two changes in quick succession may be saved as one.
    assert epochs >= {one.epoch for one in story.seen}
    assert len(epochs) > len(story.states) / 2
    assert {seen.state for seen in story.seen} == {"ACTIVE", "KILLED", "RECOVERING"}
    assert {len(seen.alerts) for seen in story.seen} == {0, 1, 2}
    assert any(operation.paths[-1].endswith(".jsonl.gz") for operation in story.operations), "no audit file was packed"


def _go_on(sidecar: Sidecar, told: list[Seen], over: threading.Event) -> None:
    """Kill, begin to recover and cancel until the sidecar dies; keep what was told as durable."""
    witness = Witness(sidecar=sidecar, seen=told)
    number = 0
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        while not over.is_set():
            number += 1
            witness.note(
                sidecar.control("POST", "/api/v1/trigger", {"reason": f"again {number}", "by": "ann"}).document
            )
            answer = sidecar.recover()
            if answer.status == 200:
                witness.note(answer.document)
                witness.note(sidecar.control("DELETE", "/api/v1/recovery").document)


def test_no_sigkill_at_any_moment_loses_what_was_told(patient: Callable[..., Sidecar], times: int) -> None:
    """The real thing, to see that the disk on paper is like the one below the sidecar."""
    chance = random.Random(7391)
    sidecar = patient(recovery={"cooldown": "1h", "health": {"sources_up": False}}).start()
    sidecar.wait_gate(200, "active")
    for _ in range(4 * times):
        told: list[Seen] = []
        over = threading.Event()
        trader = threading.Thread(target=_go_on, args=(sidecar, told, over))
        trader.start()
        wait_for(told.copy, "something to be told")
        time.sleep(chance.uniform(0.0, 0.4))
        sidecar.kill9()
        over.set()
        trader.join(30)
        sidecar.start()
        back = sidecar.wait_status("the stored state", lambda status: status["durable"])
        assert back["epoch"] >= told[-1].epoch
        assert back["state"] in {"KILLED", "RECOVERING"}
        assert [cause["code"] for cause in back["causes"] if cause["code"].startswith("state_")] == []
        if back["epoch"] == told[-1].epoch:
            assert back["state"] == told[-1].state
        assert sidecar.gate().status == 403
    assert sidecar.cli("audit", "verify").returncode == 0
