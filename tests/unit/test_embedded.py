"""The in-process switch: the same rules as the sidecar's, safe between threads, callbacks that cannot hold it up."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from sidecar import ExecutionGate, KillSwitch, TradingBlockedError
from sidecar.core.errors import ApprovalError, InvalidTransition, LockedOut
from sidecar.core.orders import Intent, Order, Side
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


def test_a_made_up_name_brings_no_new_attempts_at_the_one_code(clock: Clock) -> None:
    switch = switch_of(clock, approval_code="sesame")
    switch.trigger("stop")
    for number in range(5):
        with pytest.raises(ApprovalError, match="not that of this approver"):
            switch.request_recovery(by=f"n{number}", approval_code="wrong")
    with pytest.raises(LockedOut):
        switch.request_recovery(by="somebody else", approval_code="wrong")
    with pytest.raises(LockedOut):
        switch.request_recovery(by="ann", approval_code="sesame")
    clock.seconds += 30
    assert switch.request_recovery(by="ann", approval_code="sesame")


@pytest.mark.parametrize("code", ["", "\n", "\r\n"])
def test_an_empty_code_is_refused_and_never_means_that_none_is_needed(clock: Clock, code: str) -> None:
    with pytest.raises(ValueError, match="give the code to ask for, or None where none is needed"):
        switch_of(clock, approval_code=code)


@pytest.mark.parametrize("code", ["two\nlines", "x" * 1025])
def test_a_code_that_nobody_could_give_is_refused(clock: Clock, code: str) -> None:
    with pytest.raises(ValueError, match="approval code"):
        switch_of(clock, approval_code=code)


def test_the_line_break_at_the_end_of_a_code_is_no_part_of_it(clock: Clock) -> None:
    switch = switch_of(clock, approval_code="sesame\n")
    switch.trigger("stop")
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


BUY = {"symbol": "A", "side": "buy", "quantity": 1}
NO_NUMBERS = [
    float("nan"), float("inf"), 1e300, 1e-300, "nan", "1e31", True, [], object(), 10**400, 10**5000, -(10**5000),
    Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity"), Decimal("1e300"), Decimal("1." + "1" * 40),
]  # fmt: skip


@pytest.mark.parametrize("key", ["quantity", "position", "open_quantity", "position_limit"])
@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: hex(value) if type(value) is int else repr(value)[:20])
def test_what_the_gate_would_not_read_as_a_number_is_a_bad_order(clock: Clock, key: str, value: Any) -> None:
    switch = switch_of(clock)
    order = {**BUY, key: value}
    decision = switch.decide(order)
    assert (decision["decision"], decision["reason"]["code"]) == ("deny", "bad_order")
    assert key in decision["reason"]["message"]
    with pytest.raises(TradingBlockedError) as blocked:
        ExecutionGate(kill_switch=switch).check_can_execute(order)
    assert blocked.value.decision.code == "bad_order"


@pytest.mark.parametrize("order", [[1], "buy", 1, {}, {1: 2}, {**BUY, "postion": 1}, {**BUY, "symbol": 5}])
def test_what_is_no_order_is_a_bad_order(clock: Clock, order: Any) -> None:
    assert switch_of(clock).decide(order)["reason"]["code"] == "bad_order"


class Whole:
    """A whole number as numpy has them: no int, but as good as one."""

    def __index__(self) -> int:
        return 7


@pytest.mark.parametrize("value", [1, 10**30, 0.1, 1e-7, 1e22, Decimal("1e30"), "1e-30", Whole()])
def test_numbers_of_every_kind_that_the_gate_reads_are_taken(clock: Clock, value: Any) -> None:
    assert switch_of(clock).decide({**BUY, "quantity": value})["decision"] == "allow"


def test_an_order_object_is_bound_by_the_same_rules(clock: Clock) -> None:
    def asked(quantity: Decimal, **more: Any) -> Any:
        order = Order(intent=Intent.NEW, side=Side.SELL, quantity=quantity, position=Decimal(5), **more)
        return switch.decide(order)["reason"]["code"]

    switch = switch_of(clock, gate=GatePolicy(position_limits={"*": Decimal(100)}))
    assert asked(Decimal(105)) == "active"
    assert asked(Decimal(106)) == "over_limit"
    assert asked(Decimal(1), open_quantity=Decimal(105)) == "over_limit"
    assert asked(Decimal("1e300")) == asked(Decimal("NaN")) == asked(Decimal(0)) == "bad_order"
    switch.trigger("stop")
    assert switch.decide(Order(intent=Intent.CANCEL))["decision"] == "allow"


class BrokenClock(Clock):
    broken = False

    def __call__(self) -> Instant:
        if self.broken:
            raise OSError("no clock")
        return super().__call__()


def test_whatever_fails_inside_denies_all_but_cancels() -> None:
    clock = BrokenClock()
    switch = switch_of(clock)
    gate = ExecutionGate(kill_switch=switch)
    switch.trigger("stop")
    switch.request_recovery(by="ann")
    clock.seconds += 10
    clock.broken = True
    for order in (None, BUY):
        decision = switch.decide(order)
        assert (decision["decision"], decision["reason"]["code"]) == ("deny", "internal_error")
        assert "no clock" in decision["reason"]["message"]
    assert switch.check_and_block() is True
    with pytest.raises(TradingBlockedError, match="no clock"):
        gate.check_can_execute()
    assert switch.decide({"intent": "cancel"})["decision"] == "allow"
    assert switch.decide(Order(intent=Intent.CANCEL))["decision"] == "allow"
    clock.broken = False
    assert switch.decide()["decision"] == "allow"


class Awkward:
    """A value that answers every question with an error."""

    def __index__(self) -> int:
        raise RuntimeError("no number")

    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_a_value_that_raises_denies_an_order_and_not_a_cancel(clock: Clock) -> None:
    switch = switch_of(clock)
    assert switch.decide({**BUY, "quantity": Awkward()})["reason"]["code"] == "internal_error"
    assert switch.decide({"intent": "cancel", "quantity": Awkward()})["decision"] == "allow"


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
    switch = switch_of(clock)
    for restriction in ("none", 5):
        with pytest.raises(ValueError, match="halt or reduce_only"):
            switch.trigger("stop", restriction=restriction)  # type: ignore[arg-type]
    for restriction in ("stop", ""):
        with pytest.raises(ValueError, match="reduce_only or halt"):
            switch.trigger("stop", restriction=restriction)


@pytest.mark.parametrize(
    ("argument", "error", "wanted"),
    [
        ({"clock": time.time}, TypeError, r"clock gives .*; wanted Instant\(mono=…, wall=…\)"),
        ({"clock": Instant(mono=0.0, wall=0.0)}, TypeError, "clock is .*; wanted a function"),
        ({"recovery": {"cooldown": 5}}, TypeError, "recovery is .*; wanted a RecoveryPolicy"),
        ({"recovery": {}}, TypeError, "recovery is {}; wanted a RecoveryPolicy"),
        ({"gate": {"position_limits": {}}}, TypeError, "gate is .*; wanted a GatePolicy"),
        ({"approval_code": 12345}, TypeError, "approval_code is a int; wanted a text"),
        ({"approval_code": b"sesame"}, TypeError, "approval_code is a bytes; wanted a text"),
        ({"mode": "on"}, ValueError, "mode is 'on'; choose active, shadow, disabled"),
        ({"mode": None}, ValueError, "mode is None; choose active"),
        ({"name": ""}, ValueError, "name is ''; wanted a name"),
        ({"name": None}, TypeError, "name is a NoneType; wanted a text"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_refused_at_once(argument: Any, error: Any, wanted: str) -> None:
    with pytest.raises(error, match=wanted):
        KillSwitch(**argument)


def test_a_recovery_is_asked_for_by_somebody_and_in_text(clock: Clock) -> None:
    switch = switch_of(clock, approval_code="12345")
    switch.trigger("stop")
    refused: list[tuple[type[Exception], dict[str, Any]]] = [
        (ValueError, {"by": "", "approval_code": "12345"}),
        (ValueError, {"by": " ", "approval_code": "12345"}),
        (TypeError, {"by": None, "approval_code": "12345"}),
        (TypeError, {"by": "ann", "approval_code": 12345}),
        (TypeError, {"by": "ann", "approval_code": "12345", "reason": None}),
    ]
    for error, arguments in refused:
        with pytest.raises(error, match="wanted a"):
            switch.request_recovery(**arguments)
    assert switch.request_recovery(by="ann", approval_code="12345")
    with pytest.raises(ValueError, match="by is ''; wanted a name"):
        switch.cancel_recovery(by="")
    assert switch.get_status()["state"] == "RECOVERING"
    switch.cancel_recovery(by="ann")
    assert switch.get_status()["state"] == "KILLED"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((), "no reason given"),
        ((None,), "no reason given"),
        (("",), "no reason given"),
        ((" \n",), "no reason given"),
        ((Awkward(),), "no reason given"),
        ((RuntimeError("feed lost"),), "feed lost"),
        ((42,), "42"),
        ((" runaway ",), "runaway"),
    ],
)
def test_a_kill_stops_whatever_its_reason_is(clock: Clock, given: tuple[Any, ...], reason: str) -> None:
    switch = switch_of(clock)
    assert switch.trigger(*given, by=None) is True
    assert switch.check_and_block() is True
    cause = switch.get_status()["causes"][0]
    assert (cause["reason"], cause["by"]) == (reason, "operator")


def test_callbacks_have_run_in_the_callers_thread_when_trigger_returns_and_one_that_raises_stops_none(
    clock: Clock,
) -> None:
    switch = switch_of(clock)
    seen: list[tuple[object, bool, threading.Thread]] = []

    def broken(status: dict[str, object]) -> None:
        raise RuntimeError("callback")

    def note(status: dict[str, object]) -> None:
        seen.append((status["state"], switch.check_and_block(), threading.current_thread()))

    switch.register_on_kill(broken)
    switch.register_on_kill(note)
    assert switch.trigger("stop") is True
    assert seen == [("KILLED", True, threading.current_thread())]
    assert switch.trigger("again") is False
    assert len(seen) == 1


def test_a_callback_that_fails_or_hangs_delays_neither_the_kill_nor_the_other_threads(clock: Clock) -> None:
    switch, hang, called = switch_of(clock), threading.Event(), threading.Event()

    def broken(status: dict[str, object]) -> None:
        raise RuntimeError("callback")

    def slow(status: dict[str, object]) -> None:
        called.set()
        hang.wait(30)

    switch.register_on_kill(broken)
    switch.register_on_kill(slow)
    stopping = threading.Thread(target=switch.trigger, args=("stop",))
    stopping.start()
    try:
        assert called.wait(10)
        assert switch.check_and_block() is True
        assert switch.trigger("again") is False
        assert len(switch.get_status()["causes"]) == 2
        assert stopping.is_alive()
    finally:
        hang.set()
        stopping.join()


def test_callbacks_start_no_thread(clock: Clock) -> None:
    before = threading.active_count()
    switches = [switch_of(clock) for _ in range(20)]
    for switch in switches:
        switch.register_on_kill(lambda _: None)
        switch.register_on_recover(lambda _: None)
        switch.trigger("stop")
    assert threading.active_count() == before


def test_a_callback_may_call_the_switch_from_any_thread(clock: Clock) -> None:
    switch = switch_of(clock)

    def from_another_thread(_: object) -> None:
        other = threading.Thread(target=switch.trigger, args=("from another thread",), daemon=True)
        other.start()
        other.join(10)

    switch.register_on_kill(from_another_thread)
    switch.register_on_kill(lambda _: switch.trigger("from the callback"))
    switch.register_on_kill(lambda _: switch.register_on_kill(lambda _: None))
    switch.register_on_kill(lambda _: switch.request_recovery(by="bot"))
    switch.trigger("stop")
    status = switch.get_status()
    assert status["state"] == "RECOVERING"
    assert [cause["reason"] for cause in status["causes"]] == ["stop", "from another thread", "from the callback"]


@pytest.mark.parametrize(
    "look",
    [
        KillSwitch.complete_recovery,
        KillSwitch.check_and_block,
        KillSwitch.get_status,
        KillSwitch.decide,
        lambda switch: switch.position_limit_factor,
    ],
)
def test_reopening_is_told_by_whichever_call_finds_it(clock: Clock, look: Callable[[KillSwitch], object]) -> None:
    switch = switch_of(clock)
    seen: list[str] = []
    switch.register_on_recover(lambda status: seen.append(str(status["state"])))
    switch.trigger("stop")
    switch.request_recovery(by="ann")
    look(switch)
    assert seen == []
    clock.seconds += 10
    look(switch)
    look(switch)
    assert seen == ["ACTIVE"]


def test_reopening_is_told_to_those_who_registered(clock: Clock) -> None:
    switch = switch_of(clock)
    seen: list[str] = []
    switch.register_on_recover(lambda status: seen.append(str(status["state"])))
    switch.trigger("stop")
    switch.request_recovery(by="ann")
    clock.seconds += 10
    assert switch.complete_recovery()
    assert seen == ["ACTIVE"]


def test_a_check_that_finds_trading_open_does_not_allow_what_a_callback_stops_at_once(clock: Clock) -> None:
    switch = switch_of(clock)
    switch.register_on_recover(lambda _: switch.trigger("not yet"))
    switch.trigger("stop")
    switch.request_recovery(by="ann")
    clock.seconds += 10
    assert switch.decide(BUY)["decision"] == "deny"
    assert switch.get_status()["causes"][-1]["reason"] == "not yet"


def test_what_cannot_be_called_is_no_callback(clock: Clock) -> None:
    switch = switch_of(clock)
    for register in (switch.register_on_kill, switch.register_on_recover):
        with pytest.raises(TypeError, match="callback is 'print'; wanted a function"):
            register("print")  # type: ignore[arg-type]


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
