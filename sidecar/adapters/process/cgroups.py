"""Finds a control group and reads its use and limits of memory and CPU: version 2, version 1, or one of each.

Memory in use is the working set, as the kubelet counts it: usage without file pages that were not touched lately,
which the kernel drops before it kills anything. A limit is the tightest of the group's own and of those above it, as
far up as can be seen. Everything here reads files and may block: call it in a thread.

Source: https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/memory.html, cpuacct.html.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_V1_FOLDERS = ("memory", "cpuacct", "cpu,cpuacct", "cpuacct,cpu", "cpu")
_MICROSECONDS = 1_000_000
_NANOSECONDS = 1_000_000_000
_MAX_FILE_BYTES = 64 * 1024


class MemoryGroup(Protocol):
    """A control group's memory, in bytes."""

    def used(self) -> int | None:
        """The working set; None for the root group, which is the whole host and has no count of its own."""

    def limit(self) -> int | None:
        """The tightest limit; None where there is none."""


class CpuGroup(Protocol):
    """A control group's CPU time."""

    def seconds(self) -> float:
        """CPU seconds spent since the group was made."""

    def cores(self) -> float | None:
        """How many cores the quota and the CPU set allow; None where neither is set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryV2:
    """Memory of a group of version 2."""

    folder: Path

    def used(self) -> int | None:
        """The working set; None for the root group."""
        if not (self.folder / "memory.current").exists() and _is_root(self.folder):
            return None
        return max(0, _integer(self.folder / "memory.current") - _field(self.folder / "memory.stat", "inactive_file"))

    def limit(self) -> int | None:
        """The tightest of memory.max here and above."""
        if not (self.folder / "memory.current").exists() and _is_root(self.folder):
            return None
        found = [_memory_max(one / "memory.max") for one in _upwards(self.folder, "memory.current")]
        return min((limit for limit in found if limit is not None), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryV1:
    """Memory of a group of version 1. No limit is written as a number beyond any memory."""

    folder: Path

    def used(self) -> int | None:
        """The working set."""
        usage = _integer(self.folder / "memory.usage_in_bytes")
        return max(0, usage - _field(self.folder / "memory.stat", "total_inactive_file"))

    def limit(self) -> int | None:
        """The tightest of memory.limit_in_bytes here and above."""
        chain = _upwards(self.folder, "memory.usage_in_bytes")
        return min(_integer(one / "memory.limit_in_bytes") for one in chain)


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuV2:
    """CPU of a group of version 2. cpu.stat is always there, cpu.max only where the controller is on."""

    folder: Path

    def seconds(self) -> float:
        """CPU seconds spent."""
        return _field(self.folder / "cpu.stat", "usage_usec") / _MICROSECONDS

    def cores(self) -> float | None:
        """The tightest of cpu.max here and above, and of the CPU set."""
        quotas = [_cpu_max(one / "cpu.max") for one in _upwards(self.folder, "cpu.stat")]
        allowed = [*quotas, _cpu_set(self.folder / "cpuset.cpus.effective")]
        return min((cores for cores in allowed if cores is not None), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuV1:
    """CPU of a group of version 1: what is spent and what is allowed are two controllers, often in one folder."""

    usage_folder: Path
    quota_folder: Path | None

    def seconds(self) -> float:
        """CPU seconds spent."""
        return _integer(self.usage_folder / "cpuacct.usage") / _NANOSECONDS

    def cores(self) -> float | None:
        """The tightest of cpu.cfs_quota_us here and above."""
        if self.quota_folder is None:
            return None
        quotas = [_cfs_quota(one) for one in _upwards(self.quota_folder, "cpu.cfs_quota_us")]
        return min((cores for cores in quotas if cores is not None), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cgroups:
    """The control groups of this machine, as far as they can be seen from here.

    Attributes:
        proc: where /proc is.
        root: where the control groups are mounted.
    """

    proc: Path
    root: Path

    def own_memory(self) -> MemoryGroup:
        """The memory of the group that this process is in.

        Raises:
            OSError, ValueError: it cannot be found or read.
        """
        paths = _paths(self.proc / "self" / "cgroup")
        # A container that has its group mounted as the root still may read a path from outside: then it is the root.
        if "memory" in paths:
            mount = self.root / "memory"
            return MemoryV1(folder=_inside(mount, paths["memory"]) or mount)
        mount = _unified(self.root)
        return MemoryV2(folder=_inside(mount, paths[""]) or mount)

    def own_cpu(self) -> CpuGroup:
        """The CPU of the group that this process is in.

        Raises:
            OSError, ValueError: it cannot be found or read.
        """
        paths = _paths(self.proc / "self" / "cgroup")
        if "cpuacct" in paths:
            usage_mount = _mount(self.root, "cpuacct")
            quota_mount = _mount(self.root, "cpu")
            return CpuV1(
                usage_folder=_inside(usage_mount, paths["cpuacct"]) or usage_mount,
                quota_folder=_inside(quota_mount, paths.get("cpu", "/")) or quota_mount,
            )
        mount = _unified(self.root)
        return CpuV2(folder=_inside(mount, paths[""]) or mount)

    def memory_of(self, pid: int) -> MemoryGroup | None:
        """The memory of the group that another process is in; None where it cannot be seen from here.

        A process of another container shows a path outside of what is mounted here. Its own mount of its group can be
        reached through its root folder, by its own user or with CAP_SYS_PTRACE.

        Raises:
            OSError, ValueError: /proc cannot be read.
        """
        paths = _paths(self.proc / str(pid) / "cgroup")
        if "memory" in paths:
            folder = _inside(self.root / "memory", paths["memory"])
            folder = folder or _holding(self._mounted_in(pid) / "memory", "memory.limit_in_bytes")
            return None if folder is None else MemoryV1(folder=folder)
        folder = _inside(_unified(self.root), paths[""])
        # Where the controller is off the group has no files of it, and the one above counts.
        folder = _controlled(folder) if folder else _holding(self._mounted_in(pid), "memory.max")
        return None if folder is None else MemoryV2(folder=folder)

    def cpu_of(self, pid: int) -> CpuGroup | None:
        """The CPU of the group that another process is in; None where it cannot be seen from here.

        Raises:
            OSError, ValueError: /proc cannot be read.
        """
        paths = _paths(self.proc / str(pid) / "cgroup")
        if "cpu" in paths:
            folder = _inside(_mount(self.root, "cpu"), paths["cpu"])
            folder = folder or _holding(_mount(self._mounted_in(pid), "cpu"), "cpu.cfs_quota_us")
            return None if folder is None else CpuV1(usage_folder=folder, quota_folder=folder)
        folder = _inside(_unified(self.root), paths[""]) or _holding(self._mounted_in(pid), "cpu.max")
        return None if folder is None else CpuV2(folder=folder)

    def _mounted_in(self, pid: int) -> Path:
        return self.proc / str(pid) / "root" / "sys" / "fs" / "cgroup"

    def memory_at(self, folder: Path) -> MemoryGroup:
        """The memory of the group in this folder; in version 1 the folder of any controller of it will do.

        Raises:
            FileNotFoundError: it is not the folder of a control group.
        """
        if (folder / "memory.current").exists():
            return MemoryV2(folder=folder)
        found = _beside(folder, "memory.usage_in_bytes")
        if found is None:
            raise FileNotFoundError(_not_a_group(folder, "memory.current or memory.usage_in_bytes"))
        return MemoryV1(folder=found)

    def cpu_at(self, folder: Path) -> CpuGroup:
        """The CPU of the group in this folder; in version 1 the folder of any controller of it will do.

        Raises:
            FileNotFoundError: it is not the folder of a control group.
        """
        usage = _beside(folder, "cpuacct.usage")
        if usage is not None:
            return CpuV1(usage_folder=usage, quota_folder=_beside(folder, "cpu.cfs_quota_us"))
        if not (folder / "cpu.stat").exists():
            raise FileNotFoundError(_not_a_group(folder, "cpu.stat or cpuacct.usage"))
        return CpuV2(folder=folder)


def _paths(file: Path) -> dict[str, str]:
    """Parse `hierarchy:controllers:path` lines into paths by controller; version 2 has the empty name."""
    found: dict[str, str] = {}
    for line in _text(file).splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            found[controller] = path
    if not found:
        raise ValueError(f"{file} names no control group")
    found.setdefault("", "/")
    return found


def _inside(mount: Path, path: str) -> Path | None:
    # `/../other` is how a namespace writes a group outside of itself; followed, it would lead out of the mount.
    if ".." in Path(path).parts:
        return None
    folder = mount / path.lstrip("/")
    return folder if folder.is_dir() else None


def _unified(root: Path) -> Path:
    # Where version 1 is in use, version 2 is mounted beside it, for systemd's own sake.
    beside = root / "unified"
    return beside if beside.is_dir() else root


def _mount(root: Path, controller: str) -> Path:
    """The folder of a controller of version 1; cpu and cpuacct often share one, under a name of both."""
    names = (controller, "cpu,cpuacct", "cpuacct,cpu")
    return next((root / name for name in names if _is_folder(root / name)), root / controller)


def _controlled(folder: Path) -> Path:
    """The group itself, or the nearest above it with memory under control; the topmost one where there is none."""
    topmost = folder
    for one in (folder, *folder.parents):
        if (one / "memory.max").exists():
            return one
        if (one / "cgroup.controllers").exists():
            topmost = one
    return topmost


def _holding(folder: Path, file: str) -> Path | None:
    try:
        return folder if (folder / file).exists() else None
    except PermissionError:  # another user's root folder
        return None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except PermissionError:
        return False


def _beside(folder: Path, file: str) -> Path | None:
    """The folder, or the same group under another controller of version 1, that has the file."""
    candidates = [folder]
    parts = folder.parts
    for index, part in enumerate(parts):
        if part in _V1_FOLDERS:
            candidates += [Path(*parts[:index], name, *parts[index + 1 :]) for name in _V1_FOLDERS]
    return next((one for one in candidates if (one / file).exists()), None)


def _is_root(folder: Path) -> bool:
    return (folder / "cgroup.controllers").exists() and not (folder / "cgroup.type").exists()


def _upwards(folder: Path, file: str) -> Iterator[Path]:
    """The folder itself, and those above it as long as they have the file."""
    yield folder
    for above in folder.parents:
        if not (above / file).exists():
            return
        yield above


def _memory_max(file: Path) -> int | None:
    text = _text(file).strip()
    return None if text == "max" else int(text)


def _cpu_max(file: Path) -> float | None:
    try:
        quota, period = _text(file).split()
    except FileNotFoundError:
        return None
    return None if quota == "max" else int(quota) / int(period)


def _cfs_quota(folder: Path) -> float | None:
    try:
        quota = _integer(folder / "cpu.cfs_quota_us")
    except FileNotFoundError:
        return None
    return None if quota < 0 else quota / _integer(folder / "cpu.cfs_period_us")


def _cpu_set(file: Path) -> float | None:
    """Count the CPUs of a list such as `0-3,7`."""
    try:
        text = _text(file).strip()
    except FileNotFoundError:
        return None
    count = 0
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return float(count) if count else None


def _integer(file: Path) -> int:
    text = _text(file).strip()
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{file} has {text[:80]!r}; a whole number was expected") from None


def _field(file: Path, name: str) -> int:
    for line in _text(file).splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    raise ValueError(f"{file} has no {name}")


def _text(file: Path) -> str:
    with file.open(encoding="ascii") as opened:
        return opened.read(_MAX_FILE_BYTES)


def _not_a_group(folder: Path, wanted: str) -> str:
    return f"{folder} is not the folder of a control group: it has no {wanted}; correct `cgroup`, or mount it"
