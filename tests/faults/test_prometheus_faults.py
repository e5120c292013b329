"""Each way in which a Prometheus can fail: what the rule says, what the gate does and when, and that it comes back.

While a reading is missing the gate stays as it is for `hold_for`, then restricts: `unreachable` says how where nobody
answered, `then` where the answer was of no use. Two different restrictions tell the two apart from outside. A real
Prometheus that is stopped, killed and started again is in tests/e2e/test_blind.py.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.cast import wait_for
from tests.faults import scripted_prometheus as script
from tests.faults.bystander import Bystander
from tests.faults.scripted_prometheus import ScriptedPrometheus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.cast import Sidecar
    from tests.faults.scripted_prometheus import Exchange

pytestmark = pytest.mark.e2e

HOLD = 0.5
RULE = {
    "trigger": "portfolio_drawdown",
    "type": "threshold",
    "query": "min(portfolio_drawdown_ratio)",
    "operator": "lt",
    "threshold": -0.15,
    "series": 1,
    "max_age": "3s",
    "on_no_data": {"hold_for": "500ms", "then": "reduce_only", "unreachable": "halt"},
}
# A busy machine delays everything; a loop that waits for Prometheus would be stuck for its time limit, a second.
GATE_SECONDS = 0.5
MEMORY_BYTES = 80 * 1024 * 1024

NO_ANSWER, NO_USE = (403, "halted"), (403, "reduce_only")
FAULTS: dict[str, tuple[Callable[[Exchange], None], tuple[int, str], str]] = {
    "reset": (script.reset, NO_ANSWER, "unreachable"),
    "hang": (script.hang, NO_ANSWER, "timeout"),
    "slow loris": (script.drip, NO_ANSWER, "timeout"),
    "503 text": (script.unavailable, NO_ANSWER, "unreachable"),
    "HTML 200": (script.login_page, NO_USE, "bad_response"),
    "an answer that breaks off": (script.cut_off, NO_USE, "bad_response"),
    "truncated JSON": (script.cut_off_json, NO_USE, "bad_response"),
    "partial": (script.partial, NO_USE, "partial"),
    "empty": (script.empty, NO_USE, "missing"),
    "not even a time": (script.nothing_at_all, NO_USE, "bad_response"),
    "NaN": (script.saying("NaN"), NO_USE, "not_a_number"),
    "+Inf": (script.saying("+Inf"), NO_USE, "not_a_number"),
    "-Inf": (script.saying("-Inf"), NO_USE, "not_a_number"),
    "duplicate series": (script.twice, NO_USE, "ambiguous"),
    "native histogram": (script.native_histogram, NO_USE, "wrong_type"),
    "old samples": (script.old_samples, NO_USE, "stale"),
    "samples from the future": (script.future_samples, NO_USE, "future"),
    "a clock that goes back an hour": (script.clock(-3600.0), NO_USE, "stale"),
    "100 MB": (script.huge, NO_USE, "too_large"),
    "100 MB in chunks": (script.huge_chunked, NO_USE, "too_large"),
}


@pytest.fixture(scope="module")
def _server() -> Iterator[ScriptedPrometheus]:
    server = ScriptedPrometheus()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(_server: ScriptedPrometheus) -> Iterator[ScriptedPrometheus]:
    _server.value = "-0.01"
    yield _server
    _server.fail(None)


@pytest.fixture
def other() -> Iterator[ScriptedPrometheus]:
    server = ScriptedPrometheus()
    server.start()
    yield server
    server.fail(None)
    server.stop()


def opened(make_sidecar: Callable[..., Sidecar], *servers: ScriptedPrometheus, **rule: Any) -> Sidecar:
    switch = make_sidecar([{**RULE, **rule}], [server.url for server in servers])
    switch.start()
    switch.wait_gate(200, "active")
    return switch


def bad_evaluations(switch: Sidecar, reason: str) -> float:
    name = re.compile(rf'killswitch_trigger_evaluation_failures_total{{.*reason="{reason}".*}}')
    return sum(value for key, value in switch.metrics().items() if name.match(key))


@pytest.mark.parametrize("restricted", [NO_ANSWER, NO_USE], ids=["no answer", "an answer of no use"])
def test_no_use_of_a_fault_is_made_and_its_end_is_noticed(
    make_sidecar: Callable[..., Sidecar], server: ScriptedPrometheus, restricted: tuple[int, str]
) -> None:
    """One fault after the other on one sidecar, which must come back from each."""
    switch = opened(make_sidecar, server)
    assert switch.process is not None
    process = psutil.Process(switch.process.pid)
    before = process.memory_info().rss
    for fault, (behaviour, expected, reason) in FAULTS.items():
        if expected == restricted:
            print(fault)  # pytest shows it where one fails
            _suffer(switch, server, behaviour, restricted, reason)
            assert process.memory_info().rss - before < MEMORY_BYTES


def _suffer(
    switch: Sidecar,
    server: ScriptedPrometheus,
    behaviour: Callable[[Exchange], None],
    restricted: tuple[int, str],
    reason: str,
) -> None:
    counted = bad_evaluations(switch, reason)
    with Bystander(sidecar=switch) as bystander:
        began = time.monotonic()
        server.fail(behaviour)
        switch.wait_gate(*restricted)
        shut = time.monotonic()
        trigger = switch.trigger_of()
        assert trigger["health"] in {"no_data", "error"}
        assert not trigger["armed"]
        # A breach that nobody can see: whatever is allowed from here on a healthy switch would have refused.
        server.value = "-0.5"
        switch.assert_gate_stays(*restricted, seconds=0.2)
        status = switch.status()
        assert (status["state"], status["causes"]) == ("ACTIVE", [])
        assert bad_evaluations(switch, reason) > counted
        assert switch.gate(intent="cancel").status == 200
        still = time.monotonic()
        server.value = "-0.01"
        server.fail(None)
        switch.wait_gate(200, "active")
    assert bystander.allowed_between(shut, still) == []
    first_denied = next(one.told for one in bystander.told if one.status == 403)
    assert first_denied - began >= HOLD - 0.2  # one bad reading decides nothing
    assert bystander.slowest() < GATE_SECONDS
    assert switch.trigger_of()["armed"]


def test_a_refused_connection_halts_and_a_server_that_listens_again_lifts_that(
    make_sidecar: Callable[..., Sidecar], other: ScriptedPrometheus
) -> None:
    switch = opened(make_sidecar, other)
    with Bystander(sidecar=switch) as bystander:
        other.stop()
        switch.wait_gate(*NO_ANSWER)
        assert bad_evaluations(switch, "unreachable") >= 1
        other.start()
        switch.wait_gate(200, "active")
    assert bystander.slowest() < GATE_SECONDS


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_server_whose_clock_is_wrong_by_an_hour_is_believed_for_its_samples_are_as_young_as_it_says(
    make_sidecar: Callable[..., Sidecar], server: ScriptedPrometheus, hours: int
) -> None:
    server.fail(script.clock(hours * 3600.0))
    switch = opened(make_sidecar, server)
    server.value = "-0.2"
    switch.wait_gate(403, "killed")


def test_a_clock_that_leaps_forward_an_hour_makes_nothing_pass_that_breaches(
    make_sidecar: Callable[..., Sidecar], server: ScriptedPrometheus
) -> None:
    switch = opened(make_sidecar, server)
    server.fail(script.clock(3600.0))
    switch.assert_gate_stays(200, "active", seconds=0.6)
    server.value = "-0.2"
    switch.wait_gate(403, "killed")


def test_an_answer_that_is_repeated_for_ever_grows_old(
    make_sidecar: Callable[..., Sidecar], server: ScriptedPrometheus
) -> None:
    """A cache in between: its sample is as young as it ever was, by the time that the answer itself carries."""
    switch = opened(make_sidecar, server)
    server.fail(script.frozen())
    began = time.monotonic()
    switch.wait_gate(*NO_USE)
    assert time.monotonic() - began >= 3.0
    assert bad_evaluations(switch, "stale") >= 1
    server.fail(None)
    switch.wait_gate(200, "active")


@pytest.mark.parametrize("fault", ["hang", "HTML 200", "503 text"])
def test_another_server_stands_in_for_one_that_fails_and_a_breach_on_it_kills(
    make_sidecar: Callable[..., Sidecar], server: ScriptedPrometheus, other: ScriptedPrometheus, fault: str
) -> None:
    switch = opened(make_sidecar, server, other)
    with Bystander(sidecar=switch) as bystander:
        server.fail(FAULTS[fault][0])
        asked = other.asked
        wait_for(lambda: other.asked > asked + 3, "the other server to be asked")
        switch.assert_gate_stays(200, "active", seconds=1.5)
    assert {one.status for one in bystander.told} == {200}
    other.value = "-0.2"
    switch.wait_gate(403, "killed")
