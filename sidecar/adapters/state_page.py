"""The state page: 64 bytes of shared memory that say whether trading is allowed, for callers that cannot wait for HTTP.

This module is the only writer. It knows the layout and how to write it so that a reader never accepts a half-written
or abandoned page; it does not know why a state holds, reads no clock and decides nothing. The layout and the way to
read it from any language stand in docs/STATE_PAGE.md.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
import stat
import struct
import zlib
from pathlib import Path
from typing import Final, Self

PAGE_SIZE: Final = 64
MAGIC: Final = b"KSWPAGE1"
STATE_ACTIVE: Final = 0
STATE_DISABLED: Final = 3
RESTRICTION_HALT: Final = 2

_FILE_MODE: Final = 0o644
_FOLDER_MODE: Final = 0o755
_U64: Final = (1 << 64) - 1
_SEQUENCE: Final = struct.Struct("<Q")
# Offsets 16 to 55: heartbeat, state, restriction, factor, epoch, lease.
_FIELDS: Final = struct.Struct("<QIIdQQ")
# Offsets 56 to 63: CRC-32 and four bytes that stay zero.
_TAIL: Final = struct.Struct("<II")


class StatePageError(OSError):
    """The state page could not be opened or may not be written.

    The errno of the system's refusal is kept where there was one; the message names the path and what to do.
    """


class StatePage:
    """The one writer of a state page; use from one thread.

    Every write, a heartbeat included, is: sequence to odd, fields and CRC, sequence to the next even number. The CRC
    covers bytes 0-55 with that even sequence, so readers refuse whatever a killed writer leaves behind, and a machine
    that reorders stores cannot show a mix of two writes either.
    """

    __slots__ = ("_epoch", "_factor", "_fd", "_lease_ns", "_map", "_path", "_restriction", "_sequence", "_state")

    def __init__(self, path: Path, fd: int, mapping: mmap.mmap, *, lease_ns: int) -> None:
        self._path = path
        self._fd = fd
        self._map: mmap.mmap | None = mapping
        self._lease_ns = lease_ns
        (found,) = _SEQUENCE.unpack_from(mapping, 8)
        # An odd number was left by a writer killed in mid-write: the write that we are about to start is its successor.
        self._sequence: int = (found - 1 if found & 1 else found) & _U64
        self._halt()
        self._write(0)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, lease_ns: int) -> Self:
        """Open the page, created (0644) with missing folders (0755) where needed; write `halt` with heartbeat 0.

        An existing file is taken over in place: never truncated, renamed or unlinked, for a truncated mapping would
        kill the trading process with SIGBUS. A shorter one is grown to 64 bytes; of a longer one the first 64 are used.

        Args:
            path: where the page is; a symbolic link at its last component is refused.
            lease_ns: age in nanoseconds beyond which readers call the page stale; above 0, below 2**64.

        Raises:
            StatePageError: the file cannot be created, is no regular file, has no space, or another process writes it.
            ValueError: `lease_ns` is out of range.
        """
        if not 0 < lease_ns <= _U64:
            raise ValueError(f"lease_ns is {lease_ns!r}; wanted nanoseconds above 0 and below 2**64")
        where = Path(path)
        try:
            _create_folders(where.parent)
            fd = os.open(where, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, _FILE_MODE)
        except OSError as error:
            raise _explained(error, where) from error
        try:
            mapping = _claim(fd, where)
        except BaseException:
            os.close(fd)
            raise
        return cls(where, fd, mapping, lease_ns=lease_ns)

    @property
    def path(self) -> Path:
        """Where the page is."""
        return self._path

    def publish(self, *, state: int, restriction: int, factor: float, epoch: int, now_ns: int) -> None:
        """Show this snapshot to all readers, with a heartbeat of `now_ns`.

        Args:
            state: 0 ACTIVE, 1 KILLED, 2 RECOVERING, 3 DISABLED.
            restriction: 0 none, 1 reduce_only, 2 halt.
            factor: position limit factor, 0.0 to 1.0.
            epoch: count of durable changes, 0 to 2**64-1.
            now_ns: CLOCK_MONOTONIC in nanoseconds.

        Raises:
            ValueError: a value is out of range; the page then shows `halt`, for what was meant is not known.
            StatePageError: the page is closed.
        """
        problem = _problem(state=state, restriction=restriction, factor=factor, epoch=epoch, now_ns=now_ns)
        if problem:
            self._halt()
            self._write(0)
            raise ValueError(f"{problem}; {self._path} shows halt until a valid snapshot is published")
        self._state = state
        self._restriction = restriction
        self._factor = factor
        self._epoch = epoch
        self._write(now_ns)

    def beat(self, now_ns: int) -> None:
        """Renew the lease: rewrite the heartbeat, leave the rest as published.

        Args:
            now_ns: CLOCK_MONOTONIC in nanoseconds.

        Raises:
            StatePageError: the page is closed.
        """
        self._write(now_ns)

    def close(self) -> None:
        """Set the heartbeat to 0, so that readers deny at once, and let go of the file; a second call does nothing."""
        if self._map is None:
            return
        self._write(0)
        self._map.close()
        self._map = None
        os.close(self._fd)

    def _halt(self) -> None:
        self._state = STATE_ACTIVE
        self._restriction = RESTRICTION_HALT
        self._factor = 0.0
        self._epoch = 0

    def _write(self, heartbeat: int) -> None:
        page = self._map
        if page is None:
            raise StatePageError(errno.EBADF, "the state page is closed; open it again to write", str(self._path))
        finished = _SEQUENCE.pack((self._sequence + 2) & _U64)
        fields = _FIELDS.pack(heartbeat, self._state, self._restriction, self._factor, self._epoch, self._lease_ns)
        tail = _TAIL.pack(zlib.crc32(MAGIC + finished + fields), 0)
        # Each slice assignment is one memcpy; the aligned eight bytes of the sequence change as one word.
        page[8:16] = _SEQUENCE.pack((self._sequence + 1) & _U64)
        page[0:8] = MAGIC
        page[16:64] = fields + tail
        page[8:16] = finished
        self._sequence = (self._sequence + 2) & _U64


def _create_folders(folder: Path) -> None:
    missing = [folder, *folder.parents]
    missing = [part for part in missing if not part.exists()]
    for part in reversed(missing):
        part.mkdir(mode=_FOLDER_MODE, exist_ok=True)
        part.chmod(_FOLDER_MODE)  # mkdir applies the umask, and the trading container reads as another user


def _claim(fd: int, path: Path) -> mmap.mmap:
    """Check, lock, size and map the open file."""
    try:
        mode = os.fstat(fd).st_mode
        _refuse_other_kinds(mode, path)
        _lock(fd, path)
        if stat.S_IMODE(mode) != _FILE_MODE:
            os.fchmod(fd, _FILE_MODE)
        # Grows a short file and reserves the blocks: on a full disk a store into a hole of a mapping is SIGBUS.
        os.posix_fallocate(fd, 0, PAGE_SIZE)
        return mmap.mmap(fd, PAGE_SIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except StatePageError:
        raise
    except OSError as error:
        raise _explained(error, path) from error


def _refuse_other_kinds(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        raise StatePageError(errno.EINVAL, "is no regular file; remove it, the sidecar creates its own", str(path))


def _lock(fd: int, path: Path) -> None:
    # A record lock needs a writable descriptor, so a trading container that may only read the page cannot take it.
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, PAGE_SIZE)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            wanted = "is written by another process; two sidecars need a page each, set gate.page"
            raise StatePageError(error.errno, wanted, str(path)) from error
        raise


def _explained(error: OSError, path: Path) -> StatePageError:
    if error.errno == errno.ELOOP:
        hint = "the state page is a symbolic link, which is refused; remove the link"
    else:
        hint = f"cannot open the state page: {error.strerror}; check folder, owner and free space, or set gate.page"
    return StatePageError(error.errno, hint, str(path))


def _problem(*, state: int, restriction: int, factor: float, epoch: int, now_ns: int) -> str:
    if not STATE_ACTIVE <= state <= STATE_DISABLED:
        return f"state is {state!r}; wanted 0 to 3"
    if not 0 <= restriction <= RESTRICTION_HALT:
        return f"restriction is {restriction!r}; wanted 0 to 2"
    if not (math.isfinite(factor) and 0.0 <= factor <= 1.0):
        return f"factor is {factor!r}; wanted 0.0 to 1.0"
    if not 0 <= epoch <= _U64:
        return f"epoch is {epoch!r}; wanted 0 to 2**64-1"
    if not 0 <= now_ns <= _U64:
        return f"now_ns is {now_ns!r}; wanted 0 to 2**64-1"
    return ""
