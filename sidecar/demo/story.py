"""The story of the demo: trading, a breach, the kill, a refused release, an approved one, and trading in steps again.

Everything is real but the market: it runs the programs and commands that a user runs and shows what they answer. Each
step waits for its condition, and one that does not come ends the story with a reason and the logs.
"""

import contextlib
import http.client
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from prometheus_client.parser import text_string_to_metric_families

from sidecar.demo import prometheus_process
from sidecar.demo.bot import COMMANDS
from sidecar.demo.child import Child
from sidecar.demo.stage import APPROVER, COOLDOWN, POSITION_LIMIT, STEPS, SWITCH, Stage
from sidecar.demo.timeline import Timeline

DRAWDOWN: Final = -0.18
RULE: Final = "portfolio_drawdown"
POLL_SECONDS: Final = 0.05
COMMAND_SECONDS: Final = 30.0
INTERRUPTED: Final = 130
"""What shells report of a program that Ctrl-C ended."""

_T = TypeVar("_T")
Json = dict[str, Any]


class StoryFailed(Exception):  # noqa: N818 - named for what happened
    """A step of the story did not come, or not as it should; the message says which."""


def run(*, keep_running: bool) -> int:
    """Tell the story on standard output.

    Args:
        keep_running: leave everything up at the end, until Ctrl-C.

    Returns:
        0 when every step came, 1 when one did not, 130 when it was broken off.
    """
    timeline = Timeline()
    with ExitStack() as stack:
        stack.enter_context(_signals_interrupt())
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="killswitch-demo-")))
        story = Story(timeline=timeline, stage=Stage.build(root), environ=os.environ)
        try:
            stack.callback(story.end)
            story.tell()
            if keep_running:
                story.stay()
        except StoryFailed as failure:
            timeline.moment("FAILED", str(failure))
            timeline.lines(story.logs())
            return 1
        except KeyboardInterrupt:
            timeline.lines(["", "Ended." if story.told else "Broken off."])
            return 0 if story.told else INTERRUPTED
    return 0


@dataclass(kw_only=True, slots=True)
class Measured:
    """What the summary is made of; times are Unix seconds of this machine."""

    breach: float = 0.0
    blocked: float = 0.0
    sent_in_between: int = 0
    sent_while_blocked: int = 0
    refused_while_blocked: int = 0
    sample_to_block: float = 0.0
    kill_causes: list[str] = field(default_factory=list)
    reopened_after: float = 0.0


class Story:
    """One telling.

    Args:
        timeline: where it is told.
        stage: where everything stands.
        environ: the environment to start programs with; what belongs to another sidecar is left out.
    """

    def __init__(self, *, timeline: Timeline, stage: Stage, environ: Mapping[str, str]) -> None:
        self.told = False
        self._timeline = timeline
        self._stage = stage
        self._environ = stage.environment(environ)
        self._prometheus = prometheus_process.find(self._environ)
        self._code = secrets.token_hex(4)
        self._children: list[Child] = []
        self._bot: Child | None = None
        self._metrics_port = 0
        self._measured = Measured()

    def tell(self) -> None:
        """Tell it once, from the first process to the summary.

        Raises:
            StoryFailed: a step did not come.
        """
        self._set_up()
        self._trade()
        self._breach()
        self._try_to_release()
        self._release()
        self._climb()
        self._sum_up()
        self.told = True

    def end(self) -> None:
        """End every process that was started, the newest first."""
        for child in reversed(self._children):
            child.stop()
        self._children.clear()

    def logs(self) -> list[str]:
        """The last lines that each process wrote."""
        found: list[str] = []
        for child in self._children:
            found += ["", f"Last lines of {child.name}:", *(f"  {line}" for line in child.tail(15))]
        return found

    # The acts

    def _set_up(self) -> None:
        say = self._timeline.moment
        self._timeline.lines(
            [
                "killswitch demo: a simulated trading bot beside a real sidecar, on 127.0.0.1 only.",
                f"Times are shortened: cooldown {COOLDOWN} (shipped: 5m), restart steps after "
                f"{STEPS[1][1]} and {STEPS[2][1]} (1h, 2h).",
            ]
        )
        self._timeline.title("Set-up")
        self._start_bot()
        say("bot", "sends about 20 orders a second, each only after the gate has allowed it")
        self._verdict("stale", seconds=20, since=0.0)
        say("refused", "no sidecar runs yet, and no answer is a denial: every order is refused")
        self._write_configuration()
        self._start_prometheus()
        self._start_sidecar()

    def _trade(self) -> None:
        first = self._verdict("allowed", seconds=30, since=0.0)
        self._timeline.moment("ACTIVE", "every rule has had a fresh reading: the gate opens")
        self._until("40 orders to go out", lambda: self._bot_metric("orders_sent_total") > first["sent"] + 40, 20)
        self._timeline.moment("trading", f"orders flow: {self._bot_metric('orders_sent_total'):.0f} sent so far")
        self._command("status", expected=0, most_lines=14)

    def _breach(self) -> None:
        self._timeline.title("Breach and kill")
        told = self._tell_bot(f"drawdown {DRAWDOWN}")
        self._measured.breach = told["time"]
        self._timeline.moment("breach", f"the market gaps: the bot now exports a drawdown of {told['drawdown']:.2f}")
        refused = self._verdict("killed", seconds=20, since=told["time"])
        self._measured.blocked = refused["time"]
        self._measured.sent_in_between = refused["sent"] - told["sent"]
        self._measured.refused_while_blocked = -refused["refused"]
        self._measured.sent_while_blocked = -refused["sent"]
        status = self._until(f"a kill by {RULE}", self._killed_by_rule, 20)
        self._measured.kill_causes = [_cause_text(cause) for cause in status["causes"]]
        for cause in self._measured.kill_causes:
            self._timeline.moment("KILL", cause)
        self._timeline.moment("refused", f"the bot's next order: {refused['message']}")
        took = (refused["time"] - told["time"]) * 1000
        self._timeline.moment("measured", f"{took:.0f} ms from the bad value being exported to the first refused order")
        self._command("check", expected=3)
        self._command("check --intent cancel", expected=0)

    def _try_to_release(self) -> None:
        self._timeline.title("Releases that are refused")
        self._recover("just restart it", code="not-the-code", expected=4)
        self._timeline.moment("refused", "a wrong code releases nothing")
        self._recover("it will be fine", code=self._code, expected=4)
        self._timeline.moment("refused", "the right code neither, while a rule still fires")

    def _release(self) -> None:
        self._timeline.title("Approved recovery")
        told = self._tell_bot("recover")
        self._timeline.moment("market", f"comes back: the drawdown is {told['drawdown']:.3f} again")
        self._until("all rules to be clear", self._is_clear, 20)
        self._timeline.moment("clear", "no rule fires any more; the switch stays KILLED until somebody releases it")
        self._recover("prices are back, positions reconciled", code=self._code, expected=0)
        self._until("RECOVERING", lambda: self._status()["state"] == "RECOVERING", 5)
        self._timeline.moment("cooldown", f"{COOLDOWN} in which the gate still denies")

    def _climb(self) -> None:
        measured = self._measured
        opened = self._verdict("allowed", seconds=30, since=measured.blocked)
        measured.reopened_after = opened["time"] - measured.blocked
        measured.sent_while_blocked += opened["sent"] - 1  # the event comes with the first order that went out
        measured.refused_while_blocked += opened["refused"]
        if measured.sent_while_blocked:
            raise StoryFailed(f"{measured.sent_while_blocked} orders went out between the kill and the reopening")
        for factor, _ in STEPS:
            self._until(f"restart step {factor:g}", lambda: self._factor_is(factor), 20)  # noqa: B023 - asked at once
            limit = f"position limit {factor * POSITION_LIMIT:.0f} of {POSITION_LIMIT}"
            self._timeline.moment("ACTIVE", f"factor {factor:g}: {limit}; the bot's position is {self._position():+.0f}")
            if factor < 1.0:
                buy = f"--symbol DEMO --side buy --quantity {POSITION_LIMIT} --position 0"
                self._command(f"check {buy}", expected=3)
        self._until("the recovery to be complete", lambda: self._status()["stage"] in {"COMPLETE", "NONE"}, 10)
        self._command("status", expected=0, most_lines=4)

    def _sum_up(self) -> None:
        measured = self._measured
        self._timeline.title("Summary")
        self._command("audit verify", expected=0)
        count, total = self._histogram("killswitch_breach_to_block_seconds")
        if not count:
            raise StoryFailed("killswitch_breach_to_block_seconds has no observation, though a rule killed")
        measured.sample_to_block = total / count
        rules = "prometheus, scraping every second" if self._prometheus else "the bot's metrics page, every 250 ms"
        self._timeline.facts(
            [
                ("source of the rules", rules),
                ("killed by", "; ".join(measured.kill_causes)),
                ("breach to block", f"{(measured.blocked - measured.breach) * 1000:.0f} ms, from the export of the bad "
                 "value to the first refused order"),
                ("", f"{measured.sample_to_block * 1000:.0f} ms of it from the sample to the closed gate, by the "
                 "sidecar's own histogram"),
                ("orders sent after breach", f"{measured.sent_in_between}, before the block"),
                ("orders while blocked", f"{measured.sent_while_blocked} sent, {measured.refused_while_blocked} refused"),
                ("blocked for", f"{measured.reopened_after:.1f} s, approved by {APPROVER}"),
                ("whole story", f"{self._timeline.elapsed:.0f} s"),
            ]
        )  # fmt: skip

    def stay(self) -> None:
        """Say where everything is and leave it up, until Ctrl-C.

        Raises:
            StoryFailed: a process ended.
            KeyboardInterrupt: as asked.
        """
        stage = self._stage
        self._timeline.title("Still running, until Ctrl-C")
        prometheus = [f"  http://127.0.0.1:{stage.prometheus}/graph          # Prometheus"] if self._prometheus else []
        self._timeline.lines(
            [
                f"  curl -i http://127.0.0.1:{stage.gate}/gate",
                f"  curl -s http://127.0.0.1:{stage.operations}/api/v1/status",
                f"  curl -s http://127.0.0.1:{stage.operations}/metrics",
                *prometheus,
                "In another terminal:",
                f"  export KILLSWITCH_CONFIG={stage.config}",
                "  killswitch status",
                "  killswitch trigger --reason 'trying it' --by me",
                f"  killswitch recover --reason 'tried it' --by {APPROVER}     # code: {self._code}",
                "Type here what the bot shall live through:",
                *(f"  {word:<15} {text}" for word, text in COMMANDS.items()),
            ]
        )
        threading.Thread(target=self._hand_on_lines, name="standard input", daemon=True).start()
        while True:
            self._must_live()
            time.sleep(POLL_SECONDS * 4)

    def _hand_on_lines(self) -> None:
        with open(0, encoding="utf-8", errors="replace", closefd=False) as stream:  # noqa: PTH123 - a descriptor
            for line in stream:
                if self._bot is not None:
                    self._bot.tell(line.strip())

    # Processes

    def _start(self, name: str, argv: list[str], *, talks: bool = False) -> Child:
        log = self._stage.root / f"{name}.log"
        try:
            child = Child(name, argv, env=self._environ, log=log, talks=talks)
        except OSError as error:
            raise StoryFailed(f"{name} cannot be started: {error}") from None
        self._children.append(child)
        return child

    def _start_bot(self) -> None:
        argv = [sys.executable, "-m", "sidecar.demo.bot", "--gate-socket", str(self._stage.gate_socket)]
        self._bot = self._start("bot", argv, talks=True)
        self._metrics_port = int(self._event("ready", seconds=20)["metrics_port"])

    def _write_configuration(self) -> None:
        self._timeline.lines([f"        $ export KILLSWITCH_CONFIG={self._stage.config}"])
        hashed = self._command("hash-code", expected=0, code=self._code, most_lines=0)
        self._timeline.moment("approver", f"{APPROVER}, with the code {self._code} (made for this run)")
        self._stage.write(
            metrics_port=self._metrics_port,
            with_prometheus=self._prometheus is not None,
            code_hash=hashed.strip().splitlines()[-1],
        )

    def _start_prometheus(self) -> None:
        if self._prometheus is None:
            self._timeline.moment("source", "Prometheus is not installed: the sidecar scrapes the bot itself")
            return
        stage = self._stage
        targets = {"bot": f"127.0.0.1:{self._metrics_port}", "killswitch": f"127.0.0.1:{stage.operations}"}
        file = stage.root / "prometheus.yaml"
        file.write_text(prometheus_process.config(targets), encoding="utf-8")
        argv = prometheus_process.command(
            self._prometheus, config_file=file, data=stage.root / "prometheus", port=stage.prometheus
        )
        self._start("prometheus", argv)
        self._until("Prometheus to scrape the bot", self._is_scraped, 30)
        version = prometheus_process.version(self._prometheus, self._environ)
        self._timeline.moment("source", f"Prometheus {version} scrapes the bot every second")

    def _is_scraped(self) -> bool:
        return prometheus_process.has_seen(self._stage.prometheus, "exchange_connected")

    def _start_sidecar(self) -> None:
        self._timeline.command_line("killswitch serve")
        self._start("sidecar", [*_KILLSWITCH, "serve"])
        self._timeline.moment("sidecar", f"guards {SWITCH} with the shipped default rules")

    def _must_live(self) -> None:
        for child in self._children:
            if child.exit_code is not None:
                raise StoryFailed(f"{child.name} (process {child.pid}) ended by itself with exit code {child.exit_code}")

    # The bot

    def _tell_bot(self, line: str) -> Json:
        if self._bot is None:
            raise StoryFailed("the bot does not run")
        self._bot.events.clear()
        self._bot.tell(line)
        return self._event("obeyed", seconds=10)

    def _event(self, event: str, *, seconds: float, since: float = 0.0, **wanted: object) -> Json:
        """The oldest kept event of this kind and these fields, from `since` (Unix seconds) on."""

        def look() -> Json | None:
            for known in list(self._bot.events) if self._bot else ():
                fits = all(known.get(name) == value for name, value in wanted.items())
                if known["event"] == event and known["time"] >= since and fits:
                    return known
            return None

        what = f"{event} {' '.join(str(value) for value in wanted.values())}".strip()
        return self._until(f"the bot to report {what!r}", look, seconds)

    def _verdict(self, verdict: str, *, seconds: float, since: float) -> Json:
        return self._event("gate", seconds=seconds, since=since, verdict=verdict)

    def _bot_metric(self, name: str) -> float:
        return sum(value for sample, value in self._samples(self._metrics_port) if sample == name)

    def _position(self) -> float:
        return self._bot_metric("position_quantity")

    # The sidecar

    def _status(self) -> Json:
        return self._api("/api/v1/status")

    def _killed_by_rule(self) -> Json | None:
        status = self._status()
        by_rule = any(cause["trigger"] == RULE for cause in status["causes"])
        return status if status["state"] == "KILLED" and by_rule else None

    def _is_clear(self) -> bool:
        return all(one["status"] == "inactive" for one in self._api("/api/v1/triggers")["triggers"] if one["enforcing"])

    def _factor_is(self, factor: float) -> bool:
        status = self._status()
        return bool(status["state"] == "ACTIVE" and status["position_limit_factor"] == factor)

    def _histogram(self, name: str) -> tuple[float, float]:
        found = dict(self._samples(self._stage.operations))
        return found.get(f"{name}_count", 0.0), found.get(f"{name}_sum", 0.0)

    def _api(self, path: str) -> Json:
        try:
            document = json.loads(_get(self._stage.operations, path))
        except ValueError as error:
            raise StoryFailed(f"the sidecar answered {path} with something that is no JSON: {error}") from None
        if not isinstance(document, dict):
            raise StoryFailed(f"the sidecar answered {path} with {document!r}")
        return document

    def _samples(self, port: int) -> Iterator[tuple[str, float]]:
        for family in text_string_to_metric_families(_get(port, "/metrics")):
            for sample in family.samples:
                yield sample.name, float(sample.value)

    # Commands

    def _recover(self, reason: str, *, code: str, expected: int) -> None:
        self._command(
            f"recover --by {APPROVER} --reason {shlex.quote(reason)}", expected=expected, code=code, most_lines=8
        )

    def _command(self, line: str, *, expected: int, code: str | None = None, most_lines: int = 12) -> str:
        """Run `killswitch LINE`, show it, and return its standard output; `code` is typed into it."""
        environ = {**self._environ, "COLUMNS": "70"}
        try:
            done = subprocess.run(  # noqa: S603 - our own commands
                [*_KILLSWITCH, *shlex.split(line)],
                env=environ,
                input="" if code is None else f"{code}\n",
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise StoryFailed(f"`killswitch {line}` did not end within {COMMAND_SECONDS:g} s") from None
        typed = "" if code is None else f"    (and types {code})"
        shown = done.stdout + done.stderr
        self._timeline.command(f"killswitch {line}{typed}", shown, done.returncode, most_lines=most_lines)
        if done.returncode != expected:
            raise StoryFailed(f"`killswitch {line}` ended with exit code {done.returncode}, not {expected}:\n{shown}")
        return done.stdout

    # Waiting

    def _until(self, what: str, look: Callable[[], _T | None], seconds: float) -> _T:
        """Look until there is something that is true, and return it; a process that ended ends the waiting."""
        deadline = time.monotonic() + seconds
        last = ""
        while time.monotonic() < deadline:
            self._must_live()
            try:
                found = look()
            except (OSError, http.client.HTTPException) as error:
                found, last = None, f" ({error})"
            if found:
                return found
            time.sleep(POLL_SECONDS)
        _give_up(f"waited {seconds:g} s for {what}, and it did not come{last}")


_KILLSWITCH: Final = (sys.executable, "-m", "sidecar")


def _give_up(message: str) -> NoReturn:
    raise StoryFailed(message)


def _get(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode("utf-8")
    finally:
        connection.close()


def _cause_text(cause: Json) -> str:
    return f"{cause['trigger'] or cause['by']}: {cause['reason']}"


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the story as Ctrl-C does, so that nothing is left behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
