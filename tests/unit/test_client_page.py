"""The client on a state page: freshness, damage, recovery, forks, threads, and orders decided from the page alone."""

import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from sidecar.adapters.state_page import StatePage
from sidecar.client import ExecutionGate, GateDecision, TradingBlockedError

LEASE = 500_000_000
LONG = 600_000_000_000
LAYOUT = struct.Struct("<8sQQIIdQQI")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.page"


@pytest.fixture
def page(path: Path) -> Iterator[StatePage]:
    page = StatePage.open(path, lease_ns=LONG)
    publish(page)
    yield page
    page.close()


def publish(page: StatePage, **changed: Any) -> None:
    snapshot = {"state": 0, "restriction": 0, "factor": 1.0, "epoch": 1, "now_ns": time.monotonic_ns()}
    page.publish(**(snapshot | changed))


def refused(gate: ExecutionGate, order: Any = None) -> GateDecision:
    with pytest.raises(TradingBlockedError) as caught:
        gate.check_can_execute(order)
    assert not caught.value.decision.allowed
    return caught.value.decision


def handmade(path: Path, **changed: Any) -> None:
    """Write a page with a right CRC, whatever it says."""
    said = {
        "magic": b"KSWPAGE1", "sequence": 2, "heartbeat": time.monotonic_ns(), "state": 0, "restriction": 0,
        "factor": 1.0, "epoch": 1, "lease": LONG,
    } | changed  # fmt: skip
    raw = LAYOUT.pack(*said.values(), 0)[:56]
    path.write_bytes(raw + struct.pack("<II", zlib.crc32(raw), 0))


def order(**changed: Any) -> dict[str, Any]:
    return {"intent": "new", "symbol": "A", "side": "buy", "quantity": 10} | changed


def test_a_fresh_free_page_allows_again_and_again(page: StatePage, path: Path) -> None:
    gate = ExecutionGate(page=path)
    assert gate.check_can_execute() is True
    assert gate.check_can_execute() is True
    assert not gate.is_blocked()
    assert gate.get_block_reason() is None
    assert gate.position_limit_factor == 1.0


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ({"state": 1, "restriction": 2, "factor": 0.0}, "killed"),
        ({"state": 2, "restriction": 2, "factor": 0.0}, "recovering"),
        ({"restriction": 2}, "halted"),
        ({"restriction": 1}, "reduce_only"),
        ({"state": 1, "restriction": 1, "factor": 0.0}, "killed"),
        ({"factor": 0.0}, "over_limit"),
    ],
)
def test_a_restriction_denies_at_once_and_its_end_allows_at_once(
    page: StatePage, path: Path, said: dict[str, Any], code: str
) -> None:
    gate = ExecutionGate(page=path)
    assert gate.check_can_execute()
    publish(page, **said)
    assert refused(gate).code == code
    assert gate.is_blocked()
    publish(page)
    assert gate.check_can_execute()


def test_a_throttled_page_wants_to_know_the_size_of_an_order(page: StatePage, path: Path) -> None:
    publish(page, factor=0.5)
    gate = ExecutionGate(page=path)
    for _ in range(3):  # the second look finds the page unchanged, which must not be a way round
        assert refused(gate).code == "blind_order"
    sized = {"symbol": "A", "side": "buy", "quantity": 5, "position": 0, "position_limit": 10}
    assert gate.check_can_execute(sized)
    assert gate.position_limit_factor == 0.5


@pytest.mark.parametrize("state", range(4))
@pytest.mark.parametrize("restriction", range(3))
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
def test_an_unchanged_page_gets_the_same_answer_again_in_every_state(
    page: StatePage, path: Path, state: int, restriction: int, factor: float
) -> None:
    publish(page, state=state, restriction=restriction, factor=factor)
    gate = ExecutionGate(page=path)
    answers = {gate.get_block_reason()}
    for _ in range(3):
        try:
            gate.check_can_execute()
            answers.add(None)
        except TradingBlockedError as blocked:
            answers.add(str(blocked))
    assert len(answers) == 1


def test_a_switch_in_shadow_mode_does_not_block(page: StatePage, path: Path) -> None:
    publish(page, state=1, restriction=0, factor=1.0)
    assert ExecutionGate(page=path).check_can_execute()


def test_a_disabled_switch_allows_whatever_is_well_formed(page: StatePage, path: Path) -> None:
    publish(page, state=3)
    gate = ExecutionGate(page=path)
    assert gate.check_can_execute(order(position=0, position_limit=1))
    assert refused(gate, order(quantity="x")).code == "bad_order"


@pytest.mark.parametrize("offset", range(64))
@pytest.mark.parametrize("bit", [0, 7])
def test_damage_at_any_byte_denies_even_after_an_allowed_check(
    page: StatePage, path: Path, offset: int, bit: int
) -> None:
    gate = ExecutionGate(page=path, timeout=0.001)
    assert gate.check_can_execute()
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1 << bit
    with path.open("r+b") as file:
        file.write(raw)
    assert refused(gate).code == "stale"
    assert refused(gate).code == "stale"
    assert gate.position_limit_factor == 0.0
    raw[offset] ^= 1 << bit
    with path.open("r+b") as file:
        file.write(raw)
    assert gate.check_can_execute()


@pytest.mark.parametrize("offset", range(56))
def test_a_page_without_its_right_crc_was_never_believed(path: Path, offset: int) -> None:
    handmade(path)
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 0x10
    path.write_bytes(raw)
    assert refused(ExecutionGate(page=path, timeout=0.001)).code == "stale"


@pytest.mark.parametrize(
    "beaten",
    [
        lambda now: now + 10_000_000_000,
        lambda now: now - LEASE - 1,
        lambda now: 0,
        lambda now: 2**64 - 1,
        lambda now: 1,
    ],
)
def test_a_heartbeat_in_the_future_or_beyond_the_lease_denies(path: Path, beaten: Callable[[int], int]) -> None:
    handmade(path, heartbeat=beaten(time.monotonic_ns()), lease=LEASE)
    decision = refused(ExecutionGate(page=path))
    assert (decision.code, decision.answered) == ("stale", False)


def test_age_is_counted_to_the_nanosecond_on_both_paths(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic_ns()
    handmade(path, heartbeat=now, lease=LEASE)
    gate = ExecutionGate(page=path)
    for _ in range(2):  # the first check reads everything, the second finds an unchanged page
        for age, allowed in ((-1, False), (0, True), (LEASE, True), (LEASE + 1, False)):
            monkeypatch.setattr("sidecar.client.time.monotonic_ns", lambda age=age: now + age)
            assert gate.is_blocked() is not allowed
            if allowed:
                assert gate.check_can_execute()
            else:
                assert refused(gate).code == "stale"


def test_a_stopped_writer_denies_and_a_new_beat_allows(path: Path) -> None:
    lease = 5_000_000_000  # less than any machine has been up for, so that there is a moment before it
    page = StatePage.open(path, lease_ns=lease)
    publish(page)
    gate = ExecutionGate(page=path)
    assert gate.check_can_execute()
    page.beat(time.monotonic_ns() - lease - 1)
    assert "lease" in refused(gate).message
    page.beat(time.monotonic_ns())
    assert gate.check_can_execute()
    page.close()
    assert "stopped" in refused(gate).message
    with_new_writer = StatePage.open(path, lease_ns=LONG)
    assert refused(gate).code == "stale"
    publish(with_new_writer)
    assert gate.check_can_execute()


def test_an_odd_sequence_for_ever_denies_and_is_waited_for_once(path: Path) -> None:
    handmade(path, sequence=3)
    gate = ExecutionGate(page=path)
    assert refused(gate).code == "stale"
    started = time.perf_counter()
    for _ in range(200):
        assert refused(gate).code == "stale"
    assert time.perf_counter() - started < 200 * 0.005 / 2


def test_a_write_that_ends_within_the_patience_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handmade(path, sequence=3)
    monkeypatch.setattr("sidecar.client.time.sleep", lambda _: handmade_in_place(path))
    assert ExecutionGate(page=path, timeout=1).check_can_execute()


def handmade_in_place(path: Path) -> None:
    handmade(path.with_suffix(".new"), sequence=4)
    with path.open("r+b") as file:
        file.write(path.with_suffix(".new").read_bytes())


@pytest.mark.parametrize("said", [{"state": 4}, {"restriction": 3}, {"factor": 1.5}, {"factor": float("nan")}])
def test_values_of_no_known_meaning_deny(path: Path, said: dict[str, Any]) -> None:
    handmade(path, **said)
    assert refused(ExecutionGate(page=path)).code == "internal_error"


def test_no_file_denies_until_there_is_one(path: Path) -> None:
    gate = ExecutionGate(page=path)
    assert "is the sidecar running" in refused(gate).message
    assert gate.position_limit_factor == 0.0
    path.write_bytes(b"")
    assert refused(gate).code == "stale"
    publish(StatePage.open(path, lease_ns=LONG))
    assert gate.check_can_execute()


def test_a_folder_made_anew_is_found_again(path: Path) -> None:
    old = StatePage.open(path, lease_ns=LONG)
    publish(old)
    gate = ExecutionGate(page=path)
    assert gate.check_can_execute()
    path.unlink()
    old.close()
    assert refused(gate).code == "stale"
    publish(StatePage.open(path, lease_ns=LONG))
    assert gate.check_can_execute()


def test_a_folder_or_fifo_instead_of_a_page_denies_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert refused(ExecutionGate(page=tmp_path / "fifo")).code == "stale"
    assert refused(ExecutionGate(page=tmp_path)).code == "stale"


def test_cancels_pass_without_a_page_and_after_close(path: Path, page: StatePage) -> None:
    nowhere = ExecutionGate(page=path.with_name("none"))
    assert nowhere.check_can_execute({"intent": "cancel"})
    gate = ExecutionGate(page=path)
    assert gate.check_can_execute()
    gate.close()
    gate.close()
    assert gate.check_can_execute({"intent": "cancel"})
    assert refused(gate).code == "internal_error"
    assert refused(gate, order()).code == "internal_error"
    assert gate.position_limit_factor == 0.0


def test_orders_on_a_free_page_need_no_numbers_but_their_own(page: StatePage, path: Path) -> None:
    gate = ExecutionGate(page=path)
    assert gate.check_can_execute(order())
    assert gate.check_can_execute(order(position=5))
    assert refused(gate, order(position_limit=100)).code == "bad_order"
    assert gate.check_can_execute(order(position=90, position_limit=100))
    decision = refused(gate, order(position=91, position_limit=100))
    assert (decision.code, decision.max_quantity, decision.limit) == ("over_limit", Decimal(9), Decimal(100))


def test_a_throttled_page_wants_position_and_limit(page: StatePage, path: Path) -> None:
    publish(page, factor=0.5)
    gate = ExecutionGate(page=path)
    assert refused(gate, order()).code == "bad_order"
    assert refused(gate, order(position=0)).code == "bad_order"
    assert refused(gate, order(position_limit=100)).code == "bad_order"
    assert gate.check_can_execute(order(quantity=50, position=0, position_limit=100))
    assert refused(gate, order(quantity=51, position=0, position_limit=100)).code == "over_limit"
    assert gate.check_can_execute(order(side="sell", quantity=5, position=80))  # an exit needs no limit


def test_reduce_only_lets_exits_out_and_nothing_else(page: StatePage, path: Path) -> None:
    publish(page, state=1, restriction=1, factor=0.0)
    gate = ExecutionGate(page=path)
    assert gate.check_can_execute(order(side="sell", quantity=80, position=80))
    assert refused(gate, order(side="sell", quantity=81, position=80)).code == "killed"
    assert refused(gate, order(side="sell", quantity=80, open_quantity=1, position=80)).code == "killed"
    assert refused(gate, order(side="buy", quantity=1, position=80)).code == "killed"
    assert refused(gate, order(side="sell", quantity=1)).code == "killed"
    assert refused(gate, order(side="sell", quantity=1, position=0, reduce_only=True)).code == "killed"


def test_on_stale_reduce_only_lets_exits_out_of_a_dead_page_but_never_out_of_a_halt(
    page: StatePage, path: Path
) -> None:
    gate = ExecutionGate(page=path, on_stale="reduce_only")
    leave, grow = order(side="sell", quantity=80, position=80), order(position=80)
    publish(page, restriction=2)
    assert refused(gate, leave).code == "halted"
    page.close()
    assert gate.check_can_execute(leave)
    assert refused(gate, grow).code == "stale"
    assert refused(gate, order(side="sell", quantity=-1, position=80)).code == "stale"
    assert refused(gate).code == "stale"
    assert refused(ExecutionGate(page=path), leave).code == "stale"


def test_a_forked_child_sees_the_same_page_live(page: StatePage, path: Path) -> None:
    gate = ExecutionGate(page=path)
    assert gate.check_can_execute()
    stopped, stop = os.pipe()
    checked, check = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            allowed = gate.check_can_execute()
            os.write(check, b"x")
            os.read(stopped, 1)
            os._exit(0 if (allowed, gate.is_blocked()) == (True, True) else 1)
        finally:
            os._exit(2)
    os.close(check)
    os.read(checked, 1)
    publish(page, state=1, restriction=2, factor=0.0)
    os.write(stop, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for end in (stopped, stop, checked):
        os.close(end)


def test_threads_never_see_a_mix_of_two_writes(page: StatePage, path: Path) -> None:
    gate = ExecutionGate(page=path, timeout=1)
    stop = threading.Event()
    wrong: list[GateDecision] = []

    def read() -> None:
        while not stop.is_set():
            decision = gate._decide(None, time.monotonic() + 1)
            pair = (decision.epoch or 0) % 2, decision.factor, decision.restriction
            if pair not in ((1, 1.0, "none"), (0, 0.0, "halt")):
                wrong.append(decision)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for epoch in range(2, 3000):
        odd = epoch % 2
        publish(page, restriction=0 if odd else 2, factor=float(odd), epoch=epoch)
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong


def test_close_while_others_read_raises_nothing_but_denials(page: StatePage, path: Path) -> None:
    def read(gate: ExecutionGate, outcomes: list[str]) -> None:
        try:
            while not gate.is_blocked() and gate.check_can_execute():
                pass
            gate.check_can_execute()
        except TradingBlockedError as blocked:  # anything else fails the test as an unhandled error of a thread
            outcomes.append(blocked.decision.code)

    for _ in range(50):
        gate = ExecutionGate(page=path)
        outcomes: list[str] = []
        reader = threading.Thread(target=read, args=(gate, outcomes))
        reader.start()
        gate.close()
        reader.join()
        assert outcomes == ["internal_error"]
