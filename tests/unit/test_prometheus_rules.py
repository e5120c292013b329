"""The alerts for Prometheus: routable, explained in the runbook, about metrics that exist, and all of them tested."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.app.alerts import ORIGIN_LABEL
from sidecar.settings.rule_files import rule_paths

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rules" / "prometheus"
GROUPS = yaml.safe_load((FOLDER / "killswitch.rules.yaml").read_text(encoding="utf-8"))["groups"]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
TESTS = yaml.safe_load((FOLDER / "killswitch.rules.test.yaml").read_text(encoding="utf-8"))["tests"]


def headings(page: str) -> set[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return {heading.lower() for heading in re.findall(r"^#+ (\w+)$", text, re.MULTILINE)}


def test_no_two_alerts_have_one_name() -> None:
    assert len(ALERTS) == sum("alert" in rule for rule in RULES)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_can_be_routed_and_tells_people_what_is_wrong_and_what_to_do(name: str) -> None:
    labels, annotations = ALERTS[name]["labels"], ALERTS[name]["annotations"]
    assert labels["severity"] in {"critical", "warning", "info"}
    assert {"summary", "description", "runbook_url"} == set(annotations)
    page, _, heading = annotations["runbook_url"].partition("#")
    assert heading == name.lower()
    assert heading in headings(page)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_about_a_sidecar_never_triggers_one(name: str) -> None:
    assert ALERTS[name]["labels"][ORIGIN_LABEL] == "prometheus"


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_is_tested_going_bad_and_coming_back(name: str) -> None:
    seen = [
        [bool(check["exp_alerts"]) for check in test["alert_rule_test"] if check["alertname"] == name] for test in TESTS
    ]
    assert any(rise and fall for rise, fall in ((_moves(one, up=True), _moves(one, up=False)) for one in seen))


def _moves(firing: list[bool], *, up: bool) -> bool:
    return any(before is not up and after is up for before, after in pairwise(firing))


def test_the_rules_ask_for_metrics_that_exist() -> None:
    documented = set(re.findall(r"^\| `(killswitch_\w+)` \|", (ROOT / "docs/METRICS.md").read_text(), re.MULTILINE))
    asked = {re.sub(r"_(bucket|count|sum)$", "", name) for rule in RULES for name in _metrics(rule["expr"])}
    assert asked - {"killswitch_origin"} <= documented


def _metrics(expr: str) -> list[str]:
    return re.findall(r"\bkillswitch_\w+", expr)


def test_every_alert_of_the_runbook_is_one_that_somebody_sends() -> None:
    pushed = re.findall(r'"(Killswitch[A-Za-z]+)"', (ROOT / "sidecar/app/notifications.py").read_text())
    sent = {name.lower() for name in {*pushed, *ALERTS}}
    assert {heading for heading in headings("docs/RUNBOOK.md") if heading.startswith("killswitch")} == sent


def test_the_sidecar_does_not_take_them_for_rules_of_its_own() -> None:
    found = [Path(path).name for path in rule_paths([str(ROOT / "rules" / "*.yaml")])]
    assert "default.yaml" in found
    assert "killswitch.rules.yaml" not in found
