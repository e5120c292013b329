"""Durable memory of the switch: `state.json` and its twin `state.json.bak` in one locked folder.

A kill that is forgotten at a restart is no kill, so this module promises two things. What `save` returned from
survives a crash and the damage of either file; and what `load` returns is either exactly what was saved, or a named
reason why it cannot be believed. It stores plain JSON documents and knows nothing of states, rules or clocks: of a
document's meaning it knows only `switch` (whose memory it is) and `epoch` (which of two is newer).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from sidecar.core.errors import StorageError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import NoReturn

FORMAT_VERSION = 1
# A thousand firing alerts take about half a MiB; a larger file is not ours, and reading it could exhaust memory.
MAX_BYTES = 16 * 1024 * 1024
STATE_NAME: Final = "state.json"
BACKUP_NAME: Final = "state.json.bak"
LOCK_NAME = "lock"

_ENVELOPE_KEYS = frozenset({"version", "checksum"})
_TEMPORARY_SUFFIX = ".tmp"
_READ_BLOCK = 1024 * 1024

Document = Mapping[str, Any]
CopyName = Literal["state.json", "state.json.bak"]


class FolderUnusable(StorageError):  # noqa: N818 - reads as the condition, like InvalidTransition
    """The state folder cannot be created, opened or locked."""


class FolderLocked(StorageError):  # noqa: N818 - as above
    """Another process holds the state folder."""


class SaveRefused(StorageError):  # noqa: N818 - as above
    """Saving now could overwrite a state that must be kept."""


class SaveFailed(StorageError):  # noqa: N818 - as above
    """The operating system failed a write; what was stored before is still there, or the new one is, or one of each."""


class DocumentInvalid(StorageError):  # noqa: N818 - as above
    """The document holds what JSON cannot keep, is of another switch, or is too large."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Nothing:
    """Neither file exists. `audit_epoch` is the audit's newest, not None if an audit is there although no state is."""

    audit_epoch: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """A document that was saved, without the envelope's keys.

    `note` says what was unusual, or None. `alternative` is the other copy where it is whole but says something else: a
    save was cut between the two, so it was never acknowledged. `document` is then the newer one; whoever knows what
    the documents mean takes the stricter. `behind_audit` is True where the audit saw a later epoch than the document's
    although both copies are whole: both were put back to an older day. `audit_epoch` is that later epoch, or None where
    the audit has none.
    """

    document: dict[str, Any]
    source: CopyName
    note: str | None
    alternative: dict[str, Any] | None
    behind_audit: bool
    audit_epoch: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """A state was there and cannot be believed; `reason` names each file and what is wrong with it."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FutureVersion:
    """A newer sidecar wrote it. The files are left untouched and `save` refuses from now on."""

    found: int
    supported: int
    path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignSwitch:
    """Another switch wrote it. The files are left untouched and `save` refuses from now on."""

    found: str
    expected: str
    path: Path


Loaded = Nothing | Restored | Lost | FutureVersion | ForeignSwitch


@dataclass(frozen=True, kw_only=True, slots=True)
class _Missing:
    name: CopyName


@dataclass(frozen=True, kw_only=True, slots=True)
class _Damaged:
    name: CopyName
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Future:
    name: CopyName
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Whole:
    name: CopyName
    document: dict[str, Any]

    @property
    def epoch(self) -> int:
        epoch: int = self.document["epoch"]
        return epoch


_Copy = _Missing | _Damaged | _Future | _Whole


class StateFolder:
    """The folder of one switch, held under an exclusive lock from `open` to `close`.

    Everything is done relative to the folder's descriptor. Not thread-safe: one thread saves.
    """

    def __init__(self, *, path: Path, switch: str, folder: int, lock: int) -> None:
        self._path = path
        self._switch = switch
        self._folder = folder
        self._lock = lock
        self._closed = False
        self._refusal: str | None = f"{path} was not loaded yet: load it before the first save"

    @classmethod
    def open(cls, path: Path, *, switch: str) -> Self:
        """Create the folder where it is missing (mode 0700), lock it, and clear away what a crash left half-written.

        Raises:
            FolderLocked: another process holds it.
            FolderUnusable: it cannot be created, opened or locked.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            _raise_unusable(path, error)
        try:
            lock = _lock(folder, path)
        except BaseException:
            os.close(folder)
            raise
        opened = cls(path=path, switch=switch, folder=folder, lock=lock)
        try:
            opened._prepare()
        except OSError as error:
            opened.close()
            _raise_unusable(path, error)
        return opened

    def load(self, *, newest_audit_epoch: int | None) -> Loaded:
        """Read both copies and decide which to believe; changes nothing on disk.

        `newest_audit_epoch` is the highest epoch the audit has seen, None where it has none: a single copy older than
        that is not believed, for the other one knew more.
        """
        main, backup = self._read_copy(STATE_NAME), self._read_copy(BACKUP_NAME)
        loaded = _judge(main, backup, folder=self._path, switch=self._switch, newest_audit_epoch=newest_audit_epoch)
        self._refusal = _refusal(loaded)
        return loaded

    def save(self, document: Document) -> None:
        """Make `document` durable in both copies, the backup first; once this returned, a crash cannot lose it.

        `document` needs `switch` (this folder's) and `epoch` (a whole number >= 0), and may not use the keys `version`
        and `checksum`, which are added here.

        Raises:
            DocumentInvalid: it cannot be stored as it is; nothing was written.
            SaveRefused: not loaded, closed, or what is stored is a newer version's or another switch's.
            SaveFailed: the operating system refused; each copy is whole, old or new. Saving again is safe.
        """
        if self._refusal is not None:
            raise SaveRefused(self._refusal)
        payload = encode(document, switch=self._switch)
        for name in (BACKUP_NAME, STATE_NAME):
            try:
                self._replace(name, payload)
            except OSError as error:
                self._discard_temporary(name)
                self._check_place()
                raise SaveFailed(
                    f"could not write {self._path / name}: {error.strerror or error!r}; "
                    "the copy that was there is kept, free space or repair the volume, saving is tried again"
                ) from error
        self._check_place()

    def close(self) -> None:
        """Give the lock back. Idempotent; a save afterwards is refused."""
        if self._closed:
            return
        self._closed = True
        self._refusal = f"{self._path} is closed"
        # Unlocked by name, because a child that was forked but has not called exec yet still shares the descriptor.
        with contextlib.suppress(OSError):
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        os.close(self._lock)
        os.close(self._folder)

    def _prepare(self) -> None:
        for name in (BACKUP_NAME, STATE_NAME):
            self._unlink_temporary(name)
        # The folder's own entry must survive too. A parent that we may not open is an administrator's: theirs to keep.
        with contextlib.suppress(OSError):
            parent = os.open(self._path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)

    def _replace(self, name: str, payload: bytes) -> None:
        temporary = name + _TEMPORARY_SUFFIX
        self._unlink_temporary(name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600, dir_fd=self._folder)
        try:
            _write_all(descriptor, payload)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        os.fsync(self._folder)

    def _unlink_temporary(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name + _TEMPORARY_SUFFIX, dir_fd=self._folder)

    def _discard_temporary(self, name: str) -> None:
        # The write's own error is the news; a temporary file that stays is removed by the next save or open.
        with contextlib.suppress(OSError):
            self._unlink_temporary(name)

    def _check_place(self) -> None:
        """Refuse to call a save durable if a restart would look for it elsewhere.

        A folder that was renamed or mounted over still takes writes through our descriptor, but nobody will find them.
        """
        try:
            there, held = self._path.stat(), os.fstat(self._folder)
        except OSError as error:
            raise SaveFailed(
                f"{self._path} cannot be looked up any more: {error.strerror}; put the folder back"
            ) from error
        if (there.st_dev, there.st_ino) != (held.st_dev, held.st_ino):
            raise SaveFailed(
                f"{self._path} is no longer the folder that was locked at start; put it back or restart the sidecar"
            )

    def _read_copy(self, name: CopyName) -> _Copy:
        try:
            raw = _read_file(name, self._folder)
        except FileNotFoundError:
            return _Missing(name=name)
        except OSError as error:
            return _Damaged(name=name, why=f"cannot be read: {error.strerror or error!r}")
        except _NotWholeError as error:
            return _Damaged(name=name, why=str(error))
        try:
            return _decode(name, raw)
        except _NotWholeError as error:
            return _Damaged(name=name, why=str(error))


class _NotWholeError(Exception):
    """The bytes are not those of a document that was saved; never leaves this module."""


def encode(document: Document, *, switch: str) -> bytes:
    """Return the bytes of a state file: canonical JSON with `version` and `checksum` added, and a newline.

    Raises:
        DocumentInvalid: keys are missing or reserved, a value is not JSON (NaN is none either), or it is too large.
    """
    _check_document(document, switch=switch)
    body = {**document, "version": FORMAT_VERSION}
    try:
        payload = _canonical({**body, "checksum": _checksum(body)}) + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise DocumentInvalid(
            f"the state of {switch!r} holds what JSON cannot keep: {error}; nothing was written"
        ) from error
    if len(payload) > MAX_BYTES:
        raise DocumentInvalid(
            f"the state of {switch!r} takes {len(payload)} bytes, at most {MAX_BYTES} can be read; nothing was written"
        )
    return payload


def _check_document(document: Document, *, switch: str) -> None:
    reserved = sorted(_ENVELOPE_KEYS & document.keys())
    if reserved:
        raise DocumentInvalid(f"the state of {switch!r} uses {reserved}, which the file's envelope owns")
    if document.get("switch") != switch:
        raise DocumentInvalid(f"the state names the switch {document.get('switch')!r}, this folder is of {switch!r}")
    if not _is_epoch(document.get("epoch")):
        raise DocumentInvalid(
            f"the state of {switch!r} has epoch {document.get('epoch')!r}, wanted a whole number >= 0"
        )


def _is_epoch(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _canonical(value: Document) -> bytes:
    """JSON that is the same bytes for the same content: sorted keys, no blanks, ASCII only, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def _checksum(body: Document) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()


def _decode(name: CopyName, raw: bytes) -> _Future | _Whole:
    parsed = _parse(raw)
    version = parsed.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _NotWholeError(f"has version {version!r}, wanted a whole number >= 1")
    if version > FORMAT_VERSION:
        # Looked at before the checksum: a newer version may compute it otherwise, and refusing is the safe mistake.
        return _Future(name=name, version=version)
    _check_checksum(parsed)
    if not isinstance(parsed.get("switch"), str) or not _is_epoch(parsed.get("epoch")):
        raise _NotWholeError(
            f"has switch {parsed.get('switch')!r} and epoch {parsed.get('epoch')!r}, wanted a text and a whole number"
        )
    return _Whole(name=name, document={key: value for key, value in parsed.items() if key not in _ENVELOPE_KEYS})


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _NotWholeError(f"is not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise _NotWholeError(f"holds {type(parsed).__name__}, wanted an object")
    return parsed


def _check_checksum(parsed: dict[str, Any]) -> None:
    body = {key: value for key, value in parsed.items() if key != "checksum"}
    try:
        expected = _checksum(body)
    except (ValueError, RecursionError) as error:
        raise _NotWholeError(f"holds what was never saved ({error})") from error
    found = parsed.get("checksum")
    # Bytes, because compare_digest refuses text beyond ASCII, which damage may well put there.
    if not isinstance(found, str) or not hmac.compare_digest(
        found.encode("utf-8", "replace"), expected.encode("ascii")
    ):
        raise _NotWholeError("has a checksum that does not fit its content")


def _judge(main: _Copy, backup: _Copy, *, folder: Path, switch: str, newest_audit_epoch: int | None) -> Loaded:
    """Decide which copy to believe. What must not be touched wins over what can be read."""
    untouchable = _untouchable(main, backup, folder=folder, switch=switch)
    if untouchable is not None:
        return untouchable
    if isinstance(main, _Whole) and isinstance(backup, _Whole):
        return _of_two(main, backup, newest_audit_epoch)
    if isinstance(main, _Missing) and isinstance(backup, _Missing):
        return Nothing(audit_epoch=newest_audit_epoch)
    if isinstance(main, _Whole):
        return _of_one(main, backup, folder, newest_audit_epoch)
    if isinstance(backup, _Whole):
        return _of_one(backup, main, folder, newest_audit_epoch)
    return Lost(reason=f"in {folder}: {_describe(main)}; {_describe(backup)}")


def _untouchable(main: _Copy, backup: _Copy, *, folder: Path, switch: str) -> FutureVersion | ForeignSwitch | None:
    for copy in (main, backup):
        if isinstance(copy, _Future):
            return FutureVersion(found=copy.version, supported=FORMAT_VERSION, path=folder / copy.name)
    for copy in (main, backup):
        if isinstance(copy, _Whole) and copy.document["switch"] != switch:
            return ForeignSwitch(found=copy.document["switch"], expected=switch, path=folder / copy.name)
    return None


def _of_two(main: _Whole, backup: _Whole, newest_audit_epoch: int | None) -> Restored:
    behind = newest_audit_epoch is not None and max(main.epoch, backup.epoch) < newest_audit_epoch
    if main.document == backup.document:
        return Restored(
            document=main.document,
            source=main.name,
            note=None,
            alternative=None,
            behind_audit=behind,
            audit_epoch=newest_audit_epoch,
        )
    # At the same epoch the backup is the newer one, because it is always written first.
    newer, older = (main, backup) if main.epoch > backup.epoch else (backup, main)
    note = f"{newer.name} (epoch {newer.epoch}) is newer than {older.name} (epoch {older.epoch}): a save was cut short"
    return Restored(
        document=newer.document,
        source=newer.name,
        note=note,
        alternative=older.document,
        behind_audit=behind,
        audit_epoch=newest_audit_epoch,
    )


def _of_one(copy: _Whole, other: _Copy, folder: Path, newest_audit_epoch: int | None) -> Restored | Lost:
    if newest_audit_epoch is not None and copy.epoch < newest_audit_epoch:
        behind = f"{copy.name} is of epoch {copy.epoch}, but the audit has seen epoch {newest_audit_epoch}"
        reason = f"in {folder}: {_describe(other)}; {behind}"
        return Lost(reason=reason)
    note = f"{_describe(other)}; {copy.name} (epoch {copy.epoch}) is used"
    return Restored(document=copy.document, source=copy.name, note=note, alternative=None, behind_audit=False)


def _describe(copy: _Copy) -> str:
    return f"{copy.name} {copy.why}" if isinstance(copy, _Damaged) else f"{copy.name} is missing"


def _refusal(loaded: Loaded) -> str | None:
    match loaded:
        case FutureVersion():
            return (
                f"{loaded.path} has format version {loaded.found}, this sidecar supports {loaded.supported}: "
                "it is left untouched; run the newer sidecar, or move the file away"
            )
        case ForeignSwitch():
            return (
                f"{loaded.path} is the state of switch {loaded.found!r}, not of {loaded.expected!r}: "
                "it is left untouched; correct switch.name or the volume, or move the file away"
            )
        case _:
            return None


def _lock(folder: int, path: Path) -> int:
    try:
        descriptor = os.open(LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    except OSError as error:
        _raise_unusable(path / LOCK_NAME, error)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise FolderLocked(
            f"{path} is held by another sidecar; each switch needs its own folder: stop the other or set storage.dir"
        ) from error
    except OSError as error:
        os.close(descriptor)
        _raise_unusable(path / LOCK_NAME, error)
    return descriptor


def _raise_unusable(path: Path, error: OSError) -> NoReturn:
    raise FolderUnusable(
        f"{path} cannot be used as the state folder: {error.strerror or error!r}; "
        "wanted a folder on a writable volume that this user may enter: mount one or set storage.dir"
    ) from error


def _read_file(name: str, folder: int) -> bytes:
    """Read a regular file of bounded size; O_NONBLOCK because a pipe in its place would hang the start."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise _NotWholeError("is not a regular file")
        if facts.st_size > MAX_BYTES:
            raise _NotWholeError(f"takes {facts.st_size} bytes, at most {MAX_BYTES} were ever written")
        return b"".join(iter(lambda: os.read(descriptor, _READ_BLOCK), b""))
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, payload: bytes) -> None:
    view = memoryview(payload)
    while view:
        written = os.write(descriptor, view)
        view = view[written:]
