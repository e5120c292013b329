"""The simulated trading process: no order without an allowing gate, and an honest account of both."""

import io
import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from sidecar.client import GateDecision, TradingBlockedError
from sidecar.demo.book import Book, Order
from sidecar.demo.bot import COMMANDS, Bot, Metrics, trade

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


class Gate:
    """Answers with the codes it is given, then with the last one; `allowed` allows."""

    def __init__(self, *codes: str) -> None:
        self.codes = list(codes)
        self.asked: list[dict[str, Any]] = []

    def check_can_execute(self, order: dict[str, Any]) -> bool:
        self.asked.append(order)
        code = self.codes.pop(0) if len(self.codes) > 1 else self.codes[0]
        if code != "allowed":
            raise TradingBlockedError(GateDecision(allowed=False, code=code, message=f"because {code}"))
        return True


class Desk:
    """A bot with its parts at hand."""

    def __init__(self, *codes: str) -> None:
        self.gate = Gate(*codes)
        self.book = Book(seed=1)
        self.registry = CollectorRegistry()
        self.out = io.StringIO()
        self.bot = Bot(gate=self.gate, book=self.book, metrics=Metrics(self.registry), out=self.out)  # type: ignore[arg-type]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.getvalue().splitlines()]

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


def test_an_order_goes_out_only_after_the_gate_allowed_that_very_order() -> None:
    desk = Desk("allowed")
    position = 0
    for _ in range(100):
        desk.bot.turn()
    for order in desk.gate.asked:
        assert order["position"] == position
        position += order["quantity"] if order["side"] == "buy" else -order["quantity"]
    assert desk.book.position == position
    assert desk.value("orders_sent_total") == len(desk.gate.asked) > 50


@pytest.mark.parametrize("code", ["killed", "recovering", "stale", "not_ready", "over_limit", "internal_error"])
def test_a_refused_order_does_not_go_out_and_is_counted_by_its_reason(code: str) -> None:
    desk = Desk(code)
    for _ in range(5):
        desk.bot.turn()
    assert desk.book.position == 0
    assert desk.value("orders_sent_total") == 0
    assert desk.value("orders_refused_total", reason=code) == 5


def test_it_says_what_the_gate_says_only_when_that_changes() -> None:
    desk = Desk("stale", "stale", "allowed", "allowed", "over_limit", "allowed", "killed", "killed", "allowed")
    for _ in range(9):
        desk.bot.turn()
    said = [(event["verdict"], event["sent"], event["refused"]) for event in desk.events]
    assert said == [("stale", 0, 1), ("allowed", 1, 2), ("killed", 3, 4), ("allowed", 4, 5)]


def test_every_reason_has_a_series_from_the_start() -> None:
    text = generate_latest(Desk("allowed").registry).decode()
    assert 'orders_refused_total{reason="killed"} 0.0' in text
    assert 'orders_refused_total{reason="not_ready"} 0.0' in text


def test_a_drawdown_is_exported_before_it_is_reported() -> None:
    desk = Desk("allowed")
    before = time.time()
    desk.bot.obey("drawdown -0.18\n")
    (event,) = desk.events
    assert (event["event"], event["command"]) == ("obeyed", "drawdown")
    assert event["drawdown"] == pytest.approx(-0.18)
    assert desk.value("portfolio_drawdown_ratio") == pytest.approx(-0.18)
    assert desk.value("daily_pnl_ratio") == pytest.approx(-0.18)
    assert before <= event["time"] <= time.time()
    desk.bot.obey("recover")
    assert desk.value("portfolio_drawdown_ratio") == pytest.approx(0.0, abs=1e-6)


def test_silence_stops_the_heartbeat_and_not_the_trading() -> None:
    desk = Desk("allowed")
    desk.bot.turn()
    desk.bot.obey("silence")
    last = desk.value("trading_heartbeat_timestamp_seconds")
    desk.bot.turn()
    assert desk.value("trading_heartbeat_timestamp_seconds") == last
    assert desk.value("orders_sent_total") == 2
    desk.bot.obey("beat")
    beat = desk.value("trading_heartbeat_timestamp_seconds")
    assert beat is not None
    assert last is not None
    assert beat > last


def test_the_session_with_the_exchange_goes_and_comes() -> None:
    desk = Desk("allowed")
    desk.bot.export()
    assert desk.value("exchange_connected") == 1
    desk.bot.obey("disconnect")
    assert desk.value("exchange_connected") == 0
    desk.bot.obey("connect")
    assert desk.value("exchange_connected") == 1


@pytest.mark.parametrize("line", ["drawdown", "drawdown much", "drawdown 0.5", "drawdown nan", "sell everything"])
def test_a_line_that_is_not_understood_changes_nothing_and_says_what_there_is(line: str) -> None:
    desk = Desk("allowed")
    desk.bot.obey(line)
    (event,) = desk.events
    assert event["event"] == "not_understood"
    assert event["commands"] == list(COMMANDS)
    assert desk.book.drawdown == 0.0


@pytest.mark.parametrize(("code", "left"), [("allowed", 0), ("killed", 30)])
def test_the_position_is_closed_at_the_end_as_far_as_the_gate_lets_it(code: str, left: int) -> None:
    desk = Desk(code)
    desk.book.fill(Order(side="buy", quantity=30))
    desk.bot.flatten()
    assert [(order["side"], order["quantity"], order["position"]) for order in desk.gate.asked] == [("sell", 30, 30)]
    assert (desk.book.position, desk.events[-1]["position"], desk.value("position_quantity")) == (left, left, left)


def test_nothing_is_sent_to_close_no_position() -> None:
    desk = Desk("allowed")
    desk.bot.flatten()
    assert desk.gate.asked == []


def test_trading_obeys_lines_as_they_come_and_ends_with_the_last() -> None:
    desk = Desk("allowed")
    lines: SimpleQueue[str | None] = SimpleQueue()
    for line in ("drawdown -0.2", "", "silence", None, "recover"):
        lines.put(line)
    trade(desk.bot, lines)
    assert [event["command"] for event in desk.events] == ["drawdown", "silence"]


@pytest.fixture
def process() -> Any:
    argv = [sys.executable, "-m", "sidecar.demo.bot", "--gate", "http://127.0.0.1:9"]
    started = subprocess.Popen(
        argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def _ready(process: "subprocess.Popen[str]") -> int:
    assert process.stdout is not None
    event = json.loads(process.stdout.readline())
    assert event["event"] == "ready"
    return int(event["metrics_port"])


def test_a_scrape_shows_what_the_shipped_rules_ask_for(process: "subprocess.Popen[str]") -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{_ready(process)}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    samples = {line.split()[0].partition("{")[0] for line in text.splitlines() if not line.startswith("#")}
    assert samples >= {
        "portfolio_drawdown_ratio",
        "daily_pnl_ratio",
        "trading_heartbeat_timestamp_seconds",
        "exchange_connected",
        "orders_sent_total",
        "orders_refused_total",
    }


def test_the_process_ends_with_its_standard_input(process: "subprocess.Popen[str]") -> None:
    _ready(process)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")


def test_a_container_without_standard_input_goes_on_and_flattens_when_told_to_end() -> None:
    argv = [sys.executable, "-m", "sidecar.demo.bot", "--gate", "http://127.0.0.1:9", "--until-signal", "--flatten"]
    argv += ["--metrics-address", "0.0.0.0"]
    process = subprocess.Popen(
        argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        port = _ready(process)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)  # its standard input was at its end before it was ready
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).close()
        process.terminate()
        out, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert json.loads(out.splitlines()[-1])["event"] == "flattened"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_ends_in_order_when_it_is_told_to(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    _ready(process)
    process.send_signal(number)
    assert process.wait(20) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""
