"""promtool as an engine: what it says is read exactly, and what it does not say is an error."""

import pytest

from sidecar.adapters import promtool
from sidecar.adapters.promtool import PromtoolError, Question, Refusal, ask
from sidecar.app.rule_tests import run_rule_test
from sidecar.rules.model import Group, Operator, Rule, RuleSet, Threshold
from sidecar.rules.testing import Check, Expectation, Metric, RuleTest

GOT = """  FAILED:
    expr: "x", time: 1s,
        exp: nil
        got: {__name__="x", pod="a,\\"b} 1\\n"} -1.6E-01, {} NaN, {a="b"} +Inf
    expr: "x +", time: 2s500ms, err: 1:4: parse error: unexpected end of input
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    def fake(said, script=""):
        (tmp_path / "said").write_text(said)
        program = tmp_path / "promtool"
        program.write_text(f'#!/bin/sh\ncp "$3" {tmp_path}/asked\n{script}\ncat {tmp_path}/said\nexit 1\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return tmp_path / "asked"

    return fake


def test_results_and_refusals_are_read_in_order(fake):
    asked = fake(GOT)
    rows, refusal = ask([('x{a="ü"}', "1x4")], 0.5, [Question(expr="x", at=1000), Question(expr="x +", at=2500)])
    assert rows == [
        {"metric": {"__name__": "x", "pod": 'a,"b} 1\n'}, "value": [1.0, "-1.6E-01"]},
        {"metric": {}, "value": [1.0, "NaN"]},
        {"metric": {"a": "b"}, "value": [1.0, "+Inf"]},
    ]
    assert refusal == Refusal(message="1:4: parse error: unexpected end of input")
    assert '"evaluation_interval": "500ms"' in asked.read_text()
    assert 'x{a=\\"ü\\"}' in asked.read_text()


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("Unit Testing:  x.yaml\n  FAILED:\n  bad series\n", "refuses the series: bad series"),
        ("  SUCCESS\n", "refuses the series: SUCCESS"),
        ("", "it says nothing"),
        ('    expr: "x", time: 1s, what\n', "is not known"),
        ('    expr: "x", time: 1s,\n        got: nil\n', "'nil' where '{' was wanted"),
        ('    expr: "x", time: 1s,\n        got: {a="b"\n', "'' where '}' was wanted"),
        ('    expr: "x", time: 1s,\n        got: {} one\n', "is not known at ' one'"),
    ],
)
def test_what_cannot_be_read_is_an_error(fake, said, complaint):
    fake(said)
    with pytest.raises(PromtoolError, match=complaint):
        ask([("x", "1")], 1, [Question(expr="x", at=1000)])


def test_a_missing_program_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PromtoolError, match="promtool is not installed"):
        ask([("x", "1")], 1, [Question(expr="x", at=0)])


def test_a_program_that_does_not_end_is_given_up(fake, monkeypatch):
    fake("", "exec sleep 30")
    monkeypatch.setattr(promtool, "TIMEOUT_SECONDS", 0.1)
    with pytest.raises(PromtoolError, match=r"did not finish within 0\.1 s"):
        ask([("x", "1")], 1, [Question(expr="x", at=0)])


def test_a_program_that_cannot_be_run_is_an_error(fake, tmp_path):
    fake("")
    (tmp_path / "promtool").write_bytes(b"\x7fELF nonsense")
    with pytest.raises(PromtoolError, match="cannot be run"):
        ask([("x", "1")], 1, [Question(expr="x", at=0)])


def measured_test(wanted):
    condition = Threshold(query="x", operator=Operator.LT, threshold=-0.15)
    return RuleTest(
        name="a",
        origin="x.test.yaml:1",
        rules=RuleSet(
            groups=(Group(name="g", interval=1, rules=(Rule(trigger="dd", group="g", condition=condition),)),)
        ),
        step=1,
        tracks={},
        metrics=(Metric(series="x", values="1"),),
        measured=frozenset({"dd"}),
        expectations=(
            Expectation(
                at=0, checks=(Check(path=("triggers", "dd", "health"), wanted=wanted, origin="x.test.yaml:2"),)
            ),
        ),
    )


@pytest.mark.parametrize(
    ("said", "health"),
    [
        ('got: {__ks__="t"} 0E+00, {__ks__="q0"} 1E+00, {__ks__="s0"} 0E+00', "ok"),
        ('got: {__ks__="t"} 0E+00', "no_data"),
        ('got: {__ks__="q0"} 1E+00', "error"),  # without the time of the evaluation nothing can be trusted
        ("err: many-to-many matching not allowed", "error"),
    ],
)
def test_answers_of_the_engine_become_readings(fake, said, health):
    layout = f", {said}" if said.startswith("err") else f",\n        exp: nil\n        {said}"
    fake(f'    expr: "x", time: 0s{layout}\n')
    assert run_rule_test(measured_test(health)).passed
