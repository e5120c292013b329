"""A process that gets no time, no memory, no descriptors or a wrong time: it denies, and goes on by itself afterwards.

A sidecar that is stopped as a whole (SIGSTOP) and wakes to a breach is in tests/e2e/test_trading_code.py, and so is
one that is dead.
"""

from __future__ import annotations

import http.client
import os
import resource
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from sidecar.client import ExecutionGate, TradingBlockedError
from tests.cast import wait_for
from tests.faults import scripted_prometheus as script
from tests.faults.bystander import Bystander
from tests.faults.scripted_prometheus import ScriptedPrometheus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.cast import Metric, Prometheus, Sidecar
    from tests.faults.tracer import Tracer

pytestmark = pytest.mark.e2e

LEASE = 1.0  # as in the cast's configuration
HOURS = 3600.0


def denied(gate: ExecutionGate) -> str | None:
    try:
        gate.check_can_execute()
    except TradingBlockedError as blocked:
        return blocked.decision.code
    return None


# A loop that stands still


def test_a_loop_that_stands_still_makes_the_page_stale_and_serves_nothing_old_when_it_goes_on(
    sidecar: Callable[..., Sidecar], drawdown: Metric, tracer: Callable[..., Tracer]
) -> None:
    """Every wait of the event loop takes three seconds: threads live, the loop does not get round to anything."""
    switch = sidecar()
    page = ExecutionGate(page=switch.page)
    assert denied(page) is None
    with Bystander(sidecar=switch) as bystander:
        stuck = tracer(switch, "epoll_wait,epoll_pwait,epoll_pwait2:delay_enter=3s", main_thread=True)
        attached = time.monotonic()
        wait_for(lambda: denied(page) == "stale", "the page to be stale", patience=LEASE + 3.0)
        drawdown.set(-0.5)
        time.sleep(2 * 0.25)  # two scrapes: from here on Prometheus knows, and the sidecar cannot look
        breached = time.monotonic()
        stuck.release()
        switch.wait_gate(403, "killed")
    assert breached - attached < 60
    page.close()
    # The page was believed for no longer than a lease. What it says after the loop's next turn is that turn's news.
    ages = [told for told, code in bystander.page if code == "stale"]
    assert ages, "the page never was stale"
    first_killed = next(one.told for one in bystander.told if one.reason == "killed")
    assert bystander.allowed_between(first_killed, time.monotonic()) == []


# Clocks

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@pytest.fixture
def faketime() -> Path:
    found = [FAKETIME, *Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]
    there = next((path for path in found if path.exists()), None)
    if there is None:
        pytest.skip("libfaketime is not installed")
    return there


@pytest.fixture
def with_clock(
    faketime: Path,
    make_sidecar: Callable[..., Sidecar],
    shared_prometheus: Prometheus,
    drawdown: Metric,
    tmp_path: Path,
) -> Callable[..., tuple[Sidecar, Callable[[float], None]]]:
    """A sidecar whose wall clock the test sets: the result's second part adds so many seconds to it."""

    def start(**sections: Any) -> tuple[Sidecar, Callable[[float], None]]:
        offset = tmp_path / "offset"
        offset.write_text("+0")

        def step(seconds: float) -> None:
            fresh = tmp_path / "fresh"
            fresh.write_text(f"{seconds:+.0f}")
            fresh.replace(offset)

        exporter = drawdown.exporter
        rule = drawdown.rule(max_age="10s", on_no_data={"hold_for": "10s"})
        beside = {**rule, "trigger": "beside", "source": "scrape:trader", "query": drawdown.selector}
        scrape = [{"name": "trader", "url": f"http://{exporter.address}/metrics", "interval": "1s", "timeout": "1s"}]
        switch = make_sidecar([rule, beside], [shared_prometheus.url], scrape=scrape, **sections)
        # Times that a busy machine cannot break: this is about clocks.
        switch.config["gate"]["lease"], switch.config["rules"]["interval"] = "5s", "1s"
        switch.write_config()
        switch.environ |= {
            "LD_PRELOAD": str(faketime),
            "FAKETIME_TIMESTAMP_FILE": str(offset),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_RESET": "1",
        }
        switch.start()
        switch.wait_gate(200, "active")
        return switch, step

    return start


def clock_of(switch: Sidecar) -> float:
    """Seconds by which the wall clock of a sidecar is ahead of ours, from the time that it gives a reload."""
    assert switch.control("POST", "/-/reload").status == 200
    return switch.metrics()["killswitch_config_last_reload_success_timestamp_seconds"] - time.time()


@pytest.mark.parametrize("hours", [1, -1, 24, -24])
def test_a_step_of_the_wall_clock_changes_nothing(
    with_clock: Callable[..., tuple[Sidecar, Callable[[float], None]]], drawdown: Metric, hours: int
) -> None:
    switch, step = with_clock(recovery={"cooldown": "2s", "health": {"sources_up": False}})
    with Bystander(sidecar=switch) as bystander:
        step(hours * HOURS)
        assert abs(clock_of(switch) - hours * HOURS) < 60.0, "the clock did not step"
        switch.assert_gate_stays(200, "active", seconds=2.5)  # every rule is evaluated twice
    assert {one.status for one in bystander.told} == {200}
    assert {code for _, code in bystander.page} == {"active"}

    step(0)
    switch.kill_switch()
    asked = time.monotonic()
    assert switch.recover().status == 200
    step(hours * HOURS)
    switch.wait_gate(200, "active")
    assert time.monotonic() - asked >= 2.0  # the cooldown is running time
    assert switch.status()["position_limit_factor"] < 1.0  # and so is the ladder
    step(0)
    drawdown.set(-0.5)
    switch.wait_gate(403, "killed")
    switch.wait_status("the kill to be durable", lambda status: status["durable"])
    switch.restart()
    switch.wait_gate(403, "killed")
    assert switch.cli("audit", "verify").returncode == 0


@pytest.mark.parametrize("hours", [24, -24])
def test_a_clock_that_stepped_while_the_sidecar_was_down_ends_no_cooldown(
    with_clock: Callable[..., tuple[Sidecar, Callable[[float], None]]], hours: int
) -> None:
    switch, step = with_clock(recovery={"cooldown": "3s", "health": {"sources_up": False}})
    switch.kill_switch()
    assert switch.recover().status == 200
    switch.wait_status("the cooldown", lambda status: status["state"] == "RECOVERING" and status["durable"])
    switch.kill9()
    step(hours * HOURS)
    began = time.monotonic()
    switch.start()
    switch.wait_gate(403, "recovering")
    switch.wait_gate(200, "active")
    assert time.monotonic() - began >= 1.5
    assert switch.status()["position_limit_factor"] < 1.0


# Forked trading code


def _ask_as_child(page: Path, socket: Path, results: Any) -> None:
    for way in ({"page": page}, {"socket": socket}):
        gate = ExecutionGate(**way)
        results.put([denied(gate) for _ in range(50)])
        gate.close()


def test_a_forked_trader_and_its_parent_each_get_their_own_answers(
    sidecar: Callable[..., Sidecar], drawdown: Metric
) -> None:
    switch = sidecar()
    page, socket = ExecutionGate(page=switch.page), ExecutionGate(socket=switch.gate_socket, timeout=2.0)
    assert denied(page) is None
    assert denied(socket) is None
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        # The very objects of the parent, with its mapping and its open connection.
        found = {denied(page), *(denied(socket) for _ in range(200))}
        wait_for(lambda: denied(page) == "killed" and denied(socket) == "killed", "the kill, in the child")
        os.write(writing, repr(found).encode())
        os._exit(0)
    assert {denied(socket) for _ in range(200)} <= {None}
    time.sleep(0.2)
    switch.kill_switch()
    assert (denied(page), denied(socket)) == ("killed", "killed")
    assert os.read(reading, 1000) in {b"{None}", b"{None, 'killed'}", b"{'killed', None}"}
    assert os.waitpid(child, 0)[1] == 0
    for end in (reading, writing):
        os.close(end)
    page.close()
    socket.close()


# Too little of something


@contextmanager
def limited(switch: Sidecar, kind: int, soft: int) -> Iterator[None]:
    """Let a limit hold for a running sidecar."""
    assert switch.process is not None
    before = resource.prlimit(switch.process.pid, kind)
    resource.prlimit(switch.process.pid, kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.prlimit(switch.process.pid, kind, before)


def test_without_descriptors_a_breach_still_closes_the_gate_and_is_stored_when_there_are_some(
    sidecar: Callable[..., Sidecar], drawdown: Metric
) -> None:
    switch = sidecar()
    switch.wait_status("the first state", lambda status: status["durable"])
    assert switch.process is not None
    process = psutil.Process(switch.process.pid)
    kept = http.client.HTTPConnection("127.0.0.1", switch.gate_port, timeout=10)

    def ask() -> tuple[int, str | None]:
        kept.request("GET", "/gate")
        answer = kept.getresponse()
        answer.read()
        return answer.status, answer.headers["X-Killswitch-Reason"]

    assert ask() == (200, "active")
    before = process.num_fds()
    idle: list[http.client.HTTPConnection] = []
    with limited(switch, resource.RLIMIT_NOFILE, before + 8):
        for _ in range(40):
            idle.append(http.client.HTTPConnection("127.0.0.1", switch.gate_port, timeout=10))
            idle[-1].connect()
        wait_for(lambda: process.num_fds() >= before + 7, "all descriptors to be in use")
        assert ask()[0] == 200  # who is connected is answered
        drawdown.set(-0.5)
        wait_for(lambda: ask() == (403, "killed"), "the breach to be seen")
        page = ExecutionGate(page=switch.page)
        assert denied(page) == "killed"
        page.close()
        for connection in idle:
            connection.close()
    switch.wait_status("the kill to be durable", lambda status: status["durable"])
    wait_for(lambda: process.num_fds() <= before + 4, "the descriptors to be given back")
    assert switch.control("GET", "/-/healthy").status == 200
    kept.close()
    switch.restart()
    switch.wait_gate(403, "killed")


def test_without_memory_it_denies_or_decides_and_never_lets_a_breach_pass(
    make_sidecar: Callable[..., Sidecar],
) -> None:
    server = ScriptedPrometheus()
    server.start()
    rule = {
        "trigger": "portfolio_drawdown",
        "type": "threshold",
        "query": "min(portfolio_drawdown_ratio)",
        "operator": "lt",
        "threshold": -0.15,
        "max_age": "5s",
        "on_no_data": {"hold_for": "500ms", "then": "halt", "unreachable": "halt"},
    }
    switch = make_sidecar([rule], [server.url]).start()
    try:
        switch.wait_gate(200, "active")
        assert switch.process is not None
        process = psutil.Process(switch.process.pid)
        with Bystander(sidecar=switch) as bystander:
            with limited(switch, resource.RLIMIT_AS, process.memory_info().vms + 4 * 1024 * 1024):
                server.fail(script.huge)  # up to 16 MiB of it are read
                wait_for(lambda: switch.gate().status == 403, "the gate to close")
                shut = time.monotonic()
                time.sleep(0.5)
                still = time.monotonic()
            server.fail(None)
            server.value = "-0.5"
            # Either it lives and sees the breach, or it has given up: then it denies, and liveness has it restarted.
            wait_for(lambda: switch.gate().reason in {"killed", "internal_error"}, "the breach to be seen")
        assert bystander.allowed_between(shut, still) == []
        switch.restart()  # as the kubelet does it for one that has given up
        switch.wait_gate(403, "killed")
    finally:
        server.fail(None)
        server.stop()


class Starved:
    """Gives a process 5 ms of every 100, as a processor limit of 5 % does, and needs no cgroup for it."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._starve)

    def _starve(self) -> None:
        while not self._over.is_set():
            self._process.suspend()
            self._over.wait(0.095)
            self._process.resume()
            self._over.wait(0.005)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(5)
        self._process.resume()


def test_with_a_twentieth_of_a_processor_a_breach_closes_the_gate_and_nothing_old_is_served(
    sidecar: Callable[..., Sidecar], drawdown: Metric
) -> None:
    switch = sidecar()
    switch.wait_status("the first state", lambda status: status["durable"])
    assert switch.process is not None
    with Bystander(sidecar=switch, pause=0.05) as bystander:
        with Starved(psutil.Process(switch.process.pid)):
            time.sleep(1.0)
            drawdown.set(-0.5)
            began = time.monotonic()
            switch.wait_gate(403, "killed", patience=60.0)
            took = time.monotonic() - began
        switch.wait_status("the kill to be durable", lambda status: status["durable"])
        told = time.monotonic()
    first = next(one.told for one in bystander.told if one.reason == "killed")
    assert bystander.allowed_between(first, told) == []
    print(f"\nbreach to block with 5 % of a processor: {took:.1f} s")
    assert switch.recover().status == 409  # the breach is still there
    drawdown.set(-0.01)
    wait_for(lambda: switch.recover().status == 200, "a recovery")
    switch.wait_gate(200, "active")
