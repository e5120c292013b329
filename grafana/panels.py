"""The parts that both dashboards are made of: panels, queries, variables, and the words for coded numbers.

Plain dictionaries in the shape of Grafana's dashboard JSON, schema version 39; each function knows one kind of part and
leaves out what Grafana fills in by itself. What the dashboards show stands in switch.py and fleet.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Json = dict[str, Any]

DATASOURCE: Final[Json] = {"type": "prometheus", "uid": "${datasource}"}
GREEN, ORANGE, RED, PURPLE, BLUE, GREY = "green", "orange", "red", "purple", "blue", "#8e8e8e"

# What is shown as a word is a label in the metrics and a number in a panel; 0 is "none of these is 1".
# The worse has the higher number: of two pods that carry one switch, the worse is shown.
STATES: Final = {"DISABLED": PURPLE, "ACTIVE": GREEN, "RECOVERING": ORANGE, "KILLED": RED}
RESTRICTIONS: Final = {"none": GREEN, "reduce_only": ORANGE, "halt": RED}
STAGES: Final = {
    "NONE": GREY,
    "PENDING": ORANGE,
    "VALIDATING": ORANGE,
    "COOLDOWN": ORANGE,
    "GRADUAL_RESTART": BLUE,
    "COMPLETE": GREEN,
}
REASONS: Final = {
    "active": GREEN,
    "cancel": BLUE,
    "reducing": "light-green",
    "shadow": PURPLE,
    "disabled": PURPLE,
    "killed": RED,
    "recovering": ORANGE,
    "halted": "dark-red",
    "reduce_only": "dark-orange",
    "over_limit": "yellow",
    "blind_order": "dark-yellow",
    "not_ready": "light-purple",
    "stale": "dark-purple",
    "bad_order": "light-blue",
    "internal_error": GREY,
}
STATUSES: Final = {"inactive": GREEN, "pending": ORANGE, "firing": RED}


def coded(metric: str, label: str, words: Mapping[str, str], selector: str, by: str) -> str:
    """PromQL for a one-hot metric as one number: 1 for the first word, 0 where no word holds."""
    codes = (f'{code} * {metric}{{{selector},{label}="{word}"}}' for code, word in enumerate(words, 1))
    return f"max by ({by}) ({' or '.join(codes)})"


def short_hash(expr: str) -> str:
    """An expression with the first twelve digits of its `config_hash`, enough to tell configurations apart."""
    return f'label_replace({expr}, "config_hash", "$1", "config_hash", "(.{{12}}).*")'


def words(known: Mapping[str, str], otherwise: str) -> list[Json]:
    """Value mappings for `coded`."""
    return value_map({0: (otherwise, GREY), **dict(enumerate(known.items(), 1))})


def value_map(texts: Mapping[int, tuple[str, str]]) -> list[Json]:
    """Value mappings from numbers to a word and its colour."""
    options = {
        str(number): {"text": text, "color": color, "index": index}
        for index, (number, (text, color)) in enumerate(texts.items())
    }
    return [{"type": "value", "options": options}]


def quantiles(name: str, metric: str, window: str, selector: str, function: str = "rate") -> list[Json]:
    """Median and 99th percentile of a histogram, of all series that the selector finds."""
    buckets = f"sum by (le) ({function}({metric}_bucket{{{selector}}}[{window}]))"
    return [
        ranged(f"histogram_quantile({share}, {buckets})", f"{name}{text}")
        for share, text in (("0.5", "half within"), ("0.99", "99 % within"))
    ]


# Queries


def ranged(expr: str, legend: str) -> Json:
    """A query over the time range."""
    return {"expr": expr, "legendFormat": legend, "range": True, "instant": False, "format": "time_series"}


def instant(expr: str, legend: str = "") -> Json:
    """A query at the end of the time range."""
    return {"expr": expr, "legendFormat": legend, "range": False, "instant": True, "format": "time_series"}


def tabular(expr: str) -> Json:
    """A query at the end of the time range, one row for each series and one column for each label."""
    return {"expr": expr, "range": False, "instant": True, "format": "table"}


# Panels


def panel(
    kind: str, title: str, description: str, *, queries: Sequence[Json], size: tuple[int, int], unit: str, **more: Any
) -> Json:
    """Any panel; `size` is width out of 24 and height, `more` goes into the field defaults.

    Of `more`, `options`, `custom`, `overrides`, `transformations`, `links` and `repeat` have places of their own.
    """
    places: Json = {
        name: more.pop(name) for name in ("transformations", "links", "repeat", "maxPerRow") if name in more
    }
    if "repeat" in places:
        places["repeatDirection"] = "h"
    overrides, options, custom = more.pop("overrides", []), more.pop("options", {}), more.pop("custom", {})
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "gridPos": {"w": size[0], "h": size[1]},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": DATASOURCE, "editorMode": "code", **query}
            for index, query in enumerate(queries)
        ],
        "fieldConfig": {"defaults": {"unit": unit, **more, "custom": custom}, "overrides": overrides},
        "options": options,
        **places,
    }


def stat(title: str, description: str, query: Json, *, size: tuple[int, int], unit: str, **more: Any) -> Json:
    """One number or word, large."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": more.pop("color_mode", "background"),
        "graphMode": "none",
        "justifyMode": "center",
        "orientation": "auto",
        "textMode": more.pop("text_mode", "value"),
    }
    more = {"thresholds": base(GREEN), "color": {"mode": "thresholds"}, **more}
    return panel("stat", title, description, queries=[query], size=size, unit=unit, options=options, **more)


def lines(
    title: str, description: str, queries: Sequence[Json], *, size: tuple[int, int], unit: str, **more: Any
) -> Json:
    """Numbers over time."""
    custom = {
        "drawStyle": "line",
        "lineInterpolation": "linear",
        "lineWidth": 2,
        "fillOpacity": 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "none", "group": "A"},
        "thresholdsStyle": {"mode": "off"},
        **more.pop("custom", {}),
    }
    options = {
        "legend": {
            "showLegend": True,
            "displayMode": "list",
            "placement": "bottom",
            "calcs": more.pop("calcs", []),
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    more = {"color": {"mode": "palette-classic"}, **more}
    return panel(
        "timeseries", title, description, queries=queries, size=size, unit=unit, options=options, custom=custom, **more
    )


STEPS: Final = {"lineInterpolation": "stepAfter"}
COUNT: Final = {"axisSoftMax": 1}
"""An axis for counts, which are best at zero."""
BARS: Final = {
    **COUNT,
    "drawStyle": "bars",
    "fillOpacity": 70,
    "lineWidth": 0,
    "stacking": {"mode": "normal", "group": "A"},
}


def timeline(title: str, description: str, queries: Sequence[Json], *, size: tuple[int, int], **more: Any) -> Json:
    """Words over time."""
    options = {
        "mergeValues": True,
        "showValue": "auto",
        "alignValue": "left",
        "rowHeight": 0.85,
        "legend": {"showLegend": False, "displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "single", "sort": "none"},
    }
    custom = {"lineWidth": 0, "fillOpacity": 85}
    more = {"color": {"mode": "thresholds"}, "thresholds": base(GREY), **more}
    return panel(
        "state-timeline",
        title,
        description,
        queries=queries,
        size=size,
        unit="none",
        options=options,
        custom=custom,
        **more,
    )


def bars(title: str, description: str, query: Json, *, size: tuple[int, int], unit: str, **more: Any) -> Json:
    """Numbers side by side, now."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "displayMode": "basic",
        "orientation": "horizontal",
        "valueMode": "color",
        "showUnfilled": True,
        "minVizWidth": 8,
        "minVizHeight": 16,
    }
    return panel("bargauge", title, description, queries=[query], size=size, unit=unit, options=options, **more)


def table(
    title: str,
    description: str,
    queries: Sequence[Json],
    *,
    size: tuple[int, int],
    columns: Mapping[str, str],
    join: str | None = None,
    sort: str | None = None,
    none: str,
    **more: Any,
) -> Json:
    """Rows of labels and values.

    Args:
        title: of the panel.
        description: of the panel.
        queries: tabular ones.
        size: width and height.
        columns: the fields shown, in their order, by the names that Prometheus gives them, with their headings.
        join: the label that rows of several queries have in common; None merges rows whose labels are all equal.
        sort: the heading to sort by, descending.
        none: what an empty table says.
        more: as for `panel`.
    """
    combine: list[Json] = []
    if len(queries) > 1:
        combine = [
            {"id": "joinByField", "options": {"byField": join, "mode": "outer"}}
            if join
            else {"id": "merge", "options": {}}
        ]
    shape = [
        {"id": "filterFieldsByName", "options": {"include": {"names": list(columns)}}},
        {
            "id": "organize",
            "options": {
                "excludeByName": {},
                "indexByName": {name: index for index, name in enumerate(columns)},
                "renameByName": dict(columns),
            },
        },
    ]
    options = {
        "showHeader": True,
        "cellHeight": "sm",
        "sortBy": [{"displayName": sort, "desc": True}] if sort else [],
    }
    custom = {"align": "left", "minWidth": 80, "cellOptions": {"type": "auto"}, "filterable": False}
    more = {"noValue": none, "color": {"mode": "thresholds"}, "thresholds": base("text"), **more}
    return panel(
        "table",
        title,
        description,
        queries=queries,
        size=size,
        unit=more.pop("unit", "none"),
        options=options,
        custom=custom,
        transformations=combine + shape,
        **more,
    )


def base(color: str) -> Json:
    """Thresholds without a threshold: one colour for all values."""
    return {"mode": "absolute", "steps": [{"color": color, "value": None}]}


def beyond(limit: float, *, below: str, above: str) -> Json:
    """One threshold. A limit on a metric comes from `killswitch_trigger_threshold`; here only 0 and 1 make sense."""
    return {"mode": "absolute", "steps": [{"color": below, "value": None}, {"color": above, "value": limit}]}


def column(heading: str, **properties: Any) -> Json:
    """Field settings of one column, or of one series by its name."""
    return {"matcher": {"id": "byName", "options": heading}, "properties": _properties(properties)}


def of_query(ref_id: str, **properties: Any) -> Json:
    """Field settings of the series of one query."""
    return {"matcher": {"id": "byFrameRefID", "options": ref_id}, "properties": _properties(properties)}


def _properties(properties: Mapping[str, Any]) -> list[Json]:
    return [{"id": name.replace("__", "."), "value": value} for name, value in properties.items()]


UNKNOWN: Final[list[Json]] = [{"type": "special", "options": {"match": "nan", "result": {"text": "–", "index": 0}}}]
"""Value mapping for a number that is not known."""

REASON_COLOURS: Final[list[Json]] = [
    {
        "matcher": {"id": "byRegexp", "options": f"/(^|: ){reason}$/"},
        "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": color}}],
    }
    for reason, color in REASONS.items()
]
"""The same colour for the gate's reason codes in every panel."""

COLOURED: Final[Json] = {"custom__cellOptions": {"type": "color-background", "mode": "basic"}}
"""A cell in the colour of its value mapping."""


def row(title: str, *, collapsed: bool = False) -> Json:
    """A heading over the panels up to the next one."""
    return {"type": "row", "title": title, "collapsed": collapsed, "panels": []}


# Variables


def datasource_variable() -> Json:
    """Which Prometheus."""
    return {
        "type": "datasource",
        "name": "datasource",
        "label": "Prometheus",
        "query": "prometheus",
        "refresh": 1,
        "hide": 0,
        "regex": "",
        "multi": False,
        "includeAll": False,
    }


def variable(name: str, label: str, query: str, description: str, *, many: bool = False, **more: Any) -> Json:
    """A variable whose values Prometheus knows; one with `many` may have several, and begins with all of them."""
    everything = {"includeAll": True, "current": {"text": ["All"], "value": ["$__all"]}} if many else {}
    return {
        "type": "query",
        "name": name,
        "label": label,
        "description": description,
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": "StandardVariableQuery"},
        "refresh": 2,
        "sort": 1,
        "hide": 0,
        "regex": "",
        "multi": many,
        "includeAll": False,
        **everything,
        **more,
    }


def constant(name: str, value: str, description: str) -> Json:
    """A text that links use."""
    return {
        "type": "constant",
        "name": name,
        "description": description,
        "query": value,
        "hide": 2,
        "skipUrlSync": True,
    }


# Dashboards


def laid_out(parts: Iterable[Json]) -> list[Json]:
    """Panels with ids and positions: from left to right, and a new line where the width of 24 is used up."""
    placed: list[Json] = []
    x = y = height = 0
    for number, part in enumerate(parts, 1):
        heading = part["type"] == "row"
        w, h = (24, 1) if heading else (part["gridPos"]["w"], part["gridPos"]["h"])
        if x + w > 24:
            x, y, height = 0, y + height, 0
        w = 24 if "repeat" in part else w  # Grafana gives the copies their width
        placed.append({"id": number, **part, "gridPos": {"x": x, "y": y, "w": w, "h": h}})
        x, height = x + w, max(height, h)
    return placed


def dashboard(
    uid: str,
    title: str,
    description: str,
    *,
    other: Json,
    variables: Sequence[Json],
    annotations: Sequence[Json],
    parts: Iterable[Json],
) -> Json:
    """A whole dashboard; `other` is the link to the other one."""
    built_in = {
        "builtIn": 1,
        "datasource": {"type": "grafana", "uid": "-- Grafana --"},
        "enable": True,
        "hide": True,
        "iconColor": "rgba(0, 211, 255, 1)",
        "name": "Annotations & Alerts",
        "type": "dashboard",
    }
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["killswitch"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "fiscalYearStartMonth": 0,
        "liveNow": False,
        "weekStart": "",
        "timepicker": {},
        "links": [other, link("Runbook", "${runbook}", "What to do when it is blocked, and when it is not", "doc")],
        "templating": {"list": list(variables)},
        "annotations": {"list": [built_in, *annotations]},
        "panels": laid_out(parts),
    }


def link(title: str, url: str, tooltip: str, icon: str, *, keep_time: bool = False) -> Json:
    """A link above the dashboard."""
    return {
        "type": "link",
        "title": title,
        "url": url,
        "tooltip": tooltip,
        "icon": icon,
        "tags": [],
        "asDropdown": False,
        "includeVars": False,
        "keepTime": keep_time,
        "targetBlank": not keep_time,
    }


def transitions(expr: str, title: str, description_format: str) -> Json:
    """Marks at the times that the expression's values are, in milliseconds."""
    return {
        "name": "Changes of state",
        "datasource": DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": ORANGE,
        "expr": expr,
        "titleFormat": title,
        "textFormat": description_format,
        "useValueForTime": "on",
    }
