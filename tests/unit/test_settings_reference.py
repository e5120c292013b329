"""The reference and the schemas are what the code says."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.settings import reference

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", list(reference.files()))
def test_what_is_committed_is_current(name: str) -> None:
    committed = (ROOT / name).read_text(encoding="utf-8")
    assert committed == reference.files()[name], "run python -m sidecar.settings.reference"


def patterns(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "pattern" and isinstance(item, str):
                yield item
            yield from patterns(item)
    elif isinstance(value, list):
        for item in value:
            yield from patterns(item)


@pytest.mark.parametrize("name", ["config", "rules"])
def test_every_pattern_takes_a_variable(name: str) -> None:
    schema = json.loads((ROOT / f"docs/schema/{name}.schema.json").read_text())
    found = set(patterns(schema))
    assert found
    assert all(re.search(pattern, "${VAR:-x}") for pattern in found)


def test_every_key_is_explained() -> None:
    rows = [line for line in reference.configuration_markdown().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []
