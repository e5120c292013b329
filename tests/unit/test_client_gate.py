"""What the client does whatever it asks: arguments, errors, context managers, asyncio, an in-process switch."""

import asyncio
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, localcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sidecar.client
from sidecar.adapters.state_page import StatePage
from sidecar.client import ExecutionGate, GateDecision, TradingBlockedError

HOUR = 3_600_000_000_000


@pytest.fixture
def page(tmp_path: Path) -> Iterator[StatePage]:
    page = StatePage.open(tmp_path / "state.page", lease_ns=HOUR)
    free(page)
    yield page
    page.close()


def free(page: StatePage) -> None:
    page.publish(state=0, restriction=0, factor=1.0, epoch=1, now_ns=time.monotonic_ns())


def kill(page: StatePage) -> None:
    page.publish(state=1, restriction=2, factor=0.0, epoch=2, now_ns=time.monotonic_ns())


class Switch:
    """An in-process switch that answers what it is told to."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.asked: list[object] = []

    def decide(self, order: object) -> object:
        self.asked.append(order)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


ALLOW = {
    "decision": "allow", "state": "ACTIVE", "restriction": "none", "position_limit_factor": 0.5, "switch": "bt",
    "reason": {"code": "active", "message": "no restriction"},
}  # fmt: skip
DENY = ALLOW | {"decision": "deny", "restriction": "halt", "reason": {"code": "killed", "message": "drawdown"}}


def refused(gate: ExecutionGate, order: Any = None) -> GateDecision:
    with pytest.raises(TradingBlockedError) as caught:
        gate.check_can_execute(order)
    return caught.value.decision


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"page": "/p", "socket": "/s"},
        {"page": "/p", "url": "http://127.0.0.1:1"},
        {"page": "/p", "kill_switch": Switch(ALLOW)},
        {"page": "/p", "expect_switch": "a"},
        {"page": "/p", "timeout": 0},
        {"page": "/p", "timeout": -1},
        {"page": "/p", "timeout": 61},
        {"page": "/p", "timeout": float("nan")},
        {"page": "/p", "timeout": True},
        {"page": "/p", "on_stale": "allow"},
        {"url": "https://127.0.0.1:1"},
        {"url": "http://trading.example:1"},
        {"url": "http://user@127.0.0.1:1"},
        {"url": "http://127.0.0.1:1/?a=b"},
        {"url": "http://127.0.0.1:99999"},
        {"url": "http://127.0.0.1:1/a b"},
        {"url": "http://127.0.0.1:1/\u00e4"},
        {"url": "127.0.0.1:9780"},
        {"url": ""},
    ],
)
def test_arguments_that_make_no_gate_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give exactly one|wanted|does not go with"):
        ExecutionGate(**arguments)


def test_something_that_is_no_switch_is_refused() -> None:
    with pytest.raises(TypeError, match="decide"):
        ExecutionGate(kill_switch=object())


def test_the_error_is_for_people_and_survives_a_process_pool(page: StatePage) -> None:
    kill(page)
    with pytest.raises(TradingBlockedError, match=r"trading is blocked \(killed\).*state KILLED") as caught:
        ExecutionGate(page=page.path).check_can_execute()
    copy = pickle.loads(pickle.dumps(caught.value))
    assert copy.decision == caught.value.decision


def test_a_function_behind_the_gate_is_called_or_not(page: StatePage) -> None:
    gate = ExecutionGate(page=page.path)
    assert gate.execute_with_gate(divmod, 7, 2) == (3, 1)
    assert gate.execute_with_gate(dict, a=1) == {"a": 1}
    kill(page)
    with pytest.raises(TradingBlockedError):
        gate.execute_with_gate(pytest.fail, "was called")


def test_the_context_manager_denies_on_entry_and_can_be_entered_again(page: StatePage) -> None:
    gate = ExecutionGate(page=page.path)
    for _ in range(2):
        with gate as same:
            assert same is gate
    with pytest.raises(KeyError), gate:
        raise KeyError
    kill(page)
    with pytest.raises(TradingBlockedError), gate:
        pytest.fail("was entered")


async def test_async_with_reads_a_page_inline(page: StatePage) -> None:
    gate = ExecutionGate(page=page.path)
    async with gate as same:
        assert same is gate
    kill(page)
    with pytest.raises(TradingBlockedError):
        async with gate:
            pytest.fail("was entered")


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


async def test_a_hanging_sidecar_does_not_hold_up_the_event_loop(silent: socket.socket) -> None:
    gate = ExecutionGate(url=f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.3)
    turns = 0

    async def live() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.01)
            turns += 1

    living = asyncio.create_task(live())
    with pytest.raises(TradingBlockedError, match="stale"):
        async with gate:
            pytest.fail("was entered")
    living.cancel()
    assert turns > 10
    assert await gate.check_can_execute_async({"intent": "cancel"})
    gate.close()


async def test_an_executor_without_a_free_thread_denies_in_time(silent: socket.socket) -> None:
    release = threading.Event()
    executor = ThreadPoolExecutor(1)
    asyncio.get_running_loop().set_default_executor(executor)
    executor.submit(release.wait)
    gate = ExecutionGate(url=f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.05, on_stale="reduce_only")
    with pytest.raises(TradingBlockedError, match="executor"):
        await gate.check_can_execute_async()
    assert await gate.check_can_execute_async({"side": "buy", "quantity": 1, "position": -1})
    release.set()
    gate.close()


@pytest.mark.parametrize("shape", [dict, SimpleNamespace])
def test_an_in_process_switch_decides(shape: Any) -> None:
    order = {"intent": "new", "side": "buy", "quantity": 1}
    switch = Switch(shape(**ALLOW))
    gate = ExecutionGate(kill_switch=switch, expect_switch="bt")
    assert gate.check_can_execute(order)
    assert gate.check_can_execute({"intent": "cancel"})
    assert switch.asked == [order]
    assert gate.position_limit_factor == 0.5
    switch.answer = shape(**DENY)
    assert (refused(gate).code, refused(gate).message) == ("killed", "drawdown")
    assert gate.position_limit_factor == 0.0


@pytest.mark.parametrize(
    "answer",
    [None, True, {}, {"decision": "allow"}, ALLOW | {"switch": "other"}, ALLOW | {"decision": 1}, OSError("x")],
)
def test_an_in_process_switch_that_answers_nonsense_denies(answer: object) -> None:
    gate = ExecutionGate(kill_switch=Switch(answer), expect_switch="bt", on_stale="reduce_only")
    assert refused(gate, {"side": "sell", "quantity": 1, "position": 1}).code == "internal_error"
    assert gate.position_limit_factor == 0.0


@pytest.mark.parametrize(
    "order", [[], "cancel", b"cancel", 1, {"intent"}, [{"intent": "cancel"}], ("intent", "cancel")]
)
def test_what_is_no_mapping_is_no_order(page: StatePage, order: Any) -> None:
    assert refused(ExecutionGate(page=page.path), order).code == "bad_order"


GOOD = {"intent": "new", "side": "buy", "quantity": 1, "position": 0, "open_quantity": 0, "position_limit": 10}
NO_NUMBERS = [
    float("nan"), float("inf"), -float("inf"), "NaN", "Infinity", "", " 1", "1 ", "1_0", "0x1", "\u0661", "1,5",
    "--1", "1.", ".1",
    True, False, b"1", [], {}, object(), 1j, Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity"), 10**80, "1e99",
    "1e-99", "1" * 41, "1" * 10_000, "1e9999999999", Decimal("1e999999"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["quantity", "position", "open_quantity", "position_limit"])
@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: repr(value)[:20])
def test_what_is_no_number_makes_a_bad_order(page: StatePage, name: str, value: object) -> None:
    assert refused(ExecutionGate(page=page.path), GOOD | {name: value}).code == "bad_order"


@pytest.mark.parametrize(
    "wrong",
    [
        {"intent": "NEW"}, {"intent": "reduce"}, {"intent": False}, {"postion": 1}, {1: 2}, {"symbol": 1},
        {"symbol": "a" * 65},
        {"reduce_only": 1}, {"open_quantity": None}, {"intent": 1}, {"intent": ["new"]}, {"side": "BUY"},
        {"side": None}, {"side": ["buy"]}, {"quantity": 0}, {"quantity": -1}, {"quantity": None}, {"quantity": "-0"},
        {"open_quantity": -1}, {"position_limit": -1},
    ],
)  # fmt: skip
def test_a_malformed_order_is_denied(page: StatePage, wrong: dict[str, Any]) -> None:
    assert refused(ExecutionGate(page=page.path), GOOD | wrong).code == "bad_order"


class Index:
    def __index__(self) -> int:
        return 1


@pytest.mark.parametrize("one", [1, "1", "+1.0", "1e0", "0.1e1", 1.0, Decimal("1.00"), Index()])
def test_numbers_may_be_written_in_any_exact_way(page: StatePage, one: object) -> None:
    gate = ExecutionGate(page=page.path)
    assert gate.check_can_execute(GOOD | {"quantity": one, "position_limit": 1})
    assert refused(gate, GOOD | {"quantity": one, "position_limit": "0.99999999999999999999"}).code == "over_limit"


def test_decimals_are_exact_even_where_the_trading_code_set_few_digits(page: StatePage) -> None:
    gate = ExecutionGate(page=page.path)
    with localcontext() as context:
        context.prec = 2
        assert gate.check_can_execute(GOOD | {"quantity": 0.2, "position": 0.1, "position_limit": 0.3})
        tiny = "100000.000000000000000001"
        assert refused(gate, GOOD | {"quantity": tiny, "position_limit": 100000}).code == "over_limit"
        decision = refused(gate, GOOD | {"quantity": 5000, "position": "1.0000001", "position_limit": 1234})
        assert decision.max_quantity == Decimal("1232.9999999")


def test_a_hostile_mapping_is_denied_and_raises_nothing_of_its_own(page: StatePage) -> None:
    class Hostile(dict[str, Any]):
        def get(self, *_: object) -> Any:
            raise RuntimeError("boom")

    assert refused(ExecutionGate(page=page.path), Hostile()).code == "internal_error"


def test_the_file_runs_alone_without_the_package(tmp_path: Path) -> None:
    copied = tmp_path / "gate_client.py"
    copied.write_bytes(Path(sidecar.client.__file__).read_bytes())
    source = (
        "import sys, gate_client; g = gate_client.ExecutionGate(page='/nowhere');"
        "assert g.is_blocked(); assert not [m for m in sys.modules if m.split('.')[0] == 'sidecar']"
    )
    subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {source}"], check=True
    )
