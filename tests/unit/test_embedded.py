"""The in-process switch: the same rules as the sidecar's, safe between threads, callbacks that cannot hold it up."""

import subprocess
import sys
import threading
from decimal import Decimal

import pytest

from sidecar import ExecutionGate, KillSwitch, TradingBlockedError
from sidecar.core.errors import ApprovalError, InvalidTransition, LockedOut
from sidecar.core.policy import GatePolicy, RecoveryPolicy, RestartStep
from sidecar.core.states import Instant

STEPS = (RestartStep(factor=0.5), RestartStep(factor=1.0, after=60.0))


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> Instant:
        return Instant(mono=self.seconds, wall=1.7e9 + self.seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def switch_of(clock: Clock, **options: object) -> KillSwitch:
    policy = RecoveryPolicy(cooldown=10.0, steps=STEPS)
    return KillSwitch("bot", recovery=policy, clock=clock, **options)  # type: ignore[arg-type]


def test_a_kill_blocks_and_an_approved_recovery_brings_trading_back_in_steps(clock: Clock) -> None:
    switch = switch_of(clock, approval_code="sesame")
    assert switch.check_and_block() is False
    assert switch.trigger("runaway") is True
    assert switch.trigger("again") is False
    assert switch.check_and_block() is True
    assert [cause["reason"] for cause in switch.get_status()["causes"]] == ["runaway", "again"]
    with pytest.raises(ApprovalError):
        switch.request_recovery(by="ann", approval_code="wrong")
    assert switch.request_recovery(by="ann", reason="fixed", approval_code="sesame") is True
    assert switch.complete_recovery() is False
    assert switch.check_and_block() is True
    clock.seconds += 10
    assert switch.complete_recovery() is True
    assert switch.position_limit_factor == 0.5
    clock.seconds += 60
    assert switch.position_limit_factor == 1.0
    assert switch.get_status()["stage"] == "COMPLETE"


def test_five_wrong_codes_lock_the_approver_out(clock: Clock) -> None:
    switch = switch_of(clock, approval_code="sesame")
    switch.trigger("stop")
    for _ in range(5):
        with pytest.raises(ApprovalError):
            switch.request_recovery(by="ann", approval_code="wrong")
    with pytest.raises(LockedOut):
        switch.request_recovery(by="ann", approval_code="sesame")
    clock.seconds += 30
    assert switch.request_recovery(by="ann", approval_code="sesame")


def test_a_recovery_without_a_kill_is_refused_and_its_code_not_looked_at(clock: Clock) -> None:
    switch = switch_of(clock, approval_code="sesame")
    with pytest.raises(InvalidTransition):
        switch.request_recovery(by="ann", approval_code="wrong")


def test_orders_are_decided_by_the_gates_own_arithmetic(clock: Clock) -> None:
    switch = switch_of(clock, gate=GatePolicy(position_limits={"*": Decimal(100)}))
    order = {"symbol": "A", "side": "buy", "quantity": 101, "position": 0}
    assert switch.decide(order)["reason"]["code"] == "over_limit"
    assert switch.decide({**order, "quantity": 0.1, "position": "99.9"})["decision"] == "allow"
    assert switch.decide({**order, "quantity": "much"})["reason"]["code"] == "bad_order"
    switch.trigger("stop", restriction="reduce_only")
    assert switch.decide({"symbol": "A", "side": "sell", "quantity": 5, "position": 5})["decision"] == "allow"
    assert switch.decide({"symbol": "A", "side": "sell", "quantity": 6, "position": 5})["decision"] == "deny"
    assert switch.decide({"intent": "cancel"})["decision"] == "allow"


def test_the_execution_gate_works_on_it(clock: Clock) -> None:
    switch = switch_of(clock)
    gate = ExecutionGate(kill_switch=switch, expect_switch="bot")
    assert gate.execute_with_gate(lambda: "sent") == "sent"
    switch.trigger("stop")
    with pytest.raises(TradingBlockedError) as blocked, gate:
        pytest.fail("a blocked gate let its body run")
    assert blocked.value.decision.code == "killed"
    assert gate.check_can_execute({"intent": "cancel"})


def test_a_disabled_switch_blocks_nothing_and_takes_no_commands(clock: Clock) -> None:
    switch = switch_of(clock, mode="disabled")
    with pytest.raises(InvalidTransition):
        switch.trigger("stop")
    assert switch.decide()["reason"]["code"] == "disabled"


def test_a_restriction_that_restricts_nothing_is_refused(clock: Clock) -> None:
    with pytest.raises(ValueError, match="halt or reduce_only"):
        switch_of(clock).trigger("stop", restriction="none")


def test_a_callback_that_fails_or_hangs_delays_neither_the_kill_nor_the_others(clock: Clock) -> None:
    switch, hang, called = switch_of(clock), threading.Event(), threading.Event()

    def broken(status: dict[str, object]) -> None:
        raise RuntimeError("callback")

    def slow(status: dict[str, object]) -> None:
        called.set()
        hang.wait(30)

    switch.register_on_kill(broken)
    switch.register_on_kill(slow)
    assert switch.trigger("stop") is True
    assert switch.check_and_block() is True
    assert called.wait(30)
    hang.set()


def test_reopening_is_told_to_those_who_registered(clock: Clock) -> None:
    switch, told = switch_of(clock), threading.Event()
    seen: list[str] = []

    def recovered(status: dict[str, object]) -> None:
        seen.append(str(status["state"]))
        told.set()

    switch.register_on_recover(recovered)
    switch.trigger("stop")
    switch.request_recovery(by="ann")
    clock.seconds += 10
    assert switch.complete_recovery()
    assert told.wait(30)
    assert seen == ["ACTIVE"]


def test_no_allowed_call_begins_after_trigger_has_returned() -> None:
    switch = KillSwitch("threads")
    gate = ExecutionGate(kill_switch=switch)
    returned, late, start = threading.Event(), [], threading.Barrier(17)

    def hammer() -> None:
        start.wait()
        for _ in range(2_000):
            stopped = returned.is_set()  # read before the check: an allow after this point would be one too many
            try:
                gate.check_can_execute()
            except TradingBlockedError:
                return
            if stopped:
                late.append(1)

    threads = [threading.Thread(target=hammer) for _ in range(16)]
    for thread in threads:
        thread.start()
    start.wait()
    switch.trigger("stop")
    returned.set()
    for thread in threads:
        thread.join()
    assert late == []


def test_the_client_is_imported_without_anything_but_the_standard_library() -> None:
    code = (
        "import sys, sidecar.client; "
        "print([n for n in sys.modules if n.partition('.')[0] in "
        "('aiohttp','yaml','pydantic','psutil','prometheus_client','click','httptools','uvloop')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
