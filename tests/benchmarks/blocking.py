"""How long it takes from a breach, or from an operator's word, until orders are refused; and from start to ready."""

import json
import random
import select
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from figures import Figure, Section, percentile
from surroundings import (
    GATE_QUESTION,
    SCRAPE_SECONDS,
    CannotMeasure,
    Exporter,
    Sidecar,
    ask,
    breach_rule,
    connect,
    is_allow,
    sidecar,
    wait_for,
)

from sidecar.client import ExecutionGate

if TYPE_CHECKING:
    from collections.abc import Callable

POLL_SECONDS: Final = 0.001
GRACE_SECONDS: Final = 0.1
"""What the sidecar itself may add to the intervals of scraping and evaluating."""


# Breach to block


def measure_breaches(folder: Path, prometheus_url: str, source: Exporter, *, breaches: int) -> Section:
    """From the moment a value is beyond its threshold at the exporter to the first refused order."""
    folder.mkdir()
    through_prometheus, direct = 1.0, 0.25
    with sidecar(folder / "prometheus", breach_rule(interval="1s"), prometheus_url=prometheus_url) as running:
        times = _break(running, source, breaches, longest_phase=SCRAPE_SECONDS + through_prometheus)
    figures = _blocked("Prometheus, scrape 1 s, evaluation 1 s", times, SCRAPE_SECONDS + through_prometheus)
    target = {"name": "trader", "url": f"http://127.0.0.1:{source.port}/metrics", "interval": "250ms"}
    rules = breach_rule(interval="250ms", source="scrape:trader", max_age="5s")
    with sidecar(folder / "direct", rules, scrape=[{**target, "timeout": "200ms"}]) as running:
        times = _break(running, source, breaches, longest_phase=direct + direct)
    figures += _blocked("direct scrape 250 ms, evaluation 250 ms", times, direct + direct)
    return Section(
        title="3. Breach to block",
        method=f"The exporter shows a value beyond the threshold at a random moment; the gate is asked each ms until "
        f"its first 403. {breaches} breaches each. Bound: scrape interval + evaluation interval + 100 ms.",
        figures=figures,
    )


def _break(running: Sidecar, source: Exporter, breaches: int, *, longest_phase: float) -> list[float]:
    running.wait_until_allowed()
    times = []
    with connect(running.gate["TCP"]) as sock:

        def is_allowed() -> bool:
            return is_allow(ask(sock, GATE_QUESTION))

        for _ in range(breaches):
            time.sleep(random.random() * longest_phase)
            shown = source.set("bench_breach", 1.0)
            wait_for("the 403 after a breach", lambda: not is_allowed(), seconds=15.0, pause=POLL_SECONDS)
            times.append(time.monotonic() - shown)
            source.set("bench_breach", 0.0)
            wait_for("the 200 after a breach", is_allowed, seconds=15.0, pause=POLL_SECONDS)
    return times


def _blocked(name: str, times: list[float], intervals: float) -> list[Figure]:
    bound = intervals + GRACE_SECONDS
    spread = ", ".join(f"p{share * 100:g} {percentile(times, share):.3f}" for share in (0.0, 0.5, 0.9))
    beside = f"{spread} s of {len(times)}; {max(times) / bound:.2f} of the bound"
    return [Figure(name=f"{name}: longest", value=max(times), unit="s", aim=bound, note=beside)]


# Start to ready


def measure_starts(folder: Path, prometheus_url: str, *, starts: int) -> Section:
    """From starting the process to the gate's first answer, and to its first 200."""
    folder.mkdir()
    answers, ready = [], []
    for number in range(starts):
        rules = breach_rule(interval="1s")
        with sidecar(folder / f"start-{number}", rules, prometheus_url=prometheus_url) as running:
            wait_for("the gate's first answer", lambda one=running: _listens(one), seconds=20.0, pause=0.002)  # type: ignore[misc]
            answers.append(time.monotonic() - running.started)
            ready.append(running.wait_until_allowed() - running.started)
    return Section(
        title="6a. Start to ready",
        method=f"From starting `python -m sidecar serve` (byte-compiled) to the gate's first answer, which denies, and "
        f"to its first 200 with one rule on Prometheus; {starts} starts.",
        figures=[
            Figure(name="first answer, median", value=percentile(answers, 0.5), unit="s", note=_range(answers)),
            Figure(name="first 200, median", value=percentile(ready, 0.5), unit="s", aim=1.0, note=_range(ready)),
        ],
    )


def _listens(running: Sidecar) -> bool:
    try:
        with connect(running.gate["TCP"], timeout=1.0) as sock:
            return bool(ask(sock, GATE_QUESTION))
    except OSError:
        return False


def _range(times: list[float]) -> str:
    return f"{min(times):.2f} to {max(times):.2f} s"


# An operator's kill


def measure_kills(folder: Path, prometheus_url: str, *, kills: int) -> Section:
    """From sending an operator's kill to the first denial on page and socket, and to the durable answer."""
    recovery = {
        "require_approval": False,
        "cooldown": "10ms",
        "backoff": {"factor": 1},
        "steps": [{"factor": 1.0}],
        "health": {"sources_up": False},
    }
    rules = breach_rule(interval="1s")
    taken: dict[str, list[float]] = {"page": [], "socket": [], "answer": []}
    with sidecar(folder, rules, prometheus_url=prometheus_url, recovery=recovery) as running:
        running.wait_until_allowed()
        with (
            connect(running.gate["Unix"]) as gate,
            connect(running.control) as control,
            ExecutionGate(page=running.page) as page,
        ):
            for _ in range(kills):
                for name, seconds in _kill(gate, control, page).items():
                    taken[name].append(seconds)
                _recover(running, control)
                time.sleep(random.random() * 0.1)
    labels = {
        "page": "first denial on the state page",
        "socket": "first denial on the Unix socket",
        "answer": "durable answer to the operator",
    }
    return Section(
        title="6b. Operator's kill",
        method=f"POST /api/v1/trigger on the control socket, while page and gate socket are asked without a pause "
        f"(resolution about 0.2 ms); {kills} kills, each followed by a recovery.",
        figures=[figure for name, label in labels.items() for figure in _delays(label, taken[name], name)],
    )


def _kill(gate: socket.socket, control: socket.socket, page: ExecutionGate) -> dict[str, float]:
    """Seconds from sending the kill to each of its effects."""
    start = time.perf_counter()
    control.sendall(_request("/api/v1/trigger", {"reason": "benchmark", "by": "bench"}))
    effects: dict[str, Callable[[], bool]] = {
        "page": page.is_blocked,
        "socket": lambda: not is_allow(ask(gate, GATE_QUESTION)),
        "answer": lambda: bool(select.select([control], [], [], 0)[0]),
    }
    taken: dict[str, float] = {}
    while len(taken) < len(effects):
        for name in effects.keys() - taken.keys():
            if effects[name]():
                taken[name] = time.perf_counter() - start
        if time.perf_counter() - start > 10.0:
            raise CannotMeasure(f"a kill had no effect on {sorted(effects.keys() - taken.keys())} within 10 s")
    _expect_success("kill", ask(control, b""))
    return taken


def _recover(running: Sidecar, control: socket.socket) -> None:
    answer = ask(control, _request("/api/v1/recovery", {"reason": "benchmark", "by": "bench"}))
    _expect_success("recovery", answer)
    running.wait_until_allowed()


def _request(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def _expect_success(what: str, answer: bytes) -> None:
    if not is_allow(answer):
        raise CannotMeasure(f"the {what} was answered {answer[:2000]!r}")


def _delays(label: str, times: list[float], name: str) -> list[Figure]:
    middle, high = (percentile(times, share) * 1e3 for share in (0.5, 0.99))
    aim = None if name == "answer" else 10.0
    beside = f"p50 {middle:.2f} ms, longest {max(times) * 1e3:.2f} ms of {len(times)}"
    return [Figure(name=f"{label}: p99", value=high, unit="ms", aim=aim, note=beside)]
