"""PromQL as text: kinds, selectors with their offsets and reaches, and what a scrape source can answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.settings.promql import PromQLError, Selector, duration, parse, parse_selector, quote


def texts(query: str) -> list[str]:
    return [selector.text for selector in parse(query).selectors]


@pytest.mark.parametrize(
    ("query", "kind"),
    [
        ("1", "scalar"),
        ("-(1)", "scalar"),
        ("time()", "scalar"),
        ("scalar(x) + 1", "scalar"),
        ("x + 1", "vector"),
        ("1 + x", "vector"),
        ("vector(1)", "vector"),
        ("min(x)", "vector"),
        ("absent(x)", "vector"),
        ('"text"', "string"),
        ("x[5m]", "matrix"),
        ("(x[5m:1m])", "matrix"),
    ],
)
def test_the_type_of_a_query_is_known(query: str, kind: str):
    assert parse(query).kind == kind


@pytest.mark.parametrize(
    ("query", "selectors"),
    [
        ("vector(1)", []),
        ("x", ["x"]),
        ("x{}", ["x"]),
        ("min(x) by (a) / max(x)", ["x"]),
        ("a unless on(b) c", ["a", "c"]),
        ("absent(x{a='b'})", ['x{a="b"}']),
        ("topk(scalar(n), x)", ["n", "x"]),
        ("histogram_quantile(0.9, rate(x_bucket[5m]))", ["x_bucket"]),
        ("-x", ["x"]),
        ("x # y", ["x"]),
        ("max_over_time((a - b)[1h:])", ["a", "b"]),
        ('{__name__=~"a.*", b!~"c"}', ['{__name__=~"a.*",b!~"c"}']),
        ('{"foo.bar", "label.dotted"="x"}', ['{__name__="foo.bar","label.dotted"="x"}']),
    ],
)
def test_every_selector_is_found_wherever_it_stands(query: str, selectors: list[str]):
    assert texts(query) == selectors


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ('x{a="say \\"hi\\""}', 'x{a="say \\"hi\\""}'),
        ("x{a='it''}", None),
        ('x{a=~"b\\\\.c|d"}', 'x{a=~"b\\\\.c|d"}'),
        ("x{a=~`b\\.c`}", 'x{a=~"b\\\\.c"}'),
        ('x{a=`"#`} # `', 'x{a="\\"#"}'),
        ('x{a="é\\n"}', 'x{a="é\\n"}'),
        ('x{a="\\u0007"}', 'x{a="\\u0007"}'),
    ],
)
def test_label_values_survive_quoting(query: str, text: str | None):
    if text is None:
        with pytest.raises(PromQLError):
            parse(query)
    else:
        assert texts(query) == [text]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_any_text_quoted_is_the_same_text_parsed(text: str):
    quoted = f"x{{a={quote(text)}}}"
    assert parse_selector(quoted).matchers[0].value == text
    assert texts(quoted) == ([f"x{{a={quote(text)}}}"])


def test_an_offset_stays_in_the_selector_and_is_remembered():
    assert parse("x offset 1h").selectors == (Selector(text="x offset 3600s", offset=3600.0),)
    assert parse("x offset -1500ms").selectors == (Selector(text="x offset -1500ms", offset=-1.5),)
    assert parse("x offset 5m - x").selectors == (Selector(text="x offset 300s", offset=300.0), Selector(text="x"))


def test_a_range_is_left_out_but_its_reach_is_remembered():
    found = Selector(text="x offset 60s", offset=60.0, reach=300.0, window="x[300s] offset 60s")
    assert parse("rate(x[5m] offset 1m)").selectors == (found,)


def test_a_subquery_adds_its_offset_its_range_and_the_lookback():
    (found,) = parse("max_over_time(rate(x[1m] offset 10s)[1h:30s] offset 5m)").selectors
    assert (found.text, found.offset, found.reach) == ("x offset 310s", 310.0, 3600 + 300 + 60)
    assert found.window == "x[3960s] offset 310s"


def test_a_moment_is_left_out_because_a_pinned_value_never_ages():
    assert texts("x @ 100 + y @ end()") == ["x", "y"]


def test_names_are_listed_once():
    assert parse('a + rate(b[5m]) + a{c="d"} + {__name__="e"} + {__name__=~"f"}').metric_names == ("a", "b", "e")


@pytest.mark.parametrize(
    "query",
    [
        "",
        "sum(x",
        "x{",
        "foo(x)",
        "{}",
        'x{a="b" or c="d"}',
        "(" * 200 + "x" + ")" * 200,
        "x + " * 5000 + "x",
        pytest.param("+".join("x" * 3000), marks=pytest.mark.slow),
    ],
)
def test_what_is_not_promql_or_too_much_of_it_is_refused_with_a_reason(query: str):
    with pytest.raises(PromQLError, match=r"\w+"):
        parse(query)


def test_a_duration_is_exact_to_the_millisecond():
    assert [duration(300.0), duration(1.5), duration(-5.0), duration(0.0)] == ["300s", "1500ms", "-5s", "0s"]


@pytest.mark.parametrize(
    ("query", "aggregation", "metric"),
    [
        ("x", None, "x"),
        ("(x)", None, "x"),
        ("min(x)", "min", "x"),
        ("max((x))", "max", "x"),
        ('sum(x{a="b"})', "sum", "x"),
        ('{__name__="a:b"}', None, "a:b"),
    ],
)
def test_a_scrape_source_takes_a_selector_alone_or_in_three_aggregations(query: str, aggregation: str, metric: str):
    parsed = parse_selector(query)
    assert (parsed.aggregation, parsed.metric, parsed.text) == (aggregation, metric, query)


@pytest.mark.parametrize(
    "query",
    ["avg(x)", "sum by (a) (x)", "sum by () (x)", "x offset 5m", "x @ 5", "x[5m]", "x + 1", "1", '"x"', "rate(x[5m])",
     '{a="b"}', '{__name__=~"x"}', "min(min(x))", "topk(1, x)", "sum(x", 'x{a=~"[[:alpha:]]"}', 'x{a=~"\\\\pL"}'],
)  # fmt: skip
def test_a_scrape_source_refuses_all_that_needs_a_past_or_more_arithmetic(query: str):
    with pytest.raises(PromQLError, match=r"scrape source|not PromQL"):
        parse_selector(query)


@pytest.mark.parametrize(
    ("condition", "value", "holds"),
    [
        ('a="b"', "b", True),
        ('a="b"', None, False),
        ('a=""', None, True),
        ('a!="b"', None, True),
        ('a!="b"', "b", False),
        ('a=~"b|c"', "c", True),
        ('a=~"b"', "bb", False),
        ('a=~"b.*"', "b\nc", True),
        ('a=~"b?"', None, True),
        ('a!~"b.*"', "bx", False),
        ('a!~"b.*"', None, True),
        ('a=~"\\\\d"', "٣", False),
    ],
)
def test_a_matcher_reads_labels_as_prometheus_does(condition: str, value: str | None, holds: bool):
    (matcher,) = parse_selector(f"x{{{condition}}}").matchers
    assert matcher.matches({} if value is None else {"a": value}) is holds


def test_a_name_given_as_a_label_is_no_condition_on_a_label():
    assert parse_selector('{__name__="x",a="b"}').matchers[0].name == "a"
