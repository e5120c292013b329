import asyncio
from collections.abc import Sequence
from dataclasses import replace
from math import inf, nan

import psutil
import pytest

from sidecar.app.health import HealthChecks, QueryCheck, judge_query
from sidecar.rules.model import Operator
from sidecar.rules.readings import Answer, Failure, Series

CHECK = QueryCheck(name="lag", query="lag_seconds", operator=Operator.LT, threshold=5.0)
DOWN = Failure(reason="unreachable", message="connection refused", unreachable=True)


def answer(*values: float, warnings: tuple[str, ...] = ()) -> Answer:
    series = tuple(Series(value=value) for value in values)
    return Answer(series=series, evaluated_at=0.0, oldest_sample=None, warnings=warnings)


def sampled(age: float) -> Answer:
    return Answer(series=(Series(value=1.0),), evaluated_at=1000.0, oldest_sample=1000.0 - age)


@pytest.mark.parametrize(
    ("said", "ok", "seen"),
    [
        (answer(1.0), True, "1"),
        (answer(1.0, 4.9), True, "1, 4.9"),
        (answer(1.0, 5.0), False, "1, 5"),
        (answer(), False, "no data"),
        (answer(nan), False, "nan"),
        (answer(-inf), False, "-inf"),
        (answer(1.0, warnings=("half",)), False, "a partial answer: half"),
        (DOWN, False, "unreachable: connection refused"),
        (sampled(60.0), True, "1"),
        (sampled(299.0), False, "stale: the sample is 299.0 s old, more than 60 s"),
        (sampled(-60.0), False, "future: the sample is 60.0 s in the future of the server's own clock"),
        (sampled(nan), False, "bad_response: the time of the sample is not a number"),
    ],
)
def test_a_query_check_is_healthy_only_where_every_value_is_known_and_holds(
    said: Answer | Failure, ok: bool, seen: str
) -> None:
    check = judge_query(CHECK, said)
    assert (check.ok, check.seen) == (ok, seen)
    assert check.wanted == "every value < 5"


def test_a_query_check_bears_samples_as_old_as_it_says() -> None:
    assert judge_query(replace(CHECK, max_age=300.0), sampled(299.0)).ok


def checks(**changes: object) -> HealthChecks:
    async def ask(queries: Sequence[str]) -> Sequence[Answer | Failure]:
        return [DOWN for _ in queries]

    wanted: dict[str, object] = {
        "sources": None,
        "min_memory_available": None,
        "max_cpu_percent": None,
        "queries": (),
        "ask": ask,
    }
    return HealthChecks(**{**wanted, **changes})  # type: ignore[arg-type]


async def test_without_checks_there_is_nothing_to_fail() -> None:
    assert await checks().run() == ()


async def test_a_source_that_has_never_answered_is_not_up() -> None:
    found = await checks(sources=lambda: [("prometheus", False, ""), ("scrape:x", True, "")]).run()
    (check,) = found
    assert not check.ok
    assert check.seen == "prometheus: no answer yet"
    assert check.blocker == "health check sources_up: seen prometheus: no answer yet, wanted every source answers"


async def test_all_sources_up_is_healthy() -> None:
    (check,) = await checks(sources=lambda: [("prometheus", True, "")]).run()
    assert (check.ok, check.seen) == (True, "all up")


@pytest.mark.parametrize(("available", "ok"), [(512, True), (511, False)])
async def test_memory_is_compared_with_what_is_wanted(
    monkeypatch: pytest.MonkeyPatch, available: int, ok: bool
) -> None:
    class Memory:
        pass

    memory = Memory()
    memory.available = available * 2**20  # type: ignore[attr-defined]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    (check,) = await checks(min_memory_available=512 * 2**20).run()
    assert (check.ok, check.wanted) == (ok, "at least 512 MiB")


@pytest.mark.parametrize(("used", "ok"), [(80.0, True), (80.5, False)])
async def test_cpu_is_compared_with_what_is_allowed(monkeypatch: pytest.MonkeyPatch, used: float, ok: bool) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: used)
    (check,) = await checks(max_cpu_percent=80.0).run()
    assert check.ok is ok


async def test_all_checks_run_together() -> None:
    began: list[str] = []
    both = asyncio.Event()

    async def ask(queries: Sequence[str]) -> Sequence[Answer | Failure]:
        began.extend(queries)
        both.set()
        return [answer(1.0), DOWN]

    found = await checks(sources=list, queries=(CHECK, CHECK), ask=ask).run()
    assert began == ["lag_seconds", "lag_seconds"]
    assert [check.ok for check in found] == [True, True, False]
