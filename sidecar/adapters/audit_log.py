"""The audit: an append-only, hash-chained record of who did what to the switch, written by one, read by many.

Each event is one line of JSON that carries the SHA-256 of the line before it, over files and restarts, so that a
changed, removed or cut line shows. Lines live in `<day>.<first seq>.jsonl`: a new file each UTC day or when one is
full, closed files are gzipped, and the oldest are removed after the retention time. A disk that refuses never stops the
switch: events wait in memory, in order, and are written when it takes them again. This module knows nothing of what the
events mean, except that `data.epoch` grows, and never reads a clock.

Readers take no lock. They may meet a line that is still being written (no newline yet), a file that is being gzipped
(both forms exist for a moment, the plain one counts) and files that retention removes; all of that is normal to them.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, Self, cast

from sidecar.core.errors import StorageError

if TYPE_CHECKING:
    from pathlib import Path

KEYS = ("seq", "time", "type", "from", "to", "by", "reason", "data", "prev", "hash")
GENESIS = "0" * 64
MARK_NAME = "head"
# A webhook may carry 1 MiB that somebody else wrote; the audit keeps what it means, not all it says.
MAX_LINE_BYTES = 256 * 1024
MAX_TEXT = 4096
# About 10 MiB of ordinary lines: hours of incident on a full disk, and little beside the container's memory limit.
PENDING_LIMIT = 10_000
MAX_PROBLEMS = 1000

_BLOCK = 64 * 1024
_CHUNK = 256 * 1024
_MAX_DEPTH = 16
_TORN_KEPT = 1024 * 1024
# Enough lines to see the newest epoch even where the last few were written out of order by a caller.
_EPOCHS_SEEN = 64
_PACKING_SUFFIX = ".gz.tmp"
_NAME = re.compile(r"(\d{4}-\d{2}-\d{2})\.(\d{12,18})\.jsonl(?:\.gz)?", re.ASCII)
_TORN_NAME = re.compile(r"torn-(\d{4}-\d{2}-\d{2})T.*\.partial", re.ASCII | re.DOTALL)
_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
_UNREADABLE_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)

Event = Mapping[str, Any]
Defer = Callable[[Callable[[], None]], object]


class AuditUnusable(StorageError):  # noqa: N818 - reads as the condition, like InvalidTransition
    """The audit folder cannot be opened for writing, or its head cannot be found."""


class AuditUnreadable(StorageError):  # noqa: N818 - as above
    """A file or the folder of the audit cannot be read at all."""


class AuditWriteError(StorageError):
    """The disk refused; the events are kept in memory and are written first, in order, at the next append or flush.

    Attributes:
        lines: the lines that this call accepted, final although not on disk, without newline: for the other trails.
        pending: how many lines wait now, these included.
    """

    def __init__(self, message: str, *, lines: tuple[str, ...], pending: int) -> None:
        super().__init__(message)
        self.lines = lines
        self.pending = pending


@dataclass(frozen=True, kw_only=True, slots=True)
class TornTail:
    """A last line that a crash cut short: `size` bytes taken out of `file`, kept in `kept_in` (None: no room to)."""

    file: str
    size: int
    kept_in: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenReport:
    """What was found at the start, for the caller to audit as `audit.repaired` or the like.

    `missing` is the first and last seq of whole lines that were once durable and are gone; the log goes on after them,
    so that `verify` shows the gap for as long as it is kept.
    """

    torn: TornTail | None
    missing: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong with the audit. `line` counts from 1; None where the whole file or log is meant."""

    file: str
    line: int | None
    what: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What `verify` found; `problems` ends after MAX_PROBLEMS, `notes` are worth knowing but no evidence of tampering.

    `starts_at_seq` is set where the log does not start at 1, because retention (or someone) removed the oldest files:
    what stood there can no longer be verified.
    """

    checked: int
    first_seq: int | None
    last_seq: int | None
    starts_at_seq: int | None
    torn_tail: bool
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


@dataclass(frozen=True, kw_only=True, slots=True)
class _Segment:
    """One file of the log, plain while it may be written, gzipped after; named for its first line."""

    folder: Path
    day: date
    first: int

    @property
    def plain(self) -> Path:
        return self.folder / f"{self.day.isoformat()}.{self.first:012d}.jsonl"

    @property
    def packed(self) -> Path:
        return self.plain.with_name(self.plain.name + ".gz")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mark:
    """The newest line known to be durable, and the first that retention has left.

    The newest is written after its line and without fsync, so it is never ahead of the lines. The first is durable
    before anything is removed, so after a crash there may be more lines than it says, never fewer; None where a version
    wrote the mark that did not know of it.
    """

    seq: int
    digest: str
    first: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    raw: bytes
    seq: int
    digest: str
    day: date


def _at_once(work: Callable[[], None]) -> None:
    work()


class AuditLog:
    """The one writer of an audit folder; call it from one thread. The counters may be read from any."""

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        retention_seconds: float | None,
        now: datetime,
        pending_limit: int = PENDING_LIMIT,
        defer: Defer = _at_once,
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._retention = None if retention_seconds is None else timedelta(seconds=retention_seconds)
        self._pending_limit = pending_limit
        self._defer = defer
        self._pending: deque[_Entry] = deque()
        self._housekeeping = threading.Lock()
        self._marking = threading.Lock()  # housekeeping and writing both write the mark
        self._housekeeping_due = True
        self._housekeeping_day = _utc(now).date()
        self.write_failures = 0
        self.dropped = 0
        self.housekeeping_failures = 0
        self._dropped_unsaid = 0
        torn = _repair_tail(folder, now)
        head, missing = _find_head(folder)
        self.opened = OpenReport(torn=torn, missing=missing)
        self.head_sequence = head.seq
        self._accepted = head
        self._mark = _mark_at_start(folder, head)
        self._newest_epoch = _newest_epoch(folder)
        self._active = _adopt_newest(folder)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        max_bytes: int,
        retention_seconds: float | None,
        now: datetime,
        pending_limit: int = PENDING_LIMIT,
        defer: Defer = _at_once,
    ) -> Self:
        """Open the log in `folder`, creating it (0700) where missing; mend a torn last line; start housekeeping.

        `retention_seconds` None keeps everything. `defer` runs the gzipping and removal of closed files; they touch
        nothing that is being written, so a caller may run them in another thread. By default they run in place.

        Raises:
            AuditUnusable: the folder cannot be created, read or mended.
        """
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            log = cls(
                folder,
                max_bytes=max_bytes,
                retention_seconds=retention_seconds,
                now=now,
                pending_limit=pending_limit,
                defer=defer,
            )
        except OSError as error:
            raise AuditUnusable(
                f"{folder} cannot be used as the audit folder: {error.strerror or error!r}; "
                "wanted a folder on a writable volume that this user may enter: mount one or set storage.dir"
            ) from error
        log._keep_house(now)
        return log

    @property
    def pending(self) -> int:
        """How many lines wait for the disk."""
        return len(self._pending)

    def newest_epoch(self) -> int | None:
        """Return the highest `data.epoch` of the newest lines, appended ones too; None without one."""
        return self._newest_epoch

    def append(self, events: Iterable[Event], now: datetime) -> tuple[str, ...]:
        """Make the events durable and return their lines, without newline, for the other trails.

        An event has `type` and may have `from`, `to`, `by`, `reason`, `data` and `time` (when it happened, `now` if it
        does not say; naive ones are UTC). What JSON cannot keep is kept as text; other keys go into `data`. Where too
        many lines wait already, further events are counted in `dropped` and told of in one `audit.dropped` line later.

        Raises:
            AuditWriteError: the disk refused; nothing is lost that the error does not say.
        """
        failure = self._drain()
        self._accept_dropped(now)
        accepted = [entry for event in events if (entry := self._accept(event, now)) is not None]
        if failure is None:
            failure = self._drain()
        lines = tuple(entry.raw[:-1].decode("ascii") for entry in accepted)
        self._keep_house(now)  # after a failure too: what retention removes may be the room that was wanted
        if failure is not None:
            self._raise_write_error(failure, lines)
        return lines

    def flush(self, now: datetime) -> tuple[str, ...]:
        """Try again what waits, and keep house when the day has changed; call it now and then.

        Returns the `audit.dropped` line if there was one to write.

        Raises:
            AuditWriteError: the disk still refuses.
        """
        return self.append((), now)

    def close(self) -> None:
        """Close the file; lines that still wait are lost, so flush before."""
        if self._active is not None:
            self._active.close()
            self._active = None

    def _raise_write_error(self, failure: OSError, lines: tuple[str, ...]) -> None:
        self.write_failures += 1
        raise AuditWriteError(
            f"could not write the audit in {self._folder}: {failure.strerror or failure!r}; {len(self._pending)} lines "
            f"wait in memory and {self.dropped} were dropped; free space or repair the volume, writing is tried again",
            lines=lines,
            pending=len(self._pending),
        ) from failure

    def _accept(self, event: Event, now: datetime) -> _Entry | None:
        """Chain the event to its predecessor, in memory. From here on its line is final, whatever the disk says."""
        if len(self._pending) >= self._pending_limit:
            self.dropped += 1
            self._dropped_unsaid += 1
            return None
        entry = _compose(event, seq=self._accepted.seq + 1, prev=self._accepted.digest, now=now)
        self._pending.append(entry)
        self._accepted = _Mark(seq=entry.seq, digest=entry.digest)
        epoch = _epoch_of(event)
        if epoch is not None:
            self._newest_epoch = max(epoch, self._newest_epoch or 0)
        return entry

    def _accept_dropped(self, now: datetime) -> None:
        if self._dropped_unsaid and len(self._pending) < self._pending_limit:
            count, self._dropped_unsaid = self._dropped_unsaid, 0
            reason = "the disk refused for so long that events were dropped"
            self._accept({"type": "audit.dropped", "reason": reason, "data": {"count": count}}, now)

    def _drain(self) -> OSError | None:
        """Write what waits, a bounded piece at a time, so that a disk with little room still makes progress."""
        while self._pending:
            try:
                active = self._file_for(self._pending[0])
                chunk = self._next_chunk(active)
                active.write(b"".join(entry.raw for entry in chunk))
            except OSError as error:
                return error
            for _ in chunk:
                self._pending.popleft()
            self.head_sequence = chunk[-1].seq
            self._note_head(chunk[-1])
        return None

    def _note_head(self, newest: _Entry) -> None:
        """Record the end of the log; its failure is nobody's news, for losing it costs nothing but a check."""
        with self._marking, contextlib.suppress(OSError):
            self._mark = replace(self._mark, seq=newest.seq, digest=newest.digest)
            _write_mark(self._folder, self._mark)

    def _note_first(self, first: int) -> None:
        """Make durable which line will be the first when what stands before it is removed; raise OSError if it is not.

        Where a full disk refuses even that, no mark at all does as well: then there is nothing to contradict.
        """
        with self._marking:
            self._mark = replace(self._mark, first=max(first, self._mark.first or 0))
            try:
                _write_mark(self._folder, self._mark, sync=True)
            except OSError:
                with contextlib.suppress(OSError):
                    (self._folder / MARK_NAME).unlink(missing_ok=True)
                seen = _read_mark(self._folder)
                if seen is not None and seen.first is not None and seen.first < first:
                    raise

    def _next_chunk(self, active: _ActiveFile) -> list[_Entry]:
        chunk: list[_Entry] = []
        size = 0
        for entry in self._pending:
            if chunk and (size + len(entry.raw) > _CHUNK or not active.takes(entry, self._max_bytes, also=size)):
                break
            chunk.append(entry)
            size += len(entry.raw)
        return chunk

    def _file_for(self, entry: _Entry) -> _ActiveFile:
        active = self._active
        if active is not None:
            # A file that someone moved, cut or wrote to is left as it is, for evidence; the chain goes on in the next.
            if active.is_intact() and active.takes(entry, self._max_bytes):
                return active
            active.close()
            self._active = None
        segment = _Segment(folder=self._folder, day=entry.day, first=entry.seq)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _segments(self._folder) and _read_mark(self._folder) is None:  # somebody emptied it: it begins anew
            with self._marking:
                self._mark = replace(self._mark, first=entry.seq)
        self._active = _ActiveFile.create(segment)
        self._housekeeping_due = True
        return self._active

    def _keep_house(self, now: datetime) -> None:
        today = _utc(now).date()
        if not self._housekeeping_due and today == self._housekeeping_day:
            return
        self._housekeeping_due = False
        self._housekeeping_day = today
        self._defer(lambda: self._pack_and_expire(now))

    def _pack_and_expire(self, now: datetime) -> None:
        if not self._housekeeping.acquire(blocking=False):
            return  # another thread is at it; what it misses comes with the next file
        try:
            if self._retention is not None:
                _expire(self._folder, _utc(now) - self._retention, self._note_first)
            _pack_closed(self._folder)
        except OSError:
            # Space and retention, not evidence: counted, and tried again with the next file or day.
            self.housekeeping_failures += 1
        finally:
            self._housekeeping.release()


class _ActiveFile:
    """The file that takes new lines. It never keeps a part of a failed write: that is cut off before anything else."""

    def __init__(self, segment: _Segment, descriptor: int, size: int) -> None:
        self._segment = segment
        self._descriptor = descriptor
        self._size = size
        self._ragged = False

    @classmethod
    def create(cls, segment: _Segment) -> Self:
        # Truncated: its name says that no line of it was ever acknowledged.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(segment.plain, flags, 0o600)
        try:
            _sync_folder(segment.folder)
        except OSError:
            os.close(descriptor)
            raise
        return cls(segment, descriptor, 0)

    @classmethod
    def adopt(cls, segment: _Segment) -> Self:
        descriptor = os.open(segment.plain, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        return cls(segment, descriptor, os.fstat(descriptor).st_size)

    def takes(self, entry: _Entry, max_bytes: int, *, also: int = 0) -> bool:
        size = self._size + also
        return entry.day == self._segment.day and (size == 0 or size + len(entry.raw) <= max_bytes)

    def is_intact(self) -> bool:
        """Tell whether the path still leads to our file and nobody else changed its size.

        Any other failure to look is the disk's, and raised: leaving a ragged file behind would tear the chain.
        """
        try:
            there = self._segment.plain.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        held = os.fstat(self._descriptor)
        same = (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)
        return same and (self._ragged or held.st_size == self._size)

    def write(self, payload: bytes) -> None:
        self._cut()
        self._ragged = True
        try:
            _write_all(self._descriptor, payload)
            os.fsync(self._descriptor)
        except OSError:
            with contextlib.suppress(OSError):  # the write's own error is the news; cut again before the next write
                self._cut()
            raise
        self._ragged = False
        self._size += len(payload)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # everything in it was synced, or is still pending
            os.close(self._descriptor)

    def _cut(self) -> None:
        if self._ragged:
            os.ftruncate(self._descriptor, self._size)
            self._ragged = False


def read(
    folder: Path,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    types: set[str] | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Return the newest `limit` events that fit, newest last; all of them where it is None.

    `since` and `until` are inclusive, to the millisecond; naive ones are UTC. Lines that are no events are passed over,
    `verify` tells of them. An audit that does not exist is empty.

    Raises:
        AuditUnreadable: the operating system refuses to read it.
    """
    fitting = (
        event
        for event in _newest_first(folder, since=since, until=until)
        if types is None or event.get("type") in types
    )
    with _told_as_unreadable(folder):
        newest = list(islice(fitting, None if limit is None else max(limit, 0)))
    return newest[::-1]


def follow(
    folder: Path, *, after: int | None, poll: Callable[[], bool], types: set[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the events after seq `after` (None: those still to come) in order, for ever, over rotations and gzipping.

    `poll` is called whenever all there is was yielded; it waits as it likes and returns False to end.

    Raises:
        AuditUnreadable: the operating system refuses to read it.
    """
    with _told_as_unreadable(folder):
        last = _find_head(folder)[0].seq if after is None else after
    segment, end = None, 0
    while True:
        with _told_as_unreadable(folder):
            segments = _segments_from(folder, segment, last + 1)
        for each in segments:
            with _told_as_unreadable(folder):
                lines, end = _read_on(each, end if each == segment else 0)
            segment = each
            for event in filter(None, map(_parse, lines)):
                if event["seq"] <= last:
                    continue
                last = event["seq"]
                if types is None or event.get("type") in types:
                    yield event
        if not poll():
            return


def verify(folder: Path, *, head_sequence: int | None = None) -> VerifyReport:
    """Check every line, its hash and its place in the chain; a writer may go on meanwhile.

    `head_sequence` is how far the log has come, as known from elsewhere (the metric, say): if it ends before that, its
    tail was cut. The log's own mark is used for the same, but whoever cuts the tail can change that too.

    Raises:
        AuditUnreadable: the folder itself cannot be listed; what is wrong with files is in the report.
    """
    with _told_as_unreadable(folder):
        return _verify(folder, head_sequence)


def _verify(folder: Path, head_sequence: int | None) -> VerifyReport:
    # Before the lines: a line written in between is then ahead of what is wanted, never behind.
    mark = _read_mark(folder)
    names = _names(folder)
    if names is None:
        problem = Problem(file=str(folder), line=None, what="the audit folder does not exist")
        return _Chain(mark=None).report(extra=[problem])
    chain = _Chain(mark=mark)
    for name in sorted(names):
        if name.endswith((".jsonl", ".jsonl.gz")) and _segment(folder, name) is None:
            chain.problem(name, None, "is not named like a file of the log; was it renamed?")
    segments = _segments(folder)
    for segment in segments:
        chain.check_file(segment, newest=segment == segments[-1])
    chain.check_end(folder, head_sequence, marked=MARK_NAME in names)
    # After the lines: retention says first what it will leave, so what was seen can begin earlier, never later.
    chain.check_start(folder, _read_mark(folder))
    return chain.report()


class _Chain:
    """A walk along the chain that goes on after a problem, so that one changed byte is told once."""

    def __init__(self, *, mark: _Mark | None) -> None:
        self._mark = mark
        self._problems: list[Problem] = []
        self._notes: list[str] = []
        self._checked = 0
        self._oldest: int | None = None  # first seq of the oldest file that has a line, by its name
        self._first: int | None = None
        self._last: int | None = None
        self._torn = False
        self._expected: int | None = None
        self._prevs: set[object] | None = None  # None: anything will do

    def problem(self, file: str, line: int | None, what: str) -> None:
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(Problem(file=file, line=line, what=what))

    def report(self, extra: Iterable[Problem] = ()) -> VerifyReport:
        return VerifyReport(
            checked=self._checked,
            first_seq=self._first,
            last_seq=self._last,
            starts_at_seq=self._first if self._first is not None and self._first > 1 else None,
            torn_tail=self._torn,
            problems=(*self._problems, *extra),
            notes=tuple(self._notes),
        )

    def check_file(self, segment: _Segment, *, newest: bool) -> None:
        try:
            name, file = _open(segment)
        except FileNotFoundError:
            if self._checked:  # before the first line it is retention, which starts with the oldest
                self.problem(segment.plain.name, None, "vanished while it was verified")
            return
        except OSError as error:
            self.problem(segment.plain.name, None, f"cannot be read: {error.strerror or error!r}")
            return
        number = 0
        try:
            with file:
                for number, raw in enumerate(file, 1):
                    self._check_raw(segment, name, number, raw, newest=newest)
        except _UNREADABLE_GZIP as error:
            self.problem(name, number + 1, f"cannot be unpacked from here on: {error}")
        except OSError as error:
            self.problem(name, number + 1, f"cannot be read from here on: {error.strerror or error!r}")
        if number == 0 and not newest:
            self.problem(name, None, "is empty")

    def check_end(self, folder: Path, head_sequence: int | None, *, marked: bool) -> None:
        last = self._last or 0
        wanted = max(head_sequence or 0, self._mark.seq if self._mark else 0)
        if wanted > last:
            self.problem(str(folder), None, f"ends at seq {last}, but seq {wanted} was written: the tail is cut")
        if self._mark is None and marked:
            self._notes.append(f"{folder / MARK_NAME} is not readable, so the log's own record of its end was not used")
        elif self._mark is None and self._checked:
            self._notes.append(f"{folder / MARK_NAME} is missing, so the log's own record of its end was not used")

    def check_start(self, folder: Path, mark: _Mark | None) -> None:
        # By the oldest file's name: a line that is missing in it is told of there.
        if self._oldest is not None and mark is not None and mark.first is not None and self._oldest > mark.first:
            what = f"starts at seq {self._oldest}, but retention left seq {mark.first}: the lines between are missing"
            self.problem(str(folder), None, what)
        if self._first is not None and self._first > 1:
            self._notes.append(f"starts at seq {self._first}: what came before is not here and was not verified")

    def _check_raw(self, segment: _Segment, name: str, number: int, raw: bytes, *, newest: bool) -> None:
        if raw.endswith(b"\n"):
            self._check_line(segment, name, number, raw[:-1])
        elif newest and name == segment.plain.name:
            self._torn = True
            self._notes.append(f"{name}:{number}: the last line is not whole: it is being written, or a crash cut it")
        else:
            self.problem(name, number, "ends in the middle of a line")

    def _check_line(self, segment: _Segment, name: str, number: int, raw: bytes) -> None:
        self._checked += 1
        self._oldest = segment.first if self._oldest is None else self._oldest
        expected = segment.first if self._expected is None else self._expected
        event = _parse(raw)
        if event is None:
            self.problem(name, number, f"is not an event (expected seq {expected})")
            self._step(expected, None)
            return
        seq: int = event["seq"]
        faults = [*_line_faults(event, raw), *self._place_faults(event, seq, expected)]
        if number == 1 and seq != segment.first:
            faults.append(f"the file's name says that it starts with seq {segment.first}")
        if self._mark is not None and seq == self._mark.seq and event["hash"] != self._mark.digest:
            faults.append("is not the line that the log's own record of its end names: the chain was rewritten")
        if faults:
            self.problem(name, number, "; ".join(faults))
        self._step(seq, {event["hash"], _digest(event)})

    def _place_faults(self, event: dict[str, Any], seq: int, expected: int) -> Iterator[str]:
        if seq > expected:
            yield (
                f"seq {expected} to {seq - 1} are missing before it"
                if seq - 1 > expected
                else f"seq {expected} is missing"
            )
        elif seq < expected:
            yield f"has seq {seq}, expected {expected}: repeated or out of order"
        elif self._prevs is not None and event["prev"] not in self._prevs:
            yield "its prev is not the hash of the line before"
        if seq == 1 and event["prev"] != GENESIS:
            yield "the first line's prev is not zeros"

    def _step(self, seq: int, hashes: set[object] | None) -> None:
        if self._first is None:
            self._first = seq
        self._last = max(seq, self._last or 0)
        self._expected = seq + 1
        self._prevs = hashes


def _line_faults(event: dict[str, Any], raw: bytes) -> Iterator[str]:
    if tuple(event) != KEYS:
        yield f"has keys {list(event)}, wanted {list(KEYS)}"
    if event["hash"] != _digest(event):
        yield "its hash does not fit its content: it was changed"
    elif _encode(event) != raw:
        yield "is written in other bytes than ours: it was changed"


def _compose(event: Event, *, seq: int, prev: str, now: datetime) -> _Entry:
    when = event.get("time")
    moment = _utc(when if isinstance(when, datetime) else now)
    data = _data_of(event)
    line = {
        "seq": seq,
        "time": _stamp(moment),
        "type": _text(event.get("type")) or "unknown",
        "from": _text(event.get("from")),
        "to": _text(event.get("to")),
        "by": _text(event.get("by")),
        "reason": _text(event.get("reason")),
        "data": data,
        "prev": prev,
    }
    size = len(_encode(line))
    if size > MAX_LINE_BYTES:
        epoch = _epoch_of(event)
        line["data"] = {"omitted": f"{size} bytes"} | ({} if epoch is None else {"epoch": epoch})
    digest = _digest(line)
    raw = _encode({**line, "hash": digest}) + b"\n"
    return _Entry(raw=raw, seq=seq, digest=digest, day=moment.date())


def _data_of(event: Event) -> dict[str, Any]:
    """Return what the line says beyond its fixed keys; an event may be odd, but it is never lost for it."""
    given = event.get("data")
    data = dict(given) if isinstance(given, Mapping) else ({} if given is None else {"value": given})
    extra = {key: value for key, value in event.items() if key not in KEYS}
    plain = _plain({**extra, **data}, _MAX_DEPTH)
    try:
        _encode(plain)
    except (ValueError, RecursionError) as error:  # an int of more digits than Python prints
        return {"unrepresentable": _text(repr(error))}
    return plain if isinstance(plain, dict) else {"value": plain}


def _plain(value: object, depth: int) -> Any:
    """Return `value` in what JSON can keep; what has no form there, NaN among them, as text."""
    if isinstance(value, Enum):
        return _plain(value.value, depth)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, datetime):
        return _stamp(_utc(value))
    if isinstance(value, Mapping | list | tuple | set | frozenset) and depth > 0:
        return _plain_container(value, depth - 1)
    return str.__str__(value) if isinstance(value, str) else _text(value)


def _plain_container(
    value: Mapping[Any, Any] | list[Any] | tuple[Any, ...] | set[Any] | frozenset[Any], depth: int
) -> Any:
    if isinstance(value, Mapping):
        return {str(_plain(key, 0)): _plain(item, depth) for key, item in value.items()}
    items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
    return [_plain(item, depth) for item in items]


def _text(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, Enum):
        return _text(value.value)
    text = str.__str__(value) if isinstance(value, str) else str(value)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"


def _encode(line: object) -> bytes:
    """JSON in one line of ASCII: neither a newline nor half a surrogate pair in a reason can break the file."""
    return json.dumps(line, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def _digest(event: Mapping[str, Any]) -> str:
    """Return the SHA-256 over the canonical JSON (sorted keys) of all but `hash`, so over `prev` too."""
    body = {key: value for key, value in event.items() if key != "hash"}
    try:
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    except RecursionError:
        return ""  # nested so deep that we did not write it: no hash fits
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _parse(raw: bytes) -> dict[str, Any] | None:
    """Return the event of a line, or None if it is none: no JSON, no object, or without seq, prev and hash."""
    try:
        event = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or _seq_of(event) is None:
        return None
    return event if all(_is_hash(event.get(key)) for key in ("prev", "hash")) else None


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _seq_of(event: Mapping[str, Any]) -> int | None:
    seq = event.get("seq")
    return seq if isinstance(seq, int) and not isinstance(seq, bool) and seq > 0 else None


def _epoch_of(event: Mapping[str, Any]) -> int | None:
    data = event.get("data")
    epoch = data.get("epoch") if isinstance(data, Mapping) else None
    return epoch if isinstance(epoch, int) and not isinstance(epoch, bool) else None


def _utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _stamp(moment: datetime) -> str:
    """RFC 3339 in UTC with milliseconds, of fixed width, so that text order is time order."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextlib.contextmanager
def _told_as_unreadable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AuditUnreadable(
            f"the audit in {folder} cannot be read: {error.strerror or error!r} ({error.filename!r}); "
            "wanted files and folders that this user may read"
        ) from error


def _names(folder: Path) -> set[str] | None:
    try:
        return {entry.name for entry in folder.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return None


def _segment(folder: Path, name: str) -> _Segment | None:
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    try:
        return _Segment(folder=folder, day=date.fromisoformat(match[1]), first=int(match[2]))
    except ValueError:
        return None


def _segments(folder: Path) -> list[_Segment]:
    """Return the files of the log in the order of their lines, which no step of the clock can change."""
    found = {segment for name in _names(folder) or () if (segment := _segment(folder, name)) is not None}
    return sorted(found, key=lambda segment: (segment.first, segment.day))


def _segments_from(folder: Path, current: _Segment | None, wanted: int) -> list[_Segment]:
    segments = _segments(folder)
    if current in segments:
        return segments[segments.index(current) :]
    before = [index for index, segment in enumerate(segments) if segment.first <= wanted]
    return segments[before[-1] if before else 0 :]


def _open(segment: _Segment) -> tuple[str, IO[bytes]]:
    """Open the file in whichever form it has. Gzipping may finish between the two attempts, so the order matters."""
    try:
        return segment.plain.name, segment.plain.open("rb")
    except FileNotFoundError:
        return segment.packed.name, cast(IO[bytes], gzip.open(segment.packed, "rb"))


def _lines_backwards(segment: _Segment) -> Iterator[bytes]:
    """Yield the whole lines of a file from the last to the first; of a damaged gzip those that can be unpacked."""
    try:
        name, file = _open(segment)
    except FileNotFoundError:
        return  # retention took it
    with file:
        if name == segment.plain.name:
            yield from _plain_backwards(file)
        else:
            yield from reversed(_unpack(file))


def _plain_backwards(file: IO[bytes]) -> Iterator[bytes]:
    position = file.seek(0, os.SEEK_END)
    rest = b""
    last = True  # what follows the last newline is no line yet
    while position > 0:
        step = min(_BLOCK, position)
        position -= step
        file.seek(position)
        rest, *lines = (file.read(step) + rest).split(b"\n")
        if last and lines:
            lines.pop()
            last = False
        yield from reversed(lines)
    if not last:
        yield rest


def _unpack(file: IO[bytes]) -> list[bytes]:
    lines: list[bytes] = []
    with contextlib.suppress(*_UNREADABLE_GZIP):
        lines.extend(line[:-1] for line in file if line.endswith(b"\n"))
    return lines


def _read_on(segment: _Segment, start: int) -> tuple[list[bytes], int]:
    """Return the whole lines from byte `start` on, and the byte after them."""
    try:
        _, file = _open(segment)
        with file:
            file.seek(start)
            content = file.read()
    except (FileNotFoundError, *_UNREADABLE_GZIP):
        return [], start
    whole, newline, _ = content.rpartition(b"\n")
    return (whole.split(b"\n"), start + len(whole) + 1) if newline else ([], start)


def _newest_first(
    folder: Path, *, since: datetime | None = None, until: datetime | None = None
) -> Iterator[dict[str, Any]]:
    low = None if since is None else _utc(since)
    high = None if until is None else _utc(until)
    for segment in reversed(_segments(folder)):
        # Passed over by its day, not stopped at: after a step of the clock a later file may be of an earlier day.
        if (low and segment.day < low.date()) or (high and segment.day > high.date()):
            continue
        for event in filter(None, map(_parse, _lines_backwards(segment))):
            if _is_within(event.get("time"), low, high):
                yield event


def _is_within(stamp: object, low: datetime | None, high: datetime | None) -> bool:
    if low is None and high is None:
        return True
    if not isinstance(stamp, str):
        return False
    return (low is None or stamp >= _stamp(low)) and (high is None or stamp <= _stamp(high))


def _find_head(folder: Path) -> tuple[_Mark, tuple[int, int] | None]:
    """Return where the chain goes on, and the seqs that were durable once but are gone."""
    segments = _segments(folder)
    found = _Mark(seq=0, digest=GENESIS)
    unreadable = 0
    for segment in reversed(segments):
        for raw in _lines_backwards(segment):
            event = _parse(raw)
            if event is not None:
                # The unreadable lines after it had a seq each; `verify` tells of them, no other line may take theirs.
                found = _Mark(seq=event["seq"] + unreadable, digest=event["hash"])
                break
            unreadable += 1
        if found.seq:
            break
    if segments and found.seq < segments[-1].first:
        found = _Mark(seq=segments[-1].first, digest=found.digest)
    mark = _read_mark(folder)
    if mark is not None and mark.seq > found.seq:
        return mark, (found.seq + 1, mark.seq)
    return found, None


def _mark_at_start(folder: Path, head: _Mark) -> _Mark:
    """Return the mark as it stands, which is evidence until the next line; the first line it does not know is here."""
    mark = _read_mark(folder) or head
    if mark.first is not None:
        return mark
    segments = _segments(folder)
    return replace(mark, first=segments[0].first if segments else head.seq + 1)


def _newest_epoch(folder: Path) -> int | None:
    newest: int | None = None
    seen = 0
    for event in _newest_first(folder):
        epoch = _epoch_of(event)
        if epoch is None:
            continue
        newest = epoch if newest is None else max(newest, epoch)
        seen += 1
        if seen == _EPOCHS_SEEN:
            break
    return newest


def _adopt_newest(folder: Path) -> _ActiveFile | None:
    segments = _segments(folder)
    return _ActiveFile.adopt(segments[-1]) if segments and segments[-1].plain.exists() else None


def _repair_tail(folder: Path, now: datetime) -> TornTail | None:
    """Take a line that a crash cut short out of the newest file, and the file away if no line is left in it."""
    segments = _segments(folder)
    if not segments or not segments[-1].plain.exists():
        return None
    path = segments[-1].plain
    torn: TornTail | None = None
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = _end_of_last_line(file, size)
        if end < size:
            file.seek(end)
            kept_in = _keep_torn(folder, file.read(_TORN_KEPT), now)
            torn = TornTail(file=path.name, size=size - end, kept_in=kept_in)
            file.truncate(end)
            os.fsync(file.fileno())
    if end == 0:
        path.unlink()
        _sync_folder(folder)
    return torn


def _end_of_last_line(file: IO[bytes], size: int) -> int:
    position = size
    while position > 0:
        step = min(_BLOCK, position)
        position -= step
        file.seek(position)
        newline = file.read(step).rfind(b"\n")
        if newline >= 0:
            return position + newline + 1
    return 0


def _keep_torn(folder: Path, torn: bytes, now: datetime) -> str | None:
    """Keep the torn bytes if there is room; a full disk, which is what tears lines, must not prevent the start."""
    path = folder / f"torn-{_stamp(_utc(now)).replace(':', '')}.partial"
    try:
        with path.open("wb") as file:
            file.write(torn)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return None
    return path.name


def _write_mark(folder: Path, mark: _Mark, *, sync: bool = False) -> None:
    """Write the mark in place: always of one length, and so short that a crash leaves the old one or the new one."""
    # What an earlier version reads stands first, with a check of its own, so that it can still be gone back to.
    content = (
        f'{{"seq":{mark.seq:>20},"hash":"{mark.digest}","check":"{_mark_check(mark)}",'
        f'"first":{mark.first or 1:>20},"first_check":"{_first_check(mark)}"}}\n'
    ).encode("ascii")
    descriptor = os.open(folder / MARK_NAME, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_mark(folder: Path) -> _Mark | None:
    try:
        with (folder / MARK_NAME).open("rb") as file:
            content = json.loads(file.read(1024))
        first = int(content["first"]) if "first" in content else None
        mark = _Mark(seq=int(content["seq"]), digest=str(content["hash"]), first=first)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    if content.get("check") != _mark_check(mark):
        return None
    return mark if content.get("first_check") == _first_check(mark) else replace(mark, first=None)


def _mark_check(mark: _Mark) -> str:
    return hashlib.sha256(f"{mark.seq}:{mark.digest}".encode()).hexdigest()[:16]


def _first_check(mark: _Mark) -> str:
    return hashlib.sha256(f"{mark.seq}:{mark.digest}:{mark.first or 1}".encode()).hexdigest()[:16]


def _pack_closed(folder: Path) -> None:
    """Gzip every file but the newest, so that a crash leaves at least one whole form of each."""
    for name in _names(folder) or ():
        if name.endswith(_PACKING_SUFFIX):
            (folder / name).unlink(missing_ok=True)
    for segment in _segments(folder)[:-1]:
        if segment.plain.exists():
            _pack(segment)


def _pack(segment: _Segment) -> None:
    temporary = segment.plain.with_name(segment.plain.name + _PACKING_SUFFIX)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as target:
        # mtime 0: the same lines make the same file, whenever they are packed.
        with segment.plain.open("rb") as source, gzip.GzipFile("", "wb", 6, target, mtime=0) as packer:
            shutil.copyfileobj(source, packer, _CHUNK)
        target.flush()
        os.fsync(target.fileno())
    temporary.replace(segment.packed)
    _sync_folder(segment.folder)
    segment.plain.unlink()
    _sync_folder(segment.folder)


def _expire(folder: Path, horizon: datetime, before: Callable[[int], None]) -> None:
    """Remove the files whose whole day lies before `horizon`, oldest first, never the newest.

    A file of a later day that is followed by one of an earlier day was written while the clock was ahead; it counts as
    of the earlier day, so that neither a hole appears in the chain nor anything stays for ever. `before` is told the
    first seq that will be left.
    """
    segments = _segments(folder)
    doomed: list[_Segment] = []
    day = date.max
    for index, segment in reversed(list(enumerate(segments))):
        day = min(day, segment.day)
        if day < horizon.date() and index < len(segments) - 1:
            doomed.append(segment)
    if doomed:
        before(segments[len(doomed)].first)
    for segment in reversed(doomed):
        segment.plain.unlink(missing_ok=True)
        segment.packed.unlink(missing_ok=True)
    for name in _names(folder) or ():
        match = _TORN_NAME.fullmatch(name)
        if match is not None and match[1] < horizon.date().isoformat():
            (folder / name).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, payload: bytes) -> None:
    view = memoryview(payload)
    while view:
        written = os.write(descriptor, view)
        if written == 0:
            raise OSError(errno.EIO, "the disk takes no bytes and gives no reason")
        view = view[written:]
