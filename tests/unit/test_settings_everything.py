"""Configuration and rule files with problems in both: one reading tells all of them."""

from pathlib import Path

import pytest

from sidecar.app.main import serve
from sidecar.core.errors import RuleFileError, SettingsError
from sidecar.settings.everything import load_everything

BAD_CONFIG = "switch: {name: s}\nscrape: [{name: trader, url: ftp://x}]\nrules: {files: [rules/*.yaml], every: 5s}\n"
BAD_RULES = (
    "groups:\n- name: g\n  rules:\n"
    "  - {trigger: a, type: threshold, query: up, operator: lt}\n"
    "  - {trigger: b, type: threshold, query: up, operator: lt, threshold: 1, source: scrape:trader}\n"
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "a.yaml").write_text(BAD_RULES)
    (tmp_path / "config.yaml").write_text(BAD_CONFIG)
    return tmp_path / "config.yaml"


def places(error: Exception, folder: Path) -> list[str]:
    lines = str(error).splitlines()
    assert all(line.startswith(f"{folder}/") for line in lines)
    return [line.removeprefix(f"{folder}/").split(": ")[0] for line in lines]


def test_the_problems_of_configuration_and_rule_files_are_told_at_once(config: Path) -> None:
    with pytest.raises(SettingsError) as raised:
        load_everything(config, {})
    # Nothing is said against the rule that names a source of a section with another fault.
    assert places(raised.value, config.parent) == ["config.yaml:2", "config.yaml:3", "rules/a.yaml:4"]


def test_a_good_configuration_leaves_the_problems_of_its_rules(config: Path) -> None:
    config.write_text("switch: {name: s}\nscrape: [{name: trader, url: http://x}]\nrules: {files: [rules]}\n")
    with pytest.raises(RuleFileError) as raised:
        load_everything(config, {})
    assert places(raised.value, config.parent) == ["rules/a.yaml:4"]
    (config.parent / "rules" / "a.yaml").write_text(BAD_RULES.replace("operator: lt}", "operator: lt, threshold: 1}"))
    _, rules = load_everything(config, {})
    assert [rule.trigger for rule in rules.rules] == ["a", "b"]


@pytest.mark.parametrize("text", ["a: [", "[]", "rules: {files: 5}", "rules: 5\nscrape: {a: b}", ""])
def test_a_configuration_that_does_not_say_where_its_rules_are_is_told_alone(config: Path, text: str) -> None:
    config.write_text(text)
    with pytest.raises(SettingsError) as raised:
        load_everything(config, {})
    assert "a.yaml" not in str(raised.value)


def test_serve_tells_all_of_them_and_ends(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve(str(config), {}) == 1
    told = capsys.readouterr().err
    assert "config.yaml:3: rules.every" in told
    assert "a.yaml:4" in told
