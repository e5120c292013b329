"""A simulated trading process: exports its metrics and asks the gate before each order, as real trading code should.

Runs by itself: `python -m sidecar.demo.bot --gate http://127.0.0.1:9780`. It is told what to live through by lines on
standard input and says what happened by JSON lines on standard output. It decides nothing about kills: it asks.
"""

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Final, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, start_http_server

from sidecar.client import REASON_CODES, ExecutionGate, TradingBlockedError
from sidecar.demo.book import Book, Order

ORDERS_PER_SECOND: Final = 20.0
SYMBOL: Final = "DEMO"

COMMANDS: Final = {
    "drawdown RATIO": "the market gaps against the book, until its drawdown is RATIO (-0.18 is a loss of 18 %)",
    "recover": "the market comes back",
    "silence": "the heartbeat stops",
    "beat": "the heartbeat goes on",
    "disconnect": "the session with the exchange is lost",
    "connect": "it is there again",
}
"""What standard input may say, one a line; the end of it ends the bot."""


class Metrics:
    """What the bot exports: the names that the shipped rules ask for, and its own orders."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, registry=registry)

        self.drawdown = gauge("portfolio_drawdown_ratio", "Loss from the highest equity; 0 at the peak.")
        self.daily_pnl = gauge("daily_pnl_ratio", "Profit and loss of the day over the equity at its start.")
        self.heartbeat = gauge("trading_heartbeat_timestamp_seconds", "When the trading loop last came round.")
        self.connected = gauge("exchange_connected", "1 while the session with the exchange is up.")
        self.position = gauge("position_quantity", "Signed position.")
        self.sent = Counter("orders_sent_total", "Orders that went out.", registry=registry)
        self.refused = Counter(
            "orders_refused_total", "Orders that the gate refused, by its reason.", ["reason"], registry=registry
        )
        for code in sorted(REASON_CODES):
            self.refused.labels(code)


@dataclass(kw_only=True)
class Health:
    """What the bot pretends about itself."""

    beating: bool = True
    connected: bool = True


class Bot:
    """The trading loop.

    Args:
        gate: asked before each order.
        book: what is traded.
        metrics: what is exported.
        out: where events are written, one JSON object a line with `event` and `time` (Unix seconds).
    """

    def __init__(self, *, gate: ExecutionGate, book: Book, metrics: Metrics, out: TextIO) -> None:
        self._gate = gate
        self._book = book
        self._metrics = metrics
        self._out = out
        self._health = Health()
        self._sent = 0
        self._refused = 0
        self._verdict = ""

    def export(self) -> None:
        """Set all metrics to what is true now."""
        self._metrics.drawdown.set(self._book.drawdown)
        self._metrics.daily_pnl.set(self._book.daily_pnl)
        self._metrics.position.set(self._book.position)
        self._metrics.connected.set(1.0 if self._health.connected else 0.0)
        if self._health.beating:
            self._metrics.heartbeat.set_to_current_time()

    def turn(self) -> None:
        """Come round once: the price moves, and one order goes out if the gate lets it."""
        self._book.step()
        self.export()
        order = self._book.next_order()
        if order is not None:
            self._try(order)

    def flatten(self) -> None:
        """Close the position with one order, if the gate lets it, and say what is left."""
        position = self._book.position
        if position:
            self._try(Order(side="sell" if position > 0 else "buy", quantity=abs(position)))
        self.export()
        self.say("flattened", position=self._book.position, sent=self._sent)

    def _try(self, order: Order) -> None:
        try:
            self._gate.check_can_execute(
                {
                    "intent": "new",
                    "symbol": SYMBOL,
                    "side": order.side,
                    "quantity": order.quantity,
                    "position": self._book.position,
                }
            )
        except TradingBlockedError as blocked:
            self._not_sent(blocked)
        else:
            self._send(order)

    def _send(self, order: Order) -> None:
        """Where a real bot would write to its venue."""
        self._book.fill(order)
        self._sent += 1
        self._metrics.sent.inc()
        self._report("allowed")

    def _not_sent(self, blocked: TradingBlockedError) -> None:
        said = blocked.decision
        self._refused += 1
        self._metrics.refused.labels(said.code).inc()
        if said.code != "over_limit":  # about the size of this one order, not about trading
            self._report(said.code, message=said.message, trigger=said.trigger, release=said.release)

    def _report(self, verdict: str, **more: object) -> None:
        """Write what the gate says, when it says something else than before."""
        if verdict != self._verdict:
            self._verdict = verdict
            self.say("gate", verdict=verdict, sent=self._sent, refused=self._refused, **more)

    def obey(self, line: str) -> None:
        """Live through what a line of `COMMANDS` says; anything else is answered with what there is."""
        word, _, argument = line.strip().partition(" ")
        try:
            self._live_through(word, argument)
        except ValueError as error:
            self.say("not_understood", line=line.strip(), message=str(error), commands=list(COMMANDS))
            return
        self.export()
        # The time stands after the export: from here on whoever scrapes sees it.
        self.say("obeyed", command=word, drawdown=self._book.drawdown, daily_pnl=self._book.daily_pnl, sent=self._sent)

    def _live_through(self, word: str, argument: str) -> None:
        match word:
            case "drawdown":
                self._book.gap(float(argument))
            case "recover":
                self._book.close_gap()
            case "silence" | "beat":
                self._health.beating = word == "beat"
            case "disconnect" | "connect":
                self._health.connected = word == "connect"
            case _:
                raise ValueError(f"no command {word!r}")

    def say(self, event: str, **fields: object) -> None:
        """Write one event."""
        print(json.dumps({"event": event, "time": time.time(), **fields}), file=self._out, flush=True)


def trade(bot: Bot, lines: "SimpleQueue[str | None]") -> None:
    """Come round `ORDERS_PER_SECOND` times a second and obey lines as they come, until a None comes."""
    due = time.monotonic()
    while True:
        try:
            line = lines.get(timeout=max(0.0, due - time.monotonic()))
        except Empty:
            bot.turn()
            due = max(due + 1.0 / ORDERS_PER_SECOND, time.monotonic())
            continue
        if line is None:
            return
        if line.strip():
            bot.obey(line)


def _read_standard_input(lines: "SimpleQueue[str | None]", *, end_with_it: bool) -> None:
    # A file object of this thread's own: Python closes sys.stdin at its end, and would wait for the lock of this read.
    with open(0, encoding="utf-8", errors="replace", closefd=False) as stream:
        for line in stream:
            lines.put(line)
    if end_with_it:
        lines.put(None)  # whoever started the bot is gone


def _arguments(argv: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m sidecar.demo.bot",
        description="A simulated trading process that asks the gate before each order.",
        epilog="Lines on standard input: " + "; ".join(f"'{word}': {text}" for word, text in COMMANDS.items()),
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--gate", metavar="URL", help="the gate's address, http://127.0.0.1:9780")
    where.add_argument("--gate-socket", metavar="PATH", help="the gate's Unix socket")
    parser.add_argument("--metrics-address", default="127.0.0.1", help="where to export (default: 127.0.0.1)")
    parser.add_argument("--metrics-port", type=int, default=0, help="port of it; 0 takes a free one (default)")
    parser.add_argument(
        "--until-signal", action="store_true", help="go on when standard input ends; a container may have none"
    )
    parser.add_argument(
        "--flatten", action="store_true", help="close the position at the end, as far as the gate lets it"
    )
    parser.add_argument("--seed", type=int, default=7, help="of the price and the orders (default: 7)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Trade until standard input ends or SIGTERM comes; return 0."""
    options = _arguments(argv)
    lines: SimpleQueue[str | None] = SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: lines.put(None))
    disable_created_metrics()  # type: ignore[no-untyped-call]  # shipped without types
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    gate = ExecutionGate(url=options.gate, socket=options.gate_socket)
    bot = Bot(gate=gate, book=Book(seed=options.seed), metrics=metrics, out=sys.stdout)
    bot.export()
    server, thread = start_http_server(options.metrics_port, addr=options.metrics_address, registry=registry)
    try:
        bot.say("ready", metrics_port=server.server_port)
        ends = {"end_with_it": not options.until_signal}
        threading.Thread(target=_read_standard_input, args=(lines,), kwargs=ends, name="stdin", daemon=True).start()
        trade(bot, lines)
        if options.flatten:
            bot.flatten()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        gate.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
