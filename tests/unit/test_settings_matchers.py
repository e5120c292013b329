"""Matchers in configuration and rule files are checked where they stand."""

from pathlib import Path

import pytest

from sidecar.core.errors import RuleFileError, SettingsError
from sidecar.settings.config import load_settings
from sidecar.settings.rule_files import load_rules


def test_a_wrong_matcher_of_the_webhook_is_refused_with_file_and_line(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "switch: {name: s}\nalertmanager:\n  webhook:\n    match:\n      - 'killswitch=\"kill\"'\n      - 'severity'\n"
    )
    with pytest.raises(SettingsError) as raised:
        load_settings(str(config), {})
    assert f"{config}:6: alertmanager.webhook.match[1]: 'severity' is not an Alertmanager matcher" in str(raised.value)


def test_a_wrong_matcher_of_a_rule_is_refused_with_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(
        "groups:\n"
        "  - name: g\n"
        "    rules:\n"
        "      - trigger: external\n"
        "        type: alertmanager\n"
        "        match:\n"
        "          - 'a=~\"(\"'\n"
    )
    with pytest.raises(RuleFileError) as raised:
        load_rules((str(file),), 5.0, {}, frozenset())
    assert f"{file}:7:" in str(raised.value)
    assert "match[0]" in str(raised.value)
    assert "regular expression" in str(raised.value)


def test_good_matchers_are_taken_as_written(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(
        "groups:\n"
        "  - name: g\n"
        "    rules:\n"
        '      - {trigger: external, type: alertmanager, match: [\'{"bot.name"="a",b!~"x|y"}\']}\n'
    )
    (rule,) = load_rules((str(file),), 5.0, {}, frozenset()).rules
    assert rule.condition.match == ('{"bot.name"="a",b!~"x|y"}',)  # type: ignore[union-attr]
