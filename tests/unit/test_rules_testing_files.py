"""`*.test.yaml`: what is read, and every problem with its place."""

import json
from decimal import Decimal
from pathlib import Path

import pytest

from sidecar.core.orders import Intent, Side
from sidecar.core.states import Restriction
from sidecar.rules.notation import Word
from sidecar.rules.testing import Others, run
from sidecar.settings.problems import RuleFileProblems
from sidecar.settings.rule_tests import load_rule_tests, rule_tests_schema

ROOT = Path(__file__).parents[2]

RULES = """
groups:
  - name: portfolio
    rules:
      - trigger: drawdown
        type: threshold
        query: min(dd{pod="${POD_NAME}",desk="${DESK:-fx}"})
        operator: lt
        threshold: -0.15
      - {trigger: volatility, type: threshold, query: vol, operator: gt, threshold: 1, enabled: false}
      - {trigger: page, type: alertmanager, match: ['severity="page"']}
      - {trigger: burst, type: order_rate, max_orders: 5}
      - {trigger: watch, type: watchdog, action: warn}
"""


@pytest.fixture
def write(tmp_path):
    (tmp_path / "x.yaml").write_text(RULES)

    def write(text, name="x.test.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def one_test(text, write):
    (test,) = load_rule_tests(write(text)).tests
    return test


def problems_in(text, write, name="x.test.yaml"):
    with pytest.raises(RuleFileProblems) as caught:
        load_rule_tests(write(text, name))
    return [f"{problem.line}: {problem.key}: {problem.reason}" for problem in caught.value.problems]


def test_a_whole_file_is_read(write):
    test = one_test(
        """
environment: {DESK: ''}
interval: 2s
gate: {killed_policy: reduce_only, position_limits: {AAPL: 10, '*': 5}, blind_orders: deny, trust_reduce_claim: true}
tests:
  - name: all of it
    interval: 250ms
    enable: [volatility]
    others: missing
    input:
      drawdown: -0.01x1 stale
      volatility: {series: {'{pod="a", zone="\\"b\\""}': '1 _', '{}': 2}}
      page: 0 1
    metrics:
      - {series: 'dd{pod="a"}', values: '-0.01x4 _ stale NaN'}
    expect:
      - at: 1s
        state: KILLED
        restriction: halt
        factor: 0
        causes: {drawdown: breach, page: alert}
        gate: {new: deny, reduce: deny, cancel: allow, reason: killed, trigger: null}
        triggers: {drawdown: {status: firing, health: ok, armed: yes, step: null, value: -0.16}}
        orders:
          - order: {symbol: AAPL, side: sell, quantity: '1.5', position: -3, position_limit: 7, reduce_only: true}
            decision: deny
            reason: killed
            max_quantity: null
          - {order: {intent: cancel}, decision: allow}
""",
        write,
    )
    assert test.origin.endswith("x.test.yaml:6")
    assert (test.name, test.step, test.others, test.until) == ("all of it", 0.25, Others.MISSING, 1.0)
    assert test.rules.groups[0].interval == 2.0
    assert 'min(dd{pod="pod-name",desk="fx"})' in {rule.query for rule in test.rules.rules}
    assert all(rule.enabled for rule in test.rules.rules)
    assert test.tracks["drawdown"][0].values == (-0.01, -0.01, Word.STALE)
    assert [dict(track.labels) for track in test.tracks["volatility"]] == [{"pod": "a", "zone": '"b"'}, {}]
    assert test.measured == frozenset()  # what has `input` is not measured
    gate = test.policies.gate
    assert (gate.killed_policy, gate.blind_orders, gate.trust_reduce_claim) == (Restriction.REDUCE_ONLY, False, True)
    assert gate.position_limits == {"AAPL": Decimal(10), "*": Decimal(5)}
    (expectation,) = test.expectations
    assert {".".join(one.path): one.wanted for one in expectation.checks} == {
        "state": "KILLED",
        "restriction": "halt",
        "factor": 0.0,
        "causes": "drawdown: breach, page: alert",
        "gate.new": "deny",
        "gate.reduce": "deny",
        "gate.cancel": "allow",
        "gate.reason": "killed",
        "gate.trigger": None,
        "triggers.drawdown.status": "firing",
        "triggers.drawdown.health": "ok",
        "triggers.drawdown.armed": True,
        "triggers.drawdown.step": None,
        "triggers.drawdown.value": -0.16,
    }
    sell, cancel = expectation.orders
    assert (sell.order.side, sell.order.quantity, sell.order.position) == (Side.SELL, Decimal("1.5"), Decimal(-3))
    assert (sell.order.position_limit, sell.order.reduce_only) == (Decimal(7), True)
    assert {one.path: one.wanted for one in sell.checks} == {
        ("decision",): "deny",
        ("reason",): "killed",
        ("max_quantity",): None,
    }
    assert cancel.order.intent is Intent.CANCEL
    assert next(one.origin for one in expectation.checks if one.path == ("state",)).endswith("x.test.yaml:18")


def test_what_is_not_written_is_not_looked_at(write):
    test = one_test("tests: [{name: a, expect: [{at: 0, triggers: {drawdown: {status: inactive}}}]}]", write)
    assert [one.path for one in test.expectations[0].checks] == [("triggers", "drawdown", "status")]
    assert run(test).passed


def test_no_causes_can_be_expected(write):
    test = one_test("tests: [{name: a, expect: [{at: 0, causes: {}}]}]", write)
    assert run(test).passed


def test_a_disabled_rule_is_not_measured_and_an_enabled_one_is(write):
    more = "metrics: [{series: vol, values: 1}], expect: [{at: 0, state: ACTIVE}]"
    assert one_test(f"tests: [{{name: a, {more}}}]", write).measured == frozenset()
    assert one_test(f"tests: [{{name: a, enable: [volatility], {more}}}]", write).measured == {"volatility"}


def test_rule_files_can_be_named(write):
    named = "rule_files: [x.yaml]\ntests: [{name: a, expect: [{at: 0, state: ACTIVE}]}]"
    assert load_rule_tests(write(named, "other.test.yml")).tests
    assert load_rule_tests(write(named, "other.yaml")).tests


EXPECT = "expect: [{at: 1s, state: ACTIVE}]"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tests: []", "1: tests: is empty"),
        ("tests: [{name: a}]", "1: tests[0].expect: is required"),
        ("tests: [{name: a, expect: []}]", "1: tests[0].expect: is empty"),
        ("tests: [{name: a, expect: [{at: 1s}]}]", "1: tests[0].expect[0]: expects nothing"),
        ("tests: [{name: a, expect: [{at: 1s, gate: {}}]}]", "1: tests[0].expect[0]: expects nothing"),
        ("tests: [{name: a, expect: [{at: 1s, state: DEAD}]}]", "1: tests[0].expect[0].state: 'DEAD' is not one of"),
        ("tests: [{name: a, expect: [{at: 1, state: ACTIVE}]}]", "1: tests[0].expect[0].at: '1' is not a duration"),
        (f"tests: [{{name: a, {EXPECT}}}, {{name: a, {EXPECT}}}]", "1: tests[1].name: 'a' is taken by tests[0]"),
        (f"tests:\n- name: a\n  input: {{drawdown: 1 x}}\n  {EXPECT}", "3: tests[0].input.drawdown: 'x' is no value"),
        (f"tests:\n- name: a\n  input: {{drawdon: 1}}\n  {EXPECT}", "3: tests[0].input.drawdon: there is no rule"),
        (f"tests: [{{name: a, enable: [x], {EXPECT}}}]", "1: tests[0].enable[0]: there is no rule 'x'"),
        (f"tests: [{{name: a, input: {{volatility: 1}}, {EXPECT}}}]", "rule 'volatility' is disabled"),
        ("tests: [{name: a, expect: [{at: 0, triggers: {x: {armed: no}}}]}]", "expect[0].triggers.x: there is no rule"),
        ("tests: [{name: a, expect: [{at: 0, causes: {x: breach}}]}]", "expect[0].causes.x: there is no rule"),
        ("tests: [{name: a, expect: [{at: 0, gate: {trigger: x}}]}]", "expect[0].gate.trigger: there is no rule"),
        ("tests: [{name: a, expect: [{at: 90d, state: ACTIVE}]}]", "evaluations to get to"),
        (f"tests: [{{name: a, input: {{page: _}}, {EXPECT}}}]", "_ is no count"),
        (f"tests: [{{name: a, input: {{burst: 0.5}}, {EXPECT}}}]", "0.5 is no count"),
        (f"tests: [{{name: a, input: {{burst: -1}}, {EXPECT}}}]", "-1.0 is no count"),
        (f"tests: [{{name: a, input: {{burst: NaN}}, {EXPECT}}}]", "nan is no count"),
        (
            f"""tests: [{{name: a, input: {{page: {{series: {{'{{a="b"}}': 1}}}}}}, {EXPECT}}}]""",
            "has no series; write one sequence",
        ),
        (f"tests: [{{name: a, input: {{drawdown: {{series: {{}}}}}}, {EXPECT}}}]", "holds no series"),
        (f"tests: [{{name: a, input: {{drawdown: {{series: {{pod: 1}}}}}}, {EXPECT}}}]", "'pod' are no labels"),
        (
            f"tests: [{{name: a, input: {{drawdown: {{series: {{'{{a=b}}': 1}}}}}}, {EXPECT}}}]",
            "are no labels at 'a=b'",
        ),
        (
            f"""tests: [{{name: a, input: {{drawdown: {{series: {{'{{a="b"}}': 1, '{{ a="b"}}': 2}}}}}}, {EXPECT}}}]""",
            """has the labels of '{a="b"}'""",
        ),
        (f"tests: [{{name: a, metrics: [{{series: 'a b', values: 1}}], {EXPECT}}}]", "'a b' is no series"),
        (f"tests: [{{name: a, metrics: [{{series: a, values: failed}}], {EXPECT}}}]", "'failed' is no sample"),
        (
            "tests: [{name: a, expect: [{at: 0, orders: [{order: {side: buy}, decision: deny}]}]}]",
            "orders[0].order.quantity: is required",
        ),
        (
            "tests: [{name: a, expect: [{at: 0, orders: [{order: {open_quantity: -1, side: buy, quantity: 1}}]}]}]",
            "open_quantity: must not be below 0",
        ),
        ("tests: [{name: a, expect: [{at: 0, orders: [{order: {intent: cancel}}]}]}]", "orders[0]: expects nothing"),
        (f"colour: red\ntests: [{{name: a, {EXPECT}}}]", "1: colour: unknown key"),
        ("tests: [", "(file): is not valid YAML"),
        (f"interval: 1s\ninterval: 2s\ntests: [{{name: a, {EXPECT}}}]", "2: interval: is written twice"),
        (f"tests: [{{name: '${{NAME}}', {EXPECT}}}]", "environment variable NAME is not set"),
        (f"rule_files: [gone.yaml]\ntests: [{{name: a, {EXPECT}}}]", "1: rule_files: there is no rule to test in"),
    ],
)
def test_a_problem_is_reported_with_its_place(text, complaint, write):
    assert any(complaint in problem for problem in problems_in(text, write)), problems_in(text, write)


def test_all_problems_come_at_once(write):
    problems = problems_in("colour: red\ntests:\n- {name: a, expect: [{at: soon, state: DEAD}]}", write)
    assert [problem.split(": ")[1] for problem in problems] == [
        "colour",
        "tests[0].expect[0].at",
        "tests[0].expect[0].state",
    ]


def test_a_file_of_another_name_must_say_which_rules_it_tests(write):
    assert "rule_files: is required" in problems_in(f"tests: [{{name: a, {EXPECT}}}]", write, "tests.yaml")[0]


def test_a_rule_file_that_cannot_be_used_is_reported_as_the_sidecar_would(write, tmp_path):
    (tmp_path / "x.yaml").write_text(RULES.replace("threshold: -0.15", "threshold: much"))
    (problem,) = problems_in(f"tests: [{{name: a, {EXPECT}}}]", write)
    assert "'much' is not a number" in problem


def test_rules_do_not_see_the_environment_of_the_machine(write, tmp_path, monkeypatch):
    monkeypatch.setenv("DESK", "gold")
    (tmp_path / "x.yaml").write_text(RULES.replace("${DESK:-fx}", "${DESK}"))
    (problem,) = problems_in(f"tests: [{{name: a, {EXPECT}}}]", write)
    assert "environment variable DESK is not set" in problem


def test_the_schema_for_editors_is_up_to_date():
    written = json.loads((ROOT / "docs/schema/rule-tests.schema.json").read_text())
    assert written == json.loads(json.dumps(rule_tests_schema()))


def test_the_schema_knows_every_key_of_the_shipped_tests():
    assert set(rule_tests_schema()["properties"]) == {
        "rule_files",
        "environment",
        "interval",
        "scrape",
        "gate",
        "tests",
    }
