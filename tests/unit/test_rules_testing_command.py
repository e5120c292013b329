"""`killswitch rules test`: what it runs, what it prints, how it ends."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from sidecar.cli.main import killswitch

RULES = """
groups:
  - name: portfolio
    interval: 1s
    rules:
      - {trigger: drawdown, type: threshold, query: min(dd), operator: lt, threshold: -0.15}
"""
TESTS = """
tests:
  - name: a drawdown kills
    input: {drawdown: '-0.01x5 -0.16'}
    expect:
      - {at: 5s, state: ACTIVE}
      - {at: 30s, state: KILLED, triggers: {drawdown: {status: firing}}}
"""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in ("KILLSWITCH_CONFIG", "KILLSWITCH_SOCKET", "POD_NAME", "POD_NAMESPACE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "x.yaml").write_text(RULES)
    (tmp_path / "x.test.yaml").write_text(TESTS)
    (tmp_path / "y.yaml").write_text(RULES.replace("drawdown", "other"))
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(killswitch, ["rules", "test", *map(str, arguments)])


def test_tests_that_pass_end_with_0(folder):
    result = run("x.test.yaml")
    assert (result.exit_code, result.output) == (0, "x.test.yaml: 1 passed\n")


def test_rule_files_bring_the_tests_beside_them_and_each_is_run_once(folder):
    result = run("x.yaml", "x.test.yaml", "y.yaml")
    assert (result.exit_code, result.output) == (0, "x.test.yaml: 1 passed\n")


def test_a_folder_stands_for_its_yaml_files(folder):
    (folder / "alone.test.yaml").write_text(TESTS.replace("tests:", "rule_files: [x.yaml]\ntests:"))
    (folder / ".hidden.test.yaml").write_text("colour: red\n")
    (folder / "empty").mkdir()
    told = "{0}alone.test.yaml: 1 passed\n{0}x.test.yaml: 1 passed\n"
    result = run(".")
    assert (result.exit_code, result.output) == (0, told.format(""))
    result = run(folder)
    assert (result.exit_code, result.output) == (0, told.format(f"{folder}/"))
    result = run("empty")
    assert (result.exit_code, "No tests found for empty" in result.output) == (1, True)


def test_a_failure_says_where_when_what_was_expected_and_what_was_seen(folder):
    (folder / "x.test.yaml").write_text(TESTS.replace("KILLED", "ACTIVE"))
    result = run("x.test.yaml")
    assert result.exit_code == 1
    assert result.output == (
        "FAILED x.test.yaml:3: a drawdown kills\n"
        "  x.test.yaml:7: at 30s: state: expected ACTIVE, but it is KILLED\n"
        "      the switch: KILLED, restriction halt, factor 0, causes drawdown: breach; gate: deny as killed\n"
        "      drawdown: firing, health no_data, value -0.16, missing: the query returned nothing\n"
        "x.test.yaml: 0 passed, 1 failed\n"
    )


def test_a_rule_that_no_longer_does_what_was_written_down_fails(folder):
    (folder / "x.yaml").write_text(RULES.replace("-0.15", "-0.50"))
    assert run("x.test.yaml").exit_code == 1


def test_a_file_that_cannot_be_read_does_not_keep_the_others_from_being_run(folder):
    (folder / "y.test.yaml").write_text("tests: []\ncolour: red\n")
    result = run("x.test.yaml", "y.test.yaml")
    assert result.exit_code == 1
    assert "x.test.yaml: 1 passed" in result.output
    assert "y.test.yaml:1: tests: is empty" in result.output
    assert "y.test.yaml:2: colour: unknown key" in result.output
    assert "y.test.yaml: 0 passed, cannot be run" in result.output


def test_json_says_the_same(folder):
    (folder / "x.test.yaml").write_text(TESTS.replace("KILLED", "ACTIVE"))
    (folder / "y.test.yaml").write_text("tests: []\n")
    result = run("x.test.yaml", "y.test.yaml", "--output", "json")
    assert result.exit_code == 1
    document = json.loads(result.output)
    assert document["ok"] is False
    failed, unread = document["files"]
    (test,) = failed["tests"]
    assert (test["passed"], test["mismatches"][0]["what"], test["mismatches"][0]["at_seconds"]) == (
        False,
        "state",
        30.0,
    )
    assert (test["mismatches"][0]["expected"], test["mismatches"][0]["seen"]) == ("ACTIVE", "KILLED")
    assert unread["problems"] == ["y.test.yaml:1: tests: is empty; write at least one test"]
    assert json.loads(run("x.yaml", "--output", "json").output)["files"][0]["file"] == "x.test.yaml"


def test_without_files_those_beside_the_configured_rules_are_run(folder):
    (folder / "config.yml").write_text(f"switch: {{name: '${{POD_NAME}}'}}\nrules: {{files: [{folder}/*.yaml]}}\n")
    result = run("--config", "config.yml")
    assert result.exit_code == 0, result.output
    assert "x.test.yaml: 1 passed" in result.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["gone.yaml"], "There is no file gone.yaml."),
        (["y.yaml"], "No tests found for y.yaml"),
        (["gone.test.yaml"], "gone.test.yaml:1: (file): cannot be read"),
        ([], "There is no configuration in"),
        (["--config", "broken.yml"], "broken.yml:1: colour: unknown key"),
    ],
)
def test_what_cannot_be_found_is_an_error(folder, arguments, complaint, monkeypatch):
    monkeypatch.setenv("KILLSWITCH_CONFIG", str(folder / "none.yaml"))
    (folder / "broken.yml").write_text("colour: red\nswitch: {name: a}\n")
    result = run(*arguments)
    assert result.exit_code == 1
    assert complaint in result.output


def test_a_test_that_needs_promtool_says_so_and_the_others_are_run(folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    (folder / "x.test.yaml").write_text(
        TESTS + "  - {name: b, metrics: [{series: dd, values: 0}], expect: [{at: 0s, state: ACTIVE}]}\n"
    )
    result = run("x.test.yaml")
    assert result.exit_code == 1
    assert "x.test.yaml:8: b: promtool is not installed" in result.output
    assert "x.test.yaml: 1 passed, some cannot be run" in result.output


def test_every_shipped_pack_has_tests():
    rules = Path(__file__).parents[2] / "rules"
    packs = [path for path in rules.glob("*.yaml") if not path.name.endswith(".test.yaml")]
    assert len(packs) >= 6
    for pack in packs:
        assert pack.with_suffix(".test.yaml").exists(), pack.name
