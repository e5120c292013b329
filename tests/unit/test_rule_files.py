"""Rule files: which are read, what they become, what `rules check` doubts, and the rules that we ship."""

from pathlib import Path

import pytest

from sidecar.core.states import Action
from sidecar.rules.model import Connectivity, Heartbeat, OnNoData, Operator, RuleSet, Step, Threshold, Watchdog
from sidecar.settings.problems import RuleFileProblems
from sidecar.settings.rule_files import check_rules, load_rules

DATA = Path(__file__).parent / "settings_data"
ROOT = Path(__file__).parents[2]


def rule(name: str, **more: str) -> str:
    keys = {"type": "threshold", "query": "x", "operator": "lt", "threshold": "-1", **more}
    return f"groups:\n  - name: g\n    rules:\n      - trigger: {name}\n" + "".join(
        f"        {key}: {value}\n" for key, value in keys.items()
    )


def load(path: Path) -> RuleSet:
    return load_rules([str(path)], 5.0, {"POD_NAME": "bot-1"}, {"trader"})


def doubts(tmp_path: Path, **keys: str) -> list[str]:
    (tmp_path / "a.yaml").write_text(rule("t", **keys))
    _, found = check_rules([str(tmp_path / "a.yaml")], 5.0, {}, {"s"})
    return [f"{one.line}: {one.key.rpartition('.')[2]}: {one.reason}" for one in found]


def test_a_rule_becomes_what_was_written() -> None:
    first = load(DATA / "rules_full.good.yaml").rules[0]
    assert first.condition == Threshold(
        query='min(portfolio_drawdown_ratio{pod="bot-1"})',
        operator=Operator.LT,
        threshold=-0.15,
        clear=-0.10,
        steps=(
            Step(at=-0.075, fraction=0.5, action=Action.WARN),
            Step(at=-0.1125, fraction=0.75, action=Action.THROTTLE, factor=0.5),
            Step(at=-0.135, action=Action.REDUCE_ONLY),
        ),
    )
    assert (first.series, first.group, first.origin) == (1, "portfolio", f"{DATA / 'rules_full.good.yaml'}:5")
    assert first.on_no_data == OnNoData()


def test_a_group_without_interval_takes_that_of_the_configuration() -> None:
    assert [group.interval for group in load(DATA / "rules_full.good.yaml").groups] == [1.0, 5.0]


def test_a_warning_rule_that_is_blind_only_warns_unless_it_says_otherwise() -> None:
    rules = {one.trigger: one for one in load(DATA / "rules_full.good.yaml").rules}
    assert (rules["e"].on_no_data.then, rules["e"].on_no_data.unreachable) == (Action.WARN, Action.WARN)
    assert (rules["h"].on_no_data.then, rules["h"].on_no_data.unreachable) == (Action.THROTTLE, Action.WARN)
    assert not rules["e"].enforcing
    assert rules["h"].enforcing


def test_a_probe_never_waits_longer_than_its_interval_by_default() -> None:
    conditions = {one.trigger: one.condition for one in load(DATA / "rules_full.good.yaml").rules}
    assert isinstance(conditions["c1"], Connectivity)
    assert conditions["c1"].timeout == 2.0


def test_the_rules_we_ship_are_the_six_of_the_reference_and_raise_no_doubt() -> None:
    rules, found = check_rules([str(ROOT / "rules/default.yaml")], 5.0, {})
    by_name = {one.trigger: one for one in rules.rules}
    assert found == ()
    names = "portfolio_drawdown daily_loss volatility_spike trading_heartbeat system_health exchange_disconnect"
    assert list(by_name) == names.split()
    limits = {
        name: (one.condition.operator.symbol, one.condition.threshold)
        for name, one in by_name.items()
        if isinstance(one.condition, Threshold)
    }
    assert limits == {"portfolio_drawdown": ("<", -0.15), "daily_loss": ("<", -0.05), "volatility_spike": (">", 0.10)}
    assert (by_name["volatility_spike"].enabled, by_name["volatility_spike"].cooldown) == (False, 3600.0)
    heartbeat, health = by_name["trading_heartbeat"].condition, by_name["system_health"]
    assert isinstance(heartbeat, Heartbeat)
    assert heartbeat.limit == 180.0
    assert health.condition == Watchdog(memory_percent=90.0, cpu_percent=95.0)
    assert (health.action, health.enforcing) == (Action.WARN, False)
    exchange = by_name["exchange_disconnect"].condition
    assert isinstance(exchange, Connectivity)
    assert (exchange.interval, exchange.max_consecutive_failures) == (30.0, 3)


def test_the_rules_we_ship_take_a_selector_from_the_environment() -> None:
    rules = load_rules([str(ROOT / "rules/default.yaml")], 5.0, {"KILLSWITCH_SELECTOR": 'pod="bot-1"'})
    assert rules.rules[0].query == 'min(portfolio_drawdown_ratio{pod="bot-1"})'


def test_files_are_sorted_tests_are_skipped_and_hidden_ones_not_found(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.yaml", "a.test.yaml", ".c.yaml", "d.yml"):
        (tmp_path / name).write_text(rule(name.replace(".", "_").strip("_")))
    (tmp_path / "e.yaml").mkdir()
    assert load(tmp_path / "*.yaml").files == (str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"))


def test_a_mounted_configmap_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "..2026_11_22").mkdir()
    (tmp_path / "..2026_11_22" / "a.yaml").write_text(rule("t"))
    (tmp_path / "..data").symlink_to("..2026_11_22")
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    patterns = [str(tmp_path / "*.yaml"), str(tmp_path / "**/*.yaml"), str(tmp_path / "..data/*.yaml")]
    assert load_rules(patterns, 5.0, {}).files == (str(tmp_path / "a.yaml"),)


def test_patterns_that_match_nothing_at_all_give_a_set_without_files(tmp_path: Path) -> None:
    rules = load_rules([str(tmp_path / "*.yaml"), str(tmp_path / "gone.yaml")], 5.0, {})
    assert (rules.files, rules.rules) == ((), ())


def test_a_file_named_outright_and_missing_among_others_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(rule("t"))
    with pytest.raises(RuleFileProblems, match=r"gone\.yaml:1: \(file\): there is no such file"):
        load_rules([str(tmp_path / "a.yaml"), str(tmp_path / "gone.yaml")], 5.0, {})


def test_a_dangling_link_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").symlink_to("gone")
    with pytest.raises(RuleFileProblems, match="No such file"):
        load(tmp_path / "*.yaml")


def test_the_problems_of_all_files_come_together_and_name_both_places_of_a_taken_trigger(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(rule("t", threshold="nan"))
    (tmp_path / "b.yaml").write_text(rule("t", operator="less"))
    with pytest.raises(RuleFileProblems) as caught:
        load(tmp_path / "*.yaml")
    assert [str(one).replace(f"{tmp_path}/", "") for one in caught.value.problems] == [
        "a.yaml:8: groups[0].rules[0].threshold: 'nan' is not finite; write a number",
        "b.yaml:4: groups[0].rules[0].trigger: 't' is taken: a.yaml:4 has a rule of this name",
        "b.yaml:7: groups[0].rules[0].operator: 'less' is not one of lt, le, gt, ge, eq, ne, <, <=, >, >=, ==, !=",
    ]


def test_the_hash_changes_with_text_interval_and_variables(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(rule("t", query="x${V:-}"))
    hashes = [
        load_rules([str(file)], 5.0, {}),
        load_rules([str(file)], 6.0, {}),
        load_rules([str(file)], 5.0, {"V": "y"}),
    ]
    file.write_text(rule("t", query="x${V:-} "))
    hashes.append(load_rules([str(file)], 5.0, {}))
    assert len({one.content_hash for one in hashes}) == 4


@pytest.mark.parametrize("sign", ["lt", "le", "gt", "ge", "eq", "ne", "<", "<=", "'>'", "'>='", "==", "'!='"])
def test_an_operator_is_a_word_or_a_sign(tmp_path: Path, sign: str) -> None:
    (tmp_path / "a.yaml").write_text(rule("t", operator=sign))
    condition = load(tmp_path / "a.yaml").rules[0].condition
    assert isinstance(condition, Threshold)
    assert sign.strip("'") in (condition.operator.value, condition.operator.symbol)


def test_a_loss_with_the_wrong_sign_is_doubted(tmp_path: Path) -> None:
    keys = {"query": "min(drawdown_ratio)", "threshold": "0.15"}
    assert doubts(tmp_path, **keys, operator="gt") == [
        "7: operator: drawdown_ratio > 0.15: drawdown and PnL are ratios with losses negative; is lt and -0.15 meant?"
    ]
    assert "fires while nothing is lost" in doubts(tmp_path, **keys, operator="lt")[0]
    assert doubts(tmp_path, query="drawdown_ratio", threshold="-0.15") == []
    assert doubts(tmp_path, query="volatility", threshold="0.15", operator="gt") == []


def test_a_number_in_the_place_of_missing_data_is_doubted(tmp_path: Path) -> None:
    assert doubts(tmp_path, query="x or vector(0)")[0].startswith("6: query: 'or vector(...)'")


def test_an_expression_that_looks_healthy_when_it_sees_nothing_is_doubted(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "groups: [{name: g, rules: [{trigger: a, type: expression, expr: up < 1},\n"
        "  {trigger: b, type: expression, expr: up < 1, series: 1}, {trigger: c, type: expression, expr: 1 + 1}]}]"
    )
    _, found = check_rules([str(tmp_path / "a.yaml"), str(tmp_path / "n*.yaml")], 5.0, {})
    silent = "looks healthy when up matches nothing, misspelt or no longer exported"
    assert [str(one).rpartition("/")[2] for one in found] == [
        f"a.yaml:1: groups[0].rules[0].expr: {silent}; write series, or use a threshold rule",
        "a.yaml:2: groups[0].rules[2].expr: is a scalar, which always is a series: the rule fires always",
        "n*.yaml:1: (file): matches no rule file",
    ]


def test_alerts_about_sidecars_among_all_alerts_are_doubted(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "groups:\n- name: g\n  rules:\n"
        "  - {trigger: a, type: expression, series: 1, expr: 'ALERTS{alertstate=\"firing\"}'}\n"
        "  - {trigger: b, type: expression, series: 1, expr: 'ALERTS{killswitch_origin=\"\"}'}\n"
        "  - {trigger: c, type: expression, series: 1, expr: 'ALERTS_FOR_STATE > 5'}\n"
        "  - {trigger: d, type: threshold, query: 'count(ALERTS)', operator: gt, threshold: 5}\n"
    )
    _, found = check_rules([str(tmp_path / "a.yaml")], 5.0, {})
    assert [(doubt.line, "killswitch_origin" in doubt.reason) for doubt in found] == [(4, True), (7, True)]


def test_a_folder_stands_for_its_rule_files_and_not_for_their_tests(tmp_path: Path) -> None:
    rule = "groups: [{name: NAME, rules: [{trigger: NAME, type: expression, expr: up == 0}]}]\n"
    folder = tmp_path / "a[1]"
    (folder / "prometheus").mkdir(parents=True)
    for name in ("b.yaml", "a.yaml", "a.test.yaml", "prometheus/x.rules.yaml", ".hidden.yaml", "notes.txt"):
        (folder / name).write_text(rule.replace("NAME", name[0]))
    assert load_rules([str(folder)], 5.0, {}).files == (str(folder / "a.yaml"), str(folder / "b.yaml"))
