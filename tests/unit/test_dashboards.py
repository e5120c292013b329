"""The dashboards as files: made from code, free of what the lint forbids, understood by Grafana's own models."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from grafana import generate, lint

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "grafana" / "dashboards").glob("*.json"))
DASHBOARDS = [pytest.param(json.loads(file.read_text()), id=file.stem) for file in FILES]


def documented_metrics() -> set[str]:
    names = set(re.findall(r"^\| `(killswitch_\w+)`", (ROOT / "docs" / "METRICS.md").read_text(), re.MULTILINE))
    parts = {f"{name}_{part}" for name in names for part in ("bucket", "count", "sum") if name.endswith("_seconds")}
    return names | parts | {"up", "process_resident_memory_bytes", "process_cpu_seconds_total"}


def problems(dashboard: dict[str, Any]) -> list[str]:
    return lint.problems(dashboard, metrics=documented_metrics())


def test_the_files_are_what_the_generator_writes():
    assert {file.name: file.read_text() for file in FILES} == generate.rendered()


def test_the_generator_writes_another_runbook_where_it_is_told(tmp_path, monkeypatch):
    url = "https://wiki.example/killswitch"
    monkeypatch.setattr("sys.argv", ["generate", "--runbook", url, "--into", str(tmp_path / "made")])
    generate.main()
    for file in FILES:
        made = json.loads((tmp_path / "made" / file.name).read_text())
        variables = {one["name"]: one["query"] for one in made["templating"]["list"]}
        assert variables["runbook"] == url
        variables["runbook"] = generate.RUNBOOK
    assert len(list((tmp_path / "made").iterdir())) == 2


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_a_dashboard_has_no_problem(dashboard):
    assert problems(dashboard) == []


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_most_series_are_shown_somewhere(dashboard):
    """Only what has no story of its own in a picture is left to the query browser."""
    shown = {name for file in FILES for name in re.findall(r"killswitch_\w+", file.read_text())}
    left_out = {
        "killswitch_audit_head_sequence",  # compared by `killswitch audit verify`
        "killswitch_transitions_total",  # the timelines and marks show the changes themselves
        "killswitch_trigger_evaluations_total",  # the duration's count says the same
    }
    histograms = {name for name in documented_metrics() if f"{name}_bucket" in shown}
    missing = {name for name in documented_metrics() - histograms if name.startswith("killswitch_")} - shown
    assert {name for name in missing if not name.endswith(("_bucket", "_count", "_sum"))} == left_out


# What the lint is for: each rule with what it must find


def first(dashboard: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(panel for panel in dashboard["panels"] if panel["type"] == kind)


def set_expr(expr: str) -> Callable[[dict[str, Any]], None]:
    def change(dashboard: dict[str, Any]) -> None:
        first(dashboard, "stat")["targets"][0]["expr"] = expr

    return change


def change_first(kind: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda dashboard: first(dashboard, kind).update(changes)


def add_threshold(dashboard: dict[str, Any]) -> None:
    steps = [{"color": "green", "value": None}, {"color": "red", "value": 0.15}]
    first(dashboard, "timeseries")["fieldConfig"]["defaults"]["thresholds"] = {"mode": "absolute", "steps": steps}


def drop_unit(dashboard: dict[str, Any]) -> None:
    del first(dashboard, "stat")["fieldConfig"]["defaults"]["unit"]


def drop_legend(dashboard: dict[str, Any]) -> None:
    first(dashboard, "timeseries")["targets"][0]["legendFormat"] = ""


def forget_a_state(dashboard: dict[str, Any]) -> None:
    panel = first(dashboard, "state-timeline")
    for settings in (panel["fieldConfig"]["defaults"], *panel["fieldConfig"]["overrides"]):
        for one in [settings, *settings.get("properties", [])]:
            for mapping in one.get("mappings") or (one.get("value") if one.get("id") == "mappings" else None) or []:
                mapping["options"].pop("2", None)


def only_colour(dashboard: dict[str, Any]) -> None:
    first(dashboard, "stat")["fieldConfig"]["defaults"]["mappings"] = [
        {"type": "value", "options": {"1": {"color": "red", "index": 0}}}
    ]


def fixed_datasource(dashboard: dict[str, Any]) -> None:
    first(dashboard, "stat")["targets"][0]["datasource"] = {"type": "prometheus", "uid": "P1809F7CD0C75ACF3"}


def drop_variable(name: str) -> Callable[[dict[str, Any]], None]:
    def change(dashboard: dict[str, Any]) -> None:
        variables = dashboard["templating"]["list"]
        variables[:] = [one for one in variables if one["name"] != name]

    return change


def add_variable(dashboard: dict[str, Any]) -> None:
    dashboard["templating"]["list"].append({"type": "textbox", "name": "leftover", "query": ""})


def overlap(dashboard: dict[str, Any]) -> None:
    dashboard["panels"][3]["gridPos"] = dashboard["panels"][4]["gridPos"]


def same_title(dashboard: dict[str, Any]) -> None:
    dashboard["panels"][3]["title"] = dashboard["panels"][4]["title"]


def same_id(dashboard: dict[str, Any]) -> None:
    dashboard["panels"][3]["id"] = dashboard["panels"][4]["id"]


def no_marks(dashboard: dict[str, Any]) -> None:
    dashboard["annotations"]["list"] = [one for one in dashboard["annotations"]["list"] if one.get("builtIn")]


BAD = {
    "is no PromQL": set_expr("sum(("),
    "range [5m] is none of": set_expr('sum(rate(killswitch_audit_events_total{job=~"$job"}[5m]))'),
    "metric 'killswitch_stat' is not documented": set_expr('killswitch_stat{job=~"$job"}'),
    "a variable stands outside a label matcher": set_expr(
        'label_replace(killswitch_state{job=~"$job"}, "desk", "$switch", "switch", ".*")'
    ),
    "compares with the number 0.15": set_expr('killswitch_trigger_value{job=~"$job"} > 0.15'),
    "holds the number 86400": set_expr('killswitch_trigger_value{job=~"$job"} * 86400'),
    "schemaVersion is 38": lambda dashboard: dashboard.update(schemaVersion=38),
    "uid must be stable": lambda dashboard: dashboard.update(uid=None),
    "an id belongs to one Grafana only": lambda dashboard: dashboard.update(id=7),
    "datasource is {'type': 'prometheus', 'uid': 'P1809F7CD0C75ACF3'}": fixed_datasource,
    "has no variables ['switch']": drop_variable("switch"),
    "variable 'runbook' is used and not defined": drop_variable("runbook"),
    "variable 'leftover' is defined and not used": add_variable,
    "no link leads to the other dashboard": lambda dashboard: dashboard["links"].pop(0),
    "no link leads to the runbook": lambda dashboard: dashboard["links"].pop(1),
    "no annotation marks the changes of state": no_marks,
    "the description is no sentence": change_first("stat", description=""),
    "has no unit": drop_unit,
    "has no legend": drop_legend,
    "two panels are called": same_title,
    "the colour changes at 0.15": add_threshold,
    "a mapping has a colour and no word": only_colour,
    "no word for ['2']": forget_a_state,
    "two panels have one id": same_id,
    "overlap": overlap,
}


@pytest.mark.parametrize("dashboard", DASHBOARDS)
@pytest.mark.parametrize("expected", BAD)
def test_the_lint_finds_what_it_is_for(dashboard, expected):
    changed = copy.deepcopy(dashboard)
    BAD[expected](changed)
    found = problems(changed)
    assert any(expected in problem for problem in found), found


# Grafana's own models

KNOWN_TO_GRAFANA_ONLY = {
    "builtIn",  # of the annotation that each dashboard begins with
    "maxPerRow",
    "textFormat", "titleFormat", "useValueForTime",  # of the Prometheus data source, which annotations leave open
}  # fmt: skip


def lost(source: Any, kept: Any, place: str = "") -> list[str]:
    """Everything of the source that is not in what was kept of it."""
    if isinstance(source, dict) and isinstance(kept, dict):
        gone = [f"{place}.{name}" for name in source if name not in kept and name not in KNOWN_TO_GRAFANA_ONLY]
        return gone + [
            one for name in source if name in kept for one in lost(source[name], kept[name], f"{place}.{name}")
        ]
    if isinstance(source, list) and isinstance(kept, list) and len(source) == len(kept):
        return [
            one for index, pair in enumerate(zip(source, kept, strict=True)) for one in lost(*pair, f"{place}[{index}]")
        ]
    return [] if source == kept else [f"{place}: {source!r} became {kept!r}"]


def through_grafanas_models(dashboard: dict[str, Any]) -> Any:
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    return json.loads(JSONEncoder().encode(Dashboard.from_json(copy.deepcopy(dashboard))))


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_grafanas_models_know_every_field(dashboard):
    assert lost(dashboard, through_grafanas_models(dashboard)) == []


def test_a_misspelt_field_does_not_survive_grafanas_models():
    dashboard = json.loads(FILES[0].read_text())
    first(dashboard, "stat")["options"]["colourMode"] = "background"
    first(dashboard, "timeseries")["fieldConfig"]["defaults"]["custom"]["linewidth"] = 2
    places = lost(dashboard, through_grafanas_models(dashboard))
    assert [place.rpartition(".")[2] for place in places] == ["colourMode", "linewidth"]


def test_provisioning_names_the_data_source_and_the_folder_of_the_dashboards():
    folder = ROOT / "grafana" / "provisioning"
    source = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())
    assert [(one["type"], one["access"]) for one in source["datasources"]] == [("prometheus", "proxy")]
    provider = yaml.safe_load((folder / "dashboards" / "killswitch.yaml").read_text())["providers"][0]
    assert provider["type"] == "file"
    assert provider["options"]["path"] in (ROOT / "docs" / "GRAFANA.md").read_text()


def test_the_packages_that_draw_the_pictures_are_locked_by_hash_and_without_an_address():
    folder = ROOT / "tests" / "kubernetes" / "pictures"
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]
    locked = json.loads((folder / "package-lock.json").read_text())["packages"]
    assert locked[""]["dependencies"] == wanted
    assert {name: locked[f"node_modules/{name}"]["version"] for name in wanted} == wanted
    packages = {name: one for name, one in locked.items() if name}
    assert [name for name, one in packages.items() if not one.get("integrity", "").startswith("sha512-")] == []
    assert [name for name, one in packages.items() if "resolved" in one] == []
