"""A disk on paper, made from the system calls that a sidecar really made: what a crash at each of them would leave.

`read_trace` turns the files of `strace -ff` into operations in the order in which they began. `Disk` takes them one at
a time and knows, beside what the kernel would show, what a power cut would leave: contents count as durable from the
last fsync of the file, names from the last fsync of their folder. POSIX promises no more, and file systems differ in
what they do beyond it, so `views` gives the extremes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

TRACED = (
    "open,openat,creat,write,pwrite64,writev,pwritev,pwritev2,lseek,ftruncate,truncate,fallocate,copy_file_range,"
    "sendfile,fsync,fdatasync,sync_file_range,rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,"
    "mkdir,mkdirat,rmdir,close"
)

_LINE = re.compile(r"^(?P<time>\d+\.\d+) (?P<call>\w+)\((?P<arguments>.*)\)\s+= (?P<result>-?\d+)(?P<rest>.*)$")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_DESCRIPTOR = re.compile(r"^(\d+)<([^>]*)>")
_AT = re.compile(r"(?:AT_FDCWD|\d+)<([^>]*)>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One system call on the folder: `call` with its paths or descriptor; `time` (Unix seconds) is when it began."""

    time: float
    call: str
    paths: tuple[str, ...] = ()
    descriptor: int = -1
    data: bytes = b""
    number: int = 0
    flags: str = ""


def read_trace(files: list[Path], folder: Path) -> list[Operation]:
    """All operations on what lies in `folder` (and on the folder itself), in order.

    Raises:
        ValueError: a call that changes files in the folder and that this model does not know.
    """
    found = [
        operation
        for file in files
        for line in file.read_text(encoding="ascii", errors="surrogateescape").splitlines()
        if (operation := _operation(line, str(folder))) is not None
    ]
    return sorted(found, key=lambda operation: operation.time)


def _operation(line: str, folder: str) -> Operation | None:
    match = _LINE.match(line)
    if match is None or int(match["result"]) < 0:
        return None  # a failed call changed nothing; the others are signals and ends of threads
    call, arguments, result = match["call"], match["arguments"], int(match["result"])
    time = float(match["time"])
    texts = [_text(*found) for found in _TEXT.findall(arguments)]
    if call in {"open", "openat", "creat"}:
        path = _plain(match["rest"].strip().removeprefix("<").removesuffix(">"))
        if not _inside(path, folder):
            return None
        return Operation(time=time, call="open", paths=(path,), descriptor=result, flags=arguments)
    at = _DESCRIPTOR.match(arguments)
    if at is not None and not call.endswith(("at", "at2")):
        path = _plain(at[2])
        return _on_descriptor(call, time, int(at[1]), path, arguments, texts, result) if _inside(path, folder) else None
    return _on_names(call, time, arguments, texts, folder)


def _on_descriptor(
    call: str, time: float, descriptor: int, path: str, arguments: str, texts: list[bytes], result: int
) -> Operation | None:
    numbers = [int(number) for number in re.findall(r", (-?\d+)(?=,|$)", arguments)]
    match call:
        case "write":
            return Operation(time=time, call=call, paths=(path,), descriptor=descriptor, data=texts[0][:result])
        case "pwrite64":
            data, at = texts[0][:result], numbers[-1]
            return Operation(time=time, call=call, paths=(path,), descriptor=descriptor, data=data, number=at)
        case "ftruncate":
            return Operation(time=time, call=call, paths=(path,), descriptor=descriptor, number=numbers[-1])
        case "fsync" | "fdatasync":
            return Operation(time=time, call="fsync", paths=(path,), descriptor=descriptor)
        case "lseek":
            return Operation(time=time, call=call, paths=(path,), descriptor=descriptor, number=result)
        case "close":
            return Operation(time=time, call=call, paths=(path,), descriptor=descriptor)
        case _:
            raise ValueError(f"the model of the disk does not know {call}({arguments})")


def _on_names(call: str, time: float, arguments: str, texts: list[bytes], folder: str) -> Operation | None:
    parents = [_plain(found) for found in _AT.findall(arguments)]
    names = [text.decode() for text in texts]
    paths = tuple(
        str(PurePosixPath(parents[min(index, len(parents) - 1)] if parents else "/", name))
        for index, name in enumerate(names)
    )
    if not any(_inside(path, folder) for path in paths):
        return None
    kinds = {"renameat": "rename", "renameat2": "rename", "unlinkat": "unlink", "mkdirat": "mkdir"}
    kind = kinds.get(call, call)
    if kind not in {"rename", "unlink", "mkdir"}:
        raise ValueError(f"the model of the disk does not know {call}({arguments})")
    return Operation(time=time, call=kind, paths=paths)


def _text(digits: str, cut: str) -> bytes:
    if cut:
        raise ValueError("strace cut a text: give it a larger -s")
    return bytes.fromhex(digits.replace("\\x", ""))


def _plain(path: str) -> str:
    return bytes.fromhex(path.replace("\\x", "")).decode() if path.startswith("\\x") else path


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


@dataclass(eq=False, slots=True)
class _File:
    now: bytes = b""
    synced: bytes = b""


@dataclass(eq=False, slots=True)
class _Open:
    file: _File | None  # None: a folder
    path: str
    appends: bool
    position: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What is found after a crash of this kind: files by their path in the folder, and the folders."""

    kind: str
    files: Mapping[str, bytes]
    folders: frozenset[str]

    def write(self, target: Path) -> None:
        """Lay it out under `target`, which must be empty."""
        for name in sorted(self.folders):
            (target / name).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (target / name).write_bytes(content)


@dataclass(slots=True)
class Disk:
    """The folder as operations change it. `folder` itself exists and is empty at first."""

    folder: str
    _names: dict[str, _File | None] = field(default_factory=dict)
    _synced_names: dict[str, _File | None] = field(default_factory=dict)
    _open: dict[int, _Open] = field(default_factory=dict)

    def take(self, operation: Operation) -> bool:
        """Do what the call did; returns whether that can make a difference after a crash."""
        return bool(getattr(self, f"_do_{operation.call}")(operation))

    def _do_open(self, operation: Operation) -> bool:
        path = operation.paths[0]
        if "O_DIRECTORY" in operation.flags or path == self.folder:
            self._open[operation.descriptor] = _Open(None, path, appends=False)
            return False
        created = path not in self._names
        file = self._names.setdefault(path, _File())
        if file is None:
            raise ValueError(f"{path} was opened as a file and is a folder")
        truncated = "O_TRUNC" in operation.flags and bool(file.now)
        if truncated:
            file.now = b""
        self._open[operation.descriptor] = _Open(file, path, appends="O_APPEND" in operation.flags)
        return created or truncated

    def _do_write(self, operation: Operation) -> bool:
        opened = self._open[operation.descriptor]
        if opened.file is None:
            raise ValueError(f"{opened.path} is a folder and was written to")
        if opened.appends:
            opened.position = len(opened.file.now)
        _put(opened.file, opened.position, operation.data)
        opened.position += len(operation.data)
        return True

    def _do_pwrite64(self, operation: Operation) -> bool:
        file = self._open[operation.descriptor].file
        if file is None:
            raise ValueError("a folder was written to")
        _put(file, operation.number, operation.data)
        return True

    def _do_ftruncate(self, operation: Operation) -> bool:
        file = self._open[operation.descriptor].file
        if file is None:
            raise ValueError("a folder was truncated")
        before = file.now
        file.now = before[: operation.number].ljust(operation.number, b"\0")
        return file.now != before

    def _do_lseek(self, operation: Operation) -> bool:
        self._open[operation.descriptor].position = operation.number
        return False

    def _do_fsync(self, operation: Operation) -> bool:
        opened = self._open[operation.descriptor]
        if opened.file is not None:
            changed = opened.file.synced != opened.file.now
            opened.file.synced = opened.file.now
            return changed
        before = dict(self._synced_names)
        own = {name for name in self._names.keys() | before.keys() if str(PurePosixPath(name).parent) == opened.path}
        for name in own:
            if name in self._names:
                self._synced_names[name] = self._names[name]
            else:
                self._synced_names.pop(name, None)
        return self._synced_names != before

    def _do_rename(self, operation: Operation) -> bool:
        source, target = operation.paths
        self._names[target] = self._names.pop(source)
        return True

    def _do_unlink(self, operation: Operation) -> bool:
        return self._names.pop(operation.paths[0], self) is not self

    def _do_mkdir(self, operation: Operation) -> bool:
        if operation.paths[0] != self.folder:
            self._names[operation.paths[0]] = None
        return True

    def _do_close(self, operation: Operation) -> bool:
        self._open.pop(operation.descriptor, None)
        return False

    def views(self) -> Iterator[View]:
        """What may be found now: after a SIGKILL, and after a power cut in its extremes."""
        yield self._view("killed", self._names, lambda file: file.now)
        yield self._view("power cut", self._synced_names, lambda file: file.synced)
        yield self._view("power cut, names kept", self._names, lambda file: file.synced)
        yield self._view("power cut, contents kept", self._synced_names, lambda file: file.now)
        yield self._view("power cut, half a write kept", self._names, _torn)

    def _view(self, kind: str, names: Mapping[str, _File | None], content: Callable[[_File], bytes]) -> View:
        length = len(self.folder) + 1
        # What lies in a folder whose own name is lost is lost with it.
        reachable = {
            name: file
            for name, file in names.items()
            if all(str(parent) in names for parent in PurePosixPath(name).parents if len(str(parent)) >= length)
        }
        return View(
            kind=kind,
            files={name[length:]: content(file) for name, file in reachable.items() if file is not None},
            folders=frozenset(name[length:] for name, file in reachable.items() if file is None),
        )


def _put(file: _File, at: int, data: bytes) -> None:
    file.now = file.now[:at].ljust(at, b"\0") + data + file.now[at + len(data) :]


def _torn(file: _File) -> bytes:
    if len(file.now) <= len(file.synced):
        return file.synced
    return file.now[: (len(file.synced) + len(file.now)) // 2]
