"""The whole chain, from the bot's metric to a gate that denies, by every way there is; and how long each takes."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.e2e.messengers import EXTERNAL, Alertmanager

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.e2e

SERIES = {
    "trigger": "external_series",
    "type": "expression",
    "expr": 'ALERTS{alertstate="firing",killswitch="kill",killswitch_origin=""}',
}


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
