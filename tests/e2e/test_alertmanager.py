"""With the real Alertmanager, run with the example that we ship: its webhook stops trading, and people hear of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.e2e.messengers import EXAMPLE, TOKEN, Alertmanager, Listener, Mailbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

pytestmark = pytest.mark.e2e

EXTERNAL = {
    "trigger": "external",
    "type": "alertmanager",
    "match": ['severity=~"critical|page"', "killswitch=kill"],
}
HALTS = {**EXTERNAL, "action": "halt"}
SERIES = {
    "trigger": "external_series",
    "type": "expression",
    "expr": 'ALERTS{alertstate="firing",killswitch="kill",killswitch_origin=""}',
}


@pytest.fixture
def people() -> Iterator[Listener]:
    people = Listener()
    yield people
    people.close()


@pytest.fixture
def alertmanager(tmp_path: Path) -> Iterator[Alertmanager]:
    server = Alertmanager(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def guarded(
    make_sidecar: Callable[..., Any], alertmanager: Alertmanager, people: Listener, tmp_path: Path
) -> Callable[..., Any]:
    """Starts a sidecar that the Alertmanager sends to, and that sends to the Alertmanager."""

    def start(*rules: Mapping[str, Any], urls: tuple[str, ...] = (), **webhook: Any) -> Any:
        (tmp_path / "token").write_text(TOKEN + "\n")
        sidecar = make_sidecar(
            rules or [EXTERNAL],
            urls,
            switch={"labels": {"desk": "fx", "killswitch": "kill"}},
            alertmanager={
                "webhook": {"match": ['killswitch="kill"'], "token_file": str(tmp_path / "token"), **webhook},
                "notify": {"urls": [alertmanager.url]},
            },
        )
        sidecar.start()
        sidecar.wait_status("the gate to open", lambda status: status["ready"])
        alertmanager.send_to(sidecar=sidecar.operations_port, people=people.port)
        alertmanager.start()
        return sidecar

    return start


def is_clear(sidecar: Any) -> bool:
    return bool(sidecar.trigger_of("external")["status"] == "inactive")


# The example


@pytest.mark.parametrize(
    ("labels", "receivers"),
    [
        (("killswitch=kill", "severity=critical"), "killswitch,everybody-else"),
        (("killswitch=kill", "killswitch_origin=sidecar", "severity=critical"), "trading-desk-and-mail"),
        (("killswitch_origin=prometheus", "severity=warning"), "trading-desk"),
        (("severity=critical",), "everybody-else"),
    ],
)
def test_the_example_is_valid_and_routes_what_stops_to_the_sidecar_and_what_it_says_to_people(
    labels: tuple[str, ...], receivers: str
) -> None:
    if shutil.which("amtool") is None:
        pytest.skip("amtool is not installed")
    checked = subprocess.run(["amtool", "check-config", EXAMPLE], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    routed = ["amtool", "config", "routes", "test", f"--config.file={EXAMPLE}", *labels]
    assert subprocess.run(routed, capture_output=True, text=True, check=True).stdout.strip() == receivers


# In


def test_a_real_alert_kills_its_resolve_releases_nothing_and_a_new_one_kills_again(
    guarded: Callable[..., Any], alertmanager: Alertmanager, people: Listener, wait: Callable[..., Any]
) -> None:
    # A group of sidecars' own alerts that the sidecar gets too, whatever the example says of killswitch_origin.
    alertmanager.route("killswitch")["matchers"] = ['killswitch="kill"']
    sidecar = guarded()
    assert sidecar.gate().decided == (200, "active")
    began = alertmanager.post(alertname="VenueDown", severity="page", killswitch="kill")
    sidecar.wait_gate(403, "killed")
    status = sidecar.status()
    assert (status["causes"][0]["code"], status["causes"][0]["trigger"]) == ("alert", "external")
    assert sidecar.recover().status == 409, "the alert still fires"
    wait(lambda: people.heard("KillswitchKilled", "firing", switch=sidecar.name, desk="fx"), "people to hear of it")

    alertmanager.post(alertname="VenueDown", severity="page", killswitch="kill", began=began, ends=True)
    wait(lambda: is_clear(sidecar), "the resolve")
    assert sidecar.gate().decided == (403, "killed")

    assert sidecar.recover().status == 200
    sidecar.wait_status("trading", lambda status: status["state"] == "ACTIVE")
    wait(lambda: people.heard("KillswitchKilled", "resolved", switch=sidecar.name), "people to hear that it is over")
    wait(lambda: people.heard("KillswitchRestartStep", "firing", factor="0.5"), "people to hear of the first step")
    wait(
        lambda: sidecar.metrics().get('killswitch_webhook_alerts_total{result="ignored"}'),
        "our own alert at our own webhook",
    )
    assert sidecar.status()["state"] == "ACTIVE", "our own alerts never trigger us"

    alertmanager.post(alertname="VenueDown", severity="page", killswitch="kill")
    sidecar.wait_gate(403, "killed")


def test_a_firing_alert_survives_a_crash_and_still_holds_the_halt(
    guarded: Callable[..., Any], alertmanager: Alertmanager
) -> None:
    sidecar = guarded(HALTS)
    alertmanager.post(alertname="VenueDown", severity="critical", killswitch="kill")
    sidecar.wait_gate(403, "halted")
    alertmanager.stop()
    sidecar.restart()
    sidecar.wait_gate(403, "halted")
    sidecar.assert_gate_stays(403, "halted", seconds=1.0)


def test_an_alert_that_cannot_be_stored_is_sent_again_until_it_is(
    guarded: Callable[..., Any], alertmanager: Alertmanager, wait: Callable[..., Any]
) -> None:
    sidecar = guarded(HALTS)
    state = sidecar.state_folder
    (state / "state.json.bak").unlink()
    (state / "state.json.bak").mkdir()  # nothing can be put in its place, not even by root
    delivered = 'alertmanager_notification_latency_seconds_count{integration="webhook"}'
    failed = 'alertmanager_notification_requests_failed_total{integration="webhook"}'
    try:
        alertmanager.post(alertname="VenueDown", severity="critical", killswitch="kill")
        sidecar.wait_gate(403, "halted")
        wait(
            lambda: sidecar.metrics().get('killswitch_webhook_alerts_total{result="duplicate"}'),
            "Alertmanager to send again",
        )
        assert alertmanager.metric(failed) >= 1, "the answer was 200 although nothing was stored"
    finally:
        (state / "state.json.bak").rmdir()
    sidecar.wait_status("the disk", lambda status: status["durable"])
    assert "VenueDown" in json.dumps(json.loads((state / "state.json").read_text()))
    wait(lambda: alertmanager.metric(delivered) > alertmanager.metric(failed), "the delivery to succeed")


@pytest.mark.parametrize("how", ["silence", "inhibition"])
def test_an_alert_that_alertmanager_holds_back_goes_on_restricting(
    guarded: Callable[..., Any], alertmanager: Alertmanager, wait: Callable[..., Any], how: str
) -> None:
    alertmanager.config["inhibit_rules"] = [
        {"source_matchers": ["maintenance=yes"], "target_matchers": ["killswitch=kill"]}
    ]
    sidecar = guarded(HALTS)
    began = alertmanager.post(alertname="VenueDown", severity="critical", killswitch="kill")
    sidecar.wait_gate(403, "halted")
    if how == "silence":
        alertmanager.silence(alertname="VenueDown")
    else:
        alertmanager.post(alertname="Maintenance", maintenance="yes")
    wait(lambda: alertmanager.suppressed("VenueDown"), "the alert to be held back")
    alertmanager.post(alertname="VenueDown", severity="critical", killswitch="kill", began=began, ends=True)
    sidecar.assert_gate_stays(403, "halted", seconds=2.5)  # more than two group intervals
    assert not is_clear(sidecar)


def test_a_truncated_notification_resolves_nothing(
    guarded: Callable[..., Any], alertmanager: Alertmanager, wait: Callable[..., Any]
) -> None:
    alertmanager.receiver("killswitch")["webhook_configs"][0]["max_alerts"] = 1
    alertmanager.route("killswitch")["group_by"] = ["alertname"]
    sidecar = guarded(HALTS)
    alerts = [
        {"alertname": "VenueDown", "venue": venue, "severity": "critical", "killswitch": "kill"} for venue in ("a", "b")
    ]
    began = alertmanager.post_all(alerts)
    sidecar.wait_gate(403, "halted")
    alertmanager.post_all(alerts, ends=True, began=began)
    wait(
        lambda: sidecar.metrics().get('killswitch_webhook_alerts_total{result="ignored"}'), "the resolve to be ignored"
    )
    assert sidecar.gate().decided == (403, "halted")


def test_an_alert_that_is_not_sent_again_stops_blocking_an_approved_recovery(
    guarded: Callable[..., Any], alertmanager: Alertmanager
) -> None:
    sidecar = guarded(expires="3s")
    alertmanager.post(alertname="VenueDown", severity="critical", killswitch="kill")
    sidecar.wait_gate(403, "killed")
    assert sidecar.recover().status == 409
    alertmanager.stop()
    deadline = time.monotonic() + 20
    while (reply := sidecar.recover()).status != 200:
        assert reply.status == 409, reply.body
        assert sidecar.gate().decided == (403, "killed"), "what has expired lifts nothing"
        assert time.monotonic() < deadline, reply.body
        time.sleep(0.1)
    sidecar.wait_status("trading", lambda status: status["state"] == "ACTIVE")


# Out


def test_slack_and_the_mailbox_get_switch_reason_trigger_and_runbook_of_a_kill_and_its_end(
    guarded: Callable[..., Any],
    make_sidecar: Callable[..., Any],
    alertmanager: Alertmanager,
    shared_prometheus: Any,
    drawdown: Any,
    wait: Callable[..., Any],
) -> None:
    slack, mailbox = Listener(), Mailbox()
    alertmanager.send_to(slack=slack.port, mail=mailbox.port)
    alertmanager.start()
    sidecar = make_sidecar(
        [drawdown.rule(annotations={"summary": "Drawdown {{ value }} is beyond {{ threshold }}"})],
        [shared_prometheus.url],
        alertmanager={"notify": {"urls": [alertmanager.url], "runbook_url": "https://wiki.example/RUNBOOK.md"}},
    )
    try:
        sidecar.start()
        sidecar.wait_status("the gate to open", lambda status: status["ready"])
        drawdown.set(-0.2)
        title = f"[FIRING] KillswitchKilled {sidecar.name}"
        (message,) = wait(lambda: slack.attachments(title), "the message in Slack")
        ((recipient, mail),) = wait(lambda: mailbox.mails(title), "the mail")
        assert recipient == "trading-desk@example.com"
        assert (slack.paths[0], slack.bodies[0]["channel"]) == ("/services/T0/B0/x", "#trading")
        assert message["color"] == "danger"
        for text in (message["text"], mail):
            assert f"Switch: {sidecar.name}" in text
            assert "Drawdown -0.2 is beyond -0.15" in text
            assert "Trigger: portfolio_drawdown" in text
            assert "Runbook: https://wiki.example/RUNBOOK.md#killswitchkilled" in text

        drawdown.set(-0.01)
        wait(lambda: sidecar.trigger_of()["status"] == "inactive", "the drawdown to end")
        assert sidecar.recover().status == 200
        over = f"[RESOLVED] KillswitchKilled {sidecar.name}"
        (message,) = wait(lambda: slack.attachments(over), "the end in Slack")
        wait(lambda: mailbox.mails(over), "the end by mail")
        assert message["color"] == "good"
        wait(lambda: slack.attachments(f"[FIRING] KillswitchRestartStep {sidecar.name}"), "the first step in Slack")
        assert not mailbox.mails("[FIRING] KillswitchRestartStep"), "a step is no mail"
    finally:
        slack.close()
        mailbox.close()


def test_an_alertmanager_that_hangs_is_in_the_way_of_neither_kill_nor_gate(
    make_sidecar: Callable[..., Any], wait: Callable[..., Any]
) -> None:
    hanging = Listener(hangs=True)
    sidecar = make_sidecar([EXTERNAL], [], alertmanager={"notify": {"urls": [hanging.url]}})
    try:
        sidecar.start()
        sidecar.wait_status("the gate to open", lambda status: status["ready"])
        sidecar.kill_switch("first")
        wait(lambda: hanging.bodies, "the push that hangs")
        sidecar.kill_switch("second")
        sidecar.recover()
        sidecar.wait_status("trading", lambda status: status["state"] == "ACTIVE")
        sidecar.kill_switch("third")
        assert sidecar.gate().decided == (403, "killed"), "at once"
        told = "no answer in time"
        sidecar.wait_status("it to be named", lambda status: any(told in problem for problem in status["problems"]))
        assert len(hanging.bodies) < 6, "it is not asked more often because much happens"
    finally:
        hanging.close()


def test_an_alertmanager_that_was_away_hears_of_a_kill_when_it_is_back(
    make_sidecar: Callable[..., Any], alertmanager: Alertmanager, people: Listener, wait: Callable[..., Any]
) -> None:
    sidecar = make_sidecar([EXTERNAL], [], alertmanager={"notify": {"urls": [alertmanager.url]}})
    sidecar.start()
    sidecar.kill_switch("nobody listens")
    sidecar.wait_status("it to be missed", lambda status: any("not taken" in one for one in status["problems"]))
    alertmanager.send_to(people=people.port)
    alertmanager.start()
    (told, *_) = wait(lambda: people.heard("KillswitchKilled", "firing"), "the kill to be told", patience=40)
    assert "nobody listens" in told["annotations"]["description"]
    wait(lambda: not any("not taken" in one for one in sidecar.status()["problems"]), "it to be missed no more")


# The whole chain


def test_from_the_bots_metric_to_the_gate_by_every_way(
    guarded: Callable[..., Any],
    make_sidecar: Callable[..., Any],
    own_prometheus: Any,
    alertmanager: Alertmanager,
    exporter: Any,
    drawdown: Any,
    wait: Callable[..., Any],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    alert = {
        "alert": "BotDrawdown",
        "expr": f"{drawdown.selector} < -0.15",
        "labels": {"severity": "critical", "killswitch": "kill"},
    }
    rules = tmp_path / "alerts.yml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "bots", "rules": [alert]}]}))
    own_prometheus.configure(
        {
            "global": {"scrape_interval": "250ms", "scrape_timeout": "200ms", "evaluation_interval": "250ms"},
            "rule_files": [str(rules)],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager.port}"]}]}]},
            "scrape_configs": [{"job_name": "trader", "static_configs": [{"targets": [exporter.address]}]}],
        }
    )
    own_prometheus.start()
    wait(lambda: own_prometheus.query(drawdown.selector), "the first scrape", patience=40)
    ways = {
        "webhook": guarded(EXTERNAL),
        "rule on ALERTS": make_sidecar([SERIES], [own_prometheus.url], switch={"name": f"{drawdown.case}/series"}),
        "own rule": make_sidecar([drawdown.rule()], [own_prometheus.url], switch={"name": f"{drawdown.case}/own"}),
    }
    for way in ("rule on ALERTS", "own rule"):
        ways[way].start()
        ways[way].wait_status("the gate to open", lambda status: status["ready"])

    seen: dict[str, float] = {}
    began = time.monotonic()

    def watch(way: str) -> None:
        ways[way].wait_gate(403, "killed", patience=40)
        seen[way] = time.monotonic() - began

    watchers = [threading.Thread(target=watch, args=(way,)) for way in ways]
    drawdown.set(-0.2)
    for watcher in watchers:
        watcher.start()
    for watcher in watchers:
        watcher.join(60)
    assert seen.keys() == ways.keys()
    assert ways["webhook"].status()["causes"][0]["code"] == "alert"
    times = ", ".join(f"{way} {seen[way]:.2f} s" for way in ways)
    record_property("told", f"bot metric to gate 403 (scrapes and evaluations every 250 ms): {times}")
