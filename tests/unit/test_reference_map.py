"""The table of the reference system's features tells the truth about where its proof is."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAP = ROOT / "docs" / "REFERENCE_MAP.md"


def rows(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells and cells[0] != "reference" and not set(cells[0]) <= {"-"}:
            yield cells


@cache
def names_in(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in tree.body if isinstance(node, functions) and node.name.startswith("test_"))


def faults(text: str) -> Iterator[str]:
    for cells in rows(text):
        feature, proofs = cells[0], re.findall(r"`([^`]+)`", cells[-1])
        if len(cells) != 3 or not proofs:
            yield f"{feature}: wanted three columns, the last with a test"
        for proof in proofs:
            file, _, name = proof.partition("::")
            if not (ROOT / file).is_file() or name not in names_in(file):
                yield f"{feature}: there is no test {proof}"
        for place in re.findall(r"`((?:sidecar|rules|docs)/[\w./-]+)`", cells[1] if len(cells) > 1 else ""):
            if not (ROOT / place).exists():
                yield f"{feature}: there is no {place}"


def test_every_feature_names_places_and_tests_that_exist() -> None:
    text = MAP.read_text(encoding="utf-8")
    assert list(faults(text)) == []
    assert len(list(rows(text))) > 50


def test_a_wrong_row_is_noticed() -> None:
    found = list(
        faults(
            "| reference | here | proven by |\n|---|---|---|\n"
            "| a | `sidecar/nowhere.py` | `tests/unit/core/test_states.py::test_nothing` |\n| b | there | |\n"
        )
    )
    assert [fault.partition(":")[0] for fault in found] == ["a", "a", "b"]
