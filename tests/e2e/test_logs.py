"""What the real sidecar writes while it works: one line a transition, nothing a request."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.e2e

EXTERNAL = {"trigger": "external", "type": "alertmanager", "match": ["killswitch=kill"]}


def test_a_transition_is_one_line_and_a_request_is_none(
    make_sidecar: Callable[..., Any], wait: Callable[..., Any]
) -> None:
    sidecar = make_sidecar([EXTERNAL], [], recovery={"cooldown": "500ms"}).start()
    sidecar.wait_status("the gate to open", lambda status: status["ready"])
    wait(lambda: sidecar.logged("trigger.health"), "the line of the rule's first look")
    before = sidecar.log_file.read_text()
    for _ in range(50):
        assert sidecar.gate().status == 200
        assert sidecar.operations("/metrics").status == 200
        assert sidecar.operations("/nowhere").status == 404
        assert sidecar.order(intent="new").get("decision") == "deny"
        sidecar.status()
    sidecar.kill_switch("fat finger")
    wait(lambda: sidecar.logged("switch.killed"), "the line of the kill")
    lines = [json.loads(line) for line in sidecar.log_file.read_text().removeprefix(before).splitlines()]
    assert [line["event"] for line in lines] == ["switch.killed"]
    (line,) = lines
    assert (line["level"], line["from"], line["to"], line["by"]) == ("warning", "ACTIVE", "KILLED", "alice")

    assert sidecar.recover().status == 200
    sidecar.wait_status("full trading", lambda status: status["position_limit_factor"] == 1.0)
    wanted = {"recovery.requested": 1, "recovery.started": 1, "switch.reopened": 1, "restart.step": 2}
    wait(lambda: len(sidecar.logged("restart.step")) == 2, "the lines of the steps")
    assert {event: len(sidecar.logged(event)) for event in wanted} == wanted


def test_a_console_shows_the_same_as_text(make_sidecar: Callable[..., Any], wait: Callable[..., Any]) -> None:
    sidecar = make_sidecar([EXTERNAL], [], logging={"format": "console"})
    sidecar.launch()
    wait(lambda: " INFO    sidecar.ready switch=" in sidecar.log_file.read_text(), "the line of the start")
