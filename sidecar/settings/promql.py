"""PromQL as text: what a query is, which selectors it looks at, and the small part that a direct scrape can answer.

Prometheus answers `min(x)` with the time of the question, however old the samples of `x` are. To know their true age
the selectors inside a query must be asked for their timestamps, so they are taken from its syntax tree here. Knows no
server: what the parser accepts a server may still refuse, and where one is at hand it has the last word.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Literal, NamedTuple, cast

import promql_parser

from sidecar.core.errors import KillswitchError

Kind = Literal["scalar", "vector", "matrix", "string"]
Aggregation = Literal["min", "max", "sum"]
Operator = Literal["=", "!=", "=~", "!~"]

LOOKBACK_SECONDS: Final = 300.0
"""How far back an instant selector looks for a sample: Prometheus' default `--query.lookback-delta`."""

MAX_QUERY_CHARACTERS: Final = 16_384
"""Longer texts are refused: no person wrote them, and the native parser dies of tens of thousands of nested signs."""

MAX_NESTING: Final = 100
"""Deeper parentheses are refused before they reach the native parser, whose stack cannot be guarded from here."""

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_QUOTED_OR_COMMENT = re.compile(r"""#[^\n]*|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`[^`]*`""", re.DOTALL)
_RAW_STRING = re.compile(r"`[^`]*`", re.DOTALL)


class PromQLError(KillswitchError):
    """A query that cannot be used; the message says what was seen and what was wanted."""


class Selector(NamedTuple):
    """One vector selector of a query, as it must be asked for the time of its samples.

    Attributes:
        text: PromQL with its offset and without range or `@`, so that `timestamp(<text>)` is valid.
        offset: seconds that the query deliberately looks back (negative: ahead); an age is reduced by it.
        reach: seconds of the range or subquery around it; 0 where only the newest sample counts. Such a query still
            has a value when the newest sample is long gone: its sample is then up to `reach` seconds old.
        window: the same selector over its whole reach, as an argument of `last_over_time`; empty where reach is 0.
    """

    text: str
    offset: float = 0.0
    reach: float = 0.0
    window: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedQuery:
    """A query that the parser accepts.

    Attributes:
        text: exactly as written.
        kind: type of its value.
        selectors: each distinct selector, in the order of the text; empty for `vector(1)` or `time()`.
        metric_names: names that its selectors name outright, in the order of the text.
    """

    text: str
    kind: Kind
    selectors: tuple[Selector, ...]
    metric_names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelMatcher:
    """One condition on a label; regular expressions match the whole value, and an absent label counts as empty."""

    name: str
    operator: Operator
    value: str
    pattern: re.Pattern[str] | None = None

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether these labels satisfy the condition."""
        seen = labels.get(self.name, "")
        holds = seen == self.value if self.pattern is None else self.pattern.fullmatch(seen) is not None
        return holds if self.operator in ("=", "=~") else not holds


@dataclass(frozen=True, kw_only=True, slots=True)
class ScrapeQuery:
    """A question that one scraped exposition can answer: a selector, alone or in `min()`, `max()` or `sum()`."""

    text: str
    aggregation: Aggregation | None
    metric: str
    matchers: tuple[LabelMatcher, ...] = ()


def parse(query: str) -> ParsedQuery:
    """Parse one query.

    Raises:
        PromQLError: it is not PromQL, or needs something that the chain of batched queries cannot carry.
    """
    root = _tree(query)
    try:
        kind, found = _kind(root), list(_vector_selectors(root, _Surroundings()))
    except RecursionError as exc:
        raise PromQLError(f"{_shown(query)} nests too deeply, or chains too many operators") from exc
    return ParsedQuery(
        text=query,
        kind=kind,
        selectors=tuple(dict.fromkeys(_selector(one) for one in found)),
        metric_names=tuple(dict.fromkeys(name for one in found for name in _names(one.node))),
    )


def parse_selector(query: str) -> ScrapeQuery:
    """Parse a query for a scrape source.

    Raises:
        PromQLError: it is not a plain selector with one metric name, optionally inside `min()`, `max()` or `sum()`.
    """
    node = _without_parentheses(_tree(query))
    aggregation: Aggregation | None = None
    if isinstance(node, promql_parser.AggregateExpr):
        aggregation = _aggregation(node, query)
        node = _without_parentheses(node.expr)
    if not isinstance(node, promql_parser.VectorSelector):
        raise PromQLError(_not_for_scrape(query, f"a {type(node).__name__}"))
    if node.offset or node.at:
        raise PromQLError(_not_for_scrape(query, "offset or @ (a scrape has no past)"))
    names = _names(node)
    if len(names) != 1:
        raise PromQLError(_not_for_scrape(query, "a selector without one metric name"))
    matchers = tuple(_label_matcher(one) for one in _matchers(node) if one.name != "__name__")
    return ScrapeQuery(text=query, aggregation=aggregation, metric=names[0], matchers=matchers)


def quote(text: str) -> str:
    """Write a string as PromQL's double-quoted literal."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(char, char if char.isprintable() else _escaped(char)) for char in text) + '"'


def duration(seconds: float) -> str:
    """Write seconds as a PromQL duration, exact to the millisecond: `300s`, `-1500ms`."""
    milliseconds = round(seconds * 1000)
    return f"{milliseconds // 1000}s" if milliseconds % 1000 == 0 else f"{milliseconds}ms"


def _escaped(char: str) -> str:
    point = ord(char)
    return f"\\u{point:04x}" if point <= 0xFFFF else f"\\U{point:08x}"


def _tree(query: str) -> Any:
    if len(query) > MAX_QUERY_CHARACTERS:
        raise PromQLError(f"the query has {len(query)} characters; at most {MAX_QUERY_CHARACTERS} are allowed")
    if _nesting(query) > MAX_NESTING:
        raise PromQLError(f"{_shown(query)} nests parentheses deeper than {MAX_NESTING}")
    try:
        return promql_parser.parse(_without_raw_strings(query))
    except ValueError as exc:
        raise PromQLError(f"{_shown(query)} is not PromQL: {exc}") from exc


def _without_raw_strings(query: str) -> str:
    # The parser reads escapes inside `…`, Prometheus does not. Quoting them afresh makes both see the same string.
    def requoted(match: re.Match[str]) -> str:
        text = match[0]
        return quote(text[1:-1]) if _RAW_STRING.fullmatch(text) else text

    return _QUOTED_OR_COMMENT.sub(requoted, query)


def _nesting(query: str) -> int:
    depth = deepest = 0
    for char in _QUOTED_OR_COMMENT.sub("", query):
        depth += (char == "(") - (char == ")")
        deepest = max(deepest, depth)
    return deepest


@dataclass(frozen=True, kw_only=True, slots=True)
class _Surroundings:
    """What the subqueries around a node add to the offset and the reach of the selectors inside."""

    offset: float = 0.0
    reach: float = 0.0

    def inside(self, subquery: Any) -> "_Surroundings":
        # A step of a subquery takes the newest sample within the lookback, so a sample may be older than the range.
        reach = _seconds(subquery.range) + LOOKBACK_SECONDS
        return _Surroundings(offset=self.offset + _seconds(subquery.offset), reach=self.reach + reach)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    node: Any
    offset: float
    reach: float


def _vector_selectors(node: Any, around: _Surroundings) -> Iterator[_Found]:
    if isinstance(node, promql_parser.VectorSelector):
        yield _Found(node=node, offset=around.offset + _seconds(node.offset), reach=around.reach)
    elif isinstance(node, promql_parser.MatrixSelector):
        inner = node.vector_selector
        offset, reach = around.offset + _seconds(inner.offset), around.reach + _seconds(node.range)
        yield _Found(node=inner, offset=offset, reach=reach)
    else:
        within = around.inside(node) if isinstance(node, promql_parser.SubqueryExpr) else around
        for child in _children(node):
            yield from _vector_selectors(child, within)


def _children(node: Any) -> list[Any]:
    if isinstance(node, promql_parser.BinaryExpr):
        return [node.lhs, node.rhs]
    if isinstance(node, promql_parser.Call):
        return list(node.args)
    if isinstance(node, promql_parser.AggregateExpr):
        return [child for child in (node.param, node.expr) if child is not None]
    if isinstance(node, promql_parser.ParenExpr | promql_parser.UnaryExpr | promql_parser.SubqueryExpr):
        return [node.expr]
    if isinstance(node, promql_parser.NumberLiteral | promql_parser.StringLiteral):
        return []
    # A node that is not known could hide a selector, and with it the age of its samples.
    raise PromQLError(f"a {type(node).__name__} is not supported in a query")


def _kind(node: Any) -> Kind:
    if isinstance(node, promql_parser.NumberLiteral):
        return "scalar"
    if isinstance(node, promql_parser.StringLiteral):
        return "string"
    if isinstance(node, promql_parser.MatrixSelector | promql_parser.SubqueryExpr):
        return "matrix"
    if isinstance(node, promql_parser.ParenExpr | promql_parser.UnaryExpr):
        return _kind(node.expr)
    if isinstance(node, promql_parser.Call):
        return "scalar" if node.func.return_type == promql_parser.ValueType.Scalar else "vector"
    if isinstance(node, promql_parser.BinaryExpr):
        return "scalar" if _kind(node.lhs) == _kind(node.rhs) == "scalar" else "vector"
    return "vector"


def _selector(found: _Found) -> Selector:
    braces = _braces(found.node)
    offset = f" offset {duration(found.offset)}" if found.offset else ""
    window = f"{braces}[{duration(found.reach)}]{offset}" if found.reach else ""
    return Selector(text=braces + offset, offset=found.offset, reach=found.reach, window=window)


def _braces(node: Any) -> str:
    # `@` is left out on purpose: a value pinned to a moment never changes, so what matters is whether the series lives.
    name = node.name or ""
    plain = bool(_NAME.fullmatch(name))
    conditions = [] if plain or not name else [f"__name__={quote(name)}"]
    conditions.extend(f"{_label(one.name)}{_operator(one)}{quote(one.value)}" for one in _matchers(node))
    if not conditions:
        return name
    return f"{name if plain else ''}{{{','.join(conditions)}}}"


def _label(name: str) -> str:
    return name if _LABEL.fullmatch(name) else quote(name)


_OPERATORS: Final[tuple[tuple[Any, Operator], ...]] = (  # pairs: the parser's operators have no hash
    (promql_parser.MatchOp.Equal, "="),
    (promql_parser.MatchOp.NotEqual, "!="),
    (promql_parser.MatchOp.Re, "=~"),
    (promql_parser.MatchOp.NotRe, "!~"),
)


def _operator(matcher: Any) -> Operator:
    return next(sign for operator, sign in _OPERATORS if operator == matcher.op)


def _matchers(node: Any) -> list[Any]:
    if node.matchers.or_matchers:
        raise PromQLError("`or` between label matchers is not PromQL that Prometheus accepts; use =~")
    return list(node.matchers.matchers)


def _names(node: Any) -> list[str]:
    if node.name:
        return [node.name]
    return [one.value for one in _matchers(node) if one.name == "__name__" and _operator(one) == "="]


def _seconds(value: timedelta | None) -> float:
    return value.total_seconds() if value is not None else 0.0


def _without_parentheses(node: Any) -> Any:
    while isinstance(node, promql_parser.ParenExpr):
        node = node.expr
    return node


def _aggregation(node: Any, query: str) -> Aggregation:
    name = str(node.op)
    if name not in ("min", "max", "sum"):
        raise PromQLError(_not_for_scrape(query, f"{name}()"))
    if node.modifier is not None:
        raise PromQLError(_not_for_scrape(query, "by or without"))
    return cast("Aggregation", name)


def _label_matcher(one: Any) -> LabelMatcher:
    operator = _operator(one)
    pattern = _pattern(one.value) if operator in ("=~", "!~") else None
    return LabelMatcher(name=one.name, operator=operator, value=one.value, pattern=pattern)


def _pattern(text: str) -> re.Pattern[str]:
    # Prometheus' dot takes a newline and its \d is ASCII. What the two languages read differently, as [[:alpha:]],
    # Python warns about: better refused than silently another condition.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return re.compile(text, re.DOTALL | re.ASCII)
        except (re.error, RecursionError, OverflowError, Warning) as exc:
            raise PromQLError(f"regular expression {text!r} cannot be used on a scrape source: {exc}") from exc


def _not_for_scrape(query: str, seen: str) -> str:
    return (
        f'{_shown(query)} has {seen}; a scrape source answers a selector such as `name{{label="value"}}`, '
        "alone or inside min(), max() or sum(); use Prometheus for more"
    )


def _shown(query: str) -> str:
    return repr(query if len(query) <= 200 else query[:200] + "…")
