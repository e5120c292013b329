"""Whole files, good and bad: every bad one carries the exact list of its problems in lines that begin with `#! `."""

from pathlib import Path

import pytest

from sidecar.core.errors import RuleFileError, SettingsError
from sidecar.rules.model import RuleSet
from sidecar.settings.config import Settings, load_settings
from sidecar.settings.problems import RuleFileProblems, SettingsProblems
from sidecar.settings.rule_files import load_rules

DATA = Path(__file__).parent / "settings_data"
ENVIRON = {"POD_NAME": "bot-1", "POD_NAMESPACE": "trading", "EMPTY": "", "TRICKY": "a: b\n- {c: d}"}


def load(path: Path) -> Settings | RuleSet:
    if path.name.startswith("config_"):
        return load_settings(path, ENVIRON)
    return load_rules([str(path)], 5.0, ENVIRON, {"trader"})


@pytest.mark.parametrize("path", sorted(DATA.glob("*.good.yaml")), ids=lambda path: path.name)
def test_a_good_file_loads(path: Path) -> None:
    assert isinstance(load(path), Settings | RuleSet)


@pytest.mark.parametrize("path", sorted(DATA.glob("*.bad.yaml")), ids=lambda path: path.name)
def test_a_bad_file_reports_all_its_problems_at_once_with_line_and_key(path: Path) -> None:
    expected = [line[3:] for line in path.read_text().splitlines() if line.startswith("#! ")]
    assert expected, "a bad file says what is wrong with it"
    is_config = path.name.startswith("config_")
    with pytest.raises(SettingsError if is_config else RuleFileError) as caught:
        load(path)
    assert isinstance(caught.value, SettingsProblems | RuleFileProblems)
    found = [f"{one.line}: {one.key}: {one.reason}".replace(f"{DATA}/", "") for one in caught.value.problems]
    assert found == expected
    assert str(caught.value).splitlines()[0].startswith(f"{path}:")
