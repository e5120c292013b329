"""Every query of both dashboards on a real Prometheus that has scraped real sidecars through kills and a recovery."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.kubernetes.charts import render
from tests.kubernetes.fleet import DESKS, HALTED, KILLED, LAB, MAKER, TAKER, Fleet, Pace
from tests.kubernetes.viewer import Answer, Viewer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]  # the first test waits for the whole story

FOLDER = Path(__file__).parents[2] / "grafana" / "dashboards"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A fleet that has lived through everything that the dashboards have a panel for."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    fleet = Fleet(tmp_path_factory.mktemp("fl"), Pace())
    try:
        fleet.play()
        yield fleet
    finally:
        fleet.close()


def view(fleet: Fleet, uid: str, *, end: float, **chosen: str) -> Viewer:
    return Viewer(
        url=fleet.prometheus.url,
        dashboard=json.loads((FOLDER / f"{uid}.json").read_text()),
        start=fleet.start,
        end=end,
        scrape_interval=fleet.pace.scrape,
        chosen=chosen,
    )


@pytest.fixture(scope="module")
def killed_maker(fleet) -> list[Answer]:
    """The dashboard of the first switch, at the time when it was killed."""
    return list(view(fleet, "killswitch-switch", end=fleet.killed_at, switch=MAKER).answers())


@pytest.fixture(scope="module")
def whole_fleet(fleet) -> list[Answer]:
    """The fleet's dashboard, at the end."""
    return list(view(fleet, "killswitch-fleet", end=fleet.end).answers())


def titled(answers: list[Answer], title: str) -> list[Answer]:
    found = [answer for answer in answers if answer.panel["title"] == title]
    assert found, f"no panel is called {title!r}"
    return found


def rows(answers: list[Answer], title: str, *labels: str) -> list[tuple[str, ...]]:
    """Labels of the series of a panel's first query."""
    return sorted(tuple(one["metric"].get(label, "") for label in labels) for one in titled(answers, title)[0].series)


def number(answers: list[Answer], title: str) -> float:
    (answer,) = titled(answers, title)
    (value,) = answer.numbers
    return value


def without_data(answers: list[Answer]) -> list[str]:
    return [
        f"{one.panel['title']} {one.target['refId']} {dict(one.scope)}: {one.expr}"
        for one in answers
        if not one.numbers
    ]


def has_no_number(answer: Answer) -> bool:
    """An alert has no threshold, and a rule that is switched off no value."""
    return answer.scope.get("trigger") in ("venue_alert", "overnight_gap")


def test_every_query_about_one_switch_returns_data(killed_maker):
    assert len({answer.panel["title"] for answer in killed_maker}) > 30
    assert without_data([answer for answer in killed_maker if not has_no_number(answer)]) == []


def test_every_query_about_the_fleet_returns_data(whole_fleet):
    assert without_data(whole_fleet) == []


def test_every_annotation_marks_the_changes_of_state(fleet):
    for uid, series in (("killswitch-switch", "state"), ("killswitch-fleet", "switch")):
        (mark,) = view(fleet, uid, end=fleet.end, **({"switch": MAKER} if series == "state" else {})).marks()
        times = {one["metric"][series]: {float(value) / 1000 for _, value in one["values"]} for one in mark["series"]}
        if series == "state":
            assert {"ACTIVE", "KILLED", "RECOVERING"} <= times.keys()
            assert any(fleet.start < time < fleet.killed_at for time in times["KILLED"])
            assert any(fleet.killed_at < time < fleet.end for time in times["RECOVERING"])
        else:
            assert {MAKER, TAKER, KILLED} == times.keys()


def test_the_variables_offer_what_there_is(fleet):
    one = view(fleet, "killswitch-switch", end=fleet.end, switch=TAKER)
    assert one.values["switch"] == [TAKER]
    assert one.values["instance"] == [f"127.0.0.1:{fleet.ports[TAKER]}"]
    assert view(fleet, "killswitch-fleet", end=fleet.end).values["switch"] == sorted(DESKS)
    assert view(fleet, "killswitch-fleet", end=fleet.end).values["desk"] == ["crypto", "fx"]


def test_choosing_a_desk_leaves_its_switches(fleet):
    viewer = view(fleet, "killswitch-fleet", end=fleet.end, desk="fx")
    assert viewer.values["switch"] == [MAKER, TAKER]
    assert rows(list(viewer.answers()), "All switches", "switch", "desk") == [(MAKER, "fx"), (TAKER, "fx")]


def test_a_kill_and_its_cause_are_told_in_words(killed_maker):
    assert number(killed_maker, "State") == 4  # KILLED
    assert number(killed_maker, "Restriction") == 3  # halt
    assert number(killed_maker, "Position limit factor") == 0
    assert rows(killed_maker, "Why it is killed", "code", "trigger") == [("breach", "portfolio_drawdown")]
    status = {one["metric"]["trigger"]: one["value"][1] for one in titled(killed_maker, "Rules now")[0].series}
    assert {rule for rule, code in status.items() if code == "3"} == {"portfolio_drawdown", "volatility_spike"}


def test_the_recovery_is_seen_step_by_step(fleet):
    answers = list(view(fleet, "killswitch-switch", end=fleet.end, switch=MAKER).answers())
    state, _, stage = (set(one.numbers) for one in titled(answers, "State, restriction and recovery"))
    assert state == {2, 3, 4}  # ACTIVE, RECOVERING, KILLED
    assert {4, 5, 6} <= stage  # COOLDOWN, GRADUAL_RESTART, COMPLETE
    assert set(titled(answers, "Position limit factor over time")[0].numbers) >= {0.0, 0.5, 0.75, 1.0}
    assert max(titled(answers, "Cooldown left over time")[0].numbers) > 0


def test_a_rule_that_cannot_see_is_told_apart_on_both_dashboards(killed_maker, whole_fleet):
    could = {one["metric"]["trigger"]: one["value"][1] for one in titled(killed_maker, "Rules now")[3].series}
    assert {rule: code for rule, code in could.items() if code != "1"} == {"quote_spread": "0", "overnight_gap": "2"}
    assert set(rows(whole_fleet, "Rules that cannot fire", "desk", "switch", "trigger")) == {
        ("fx", MAKER, "quote_spread"),
        ("fx", MAKER, "overnight_gap"),
        ("crypto", HALTED, "venue_latency"),
    }
    reasons = rows(whole_fleet, "Why rules were blind", "switch", "trigger", "reason")
    assert (MAKER, "quote_spread", "missing") in reasons
    assert any(row[:2] == (HALTED, "venue_latency") for row in reasons)


def test_the_fleet_says_who_is_killed_and_why(fleet, whole_fleet):
    killed = titled(whole_fleet, "Killed: who, since when, why")[0].series
    assert {
        tuple(one["metric"].get(label, "") for label in ("desk", "switch", "state", "code", "trigger"))
        for one in killed
    } == {
        ("crypto", KILLED, "KILLED", "operator", ""),
        ("crypto", KILLED, "KILLED", "breach", "portfolio_drawdown"),
        ("crypto", KILLED, "KILLED", "alert", "venue_alert"),
    }
    assert all(fleet.start < float(one["value"][1]) / 1000 < fleet.end for one in killed)
    by_desk = {one["metric"]["desk"]: one["value"][1] for one in titled(whole_fleet, "By desk")[1].series}
    assert by_desk == {"fx": "0", "crypto": "1", "none": "0"}
    assert number(whole_fleet, "Switches") == 5
    assert number(whole_fleet, "Killed") == 1
    assert number(whole_fleet, "Restricted, not killed") == 1
    assert number(whole_fleet, "Not enforcing") == 1
    assert number(whole_fleet, "Sidecars out of reach") == 0


def test_a_killed_switch_that_two_targets_carry_is_told_twice_and_breaks_no_table(fleet):
    answers = list(view(fleet, "killswitch-fleet", end=fleet.killed_at).answers())
    killed = rows(answers, "Killed: who, since when, why", "switch", "job", "code")
    assert [row for row in killed if row[0] == MAKER] == [(MAKER, "killswitch", "breach"), (MAKER, "rollout", "breach")]
    assert rows(answers, "All switches", "switch") == [(name,) for name in sorted(DESKS)]


def test_the_fleet_shows_gaps_in_the_protection(whole_fleet):
    assert rows(whole_fleet, "Blind sources", "desk", "switch", "source") == [("crypto", HALTED, "scrape:venue")]
    assert rows(whole_fleet, "Waived rules", "desk", "switch", "trigger") == [("fx", TAKER, "portfolio_drawdown")]
    assert rows(whole_fleet, "Refused configurations", "desk", "switch") == [("crypto", HALTED)]
    assert rows(whole_fleet, "Gates that nobody asks", "desk", "switch") == [("none", LAB)]


def test_a_query_without_data_would_be_found(fleet):
    viewer = view(fleet, "killswitch-switch", end=fleet.end)
    viewer.values["switch"] = ["trading/nobody"]
    assert any(place.startswith("State A") for place in without_data(list(viewer.answers())))


@pytest.mark.parametrize("version", [3, 4])
def test_the_chart_brings_the_dashboards_as_they_are(version):
    brought = render(sets=("dashboards.enabled=true",), version=version).of("ConfigMap")
    labelled = [one for one in brought if one["metadata"].get("labels", {}).get("grafana_dashboard") == "1"]
    texts = {name: json.loads(text) for one in labelled for name, text in one["data"].items()}
    assert texts == {file.name: json.loads(file.read_text()) for file in FOLDER.glob("*.json")}
