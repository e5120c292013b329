from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from sidecar.app.loosening import loosened_rules, loosened_settings
from sidecar.core.policy import GatePolicy, RecoveryPolicy, RestartStep, StepGate
from sidecar.core.states import Action, Restriction
from sidecar.rules.model import Expression, Group, Heartbeat, OnNoData, Operator, Rule, RuleSet, Step, Threshold
from sidecar.settings.config import (
    Alertmanager,
    Gate,
    Health,
    HealthQuery,
    Notify,
    Operations,
    Prometheus,
    Recovery,
    ScrapeTarget,
    Settings,
    Switch,
    Webhook,
)

BASE = Settings(switch=Switch(name="s"))
CONDITION = Threshold(query="q", operator=Operator.LT, threshold=-0.15, clear=-0.1)
RULE = Rule(trigger="dd", group="g", condition=CONDITION, for_=5.0, keep_firing_for=5.0, series=1)


def recovery(health: Health | None = None, **changes: Any) -> Settings:
    policy = replace(RecoveryPolicy(approvals=2), **changes)
    return replace(BASE, recovery=Recovery(policy=policy, health=health or Health()))


def gate(**changes: Any) -> Settings:
    limits = {"AAPL": Decimal(100)}
    return replace(BASE, gate=Gate(policy=replace(GatePolicy(position_limits=limits, blind_orders=False), **changes)))


QUERY = HealthQuery(name="lag", query="lag", operator="lt", threshold=1.0)
CHECKED = Health(min_memory_available=512, max_cpu_percent=80.0, queries=(QUERY,))


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        (recovery(), recovery(cooldown=1.0), "recovery.cooldown"),
        (recovery(), recovery(approvals=1), "recovery.approvals"),
        (recovery(), recovery(require_approval=False), "recovery.require_approval"),
        (recovery(), recovery(require_triggers_clear=False), "recovery.require_triggers_clear"),
        (recovery(), recovery(approval_ttl=9e9), "recovery.approval_ttl"),
        (recovery(), recovery(backoff_factor=1.0), "recovery.backoff"),
        (recovery(), recovery(backoff_max=1.0), "recovery.backoff"),
        (recovery(), recovery(steps=(RestartStep(factor=1.0),)), "recovery.steps"),
        (recovery(), recovery(Health(sources_up=False)), "recovery.health.sources_up"),
        (recovery(CHECKED), recovery(replace(CHECKED, min_memory_available=1)), "recovery.health.min_memory_available"),
        (recovery(CHECKED), recovery(replace(CHECKED, max_cpu_percent=None)), "recovery.health.max_cpu_percent"),
        (recovery(CHECKED), recovery(replace(CHECKED, queries=())), "recovery.health.queries"),
        (gate(), gate(killed_policy=Restriction.REDUCE_ONLY), "gate.killed_policy"),
        (gate(), gate(blind_orders=True), "gate.blind_orders"),
        (gate(), gate(trust_reduce_claim=True), "gate.trust_reduce_claim"),
        (gate(), gate(position_limits={"AAPL": Decimal(101)}), "gate.position_limits.AAPL"),
        (gate(), gate(position_limits={}), "gate.position_limits.AAPL"),
        (BASE, replace(BASE, prometheus=Prometheus(on_warnings="ignore")), "prometheus.on_warnings"),
    ],
)
def test_a_setting_that_allows_more_is_named_and_its_way_back_is_not(old: Settings, new: Settings, place: str) -> None:
    assert set(loosened_settings(old, new)) == {place}
    back = set(loosened_settings(new, old))
    assert back == ({place} if place == "recovery.steps" else set())


def test_a_symbol_that_gets_a_limit_of_its_own_above_that_of_all_others_is_loosened() -> None:
    old = gate(position_limits={"*": Decimal(500)})
    wider = gate(position_limits={"*": Decimal(500), "AAPL": Decimal(10_000)})
    assert loosened_settings(old, wider) == {"gate.position_limits.AAPL": ["500", "10000"]}
    assert loosened_settings(wider, old) == {}
    assert set(loosened_settings(gate(), old)) == {"gate.position_limits.AAPL"}  # 100, and now the 500 of all others


@pytest.mark.parametrize("labels", [{}, {"desk": "fx"}, {"desk": "eq", "site": "b"}])
def test_other_labels_which_may_make_a_rule_deaf_to_its_alerts_are_named(labels: dict[str, str]) -> None:
    old = replace(BASE, switch=Switch(name="s", labels={"desk": "eq"}))
    changes = loosened_settings(old, replace(BASE, switch=Switch(name="s", labels=labels)))
    assert changes == {"switch.labels": [{"desk": "eq"}, labels]}


def alerts(tokens_file: str | None = None, **webhook: Any) -> Settings:
    return replace(
        BASE, alertmanager=Alertmanager(webhook=Webhook(**webhook)), operations=Operations(tokens_file=tokens_file)
    )


def test_a_webhook_that_nobody_can_get_through_any_more_is_named() -> None:
    known, shut = alerts(token_file="/t"), alerts()
    assert loosened_settings(known, shut) == {"alertmanager.webhook": [["token_file"], []]}
    assert loosened_settings(shut, known) == {}
    assert loosened_settings(alerts(allow_unauthenticated=True), shut) == {
        "alertmanager.webhook": [["allow_unauthenticated"], []]
    }
    other_way = alerts("/tokens", token_file="/t")
    assert loosened_settings(other_way, alerts()) == {}  # these tokens hold until the next start


def test_an_alertmanager_that_is_told_nothing_any_more_is_named() -> None:
    def told(*urls: str) -> Settings:
        return replace(BASE, alertmanager=Alertmanager(notify=Notify(urls=urls)))

    both = told("http://a:9093", "http://b:9093")
    assert loosened_settings(both, told()) == {"alertmanager.notify.urls": [["http://a:9093", "http://b:9093"], []]}
    assert set(loosened_settings(both, told("http://a:9093"))) == {"alertmanager.notify.urls"}
    assert loosened_settings(told(), both) == {}


def test_another_source_of_truth_is_named_without_its_secrets() -> None:
    def asks(*urls: str) -> Settings:
        return replace(BASE, prometheus=Prometheus(urls=urls))

    old, new = asks("http://a:9090"), asks("https://ann:secret@b:9090/prefix")
    assert loosened_settings(old, new) == {"prometheus.urls": [["http://a:9090"], ["https://b:9090/prefix"]]}
    assert set(loosened_settings(old, asks("http://a:9090", "http://b:9090"))) == {"prometheus.urls"}
    assert loosened_settings(asks("http://a:9090", "http://b:9090"), old) == {}


def test_a_scrape_source_that_looks_elsewhere_is_named() -> None:
    def scrapes(**urls: str) -> Settings:
        return replace(BASE, scrape=tuple(ScrapeTarget(name=name, url=url) for name, url in urls.items()))

    old, new = scrapes(bot="http://a/metrics"), scrapes(bot="http://b/metrics?key=secret")
    assert loosened_settings(old, new) == {"scrape.bot.url": ["http://a/metrics", "http://b/metrics?…"]}
    assert loosened_settings(old, scrapes()) == {}  # its rules see nothing, which is strict enough
    assert loosened_settings(old, scrapes(bot="http://a/metrics", other="http://c")) == {}


def test_a_check_or_a_gate_that_bears_older_samples_is_shown_with_the_difference() -> None:
    old, new = recovery(CHECKED), recovery(replace(CHECKED, queries=(replace(QUERY, max_age=300.0),)))
    was, now = loosened_settings(old, new)["recovery.health.queries"]
    assert was != now
    gate = StepGate(query="up", operator="ge", threshold=1.0)
    one, other = (RestartStep(factor=1.0, gates=(found,)) for found in (gate, replace(gate, max_age=300.0)))
    was, now = loosened_settings(recovery(steps=(one,)), recovery(steps=(other,)))["recovery.steps"]
    assert was != now


def test_nothing_changed_is_nothing_loosened() -> None:
    assert loosened_settings(recovery(CHECKED), recovery(CHECKED)) == {}
    assert loosened_rules(rules(RULE), rules(RULE)) == {}


def rules(*some: Rule, interval: float = 1.0) -> RuleSet:
    return RuleSet(groups=(Group(name="g", interval=interval, rules=some),))


def condition(**changes: Any) -> Rule:
    return replace(RULE, condition=replace(CONDITION, **changes))


STEP = Step(at=-0.1, action=Action.HALT)


@pytest.mark.parametrize(
    ("new", "place"),
    [
        (replace(RULE, enabled=False), ""),
        (replace(RULE, shadow=True), ""),
        (replace(RULE, condition=Expression(expr="q")), ""),
        (replace(RULE, action=Action.HALT), ".action"),
        (replace(RULE, for_=6.0), ".for"),
        (replace(RULE, keep_firing_for=4.0), ".keep_firing_for"),
        (replace(RULE, max_age=90.0), ".max_age"),
        (replace(RULE, series=None), ".series"),
        (replace(RULE, source="scrape:x"), ".source"),
        (replace(RULE, on_no_data=OnNoData(hold_for=61.0)), ".on_no_data.hold_for"),
        (replace(RULE, on_no_data=OnNoData(then=Action.HALT)), ".on_no_data.then"),
        (replace(RULE, on_no_data=OnNoData(unreachable=Action.WARN)), ".on_no_data.unreachable"),
        (condition(threshold=-0.2), ".threshold"),
        (condition(operator=Operator.LE), ".threshold"),
        (condition(query="p"), ".query"),
        (condition(clear=-0.14), ".clear"),
        (condition(clear=None), ".clear"),
    ],
)
def test_a_rule_that_became_milder_is_named_with_the_place(new: Rule, place: str) -> None:
    assert set(loosened_rules(rules(RULE), rules(new))) >= {f"rules.dd{place}"}


def test_a_rule_that_is_gone_is_named() -> None:
    assert loosened_rules(rules(RULE), rules()) == {"rules.dd": ["enforcing", "removed"]}


def test_a_tighter_threshold_a_new_rule_and_one_that_only_warned_are_nothing() -> None:
    quiet = OnNoData(then=Action.WARN, unreachable=Action.WARN)
    warns = replace(RULE, trigger="w", action=Action.WARN, on_no_data=quiet)
    assert loosened_rules(rules(RULE, warns), rules(condition(threshold=-0.1), replace(RULE, trigger="new"))) == {}


@pytest.mark.parametrize("threshold", [4.0, 6.0])
def test_any_other_value_of_an_equality_is_named(threshold: float) -> None:
    old = replace(RULE, condition=Threshold(query="q", operator=Operator.EQ, threshold=5.0))
    new = replace(RULE, condition=Threshold(query="q", operator=Operator.EQ, threshold=threshold))
    assert set(loosened_rules(rules(old), rules(new))) == {"rules.dd.threshold"}


def test_a_step_with_a_milder_action_at_the_same_place_is_shown_with_the_difference() -> None:
    milder = condition(steps=(replace(STEP, action=Action.WARN),))
    changes = loosened_rules(rules(condition(steps=(STEP,))), rules(milder))
    was, now = changes["rules.dd.steps"]
    assert was != now


def stepped(*steps: Step, **changes: Any) -> Rule:
    return condition(steps=steps, **changes)


THROTTLE = Step(at=-0.1, action=Action.THROTTLE, factor=0.5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (RULE, stepped(STEP)),
        (stepped(STEP), stepped(replace(STEP, at=-0.05))),
        (stepped(STEP), stepped(STEP, replace(THROTTLE, at=-0.05))),
        (stepped(replace(STEP, action=Action.WARN)), stepped(STEP)),
        (stepped(THROTTLE), stepped(replace(THROTTLE, factor=0.25))),
        (stepped(THROTTLE), stepped(STEP)),
        (stepped(replace(STEP, fraction=0.5, at=-0.075)), stepped(replace(STEP, at=-0.05), threshold=-0.1)),
        (stepped(STEP), condition(threshold=-0.05)),
        (condition(clear=-0.1), condition(clear=-0.05)),
    ],
    ids=["added", "earlier", "one more", "stricter", "less", "halt", "in percent", "the rule itself", "clear"],
)
def test_steps_that_are_as_early_and_as_strict_are_nothing_and_their_way_back_is_named(old: Rule, new: Rule) -> None:
    assert loosened_rules(rules(old), rules(new)) == {}
    assert loosened_rules(rules(new), rules(old)) != {}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (stepped(STEP), RULE),
        (stepped(STEP), stepped(replace(STEP, at=-0.11))),
        (stepped(STEP), condition(threshold=-0.1)),  # at -0.1 the step holds and `< -0.1` does not
        (stepped(THROTTLE), stepped(replace(THROTTLE, factor=0.75))),
        (stepped(STEP, THROTTLE), stepped(THROTTLE)),
        (stepped(STEP), stepped(STEP, operator=Operator.GT)),
    ],
    ids=["gone", "later", "only beyond", "more", "one less", "another direction"],
)
def test_a_step_that_comes_later_or_is_milder_is_named(old: Rule, new: Rule) -> None:
    assert "rules.dd" in {place.rpartition(".")[0] for place in loosened_rules(rules(old), rules(new))}


@pytest.mark.parametrize("operator", [Operator.GT, Operator.GE])
def test_a_rule_on_too_much_is_looser_where_a_step_comes_at_more(operator: Operator) -> None:
    step = Step(at=50.0, action=Action.HALT)
    old = replace(RULE, condition=Threshold(query="q", operator=operator, threshold=100.0, steps=(step,)))
    later = replace(RULE, condition=replace(old.condition, steps=(replace(step, at=75.0),)))
    assert set(loosened_rules(rules(old), rules(later))) == {"rules.dd.steps"}
    assert loosened_rules(rules(later), rules(old)) == {}


def test_what_the_gate_trusts_more_is_shown_as_it_is_written() -> None:
    assert loosened_settings(gate(), gate(blind_orders=True)) == {"gate.blind_orders": ["deny", "allow"]}
    assert loosened_settings(gate(), gate(trust_reduce_claim=True)) == {"gate.trust_reduce_claim": [False, True]}


def test_a_slower_heartbeat_and_a_slower_group_are_named() -> None:
    old = replace(RULE, condition=Heartbeat(query="b", max_missed=3))
    new = replace(RULE, condition=Heartbeat(query="b", max_missed=4))
    assert set(loosened_rules(rules(old), rules(new))) == {"rules.dd.interval"}
    assert loosened_rules(rules(RULE), rules(RULE, interval=5.0)) == {"rules.dd (interval of its group)": [1.0, 5.0]}
