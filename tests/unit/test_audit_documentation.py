"""docs/AUDIT.md names every type of event that the code writes, and no other."""

import ast
import re
from pathlib import Path

from sidecar.app.audit_trail import CAUSE_ADDED, TYPES

ROOT = Path(__file__).parents[2]
APP = ROOT / "sidecar" / "app"
# Calls whose first argument is a type, given as it stands: the maker of events, and what each module wraps around it.
CALLS = {"audit_event", "_audit", "_audit_status", "_announce", "_attempt"}


def written() -> set[str]:
    found = {*TYPES.values(), CAUSE_ADDED}
    for path in APP.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and _name(node.func) in CALLS:
                found |= {literal for literal in _texts(node.args[0]) if "." in literal}
    return found


def _name(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def _texts(node: ast.expr) -> list[str]:
    return [one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]


def documented() -> set[str]:
    rows = re.findall(r"^\| (`[a-z_.`, ]+`) \|", (ROOT / "docs" / "AUDIT.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"[a-z_]+\.[a-z_]+", row)}


def test_the_table_of_audit_events_is_the_codes_own():
    assert len(written()) > 30
    assert documented() == written()
