"""Chains of queries as pure text and data: who owns which part of an answer."""

import re
from typing import Any

import pytest

from sidecar.adapters.prometheus.batch import Envelope, MalformedResult, Query, compose, sort_out
from sidecar.rules.readings import Answer, Failure
from sidecar.settings.promql import parse


def query(text: str) -> Query:
    parsed = parse(text)
    return Query(key=text, text=text, kind=parsed.kind, selectors=parsed.selectors)


def item(tag: str, value: Any, **labels: str) -> dict[str, Any]:
    return {"metric": {**labels, "__ks__": tag}, "value": [1000.5, value]}


CLOCK = item("t", "1000.5")


def sorted_out(*items: Any, of: list[Query], warnings: tuple[str, ...] = ()) -> dict[str, Answer | Failure]:
    return sort_out(Envelope(result=list(items), warnings=warnings), of)


def test_a_chain_is_promql_for_any_number_of_queries():
    for count in (1, 2, 3, 50):
        chain = compose([query(f'min(x{{a="{n}"}}) # {n}') for n in range(count)])
        assert parse(chain).kind == "vector"
        assert len(re.findall('"__ks__"', chain)) == 1 + 2 * count


def test_a_selector_of_many_queries_is_asked_for_once():
    assert compose([query("min(x)"), query("max(x)"), query("x")]).count("timestamp(x)") == 1


def test_a_scalar_is_wrapped_to_be_part_of_a_chain():
    assert "vector(\n1 + 1\n)" in compose([query("1 + 1")])


def test_a_range_falls_back_to_its_far_end():
    chain = compose([query("max_over_time(x[15m] offset 1m)")])
    assert "(count(last_over_time(x[900s] offset 60s)) * 0 + time() - 960.000)" in chain


def test_each_query_gets_its_own_series_without_the_tag():
    first, second = query("a"), query("b")
    answers = sorted_out(item("q1", "2", pod="p"), CLOCK, item("q0", "1"), item("q0", "3", z="y"), of=[first, second])
    one, two = answers["a"], answers["b"]
    assert isinstance(one, Answer)
    assert isinstance(two, Answer)
    assert [(dict(s.labels), s.value) for s in one.series] == [({}, 1.0), ({"z": "y"}, 3.0)]
    assert [(dict(s.labels), s.value) for s in two.series] == [({"pod": "p"}, 2.0)]
    assert one.evaluated_at == two.evaluated_at == 1000.5


def test_the_oldest_sample_counts_and_offsets_are_given_back():
    asked = [query("a - b offset 5m"), query("c")]
    answers = sorted_out(CLOCK, item("s0", "990"), item("s1", "650"), of=asked)
    first, second = answers.values()
    assert isinstance(first, Answer)
    assert isinstance(second, Answer)
    assert (first.oldest_sample, second.oldest_sample) == (950.0, None)


def test_a_native_histogram_fails_only_its_own_query():
    histogram = {"metric": {"__ks__": "q0"}, "histogram": [1000.5, {"count": "1"}]}
    answers = sorted_out(CLOCK, histogram, item("q1", "1"), of=[query("a"), query("b")])
    assert isinstance(answers["a"], Failure)
    assert answers["a"].reason == "wrong_type"
    assert isinstance(answers["b"], Answer)


def test_warnings_concern_all():
    answers = sorted_out(CLOCK, of=[query("a"), query("b")], warnings=("remote read failed",))
    assert all(isinstance(one, Answer) and one.warnings == ("remote read failed",) for one in answers.values())


@pytest.mark.parametrize(
    "items",
    [
        [],
        [item("q0", "1")],
        [CLOCK, item("q7", "1")],
        [CLOCK, item("s0", "NaN")],
        [item("t", "1") | {"value": [float("nan"), "1"]}],
        [CLOCK, item("", "1")],
        [CLOCK, {"metric": {}, "value": [1, "1"]}],
        [CLOCK, {"metric": {"__ks__": "q0"}}],
        [CLOCK, {"metric": {"__ks__": "q0"}, "value": [1]}],
        [CLOCK, item("q0", 1)],
        [CLOCK, item("q0", None)],
        [CLOCK, item("q0", "one")],
        [CLOCK, {"metric": {"__ks__": ["q0"]}, "value": [1, "1"]}],
        [CLOCK, {"metric": {"__ks__": {}}, "histogram": []}],
        [CLOCK, "x"],
        [CLOCK, None],
    ],
)
def test_a_result_of_another_shape_is_refused_whole(items: list[Any]):
    with pytest.raises(MalformedResult):
        sorted_out(*items, of=[query("a")])
