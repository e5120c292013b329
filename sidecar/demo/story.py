"""The story of the demo: trading, a breach, the kill, a refused release, an approved one, and trading in steps again.

Everything is real but the market: it runs the programs and commands that a user runs and shows what they answer. Each
step waits for its condition, and one that does not come ends the story with a reason and the logs.
"""

import contextlib
import math
import os
import secrets
import shlex
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sidecar.demo.backstage import ENDING, POLL_SECONDS, Backstage, Json, StoryFailed
from sidecar.demo.bot import COMMANDS, SYMBOL
from sidecar.demo.stage import APPROVER, COOLDOWN, POSITION_LIMIT, STEPS, SWITCH, Stage
from sidecar.demo.timeline import Timeline

DRAWDOWN: Final = -0.18
RULE: Final = "portfolio_drawdown"
READING_SECONDS: Final = 2.5
"""Between acts, for a person at a terminal."""
PATIENCE_SECONDS: Final = 4.0
"""After this the story says what it is waiting for."""
READY_SECONDS: Final = 60.0
"""A connectivity rule that saw nothing at first looks again after its 30 s."""
INTERRUPTED: Final = 130
"""What shells report of a program that Ctrl-C ended."""


def run(*, keep_running: bool) -> int:
    """Tell the story on standard output, and end everything that was started for it.

    Args:
        keep_running: leave everything up at the end, until Ctrl-C.

    Returns:
        0 when every step came, 1 when one did not, 130 when it was broken off.
    """
    timeline = Timeline()
    with _signals_interrupt(), tempfile.TemporaryDirectory(prefix="killswitch-demo-") as root:
        stage = Stage.build(Path(root))
        backstage = Backstage(timeline=timeline, stage=stage, environ=os.environ)
        story = Story(timeline=timeline, stage=stage, backstage=backstage)
        with ExitStack() as stack:
            stack.callback(_end_undisturbed, backstage)
            return _tell(story, backstage, timeline, keep_running=keep_running)


def _tell(story: "Story", backstage: Backstage, timeline: Timeline, *, keep_running: bool) -> int:
    told = False
    try:
        story.tell()
        told = True
        if keep_running:
            story.stay()
    except StoryFailed as failure:
        timeline.moment("FAILED", str(failure))
        timeline.lines(backstage.logs())
        return 1
    except KeyboardInterrupt:
        timeline.lines(["", "Ended." if told else "Broken off."])
        return 0 if told else INTERRUPTED
    return 0


@dataclass(kw_only=True, slots=True)
class Measured:
    """What the summary is made of; times are Unix seconds of this machine."""

    causes: list[str] = field(default_factory=list)
    breach: float = 0.0
    blocked: float = 0.0
    reopened: float = 0.0
    sent_before_block: int = 0
    sent_while_blocked: int = 0
    refused_while_blocked: int = 0

    @property
    def breach_to_block_ms(self) -> float:
        """From the export of the bad value to the first refused order."""
        return (self.blocked - self.breach) * 1000.0


class Story:
    """One telling.

    Args:
        timeline: where it is told.
        stage: where everything stands.
        backstage: who starts, asks and waits.
    """

    def __init__(self, *, timeline: Timeline, stage: Stage, backstage: Backstage) -> None:
        self._timeline = timeline
        self._stage = stage
        self._backstage = backstage
        self._code = secrets.token_hex(4)
        self._measured = Measured()

    def tell(self) -> None:
        """Tell it once, from the first process to the summary.

        Raises:
            StoryFailed: a step did not come.
        """
        acts = (self._set_up, self._trade, self._breach, self._try_to_release, self._release, self._climb, self._sum_up)
        for act in acts:
            act()
            self._timeline.pause(READING_SECONDS)

    def stay(self) -> None:
        """Say where everything is and leave it up, until Ctrl-C.

        Raises:
            StoryFailed: a process ended.
            KeyboardInterrupt: as asked.
        """
        self._timeline.title("Still running, until Ctrl-C")
        self._timeline.lines(self._places())
        threading.Thread(target=self._hand_on_lines, name="standard input", daemon=True).start()
        while True:
            self._backstage.must_live()
            time.sleep(POLL_SECONDS * 4)

    # The acts

    def _set_up(self) -> None:
        say = self._timeline.moment
        self._timeline.lines(
            [
                "killswitch demo: a simulated trading bot beside a real sidecar, on 127.0.0.1.",
                f"Times are shortened: cooldown {COOLDOWN}, restart steps after {STEPS[1][1]} and {STEPS[2][1]}",
                "(by default 5m, 1h and 2h).",
            ]
        )
        self._timeline.title("Set-up")
        self._backstage.start_bot()
        say("bot", "sends about 20 orders a second, each only after the gate has allowed it")
        self._backstage.verdict("stale", seconds=20)
        say("refused", "no sidecar runs yet, and no answer is a denial: every order is refused")
        self._configure()
        if self._backstage.prometheus is None:
            say("source", "Prometheus is not installed: the sidecar scrapes the bot itself")
        else:
            version = self._backstage.start_prometheus(self._backstage.prometheus)
            say("source", f"Prometheus {version} scrapes the bot every second")
        self._backstage.start_sidecar()
        say("sidecar", f"guards {SWITCH} with the shipped default rules")

    def _configure(self) -> None:
        self._timeline.command_line(f"export KILLSWITCH_CONFIG={self._stage.config}")
        hashed = self._backstage.killswitch("hash-code", expected=0, code=self._code)
        self._timeline.moment("approver", f"{APPROVER}, with the code {self._code} (made for this run)")
        self._stage.write(
            metrics_port=self._backstage.metrics_port,
            with_prometheus=self._backstage.prometheus is not None,
            code_hash=hashed.strip().splitlines()[-1],
        )

    def _trade(self) -> None:
        stage = self._backstage
        self._wait_until_ready()
        first = stage.verdict("allowed", seconds=10)
        self._timeline.moment("ACTIVE", "every rule has had a fresh reading: the gate opens")
        stage.until("40 orders to go out", lambda: stage.bot_metric("orders_sent_total") > first["sent"] + 40, 20)
        self._timeline.moment("trading", f"orders flow: {stage.bot_metric('orders_sent_total'):.0f} sent so far")
        stage.killswitch("status", expected=0, most_lines=20)

    def _wait_until_ready(self) -> None:
        """Wait for the first fresh reading of every rule, and say what is missing if that takes long."""
        tell_at = self._timeline.elapsed + PATIENCE_SECONDS

        def look() -> bool:
            nonlocal tell_at
            status = self._backstage.status()
            if not status["ready"] and self._timeline.elapsed > tell_at:
                tell_at = math.inf
                self._timeline.moment("not ready", status["not_ready_reason"])
            return bool(status["ready"])

        self._backstage.until("the sidecar to be ready", look, READY_SECONDS)

    def _breach(self) -> None:
        measured, say = self._measured, self._timeline.moment
        self._timeline.title("Breach and kill")
        told = self._backstage.tell_bot(f"drawdown {DRAWDOWN}")
        say("breach", f"the market gaps: the bot now exports a drawdown of {told['drawdown']:.2f}")
        refused = self._backstage.verdict("killed", seconds=20, since=told["time"])
        status = self._backstage.until(f"a kill by {RULE}", self._killed_by_rule, 20)
        measured.breach, measured.blocked = told["time"], refused["time"]
        measured.sent_before_block = refused["sent"] - told["sent"]
        measured.sent_while_blocked, measured.refused_while_blocked = -refused["sent"], -refused["refused"] + 1
        measured.causes = [f"{cause['trigger'] or cause['by']}: {cause['reason']}" for cause in status["causes"]]
        for cause in measured.causes:
            say("KILL", cause)
        say("refused", f"the bot's next order: {refused['message']}")
        say("measured", f"{measured.breach_to_block_ms:.0f} ms from the bad value exported to the first refused order")
        self._backstage.killswitch("check", expected=3)
        self._backstage.killswitch("check --intent cancel", expected=0)

    def _killed_by_rule(self) -> Json | None:
        status = self._backstage.status()
        by_rule = any(cause["trigger"] == RULE for cause in status["causes"])
        return status if status["state"] == "KILLED" and by_rule else None

    def _try_to_release(self) -> None:
        self._timeline.title("Releases that are refused")
        self._recover("just restart it", code="not-the-code", expected=4)
        self._timeline.moment("refused", "a wrong code releases nothing")
        self._recover("it will be fine", code=self._code, expected=4)
        self._timeline.moment("refused", "nor does the right code, while a rule still fires")

    def _release(self) -> None:
        self._timeline.title("Approved recovery")
        told = self._backstage.tell_bot("recover")
        drawdown = round(told["drawdown"], 3) + 0.0  # never "-0.000"
        self._timeline.moment("market", f"comes back: the drawdown is {drawdown:.3f} again")
        self._backstage.until("all rules to be clear", self._is_clear, 20)
        self._timeline.moment("clear", "no rule fires any more; the switch stays KILLED until somebody releases it")
        self._recover("prices are back, positions reconciled", code=self._code, expected=0)
        self._backstage.until("RECOVERING", lambda: self._backstage.status()["state"] == "RECOVERING", 5)
        self._timeline.moment("cooldown", f"{COOLDOWN} in which the gate still denies")

    def _recover(self, reason: str, *, code: str, expected: int) -> None:
        line = f"recover --by {APPROVER} --reason {shlex.quote(reason)}"
        self._backstage.killswitch(line, expected=expected, code=code, most_lines=8)

    def _is_clear(self) -> bool:
        triggers = self._backstage.api("/api/v1/triggers")["triggers"]
        return all(trigger["status"] == "inactive" for trigger in triggers if trigger["enforcing"])

    def _climb(self) -> None:
        stage = self._backstage
        self._reopen()
        for factor, _ in STEPS:
            stage.until(f"restart step {factor:g}", lambda: self._factor_is(factor), 20)  # noqa: B023 - asked at once
            limit, position = factor * POSITION_LIMIT, stage.bot_metric("position_quantity")
            self._timeline.moment(
                "ACTIVE",
                f"factor {factor:g}: position limit {limit:.0f} of {POSITION_LIMIT}; bot's position {position:+.0f}",
            )
            if factor < 1.0:
                buy = f"--symbol {SYMBOL} --side buy --quantity {POSITION_LIMIT} --position 0"
                stage.killswitch(f"check {buy}", expected=3)
        stage.until("the recovery to be complete", lambda: stage.status()["stage"] in {"COMPLETE", "NONE"}, 10)
        stage.killswitch("status", expected=0, most_lines=4)

    def _reopen(self) -> None:
        measured = self._measured
        opened = self._backstage.verdict("allowed", seconds=30, since=measured.blocked)
        measured.reopened = opened["time"]
        measured.sent_while_blocked += opened["sent"] - 1  # the event comes with the first order that went out
        measured.refused_while_blocked += opened["refused"]
        if measured.sent_while_blocked:
            raise StoryFailed(f"{measured.sent_while_blocked} orders went out between the kill and the reopening")

    def _factor_is(self, factor: float) -> bool:
        status = self._backstage.status()
        return bool(status["state"] == "ACTIVE" and status["position_limit_factor"] == factor)

    def _sum_up(self) -> None:
        self._timeline.title("Summary")
        self._backstage.killswitch("audit verify", expected=0)
        count, total = self._backstage.histogram("killswitch_breach_to_block_seconds")
        if not count:
            raise StoryFailed("killswitch_breach_to_block_seconds has no observation, though a rule killed")
        measured = self._measured
        by_prometheus = self._backstage.prometheus is not None
        facts = {
            "rules read": "Prometheus, which scrapes every second" if by_prometheus else "the bot's own metrics page",
            "killed by": "; ".join(measured.causes),
            "breach to block": f"{measured.breach_to_block_ms:.0f} ms, from bad value exported to first refused order",
            "by the sidecar": f"{total / count * 1000:.0f} ms, from sample to closed gate (mean of {count:.0f} kills)",
            "orders until block": str(measured.sent_before_block),
            "while blocked": f"{measured.sent_while_blocked} orders sent, {measured.refused_while_blocked} refused",
            "blocked for": f"{measured.reopened - measured.blocked:.1f} s, released by {APPROVER}",
            "whole story": f"{self._timeline.elapsed:.0f} s",
        }
        self._timeline.facts(list(facts.items()))

    # Afterwards

    def _places(self) -> list[str]:
        stage = self._stage
        page = f"  http://127.0.0.1:{stage.prometheus}/graph"
        return [
            f"  curl -i http://127.0.0.1:{stage.gate}/gate",
            f"  curl -s http://127.0.0.1:{stage.operations}/api/v1/status",
            f"  curl -s http://127.0.0.1:{stage.operations}/metrics",
            *([page] if self._backstage.prometheus else []),
            "In another terminal:",
            f"  export KILLSWITCH_CONFIG={stage.config}",
            "  killswitch status",
            "  killswitch trigger --reason 'trying it' --by me",
            f"  killswitch recover --reason 'tried it' --by {APPROVER}     # code: {self._code}",
            "Type here what the bot shall live through:",
            *(f"  {command:<15} {text}" for command, text in COMMANDS.items()),
        ]

    def _hand_on_lines(self) -> None:
        # A file object of this thread's own: see the bot's.
        with open(0, encoding="utf-8", errors="replace", closefd=False) as stream:
            for line in stream:
                self._backstage.hand_on(line.strip())


def _end_undisturbed(backstage: Backstage) -> None:
    """End all processes, also if somebody presses Ctrl-C again because it takes a moment."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
    try:
        backstage.end()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the story as Ctrl-C does, so that nothing is left behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
