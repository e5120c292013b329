"""The audit: nothing is lost, whatever happens to the disk, and whatever was changed shows."""

import errno
import gzip
import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from sidecar.adapters import audit_log
from sidecar.adapters.audit_log import AuditLog, AuditUnreadable, AuditUnusable, AuditWriteError, read, verify
from sidecar.core.errors import StorageError

NOW = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
DAY = timedelta(days=1)
MEBIBYTE = 1024 * 1024


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "audit"


def opened(folder: Path, *, now: datetime = NOW, **settings: Any) -> AuditLog:
    return AuditLog.open(folder, **{"max_bytes": MEBIBYTE, "retention_seconds": 90 * 86400.0, "now": now, **settings})


def event(number: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "type": "switch.killed",
        "from": "ACTIVE",
        "to": "KILLED",
        "by": "risk",
        "reason": f"event {number}",
        **more,
    }


def written(folder: Path, *, days: int = 1, each: int = 3, **settings: Any) -> AuditLog:
    """A log of some days with some events each, one line and file after the other."""
    log = opened(folder, **settings)
    for day in range(days):
        for number in range(each):
            log.append([event(day * each + number)], NOW + day * DAY)
    return log


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "head")


def seqs(events: list[dict[str, Any]]) -> list[int]:
    return [each["seq"] for each in events]


def plain(folder: Path) -> Path:
    (newest,) = folder.glob("*.jsonl")
    return newest


def test_a_line_holds_what_happened_and_the_hash_of_all_of_it(folder: Path) -> None:
    (line,) = opened(folder).append([event(data={"epoch": 4})], NOW)
    assert plain(folder).read_text() == line + "\n"
    content = json.loads(line)
    digest = content.pop("hash")
    assert content == {
        "seq": 1,
        "time": "2026-03-01T12:00:00.123Z",
        **event(data={"epoch": 4}),
        "prev": "0" * 64,
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert digest == hashlib.sha256(canonical.encode()).hexdigest()


def test_the_chain_goes_on_over_files_and_restarts(folder: Path) -> None:
    for day in range(4):
        log = opened(folder, now=NOW + day * DAY)
        log.append([event(), event()], NOW + day * DAY)
        log.close()
    events = read(folder)
    assert seqs(events) == list(range(1, 9))
    assert [each["prev"] for each in events] == ["0" * 64, *(each["hash"] for each in events[:-1])]
    report = verify(folder, head_sequence=8)
    assert report.ok
    assert (report.checked, report.first_seq, report.last_seq, report.starts_at_seq) == (8, 1, 8, None)
    assert report.notes == ()


def test_files_and_folder_are_private(folder: Path) -> None:
    written(folder, days=2)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


class Colour(Enum):
    RED = "red"


class Word(str, Enum):  # noqa: UP042 - the older form is what this is about
    KILL = "kill"


ODD: list[tuple[object, object]] = [
    ("a\nnewline\r\u2028\u0085\x00", "a\nnewline\r\u2028\u0085\x00"),
    ("half a pair \ud800", "half a pair \ud800"),
    ("schön 漢字 🛑", "schön 漢字 🛑"),
    ('"}{\\', '"}{\\'),
    (float("nan"), "nan"),
    (float("-inf"), "-inf"),
    (Decimal("0.1"), "0.1"),
    (Colour.RED, "red"),
    (Word.KILL, "kill"),
    (NOW, "2026-03-01T12:00:00.123Z"),
    ({3: (1, 2)}, {"3": [1, 2]}),
    ({"b", "a"}, ["a", "b"]),
    (b"bytes", "b'bytes'"),
    (None, None),
    (True, True),
]


@pytest.mark.parametrize(("odd", "kept"), ODD, ids=[ascii(kept) for _, kept in ODD])
def test_odd_values_neither_break_nor_lose_a_line(folder: Path, odd: object, kept: object) -> None:
    log = opened(folder)
    log.append([event(1), event(data={"odd": odd}), event(3)], NOW)
    assert read(folder)[1]["data"] == {"odd": kept}
    assert len(plain(folder).read_bytes().splitlines()) == 3
    assert verify(folder).ok


def test_an_event_that_is_hardly_one_is_kept_as_far_as_it_goes(folder: Path) -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    log = opened(folder)
    log.append(
        [{}, {"type": Colour.RED, "extra": 5, "data": "text"}, event(data=endless), event(data={"n": 10**5000})], NOW
    )
    first, second, third, fourth = read(folder)
    assert (first["type"], first["data"]) == ("unknown", {})
    assert (second["type"], second["data"]) == ("red", {"extra": 5, "value": "text"})
    assert "again" in third["data"]
    assert "unrepresentable" in fourth["data"]
    assert verify(folder).ok


def test_an_enormous_event_is_cut_but_keeps_its_epoch(folder: Path) -> None:
    log = opened(folder)
    log.append([event(reason="🛑" * 10_000, data={"blob": ["x" * 4000] * 100, "epoch": 7})], NOW)
    (kept,) = read(folder)
    assert kept["data"] == {"omitted": kept["data"]["omitted"], "epoch": 7}
    assert len(kept["reason"]) == audit_log.MAX_TEXT + 1
    assert plain(folder).stat().st_size <= audit_log.MAX_LINE_BYTES
    assert verify(folder).ok


def test_an_event_may_say_when_it_happened(folder: Path) -> None:
    east = timezone(timedelta(hours=9))
    opened(folder).append([event(time=datetime(2026, 3, 1, 20, 0, tzinfo=east))], NOW)
    assert read(folder)[0]["time"] == "2026-03-01T11:00:00.000Z"


def test_each_day_has_its_file_and_closed_ones_are_gzipped(folder: Path) -> None:
    written(folder, days=3, each=2)
    assert names(folder) == [
        "2026-03-01.000000000001.jsonl.gz",
        "2026-03-02.000000000003.jsonl.gz",
        "2026-03-03.000000000005.jsonl",
    ]
    assert seqs(read(folder)) == [1, 2, 3, 4, 5, 6]
    assert verify(folder, head_sequence=6).ok


def test_a_full_file_is_followed_by_another_and_no_line_is_lost(folder: Path) -> None:
    log = opened(folder, max_bytes=1000)
    for number in range(50):
        log.append([event(number, data={"odd": "🛑\n"})], NOW)
    assert len(names(folder)) > 10
    assert max(path.stat().st_size for path in folder.iterdir()) <= 1000
    assert [each["reason"] for each in read(folder)] == [f"event {number}" for number in range(50)]
    assert verify(folder, head_sequence=50).ok


def test_one_batch_may_span_files(folder: Path) -> None:
    opened(folder, max_bytes=1000).append([event(number) for number in range(50)], NOW)
    assert len(names(folder)) > 10
    assert seqs(read(folder)) == list(range(1, 51))
    assert verify(folder, head_sequence=50).ok


def test_a_line_larger_than_a_file_still_gets_one(folder: Path) -> None:
    opened(folder, max_bytes=10).append([event(1), event(2)], NOW)
    assert len(names(folder)) == 2
    assert verify(folder, head_sequence=2).ok


@pytest.mark.parametrize("crash_after", ["packing", "renaming"])
def test_a_crash_while_gzipping_loses_nothing_and_is_tidied_up(folder: Path, crash_after: str) -> None:
    written(folder, days=2, defer=lambda work: None).close()
    first = folder / "2026-03-01.000000000001.jsonl"
    if crash_after == "packing":
        (folder / (first.name + ".gz.tmp")).write_bytes(b"half")
    else:
        (folder / (first.name + ".gz")).write_bytes(gzip.compress(first.read_bytes()))
    assert seqs(read(folder)) == [1, 2, 3, 4, 5, 6]
    assert verify(folder, head_sequence=6).ok
    opened(folder, now=NOW + DAY)
    assert names(folder) == ["2026-03-01.000000000001.jsonl.gz", "2026-03-02.000000000004.jsonl"]
    assert seqs(read(folder)) == [1, 2, 3, 4, 5, 6]


def test_housekeeping_can_be_handed_to_another_thread(folder: Path) -> None:
    works: list[Callable[[], None]] = []
    log = written(folder, days=3, defer=works.append)
    assert len(list(folder.glob("*.jsonl"))) == 3
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    log.append([event()], NOW + 2 * DAY)
    for thread in threads:
        thread.join()
    works[-1]()
    assert len(list(folder.glob("*.jsonl"))) == 1
    assert verify(folder, head_sequence=10).ok


def test_retention_removes_whole_days_and_verify_says_where_the_log_starts(folder: Path) -> None:
    log = written(folder, days=10, each=2, retention_seconds=3 * 86400.0)
    assert [name[:10] for name in names(folder)] == [f"2026-03-{day:02}" for day in (7, 8, 9, 10)]
    report = verify(folder, head_sequence=log.head_sequence)
    assert report.ok
    assert (report.starts_at_seq, report.first_seq, report.last_seq) == (13, 13, 20)
    assert any("seq 13" in note for note in report.notes)


def test_what_retention_leaves_is_durable_before_anything_is_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(folder, days=3).close()
    done: list[str] = []
    sync, unlink = os.fsync, Path.unlink

    def synced(descriptor: int) -> None:
        done.append(f"sync {json.loads((folder / 'head').read_bytes())['first']}")
        sync(descriptor)

    def unlinked(path: Path, missing_ok: bool = False) -> None:
        done.append(f"unlink {path.name[:10]}")
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "unlink", unlinked)
    opened(folder, now=NOW + 3 * DAY, retention_seconds=2 * 86400.0)
    assert list(dict.fromkeys(done)) == ["sync 4", "unlink 2026-03-01"]


def test_a_log_is_whole_before_and_after_each_removal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(folder, days=6).close()
    unlink, starts = Path.unlink, []

    def watched(path: Path, missing_ok: bool = False) -> None:
        before = verify(folder)
        unlink(path, missing_ok)
        after = verify(folder)
        starts.extend((before.starts_at_seq, after.starts_at_seq))
        assert (before.problems, after.problems) == ((), ())

    monkeypatch.setattr(Path, "unlink", watched)
    opened(folder, now=NOW + 6 * DAY, retention_seconds=2 * 86400.0)
    assert list(dict.fromkeys(starts)) == [None, 4, 7, 10, 13]


@pytest.mark.parametrize("refused", ["pwrite", "fsync"])
def test_retention_makes_room_though_the_disk_does_not_take_the_mark(
    folder: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    written(folder, days=3).close()

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, refused, refuse)
        log = opened(folder, now=NOW + 3 * DAY, retention_seconds=2 * 86400.0)
    assert [name[:10] for name in names(folder)] == ["2026-03-02", "2026-03-03"]
    assert verify(folder).ok
    log.append([event()], NOW + 3 * DAY)
    report = verify(folder)
    assert (report.ok, report.starts_at_seq) == (True, 4)


def test_nothing_is_removed_that_the_mark_would_call_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(folder, days=3).close()

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "pwrite", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    log = opened(folder, now=NOW + 3 * DAY, retention_seconds=2 * 86400.0)
    assert log.housekeeping_failures == 1
    assert len(names(folder)) == 3


def test_retention_runs_at_open_and_when_a_day_passes_without_events(folder: Path) -> None:
    log = written(folder, days=3, retention_seconds=5 * 86400.0)
    log.flush(NOW + 70 * DAY)
    assert [name[:10] for name in names(folder)] == ["2026-03-03"]  # the newest stays, however old
    log.close()
    written(folder.with_name("other"), days=3).close()
    opened(folder.with_name("other"), now=NOW + 7 * DAY, retention_seconds=5 * 86400.0)
    assert [name[:10] for name in names(folder.with_name("other"))] == ["2026-03-03"]


def test_retention_none_keeps_everything(folder: Path) -> None:
    written(folder, days=3, retention_seconds=None).flush(NOW + 10_000 * DAY)
    assert len(names(folder)) == 3


def test_a_clock_that_was_ahead_for_a_while_leaves_neither_holes_nor_eternal_files(folder: Path) -> None:
    log = opened(folder, retention_seconds=None)
    for moment in (NOW, NOW + 1000 * DAY, NOW + DAY, NOW + 2 * DAY):
        log.append([event()], moment)
    log.close()
    assert seqs(read(folder)) == [1, 2, 3, 4]
    assert verify(folder, head_sequence=4).ok
    assert seqs(read(folder, since=NOW + DAY, until=NOW + 2 * DAY)) == [3, 4]
    log = opened(folder, now=NOW + 5 * DAY, retention_seconds=3 * 86400.0)
    assert seqs(read(folder)) == [4]
    assert verify(folder, head_sequence=4).ok


def test_old_torn_bytes_expire_too(folder: Path) -> None:
    written(folder)
    (folder / "torn-2026-02-01T000000.000Z.partial").write_bytes(b"{")
    opened(folder, now=NOW + DAY).append([event()], NOW + DAY)
    assert any(name.startswith("torn") for name in names(folder))
    opened(folder, now=NOW + 100 * DAY)
    assert not any(name.startswith("torn") for name in names(folder))


def test_a_plain_file_goes_only_when_its_gzip_is_durable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = opened(folder)
    log.append([event()], NOW)
    synced: list[Path] = []

    def sync(where: Path) -> None:
        synced.append(where)
        if len(synced) > 1:  # the first one is for the new day's file
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(audit_log, "_sync_folder", sync)
    log.append([event()], NOW + DAY)
    assert log.housekeeping_failures == 1
    assert len(list(folder.glob("*.jsonl"))) == 2


def test_failed_housekeeping_is_counted_and_stops_nothing(folder: Path) -> None:
    log = opened(folder)
    log.append([event()], NOW)
    (folder / "2026-03-01.000000000001.jsonl.gz.tmp").mkdir()
    log.append([event()], NOW + DAY)
    assert log.housekeeping_failures == 1
    (folder / "2026-03-01.000000000001.jsonl.gz.tmp").rmdir()
    log.append([event()], NOW + 2 * DAY)
    assert log.housekeeping_failures == 1
    assert len(list(folder.glob("*.jsonl"))) == 1
    assert verify(folder, head_sequence=3).ok


def test_a_line_torn_at_any_byte_is_kept_aside_and_the_chain_goes_on(folder: Path) -> None:
    written(folder, each=2).close()
    path = plain(folder)
    whole = path.read_bytes()
    # The torn line was never durable, so neither was its mark.
    content = whole + whole.splitlines(keepends=True)[-1]
    for end in range(len(whole) + 1, len(content)):
        path.write_bytes(content[:end])
        log = opened(folder)
        assert log.opened.torn is not None
        assert (log.opened.torn.file, log.opened.torn.size) == (path.name, end - len(whole))
        assert log.opened.torn.kept_in is not None
        assert (folder / log.opened.torn.kept_in).read_bytes() == content[len(whole) : end]
        assert path.read_bytes() == whole
        log.close()
    log = opened(folder)
    assert log.opened.torn is None
    log.append([event()], NOW)
    assert seqs(read(folder)) == [1, 2, 3]
    assert verify(folder, head_sequence=3).ok


def test_a_new_file_with_nothing_but_a_torn_line_gives_way(folder: Path) -> None:
    written(folder).close()
    (folder / "2026-03-02.000000000004.jsonl").write_bytes(b'{"seq":4')
    log = opened(folder, now=NOW + DAY)
    assert log.opened.torn is not None
    log.append([event()], NOW + DAY)
    assert seqs(read(folder)) == [1, 2, 3, 4]
    assert verify(folder, head_sequence=4).ok


def test_an_empty_newest_file_gives_way(folder: Path) -> None:
    written(folder).close()
    (folder / "2026-03-02.000000000004.jsonl").touch()
    log = opened(folder, now=NOW + DAY)
    assert log.opened.torn is None
    log.append([event()], NOW)
    assert verify(folder, head_sequence=4).ok


def test_torn_bytes_without_room_to_keep_them_do_not_prevent_the_start(folder: Path) -> None:
    written(folder).close()
    with plain(folder).open("ab") as file:
        file.write(b'{"seq":4')
    (folder / "torn-2026-03-01T120000.123Z.partial").mkdir()
    log = opened(folder)
    assert log.opened.torn is not None
    assert log.opened.torn.kept_in is None
    log.append([event()], NOW)
    assert verify(folder, head_sequence=4).ok


def test_a_restart_on_gzipped_files_alone_goes_on_where_they_end(folder: Path) -> None:
    written(folder).close()
    path = plain(folder)
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    log = opened(folder)
    assert log.head_sequence == 3
    log.append([event()], NOW)
    assert verify(folder, head_sequence=4).ok


def test_a_last_line_with_a_bad_hash_is_not_repaired_and_stays_the_only_problem(folder: Path) -> None:
    written(folder).close()
    path = plain(folder)
    path.write_bytes(path.read_bytes().replace(b"event 2", b"event 9"))
    log = opened(folder)
    log.append([event()], NOW)
    report = verify(folder, head_sequence=4)
    assert [(each.file, each.line) for each in report.problems] == [(path.name, 3)]
    assert "hash" in report.problems[0].what


@pytest.mark.parametrize("marked", [True, False])
def test_unreadable_last_lines_keep_their_seqs(folder: Path, marked: bool) -> None:
    written(folder, each=4).close()
    path = plain(folder)
    if not marked:
        (folder / "head").unlink()
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], b"rubbish", b"more", b""]))
    log = opened(folder)
    assert log.head_sequence == 4
    log.append([event()], NOW)
    report = verify(folder, head_sequence=5)
    assert [each.line for each in report.problems] == [3, 4]
    assert report.last_seq == 5


def test_whole_lines_lost_before_a_restart_are_told_and_stay_visible(folder: Path) -> None:
    written(folder, each=5).close()
    path = plain(folder)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    log = opened(folder)
    assert log.opened.missing == (4, 5)
    log.append([event()], NOW)
    assert seqs(read(folder)) == [1, 2, 3, 6]
    report = verify(folder)
    assert [each.what for each in report.problems] == ["seq 4 to 5 are missing before it"]


def test_the_newest_epoch_is_read_from_the_tail_and_followed(folder: Path) -> None:
    log = opened(folder)
    assert log.newest_epoch() is None
    log.append([event(data={"epoch": 3}), event(data={"epoch": True}), event(data={"epoch": 2})], NOW)
    assert log.newest_epoch() == 3
    log.append([event()] * 200, NOW + DAY)
    log.close()
    log = opened(folder, now=NOW + DAY)
    assert log.newest_epoch() == 3
    log.append([event(data={"epoch": 8})], NOW + DAY)
    assert log.newest_epoch() == 8


class Disk:
    """Stands in for the os module: refuses some calls with an error, and may take only so many bytes."""

    def __init__(self, *refused: str, code: int = errno.ENOSPC, room: int = 0) -> None:
        self.refused = set(refused)
        self._code = code
        self._room = room

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return real if name not in self.refused else self._write if name == "write" else self._refuse

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise OSError(self._code, os.strerror(self._code))

    def _write(self, descriptor: int, content: bytes) -> int:
        if self._room == 0:
            self._refuse()
        taken = os.write(descriptor, content[: self._room])
        self._room -= taken
        return taken


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(audit_log, "os", disk)
    return disk


def refuse(disk: Disk, *calls: str, code: int = errno.ENOSPC, room: int = 0) -> None:
    disk.refused, disk._code, disk._room = set(calls), code, room


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("room", [0, 1, 100, 300, 500])
def test_a_refused_write_leaves_no_torn_line_and_is_made_up_for(folder: Path, disk: Disk, code: int, room: int) -> None:
    log = opened(folder)
    log.append([event(1)], NOW)
    refuse(disk, "write", code=code, room=room)
    with pytest.raises(AuditWriteError, match=os.strerror(code)) as caught:
        log.append([event(2), event(3)], NOW)
    assert [json.loads(line)["seq"] for line in caught.value.lines] == [2, 3]
    assert (caught.value.pending, log.pending, log.write_failures, log.head_sequence) == (2, 2, 1, 1)
    assert seqs(read(folder)) == [1]
    assert plain(folder).read_bytes().endswith(b"\n")
    refuse(disk)
    lines = log.append([event(4)], NOW)
    assert [json.loads(line)["seq"] for line in lines] == [4]
    assert [each["reason"] for each in read(folder)] == [f"event {number}" for number in (1, 2, 3, 4)]
    assert (log.pending, log.write_failures, log.head_sequence) == (0, 1, 4)
    assert verify(folder, head_sequence=4).ok


@pytest.mark.parametrize("calls", [("fsync",), ("write", "ftruncate"), ("fsync", "ftruncate")])
def test_a_part_that_cannot_be_cut_off_at_once_is_cut_off_before_the_next_line(
    folder: Path, disk: Disk, calls: tuple[str, ...]
) -> None:
    log = opened(folder)
    log.append([event(1)], NOW)
    refuse(disk, *calls, code=errno.EIO, room=50)
    for number in (2, 3):
        with pytest.raises(AuditWriteError):
            log.append([event(number)], NOW)
    refuse(disk)
    log.flush(NOW + DAY)
    log.append([event(4)], NOW + DAY)
    assert [each["reason"] for each in read(folder)] == [f"event {number}" for number in (1, 2, 3, 4)]
    assert verify(folder, head_sequence=4).ok


def test_a_day_that_changes_while_a_part_cannot_be_cut_off_waits_for_it(folder: Path, disk: Disk) -> None:
    log = opened(folder)
    log.append([event(1)], NOW)
    refuse(disk, "write", "ftruncate", room=50)
    with pytest.raises(AuditWriteError):
        log.append([event(2)], NOW)
    with pytest.raises(AuditWriteError):
        log.append([event(3)], NOW + DAY)
    refuse(disk)
    log.flush(NOW + DAY)
    assert seqs(read(folder)) == [1, 2, 3]
    assert verify(folder, head_sequence=3).ok


def test_a_disk_that_refuses_the_very_first_write_is_made_up_for_on_another_day(folder: Path, disk: Disk) -> None:
    log = opened(folder)
    refuse(disk, "write", room=20)
    with pytest.raises(AuditWriteError):
        log.append([event(1)], NOW)
    refuse(disk)
    log.append([event(2)], NOW + DAY)
    assert [each["time"][:10] for each in read(folder)] == ["2026-03-01", "2026-03-02"]
    assert verify(folder, head_sequence=2).ok


def test_pending_events_are_bounded_and_what_was_dropped_is_told(folder: Path, disk: Disk) -> None:
    log = opened(folder, pending_limit=3)
    refuse(disk, "open")
    for number in range(5):
        with pytest.raises(AuditWriteError):
            log.append([event(number)], NOW)
    assert (log.pending, log.dropped, log.write_failures) == (3, 2, 5)
    refuse(disk)
    lines = log.append([event(5)], NOW)
    assert len(lines) == 1
    told = read(folder)
    assert [each["reason"] for each in told if each["type"] != "audit.dropped"] == [f"event {n}" for n in (0, 1, 2, 5)]
    assert [each["data"] for each in told if each["type"] == "audit.dropped"] == [{"count": 2}]
    assert verify(folder, head_sequence=5).ok
    log.append([event(6)], NOW)
    assert seqs(read(folder)) == [1, 2, 3, 4, 5, 6]


def test_many_waiting_lines_are_written_in_pieces_so_that_little_room_is_progress(folder: Path, disk: Disk) -> None:
    log = opened(folder)
    refuse(disk, "write")
    with pytest.raises(AuditWriteError):
        log.append([event(number) for number in range(2000)], NOW)
    refuse(disk, "write", room=400 * 1024)
    with pytest.raises(AuditWriteError):
        log.flush(NOW)
    assert 0 < log.pending < 2000
    refuse(disk)
    log.flush(NOW)
    assert len(read(folder)) == 2000
    assert verify(folder, head_sequence=2000).ok


def test_a_disk_that_cannot_even_be_looked_at_leaves_no_torn_file_behind(
    folder: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = opened(folder)
    log.append([event(1)], NOW)
    refuse(disk, "write", "ftruncate", code=errno.EIO, room=50)
    with pytest.raises(AuditWriteError):
        log.append([event(2)], NOW)

    def blind(self: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as eyes:
        eyes.setattr(Path, "lstat", blind)
        refuse(disk)
        with pytest.raises(AuditWriteError):
            log.append([event(3)], NOW)
    log.flush(NOW)
    assert len(list(folder.glob("*.jsonl"))) == 1
    assert verify(folder, head_sequence=3).ok


def test_a_folder_that_vanishes_in_mid_run_is_made_again(folder: Path) -> None:
    log = written(folder)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    log.append([event(3)], NOW)
    assert seqs(read(folder)) == [4]
    report = verify(folder, head_sequence=4)
    assert report.ok
    assert report.starts_at_seq == 4


def test_a_file_in_place_of_the_folder_is_waited_out(folder: Path) -> None:
    log = written(folder, each=1)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("in the way")
    with pytest.raises(AuditWriteError):
        log.append([event()], NOW)
    folder.unlink()
    log.flush(NOW)
    assert seqs(read(folder)) == [2]


def test_a_file_that_someone_else_wrote_to_is_left_for_evidence(folder: Path) -> None:
    log = written(folder)
    path = plain(folder)
    with path.open("ab") as file:
        file.write(b"smuggled")
    log.append([event(3)], NOW)
    assert len(names(folder)) == 2
    assert seqs(read(folder)) == [1, 2, 3, 4]
    assert [each.what for each in verify(folder).problems] == ["ends in the middle of a line"]


def test_a_folder_that_cannot_be_used_is_named_at_open(folder: Path) -> None:
    folder.write_text("not a folder")
    with pytest.raises(AuditUnusable, match=rf"{folder} cannot be used as the audit folder.*set storage\.dir"):
        opened(folder)


def test_a_tail_that_cannot_be_mended_is_told_at_open(folder: Path) -> None:
    written(folder, days=1).close()
    (folder / "2026-03-02.000000000004.jsonl").mkdir()
    with pytest.raises(AuditUnusable, match="directory"):
        opened(folder)


def test_every_error_is_a_storage_error() -> None:
    assert all(issubclass(each, StorageError) for each in (AuditUnusable, AuditWriteError, AuditUnreadable))
