"""Behind the story: starts the real programs, runs the real commands, and looks until something has happened.

Knows how to start, ask, wait and end, not what the story is. Whatever does not come in its time is a `StoryFailed`.
"""

import contextlib
import http.client
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

from prometheus_client.parser import text_string_to_metric_families

from sidecar.demo import prometheus_process
from sidecar.demo.child import Child
from sidecar.demo.stage import Stage
from sidecar.demo.timeline import COMMAND_WIDTH, Timeline

POLL_SECONDS: Final = 0.05
COMMAND_SECONDS: Final = 30.0
LOG_LINES: Final = 15
ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends the story, as Ctrl-C does."""
_KILLSWITCH: Final = (sys.executable, "-m", "sidecar")  # the command of this very installation, on the path or not

_T = TypeVar("_T")
Json = dict[str, Any]


class StoryFailed(Exception):  # noqa: N818 - named for what happened
    """A step of the story did not come, or not as it should; the message says which."""


class Backstage:
    """The processes of one telling.

    Args:
        timeline: where commands are shown.
        stage: where everything stands.
        environ: the environment to start programs with; what belongs to another sidecar is left out.

    Attributes:
        prometheus: path of the program; None where it is not installed.
        metrics_port: where the bot exports; 0 before it runs.
    """

    def __init__(self, *, timeline: Timeline, stage: Stage, environ: Mapping[str, str]) -> None:
        self.metrics_port = 0
        self._timeline = timeline
        self._stage = stage
        self._environ = stage.environment(environ)
        self.prometheus = prometheus_process.find(self._environ)
        self._children: list[Child] = []
        self._bot: Child | None = None

    # Processes

    def start_bot(self) -> None:
        """Start the bot and wait until it exports."""
        argv = [sys.executable, "-m", "sidecar.demo.bot", "--gate-socket", str(self._stage.gate_socket)]
        self._bot = self._start("bot", argv, talks=True)
        self.metrics_port = int(self.event("ready", seconds=20)["metrics_port"])

    def start_prometheus(self, program: str) -> str:
        """Start Prometheus, wait until it has scraped the bot, and return its version."""
        stage = self._stage
        targets = {"bot": f"127.0.0.1:{self.metrics_port}", "killswitch": f"127.0.0.1:{stage.operations}"}
        file = stage.root / "prometheus.yaml"
        file.write_text(prometheus_process.config(targets), encoding="utf-8")
        data = stage.root / "prometheus"
        self._start(
            "prometheus", prometheus_process.command(program, config_file=file, data=data, port=stage.prometheus)
        )
        scraped = "exchange_connected"
        self.until("Prometheus to scrape the bot", lambda: prometheus_process.has_seen(stage.prometheus, scraped), 30)
        return prometheus_process.version(program, self._environ)

    def start_sidecar(self) -> None:
        """Start the sidecar, as a user does; it may not be ready yet."""
        self._timeline.command_line("killswitch serve")
        self._start("sidecar", [*_KILLSWITCH, "serve"])

    def _start(self, name: str, argv: list[str], *, talks: bool = False) -> Child:
        log = self._stage.root / f"{name}.log"
        with _signals_held_back():
            try:
                child = Child(name, argv, env=self._environ, log=log, talks=talks)
            except OSError as error:
                raise StoryFailed(f"{name} cannot be started: {error}") from None
            self._children.append(child)
        return child

    def must_live(self) -> None:
        """Raise StoryFailed if a process has ended by itself."""
        for child in self._children:
            if child.exit_code is not None:
                raise StoryFailed(
                    f"{child.name} (process {child.pid}) ended by itself, with exit code {child.exit_code}"
                )

    def end(self) -> None:
        """End every process that was started, the newest first."""
        while self._children:
            self._children[-1].stop()
            self._children.pop()

    def logs(self) -> list[str]:
        """The last lines that each process wrote."""
        found: list[str] = []
        for child in self._children:
            found += ["", f"Last lines of {child.name}:", *(f"  {line}" for line in child.tail(LOG_LINES))]
        return found

    # The bot

    def hand_on(self, line: str) -> None:
        """Write the bot a line."""
        if self._bot is not None:
            self._bot.tell(line)

    def tell_bot(self, line: str) -> Json:
        """Write the bot a line and return what it says once it has obeyed; what it said before is forgotten."""
        if self._bot is not None:
            self._bot.events.clear()
        self.hand_on(line)
        return self.event("obeyed", seconds=10)

    def verdict(self, verdict: str, *, seconds: float, since: float = 0.0) -> Json:
        """Wait until the gate's answers to the bot become this reason code, or `allowed`."""
        return self.event("gate", seconds=seconds, since=since, verdict=verdict)

    def event(self, event: str, *, seconds: float, since: float = 0.0, **wanted: object) -> Json:
        """Wait for the oldest event of this kind and these fields, from `since` (Unix seconds) on."""

        def look() -> Json | None:
            for known in list(self._bot.events) if self._bot else ():
                fits = all(known.get(name) == value for name, value in wanted.items())
                if known["event"] == event and known["time"] >= since and fits:
                    return known
            return None

        what = " ".join([event, *(str(value) for value in wanted.values())])
        return self.until(f"the bot to report {what!r}", look, seconds)

    def bot_metric(self, name: str) -> float:
        """What the bot exports now, summed over labels."""
        return sum(value for sample, value in _samples(self.metrics_port) if sample == name)

    # The sidecar

    def api(self, path: str) -> Json:
        """Ask the operations listener.

        Raises:
            OSError: it does not listen.
            StoryFailed: the answer is no JSON object.
        """
        text = _get(self._stage.operations, path)
        try:
            document = json.loads(text)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise StoryFailed(f"the sidecar answered {path} with something that is no JSON object: {text[:200]!r}")
        return document

    def status(self) -> Json:
        """What `/api/v1/status` says."""
        return self.api("/api/v1/status")

    def histogram(self, name: str) -> tuple[float, float]:
        """Count and sum of a histogram without labels."""
        found = dict(_samples(self._stage.operations))
        return found.get(f"{name}_count", 0.0), found.get(f"{name}_sum", 0.0)

    def killswitch(self, line: str, *, expected: int, code: str | None = None, most_lines: int = 12) -> str:
        """Run `killswitch LINE`, show it, and return its standard output.

        Args:
            line: subcommand and options.
            expected: the exit code that it must end with.
            code: what is typed into it.
            most_lines: so much of its output is shown.

        Raises:
            StoryFailed: it ended otherwise, or not at all.
        """
        try:
            done = subprocess.run(  # noqa: S603 - our own commands
                [*_KILLSWITCH, *shlex.split(line)],
                env={**self._environ, "COLUMNS": str(COMMAND_WIDTH)},
                input="" if code is None else f"{code}\n",
                capture_output=True,
                text=True,
                encoding="utf-8",
                timeout=COMMAND_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise StoryFailed(f"`killswitch {line}` did not end within {COMMAND_SECONDS:g} s") from None
        typed = "" if code is None else f"    (and types {code})"
        shown = done.stdout + done.stderr
        self._timeline.command(f"killswitch {line}{typed}", shown, done.returncode, most_lines=most_lines)
        if done.returncode != expected:
            raise StoryFailed(f"`killswitch {line}` ended with exit code {done.returncode}, not {expected}")
        return done.stdout

    # Waiting

    def until(self, what: str, look: Callable[[], _T | None], seconds: float) -> _T:
        """Look until there is something that is true, and return it.

        Raises:
            StoryFailed: it did not come within `seconds`, or a process ended.
        """
        deadline = time.monotonic() + seconds
        last = ""
        while time.monotonic() < deadline:
            self.must_live()
            try:
                found = look()
            except (OSError, http.client.HTTPException) as error:
                found, last = None, f" ({error})"
            if found:
                return found
            time.sleep(POLL_SECONDS)
        raise StoryFailed(f"waited {seconds:g} s for {what}, and it did not come{last}")


def _get(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode("utf-8")
    finally:
        connection.close()


def _samples(port: int) -> Iterator[tuple[str, float]]:
    for family in text_string_to_metric_families(_get(port, "/metrics")):
        for sample in family.samples:
            yield sample.name, float(sample.value)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """A Ctrl-C between the start of a process and its entry in the list of those to end would leave it behind."""
    held: list[int] = []
    before = {number: signal.signal(number, lambda number, _: held.append(number)) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])
