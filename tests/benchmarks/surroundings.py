"""Starts what is measured and what that needs, as processes of their own: Prometheus, an exporter, an echo, sidecars.

Everything listens on loopback and writes below one temporary folder; every process is ended by its own pid.
"""

import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import uvloop

ROOT: Final = Path(__file__).resolve().parents[2]
SERIES: Final = 200
SCRAPE_SECONDS: Final = 1.0
STOP_SECONDS: Final = 15.0

GATE_QUESTION: Final = (
    b"GET /gate HTTP/1.1\r\nHost: 127.0.0.1:9780\r\nUser-Agent: bench\r\nAccept: */*\r\nX-Order-Intent: new\r\n\r\n"
)

Address = tuple[str, int] | str
_spawn = multiprocessing.get_context("spawn")


class CannotMeasure(Exception):  # noqa: N818 - named for what happened
    """Something that the measurement needs did not come up, or did not do what was asked."""


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def connect(address: Address, *, timeout: float = 5.0) -> socket.socket:
    """Connect to a Unix socket (a path) or a TCP address."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    sock.connect(address)
    if family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def ask(sock: socket.socket, question: bytes) -> bytes:
    """One question and its whole answer, which tells its length."""
    sock.sendall(question)
    answer = b""
    while True:
        part = sock.recv(65536)
        if not part:
            raise CannotMeasure(f"the connection was closed after {answer!r}")
        answer += part
        head, end, body = answer.partition(b"\r\n\r\n")
        if end and len(body) >= int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]):
            return answer


def wait_for(what: str, is_so: Callable[[], bool], *, seconds: float, pause: float = 0.005) -> None:
    """Wait until something is so.

    Raises:
        CannotMeasure: it was not so in time.
    """
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise CannotMeasure(f"waited {seconds:g} s in vain: {what}")
        time.sleep(pause)


# Children that are Python functions


@contextmanager
def child(work: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """Run `work(pipe, *arguments)` in a process of its own until the block ends; yields our end of the pipe."""
    ours, theirs = _spawn.Pipe()
    process = _spawn.Process(target=work, args=(theirs, *arguments), daemon=True)
    process.start()
    try:
        yield ours
    finally:
        ours.close()
        process.terminate()
        process.join(STOP_SECONDS)


def receive(pipe: Connection, *, seconds: float) -> Any:
    """What a child sends within `seconds`."""
    if not pipe.poll(seconds):
        raise CannotMeasure(f"a child process has said nothing for {seconds:g} s")
    return pipe.recv()


class _Echo(asyncio.Protocol):
    """Answers whatever comes with the same bytes, unparsed: the least that a server in Python can do."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(self._answer)


def _serve_echo(pipe: Connection, answer: bytes, path: str) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        tcp = await loop.create_server(lambda: _Echo(answer), "127.0.0.1", 0)
        await loop.create_unix_server(lambda: _Echo(answer), path)
        pipe.send(tcp.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    uvloop.run(run())


@contextmanager
def echo(answer: bytes, folder: Path) -> Iterator[Mapping[str, Address]]:
    """A bare echo under the same event loop as the gate; yields where it listens: `TCP` and `Unix`."""
    path = str(folder / "echo.sock")
    with child(_serve_echo, answer, path) as pipe:
        yield {"TCP": ("127.0.0.1", receive(pipe, seconds=10.0)), "Unix": path}


def _serve_metrics(pipe: Connection) -> None:
    values = {f'bench_value{{series="{number}"}}': 0.0 for number in range(SERIES)} | {"bench_breach": 0.0}
    values |= {"portfolio_drawdown_ratio": -0.01, "daily_pnl_ratio": 0.01, "exchange_connected": 1.0}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                lines = [f"{name} {value}\n" for name, value in values.items()]
                lines.append(f"trading_heartbeat_timestamp_seconds {time.time()}\n")
                body = "".join(lines).encode()
                head = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {len(body)}\r\n"
                writer.write(head.encode() + b"\r\n" + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def change() -> None:
        try:
            name, value = pipe.recv()
        except EOFError:
            return
        values[name] = value
        pipe.send(time.monotonic())

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        asyncio.get_running_loop().add_reader(pipe.fileno(), change)
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    asyncio.run(run())


@dataclass(frozen=True, kw_only=True, slots=True)
class Exporter:
    """A process that exports `SERIES` quiet series, what the default rules read, and one value to break."""

    port: int
    pipe: Connection

    def set(self, name: str, value: float) -> float:
        """Show another value from now on; returns the moment, by the monotonic clock."""
        self.pipe.send((name, value))
        moment: float = receive(self.pipe, seconds=5.0)
        return moment


@contextmanager
def exporter() -> Iterator[Exporter]:
    """Run the exporter."""
    with child(_serve_metrics) as pipe:
        yield Exporter(port=receive(pipe, seconds=10.0), pipe=pipe)


# Prometheus


@contextmanager
def prometheus(
    folder: Path,
    target: int,
    *,
    slow_seconds: float | None = None,
    alert_rules: Mapping[str, Any] | None = None,
    alertmanager: str | None = None,
) -> Iterator[str]:
    """A real Prometheus that scrapes the exporter each second; yields its URL once it has samples.

    Args:
        folder: made here.
        target: the exporter's port.
        slow_seconds: scrape interval of a second job on the same target; None for no such job.
        alert_rules: a rule file's document.
        alertmanager: `host:port` to send alerts to.
    """
    binary = shutil.which("prometheus")
    if binary is None:
        raise CannotMeasure("prometheus is not installed; `make test` installs it, or: apt-get install prometheus")
    folder.mkdir()
    port = free_port()
    jobs: list[dict[str, Any]] = [{"job_name": "bench", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}]
    if slow_seconds is not None:
        jobs.append({**jobs[0], "job_name": "slow", "scrape_interval": f"{slow_seconds:g}s"})
    every = f"{SCRAPE_SECONDS:g}s"
    config: dict[str, Any] = {
        "global": {"scrape_interval": every, "scrape_timeout": every},
        "scrape_configs": jobs,
    }
    if alert_rules is not None:
        (folder / "alerts.yml").write_text(json.dumps(alert_rules))
        config["rule_files"] = ["alerts.yml"]
    if alertmanager is not None:
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    (folder / "prometheus.yml").write_text(json.dumps(config))
    command = [
        binary,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    url = f"http://127.0.0.1:{port}"
    with process(command, folder / "log"):
        wait_for("samples in Prometheus", lambda: _has_samples(url), seconds=30.0, pause=0.1)
        yield url


def _has_samples(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?query=bench_breach", timeout=2.0) as answer:
            return bool(json.load(answer)["data"]["result"])
    except (OSError, ValueError):
        return False


@contextmanager
def process(command: Sequence[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a command until the block ends, its output in `log`."""
    with log.open("wb") as output:
        running = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, start_new_session=True)
    try:
        yield running
    finally:
        running.send_signal(signal.SIGTERM)
        try:
            running.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


# Sidecars


def threshold_rules(count: int, *, interval: str = "1s", series: str | None = None) -> dict[str, Any]:
    """So many threshold rules in one group, none of which fires.

    Each looks at one series of its own, or all look at every series whose number matches the pattern `series`.
    """
    rules = [
        {
            "trigger": f"rule_{number}",
            "type": "threshold",
            "query": f'bench_value{{series=~"{series}"}}'
            if series
            else f'min(bench_value{{series="{number % SERIES}"}})',
            "operator": "lt",
            "threshold": -0.15,
            "action": "kill",
            "max_age": "30s",
        }
        for number in range(count)
    ]
    return {"groups": [{"name": "bench", "interval": interval, "rules": rules}]}


def breach_rule(*, interval: str, **more: Any) -> dict[str, Any]:
    """One rule that blocks while `bench_breach` is above zero, and lets go by itself."""
    rule = {
        "trigger": "breach",
        "type": "threshold",
        "query": "max(bench_breach)",
        "operator": "gt",
        "threshold": 0.5,
        "action": "halt",
        "max_age": "30s",
        **more,
    }
    return {"groups": [{"name": "bench", "interval": interval, "rules": [rule]}]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """A running sidecar.

    Attributes:
        started: when its process was started, by the monotonic clock.
    """

    pid: int
    gate: Mapping[str, Address]
    page: str
    control: str
    operations: int
    log: Path
    started: float

    def is_allowed(self) -> bool:
        """Whether the gate lets an order through; False too while nobody listens."""
        try:
            with connect(self.gate["TCP"], timeout=1.0) as sock:
                return is_allow(ask(sock, GATE_QUESTION))
        except OSError:
            return False

    def wait_until_allowed(self, seconds: float = 20.0) -> float:
        """Wait until the gate lets orders through; returns the moment.

        Raises:
            CannotMeasure: it does not; with the end of the sidecar's log.
        """
        try:
            wait_for("the gate's first 200", self.is_allowed, seconds=seconds, pause=0.002)
        except CannotMeasure as error:
            raise CannotMeasure(f"{error}; the sidecar's log ends:\n{self.log.read_text()[-2000:]}") from error
        return time.monotonic()

    def cpu_seconds(self) -> float:
        """User and system time that the process has used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self, field: str = "VmRSS") -> float:
        """A line of /proc/PID/status, in MiB."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1]) / 1024

    def evaluations(self) -> float:
        """How many evaluations of rules there have been, by its own metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.operations}/metrics", timeout=5.0) as answer:
            lines = answer.read().decode().splitlines()
        name = "killswitch_trigger_evaluations_total{"
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def is_allow(answer: bytes) -> bool:
    """Whether the gate's answer lets the order through."""
    return answer.startswith(b"HTTP/1.1 200 ")


@contextmanager
def sidecar(
    folder: Path, rules: Mapping[str, Any] | Path, *, prometheus_url: str | None = None, **sections: Any
) -> Iterator[Sidecar]:
    """Run a sidecar on these rules (a document, or a file) with a state folder of its own, below `folder`.

    Args:
        folder: made if it does not exist; with the state of an earlier run the sidecar takes that up.
        rules: what to evaluate.
        prometheus_url: where the server is; None for none.
        sections: of the configuration, instead of the defaults.
    """
    folder.mkdir(exist_ok=True)
    if not isinstance(rules, Path):
        document, rules = rules, folder / "rules.yaml"
        rules.write_text(json.dumps(document))  # JSON is YAML
    gate, operations = free_port(), free_port()
    config: dict[str, Any] = {
        "switch": {"name": "bench/trader-0"},
        "prometheus": {"urls": [prometheus_url] if prometheus_url else []},
        "rules": {"files": [str(rules)], "interval": "1s"},
        "gate": {
            "listen": f"127.0.0.1:{gate}",
            "socket": str(folder / "gate.sock"),
            "page": str(folder / "state.page"),
        },
        "operations": {"listen": f"127.0.0.1:{operations}"},
        "control": {"socket": str(folder / "control.sock")},
        "storage": {"dir": str(folder / "state"), "restore_from_prometheus": "off"},
        **sections,
    }
    operations = int(config["operations"]["listen"].rpartition(":")[2])
    (folder / "config.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "sidecar", "serve", "--config", str(folder / "config.yaml")]
    started = time.monotonic()
    with process(command, folder / "log") as running:
        yield Sidecar(
            pid=running.pid,
            gate={"TCP": ("127.0.0.1", gate), "Unix": str(folder / "gate.sock")},
            page=str(folder / "state.page"),
            control=str(folder / "control.sock"),
            operations=operations,
            log=folder / "log",
            started=started,
        )
