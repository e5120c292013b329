"""The machine and its processes, as psutil sees them. Everything here may block: call it in a thread.

psutil's types and exceptions stop here; a test brings its own `Machine`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import psutil

from sidecar.adapters.process.usage import Memory


class Unreadable(Exception):  # noqa: N818 - said of a file or a process; not an error of this project
    """Something about a target cannot be read; the message says what, and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A running process: resident bytes, CPU seconds since its start, Unix seconds of its start."""

    pid: int
    started: float
    cpu_seconds: float
    resident: int


class Machine(Protocol):
    """What a watchdog asks of the machine."""

    def memory(self) -> Memory:
        """Memory in use, without what can be dropped, and all there is."""

    def busy_seconds(self) -> float:
        """CPU seconds spent since boot, summed over all cores."""

    def cores(self) -> int:
        """How many logical cores there are."""

    def processes(self, name: str) -> list[Process]:
        """Running processes of this name, except the sidecar itself.

        Raises:
            Unreadable: one of them cannot be looked at.
        """


class PsutilMachine:
    """The real machine. In a container `memory`, `busy_seconds` and `cores` are those of the node."""

    def memory(self) -> Memory:
        """Memory in use, without what can be dropped, and all there is."""
        seen = psutil.virtual_memory()
        return Memory(used=seen.total - seen.available, limit=seen.total)

    def busy_seconds(self) -> float:
        """CPU seconds spent since boot, summed over all cores."""
        times = psutil.cpu_times()
        # Linux counts the time of guests in user and nice already.
        counted_twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        waiting = times.idle + getattr(times, "iowait", 0.0)
        return float(sum(times) - counted_twice - waiting)

    def cores(self) -> int:
        """How many logical cores there are.

        Raises:
            Unreadable: the system does not say.
        """
        count = psutil.cpu_count()
        if not count:
            raise Unreadable("the number of cores cannot be read from /proc")
        return count

    def processes(self, name: str) -> list[Process]:
        """Running processes of this name, except the sidecar itself.

        Where process and sidecar share a name, as `python3`, the sidecar would hide that the other is gone.

        Raises:
            Unreadable: one of them cannot be looked at.
        """
        return list(_running(name))


def _running(name: str) -> Iterator[Process]:
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.name() != name:
                continue
            with process.oneshot():
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                times = process.cpu_times()
                yield Process(
                    pid=process.pid,
                    started=process.create_time(),
                    cpu_seconds=times.user + times.system,
                    resident=process.memory_info().rss,
                )
        except psutil.NoSuchProcess:  # ended while it was looked at; a zombie is one of these too
            continue
        except psutil.AccessDenied as error:
            raise Unreadable(f"process {process.pid} cannot be looked at: {error}; run as its user") from error
