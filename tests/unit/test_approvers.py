"""Codes, their hashes and the file of approvers."""

import base64
import os

import pytest

from sidecar.adapters import approvers as module
from sidecar.adapters.approvers import Approvers, Verified, hash_code, parse_hash, verify_code
from sidecar.core.errors import ApprovalError, SettingsError

ALICE = hash_code("alice's code")
BOB = hash_code("bob's code")


def write(path, *entries):
    path.write_text("".join(f"- {{name: {name}, code_hash: '{hashed}'}}\n" for name, hashed in entries))
    return path


def test_a_hash_has_the_documented_shape_and_a_fresh_salt():
    method, parameters, salt, digest = ALICE.split("$")
    assert (method, parameters) == ("scrypt", "ln=14,r=8,p=1")
    assert len(base64.b64decode(salt)) == 16
    assert len(base64.b64decode(digest)) == 32
    assert hash_code("same") != hash_code("same")


def test_only_the_same_bytes_verify():
    hashed = hash_code("Zoë")
    assert verify_code("Zoë", hashed)
    assert not verify_code("Zoe\u0308", hashed)
    assert not verify_code("Zoë ", hashed)
    assert not verify_code("", hashed)


@pytest.mark.parametrize("code", ["", "a\nb", "a\r", "x" * 1025, "ü" * 513])
def test_a_code_that_nobody_could_use_is_not_hashed(code):
    with pytest.raises(ValueError, match="approval code"):
        hash_code(code)


def test_a_code_of_exactly_one_kibibyte_verifies_and_a_longer_one_never_does():
    assert verify_code("x" * 1024, hash_code("x" * 1024))
    assert not verify_code("x" * 1025, hash_code("x" * 1024))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a hash"),
        ("my secret code", "not a hash"),
        (ALICE.replace("ln=14", "ln=20"), "ln=20"),
        (ALICE.replace("scrypt", "bcrypt"), "not a hash"),
        (ALICE[:-4] + "!!!!", "base64"),
        (ALICE[:-8], "bytes|base64"),
        (ALICE + "$", "not a hash"),
    ],
    ids=["empty", "the code itself", "other cost", "other function", "no base64", "cut short", "one field too many"],
)
def test_what_is_no_hash_is_refused_without_being_repeated(text, reason):
    with pytest.raises(ValueError, match=reason) as refusal:
        parse_hash(text)
    assert "my secret" not in str(refusal.value)


def test_half_a_surrogate_pair_is_a_wrong_code_and_no_crash():
    assert not verify_code("\ud800", ALICE)


def test_a_name_and_its_code_are_verified(tmp_path):
    approvers = Approvers.from_file(write(tmp_path / "a.yaml", ("alice", ALICE), ("bob", BOB)))
    assert approvers.verify("alice", "alice's code") == Verified(name="alice", by_verified=True)
    assert approvers.count == 2
    assert approvers.names == ("alice", "bob")
    assert approvers.lockout_name("alice") == "alice"


def test_an_unknown_name_and_a_wrong_code_are_refused_in_the_same_words_after_the_same_work(tmp_path, monkeypatch):
    approvers = Approvers.from_file(write(tmp_path / "a.yaml", ("alice", ALICE), ("bob", BOB)))
    worked = []
    real = module.hashlib.scrypt
    monkeypatch.setattr(module.hashlib, "scrypt", lambda *a, **k: worked.append(1) or real(*a, **k))
    said = []
    for by, code in [("alice", "bob's code"), ("mallory", "alice's code"), ("alice", ""), ("alice", "x" * 5000)]:
        with pytest.raises(ApprovalError) as refusal:
            approvers.verify(by, code)
        said.append(str(refusal.value))
    assert len(set(said)) == 1
    assert len(worked) == 4


def test_the_code_of_the_environment_proves_no_name():
    approvers = Approvers.from_environment("swordfish")
    assert approvers.verify("anybody", "swordfish") == Verified(name="anybody", by_verified=False)
    assert approvers.count == 1
    assert approvers.names == ()
    with pytest.raises(ApprovalError):
        approvers.verify("anybody", "sword")


def test_the_code_of_the_environment_is_not_kept():
    approvers = Approvers.from_environment("swordfish")
    assert "swordfish" not in repr(vars(approvers))


def test_wrong_codes_count_together_where_one_code_serves_all_names():
    approvers = Approvers.from_environment("swordfish")
    assert approvers.lockout_name("a") == approvers.lockout_name("b")


def test_a_secret_made_with_echo_still_works():
    assert Approvers.from_environment("swordfish\n").verify("a", "swordfish").name == "a"


@pytest.mark.parametrize("code", [None, "", "\n"])
def test_without_a_code_there_is_no_approver(code):
    approvers = Approvers.from_environment(code)
    assert approvers.count == 0
    assert approvers.refresh() is False
    assert approvers.changed() is False
    with pytest.raises(ApprovalError, match="no approver is configured"):
        approvers.verify("alice", "")


@pytest.mark.parametrize("code", ["two\nlines", "x" * 2000])
def test_an_unusable_code_in_the_environment_is_an_error_that_does_not_show_it(code):
    with pytest.raises(SettingsError, match="KILL_SWITCH_APPROVAL_CODE") as refusal:
        Approvers.from_environment(code)
    assert code not in str(refusal.value)


def test_every_problem_of_the_file_is_told_at_its_line(tmp_path):
    path = tmp_path / "approvers.yaml"
    path.write_text(
        f"- name: alice\n  code_hash: '{ALICE}'\n"
        f"- name: alice\n  code_hash: '{BOB}'\n"
        "- name: carol\n  code_hash: plain-code\n  role: boss\n"
        "- dave\n"
        "- name: ' '\n"
    )
    with pytest.raises(SettingsError) as refusal:
        Approvers.from_file(path)
    lines = str(refusal.value).splitlines()
    assert any(line.startswith(f"{path}:3: [1].name: 'alice' is an approver already") for line in lines)
    assert any(line.startswith(f"{path}:6: [2].code_hash: is not a hash") for line in lines)
    assert any(line.startswith(f"{path}:7: [2].role: is not a key") for line in lines)
    assert any(line.startswith(f"{path}:8: [3]: must be a mapping") for line in lines)
    assert any(":9: [4].name:" in line for line in lines)
    assert "plain-code" not in str(refusal.value)


@pytest.mark.parametrize("text", ["", "[]", "name: alice", "- {", "42"])
def test_a_file_without_approvers_is_an_error(tmp_path, text):
    path = tmp_path / "approvers.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"approvers\.yaml:[12]:"):
        Approvers.from_file(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read"):
        Approvers.from_file(tmp_path / "none.yaml")


def test_variables_of_the_environment_are_not_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_HASH", ALICE)
    path = tmp_path / "approvers.yaml"
    path.write_text("- {name: alice, code_hash: '${SOME_HASH}'}\n")
    with pytest.raises(SettingsError, match="SOME_HASH is not set"):
        Approvers.from_file(path)


def test_a_changed_file_counts_after_refresh_and_not_before(tmp_path):
    path = write(tmp_path / "a.yaml", ("alice", ALICE))
    approvers = Approvers.from_file(path)
    assert not approvers.changed()
    new = write(tmp_path / "b.yaml", ("alice", ALICE), ("bob", BOB))
    new.replace(path)
    assert approvers.changed()
    with pytest.raises(ApprovalError):
        approvers.verify("bob", "bob's code")
    assert approvers.refresh()
    assert approvers.verify("bob", "bob's code").by_verified
    assert not approvers.refresh()


def test_a_broken_or_missing_file_keeps_who_could_approve_and_is_reported_each_time(tmp_path):
    path = write(tmp_path / "a.yaml", ("alice", ALICE))
    approvers = Approvers.from_file(path)
    path.write_text("- nobody\n")
    for _ in range(2):
        with pytest.raises(SettingsError):
            approvers.refresh()
    path.unlink()
    assert approvers.changed()
    with pytest.raises(SettingsError):
        approvers.refresh()
    assert approvers.verify("alice", "alice's code").by_verified


def test_a_swapped_symlink_is_noticed(tmp_path):
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    write(first, ("alice", ALICE))
    write(second, ("alice", ALICE))
    os.utime(second, ns=(first.stat().st_atime_ns, first.stat().st_mtime_ns))
    link = tmp_path / "approvers.yaml"
    link.symlink_to(first)
    approvers = Approvers.from_file(link)
    link.unlink()
    link.symlink_to(second)
    assert approvers.refresh()
