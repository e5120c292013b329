"""The gate's own lease: an answer that nobody renewed is a denial, whatever the last snapshot allowed."""

from collections.abc import Generator

import pytest

from sidecar.adapters.gate_http import desk as desk_module
from sidecar.adapters.gate_http.desk import Desk, GateIntent, gate_key
from sidecar.core.policy import GatePolicy
from sidecar.core.snapshot import ALL_CLEAR, Reason, ReasonCode, Snapshot
from sidecar.core.states import Mode, Restriction, Stage, State

NEW = gate_key(GateIntent.NEW, head=False, close=False)
CANCEL = gate_key(GateIntent.CANCEL, head=False, close=False)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(desk_module, "monotonic", clock)
    return clock


def snapshot(restriction: Restriction = Restriction.NONE, reason: Reason = ALL_CLEAR) -> Snapshot:
    return Snapshot(
        switch="s",
        mode=Mode.ACTIVE,
        state=State.ACTIVE,
        stage=Stage.NONE,
        restriction=restriction,
        factor=1.0,
        epoch=1,
        since=0.0,
        gate_restriction=restriction,
        gate_factor=1.0,
        reason=reason,
    )


@pytest.fixture
def desk(clock: Clock) -> Desk:
    desk = Desk("s")
    desk.update(snapshot(), GatePolicy(lease_ms=500))
    desk.renew(clock.now)
    return desk


def reason_of(answer: bytes) -> str:
    return answer.split(b"X-Killswitch-Reason: ")[1].split(b"\r\n")[0].decode()


def check(desk: Desk) -> bytes:
    return last_of(desk.check(b'{"symbol":"A","side":"buy","quantity":1}'))


def last_of(steps: Generator[None, None, tuple[int, bytes]]) -> bytes:
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        return stop.value[1]


def test_within_the_lease_the_snapshot_answers(desk: Desk, clock: Clock) -> None:
    clock.now += 0.5
    assert reason_of(desk.answer(NEW)) == "active"


def test_after_the_lease_new_orders_are_denied_as_stale_and_cancels_pass(desk: Desk, clock: Clock) -> None:
    clock.now += 0.51
    assert desk.answer(NEW).startswith(b"HTTP/1.1 403")
    assert reason_of(desk.answer(NEW)) == "stale"
    assert b'"deny"' in check(desk)
    assert desk.answer(CANCEL).startswith(b"HTTP/1.1 200")


def test_a_list_that_was_begun_before_a_stop_allows_nothing_after_it(desk: Desk, clock: Clock) -> None:
    orders = ",".join(['{"symbol":"A","side":"buy","quantity":1}'] * 100)
    steps = desk.check(f"[{orders}]".encode())
    for _ in range(4):  # three of these are of reading the list; from then on it is being decided
        next(steps)
    clock.now += 3600
    body = last_of(steps)
    assert body.count(b'"deny"') == body.count(b'"code":"stale"') == 100


def test_a_new_snapshot_alone_does_not_renew_the_lease(desk: Desk, clock: Clock) -> None:
    clock.now += 3600
    desk.update(snapshot(), GatePolicy(lease_ms=500))
    assert reason_of(desk.answer(NEW)) == "stale"


def test_a_renewal_brings_the_newest_snapshot_back(desk: Desk, clock: Clock) -> None:
    clock.now += 3600
    assert reason_of(desk.answer(NEW)) == "stale"
    desk.renew(clock.now)
    assert reason_of(desk.answer(NEW)) == "active"


def test_a_halt_keeps_its_own_reason_after_the_lease(desk: Desk, clock: Clock) -> None:
    killed = Reason(code=ReasonCode.KILLED, message="killed")
    desk.update(snapshot(Restriction.HALT, killed), GatePolicy(lease_ms=500))
    clock.now += 3600
    assert reason_of(desk.answer(NEW)) == "killed"
