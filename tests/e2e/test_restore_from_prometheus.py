"""What a sidecar knows after it lost its disk: the record of the real Prometheus that scraped it, and no more."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from sidecar.adapters.prometheus import RecordReader
from sidecar.core.states import State

pytestmark = pytest.mark.e2e

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 20.0
NAME = 'e2e/"restored" \\ twice'
"""A name that a careless query would stumble over."""
QUOTED = '"e2e/\\"restored\\" \\\\ twice"'


def wait_for(look: Callable[[], T], what: str, patience: float = PATIENCE_SECONDS) -> T:
    deadline = time.monotonic() + patience
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {patience:g} s in vain for {what}; last seen: {found!r}"
        time.sleep(0.02)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Prometheus:
    """A real Prometheus on loopback that scrapes one sidecar, and keeps its port and data over a restart."""

    def __init__(self, folder: Path, target: int) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir()
        (folder / "p.yml").write_text(
            "global: {scrape_interval: 250ms, scrape_timeout: 250ms}\n"
            f"scrape_configs: [{{job_name: killswitch, static_configs: [{{targets: ['127.0.0.1:{target}']}}]}}]\n"
        )

    def start(self) -> None:
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={self.folder}/p.yml",
                    f"--storage.tsdb.path={self.folder}/data",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                    "--log.level=warn",
                ],
                stdout=log,
                stderr=log,
            )
        wait_for(self.answers, "Prometheus to answer", 30)

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.value("vector(1)"))
        return False

    def value(self, query: str) -> float | None:
        form = urllib.parse.urlencode({"query": query}).encode()
        with urllib.request.urlopen(f"{self.url}/api/v1/query", data=form, timeout=5) as answer:
            result = json.load(answer)["data"]["result"]
        return float(result[0]["value"][1]) if result else None

    def wait_scraped(self, state: str) -> None:
        query = f"killswitch_state{{switch={QUOTED},state={json.dumps(state)}}}"
        wait_for(lambda: self.value(query) == 1.0, f"{state} to be scraped")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(15)
            self._process = None


class Sidecar:
    """One sidecar as a process, with its own folders."""

    def __init__(self, folder: Path, operations: int) -> None:
        self.folder = folder
        self.operations = operations
        self.gate = free_port()
        self.state = folder / "state"
        self._process: subprocess.Popen[bytes] | None = None

    def configure(self, prometheus: str) -> None:
        metric = f"http://127.0.0.1:{self.operations}/metrics"
        (self.folder / "rules.yaml").write_text(
            json.dumps(
                {
                    "groups": [
                        {
                            "name": "own",
                            "interval": "200ms",
                            "rules": [
                                {
                                    "trigger": "own_cpu",
                                    "type": "threshold",
                                    "source": "scrape:self",
                                    "query": "process_cpu_seconds_total",
                                    "operator": "gt",
                                    "threshold": 1e9,
                                    "action": "kill",
                                }
                            ],
                        }
                    ]
                }
            )
        )
        (self.folder / "config.yaml").write_text(
            json.dumps(
                {
                    "switch": {"name": NAME},
                    "prometheus": {"urls": [prometheus], "timeout": "2s"},
                    "scrape": [{"name": "self", "url": metric, "interval": "200ms", "timeout": "200ms"}],
                    "rules": {"files": ["rules.yaml"]},
                    "gate": {"listen": f"127.0.0.1:{self.gate}", "socket": "gate.sock", "page": "page"},
                    "operations": {"listen": f"127.0.0.1:{self.operations}"},
                    "control": {"socket": "control.sock"},
                    "alertmanager": {"notify": {"urls": []}},
                    "recovery": {"cooldown": "0s", "steps": [{"factor": 0.25}, {"factor": 1.0, "after": "1h"}]},
                    "storage": {"dir": "state"},
                }
            )
        )

    def start(self) -> None:
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sidecar", "serve", "--config", str(self.folder / "config.yaml")],
                cwd=ROOT,
                env={**os.environ, "KILL_SWITCH_APPROVAL_CODE": "let-it-trade"},
                stdout=log,
                stderr=log,
            )
        wait_for(self._listens, f"the control socket; log in {self.folder}/log")

    def _listens(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.ask("GET", "/api/v1/status")[1])
        return False

    def kill9(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(10)
            self._process = None

    def forget(self) -> None:
        """What happens to a pod without a volume that is moved to another node."""
        self.kill9()
        shutil.rmtree(self.state)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("localhost", timeout=10)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(10)
        with contextlib.closing(connection):
            connection.sock.connect(str(self.folder / "control.sock"))
            headers = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def status(self) -> dict[str, Any]:
        return self.ask("GET", "/api/v1/status")[1]

    def wait(self, what: str, holds: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            status = self.status()
            return status if holds(status) else None

        return wait_for(look, f"{what}; log in {self.folder}/log") or {}

    def wait_active(self) -> dict[str, Any]:
        """Wait until orders pass, which is a heartbeat after the status says ready."""
        status = self.wait("ACTIVE", lambda one: one["ready"] and one["durable"] and one["state"] == "ACTIVE")
        wait_for(self.gate_allows, "the gate to open")
        return status

    def wait_killed(self) -> dict[str, Any]:
        return self.wait("KILLED and durable", lambda one: one["state"] == "KILLED" and one["durable"])

    def gate_allows(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.gate, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", "/gate")
            return connection.getresponse().status == 200


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: that of a Unix socket may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="ks") as name:
        yield Path(name)


@pytest.fixture
def sidecar(folder: Path) -> Iterator[Sidecar]:
    one = Sidecar(folder, free_port())
    yield one
    one.kill9()


@pytest.fixture
def prometheus(folder: Path, sidecar: Sidecar) -> Iterator[Prometheus]:
    if shutil.which("prometheus") is None:
        pytest.skip("Prometheus is not installed")
    server = Prometheus(folder / "prometheus", sidecar.operations)
    sidecar.configure(server.url)
    yield server
    server.stop()


def codes(status: dict[str, Any]) -> list[str]:
    return [cause["code"] for cause in status["causes"]]


def test_a_kill_outlives_the_disk_and_its_restriction_and_epoch_with_it(sidecar: Sidecar, prometheus: Prometheus):
    prometheus.start()
    sidecar.start()
    sidecar.wait_active()
    _, killed = sidecar.ask("POST", "/api/v1/trigger", {"reason": "fat finger", "restriction": "reduce_only"})
    prometheus.wait_scraped("KILLED")
    sidecar.forget()
    sidecar.start()
    restored = sidecar.wait_killed()
    assert codes(restored) == ["restored"]
    assert "Prometheus' record shows the switch KILLED, last seen at 20" in restored["causes"][0]["reason"]
    assert (restored["restriction"], restored["position_limit_factor"]) == ("reduce_only", 0.0)
    assert restored["epoch"] > killed["epoch"]
    assert not sidecar.gate_allows()


def test_without_a_record_a_first_start_is_active(sidecar: Sidecar, prometheus: Prometheus):
    prometheus.start()
    sidecar.start()
    assert sidecar.wait_active()["position_limit_factor"] == 1.0


def test_the_restart_ladder_goes_on_from_its_step(sidecar: Sidecar, prometheus: Prometheus):
    prometheus.start()
    sidecar.start()
    sidecar.wait_active()
    sidecar.ask("POST", "/api/v1/trigger", {"reason": "drill"})
    wanted = {"by": "alice", "reason": "all clear", "code": "let-it-trade"}
    wait_for(lambda: sidecar.ask("POST", "/api/v1/recovery", wanted)[0] == 200, "the recovery")
    prometheus.wait_scraped("ACTIVE")
    wait_for(
        lambda: prometheus.value(f"killswitch_position_limit_factor{{switch={QUOTED}}}") == 0.25, "the step's factor"
    )
    sidecar.forget()
    sidecar.start()
    restored = sidecar.wait_active()
    assert (restored["position_limit_factor"], restored["stage"]) == (0.25, "GRADUAL_RESTART")
    assert restored["recovery"]["next_step"]["in_seconds"] > 3500


def test_without_an_answer_the_gate_denies_until_there_is_one(sidecar: Sidecar, prometheus: Prometheus):
    sidecar.start()
    status = sidecar.wait("a failed question", lambda one: "does not tell" in (one["not_ready_reason"] or ""))
    assert (status["state"], status["ready"], status["durable"]) == ("ACTIVE", False, False)
    assert not sidecar.gate_allows()
    with urllib.request.urlopen(f"http://127.0.0.1:{sidecar.operations}/-/ready", timeout=5) as answer:
        assert answer.status == 200
    prometheus.start()
    sidecar.wait_active()


def test_a_kill_that_prometheus_cannot_tell_yet_is_waited_for(sidecar: Sidecar, prometheus: Prometheus):
    prometheus.start()
    sidecar.start()
    sidecar.wait_active()
    sidecar.ask("POST", "/api/v1/trigger", {"reason": "fat finger"})
    prometheus.wait_scraped("KILLED")
    prometheus.stop()
    sidecar.forget()
    sidecar.start()
    sidecar.wait("a failed question", lambda one: "does not tell" in (one["not_ready_reason"] or ""))
    time.sleep(3.0)  # it goes on asking
    assert not sidecar.gate_allows()
    prometheus.start()
    assert codes(sidecar.wait_killed()) == ["restored"]


def test_a_kill_while_prometheus_is_silent_is_durable_and_the_record_joins_it(sidecar: Sidecar, prometheus: Prometheus):
    prometheus.start()
    sidecar.start()
    sidecar.wait_active()
    _, first = sidecar.ask("POST", "/api/v1/trigger", {"reason": "before"})
    prometheus.wait_scraped("KILLED")
    prometheus.stop()
    sidecar.forget()
    sidecar.start()
    sidecar.wait("a failed question", lambda one: "does not tell" in (one["not_ready_reason"] or ""))
    code, killed = sidecar.ask("POST", "/api/v1/trigger", {"reason": "while blind"})
    assert (code, killed["state"], killed["durable"]) == (200, "KILLED", True)
    sidecar.kill9()
    sidecar.start()
    assert codes(sidecar.wait_killed()) == ["operator"]
    sidecar.forget()
    sidecar.start()
    sidecar.wait("a failed question", lambda one: "does not tell" in (one["not_ready_reason"] or ""))
    sidecar.ask("POST", "/api/v1/trigger", {"reason": "while blind again"})
    prometheus.start()
    joined = sidecar.wait("the record", lambda one: len(one["causes"]) == 2 and one["durable"])
    assert codes(joined) == ["operator", "restored"]
    assert joined["epoch"] > first["epoch"]
    sidecar.kill9()
    sidecar.start()
    again = sidecar.wait_killed()
    sidecar.wait("the check to end", lambda one: one["ready"])
    assert codes(again) == codes(sidecar.status()) == ["operator", "restored"]


def test_a_state_folder_of_an_older_day_is_noticed_and_kills_once(sidecar: Sidecar, prometheus: Prometheus):
    prometheus.start()
    sidecar.start()
    sidecar.wait_active()
    sidecar.kill9()
    shutil.copytree(sidecar.state, sidecar.folder / "older")
    sidecar.start()
    sidecar.wait_active()
    sidecar.ask("POST", "/api/v1/trigger", {"reason": "to be forgotten"})
    prometheus.wait_scraped("KILLED")
    sidecar.forget()
    shutil.copytree(sidecar.folder / "older", sidecar.state)
    sidecar.start()
    allowed = []

    def killed(status: dict[str, Any]) -> bool:
        allowed.append(sidecar.gate_allows())
        return status["state"] == "KILLED"

    assert codes(sidecar.wait("the rollback to be noticed", killed)) == ["state_rolled_back"]
    assert not any(allowed)
    sidecar.wait_killed()
    sidecar.kill9()
    sidecar.start()
    sidecar.wait("the check to end", lambda one: one["ready"])
    assert codes(sidecar.wait_killed()) == ["state_rolled_back"]


def test_a_stored_state_counts_without_prometheus_and_is_checked_when_it_answers(
    sidecar: Sidecar, prometheus: Prometheus
):
    prometheus.start()
    sidecar.start()
    sidecar.wait_active()
    sidecar.kill9()
    shutil.copytree(sidecar.state, sidecar.folder / "older")
    sidecar.start()
    sidecar.wait_active()
    sidecar.ask("POST", "/api/v1/trigger", {"reason": "to be forgotten"})
    prometheus.wait_scraped("KILLED")
    prometheus.stop()
    sidecar.forget()
    shutil.copytree(sidecar.folder / "older", sidecar.state)
    sidecar.start()
    sidecar.wait_active()
    prometheus.start()
    assert codes(sidecar.wait_killed()) == ["state_rolled_back"]
    assert not sidecar.gate_allows()


def verify(sidecar: Sidecar, *more: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "sidecar", "audit", "verify", "--config", str(sidecar.folder / "config.yaml")]
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_tail_that_was_cut_with_the_log_s_own_mark_is_found_by_what_prometheus_saw(
    sidecar: Sidecar, prometheus: Prometheus
):
    prometheus.start()
    sidecar.start()
    sidecar.wait_active()
    for number in range(3):
        sidecar.ask("POST", "/api/v1/trigger", {"reason": f"kill {number}"})
    audit = sidecar.state / "audit"
    (file,) = audit.glob("*.jsonl")
    head = json.loads(file.read_text().splitlines()[-1])["seq"]
    wait_for(lambda: prometheus.value("killswitch_audit_head_sequence") == head, "the head to be scraped")
    sidecar.kill9()
    code, text = verify(sidecar, "--prometheus", prometheus.url)
    assert (code, f"Prometheus saw seq {head}" in text) == (0, True), text
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-2]))
    for other in audit.iterdir():
        if other != file:
            other.unlink()
    assert verify(sidecar)[0] == 0
    code, text = verify(sidecar, "--prometheus", prometheus.url)
    assert code == 1
    assert f"ends at seq {head - 2}, but seq {head} was written" in text
    code, text = verify(sidecar, "--prometheus", prometheus.url, "--switch", "another")
    assert (code, "of switch 'another'" in text) == (1, True), text
    prometheus.stop()
    code, text = verify(sidecar, "--prometheus", prometheus.url)
    assert (code, "was not compared" in text) == (1, True), text


# The reader alone, on a past that was written into Prometheus: nothing ages quickly enough to wait for it.

STATES = ("ACTIVE", "KILLED", "RECOVERING", "DISABLED")


def scrape(at: float, state: str | None, *, switch: str = "s", instance: str = "a", factor: float = 1.0) -> list[str]:
    target = f'switch="{switch}",instance="{instance}"'
    lines = [f'killswitch_state{{{target},state="{one}"}} {int(one == state)} {at:.3f}' for one in STATES]
    lines += [f"killswitch_position_limit_factor{{{target}}} {factor} {at:.3f}"]
    return [*lines, f"killswitch_epoch{{{target}}} {int(at) % 1000} {at:.3f}"]


@pytest.fixture(scope="module")
def past() -> Iterator[tuple[str, float]]:
    """URL of a Prometheus with a past of several switches, and the moment that it ends at."""
    if shutil.which("prometheus") is None:
        pytest.skip("Prometheus is not installed")
    now = float(int(time.time()))
    samples = [
        *(line for age in range(7200, 7800, 60) for line in scrape(now - age, "ACTIVE", switch="old", factor=0.75)),
        *scrape(now - 7900, "KILLED", switch="old"),
        *scrape(now - 9000, "KILLED", switch="overlap", instance="gone"),
        *scrape(now - 8800, "ACTIVE", switch="overlap", instance="come"),
        *scrape(now - 9000, "KILLED", switch="hidden"),
        *(line for age in range(1000, 1300, 60) for line in scrape(now - age, "DISABLED", switch="hidden")),
        *(line for age in range(600, 900, 60) for line in scrape(now - age, None, switch="hidden")),
        *scrape(now - 90_000, "KILLED", switch="forgotten"),
        *scrape(now - 400, "KILLED", switch="recent"),
        *scrape(now - 100, "ACTIVE", switch="recent"),
        *scrape(now - 5, "KILLED", switch="own"),
    ]
    by_metric: dict[str, list[str]] = {}
    for line in sorted(samples, key=lambda line: float(line.rpartition(" ")[2])):  # promtool drops what is out of order
        by_metric.setdefault(line.partition("{")[0], []).append(line)
    text = [line for metric, lines in by_metric.items() for line in (f"# TYPE {metric} gauge", *lines)]
    with tempfile.TemporaryDirectory(prefix="ks") as name:
        server = Prometheus(Path(name) / "past", free_port())
        (server.folder / "past.om").write_text("\n".join([*text, "# EOF", ""]))
        data = server.folder / "data"
        subprocess.run(
            ["promtool", "tsdb", "create-blocks-from", "openmetrics", server.folder / "past.om", data],
            check=True,
            capture_output=True,
            timeout=60,
        )
        server.start()
        try:
            yield server.url, now
        finally:
            server.stop()


@pytest.mark.parametrize(
    ("switch", "running", "found"),
    [
        ("old", 10.0, {(7200, State.ACTIVE, 0.75)}),
        ("old", 7850.0, {(7900, State.KILLED, 1.0)}),
        ("overlap", 10.0, {(9000, State.KILLED, 1.0), (8800, State.ACTIVE, 1.0)}),
        ("hidden", 10.0, {(9000, State.KILLED, 1.0)}),
        ("forgotten", 10.0, set()),
        ("recent", 10.0, {(100, State.ACTIVE, 1.0)}),
        ("recent", 150.0, {(400, State.KILLED, 1.0)}),
        ("own", 60.0, set()),
        ("nobody", 10.0, set()),
    ],
)
async def test_the_newest_look_from_before_the_start_is_found_in_a_real_past(
    past: tuple[str, float], switch: str, running: float, found: set[tuple[float, State, float]]
):
    url, now = past
    waited = time.time() - now
    reader = RecordReader(urls=[url], timeout=10.0, headers={}, http=None)
    record = await reader.read(switch, running=lambda: running + waited, lookback=86_400.0)
    assert {(now - one.time, one.state, one.factor) for one in record.sightings} == found
    if switch == "overlap":
        assert record.highest_epoch == max(int(now - age) % 1000 for age in (9000, 8800))
