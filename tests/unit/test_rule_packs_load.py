"""The shipped rules as they are loaded: alone, all together, without a doubt, and each able to act as it says."""

from pathlib import Path

import pytest

from sidecar.core.states import Action
from sidecar.rules.model import Rule, Threshold
from sidecar.settings.rule_files import check_rules

RULES = Path(__file__).parents[2] / "rules"
PACKS = ("portfolio", "market-data", "venue", "runaway", "meta")
ENVIRONMENTS: tuple[dict[str, str], ...] = ({}, {"KILLSWITCH_SELECTOR": 'namespace="trading",pod="bot-1"'})


def _rules(*names: str, environ: dict[str, str] | None = None) -> dict[str, Rule]:
    rules, doubts = check_rules([str(RULES / f"{name}.yaml") for name in names], environ=environ or {})
    assert doubts == ()
    return {rule.trigger: rule for rule in rules.rules}


@pytest.mark.parametrize("environ", ENVIRONMENTS, ids=["no selector", "selector"])
@pytest.mark.parametrize("pack", PACKS)
def test_each_pack_loads_without_a_doubt(pack: str, environ: dict[str, str]) -> None:
    assert _rules(pack, environ=environ)


def test_all_packs_load_beside_the_default_rules() -> None:
    _rules("default", *PACKS)


@pytest.mark.parametrize("pack", PACKS)
def test_every_rule_says_in_words_what_happened_and_how_severe_it_is(pack: str) -> None:
    for rule in _rules(pack).values():
        assert dict(rule.annotations)["summary"], rule.trigger
        assert dict(rule.labels)["severity"] in {"critical", "warning"}, rule.trigger


@pytest.mark.parametrize("pack", PACKS)
def test_the_selector_stands_in_every_query(pack: str) -> None:
    for rule in _rules(pack, environ={"KILLSWITCH_SELECTOR": 'pod="bot-1"'}).values():
        if rule.query is not None:
            assert rule.query.count("{") == rule.query.count('pod="bot-1"') > 0, rule.trigger


def test_the_drawdown_ladder_answers_in_milder_steps_before_it_kills() -> None:
    rule = _rules("portfolio")["drawdown_ladder"]
    assert isinstance(rule.condition, Threshold)
    assert [(step.at, step.action, step.factor) for step in rule.condition.steps] == [
        (-0.075, Action.WARN, None),
        (-0.1125, Action.THROTTLE, 0.5),
        (-0.135, Action.REDUCE_ONLY, None),
    ]
    assert (rule.condition.threshold, rule.action) == (-0.15, Action.KILL)


@pytest.mark.parametrize("pack", ["market-data", "venue"])
def test_what_heals_by_itself_never_latches_even_when_blind(pack: str) -> None:
    for rule in _rules(pack).values():
        assert max(rule.action, rule.on_no_data.then, rule.on_no_data.unreachable) < Action.KILL, rule.trigger


def test_a_sidecar_that_is_not_well_is_reported_and_stops_nobody() -> None:
    reported = [rule for rule in _rules("meta").values() if rule.group == "sidecar"]
    assert len(reported) == 5
    assert not any(rule.enforcing for rule in reported)


def test_only_what_needs_an_address_or_a_second_price_is_off_as_shipped() -> None:
    off = {rule.trigger for rule in _rules(*PACKS).values() if not rule.enabled}
    assert off == {"price_deviation", "venue_port", "venue_api"}
