"""What one look at a target found, and the average of its CPU use over a window.

Pure values and arithmetic: knows no file, no psutil, no thread and no clock.
"""

from collections import deque
from dataclasses import dataclass

POINTS_PER_WINDOW = 128
"""How finely a window is remembered: bounds the memory of a long window that is looked at often."""

_START_TOLERANCE_SECONDS = 1.0
"""A process's start time is counted from the boot time, which is rounded and moves with the wall clock."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes in use that cannot simply be dropped, and bytes that there may be."""

    used: int
    limit: int

    @property
    def percent(self) -> float:
        """How much of the limit is used."""
        return 100.0 * self.used / self.limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Meter:
    """A counter of CPU time.

    Attributes:
        key: tells the meters of one look apart, and finds each again in the next look.
        seconds: CPU seconds since it began to count.
        started: Unix seconds when it began; None where that was before anybody looked.
    """

    key: str
    seconds: float
    started: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Cpu:
    """The meters of a target, and how many cores it may use."""

    meters: tuple[Meter, ...]
    cores: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """One look at a target.

    Attributes:
        at: monotonic seconds of the look.
        wall: Unix seconds of the same moment.
        memory, cpu: what was found; None where it was not asked for, or could not be read.
        problems: what could not be read, and why.
        present: False where there is nothing to look at: no process has the name.
        note: what a person must know about these numbers; empty where there is nothing.
    """

    at: float
    wall: float
    memory: Memory | None = None
    cpu: Cpu | None = None
    problems: tuple[str, ...] = ()
    present: bool = True
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Point:
    at: float
    total: float


class CpuHistory:
    """Averages CPU use over at least the last `window` seconds.

    A single short sample says little: a garbage collection looks like a runaway. Until a whole window has been seen
    there is no average, since nothing can have been over its limit for that long.
    """

    def __init__(self, window: float) -> None:
        self._window = window
        self._points: deque[_Point] = deque()
        self._latest: _Point | None = None
        self._meters: dict[str, float] = {}
        self._looked: float | None = None

    def add(self, usage: Usage, cpu: Cpu) -> None:
        """Take in one look; one that is not newer than the last is ignored."""
        if self._latest is not None and usage.at <= self._latest.at:
            return
        total = 0.0 if self._latest is None else self._latest.total + self._spent(cpu.meters)
        self._latest = _Point(at=usage.at, total=total)
        self._meters = {meter.key: meter.seconds for meter in cpu.meters}
        self._looked = usage.wall
        if not self._points or usage.at - self._points[-1].at >= self._window / POINTS_PER_WINDOW:
            self._points.append(self._latest)
        while len(self._points) > 1 and usage.at - self._points[1].at >= self._window:
            self._points.popleft()

    def average_cores(self) -> float | None:
        """How many cores were busy on average over the window; None until a whole window has been seen."""
        if self._latest is None or self._latest.at - self._points[0].at < self._window:
            return None
        base = self._points[0]
        return (self._latest.total - base.total) / (self._latest.at - base.at)

    def _spent(self, meters: tuple[Meter, ...]) -> float:
        return sum(self._spent_by(meter) for meter in meters)

    def _spent_by(self, meter: Meter) -> float:
        before = self._meters.get(meter.key)
        if before is not None:
            # A counter that goes back was reset, or jitters by a tick as stolen time does on virtual machines.
            return max(0.0, meter.seconds - before)
        # A process born since the last look spent all its time since then: one that crashes and comes back every
        # second must not look idle. An older one, only now under this name, has its past elsewhere.
        looked = self._looked or 0.0
        born_since = meter.started is not None and meter.started >= looked - _START_TOLERANCE_SECONDS
        return meter.seconds if born_since else 0.0
