"""Alertmanager's matchers: what its parsers agree on is read as they read it, everything else is refused."""

import pytest

from sidecar.rules.matchers import MatcherError, match_all, parse_matchers


@pytest.mark.parametrize(
    ("text", "name", "operator", "value"),
    [
        ('killswitch="kill"', "killswitch", "=", "kill"),
        ("killswitch=kill", "killswitch", "=", "kill"),
        ('  desk  !=  "fx" ', "desk", "!=", "fx"),
        ('desk=~"fx|rates"', "desk", "=~", "fx|rates"),
        ('desk!~"fx.*"', "desk", "!~", "fx.*"),
        ('{severity="critical"}', "severity", "=", "critical"),
        ('{severity="critical",}', "severity", "=", "critical"),
        ('"bot.name"="a b"', "bot.name", "=", "a b"),
        ('"глубина 📉"="да"', "глубина 📉", "=", "да"),
        ('глубина="да"', "глубина", "=", "да"),
        ('a=""', "a", "=", ""),
        (r'a="\"\\\n"', "a", "=", '"\\\n'),
        (r'a="\x41\u00e9\U0001F4C9"', "a", "=", "Aé📉"),
        (r'a="\xc3\xa9"', "a", "=", "é"),
        ('a="{}=~,"', "a", "=", "{}=~,"),
        (r'a=~"\\d+"', "a", "=~", r"\d+"),
    ],
)
def test_a_matcher_is_read_as_alertmanager_reads_it(text: str, name: str, operator: str, value: str) -> None:
    (matcher,) = parse_matchers(text)
    assert (matcher.name, matcher.operator, matcher.value) == (name, operator, value)


def test_several_matchers_stand_in_one_text_with_and_without_braces() -> None:
    for text in ('{a="b",c=~"d"}', 'a="b" , c=~"d"', '{ a = "b", c =~ "d", }'):
        assert [(one.name, one.operator, one.value) for one in parse_matchers(text)] == [
            ("a", "=", "b"),
            ("c", "=~", "d"),
        ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "holds no matcher"),
        ("{}", "holds no matcher"),
        ("severity", "expected =, !=, =~ or !~, found the end"),
        ("severity=", "expected a value in double quotes, found the end"),
        ('="x"', "expected a label name, found '='"),
        ('""="x"', "never empty"),
        ('a=="x"', "expected a value in double quotes, found '='"),
        ('a="x" b="y"', "expected a comma or the end"),
        ('{a="x"', "expected the closing brace"),
        ('a="x"}', "expected a comma or the end"),
        ('a="x', "the closing quote is missing"),
        ("a='x'", '"\'" must stand in double quotes'),
        ("a=`x`", "must stand in double quotes"),
        (r'a=~"\d+"', r"write \\d"),
        (r'a="\b"', r"write \\b"),
        ('a="\\', "the escape"),
        (r'a="\x4"', "the escape"),
        (r'a="\xzz"', "the escape"),
        (r'a="\UFFFFFFFF"', "is no character"),
        (r'a="\xff"', "not UTF-8"),
        (r'a="\ud800"', "not UTF-8"),
        ('a=~"("', "no regular expression"),
        ('a=~"[[:alpha:]]"', "no regular expression"),
        (",", "expected a label name, found ','"),
        ("a" * 5000, "at most 4096"),
    ],
)
def test_what_is_no_matcher_is_refused_with_its_place(text: str, why: str) -> None:
    with pytest.raises(MatcherError, match=r".") as raised:
        parse_matchers(text)
    assert why in str(raised.value)


@pytest.mark.parametrize(
    ("text", "labels", "holds"),
    [
        ('a="x"', {"a": "x"}, True),
        ('a="x"', {"a": "y"}, False),
        ('a="x"', {}, False),
        ('a=""', {}, True),
        ('a!="x"', {}, True),
        ('a!="x"', {"a": "x"}, False),
        ('a=~"x|y"', {"a": "y"}, True),
        ('a=~"x|y"', {"a": "xy"}, False),
        ('a=~"x"', {"a": "x\n"}, False),
        ('a=~".*"', {}, True),
        ('a=~".+"', {}, False),
        ('a!~"x.*"', {"a": "xyz"}, False),
        ('a!~"x.*"', {"a": "y"}, True),
        ('a=~"(?i)KILL"', {"a": "kill"}, True),
        (r'a=~"\\d"', {"a": "٣"}, False),
        ('a="x",b="y"', {"a": "x"}, False),
        ('a="x",b="y"', {"a": "x", "b": "y"}, True),
    ],
)
def test_an_absent_label_counts_as_empty_and_expressions_match_the_whole_value(
    text: str, labels: dict[str, str], holds: bool
) -> None:
    assert match_all(parse_matchers(text), labels) is holds


def test_no_matchers_at_all_match_everything() -> None:
    assert match_all((), {"a": "x"})
