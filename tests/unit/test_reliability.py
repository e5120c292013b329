"""docs/RELIABILITY.md tells the truth about where its proof is: every test that it names exists."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "RELIABILITY.md"
PLACE = re.compile(r"`(tests/[\w./]+\.py)(?:::(\w+))?`")


@cache
def names_in(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = {node.name for node in tree.body if isinstance(node, functions)}
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    return frozenset(found | {name.id for node in assigned for name in node.targets if isinstance(name, ast.Name)})


def faults(text: str) -> Iterator[str]:
    for file, name in PLACE.findall(text):
        if not (ROOT / file).is_file():
            yield f"there is no {file}"
        elif name and name not in names_in(file):
            yield f"there is no {name} in {file}"


def guarantees(text: str) -> list[str]:
    """The rows of the first table."""
    table = text.partition("## Guarantees")[2].partition("\n## ")[0]
    return [line for line in table.splitlines() if line.startswith("| ")][1:]


def test_every_guarantee_names_tests_that_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert list(faults(text)) == []
    rows = guarantees(text)
    assert len(rows) > 20
    assert [row for row in rows if not PLACE.search(row.split("|")[3])] == []


def test_every_fault_test_stands_behind_a_guarantee() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for file in sorted((ROOT / "tests" / "faults").glob("test_*.py")):
        place = file.relative_to(ROOT).as_posix()
        tests = [name for name in names_in(place) if name.startswith("test_") or name == "TestApp"]
        assert [name for name in tests if f"`{place}::{name}`" not in text] == []


def test_a_wrong_name_is_noticed() -> None:
    wrong = "`tests/faults/test_nothing.py::test_x` `tests/unit/test_reliability.py::test_y`"
    assert len(list(faults(wrong))) == 2
