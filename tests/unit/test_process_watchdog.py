"""Watchdogs on made-up control groups and machines: shares, windows, what cannot be read, and looks that hang."""

import asyncio
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from sidecar.adapters.process import PsutilMachine, Watchdog
from sidecar.adapters.process.machine import Process, Unreadable
from sidecar.adapters.process.usage import Memory
from sidecar.core.errors import InvariantViolation
from sidecar.rules.model import OrderRate, Rule
from sidecar.rules.model import Watchdog as Condition
from sidecar.rules.readings import Answer, Failure

MIB = 1024 * 1024
GIB = 1024 * MIB
WALL = 1_800_000_000.0


@dataclass
class FakeMachine:
    used: int = 2 * GIB
    total: int = 8 * GIB
    busy: float = 1000.0
    count: int = 4
    running: dict[str, list[Process]] = field(default_factory=dict)
    error: Exception | None = None
    gate: threading.Event | None = None

    def memory(self) -> Memory:
        if self.gate is not None:
            self.gate.wait()
        return Memory(used=self.used, limit=self.total)

    def busy_seconds(self) -> float:
        return self.busy

    def cores(self) -> int:
        return self.count

    def processes(self, name: str) -> list[Process]:
        if self.error is not None:
            raise self.error
        return self.running.get(name, [])


class World:
    """A /proc, a /sys/fs/cgroup, a machine and both clocks."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.root = folder / "proc", folder / "cgroup"
        self.machine = FakeMachine()
        self.now = 100.0
        self.timeout = 5.0
        self.watchdog = self.restarted()

    def restarted(self) -> Watchdog:
        self.watchdog = Watchdog(
            clock=lambda: self.now,
            wall=lambda: WALL + self.now,
            proc=self.proc,
            cgroup_root=self.root,
            machine=self.machine,
            timeout=self.timeout,
        )
        return self.watchdog

    def write(self, path: str, text: str | int) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def in_group(self, lines: str, pid: str = "self") -> None:
        file = self.proc / pid / "cgroup"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(lines)

    def v2(self, folder: str = "", *, memory: int = 100 * MIB, limit: str | int = 200 * MIB) -> None:
        """A group of version 2 with half of its memory in use, 20 MiB of it files that can be dropped, and 2 cores."""
        files: dict[str, str | int] = {
            "cgroup.controllers": "cpu memory",
            "cgroup.type": "domain",
            "memory.current": memory + 20 * MIB,
            "memory.max": limit,
            "memory.stat": f"anon {memory}\nfile {30 * MIB}\nactive_file {10 * MIB}\ninactive_file {20 * MIB}",
            "cpu.stat": "usage_usec 5000000\nuser_usec 1",
            "cpu.max": "200000 100000",
        }
        for name, text in files.items():
            self.write(f"{folder or '.'}/{name}", text)

    def v1(self, folder: str = "bot") -> None:
        self.write(f"memory/{folder}/memory.usage_in_bytes", 120 * MIB)
        self.write(f"memory/{folder}/memory.limit_in_bytes", 200 * MIB)
        self.write(f"memory/{folder}/memory.stat", f"inactive_file 1\ntotal_inactive_file {20 * MIB}")
        self.write(f"cpu,cpuacct/{folder}/cpuacct.usage", 5_000_000_000)
        self.write(f"cpu,cpuacct/{folder}/cpu.cfs_quota_us", 200_000)
        self.write(f"cpu,cpuacct/{folder}/cpu.cfs_period_us", 100_000)
        for mount in ("memory", "cpu,cpuacct"):
            self.write(f"{mount}/cgroup.procs", "")
        self.in_group(f"5:memory:/{folder}\n4:cpu,cpuacct:/{folder}\n0::/\n")

    async def look(self, condition: Condition) -> Answer | Failure:
        return await self.watchdog.probe(Rule(trigger="system_health", group="g", condition=condition))

    async def value(self, condition: Condition) -> float:
        answer = await self.look(condition)
        assert isinstance(answer, Answer), answer
        assert answer.evaluated_at == answer.oldest_sample == WALL + self.now
        (one,) = answer.series
        return one.value

    async def failure(self, condition: Condition) -> Failure:
        failure = await self.look(condition)
        assert isinstance(failure, Failure), failure
        assert not failure.unreachable
        return failure


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.in_group("0::/\n")
    return made


MEMORY = Condition(memory_percent=50.0, cpu_percent=None)
CPU = Condition(memory_percent=None, cpu_percent=50.0, window=10.0)


# Memory of a container


async def test_memory_exactly_at_its_limit_is_worth_one_in_version_2(world: World) -> None:
    world.v2()
    assert await world.value(MEMORY) == pytest.approx(1.0)


async def test_memory_exactly_at_its_limit_is_worth_one_in_version_1(world: World) -> None:
    world.v1()
    assert await world.value(MEMORY) == pytest.approx(1.0)


async def test_memory_goes_bad_and_comes_back(world: World) -> None:
    world.v2()
    world.v2(memory=199 * MIB)
    assert await world.value(MEMORY) > 1.9
    world.v2(memory=10 * MIB)
    assert await world.value(MEMORY) == pytest.approx(0.1)


@pytest.mark.parametrize("limit", ["max", 9_223_372_036_854_771_712])
async def test_memory_without_a_limit_is_measured_against_the_host(world: World, limit: str | int) -> None:
    world.v2(memory=2 * GIB, limit=limit)
    assert await world.value(MEMORY) == pytest.approx(0.5)


async def test_memory_without_a_limit_in_version_1_is_measured_against_the_host(world: World) -> None:
    world.v1()
    world.write("memory/bot/memory.limit_in_bytes", 9_223_372_036_854_771_712)
    world.write("memory/bot/memory.usage_in_bytes", 4 * GIB + 20 * MIB)
    assert await world.value(MEMORY) == pytest.approx(1.0)


async def test_a_tighter_limit_of_the_group_above_counts(world: World) -> None:
    world.in_group("0::/pod/bot\n")
    world.v2("pod/bot", limit="max")
    world.v2("pod", limit=200 * MIB)
    assert await world.value(MEMORY) == pytest.approx(1.0)


async def test_a_path_from_outside_of_the_namespace_falls_back_to_what_is_mounted(world: World) -> None:
    world.in_group("0::/kubepods/pod1/bot\n")
    world.v2()
    assert await world.value(MEMORY) == pytest.approx(1.0)


async def test_a_path_that_climbs_out_of_the_mount_is_not_followed(world: World) -> None:
    world.in_group("0::/../other\n")
    world.v2()
    world.v2("../other", memory=MIB)
    assert await world.value(MEMORY) == pytest.approx(1.0)


async def test_in_a_hybrid_the_controllers_of_version_1_count(world: World) -> None:
    world.v1()
    world.write("unified/cgroup.controllers", "")
    world.write("unified/cpu.stat", "usage_usec 1")
    assert await world.value(MEMORY) == pytest.approx(1.0)


async def test_the_root_group_is_the_whole_host(world: World) -> None:
    world.write("cgroup.controllers", "cpu memory")
    world.write("cpu.stat", "usage_usec 5000000")
    assert await world.value(MEMORY) == pytest.approx(0.5)


async def test_an_explicit_group_is_looked_at_instead_of_the_own_one(world: World) -> None:
    world.v2()
    world.v2("bot", memory=150 * MIB)
    assert await world.value(replace(MEMORY, cgroup=str(world.root / "bot"))) == pytest.approx(1.5)


@pytest.mark.parametrize("folder", ["memory/bot", "cpu,cpuacct/bot"])
async def test_an_explicit_group_of_version_1_is_found_under_each_controller(world: World, folder: str) -> None:
    world.v1()
    world.proc.joinpath("self", "cgroup").unlink()
    at = str(world.root / folder)
    assert await world.value(replace(MEMORY, cgroup=at)) == pytest.approx(1.0)
    assert await world.value(replace(CPU, cgroup=at)) == 0.0


# What cannot be read


@pytest.mark.parametrize("gone", ["memory.current", "memory.max", "memory.stat"])
async def test_a_missing_memory_file_is_a_failure_and_never_healthy(world: World, gone: str) -> None:
    world.v2()
    (world.root / gone).unlink()
    failure = await world.failure(MEMORY)
    assert failure.reason == "bad_response"
    assert gone in failure.message


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("memory.current", "many"),
        ("memory.current", ""),
        ("memory.max", "lots"),
        ("memory.max", "0"),
        ("memory.stat", "anon 5"),
        ("memory.stat", "inactive_file x"),
        ("cpu.stat", "nr_periods 1"),
        ("cpu.max", "100000"),
        ("cpu.max", "100000 0"),
        ("cpu.max", "0 100000"),
    ],
)
async def test_a_file_with_nonsense_is_a_failure_and_never_healthy(world: World, file: str, text: str) -> None:
    world.v2()
    world.write(file, text)
    assert (await world.failure(Condition())).reason == "bad_response"


@pytest.mark.parametrize("gone", ["memory/bot/memory.stat", "memory/bot/memory.limit_in_bytes"])
async def test_a_missing_file_of_version_1_is_a_failure(world: World, gone: str) -> None:
    world.v1()
    (world.root / gone).unlink()
    assert (await world.failure(MEMORY)).reason == "bad_response"


async def test_a_missing_cpu_file_is_a_failure(world: World) -> None:
    world.v2()
    (world.root / "cpu.stat").unlink()
    assert "cpu.stat" in (await world.failure(CPU)).message


async def test_an_explicit_group_that_is_not_there_is_a_failure_that_says_what_to_do(world: World) -> None:
    world.v2()
    for condition in (MEMORY, CPU):
        failure = await world.failure(replace(condition, cgroup=str(world.root / "gone")))
        assert "correct `cgroup`" in failure.message


@pytest.mark.parametrize("lines", ["", "nonsense\n"])
async def test_an_own_group_that_cannot_be_found_is_a_failure(world: World, lines: str) -> None:
    world.v2()
    world.in_group(lines)
    assert (await world.failure(MEMORY)).reason == "bad_response"


async def test_no_proc_at_all_is_a_failure(world: World) -> None:
    world.v2()
    (world.proc / "self" / "cgroup").unlink()
    await world.failure(Condition())


async def test_memory_over_its_limit_is_told_though_cpu_cannot_be_read(world: World) -> None:
    world.v2(memory=190 * MIB)
    (world.root / "cpu.stat").unlink()
    assert await world.value(Condition(memory_percent=90.0)) > 1.0


async def test_memory_within_its_limit_does_not_hide_that_cpu_cannot_be_read(world: World) -> None:
    world.v2(memory=10 * MIB)
    (world.root / "cpu.stat").unlink()
    await world.failure(Condition())


async def test_what_the_rule_does_not_look_at_may_be_unreadable(world: World) -> None:
    world.v2()
    (world.root / "cpu.stat").unlink()
    assert await world.value(MEMORY) == pytest.approx(1.0)


async def test_an_unknown_target_is_a_failure(world: World) -> None:
    assert "no target" in (await world.failure(Condition(target="planet"))).message


async def test_a_rule_of_another_type_is_our_own_mistake(world: World) -> None:
    with pytest.raises(InvariantViolation, match="order_rate"):
        await world.watchdog.probe(Rule(trigger="x", group="g", condition=OrderRate()))


# CPU of a container


async def _burn(world: World, cores: float, seconds: int, condition: Condition = CPU) -> float:
    """Let time pass with so many cores busy, and look every second."""
    value = 0.0
    for _ in range(seconds):
        usage = int((world.root / "cpu.stat").read_text().split()[1])
        world.write("cpu.stat", f"usage_usec {usage + round(cores * 1_000_000)}")
        world.now += 1.0
        value = await world.value(condition)
    return value


async def test_a_rule_is_ready_at_once_and_counts_no_cpu_before_a_whole_window(world: World) -> None:
    world.v2()
    assert await world.value(CPU) == 0.0
    assert await _burn(world, 2.0, 9) == 0.0
    assert await _burn(world, 2.0, 1) == pytest.approx(2.0)


async def test_memory_counts_at_once_while_the_cpu_window_fills(world: World) -> None:
    world.v2(memory=190 * MIB)
    assert await world.value(Condition(memory_percent=90.0)) > 1.0


async def test_a_short_burst_of_cpu_is_not_a_breach(world: World) -> None:
    world.v2()
    await world.value(CPU)
    await _burn(world, 0.1, 20)
    assert await _burn(world, 2.0, 2) == pytest.approx(100 * (2 * 2.0 + 8 * 0.1) / 10 / 2 / 50)


async def test_sustained_cpu_goes_over_its_limit_and_comes_back(world: World) -> None:
    world.v2()
    await world.value(CPU)
    assert await _burn(world, 1.5, 30) == pytest.approx(1.5)
    assert await _burn(world, 0.2, 12) == pytest.approx(0.2)


async def test_cpu_without_a_quota_is_measured_against_all_cores(world: World) -> None:
    world.v2()
    world.write("cpu.max", "max 100000")
    await world.value(CPU)
    assert await _burn(world, 2.0, 10) == pytest.approx(1.0)


async def test_a_group_without_the_cpu_controller_takes_the_quota_of_the_one_above(world: World) -> None:
    world.in_group("0::/pod/bot\n")
    world.v2("pod")
    world.write("pod/cpu.max", "50000 100000")
    world.v2("pod/bot")
    (world.root / "pod/bot/cpu.max").unlink()
    await world.value(CPU)
    world.now += 10
    world.write("pod/bot/cpu.stat", "usage_usec 7500000")
    assert await world.value(CPU) == pytest.approx(1.0)


async def test_a_cpu_set_limits_the_cores_there_are(world: World) -> None:
    world.v2()
    world.write("cpu.max", "max 100000")
    world.write("cpuset.cpus.effective", "0,2-2")
    world.machine.count = 64
    await world.value(CPU)
    assert await _burn(world, 1.0, 10) == pytest.approx(1.0)


async def test_cpu_of_version_1_is_read_in_nanoseconds(world: World) -> None:
    world.v1()
    await world.value(CPU)
    world.now += 10
    world.write("cpu,cpuacct/bot/cpuacct.usage", 15_000_000_000)
    assert await world.value(CPU) == pytest.approx(1.0)


async def test_cpu_of_version_1_without_a_quota_is_measured_against_all_cores(world: World) -> None:
    world.v1()
    world.write("cpu,cpuacct/bot/cpu.cfs_quota_us", -1)
    await world.value(CPU)
    world.now += 10
    world.write("cpu,cpuacct/bot/cpuacct.usage", 25_000_000_000)
    assert await world.value(CPU) == pytest.approx(1.0)


async def test_looks_rarer_than_the_window_average_over_the_time_between(world: World) -> None:
    world.v2()
    await world.value(CPU)
    world.now += 60
    world.write("cpu.stat", "usage_usec 65000000")
    assert await world.value(CPU) == pytest.approx(1.0)


async def test_a_counter_that_was_reset_is_not_taken_for_use_and_does_not_empty_the_window(world: World) -> None:
    world.v2()
    await world.value(CPU)
    await _burn(world, 1.0, 10)
    world.write("cpu.stat", "usage_usec 0")
    assert await _burn(world, 1.0, 1) == pytest.approx(0.9)


async def test_another_limit_begins_another_window(world: World) -> None:
    world.v2()
    await world.value(CPU)
    await _burn(world, 2.0, 10)
    assert await world.value(replace(CPU, cpu_percent=60.0)) == 0.0


async def test_two_looks_at_the_same_moment_do_not_disturb_the_window(world: World) -> None:
    world.v2()
    await world.value(CPU)
    await _burn(world, 2.0, 10)
    assert await world.value(CPU) == await world.value(CPU) == pytest.approx(2.0)


async def test_a_long_window_looked_at_often_stays_small(world: World) -> None:
    world.v2()
    condition = replace(CPU, window=3600.0)
    for _ in range(1000):
        world.now += 0.01
        await world.value(condition)
    assert len(world.watchdog._windows["system_health"][1]._points) <= 130


# Host


async def test_memory_of_the_host_is_what_cannot_be_dropped(world: World) -> None:
    world.machine.used = 4 * GIB
    assert await world.value(replace(MEMORY, target="host")) == pytest.approx(1.0)


async def test_cpu_of_the_host_is_a_share_of_all_cores(world: World) -> None:
    condition = replace(CPU, target="host")
    await world.value(condition)
    world.now += 10
    world.machine.busy += 20
    assert await world.value(condition) == pytest.approx(1.0)


# Processes


def _process(pid: int, *, cpu: float = 100.0, resident: int = 2 * GIB, started: float = WALL) -> Process:
    return Process(pid=pid, started=started, cpu_seconds=cpu, resident=resident)


BOT_MEMORY = replace(MEMORY, target="process:bot")
BOT_CPU = replace(CPU, target="process:bot")


@pytest.fixture
def bots(world: World) -> World:
    """Two bots in a group of version 2 that has no limits."""
    world.write("cgroup.controllers", "cpu memory")
    world.write("cpu.stat", "usage_usec 1")
    for pid in ("10", "11", "12"):
        world.in_group("0::/\n", pid)
    world.machine.running["bot"] = [_process(10), _process(11)]
    return world


async def test_a_process_that_is_not_there_is_missing_and_not_healthy(world: World) -> None:
    answer = await world.look(BOT_MEMORY)
    assert answer == Answer(series=(), evaluated_at=WALL + world.now, oldest_sample=None)


async def test_memory_of_all_processes_of_a_name_adds_up(bots: World) -> None:
    assert await bots.value(BOT_MEMORY) == pytest.approx(1.0)


async def test_cpu_of_all_processes_of_a_name_adds_up(bots: World) -> None:
    await bots.value(BOT_CPU)
    bots.now += 10
    bots.machine.running["bot"] = [_process(10, cpu=110), _process(11, cpu=110)]
    assert await bots.value(BOT_CPU) == pytest.approx(1.0)


async def test_a_process_that_dies_and_comes_back_busy_does_not_look_idle(bots: World) -> None:
    bots.machine.running["bot"] = []
    await bots.look(BOT_CPU)
    value = 0.0
    for pid in range(20, 32):
        bots.in_group("0::/\n", str(pid))
        bots.machine.running["bot"] = [_process(pid, cpu=2.0, started=WALL + bots.now - 1)]
        value = await bots.value(BOT_CPU)
        bots.now += 1
    assert value == pytest.approx(1.0)


async def test_the_past_of_a_process_under_another_name_does_not_count(bots: World) -> None:
    await bots.value(BOT_CPU)
    bots.now += 10
    bots.machine.running["bot"] = [_process(10), _process(11), _process(12, cpu=5000.0, started=WALL - 9000)]
    assert await bots.value(BOT_CPU) == 0.0


async def test_a_process_is_measured_against_the_limits_of_its_own_group(bots: World) -> None:
    bots.v2("trader", limit=8 * GIB)
    bots.v2("trader/bot", limit=3 * GIB)
    bots.in_group("0::/trader/bot\n", "10")
    assert await bots.value(BOT_MEMORY) == pytest.approx(100 * 4 / 3 / 50)
    await bots.value(BOT_CPU)
    bots.now += 10
    bots.machine.running["bot"] = [_process(10, cpu=110), _process(11)]
    assert await bots.value(BOT_CPU) == pytest.approx(1.0)


async def test_a_group_without_the_memory_controller_takes_the_limit_of_the_one_above(bots: World) -> None:
    bots.v2("trader", limit=4 * GIB)
    bots.write("trader/leaf/cgroup.controllers", "")
    bots.write("trader/leaf/cgroup.type", "domain")
    bots.in_group("0::/trader/leaf\n", "10")
    assert await bots.value(BOT_MEMORY) == pytest.approx(2.0)


async def test_the_group_of_another_container_is_found_through_the_root_of_its_process(bots: World) -> None:
    bots.in_group("0::/../trader\n", "10")
    mounted = bots.proc / "10/root/sys/fs/cgroup"
    bots.v2(str(mounted), limit=4 * GIB)
    assert await bots.value(BOT_MEMORY) == pytest.approx(2.0)
    assert await bots.value(BOT_CPU) == 0.0


@pytest.mark.parametrize("version", [1, 2])
async def test_a_limit_that_cannot_be_seen_is_the_hosts_and_is_said_once(
    bots: World, caplog: pytest.LogCaptureFixture, version: int
) -> None:
    lines = "0::/../trader\n" if version == 2 else "3:memory:/trader\n2:cpu:/trader\n0::/\n"
    bots.in_group(lines, "10")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert await bots.value(BOT_MEMORY) == pytest.approx(1.0)
    assert [record.message for record in caplog.records] == ["watchdog.limit_unseen"]


async def test_a_process_in_groups_of_version_1_is_measured_against_them(bots: World) -> None:
    bots.v1("bot")
    bots.write("memory/bot/memory.limit_in_bytes", 4 * GIB)
    bots.in_group("5:memory:/bot\n4:cpu,cpuacct:/bot\n0::/\n", "10")
    assert await bots.value(BOT_MEMORY) == pytest.approx(2.0)
    assert await bots.value(BOT_CPU) == 0.0


async def test_a_process_that_cannot_be_looked_at_is_a_failure(world: World) -> None:
    world.machine.error = Unreadable("process 10 cannot be looked at")
    assert "process 10" in (await world.failure(BOT_MEMORY)).message


async def test_whatever_a_foreign_proc_throws_is_a_failure_of_this_rule_alone(world: World) -> None:
    world.machine.error = IndexError()
    assert "IndexError" in (await world.failure(BOT_MEMORY)).message


# Looks that hang


@pytest.fixture
def hanging(world: World) -> Iterator[World]:
    world.machine.gate = threading.Event()
    world.timeout = 0.05
    world.restarted()
    yield world
    world.machine.gate.set()


HOST = replace(MEMORY, target="host")


async def test_a_look_that_hangs_is_a_failure_in_bounded_time_and_never_blocks_the_loop(hanging: World) -> None:
    began = time.monotonic()
    assert (await hanging.failure(HOST)).reason == "timeout"
    assert time.monotonic() - began < 1.0


async def test_hanging_looks_do_not_pile_up_threads(hanging: World) -> None:
    await hanging.failure(HOST)
    before = threading.active_count()
    for _ in range(5):
        assert "still hangs" in (await hanging.failure(HOST)).message
    assert threading.active_count() == before


async def test_a_rule_sees_again_once_the_hanging_look_has_ended(hanging: World) -> None:
    await hanging.failure(HOST)
    assert hanging.machine.gate is not None
    hanging.machine.gate.set()
    outcomes: list[Answer | Failure] = []
    async with asyncio.timeout(5):
        while not outcomes or isinstance(outcomes[-1], Failure):
            outcomes.append(await hanging.look(HOST))
            await asyncio.sleep(0)


async def test_one_hanging_rule_does_not_hold_up_another(hanging: World) -> None:
    await hanging.failure(HOST)
    hanging.v2()
    hanging.in_group("0::/\n")
    other = Rule(trigger="other", group="g", condition=CPU)
    assert isinstance(await hanging.watchdog.probe(other), Answer)


async def test_no_thread_to_be_had_is_a_failure(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        assert "new thread" in (await world.failure(HOST)).message
    assert await world.value(HOST) == pytest.approx(0.5)


def test_a_look_that_outlives_its_loop_ends_in_silence(hanging: World) -> None:
    asyncio.run(hanging.failure(HOST))
    assert hanging.machine.gate is not None
    hanging.machine.gate.set()
    for thread in threading.enumerate():
        if thread.name == "watchdog system_health":
            thread.join(5)


# The real machine


def _until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_real_machine_is_seen() -> None:
    machine = PsutilMachine()
    memory, before = machine.memory(), machine.busy_seconds()
    assert 0 < memory.used < memory.limit
    assert machine.cores() >= 1
    deadline = time.thread_time() + 0.05
    while time.thread_time() < deadline:
        pass
    assert machine.busy_seconds() > before


def test_a_real_process_is_found_by_its_name_and_gone_when_it_is_dead() -> None:
    machine = PsutilMachine()
    process = subprocess.Popen(["sleep", "60"])
    try:
        _until(lambda: process.pid in {one.pid for one in machine.processes("sleep")})
        (seen,) = [one for one in machine.processes("sleep") if one.pid == process.pid]
        assert seen.resident > 0
        assert abs(seen.started - time.time()) < 60
    finally:
        process.kill()
    # Killed but not yet waited for, it is a zombie: it has a name, and is dead all the same.
    _until(lambda: process.pid not in {one.pid for one in machine.processes("sleep")})
    process.wait()
    assert process.pid not in {one.pid for one in machine.processes("sleep")}


def test_the_sidecar_itself_does_not_hide_that_a_process_of_its_name_is_gone() -> None:
    import psutil

    own_name = psutil.Process().name()
    assert os.getpid() not in {one.pid for one in PsutilMachine().processes(own_name)}


async def test_the_real_container_and_host_can_be_watched() -> None:
    watchdog = Watchdog()
    for target in ("container", "host"):
        answer = await watchdog.probe(Rule(trigger=target, group="g", condition=Condition(target=target)))
        assert isinstance(answer, Answer), answer
        assert 0.0 < answer.series[0].value < 2.0


@pytest.fixture
def busy_process() -> Iterator[str]:
    """A process with one core to itself; its name."""
    code = "import ctypes\nctypes.CDLL(None).prctl(15, b'ksw-busy', 0, 0, 0)\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    yield "ksw-busy"
    process.kill()
    process.wait()


async def test_a_real_busy_process_breaches_its_limit(busy_process: str) -> None:
    watchdog = Watchdog()
    condition = Condition(target=f"process:{busy_process}", memory_percent=None, cpu_percent=1.0, window=0.2)
    rule = Rule(trigger="busy", group="g", condition=condition)
    value = 0.0
    async with asyncio.timeout(20):
        while value <= 1.0:
            answer = await watchdog.probe(rule)
            assert isinstance(answer, Answer), answer
            value = max((one.value for one in answer.series), default=0.0)
