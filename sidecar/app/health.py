"""The checks that a recovery depends on: sources, memory, CPU, and free PromQL. Nothing unknown counts as healthy."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil

from sidecar.rules.model import Operator
from sidecar.rules.readings import Answer, Failed, Failure, Fresh, Stale, describe, take_reading

CPU_SAMPLE_SECONDS = 1.0
MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """The outcome of one health check, in words for a person."""

    name: str
    ok: bool
    seen: str
    wanted: str

    @property
    def blocker(self) -> str:
        """The sentence that a refused recovery shows."""
        return f"health check {self.name}: seen {self.seen}, wanted {self.wanted}"


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryCheck:
    """A free PromQL check: healthy while every returned value satisfies `operator threshold`.

    Attributes:
        max_age: seconds; an older sample tells nothing of the present.
    """

    name: str
    query: str
    operator: Operator
    threshold: float
    max_age: float = 60.0


class AsksQueries(Protocol):
    """Something that answers PromQL."""

    async def __call__(self, queries: Sequence[str]) -> Sequence[Answer | Failure]:
        """Answer each query, in order."""


class HealthChecks:
    """Runs the configured checks.

    Args:
        sources: gives name and state of every source that enforcing rules use; None skips the check.
        min_memory_available: bytes of the host's memory; None skips the check.
        max_cpu_percent: of all cores over one second; None skips the check.
        queries: free PromQL checks.
        ask: answers their queries.
    """

    def __init__(
        self,
        *,
        sources: Callable[[], Sequence[tuple[str, bool | None, str]]] | None,
        min_memory_available: int | None,
        max_cpu_percent: float | None,
        queries: Sequence[QueryCheck],
        ask: AsksQueries,
    ) -> None:
        self._sources = sources
        self._min_memory = min_memory_available
        self._max_cpu = max_cpu_percent
        self._queries = tuple(queries)
        self._ask = ask

    async def run(self) -> tuple[Check, ...]:
        """Run all checks together; each is bounded by its source's own time limit."""
        parts = await asyncio.gather(self._check_queries(), self._check_cpu(), self._check_memory())
        return (*self._check_sources(), *(check for part in parts for check in part))

    def _check_sources(self) -> list[Check]:
        if self._sources is None:
            return []
        down = [f"{name}: {error or 'no answer yet'}" for name, up, error in self._sources() if not up]
        seen = "; ".join(down) if down else "all up"
        return [Check(name="sources_up", ok=not down, seen=seen, wanted="every source answers")]

    async def _check_memory(self) -> list[Check]:
        if self._min_memory is None:
            return []
        available = await asyncio.to_thread(lambda: int(psutil.virtual_memory().available))
        return [
            Check(
                name="min_memory_available",
                ok=available >= self._min_memory,
                seen=f"{available // MIB} MiB",
                wanted=f"at least {self._min_memory // MIB} MiB",
            )
        ]

    async def _check_cpu(self) -> list[Check]:
        if self._max_cpu is None:
            return []
        used = await asyncio.to_thread(psutil.cpu_percent, CPU_SAMPLE_SECONDS)
        wanted = f"at most {self._max_cpu:g} %"
        return [Check(name="max_cpu_percent", ok=used <= self._max_cpu, seen=f"{used:.0f} %", wanted=wanted)]

    async def _check_queries(self) -> list[Check]:
        if not self._queries:
            return []
        answers = await self._ask([check.query for check in self._queries])
        return [judge_query(check, answer) for check, answer in zip(self._queries, answers, strict=True)]


def judge_query(check: QueryCheck, answer: Answer | Failure) -> Check:
    """Judge one free PromQL check; no answer, no series, a warning, a NaN and an old sample are all unhealthy."""
    wanted = f"every value {check.operator.symbol} {check.threshold:g}"
    if isinstance(answer, Failure):
        return Check(name=check.name, ok=False, seen=f"{answer.reason}: {answer.message}", wanted=wanted)
    if answer.warnings:
        return Check(name=check.name, ok=False, seen=f"a partial answer: {'; '.join(answer.warnings)}", wanted=wanted)
    values = [one.value for one in answer.series]
    if not values:
        return Check(name=check.name, ok=False, seen="no data", wanted=wanted)
    # Prometheus repeats the last sample of a dead exporter for five minutes; whether that still holds is unknown.
    reading = take_reading(answer, max_age=check.max_age, series=None, may_be_empty=False)
    if isinstance(reading, Stale) or (isinstance(reading, Failed) and not reading.series):
        return Check(name=check.name, ok=False, seen=describe(reading), wanted=wanted)
    ok = isinstance(reading, Fresh) and all(check.operator.holds(value, check.threshold) for value in values)
    return Check(name=check.name, ok=ok, seen=", ".join(f"{value:g}" for value in values[:5]), wanted=wanted)
