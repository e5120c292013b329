"""Reading the audit: the newest events, over files and formats, while it is written; and proof of what was changed."""

import errno
import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from sidecar.adapters import audit_log
from sidecar.adapters.audit_log import AuditLog, AuditUnreadable, follow, read, verify

pytestmark = pytest.mark.slow

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "audit"


def event(number: int, kind: str = "switch.killed") -> dict[str, Any]:
    return {"type": kind, "reason": f"event {number}", "data": {"epoch": number}}


def opened(folder: Path, *, now: datetime = NOW, max_bytes: int = 1024 * 1024) -> AuditLog:
    return AuditLog.open(folder, max_bytes=max_bytes, retention_seconds=None, now=now)


def hourly(folder: Path, hours: int = 60, **settings: Any) -> AuditLog:
    """One event an hour, over three days and so three files; each third one is of another type."""
    log = opened(folder, **settings)
    for hour in range(hours):
        log.append([event(hour + 1, "rule.fired" if hour % 3 == 0 else "switch.killed")], NOW + hour * HOUR)
    return log


def seqs(events: list[dict[str, Any]]) -> list[int]:
    return [each["seq"] for each in events]


def test_the_newest_events_come_last_over_plain_and_gzipped_files(folder: Path) -> None:
    hourly(folder)
    assert len(list(folder.glob("*.gz"))) == 2
    assert seqs(read(folder, limit=3)) == [58, 59, 60]
    assert seqs(read(folder, limit=40)) == list(range(21, 61))
    assert seqs(read(folder)) == list(range(1, 61))
    assert seqs(read(folder, limit=1000)) == list(range(1, 61))
    assert read(folder, limit=0) == []
    assert read(folder, limit=-1) == []


@pytest.mark.parametrize(
    "since",
    [
        NOW + 55 * HOUR,
        (NOW + 55 * HOUR).astimezone(timezone(timedelta(hours=-7))),
        (NOW + 55 * HOUR).astimezone(timezone(timedelta(hours=14))),
        (NOW + 55 * HOUR).replace(tzinfo=None),
    ],
)
def test_since_is_inclusive_in_any_time_zone_and_utc_without_one(folder: Path, since: datetime) -> None:
    hourly(folder)
    assert seqs(read(folder, since=since)) == [56, 57, 58, 59, 60]
    assert seqs(read(folder, since=since, limit=2)) == [59, 60]
    assert seqs(read(folder, until=since, limit=2)) == [55, 56]
    assert seqs(read(folder, since=since - HOUR, until=since)) == [55, 56]


def test_events_are_found_although_the_clock_went_back_days(folder: Path) -> None:
    log = opened(folder)
    log.append([event(1)], NOW + 10 * DAY)
    log.append([event(2)], NOW)
    assert seqs(read(folder, since=NOW + 5 * DAY)) == [1]
    assert seqs(read(folder, until=NOW + 5 * DAY)) == [2]


def test_types_are_chosen_before_the_limit(folder: Path) -> None:
    hourly(folder)
    assert seqs(read(folder, types={"rule.fired"}, limit=2)) == [55, 58]
    assert read(folder, types={"nothing"}) == []
    assert read(folder, types=set()) == []


def test_a_log_that_does_not_exist_is_empty(folder: Path) -> None:
    assert read(folder) == []


def test_a_line_that_is_being_written_is_not_read_yet_and_rubbish_is_passed_over(folder: Path) -> None:
    hourly(folder, 3)
    (path,) = folder.glob("*.jsonl")
    lines = path.read_bytes().splitlines()
    timeless = lines[1].replace(b'"time":"', b'"time":5,"was":"')
    path.write_bytes(b"\n".join([lines[0], b"[]", b"", b'{"seq":true}', lines[1], timeless, lines[2][:-1]]))
    assert seqs(read(folder)) == [1, 2, 2]
    assert seqs(read(folder, since=NOW)) == [1, 2]


def test_lines_longer_than_a_block_are_read_backwards_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hourly(folder, 9)
    for block in (1, 2, 7, 100, 1000):
        monkeypatch.setattr(audit_log, "_BLOCK", block)
        assert seqs(read(folder)) == list(range(1, 10))


def test_only_the_newest_files_are_opened_for_the_newest_events(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hourly(folder)
    monkeypatch.setattr(gzip, "open", None)
    assert seqs(read(folder, limit=5)) == [56, 57, 58, 59, 60]
    assert seqs(read(folder, since=NOW + 2 * DAY)) == list(range(49, 61))


def test_a_file_that_the_system_refuses_is_told_in_our_words(folder: Path) -> None:
    hourly(folder, 3)
    (path,) = folder.glob("*.jsonl")
    path.unlink()
    path.mkdir()
    with pytest.raises(AuditUnreadable, match="may read"):
        read(folder)
    assert not verify(folder).ok
    with pytest.raises(AuditUnreadable):
        next(follow(folder, after=0, poll=lambda: False))


def followed(folder: Path, steps: list[Callable[[], object]], **options: Any) -> list[int]:
    remaining = iter(steps)

    def poll() -> bool:
        step = next(remaining, None)
        if step is not None:
            step()
        return step is not None

    return seqs(list(follow(folder, poll=poll, **options)))


def test_following_yields_what_comes_over_rotation_and_gzip(folder: Path) -> None:
    log = hourly(folder, 3)
    steps: list[Callable[[], object]] = [
        lambda: log.append([event(4)], NOW + 3 * HOUR),
        lambda: None,
        lambda: [log.append([event(5)], NOW + 4 * HOUR), log.append([event(6)], NOW + DAY)],
        lambda: [log.append([event(number)], NOW + number * DAY) for number in (2, 3, 4)],
        lambda: log.append([event(10)], NOW + 4 * DAY),
    ]
    assert followed(folder, steps, after=None) == [4, 5, 6, 7, 8, 9, 10]


def test_following_from_a_line_on_starts_in_old_files_and_chooses_types(folder: Path) -> None:
    hourly(folder)
    assert followed(folder, [], after=50) == list(range(51, 61))
    assert followed(folder, [], after=0) == list(range(1, 61))
    assert followed(folder, [], after=50, types={"rule.fired"}) == [52, 55, 58]


def test_following_waits_for_a_log_that_does_not_exist_yet(folder: Path) -> None:
    assert followed(folder, [lambda: None, lambda: hourly(folder, 2)], after=None) == [1, 2]


def test_following_never_yields_a_line_in_parts(folder: Path) -> None:
    hourly(folder, 3).close()
    (path,) = folder.glob("*.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    steps: list[Callable[[], object]] = [lambda: path.write_bytes(whole[:-1]), lambda: path.write_bytes(whole)]
    assert followed(folder, steps, after=0) == [1, 2, 3]


def test_a_changed_byte_anywhere_is_found(folder: Path) -> None:
    hourly(folder, 3).close()
    (path,) = folder.glob("*.jsonl")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    starts = [0, len(lines[0]), len(lines[0]) + len(lines[1])]
    for position in range(len(whole)):
        for mask in (0x01, 0x20, 0x80):
            changed = bytearray(whole)
            changed[position] ^= mask
            path.write_bytes(changed)
            report = verify(folder)
            assert not report.ok, (position, mask)
            line = max(index for index, start in enumerate(starts) if start <= position) + 1
            if position < len(whole) - 1:  # without the last newline it is the tail that is missing
                assert report.problems[0].line in {line, line + 1}, (position, mask)
                assert report.problems[0].file == path.name


def test_a_changed_hash_is_told_once(folder: Path) -> None:
    hourly(folder, 4)
    (path,) = folder.glob("*.jsonl")
    digest = read(folder)[1]["hash"].encode()
    one, two, rest = path.read_bytes().split(b"\n", 2)
    path.write_bytes(b"\n".join([one, two.replace(digest, digest[::-1]), rest]))
    assert [each.line for each in verify(folder).problems] == [2]


def test_a_change_that_keeps_the_meaning_is_found_too(folder: Path) -> None:
    log = opened(folder)
    log.append([{"type": "t", "data": {"value": 1.5, "text": "é"}}], NOW)
    (path,) = folder.glob("*.jsonl")
    whole = path.read_bytes()
    for before, after in ((b"1.5", b"1.50"), (b"\\u00e9", b"\\u00E9"), (b'"seq":1', b'"seq": 1')):
        path.write_bytes(whole.replace(before, after))
        assert [each.what for each in verify(folder).problems] == [
            "is written in other bytes than ours: it was changed"
        ]


@pytest.mark.parametrize("gone", range(1, 61))
def test_a_removed_line_is_found_in_any_place(folder: Path, gone: int) -> None:
    hourly(folder)
    for path in sorted(folder.glob("*.jsonl*")):
        lines = content_of(path).splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["seq"] != gone]
        if kept != lines:
            store(path, b"".join(kept))
    report = verify(folder, head_sequence=60)
    assert len(report.problems) == 1
    expected = "tail is cut" if gone == 60 else f"seq {gone} is missing" if gone > 1 else "starts with seq 1"
    assert expected in report.problems[0].what


def content_of(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def store(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("marked", [True, False])
def test_a_cut_tail_is_found_by_the_head_that_is_known_elsewhere_or_by_the_mark(folder: Path, marked: bool) -> None:
    hourly(folder)
    (path,) = folder.glob("*.jsonl")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    if not marked:
        (folder / "head").unlink()
        assert verify(folder).ok
        assert "missing" in verify(folder, head_sequence=58).notes[0]
    for report in (verify(folder, head_sequence=60), *([verify(folder)] if marked else [])):
        assert [each.what for each in report.problems] == ["ends at seq 58, but seq 60 was written: the tail is cut"]


def test_an_oldest_file_that_retention_did_not_remove_is_missing(folder: Path) -> None:
    hourly(folder).close()
    min(folder.glob("*.gz")).unlink()
    missing = "starts at seq 13, but retention left seq 1: the lines between are missing"
    assert [each.what for each in verify(folder).problems] == [missing]
    log = opened(folder, now=NOW + 3 * DAY)  # the next line does not make good for it
    log.append([event(61)], NOW + 3 * DAY)
    assert [each.what for each in verify(folder).problems] == [missing]


def test_what_retention_left_is_known_too_and_what_is_taken_beyond_it_is_missing(folder: Path) -> None:
    hourly(folder).close()
    AuditLog.open(folder, max_bytes=1024 * 1024, retention_seconds=86400.0, now=NOW + 2 * DAY).close()
    report = verify(folder)
    assert (report.ok, report.starts_at_seq) == (True, 13)
    min(folder.glob("*.gz")).unlink()
    assert [each.what for each in verify(folder).problems] == [
        "starts at seq 37, but retention left seq 13: the lines between are missing"
    ]


def test_a_log_whose_mark_an_earlier_version_wrote_may_begin_anywhere_until_we_write_it(folder: Path) -> None:
    hourly(folder).close()
    mark = json.loads((folder / "head").read_bytes())
    old = {"seq": mark["seq"], "hash": mark["hash"], "check": mark["check"]}
    (folder / "head").write_text(json.dumps(old))
    oldest, younger = sorted(folder.glob("*.gz"))
    oldest.unlink()
    report = verify(folder)
    assert report.ok
    assert report.notes == ("starts at seq 13: what came before is not here and was not verified",)
    opened(folder, now=NOW + 3 * DAY).append([event(61)], NOW + 3 * DAY)
    assert verify(folder).ok
    younger.unlink()
    assert not verify(folder).ok


def test_a_first_seq_that_does_not_fit_its_check_is_not_believed(folder: Path) -> None:
    hourly(folder).close()
    content = (folder / "head").read_bytes()
    (folder / "head").write_bytes(content.replace(b'"first":                   1', b'"first":                  13'))
    assert audit_log._read_mark(folder) == audit_log._Mark(seq=60, digest=read(folder)[-1]["hash"])


def test_a_damaged_mark_is_mentioned_but_no_problem(folder: Path) -> None:
    hourly(folder, 3)
    content = (folder / "head").read_bytes()
    for damaged in (b"", b"[]", content[:-5], content.replace(b" 3,", b" 4,"), b"[" * 1024):
        (folder / "head").write_bytes(damaged)
        report = verify(folder)
        assert report.ok
        assert "not readable" in report.notes[0]
    assert opened(folder).opened.missing is None


def test_a_chain_that_was_rewritten_whole_does_not_fit_its_mark(folder: Path) -> None:
    hourly(folder, 3).close()
    (path,) = folder.glob("*.jsonl")
    prev, forged = "0" * 64, b""
    for raw in path.read_bytes().splitlines():
        line = json.loads(raw)
        line.update(reason="all was well", prev=prev)
        del line["hash"]
        prev = hashlib.sha256(json.dumps(line, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        forged += json.dumps({**line, "hash": prev}, separators=(",", ":")).encode() + b"\n"
    path.write_bytes(forged)
    assert [each.line for each in verify(folder).problems] == [3]
    assert "rewritten" in verify(folder).problems[0].what


def test_swapped_files_are_found(folder: Path) -> None:
    hourly(folder)
    first, second = sorted(folder.glob("*.gz"))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    report = verify(folder, head_sequence=60)
    assert {each.file for each in report.problems} >= {first.name, second.name}
    assert all(each.line == 1 for each in report.problems)


def test_a_renamed_a_missing_and_a_doubled_file_are_found(folder: Path) -> None:
    hourly(folder)
    _first, second = sorted(folder.glob("*.gz"))
    content = second.read_bytes()
    second.rename(folder / "2026-03-02.000000000099.jsonl.gz")
    assert not verify(folder).ok
    (folder / "2026-03-02.000000000099.jsonl.gz").rename(folder / "holiday.jsonl.gz")
    report = verify(folder)
    assert {each.file for each in report.problems} == {"holiday.jsonl.gz", "2026-03-03.000000000037.jsonl"}
    (folder / "holiday.jsonl.gz").unlink()
    assert [each.what for each in verify(folder).problems] == ["seq 13 to 36 are missing before it"]
    second.write_bytes(content)
    assert verify(folder).ok
    (folder / "2026-03-02.000000000014.jsonl.gz").write_bytes(content)
    assert not verify(folder).ok


def test_a_repeated_line_and_lines_out_of_order_are_found(folder: Path) -> None:
    hourly(folder, 4)
    (path,) = folder.glob("*.jsonl")
    one, two, three, four = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(one + two + two + three + four)
    assert [(each.line, each.what) for each in verify(folder).problems] == [
        (3, "has seq 2, expected 3: repeated or out of order")
    ]
    path.write_bytes(one + three + two + four)
    assert verify(folder).problems[0].line == 2


def test_a_damaged_gzip_is_found_and_the_rest_still_checked(folder: Path) -> None:
    hourly(folder)
    first, _ = sorted(folder.glob("*.gz"))
    whole = first.read_bytes()
    for damaged in (whole[:-4], whole[: len(whole) // 2], b"", b"not gzip", whole[:20] + b"\xff" * 9 + whole[29:]):
        first.write_bytes(damaged)
        report = verify(folder, head_sequence=60)
        assert report.problems[0].file == first.name
        assert report.last_seq == 60
        assert seqs(read(folder))[-48:] == list(range(13, 61))


def test_a_torn_last_line_is_mentioned_but_a_torn_closed_file_is_a_problem(folder: Path) -> None:
    hourly(folder)
    (path,) = folder.glob("*.jsonl")
    with path.open("ab") as file:
        file.write(b'{"seq":61')
    report = verify(folder, head_sequence=60)
    assert report.ok
    assert report.torn_tail
    assert "not whole" in report.notes[0]
    first = min(folder.glob("*.gz"))
    store(first, content_of(first)[:-1])
    assert verify(folder).problems[0].what == "ends in the middle of a line"


def test_a_first_line_with_a_predecessor_and_lines_nobody_wrote_are_found(folder: Path) -> None:
    hourly(folder, 2).close()
    (path,) = folder.glob("*.jsonl")
    whole = path.read_bytes()
    line = json.loads(whole.splitlines()[0])
    for change in ({"prev": "1" * 64}, {"seq": 0}, {"extra": 1}, {"hash": None}, {"data": float("nan")}):
        path.write_bytes(json.dumps({**line, **change}).encode() + b"\n" + whole.splitlines(keepends=True)[1])
        assert not verify(folder).ok
    path.write_bytes(b'{"a":' * 990 + b"1" + b"}" * 990 + b"\n")
    assert not verify(folder).ok


def test_no_folder_is_a_problem_and_an_empty_one_only_if_something_was_written(folder: Path) -> None:
    assert verify(folder).problems[0].what == "the audit folder does not exist"
    folder.mkdir()
    assert verify(folder).ok
    assert not verify(folder, head_sequence=1).ok


def test_the_list_of_problems_has_an_end(folder: Path) -> None:
    folder.mkdir()
    (folder / "2026-03-01.000000000001.jsonl").write_bytes(b"x\n" * 5000)
    report = verify(folder)
    assert len(report.problems) == audit_log.MAX_PROBLEMS
    assert report.checked == 5000


def test_a_file_gzipped_between_looking_and_opening_is_read_in_its_new_form(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hourly(folder)
    (path,) = folder.glob("*.jsonl")
    listed = audit_log._segments(folder)
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    monkeypatch.setattr(audit_log, "_segments", lambda where: listed)
    assert seqs(read(folder)) == list(range(1, 61))
    assert verify(folder, head_sequence=60).ok


def test_files_that_retention_removes_while_reading_are_not_missed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hourly(folder)
    listed = audit_log._segments(folder)
    AuditLog.open(folder, max_bytes=1024 * 1024, retention_seconds=86400.0, now=NOW + 2 * DAY).close()
    monkeypatch.setattr(audit_log, "_segments", lambda where: listed)
    assert seqs(read(folder)) == list(range(13, 61))
    report = verify(folder, head_sequence=60)
    assert report.ok
    assert report.starts_at_seq == 13


def test_a_file_that_vanishes_in_the_middle_is_a_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hourly(folder)
    listed = audit_log._segments(folder)
    max(folder.glob("*.gz")).unlink()
    monkeypatch.setattr(audit_log, "_segments", lambda where: listed)
    assert [each.what for each in verify(folder, head_sequence=60).problems] == [
        "vanished while it was verified",
        "seq 13 to 36 are missing before it",
    ]


WRITER = """
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from sidecar.adapters.audit_log import AuditLog
now = datetime(2026, 3, 1, 12, tzinfo=UTC)
log = AuditLog.open(Path(sys.argv[1]), max_bytes=4000, retention_seconds=None, now=now)
for number in range(400):
    events = [{"type": "t", "reason": f"event {number} \\u2028\\n"}] * (number % 4 + 1)
    log.append(events, now + number * timedelta(hours=1))
"""


def test_several_readers_see_a_consistent_log_while_another_process_writes(folder: Path) -> None:
    root = Path(audit_log.__file__).parents[2]
    total = sum(number % 4 + 1 for number in range(400))
    folder.mkdir()
    seen: list[int] = []
    ended: list[bool] = []
    with subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], cwd=root) as writer:
        try:

            def look() -> bool:
                # What the writer wrote between the last read and its end takes one more round.
                ended.append(writer.poll() is not None)
                newest = seqs(read(folder, limit=20))
                assert newest == list(range(newest[0], newest[-1] + 1)) if newest else True
                report = verify(folder)
                assert report.ok, report.problems
                return sum(ended) < 2

            seen.extend(each["seq"] for each in follow(folder, after=0, poll=look))
        finally:
            writer.kill() if writer.poll() is None else None
    assert writer.returncode == 0
    assert seen == list(range(1, total + 1))
    assert verify(folder, head_sequence=total).ok


def test_an_unreadable_folder_is_told_in_our_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hourly(folder, 2)

    def refuse(self: Path) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    for ask in (
        lambda: read(folder),
        lambda: verify(folder),
        lambda: next(follow(folder, after=0, poll=lambda: False)),
    ):
        with pytest.raises(AuditUnreadable, match="Permission denied"):
            ask()
