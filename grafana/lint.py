"""What a dashboard of ours must be: `problems` names everything that is not so.

A panel that nobody can read at three in the morning is a defect: it has a unit, a description, and words beside its
colours. A number that decides over trading stands in the rules and reaches the panel as a metric, never as a constant.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any, Final

import promql_parser

from grafana.panels import DATASOURCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from grafana.panels import Json

SCHEMA_VERSION: Final = 39
WINDOWS: Final = {"$__rate_interval", "$__interval", "$__range"}

COMPARED_WITH: Final = {"0", "1", "-Inf"}
"""True, false, "any number at all", and a share of a limit that is used up: nothing that a person chose."""

NUMBERS: Final = {"0", "1", "2", "3", "4", "5", "6", "1000", "0.5", "0.99"}
"""Besides those: codes of words, milliseconds in a second, and the quantiles that legends name."""

_SELECTOR = re.compile(r"\{[^{}]*\}")
_QUOTED = re.compile(r'"[^"]*"')
_WINDOW = re.compile(r"\[([^\]]*)\]")
_VARIABLE = re.compile(r"\$\{?(\w+)")
_COMPARISON = re.compile(r"(?:[=!]=|[<>]=?)\s*(?:bool\s+)?(-?\w[\w.]*)?")
_NUMBER = re.compile(r"(?<![\w$.])\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_METRIC = re.compile(r"\b([a-z]\w*)\{")


def problems(dashboard: Json, *, metrics: set[str]) -> list[str]:
    """Everything that is wrong, each with its place.

    Args:
        dashboard: as JSON.
        metrics: names of all metrics that there are.
    """
    found: list[str] = []
    for rule in RULES:
        found += rule(dashboard)
    for place, expr in expressions(dashboard):
        found += (f"{place}: {problem}" for problem in _expression_problems(expr, metrics))
    return found


def panels(dashboard: Json) -> list[Json]:
    """All panels but the headings of rows."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard: Json) -> Iterator[tuple[str, str]]:
    """Every PromQL text of a dashboard with its place: panels, annotations and variables."""
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield f"panel {panel['title']!r} {target['refId']}", target["expr"]
    for annotation in _annotations(dashboard):
        yield f"annotation {annotation['name']!r}", annotation["expr"]
    for variable in _variables(dashboard, "query"):
        yield f"variable {variable['name']!r}", asked_by(variable["query"]["query"])


def asked_by(query: str) -> str:
    """The PromQL inside a variable's query."""
    name, _, inside = query.removesuffix(")").partition("(")
    return inside if name == "query_result" else inside.rpartition(", ")[0]


def without_windows(expr: str) -> str:
    """An expression that a parser takes: a variable as range becomes a minute."""
    return _WINDOW.sub("[1m]", expr)


def _annotations(dashboard: Json) -> list[Json]:
    return [one for one in dashboard["annotations"]["list"] if not one.get("builtIn")]


def _variables(dashboard: Json, kind: str | None = None) -> list[Json]:
    return [one for one in dashboard["templating"]["list"] if kind in (None, one["type"])]


# Expressions


def _expression_problems(expr: str, metrics: set[str]) -> Iterator[str]:
    try:
        promql_parser.parse(without_windows(expr))
    except ValueError as error:
        yield f"is no PromQL: {error}"
        return
    yield from (f"range [{one}] is none of {sorted(WINDOWS)}" for one in _WINDOW.findall(expr) if one not in WINDOWS)
    yield from (f"metric {name!r} is not documented" for name in _METRIC.findall(expr) if name not in metrics)
    bare = _WINDOW.sub("", _SELECTOR.sub("{}", expr))
    if "$" in bare.replace('"$1"', ""):
        yield "a variable stands outside a label matcher"
    yield from _hidden_numbers(_QUOTED.sub("", bare))


def _hidden_numbers(bare: str) -> Iterator[str]:
    for operand in _COMPARISON.findall(bare):
        if operand and operand[-1].isdigit() and operand not in COMPARED_WITH:
            yield f"compares with the number {operand}: a limit comes from a metric"
    for number in _NUMBER.findall(bare):
        if number not in NUMBERS:
            yield f"holds the number {number}, which nobody can see"


# The dashboard as a whole


def _identity(dashboard: Json) -> Iterator[str]:
    if dashboard.get("schemaVersion") != SCHEMA_VERSION:
        yield f"schemaVersion is {dashboard.get('schemaVersion')!r}, not {SCHEMA_VERSION}"
    if not str(dashboard.get("uid", "")).startswith("killswitch-"):
        yield "uid must be stable and begin with killswitch-"
    if "id" in dashboard:
        yield "an id belongs to one Grafana only"


def _datasources(dashboard: Json) -> Iterator[str]:
    named: list[tuple[str, Any]] = []
    for panel in panels(dashboard):
        named.append((f"panel {panel['title']!r}", panel.get("datasource")))
        named += ((f"panel {panel['title']!r} {one['refId']}", one.get("datasource")) for one in panel["targets"])
    named += ((f"variable {one['name']!r}", one.get("datasource")) for one in _variables(dashboard, "query"))
    named += ((f"annotation {one['name']!r}", one.get("datasource")) for one in _annotations(dashboard))
    for place, datasource in named:
        if datasource != DATASOURCE:
            yield f"{place}: datasource is {datasource!r}, not $datasource"


def _defined_variables(dashboard: Json) -> Iterator[str]:
    defined = {one["name"] for one in _variables(dashboard)}
    if missing := {"datasource", "job", "switch"} - defined:
        yield f"has no variables {sorted(missing)}"
    text = str({name: value for name, value in dashboard.items() if name != "templating"})
    text += "".join(str(one.get("query")) for one in _variables(dashboard, "query")) + str(DATASOURCE)
    used = {name for name in _VARIABLE.findall(text) if not name.startswith("__") and not name.isdigit()}
    yield from (f"variable {name!r} is used and not defined" for name in sorted(used - defined))
    yield from (f"variable {name!r} is defined and not used" for name in sorted(defined - used))


def _links(dashboard: Json) -> Iterator[str]:
    addresses = [one["url"] for one in dashboard["links"]]
    if not any(address.startswith("/d/killswitch-") for address in addresses):
        yield "no link leads to the other dashboard"
    if "${runbook}" not in addresses:
        yield "no link leads to the runbook"


def _marks(dashboard: Json) -> Iterator[str]:
    if not _annotations(dashboard):
        yield "no annotation marks the changes of state"


# Panels


def _texts(dashboard: Json) -> Iterator[str]:
    for panel in panels(dashboard):
        if len(panel.get("description", "")) < len("Value ÷ threshold.") or not panel["description"].endswith("."):
            yield f"panel {panel['title']!r}: the description is no sentence"
        if not panel["fieldConfig"]["defaults"].get("unit"):
            yield f"panel {panel['title']!r}: has no unit"
        if panel["type"] in ("timeseries", "bargauge", "state-timeline"):
            yield from (
                f"panel {panel['title']!r} {one['refId']}: has no legend"
                for one in panel["targets"]
                if not one.get("legendFormat")
            )
    titles = [panel["title"] for panel in panels(dashboard)]
    yield from (f"two panels are called {title!r}" for title in sorted({t for t in titles if titles.count(t) > 1}))


def _thresholds(dashboard: Json) -> Iterator[str]:
    for panel in panels(dashboard):
        for place, defaults in _field_settings(panel):
            for step in defaults.get("thresholds", {}).get("steps", []):
                if step["value"] not in (None, 0, 1):
                    yield f"{place}: the colour changes at {step['value']}: a limit comes from a metric"


def _words(dashboard: Json) -> Iterator[str]:
    for panel in panels(dashboard):
        for place, settings in _field_settings(panel):
            for mapping in settings.get("mappings", []):
                results = mapping["options"].values() if mapping["type"] == "value" else [mapping["options"]["result"]]
                yield from (f"{place}: a mapping has a colour and no word" for one in results if not one.get("text"))
        if panel["type"] == "state-timeline":
            yield from _unnamed_codes(panel)


def _unnamed_codes(panel: Json) -> Iterator[str]:
    """States that a timeline would show as a bare number."""
    for target in panel["targets"]:
        codes = set(re.findall(r"(\d) \* killswitch", target["expr"])) or {"1"}
        named = {
            code
            for place, settings in _field_settings(panel)
            if place.endswith((f"query {target['refId']}", "defaults"))
            for mapping in settings.get("mappings", [])
            if mapping["type"] == "value"
            for code in mapping["options"]
        }
        if unnamed := {"0", *codes} - named:
            yield f"panel {panel['title']!r} {target['refId']}: no word for {sorted(unnamed)}"


def _field_settings(panel: Json) -> Iterator[tuple[str, Mapping[str, Any]]]:
    place = f"panel {panel['title']!r}"
    yield f"{place} defaults", panel["fieldConfig"]["defaults"]
    for override in panel["fieldConfig"]["overrides"]:
        kind = "query" if override["matcher"]["id"] == "byFrameRefID" else "field"
        settings = {one["id"]: one["value"] for one in override["properties"]}
        yield f"{place} {kind} {override['matcher']['options']}", settings


def _grid(dashboard: Json) -> Iterator[str]:
    ids = [panel["id"] for panel in dashboard["panels"]]
    if len(set(ids)) < len(ids):
        yield "two panels have one id"
    for one, other in itertools.combinations(dashboard["panels"], 2):
        a, b = one["gridPos"], other["gridPos"]
        across = a["x"] < b["x"] + b["w"] and b["x"] < a["x"] + a["w"]
        if across and a["y"] < b["y"] + b["h"] and b["y"] < a["y"] + a["h"]:
            yield f"panels {one['title']!r} and {other['title']!r} overlap"


RULES: Final[tuple[Callable[[Json], Iterator[str]], ...]] = (
    _identity,
    _datasources,
    _defined_variables,
    _links,
    _marks,
    _texts,
    _thresholds,
    _words,
    _grid,
)
