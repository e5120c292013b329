"""What a look at the state page costs the trading process, beside a check inside that process."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from figures import Figure, Section, percentile
from surroundings import breach_rule, sidecar

from sidecar.client import ExecutionGate

BATCH: Final = 100
THREADS: Final = 4


class InProcess:
    """The check of a switch that lives inside the trading process: take a lock, compare, let go."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state = "ACTIVE"

    def check_and_block(self) -> bool:
        """Whether orders are blocked."""
        with self._lock:
            return self._state == "KILLED"


def measure_page(folder: Path, prometheus_url: str, *, batches: int) -> Section:
    """The client on the page against the in-process check, in turn."""
    with sidecar(folder, breach_rule(interval="1s"), prometheus_url=prometheus_url) as running:
        running.wait_until_allowed()
        with ExecutionGate(page=running.page) as gate:
            checks: dict[str, Callable[[], object]] = {
                "page": gate.check_can_execute,
                "in-process": InProcess().check_and_block,
            }
            medians = _medians(checks, batches)
            single = {name: _one_by_one(check, batches * 10) for name, check in checks.items()}
            threaded = _in_threads(gate.check_can_execute, batches * 10)
    beside = f"page {medians['page']:.3f} µs, in-process {medians['in-process']:.3f} µs"
    high = {name: percentile(times, 0.99) for name, times in single.items()}
    return Section(
        title="7. State page read",
        method=f"ExecutionGate(page=…).check_can_execute() of a running sidecar against lock and compare. Median over "
        f"{batches} batches of {BATCH} calls in turn; p99 of single calls, the clock's own 0.05 µs or so included.",
        figures=[
            Figure(name="page, median", value=medians["page"], unit="µs"),
            Figure(name="median, ratio", value=medians["page"] / medians["in-process"], unit="×", aim=2.0, note=beside),
            Figure(name="page, p99", value=high["page"], unit="µs", note=f"in-process {high['in-process']:.2f} µs"),
            Figure(
                name=f"page, p99 with {THREADS} threads reading", value=percentile(threaded, 0.99), unit="µs", aim=5.0
            ),
        ],
    )


def _medians(checks: dict[str, Callable[[], object]], batches: int) -> dict[str, float]:
    """Microseconds a call."""
    times: dict[str, list[float]] = {name: [] for name in checks}
    clock, calls = time.perf_counter_ns, range(BATCH)
    for _ in range(batches):
        for name, check in checks.items():
            start = clock()
            for _ in calls:
                check()
            times[name].append((clock() - start) / BATCH / 1e3)
    return {name: percentile(taken, 0.5) for name, taken in times.items()}


def _one_by_one(check: Callable[[], object], calls: int) -> list[float]:
    clock, times = time.perf_counter_ns, []
    for _ in range(calls):
        start = clock()
        check()
        times.append((clock() - start) / 1e3)
    return times


def _in_threads(check: Callable[[], object], calls: int) -> list[float]:
    times: list[float] = []
    threads = [threading.Thread(target=lambda: times.extend(_one_by_one(check, calls))) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times
