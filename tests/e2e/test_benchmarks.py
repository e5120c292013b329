"""`make bench` works: everything it promises can be measured. Its figures are for people, and no test looks at them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.usefixtures("_programs")]


def test_every_figure_can_be_measured_and_compared_with_an_earlier_run(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, ROOT / "tests" / "benchmarks" / "run.py", "--brief"]
    first = subprocess.run([*command, "--json", report], capture_output=True, text=True, timeout=500, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    measured = json.loads(report.read_text())
    assert measured["failures"] == {}
    titles = [section["title"].split(".")[0] for section in measured["sections"]]
    assert titles == ["1", "2", "3", "3b", "4", "5", "5b", "5c", "6a", "6b", "7"]
    figures = [figure for section in measured["sections"] for figure in section["figures"]]
    # A slope between two short measurements may be anything.
    odd = [figure for figure in figures if not (figure["value"] > 0 or figure["name"].startswith("slope"))]
    assert odd == []
    again = [*command, "--only", "page", "--against", report]
    second = subprocess.run(again, capture_output=True, text=True, timeout=100, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "× the earlier" in second.stdout
