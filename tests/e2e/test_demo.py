"""`killswitch demo` as a user runs it: the whole story, with and without Prometheus, and nothing left behind."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[2]
STORY_SECONDS = 120
ENDING_SECONDS = 30


@pytest.fixture
def home() -> Iterator[Path]:
    """A temporary folder of a short name, for the path of a Unix socket may have 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="ks"))
    yield folder
    assert list(folder.iterdir()) == [], "the demo left files behind"
    assert _processes_of(folder) == [], "the demo left processes behind"
    folder.rmdir()


def _processes_of(home: Path) -> list[int]:
    """Ids of all processes whose environment names the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if str(home).encode() in environment:
                found.append(int(entry.name))
    return found


class Demo:
    """A running demo and what it has printed so far."""

    def __init__(self, home: Path, *options: str, path: str | None = None) -> None:
        environ = {**os.environ, "TMPDIR": str(home), "KILLSWITCH_CONFIG": "/nowhere/of-somebody-else.yaml"}
        if path is not None:
            environ["PATH"] = path
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sidecar", "demo", *options],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.text = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.text += line

    def wait_for(self, wanted: str) -> None:
        self.wait_until(lambda: wanted in self.text, wanted)

    def wait_until(self, holds: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + STORY_SECONDS
        while not holds():
            assert self.process.poll() is None, f"ended before {what!r}:\n{self.text}"
            assert time.monotonic() < deadline, f"no {what!r} in:\n{self.text}"
            time.sleep(0.05)

    def type(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def ended(self, seconds: float) -> int:
        try:
            code = self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                self.process.kill()
            self._reader.join(10)
            for stream in (self.process.stdin, self.process.stdout):
                if stream is not None:
                    stream.close()
        return code


def _assert_whole_story(text: str) -> None:
    steps = [
        r"refused +no sidecar runs yet",
        r"\$ killswitch serve",
        r"ACTIVE +every rule has had a fresh reading",
        r"trading +orders flow: \d+ sent",
        r"TRADING ALLOWED",
        r"breach +the market gaps: the bot now exports a drawdown of -0\.18",
        r"KILL +(portfolio_drawdown|daily_loss): ",
        r"refused +the bot's next order: killed by rule",
        r"measured +\d+ ms from the bad value",
        r"deny \(killed\)[^$]*exit code 3",
        r"allow \(cancel\)[^$]*exit code 0",
        r"Refused \(403\)[^$]*exit code 4",
        r"Refused \(409\)[^$]*portfolio_drawdown[^$]*exit code 4",
        r"market +comes back",
        r"clear +no rule fires any more",
        r"BLOCKED . RECOVERING",
        r"ACTIVE +factor 0\.5: position limit 500 of 1000",
        r"deny \(over_limit\)[^$]*500[^$]*exit code 3",
        r"ACTIVE +factor 0\.75: position limit 750 of 1000",
        r"ACTIVE +factor 1: position limit 1000 of 1000",
        r"WHOLE: \d+ lines checked",
        r"breach to block +\d+ ms",
        r"by the sidecar +\d+ ms",
        r"while blocked +0 orders sent, [1-9]\d* refused",
    ]
    position = 0
    for step in steps:
        found = re.compile(step, re.DOTALL).search(text, position)
        assert found, f"{step!r} does not come, or not in its order, in:\n{text}"
        position = found.end()
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert "\x1b" not in text


def _needs_prometheus() -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")


def test_the_story_with_prometheus_comes_whole_and_ends_by_itself(home: Path) -> None:
    _needs_prometheus()
    demo = Demo(home)
    assert demo.ended(STORY_SECONDS) == 0, demo.text
    _assert_whole_story(demo.text)
    assert re.search(r"source +Prometheus [0-9.]+ scrapes the bot every second", demo.text)
    measured = re.search(r"breach to block +(\d+) ms", demo.text)
    assert measured is not None
    # One scrape, one evaluation, and room for a machine that is busy with other tests.
    assert 0 < int(measured[1]) < 10_000


def test_the_story_without_prometheus_comes_whole_and_says_so(home: Path) -> None:
    demo = Demo(home, path=str(home / "nothing-is-here"))
    assert demo.ended(STORY_SECONDS) == 0, demo.text
    _assert_whole_story(demo.text)
    assert "Prometheus is not installed: the sidecar scrapes the bot" in demo.text


def test_it_keeps_running_for_curl_and_obeys_until_ctrl_c(home: Path) -> None:
    demo = Demo(home, "--keep-running")
    demo.wait_for("the session with the exchange is lost")
    gate = re.search(r"curl -i (http://127\.0\.0\.1:\d+/gate)", demo.text)
    assert gate is not None

    def answers(code: str) -> bool:
        status = ["curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", gate[1]]
        return subprocess.run(status, capture_output=True, text=True, check=False).stdout == code

    demo.wait_until(lambda: answers("200"), "an open gate")
    demo.type("drawdown -0.3")
    demo.wait_until(lambda: answers("403"), "a closed gate")
    demo.process.send_signal(signal.SIGINT)
    assert demo.ended(ENDING_SECONDS) == 0, demo.text
    assert demo.text.rstrip().endswith("Ended.")


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, "refused    no sidecar runs yet"),
        (signal.SIGTERM, "refused    no sidecar runs yet"),
        (signal.SIGHUP, "refused    no sidecar runs yet"),
        (signal.SIGINT, "$ killswitch serve"),
    ],
)
def test_a_story_broken_off_leaves_nothing_behind(home: Path, number: signal.Signals, moment: str) -> None:
    demo = Demo(home)
    demo.wait_for(moment)
    demo.process.send_signal(number)
    assert demo.ended(ENDING_SECONDS) == 130, demo.text
    assert demo.text.rstrip().endswith("Broken off.")


def test_a_process_that_dies_ends_the_story_with_a_reason_and_its_log(home: Path) -> None:
    demo = Demo(home)
    demo.wait_for("$ killswitch status")
    (sidecar,) = [pid for pid in _processes_of(home) if _arguments(pid)[-1:] == ["serve"]]
    os.kill(sidecar, signal.SIGKILL)
    assert demo.ended(ENDING_SECONDS) == 1, demo.text
    assert re.search(r"FAILED +(sidecar \(process \d+\) ended by itself|`killswitch)", demo.text)
    assert "Last lines of sidecar:" in demo.text
    assert "sidecar.listening" in demo.text


def test_the_configuration_of_the_readme_guards_a_bot(home: Path) -> None:
    """Its YAML and its commands, but for the ports, which may be taken."""
    environ = {
        **os.environ,
        "TMPDIR": str(home),
        "KILLSWITCH_CONFIG": str(home / "config.yaml"),
        "PYTHONPATH": str(ROOT),
    }
    started: list[subprocess.Popen[str]] = []

    def start(*argv: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", *argv], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    def killswitch(line: str, typed: str = "") -> tuple[int, str]:
        argv = [sys.executable, "-m", "sidecar", *shlex.split(line)]
        done = subprocess.run(argv, env=environ, cwd=home, input=typed, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    def wait_for_gate(code: int) -> None:
        deadline = time.monotonic() + 30
        while killswitch("check")[0] != code:
            assert time.monotonic() < deadline, killswitch("status")
            time.sleep(0.1)

    try:
        bot = start("sidecar.demo.bot", "--gate-socket", str(home / "run" / "gate.sock"))
        assert bot.stdout is not None
        assert bot.stdin is not None
        _write_readme(home, metrics_port=json.loads(bot.stdout.readline())["metrics_port"])
        code_hash = killswitch("hash-code", "a code\n")[1].strip().splitlines()[-1]
        (home / "approvers.yaml").write_text(f"- {{name: bob, code_hash: '{code_hash}'}}\n")
        start("sidecar", "serve")
        wait_for_gate(0)
        assert killswitch("rules check rules/drawdown.yaml")[0] == 0
        assert killswitch("health")[0] == 0
        bot.stdin.write("drawdown -0.12\n")
        bot.stdin.flush()
        deadline = time.monotonic() + 30
        while "REDUCED" not in killswitch("status")[1]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert killswitch('trigger --reason "fat finger in AAPL" --by alice --confirm')[0] == 0
        wait_for_gate(3)
        # The throttle of 75 % still asks, so the rule is not clear; its step lifts at -0.1125.
        bot.stdin.write("recover\n")
        bot.stdin.flush()
        deadline = time.monotonic() + 30
        recover = 'recover --reason "feed is back, positions reconciled" --by bob'
        while (answer := killswitch(recover, "a code\n"))[0] != 0:
            assert time.monotonic() < deadline, answer
            time.sleep(0.2)
        assert "RECOVERING" in killswitch("status")[1]
        assert killswitch('cancel-recovery --by alice --reason "the feed dropped again"')[0] == 0
        assert "switch.killed" in killswitch("audit --since 24h")[1]
        assert "WHOLE" in killswitch("audit verify")[1]
    finally:
        for process in started:
            process.terminate()
            process.communicate(timeout=20)
        for name in ("run", "control", "state", "rules"):
            shutil.rmtree(home / name, ignore_errors=True)
        for name in ("config.yaml", "approvers.yaml"):
            (home / name).unlink(missing_ok=True)


def _write_readme(home: Path, *, metrics_port: int) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    config, rule = re.findall(r"^```yaml\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    assert "127.0.0.1:8000" in config
    assert "127.0.0.1:9781" in config
    config = config.replace("127.0.0.1:8000", f"127.0.0.1:{metrics_port}").replace("127.0.0.1:9781", "127.0.0.1:0")
    for name in ("run", "control", "state", "rules"):
        (home / name).mkdir()
    (home / "config.yaml").write_text(config.replace("gate: {", "gate: {listen: 127.0.0.1:0, "))
    (home / "rules" / "drawdown.yaml").write_text(rule)


def _arguments(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
