"""The cast of the tests with real processes: a trading process that exports metrics, Prometheus, the sidecar.

Nothing in the path is faked but the trading process, which is an exporter that can be told to misbehave in every way
that exporters do. Tests wait on conditions with a deadline; they sleep only to prove that something does not happen.
One Prometheus and one exporter serve the whole session (a new target takes Prometheus five seconds to notice); the
series of each test carry a label of their own.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

T = TypeVar("T")

PATIENCE_SECONDS = 20.0
CODE = "let-trading-resume-7391"
APPROVER = "bob"
ROOT = Path(__file__).parents[1]


def wait_for(look: Callable[[], T | None], what: str, *, patience: float = PATIENCE_SECONDS) -> T:
    """Look until there is something to see, and return it; fail with the last thing seen at the deadline."""
    deadline = time.monotonic() + patience
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {patience:g} s in vain for {what}; last seen: {found!r}")
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# The trading process


class Exporter:
    """Serves metrics as a trading process does; `fault` makes it fail as trading processes do.

    `fault` is None, "hang" (takes connections and never answers) or "error" (500).
    """

    def __init__(self) -> None:
        self.fault: str | None = None
        self.scrapes = 0
        self._lines: dict[tuple[str, str], str] = {}
        self._release = threading.Event()
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                exporter.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.scrapes += 1
        if self.fault == "hang":
            self._release.wait()
            request.close_connection = True
            return
        lines = [line.replace("NOW", repr(time.time())) for line in self._lines.copy().values()]
        status, body = 200, "".join(sorted(lines)).encode()
        if self.fault == "error":
            status, body = 500, b"out of order"
        request.send_response(status)
        request.send_header("Content-Type", "text/plain; version=0.0.4")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        with contextlib.suppress(OSError):  # a scraper that gave up
            request.wfile.write(body)

    def fail(self, fault: str | None) -> None:
        """Misbehave from now on, or stop it."""
        self.fault = fault
        if fault != "hang":
            self._release.set()
            self._release = threading.Event()

    def set(self, name: str, case: str, value: float, *, at: float | None = None) -> None:
        stamp = "" if at is None else f" {int(at * 1000)}"
        shown = "NaN" if math.isnan(value) else repr(value)
        self._lines[name, case] = f'{name}{{case="{case}"}} {shown}{stamp}\n'

    def beat(self, name: str, case: str) -> None:
        self._lines[name, case] = f'{name}{{case="{case}"}} NOW\n'

    def drop(self, name: str, case: str) -> None:
        self._lines.pop((name, case), None)

    def reset(self) -> None:
        self.fail(None)
        self._lines.clear()

    def close(self) -> None:
        self.fail(None)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


@dataclass(kw_only=True)
class Metric:
    """One metric of the trading process of one test."""

    exporter: Exporter
    name: str
    case: str

    @property
    def selector(self) -> str:
        return f'{self.name}{{case="{self.case}"}}'

    def set(self, value: float, *, at: float | None = None) -> None:
        """Export this value from the next scrape on; `at` gives the sample a time of its own (Unix seconds)."""
        self.exporter.set(self.name, self.case, value, at=at)

    def beat(self) -> None:
        """Export the time of each scrape, as a heart that beats."""
        self.exporter.beat(self.name, self.case)

    def drop(self) -> None:
        self.exporter.drop(self.name, self.case)

    def rule(self, **changes: Any) -> dict[str, Any]:
        """A drawdown rule on this metric that kills."""
        return {
            "trigger": "portfolio_drawdown",
            "type": "threshold",
            "query": f"min({self.selector})",
            "operator": "lt",
            "threshold": -0.15,
            "max_age": "5s",
            "on_no_data": {"hold_for": "2s"},
            **changes,
        }


# Prometheus


class Prometheus:
    """A real Prometheus on loopback."""

    def __init__(self, folder: Path, *, target: str | None) -> None:
        self.port = free_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        jobs = f"[{{job_name: trader, static_configs: [{{targets: ['{target}']}}]}}]" if target else "[]"
        (folder / "prometheus.yml").write_text(
            f"global: {{scrape_interval: 250ms, scrape_timeout: 200ms}}\nscrape_configs: {jobs}\n"
        )

    def configure(self, config: Mapping[str, Any]) -> None:
        """Start with this configuration instead."""
        (self._folder / "prometheus.yml").write_text(yaml.safe_dump(dict(config)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with (self._folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={self._folder}/prometheus.yml",
                    f"--storage.tsdb.path={self._folder}/data",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                    "--log.level=warn",
                ],
                stdout=log,
                stderr=log,
            )
        wait_for(self._answers, f"Prometheus in {self._folder} to answer queries", patience=30)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "log").read_text()
        try:
            return bool(self.query("vector(1)"))
        except (OSError, ValueError):
            return False

    def query(self, text: str) -> list[Any]:
        """Answer of an instant query: the list of its series."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            body = f"query={text}"
            connection.request("POST", "/api/v1/query", body, {"Content-Type": "application/x-www-form-urlencoded"})
            answer = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        return answer["data"]["result"] if answer["status"] == "success" else []

    def alerts(self, name: str, state: str = "firing") -> list[dict[str, Any]]:
        """The alerts of this name that its own rules have in this state."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/api/v1/alerts")
            found = json.loads(connection.getresponse().read())["data"]["alerts"]
        finally:
            connection.close()
        return [one for one in found if one["labels"]["alertname"] == name and one["state"] == state]

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=15)
            self._process = None


# The sidecar


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back over HTTP."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def reason(self) -> str | None:
        """The gate's reason code."""
        return self.headers.get("x-killswitch-reason")

    @property
    def decided(self) -> tuple[int, str | None]:
        """Status and reason code of a gate's answer: (403, 'killed')."""
        return self.status, self.reason


def _waits_for_the_disk(reply: Reply) -> bool:
    """Whether the two seconds were over before a disk was done that other tests use too: a good answer, and no news."""
    return reply.status == 503 and reply.document.get("durable") is False


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: object = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    given = dict(headers or {})
    if body is not None:
        given["Content-Type"] = "application/json"
    try:
        connection.request(method, path, None if body is None else json.dumps(body), given)
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(status=answer.status, headers=found, body=answer.read())
    finally:
        connection.close()


@dataclass(kw_only=True)
class Sidecar:
    """The sidecar as a process of its own, with its folders under `folder`.

    `wrapper` stands before its command line and must leave it the process that is started, as `strace -D` does.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    environ: dict[str, str]
    code: str = CODE
    wrong_code: str = f"{CODE}-not"
    wrapper: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    gate_port: int = 0
    operations_port: int = 0
    _logs_read: int = 0

    # Files

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def rules_file(self) -> Path:
        return self.folder / "rules" / "rules.yaml"

    @property
    def state_folder(self) -> Path:
        return self.folder / "state"

    @property
    def page(self) -> Path:
        return self.folder / "run" / "state.page"

    @property
    def gate_socket(self) -> Path:
        return self.folder / "run" / "gate.sock"

    @property
    def control_socket(self) -> Path:
        return self.folder / "control" / "control.sock"

    @property
    def log_file(self) -> Path:
        return self.folder / "stderr.log"

    def write_config(self, **sections: Mapping[str, Any]) -> None:
        """Write the configuration with these keys of these sections changed, now and for later writes."""
        for name, changes in sections.items():
            part = self.config.setdefault(name, {})
            if isinstance(changes, dict) and isinstance(part, dict):
                part.update(changes)
            else:
                self.config[name] = changes
        self.config_file.write_text(yaml.safe_dump(self.config))

    def write_rules(self, *rules: Mapping[str, Any], file: Path | None = None) -> None:
        groups = {"groups": [{"name": "desk", "rules": [dict(rule) for rule in rules]}]}
        target = file or self.rules_file
        target.parent.mkdir(exist_ok=True)
        fresh = target.with_suffix(".new")
        fresh.write_text(yaml.safe_dump(groups))
        fresh.replace(target)  # at once, as an editor or a ConfigMap does it

    # Process

    def start(self) -> Sidecar:
        """Start the process and wait until it listens."""
        self.launch()
        wait_for(self._listens, f"the sidecar in {self.folder} to listen")
        return self

    def launch(self) -> None:
        """Start the process and wait for nothing."""
        assert self.process is None
        self._logs_read = self.log_file.stat().st_size if self.log_file.exists() else 0
        with self.log_file.open("ab") as log, (self.folder / "stdout.log").open("ab") as out:
            self.process = subprocess.Popen(
                [*self.wrapper, sys.executable, "-m", "sidecar", "serve", "--config", self.config_file],
                stdout=out,
                stderr=log,
                env=self.environ,
                cwd=ROOT,
            )

    def _listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the sidecar has ended:\n{self.log_file.read_text()}"
        for line in self.logged("sidecar.listening"):
            self.gate_port = int(line["gate"].rpartition(":")[2])
            self.operations_port = int(line["operations"].rpartition(":")[2])
            return True
        return False

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Log lines of this event that the present process has written."""
        with self.log_file.open("rb") as log:
            log.seek(self._logs_read)
            lines = [line for line in log.read().splitlines() if line.startswith(b"{") and line.endswith(b"}")]
        return [found for found in map(json.loads, lines) if found.get("event") == event]

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill9(self) -> None:
        """End it as the kernel's out-of-memory killer does."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(timeout=10)
        self.process = None

    def terminate(self) -> int:
        """End it in an orderly way; returns the exit code."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(timeout=15)
        self.process = None
        return code

    def restart(self) -> Sidecar:
        """SIGKILL and a new process."""
        self.kill9()
        return self.start()

    def close(self) -> None:
        if self.process is not None:
            with contextlib.suppress(OSError):
                self.process.send_signal(signal.SIGCONT)
            self.kill9()

    # Gate

    def gate(
        self, *, intent: str | None = None, unix: bool = False, method: str = "GET", timeout: float = 5.0
    ) -> Reply:
        connection = self._gate_connection(timeout, unix=unix)
        return _ask(connection, method, "/gate", headers={"X-Order-Intent": intent} if intent else None)

    def order(self, unix: bool = False, **order: Any) -> dict[str, Any]:
        """The decision on one order."""
        reply = _ask(self._gate_connection(5.0, unix=unix), "POST", "/v1/orders/check", order)
        assert reply.status in (200, 400), reply
        return dict(reply.document) if reply.status == 200 else {"decision": "deny", **reply.document}

    def _gate_connection(self, timeout: float, *, unix: bool) -> http.client.HTTPConnection:
        if unix:
            return _UnixConnection(self.gate_socket, timeout)
        return http.client.HTTPConnection("127.0.0.1", self.gate_port, timeout=timeout)

    def wait_gate(self, status: int, reason: str, *, patience: float = PATIENCE_SECONDS) -> Reply:
        """Wait until the gate answers this, and return the answer."""
        last: list[Reply] = []

        def look() -> Reply | None:
            last[:] = [self.gate()]
            return last[0] if last[0].decided == (status, reason) else None

        try:
            return wait_for(look, f"the gate to answer {status} {reason}", patience=patience)
        except AssertionError as error:
            raise AssertionError(f"{error}: {last[0].decided}; {json.dumps(self.status(), indent=1)}") from None

    def assert_gate_stays(self, status: int, reason: str, *, seconds: float) -> None:
        """Prove that for so long nothing else is answered."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            answer = self.gate()
            assert answer.decided == (status, reason), f"the gate answered {answer.decided}: {self.status()}"
            time.sleep(0.02)

    # Control socket, operations listener, command line

    def control(self, method: str, path: str, body: object = None, *, timeout: float = 15.0) -> Reply:
        return _ask(_UnixConnection(self.control_socket, timeout), method, path, body)

    def operations(self, path: str, *, method: str = "GET", body: object = None) -> Reply:
        return _ask(http.client.HTTPConnection("127.0.0.1", self.operations_port, timeout=10), method, path, body)

    def status(self) -> dict[str, Any]:
        return dict(self.control("GET", "/api/v1/status").document)

    def trigger_of(self, name: str = "portfolio_drawdown") -> dict[str, Any]:
        found = self.control("GET", "/api/v1/triggers").document["triggers"]
        return next(dict(one) for one in found if one["trigger"] == name)

    def wait_status(
        self, what: str, holds: Callable[[dict[str, Any]], object], *, patience: float = PATIENCE_SECONDS
    ) -> dict[str, Any]:
        """Wait until the status satisfies a condition, and return it."""
        last: list[dict[str, Any]] = []

        def look() -> dict[str, Any] | None:
            last[:] = [self.status()]
            return last[0] if holds(last[0]) else None

        try:
            return wait_for(look, what, patience=patience)
        except AssertionError as error:
            raise AssertionError(f"{error}; status: {json.dumps(last[0], indent=1)}") from None

    def kill_switch(self, reason: str = "fat finger", **more: Any) -> dict[str, Any]:
        """Block trading as an operator, over the control socket; returns the status once the kill is durable."""
        reply = self.control("POST", "/api/v1/trigger", {"reason": reason, "by": "alice", **more})
        if _waits_for_the_disk(reply):
            return self.wait_status("the kill to be durable", lambda status: status["durable"])
        assert reply.status == 200, reply.body
        return dict(reply.document)

    def recover(self, *, code: str = CODE, by: str = APPROVER, reason: str = "all is well again", **more: Any) -> Reply:
        body = {"reason": reason, "by": by, "code": code, **more}
        reply = self.control("POST", "/api/v1/recovery", body)
        if _waits_for_the_disk(reply):
            self.wait_status("the disk", lambda status: status["durable"])
            reply = self.control("POST", "/api/v1/recovery", body)
        return reply

    def audit(self, *types: str) -> list[dict[str, Any]]:
        """Audit events as the API shows them, oldest first; of these types only, where any are given."""
        events = self.control("GET", "/api/v1/audit?limit=1000").document["events"]
        return [event for event in events if not types or event["type"] in types]

    def wait_audit(self, kind: str, *, count: int = 1) -> dict[str, Any]:
        """Wait until there are so many audit events of a type, and return the newest."""
        look = lambda: found if len(found := self.audit(kind)) >= count else None  # noqa: E731
        return wait_for(look, f"{count} audit events {kind}")[-1]

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its text, `killswitch_state{state="KILLED",switch="…"}`."""
        lines = self.operations("/metrics").body.decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def states(self) -> dict[str, float]:
        """The one-hot killswitch_state by state."""
        found = {name: value for name, value in self.metrics().items() if name.startswith("killswitch_state{")}
        return {name.partition('state="')[2].partition('"')[0]: value for name, value in found.items()}

    def cli(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return run_cli(*arguments, "--config", str(self.config_file), stdin=stdin)


def run_cli(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run(
        [sys.executable, "-m", "sidecar", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=30,
        cwd=ROOT,
        check=False,
    )


# Fixtures


@pytest.fixture(scope="session")
def killswitch() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line, on no sidecar of this test."""
    return run_cli


@pytest.fixture(scope="session")
def wait() -> Callable[..., Any]:
    """Look until there is something to see."""
    return wait_for


@pytest.fixture(scope="session")
def exporter() -> Iterator[Exporter]:
    exporter = Exporter()
    yield exporter
    exporter.close()


@pytest.fixture(scope="session")
def _programs() -> None:
    for program in ("prometheus", "promtool"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


@pytest.fixture(scope="session")
def shared_prometheus(
    _programs: None, exporter: Exporter, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """The Prometheus that scrapes the exporter, for tests that leave it running."""
    server = Prometheus(tmp_path_factory.mktemp("prom"), target=exporter.address)
    server.start()
    try:
        wait_for(lambda: server.query("up == 1"), "the first scrape of the exporter", patience=30)
        yield server
    finally:
        server.kill()


@pytest.fixture
def own_prometheus(_programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that this test may stop and start; not started yet, and without targets."""
    server = Prometheus(tmp_path_factory.mktemp("own"), target=None)
    yield server
    server.kill()


_case_numbers = itertools.count(1)


@pytest.fixture
def case(exporter: Exporter) -> Iterator[str]:
    """Label value of this test's series."""
    yield f"c{next(_case_numbers)}"
    exporter.reset()


@pytest.fixture
def drawdown(exporter: Exporter, case: str) -> Metric:
    """The drawdown that the trading process exports; healthy at first."""
    metric = Metric(exporter=exporter, name="portfolio_drawdown_ratio", case=case)
    metric.set(-0.01)
    return metric


@pytest.fixture
def heartbeat(exporter: Exporter, case: str) -> Metric:
    """The time of the trading process' last beat; not exported at first."""
    return Metric(exporter=exporter, name="trading_heartbeat_timestamp_seconds", case=case)


@pytest.fixture
def make_sidecar(tmp_path_factory: pytest.TempPathFactory, case: str) -> Iterator[Callable[..., Sidecar]]:
    """Makes sidecars with short times; they are not started yet."""
    made: list[Sidecar] = []

    def make(rules: Sequence[Mapping[str, Any]] | None, urls: Sequence[str], **sections: Mapping[str, Any]) -> Sidecar:
        folder = tmp_path_factory.mktemp("ks")  # short, for the path of a socket is at most 107 bytes
        for name in ("run", "control", "rules"):
            (folder / name).mkdir()
        sidecar = Sidecar(
            folder=folder,
            name=f"e2e/{case}",
            config=_config(folder, f"e2e/{case}", urls),
            environ={**os.environ, "KILL_SWITCH_APPROVAL_CODE": CODE},
        )
        sidecar.environ.pop("KILLSWITCH_SOCKET", None)
        sidecar.write_config(**sections)
        if rules is not None:
            sidecar.write_rules(*rules)
        made.append(sidecar)
        return sidecar

    yield make
    for sidecar in made:
        sidecar.close()


@pytest.fixture
def patient(
    make_sidecar: Callable[..., Sidecar], shared_prometheus: Prometheus, drawdown: Metric
) -> Callable[..., Sidecar]:
    """Makes sidecars with times that a busy machine cannot break, for tests of something else; not started yet."""

    def make(**sections: Any) -> Sidecar:
        rule = drawdown.rule(max_age="30s", on_no_data={"hold_for": "30s"})
        made = make_sidecar([rule], [shared_prometheus.url], **sections)
        made.config["gate"]["lease"], made.config["rules"]["interval"] = "10s", "1s"
        made.write_config()
        return made

    return make


@pytest.fixture
def sidecar(
    make_sidecar: Callable[..., Sidecar], shared_prometheus: Prometheus, drawdown: Metric
) -> Callable[..., Sidecar]:
    """Starts a sidecar on the shared Prometheus and waits until its gate is open."""

    def start(*rules: Mapping[str, Any], **sections: Mapping[str, Any]) -> Sidecar:
        made = make_sidecar(rules or [drawdown.rule()], [shared_prometheus.url], **sections)
        made.start()
        made.wait_status("the gate to open", lambda status: status["ready"])
        return made

    return start


def _config(folder: Path, name: str, urls: Sequence[str]) -> dict[str, Any]:
    return {
        "switch": {"name": name},
        "prometheus": {"urls": list(urls), "timeout": "1s"},
        "rules": {"files": [f"{folder}/rules/*.yaml"], "interval": "250ms"},
        "gate": {
            "listen": "127.0.0.1:0",
            "socket": f"{folder}/run/gate.sock",
            "page": f"{folder}/run/state.page",
            "lease": "1s",
        },
        "operations": {"listen": "127.0.0.1:0"},
        "control": {"socket": f"{folder}/control/control.sock"},
        "alertmanager": {"notify": {"urls": []}},
        "recovery": {
            "cooldown": "2s",
            "backoff": {"factor": 1},
            "steps": [{"factor": 0.5}, {"factor": 0.75, "after": "1500ms"}, {"factor": 1.0, "after": "3s"}],
        },
        "storage": {"dir": f"{folder}/state", "restore_from_prometheus": "off"},
    }
