"""What the README shows is valid, and what it points to exists."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from sidecar.settings.config import load_settings
from sidecar.settings.rule_files import load_rules

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_configuration_and_the_rule_are_good(tmp_path: Path) -> None:
    config, rule = _blocks("yaml")
    (tmp_path / "rules").mkdir()
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "rules" / "drawdown.yaml").write_text(rule)
    settings = load_settings(str(tmp_path / "config.yaml"), {})
    rules = load_rules(settings.rules.files, settings.rules.interval, {}, settings.scrape_names)
    assert [one.trigger for one in rules.rules] == ["portfolio_drawdown"]


def test_the_rules_are_checked_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sidecar.cli.main import killswitch

    (tmp_path / "rules").mkdir()
    for name, text in zip(("config.yaml", "rules/drawdown.yaml"), _blocks("yaml"), strict=True):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KILLSWITCH_CONFIG", raising=False)
    (check,) = re.findall(r"^killswitch (rules check .*)$", README, re.MULTILINE)
    checked = CliRunner().invoke(killswitch, check.split())
    assert checked.exit_code == 0, checked.output


def test_the_python_example_runs_and_denies_where_no_sidecar_is(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = _blocks("python")
    exec(compile(example.replace("9780", "9"), "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("stale trading is blocked")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_a_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_every_command_that_it_shows_exists() -> None:
    from sidecar.cli.main import killswitch

    shown = {
        words
        for block in _blocks("sh")
        for words in re.findall(r"^(?:\.venv/bin/)?killswitch ([a-z-]+)", block, re.MULTILINE)
    }
    known = set(killswitch.list_commands(None))  # type: ignore[arg-type]
    assert shown
    assert shown <= known
