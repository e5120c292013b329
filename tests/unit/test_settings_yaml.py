"""YAML text becomes text, lists and mappings with lines, and nothing hostile gets through."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.settings import yaml_source
from sidecar.settings.yaml_source import UNREADABLE, Document, read_file, read_text


def read(text: str, **environ: str) -> Document:
    return read_text(text, environ, name="f")


def reasons(document: Document) -> list[str]:
    return [str(problem) for problem in document.problems]


@pytest.mark.parametrize(
    "text", ["on", "off", "yes", "No", "1_000", "1:30", "0x1F", "010", ".inf", "2026-11-22", "=", "<"]
)
def test_a_scalar_stays_what_was_written(text: str) -> None:
    assert read(f"a: {text}").data == {"a": text}


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("", None),
        ("# only\n", None),
        ("a:", {"a": None}),
        ("a: ~", {"a": None}),
        ("a: 'null'", {"a": "null"}),
        ('a: ""', {"a": ""}),
        ("\ufeffa: b", {"a": "b"}),
    ],
)
def test_nothing_is_none_and_quoted_text_is_text(text: str, data: object) -> None:
    assert read(text.lstrip("\ufeff")).data == data


def test_every_value_knows_its_line() -> None:
    document = read("a:\n  b:\n    - x\n    - y\nc: |\n  text\n")
    assert [document.line(path) for path in [("a",), ("a", "b", 1), ("c",), ("a", "nowhere"), ()]] == [1, 4, 5, 1, 1]


def test_a_variable_fills_in_text_and_never_structure() -> None:
    document = read("a: ${X}\nb: \"${X}\"\nc: ['p-${Y}-q']\n", X="k: v\n- [1, 2] # not\n", Y="${X}")
    assert document.data == {"a": "k: v\n- [1, 2] # not\n", "b": "k: v\n- [1, 2] # not\n", "c": ["p-${X}-q"]}


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("${X:-d}", "d"),
        ("${E:-d}", "d"),
        ("${E}", None),
        ("'${E}'", ""),
        ("${N}", None),
        ("$${X}", "${X}"),
        ("$X $ $1 a$", "$X $ $1 a$"),
        ("m{${X:-}}", "m{}"),
        ("${V}${V}", "vv"),
        ("${X:-a:-b}", "a:-b"),
    ],
)
def test_variables_defaults_and_escapes(text: str, data: object) -> None:
    document = read(f"a: {text}", E="", N="null", V="v")
    assert (document.data, document.problems) == ({"a": data}, ())


def test_an_unset_variable_is_reported_at_its_line_and_leaves_the_value_unreadable() -> None:
    document = read("a: 1\nb: ${GONE}\n")
    assert document.data["b"] is UNREADABLE
    assert reasons(document) == ["f:2: b: environment variable GONE is not set; set it, or write ${GONE:-default}"]


def test_a_merged_key_loses_against_a_written_one_and_keeps_its_own_line() -> None:
    document = read("base: &b {x: 1, y: 2}\nother: &o {x: 8, z: 9}\na:\n  y: 3\n  <<: [*b, *o]\n")
    assert document.data["a"] == {"y": "3", "x": "1", "z": "9"}
    assert (document.line(("a", "y")), document.line(("a", "x")), document.problems) == (4, 1, ())


def test_aliases_that_stand_for_billions_of_values_are_refused() -> None:
    rows = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert "stands for more than" in reasons(read("\n".join(rows)))[0]


def test_merges_that_stand_for_billions_of_values_are_refused() -> None:
    rows = ["a0: &a0 {k: x}"] + [
        f"a{i}: &a{i} {{{', '.join(f'k{j}: {{<<: *a{i - 1}}}' for j in range(10))}}}" for i in range(1, 10)
    ]
    assert "stands for more than" in reasons(read("\n".join(rows)))[0]


def test_a_long_variable_repeated_is_refused_before_memory_runs_out() -> None:
    text = "- ${BIG}\n" * 100
    assert "grows beyond 8 MiB" in reasons(read(text, BIG="x" * 1_000_000))[0]


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 5000, "- " * 5000 + "x", "a: [" * 100 + "]" * 100])
def test_deep_nesting_is_refused(text: str) -> None:
    assert read(text).data is UNREADABLE


@pytest.mark.parametrize("text", ["a: &x [*x]", "a: &x {b: *x}"])
def test_a_value_that_holds_itself_is_refused(text: str) -> None:
    assert "no finished anchor" in reasons(read(text))[0]


@pytest.mark.parametrize(
    "text",
    ["a: !!binary aGk=", "a: !!set {x}", "a: !!python/name:os.system ''", "!x {a: b}", "a: !!timestamp 2026-01-01"],
)
def test_tags_that_build_things_are_refused(text: str) -> None:
    assert "which is not allowed" in reasons(read(text))[0]


def test_an_ordinary_tag_is_allowed_and_changes_no_text() -> None:
    assert read("{a: !!str null, b: !!int 010, c: !!null x}").data == {"a": "null", "b": "010", "c": None}


def test_a_variable_in_a_key_is_refused() -> None:
    assert "filled into values only" in reasons(read('"${X}": 1', X="a"))[0]


def test_a_file_that_is_missing_too_large_or_not_text_is_a_problem_not_an_exception(tmp_path: Path) -> None:
    large, binary, folder = tmp_path / "large", tmp_path / "binary", tmp_path / "folder"
    large.write_bytes(b"#" * (yaml_source.LARGEST_FILE + 1))
    binary.write_bytes(b"a: b\nc: \xff\n")
    folder.mkdir()
    assert "is larger than 1 MiB" in reasons(read_file(large, {}))[0]
    assert "binary:2: (file): is not UTF-8: byte 0xff" in reasons(read_file(binary, {}))[0]
    assert "No such file" in reasons(read_file(tmp_path / "gone", {}))[0]
    assert "Is a directory" in reasons(read_file(folder, {}))[0]


def test_the_digest_changes_with_the_text_and_with_the_variables_it_uses() -> None:
    digests = [read("a: ${X:-}", **env).digest for env in ({}, {"X": ""}, {"X": "1"})] + [read("a: ${X:-} ").digest]
    assert len(set(digests)) == 4
    assert read("a: b", UNUSED="1").digest == read("a: b", UNUSED="2").digest


@given(st.text(max_size=60))
def test_any_text_is_read_or_reported(text: str) -> None:
    document = read(text)
    assert document.data is not UNREADABLE or document.problems


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=30))
def test_no_value_of_a_variable_can_add_anything_to_a_file(value: str) -> None:
    document = read("a: ${X}\nb: ['${X}', c]\n", X=value)
    assert list(document.data) == ["a", "b"]
    assert document.data["b"] == [value, "c"]
