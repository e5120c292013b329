"""The alerts about ourselves: checked and unit-tested by promtool, and live in a Prometheus that scrapes sidecars."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.cast import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.e2e

FOLDER = Path(__file__).parents[2] / "rules" / "prometheus"
RULES = FOLDER / "killswitch.rules.yaml"
EXTERNAL = {"trigger": "external", "type": "alertmanager", "match": ["killswitch=kill"]}


@pytest.mark.usefixtures("_programs")
@pytest.mark.timeout(300)  # a few seconds of CPU, and other tests beside it
@pytest.mark.parametrize("arguments", [("check", RULES), ("test", FOLDER / "killswitch.rules.test.yaml")])
def test_promtool_is_content(arguments: tuple[str, Path]) -> None:
    what, file = arguments
    done = subprocess.run(
        ["promtool", what, "rules", file], capture_output=True, text=True, timeout=280, check=False, cwd=FOLDER
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_real_prometheus_tells_one_switch_from_another_and_misses_a_sidecar_that_is_gone(
    make_sidecar: Callable[..., Any], own_prometheus: Any, wait: Callable[..., Any], case: str
) -> None:
    names = (f"{case}/stopped", f"{case}/well")
    stopped, well = (
        make_sidecar(
            [EXTERNAL],
            [],
            switch={"name": name},
            recovery={"cooldown": "500ms"},
            operations={"listen": f"127.0.0.1:{free_port()}"},  # the same after its restart
        ).start()
        for name in names
    )
    own_prometheus.configure(
        {
            "global": {"scrape_interval": "250ms", "scrape_timeout": "200ms", "evaluation_interval": "250ms"},
            "rule_files": [str(RULES)],
            "scrape_configs": [
                {
                    "job_name": "bots",
                    "static_configs": [{"targets": [f"127.0.0.1:{one.operations_port}" for one in (stopped, well)]}],
                }
            ],
        }
    )
    own_prometheus.start()
    wait(lambda: len(own_prometheus.query('killswitch_state{state="ACTIVE"} == 1')) == 2, "both to be scraped")
    assert own_prometheus.alerts("KillswitchKilled") == []

    stopped.kill_switch("fat finger")
    (alert,) = wait(lambda: own_prometheus.alerts("KillswitchKilled"), "the alert")
    assert alert["labels"]["switch"] == names[0]
    assert alert["labels"]["killswitch_origin"] == "prometheus"
    assert alert["annotations"]["summary"] == f"{names[0]}: trading is stopped"

    assert stopped.recover().status == 200
    stopped.wait_status("trading", lambda status: status["state"] == "ACTIVE")
    wait(lambda: own_prometheus.alerts("KillswitchKilled") == [], "the alert to end")

    stopped.kill9()
    (down,) = wait(lambda: own_prometheus.alerts("KillswitchSidecarDown", "pending"), "the sidecar to be missed")
    assert down["labels"]["switch"] == names[0]
    stopped.start()
    wait(lambda: own_prometheus.alerts("KillswitchSidecarDown", "pending") == [], "the sidecar to be back")
