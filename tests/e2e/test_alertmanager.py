"""Alerts in: the real Alertmanager, run with the example that we ship, stops trading by the webhook."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.messengers import EXTERNAL, Alertmanager, Listener

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.e2e

HALTS = {**EXTERNAL, "action": "halt"}


def is_clear(sidecar: Any) -> bool:
    return bool(sidecar.trigger_of("external")["status"] == "inactive")


def test_a_real_alert_kills_its_resolve_releases_nothing_and_a_new_one_kills_again(
    guarded: Callable[..., Any], alertmanager: Alertmanager, people: Listener, wait: Callable[..., Any]
) -> None:
    # A group of sidecars' own alerts that the sidecar gets too, whatever the example says of killswitch_origin.
    alertmanager.route("killswitch")["matchers"] = ['killswitch="kill"']
    # Alertmanager quotes the name for a regular expression: "killswitch\\.v1".
    alertmanager.receiver("killswitch")["name"] = alertmanager.route("killswitch")["receiver"] = "killswitch.v1"
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
