"""Runs the queries of a dashboard as Grafana does: variables first, then every panel with their values filled in."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from math import isnan
from typing import TYPE_CHECKING, Any

from grafana import lint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Json = dict[str, Any]

POINTS = 200
"""About so many steps has a panel over the time range."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one query of one panel gave; `scope` has the value of the variable by which a panel is repeated."""

    panel: Json
    target: Json
    scope: Mapping[str, str] = field(default_factory=dict)
    expr: str
    series: list[Json]

    @property
    def numbers(self) -> list[float]:
        """Every value of every series that is a number."""
        texts = [pair[1] for one in self.series for pair in one.get("values", [one.get("value")])]
        return [value for value in map(float, texts) if not isnan(value)]


@dataclass(kw_only=True)
class Viewer:
    """Somebody who looks at a dashboard.

    Attributes:
        url: of Prometheus.
        dashboard: as JSON.
        start, end: the time range, Unix seconds.
        scrape_interval: seconds; `$__rate_interval` is at least four times as long.
        chosen: values of variables chosen by hand; all others begin as they do in Grafana.
        values: of all variables, filled in by the constructor.
    """

    url: str
    dashboard: Json
    start: float
    end: float
    scrape_interval: float
    chosen: Mapping[str, str] = field(default_factory=dict)
    values: dict[str, list[str]] = field(default_factory=dict)
    everything: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for variable in self.dashboard["templating"]["list"]:
            if variable["type"] == "query":
                self._settle(variable)

    @property
    def step(self) -> float:
        """Seconds between two points, as short as the scrape interval at least."""
        return max((self.end - self.start) / POINTS, self.scrape_interval)

    def answers(self) -> Iterator[Answer]:
        """Every query of every panel, those of repeated panels once for each value."""
        for panel in lint.panels(self.dashboard):
            for scope in self.scopes(panel):
                for target in panel["targets"]:
                    expr = self.filled(target["expr"], scope)
                    series = self._instant(expr) if target["instant"] else self._range(expr)
                    yield Answer(panel=panel, target=target, scope=scope, expr=expr, series=series)

    def scopes(self, panel: Json) -> list[dict[str, str]]:
        """One for each time that the panel is drawn."""
        name = panel.get("repeat")
        return [{name: value} for value in self.values[name]] if name else [{}]

    def marks(self) -> list[Json]:
        """Series of the annotations, over the time range."""
        return [
            {"annotation": one, "series": self._range(self.filled(one["expr"]))}
            for one in self.dashboard["annotations"]["list"]
            if "expr" in one
        ]

    def filled(self, text: str, scope: Mapping[str, str] | None = None) -> str:
        """A text with the values of all variables in it."""
        for name, seconds in {
            "$__rate_interval": max(self.step + self.scrape_interval, 4 * self.scrape_interval),
            "$__interval": self.step,
            "$__range": self.end - self.start,
        }.items():
            text = text.replace(name, f"{round(seconds * 1000)}ms")
        return re.sub(r"\$\{?([a-z]+)\}?", lambda match: self._value(match[1], scope or {}), text)

    def _value(self, name: str, scope: Mapping[str, str]) -> str:
        variable = next(one for one in self.dashboard["templating"]["list"] if one["name"] == name)
        values = [scope[name]] if name in scope else self.values[name]
        if self.everything[name] and name not in scope and variable.get("allValue"):
            return str(variable["allValue"])
        if not variable["multi"]:
            return values[0]
        escaped = [re.sub(r"([\\^$*+?.()|{}\[\]])", r"\\\\\1", value) for value in values]
        return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"

    def _settle(self, variable: Json) -> None:
        name = variable["name"]
        options = self._options(variable)
        wanted = self.chosen.get(name) or variable.get("current", {}).get("value")
        self.everything[name] = wanted == ["$__all"]
        if self.everything[name]:
            self.values[name] = options
        else:
            self.values[name] = [wanted if wanted in options else next(iter(options), "")]

    def _options(self, variable: Json) -> list[str]:
        query = self.filled(variable["query"]["query"])
        expr = lint.asked_by(query)
        if query.startswith("query_result("):
            texts = [
                "{" + ",".join(f'{label}="{value}"' for label, value in one["metric"].items()) + "}"
                for one in self._instant(expr)
            ]
            found = [match[1] for text in texts if (match := re.search(variable["regex"].strip("/"), text))]
        else:
            label = query.removesuffix(")").rpartition(", ")[2]
            found = self._get(f"label/{label}/values", {"match[]": expr, "start": self.start, "end": self.end})
        return sorted(found)

    def _instant(self, expr: str) -> list[Json]:
        return list(self._get("query", {"query": expr, "time": self.end})["result"])

    def _range(self, expr: str) -> list[Json]:
        asked = {"query": expr, "start": self.start, "end": self.end, "step": self.step}
        return list(self._get("query_range", asked)["result"])

    def _get(self, path: str, parameters: Mapping[str, object]) -> Any:
        request = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                document = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise AssertionError(f"Prometheus refuses {parameters}: {error.read().decode()}") from None
        assert "warnings" not in document, document
        return document["data"]
