"""Alerts out: people hear of what sidecars do, by the real Alertmanager and the example that we ship."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.messengers import EXAMPLE, EXTERNAL, Alertmanager, Listener, Mailbox

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.e2e

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


# Slack, mail, and an Alertmanager that is not well


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
