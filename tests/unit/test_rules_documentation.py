"""The rule reference: each of its examples loads, each rule type and key has one, each shipped file is named."""

import re
from pathlib import Path

import pytest
import yaml

from sidecar.rules.model import KINDS
from sidecar.settings.rule_files import load_rules
from sidecar.settings.rule_models import MODELS, NoDataSection, ProbeSection, StepSection

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "RULES.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_each_example_loads(example: str, tmp_path: Path) -> None:
    file = tmp_path / "example.yaml"
    file.write_text(example, encoding="utf-8")
    assert load_rules([str(file)], environ={}).rules


def _examples_of(kind: str) -> list[dict[str, object]]:
    groups = [group for example in EXAMPLES for group in yaml.safe_load(example)["groups"]]
    return [rule for group in groups for rule in group["rules"] if rule["type"] == kind]


def test_the_reference_describes_every_rule_type() -> None:
    assert set(re.findall(r"^## `([a-z_]+)`$", TEXT, re.MULTILINE)) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_each_key_of_each_rule_type_has_an_example(kind: str) -> None:
    # Common keys are shown once, on any type; a type's own keys are shown on that type.
    everywhere = set.intersection(*(set(model.keys()) for model in MODELS.values())) | {"source", "series"}
    shown_anywhere = {key for each in KINDS for rule in _examples_of(each) for key in rule}
    shown_here = {key for rule in _examples_of(kind) for key in rule}
    wanted = set(MODELS[kind].keys())
    assert wanted & everywhere <= shown_anywhere
    assert wanted - everywhere <= shown_here


@pytest.mark.parametrize("section", [NoDataSection, ProbeSection, StepSection])
def test_each_key_of_a_rule_within_has_an_example(
    section: type[NoDataSection] | type[ProbeSection] | type[StepSection],
) -> None:
    written = "\n".join(EXAMPLES)
    for key in section.keys():  # noqa: SIM118 - a class method of the section, not a mapping
        assert re.search(rf"\b{key}:", written), key


def test_each_shipped_file_is_named_with_the_metrics_it_needs() -> None:
    for file in (ROOT / "rules").glob("*.yaml"):
        if file.name.endswith(".test.yaml"):
            continue
        (row,) = [line for line in TEXT.splitlines() if line.startswith(f"| `{file.name}` |")]
        for rule in load_rules([str(file)], environ={}).rules:
            metrics = set(re.findall(r"\b[a-z_]+(?=\{)", rule.query or ""))
            missing = {one for one in metrics if one not in row and not one.startswith("killswitch_")}
            assert not missing, f"{file.name}: {rule.trigger}"
