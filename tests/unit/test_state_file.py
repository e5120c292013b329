"""The durable state: what was saved comes back whole, or a named reason why it cannot be believed."""

import errno
import fcntl
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sidecar.adapters import state_file
from sidecar.adapters.state_file import (
    DocumentInvalid,
    FolderLocked,
    FolderUnusable,
    ForeignSwitch,
    FutureVersion,
    Lost,
    Nothing,
    Restored,
    SaveFailed,
    SaveRefused,
    StateFolder,
    encode,
)
from sidecar.core.errors import StorageError

SWITCH = "trading/bot-0"
COPIES = ("state.json", "state.json.bak")


def document(epoch: int = 1, **more: Any) -> dict[str, Any]:
    return {"switch": SWITCH, "epoch": epoch, "state": "KILLED", **more}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "killswitch"


def saved(place: Path, *documents: dict[str, Any]) -> None:
    folder = StateFolder.open(place, switch=SWITCH)
    folder.load(newest_audit_epoch=None)
    for each in documents:
        folder.save(each)
    folder.close()


def loaded(place: Path, *, audit: int | None = None, switch: str = SWITCH) -> state_file.Loaded:
    folder = StateFolder.open(place, switch=switch)
    try:
        return folder.load(newest_audit_epoch=audit)
    finally:
        folder.close()


def test_what_was_saved_comes_back(place: Path) -> None:
    rich = document(
        7, causes=[{"reason": 'a "quoted"\nline\u2028 \ud800 é'}], factor=0.1 + 0.2, deep={"a": [None, True, -0.0]}
    )
    saved(place, rich)
    assert loaded(place) == Restored(
        document=rich, source="state.json", note=None, alternative=None, behind_audit=False
    )


def test_the_file_carries_version_switch_and_a_checksum_over_all_else(place: Path) -> None:
    saved(place, document(7))
    content = json.loads((place / "state.json").read_text())
    checksum = content.pop("checksum")
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert content == {**document(7), "version": 1}
    assert checksum == hashlib.sha256(canonical.encode()).hexdigest()


def test_both_copies_are_the_same_generation_and_private(place: Path) -> None:
    saved(place, document(1), document(2))
    assert (place / "state.json").read_bytes() == (place / "state.json.bak").read_bytes()
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert {stat.S_IMODE((place / name).stat().st_mode) for name in (*COPIES, "lock")} == {0o600}
    assert sorted(each.name for each in place.iterdir()) == ["lock", "state.json", "state.json.bak"]


def test_an_empty_folder_holds_nothing_and_passes_on_what_the_audit_knows(place: Path) -> None:
    assert loaded(place) == Nothing(audit_epoch=None)
    assert loaded(place, audit=4) == Nothing(audit_epoch=4)


@pytest.mark.parametrize("damaged", COPIES)
def test_one_copy_truncated_at_any_byte_is_replaced_by_the_other(place: Path, damaged: str) -> None:
    saved(place, document(3))
    whole = (place / damaged).read_bytes()
    other = COPIES[1 - COPIES.index(damaged)]
    folder = StateFolder.open(place, switch=SWITCH)
    for length in range(len(whole) - 1):  # without the newline alone it is still the same document
        (place / damaged).write_bytes(whole[:length])
        result = folder.load(newest_audit_epoch=3)
        assert isinstance(result, Restored), length
        assert (result.document, result.source) == (document(3), other)
        assert result.note is not None
        assert damaged in result.note
    folder.close()


def test_both_copies_truncated_at_any_byte_are_lost(place: Path) -> None:
    saved(place, document(3))
    whole = (place / "state.json").read_bytes()
    folder = StateFolder.open(place, switch=SWITCH)
    for length in range(len(whole) - 1):
        for name in COPIES:
            (place / name).write_bytes(whole[:length])
        result = folder.load(newest_audit_epoch=None)
        assert isinstance(result, Lost), length
        assert all(name in result.reason for name in COPIES)
    folder.close()


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF])
def test_a_flipped_byte_never_yields_another_document(place: Path, mask: int) -> None:
    saved(place, document(3))
    whole = (place / "state.json").read_bytes()
    version_digit = whole.index(b'"version":1') + len(b'"version":')
    folder = StateFolder.open(place, switch=SWITCH)
    for position in range(len(whole) - 1):
        flipped = bytearray(whole)
        flipped[position] ^= mask
        (place / "state.json").write_bytes(flipped)
        result = folder.load(newest_audit_epoch=3)
        if position == version_digit and isinstance(result, FutureVersion):
            continue  # indistinguishable from a newer sidecar's file, and refused: the safe mistake
        assert isinstance(result, Restored), (position, result)
        assert (result.document, result.source) == (document(3), "state.json.bak"), position
    folder.close()


def oversized(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(state_file.MAX_BYTES + 1)


def with_checksum(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({**body, "checksum": hashlib.sha256(canonical.encode()).hexdigest()})


DAMAGE: dict[str, Any] = {
    "empty": lambda path: path.write_bytes(b""),
    "a list": lambda path: path.write_text("[]"),
    "not utf-8": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "nested beyond reading": lambda path: path.write_text("[" * 200_000),
    "too many digits": lambda path: path.write_text('{"version":1,"epoch":' + "9" * 5000 + "}"),
    "version is a text": lambda path: path.write_text('{"version":"2"}'),
    "version is true": lambda path: path.write_text('{"version":true}'),
    "version zero": lambda path: path.write_text('{"version":0}'),
    "infinite number": lambda path: path.write_text('{"version":1,"epoch":1e999,"checksum":""}'),
    "checksum is no text": lambda path: path.write_text('{"version":1,"checksum":5}'),
    "checksum beyond ascii": lambda path: path.write_text('{"version":1,"checksum":"\\ud800é"}'),
    "epoch is a text": lambda path: path.write_text(with_checksum({"version": 1, "switch": SWITCH, "epoch": "3"})),
    "epoch is true": lambda path: path.write_text(with_checksum({"version": 1, "switch": SWITCH, "epoch": True})),
    "epoch is negative": lambda path: path.write_text(with_checksum({"version": 1, "switch": SWITCH, "epoch": -1})),
    "switch is a number": lambda path: path.write_text(with_checksum({"version": 1, "switch": 1, "epoch": 3})),
    "too large": oversized,
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a dangling symlink": lambda path: path.symlink_to("nowhere"),
    "a symlink to the other": lambda path: path.symlink_to("state.json.bak"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_kind_of_damage_falls_back_to_the_other_copy(place: Path, kind: str) -> None:
    saved(place, document(3))
    (place / "state.json").unlink()
    DAMAGE[kind](place / "state.json")
    result = loaded(place, audit=3)
    assert isinstance(result, Restored)
    assert (result.document, result.source) == (document(3), "state.json.bak")


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_without_another_copy_is_lost_not_nothing(place: Path, kind: str) -> None:
    saved(place, document(3))
    for name in COPIES:
        (place / name).unlink()
    DAMAGE[kind](place / "state.json.bak")
    result = loaded(place)
    assert isinstance(result, Lost)
    assert "state.json is missing" in result.reason


def test_a_copy_that_cannot_be_read_is_damaged(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(place, document(3))

    def broken(descriptor: int, count: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "read", broken)
    result = loaded(place)
    assert isinstance(result, Lost)
    assert os.strerror(errno.EIO) in result.reason


def test_after_a_loss_the_folder_can_be_saved_again(place: Path) -> None:
    place.mkdir()
    (place / "state.json").write_text("rubbish")
    folder = StateFolder.open(place, switch=SWITCH)
    assert isinstance(folder.load(newest_audit_epoch=None), Lost)
    folder.save(document(9))
    folder.close()
    assert isinstance(loaded(place), Restored)


def put(place: Path, name: str, content: dict[str, Any] | None) -> None:
    path = place / name
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(encode(content, switch=content["switch"]))


@pytest.mark.parametrize("survivor", COPIES)
@pytest.mark.parametrize(("audit", "kind"), [(None, Restored), (2, Restored), (3, Restored), (4, Lost), (400, Lost)])
@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_a_single_copy_older_than_the_audit_is_not_believed(
    place: Path, survivor: str, audit: int | None, kind: type, how: str
) -> None:
    saved(place, document(3))
    other = place / COPIES[1 - COPIES.index(survivor)]
    if how == "damaged":
        other.write_bytes(b"{")
    else:
        other.unlink()
    assert isinstance(loaded(place, audit=audit), kind)


def test_the_reason_of_a_loss_names_both_epochs(place: Path) -> None:
    saved(place, document(3))
    (place / "state.json").unlink()
    result = loaded(place, audit=9)
    assert isinstance(result, Lost)
    assert "epoch 3" in result.reason
    assert "epoch 9" in result.reason


@pytest.mark.parametrize(("newer", "older"), [COPIES, COPIES[::-1]])
def test_of_two_whole_copies_the_higher_epoch_is_used_and_the_other_handed_over(
    place: Path, newer: str, older: str
) -> None:
    saved(place, document(1))
    put(place, newer, document(5, state="ACTIVE"))
    put(place, older, document(4))
    result = loaded(place, audit=5)
    assert isinstance(result, Restored)
    assert (result.document["epoch"], result.source, result.behind_audit) == (5, newer, False)
    assert result.alternative == document(4)


def test_at_the_same_epoch_the_backup_is_the_newer_one_for_it_is_written_first(place: Path) -> None:
    saved(place, document(4, failures=1))
    put(place, "state.json.bak", document(4, failures=2))
    result = loaded(place)
    assert isinstance(result, Restored)
    assert result.document["failures"] == 2
    assert result.alternative == document(4, failures=1)


def test_two_whole_copies_behind_the_audit_are_marked_as_rolled_back(place: Path) -> None:
    saved(place, document(4))
    result = loaded(place, audit=5)
    assert isinstance(result, Restored)
    assert result.behind_audit


@pytest.mark.parametrize("future", COPIES)
@pytest.mark.parametrize("other", ["whole", "damaged", "missing", "foreign"])
def test_a_newer_version_wins_over_everything_and_is_left_untouched(place: Path, future: str, other: str) -> None:
    saved(place, document(3))
    (place / future).write_text('{"version": 2, "whatever": "a newer sidecar keeps"}')
    rest = place / COPIES[1 - COPIES.index(future)]
    if other == "damaged":
        rest.write_bytes(b"{")
    elif other == "missing":
        rest.unlink()
    elif other == "foreign":
        put(place, rest.name, {"switch": "other", "epoch": 1})
    before = {each.name: each.read_bytes() for each in place.iterdir()}
    folder = StateFolder.open(place, switch=SWITCH)
    assert folder.load(newest_audit_epoch=99) == FutureVersion(found=2, supported=1, path=place / future)
    with pytest.raises(SaveRefused, match="format version 2, this sidecar supports 1"):
        folder.save(document(4))
    folder.close()
    assert {each.name: each.read_bytes() for each in place.iterdir()} == before


@pytest.mark.parametrize("foreign", COPIES)
def test_the_state_of_another_switch_is_refused_and_left_untouched(place: Path, foreign: str) -> None:
    saved(place, document(3))
    put(place, foreign, {"switch": "trading/bot-1", "epoch": 9})
    before = {each.name: each.read_bytes() for each in place.iterdir()}
    folder = StateFolder.open(place, switch=SWITCH)
    assert folder.load(newest_audit_epoch=None) == ForeignSwitch(
        found="trading/bot-1", expected=SWITCH, path=place / foreign
    )
    with pytest.raises(SaveRefused, match="trading/bot-1"):
        folder.save(document(4))
    folder.close()
    assert {each.name: each.read_bytes() for each in place.iterdir()} == before


def test_saving_before_loading_is_refused(place: Path) -> None:
    folder = StateFolder.open(place, switch=SWITCH)
    with pytest.raises(SaveRefused, match="load it"):
        folder.save(document())
    folder.close()


def test_saving_after_closing_is_refused(place: Path) -> None:
    folder = StateFolder.open(place, switch=SWITCH)
    folder.load(newest_audit_epoch=None)
    folder.close()
    folder.close()
    with pytest.raises(SaveRefused, match="closed"):
        folder.save(document())


@pytest.mark.parametrize(
    "bad",
    [
        document(factor=float("nan")),
        document(factor=float("inf")),
        document(when=object()),
        document(version=1),
        document(checksum="x"),
        {"epoch": 1},
        {"switch": "another", "epoch": 1},
        {"switch": SWITCH},
        {"switch": SWITCH, "epoch": True},
        {"switch": SWITCH, "epoch": -1},
        {"switch": SWITCH, "epoch": 1.0},
        document(blob="x" * state_file.MAX_BYTES),
        document(mixed={5: "five", "6": "six"}),
    ],
)
def test_a_document_that_cannot_be_kept_is_refused_and_the_old_one_stays(place: Path, bad: dict[str, Any]) -> None:
    saved(place, document(3))
    folder = StateFolder.open(place, switch=SWITCH)
    folder.load(newest_audit_epoch=None)
    with pytest.raises(DocumentInvalid):
        folder.save(bad)
    folder.close()
    result = loaded(place)
    assert isinstance(result, Restored)
    assert result.document == document(3)


class Crash(BaseException):
    """The machine stops here."""


class Machine:
    """Stands in for the os module: counts the calls that change the disk, and at one of them stops or fails."""

    CHANGES = ("open", "write", "fsync", "close", "replace", "unlink")

    def __init__(
        self, *, stop_at: int | None = None, fail: tuple[str, int, int] | None = None, chunk: int | None = None
    ) -> None:
        self.calls: list[str] = []
        self._stop_at = stop_at
        self._fail = fail
        self._chunk = chunk

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.CHANGES:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            # A stopped machine does not run clean-up code either: every later call stops too.
            if self._stop_at is not None and len(self.calls) >= self._stop_at:
                raise Crash
            self.calls.append(name)
            if self._fail is not None and (name, self.calls.count(name)) == self._fail[:2]:
                raise OSError(self._fail[2], os.strerror(self._fail[2]))
            if name == "write" and self._chunk is not None:
                args = (args[0], args[1][: self._chunk])
            return real(*args, **kwargs)

        return call


def save_on(
    machine: Machine, place: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> BaseException | None:
    folder = StateFolder.open(place, switch=SWITCH)
    folder.load(newest_audit_epoch=None)
    monkeypatch.setattr(state_file, "os", machine)
    try:
        folder.save(content)
    except (Crash, StorageError) as error:
        return error
    finally:
        monkeypatch.undo()
        folder.close()
    return None


def test_each_copy_is_written_synced_renamed_and_the_folder_synced_backup_first(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(place, document(1))
    machine = Machine()
    assert save_on(machine, place, document(2), monkeypatch) is None
    one_copy = ["unlink", "open", "write", "fsync", "close", "replace", "fsync"]
    assert machine.calls == one_copy * 2


@pytest.mark.parametrize("stop_at", range(14))
def test_a_crash_between_any_two_calls_leaves_the_old_or_the_new_state(
    place: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(place, document(1), document(2))
    assert isinstance(save_on(Machine(stop_at=stop_at), place, document(3), monkeypatch), Crash)
    result = loaded(place, audit=2)
    assert isinstance(result, Restored)
    assert result.document["epoch"] in {2, 3}
    assert {each.name for each in place.iterdir()} == {"lock", *COPIES}
    if stop_at == 7:  # between the copies: the backup is the new one already
        assert (result.source, result.alternative) == ("state.json.bak", document(2))
    if stop_at == 13:  # all but the last sync: whoever asked was not answered, but the new one is there
        assert result.document["epoch"] == 3


@pytest.mark.parametrize("stop_at", range(14))
def test_a_crash_in_the_very_first_save_is_never_a_loss(
    place: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(save_on(Machine(stop_at=stop_at), place, document(1), monkeypatch), Crash)
    assert isinstance(loaded(place, audit=None), Nothing | Restored)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize(
    ("call", "nth"),
    [("open", 1), ("open", 2), ("write", 1), ("write", 2), ("fsync", 1), ("fsync", 2), ("fsync", 4), ("replace", 2)],
)
def test_a_refused_write_is_told_keeps_a_whole_state_and_the_next_save_succeeds(
    place: Path, code: int, call: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(place, document(2))
    error = save_on(Machine(fail=(call, nth, code)), place, document(3), monkeypatch)
    assert isinstance(error, SaveFailed)
    assert os.strerror(code) in str(error)
    assert {each.name for each in place.iterdir()} == {"lock", *COPIES}
    result = loaded(place, audit=2)
    assert isinstance(result, Restored)
    assert result.document["epoch"] in {2, 3}
    saved(place, document(4))
    result = loaded(place, audit=4)
    assert isinstance(result, Restored)
    assert result.document["epoch"] == 4


def test_short_writes_are_continued(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert save_on(Machine(chunk=7), place, document(3), monkeypatch) is None
    assert isinstance(loaded(place), Restored)


def test_a_folder_moved_away_in_mid_run_is_not_called_durable(place: Path) -> None:
    folder = StateFolder.open(place, switch=SWITCH)
    folder.load(newest_audit_epoch=None)
    place.rename(place.with_name("moved"))
    with pytest.raises(SaveFailed, match="cannot be looked up"):
        folder.save(document(1))
    place.mkdir()
    with pytest.raises(SaveFailed, match="no longer the folder"):
        folder.save(document(1))
    folder.close()


def test_a_folder_deleted_in_mid_run_is_not_called_durable(place: Path) -> None:
    folder = StateFolder.open(place, switch=SWITCH)
    folder.load(newest_audit_epoch=None)
    (place / "lock").unlink()
    place.rmdir()
    with pytest.raises(SaveFailed, match="put the folder back"):
        folder.save(document(1))
    folder.close()


def test_temporary_files_of_a_crash_are_removed_at_open_and_nothing_else(place: Path) -> None:
    saved(place, document(1))
    for name in ("state.json.tmp", "state.json.bak.tmp", "notes.txt"):
        (place / name).write_text("half")
    StateFolder.open(place, switch=SWITCH).close()
    assert {each.name for each in place.iterdir()} == {"lock", "notes.txt", *COPIES}


def test_the_same_folder_cannot_be_opened_twice(place: Path) -> None:
    first = StateFolder.open(place, switch=SWITCH)
    with pytest.raises(FolderLocked, match=str(place)):
        StateFolder.open(place, switch=SWITCH)
    first.close()
    StateFolder.open(place, switch=SWITCH).close()


HOLDER = """
import sys
from pathlib import Path
from sidecar.adapters.state_file import StateFolder
folder = StateFolder.open(Path(sys.argv[1]), switch="s")
print("held", flush=True)
sys.stdin.read()
"""


def test_another_process_holding_the_folder_is_refused_until_it_is_killed(place: Path) -> None:
    root = Path(state_file.__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    ) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(FolderLocked):
                StateFolder.open(place, switch=SWITCH)
        finally:
            holder.kill()
    StateFolder.open(place, switch=SWITCH).close()


def test_a_child_process_does_not_inherit_the_lock(place: Path) -> None:
    folder = StateFolder.open(place, switch=SWITCH)
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, close_fds=False
    ) as child:
        folder.close()
        StateFolder.open(place, switch=SWITCH).close()
        child.kill()


def test_a_file_in_place_of_the_folder_is_named(place: Path) -> None:
    place.write_text("not a folder")
    with pytest.raises(FolderUnusable, match=rf"{place} cannot be used as the state folder.*set storage\.dir"):
        StateFolder.open(place, switch=SWITCH)


def test_a_folder_under_a_file_is_named(place: Path) -> None:
    place.write_text("not a folder")
    with pytest.raises(FolderUnusable, match="inner"):
        StateFolder.open(place / "inner", switch=SWITCH)


def test_a_folder_without_room_for_the_lock_is_named(place: Path) -> None:
    (place / "lock").mkdir(parents=True)
    with pytest.raises(FolderUnusable, match="lock"):
        StateFolder.open(place, switch=SWITCH)


def test_a_volume_without_locks_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(FolderUnusable, match="No locks available"):
        StateFolder.open(place, switch=SWITCH)


def test_leftovers_that_cannot_be_removed_are_named_and_the_lock_is_given_back(place: Path) -> None:
    (place / "state.json.tmp").mkdir(parents=True)
    with pytest.raises(FolderUnusable):
        StateFolder.open(place, switch=SWITCH)
    (place / "state.json.tmp").rmdir()
    StateFolder.open(place, switch=SWITCH).close()


def test_every_error_is_a_storage_error() -> None:
    assert all(
        issubclass(each, StorageError)
        for each in (FolderLocked, FolderUnusable, SaveRefused, SaveFailed, DocumentInvalid)
    )
