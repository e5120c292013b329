"""The example in docs/RULE_TESTS.md does what the text around it says."""

import re
from pathlib import Path

from sidecar.rules.testing import run
from sidecar.settings.rule_tests import load_rule_tests, rule_tests_schema

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/RULE_TESTS.md").read_text()


def test_the_example_passes(tmp_path):
    example = next(block for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL) if "rule_files" in block)
    (tmp_path / "portfolio.yaml").write_text((ROOT / "rules/portfolio.yaml").read_text())
    (tmp_path / "example.test.yaml").write_text(example)
    (test,) = load_rule_tests(tmp_path / "example.test.yaml").tests
    assert run(test).passed


def test_every_key_is_described():
    schema = rule_tests_schema()
    tests = schema["$defs"]["TestSection"]["properties"]
    expectations = schema["$defs"]["ExpectSection"]["properties"]
    for key in (*schema["properties"], *(f"tests[].{key}" for key in tests), *expectations):
        assert f"`{key}`" in TEXT or key == "tests", key
