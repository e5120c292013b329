"""One look at what a watchdog watches: the container, the host, or all processes of a name.

Memory and CPU are read apart, so that one that cannot be read does not hide that the other is over its limit. Blocks:
call it in a thread.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from sidecar.adapters.process.cgroups import Cgroups, CpuGroup, MemoryGroup
from sidecar.adapters.process.machine import Machine, Process, Unreadable
from sidecar.adapters.process.usage import Cpu, Memory, Meter, Usage
from sidecar.rules.model import Watchdog as Condition

_PROCESS = "process:"

_T = TypeVar("_T")


class Target(Protocol):
    """Something with memory and CPU; both raise OSError, ValueError or Unreadable where they cannot be read."""

    @property
    def note(self) -> str:
        """What a person must know about the numbers; empty where there is nothing."""

    def memory(self) -> Memory:
        """Memory in use, and its limit."""

    def cpu(self) -> Cpu:
        """CPU time spent, and the cores that there are for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Finds targets and looks at them.

    Attributes:
        cgroups: where containers' numbers come from.
        machine: where the host's and the processes' come from.
    """

    cgroups: Cgroups
    machine: Machine

    def look(self, condition: Condition, *, at: float, wall: float) -> Usage:
        """Look once at all that the condition asks for.

        Args:
            condition: what to look at.
            at: the moment in monotonic seconds.
            wall: the same in Unix seconds.

        Raises:
            OSError, ValueError, Unreadable: the target itself cannot be found.
        """
        target = self._target(condition)
        if target is None:
            return Usage(at=at, wall=wall, present=False)
        problems: list[str] = []
        memory = None if condition.memory_percent is None else _tried("memory", target.memory, problems)
        cpu = None if condition.cpu_percent is None else _tried("CPU", target.cpu, problems)
        return Usage(at=at, wall=wall, memory=memory, cpu=cpu, problems=tuple(problems), note=target.note)

    def _target(self, condition: Condition) -> Target | None:
        if condition.target == "host":
            return Host(machine=self.machine)
        if condition.target == "container":
            folder = None if condition.cgroup is None else Path(condition.cgroup)
            return Container(cgroups=self.cgroups, machine=self.machine, folder=folder)
        if not condition.target.startswith(_PROCESS):
            raise Unreadable(f"{condition.target!r} is no target; write container, host or process:<name>")
        processes = self.machine.processes(condition.target.removeprefix(_PROCESS))
        if not processes:
            return None
        return Processes(
            machine=self.machine,
            processes=tuple(processes),
            memory_groups=tuple(self.cgroups.memory_of(one.pid) for one in processes),
            cpu_groups=tuple(self.cgroups.cpu_of(one.pid) for one in processes),
        )


def _tried(what: str, read: Callable[[], _T], problems: list[str]) -> _T | None:
    try:
        return read()
    except (OSError, ValueError, Unreadable) as error:
        problems.append(f"{what} cannot be read: {error}")
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """The machine as a whole; in Kubernetes the node."""

    machine: Machine
    note: str = ""

    def memory(self) -> Memory:
        """Memory in use, and all there is."""
        return self.machine.memory()

    def cpu(self) -> Cpu:
        """CPU time spent on all cores."""
        return Cpu(meters=(Meter(key="host", seconds=self.machine.busy_seconds()),), cores=self.machine.cores())


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """A control group: the sidecar's own, or the one in `folder`."""

    cgroups: Cgroups
    machine: Machine
    folder: Path | None
    note: str = ""

    def memory(self) -> Memory:
        """The working set, and the limit; the root group is the whole host."""
        group: MemoryGroup = self.cgroups.own_memory() if self.folder is None else self.cgroups.memory_at(self.folder)
        used = group.used()
        if used is None:
            return self.machine.memory()
        return Memory(used=used, limit=_memory_limit(group.limit(), self.machine))

    def cpu(self) -> Cpu:
        """CPU time spent, and the quota or all cores."""
        group: CpuGroup = self.cgroups.own_cpu() if self.folder is None else self.cgroups.cpu_at(self.folder)
        return Cpu(meters=(Meter(key="group", seconds=group.seconds()),), cores=_cores(group.cores(), self.machine))


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """All processes of one name together, against the tightest limit of the control groups they are in.

    Attributes:
        memory_groups: the group of each process; None for one that cannot be seen, which then has no known limit.
        cpu_groups: the same for CPU.
    """

    machine: Machine
    processes: tuple[Process, ...]
    memory_groups: tuple[MemoryGroup | None, ...]
    cpu_groups: tuple[CpuGroup | None, ...]

    @property
    def note(self) -> str:
        """Say where a limit cannot be seen, for a share of the host is far smaller than one of a container."""
        groups = zip(self.processes, self.memory_groups, self.cpu_groups, strict=True)
        unseen = [one.pid for one, memory, cpu in groups if memory is None or cpu is None]
        if not unseen:
            return ""
        return (
            f"the limits of process {unseen[0]} cannot be seen, its shares are those of the whole host; "
            "run the sidecar as the same user, or choose percentages of the host"
        )

    def memory(self) -> Memory:
        """Resident memory of all; pages that they share count for each."""
        used = sum(one.resident for one in self.processes)
        limits = [group.limit() for group in self.memory_groups if group is not None]
        return Memory(used=used, limit=min(_memory_limit(one, self.machine) for one in (*limits, None)))

    def cpu(self) -> Cpu:
        """CPU time of each."""
        meters = tuple(
            Meter(key=f"{one.pid}@{one.started}", seconds=one.cpu_seconds, started=one.started)
            for one in self.processes
        )
        limits = [group.cores() for group in self.cpu_groups if group is not None]
        return Cpu(meters=meters, cores=min(_cores(one, self.machine) for one in (*limits, None)))


def _memory_limit(limit: int | None, machine: Machine) -> int:
    # Version 1 writes "no limit" as a number beyond any memory, and a limit beyond the host's memory is none either.
    total = machine.memory().limit
    bytes_allowed = total if limit is None else min(limit, total)
    if bytes_allowed <= 0:
        raise ValueError(f"the memory limit is {bytes_allowed}; it must be more than 0 bytes")
    return bytes_allowed


def _cores(limit: float | None, machine: Machine) -> float:
    cores = float(machine.cores()) if limit is None else min(limit, float(machine.cores()))
    if cores <= 0:
        raise ValueError(f"the CPU limit is {cores} cores; it must be more than 0")
    return cores
