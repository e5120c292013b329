"""What a sidecar costs its pod: processor time and resident memory, by the kernel's own count."""

import time
from collections.abc import Mapping
from math import nan
from pathlib import Path
from typing import Any, Final

from figures import Figure, Section
from surroundings import ROOT, SERIES, CannotMeasure, Sidecar, breach_rule, sidecar, threshold_rules

RULES: Final = 200
AT_REST_SECONDS: Final = 5.0
"""Before memory is looked at; less only where everything is measured in short."""
GROWTH: Final = (10, 100, 1000)
BROAD_RULES: Final = 10
BROAD: Final = {10: "[0-9]", 100: "[0-9]{1,2}", 200: ".+"}
"""Patterns of series numbers, by how many of the exporter's series they match."""


def measure_cost(folder: Path, prometheus_url: str, *, seconds: float) -> list[Section]:
    """Processor time of evaluating rules, and memory at rest."""
    folder.mkdir()
    one, _ = _run(folder / "one", breach_rule(interval="1s"), prometheus_url, seconds / 2)
    default, default_memory = _run(folder / "default", ROOT / "rules" / "default.yaml", prometheus_url, seconds / 2)
    many, many_memory = _run(folder / "many", threshold_rules(RULES), prometheus_url, seconds)
    cpu = Section(
        title="4. Processor time",
        method=f"User and system time of the sidecar process (/proc/PID/stat) over {seconds:g} s ({seconds / 2:g} s "
        f"for few rules), nobody asking the gate; share of one core.",
        figures=[
            Figure(name=f"{RULES} threshold rules at 1 s", value=many["percent"], unit="%", aim=10.0, note=_each(many)),
            Figure(name="one rule at 1 s", value=one["percent"], unit="%"),
            Figure(name="rules/default.yaml", value=default["percent"], unit="%"),
        ],
    )
    memory = Section(
        title="5. Resident memory",
        method=f"VmRSS of the sidecar process, at least {min(AT_REST_SECONDS, seconds / 2):g} s after the gate opened.",
        figures=[
            Figure(name="rules/default.yaml", unit="MiB", aim=64.0, limit=80.0, **default_memory),
            Figure(name=f"{RULES} threshold rules at 1 s", unit="MiB", aim=64.0, limit=80.0, **many_memory),
        ],
    )
    return [cpu, memory, _growth(folder, prometheus_url, seconds / 2), _breadth(folder, prometheus_url, seconds / 2)]


def _growth(folder: Path, prometheus_url: str, seconds: float) -> Section:
    """How both grow with the number of rules; twice the slope would not be linear."""
    runs = {count: _run(folder / f"rules-{count}", threshold_rules(count), prometheus_url, seconds) for count in GROWTH}
    percent = {count: cost["percent"] for count, (cost, _) in runs.items()}
    mib = {count: memory["value"] for count, (_, memory) in runs.items()}
    figures = [Figure(name=f"{count:,} rules: one core's share", value=percent[count], unit="%") for count in GROWTH]
    figures += [Figure(name=f"{count:,} rules: resident", value=mib[count], unit="MiB") for count in GROWTH]
    low, middle, high = GROWTH
    for name, at, unit in (("processor", percent, "% a rule"), ("memory", mib, "MiB a rule")):
        first, second = ((at[b] - at[a]) / (b - a) for a, b in ((low, middle), (middle, high)))
        note = f"{low} to {middle}: {first:.4f}, {middle} to {high:,}: {second:.4f} {unit}"
        figures.append(_bend(f"slope of {name}: later ÷ earlier", first, second, note))
    return Section(
        title="5b. Growth with the number of rules",
        method=f"Threshold rules at 1 s on {SERIES} series, {seconds:g} s each; processor and memory as above. A slope "
        f"that stays the same is linear growth.",
        figures=figures,
    )


def _bend(name: str, first: float, second: float, note: str) -> Figure:
    """How two slopes compare; not a number where the earlier one is lost in the clock's own ticks."""
    return Figure(name=name, value=second / first if first > 0 else nan, unit="×", note=note)


def _breadth(folder: Path, prometheus_url: str, seconds: float) -> Section:
    """How processor time grows with the series that a rule looks at."""
    costs = {
        count: _run(folder / f"series-{count}", threshold_rules(BROAD_RULES, series=pattern), prometheus_url, seconds)[
            0
        ]
        for count, pattern in BROAD.items()
    }
    each = {count: cost["used"] / cost["evaluated"] * 1e6 for count, cost in costs.items()}
    low, middle, high = BROAD
    first, second = ((each[b] - each[a]) / (b - a) for a, b in ((low, middle), (middle, high)))
    figures = [Figure(name=f"{count} series: an evaluation", value=each[count], unit="µs") for count in BROAD]
    note = f"{low} to {middle}: {first:.2f}, {middle} to {high}: {second:.2f} µs a series"
    figures.append(_bend("slope: later ÷ earlier", first, second, note))
    return Section(
        title="5c. Growth with the number of series",
        method=f"{BROAD_RULES} threshold rules at 1 s, each on so many series that Prometheus hands over one by one, "
        f"{seconds:g} s each; processor time of the whole sidecar by evaluations.",
        figures=figures,
    )


def _run(
    folder: Path, rules: Mapping[str, Any] | Path, prometheus_url: str, seconds: float
) -> tuple[dict[str, float], dict[str, Any]]:
    with sidecar(folder, rules, prometheus_url=prometheus_url) as running:
        running.wait_until_allowed()
        time.sleep(min(AT_REST_SECONDS, seconds))
        memory = {"value": running.memory_mib(), "note": _kinds(running)}
        evaluated = running.evaluations()
        time.sleep(0.5)
        used, began = running.cpu_seconds(), time.monotonic()
        time.sleep(seconds)
        used, took = running.cpu_seconds() - used, time.monotonic() - began
        evaluated = running.evaluations() - evaluated
    if evaluated <= 0:
        raise CannotMeasure(f"no rule was evaluated within {seconds:g} s")
    return {"percent": used / took * 100, "evaluated": evaluated, "used": used}, memory


def _each(cost: Mapping[str, float]) -> str:
    return f"{cost['evaluated']:.0f} evaluations, {cost['used'] / cost['evaluated'] * 1e6:.0f} µs each"


def _kinds(running: Sidecar) -> str:
    kinds = {"RssAnon": "its own", "RssFile": "of files, shared with others"}
    parts = [f"{running.memory_mib(field):.1f} {kind}" for field, kind in kinds.items()]
    return f"{', '.join(parts)}; peak {running.memory_mib('VmHWM'):.1f} MiB"
