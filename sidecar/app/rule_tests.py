"""Runs unit tests of rule files, and lets the real PromQL engine answer where a test gives metrics, not results.

The engine is asked in the very text that the running sidecar sends to Prometheus, and its answer is sorted out by the
same code, so that a test sees also how old each sample is.
"""

from sidecar.adapters import promtool
from sidecar.adapters.prometheus.batch import Envelope, MalformedResult, Query, compose, sort_out
from sidecar.rules.model import Rule
from sidecar.rules.readings import Answer, Failure
from sidecar.rules.testing import RuleTest, Verdict, evaluation_moments, run
from sidecar.settings.promql import parse


def run_rule_test(test: RuleTest) -> Verdict:
    """Run one test; one with metrics asks promtool first.

    Raises:
        PromtoolError: it is needed and cannot be used.
    """
    return run(test, _record(test))


def _record(test: RuleTest) -> dict[tuple[str, int], Answer | Failure]:
    rules = [rule for rule in test.rules.rules if rule.trigger in test.measured]
    asked = [(query, at) for query in map(_query, rules) for at in evaluation_moments(test, query.key)]
    if not asked:
        return {}
    results = promtool.ask(
        [(metric.series, metric.values) for metric in test.metrics],
        test.step,
        [promtool.Question(expr=compose([query]), at=at) for query, at in asked],
    )
    return {(query.key, at): _answer(query, result) for (query, at), result in zip(asked, results, strict=True)}


def _query(rule: Rule) -> Query:
    parsed = parse(rule.query or "")
    return Query(key=rule.trigger, text=parsed.text, kind=parsed.kind, selectors=parsed.selectors)


def _answer(query: Query, result: promtool.Rows | promtool.Refusal) -> Answer | Failure:
    if isinstance(result, promtool.Refusal):
        return Failure(reason="query_error", message=result.message, unreachable=False)
    try:
        return sort_out(Envelope(result=result, warnings=()), [query])[query.key]
    except MalformedResult as error:
        return Failure(reason="bad_response", message=str(error), unreachable=False)
