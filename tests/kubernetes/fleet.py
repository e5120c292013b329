"""Five real sidecars of three desks under a real Prometheus, in everything that the dashboards have a panel for.

| switch | desk | what happens to it |
|---|---|---|
| `trading/maker-0` | fx | a drawdown kills it; an approved recovery brings it back in steps; one rule is blind |
| `trading/taker-0` | fx | a drawdown kills it, and it trades again with that rule waived |
| `arb/bot-0` | crypto | one of its sources dies, so that a rule halts it; its new rule file is refused |
| `arb/bot-1` | crypto | a drawdown kills it, an operator too, an alert arrives; it stays killed |
| `lab/bot-0` | | in shadow mode; nobody asks its gate |
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from tests.cast import CODE, Exporter, Metric, Prometheus, Sidecar, _config, free_port, wait_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

MAKER, TAKER, HALTED, KILLED, LAB = "trading/maker-0", "trading/taker-0", "arb/bot-0", "arb/bot-1", "lab/bot-0"
DESKS = {MAKER: "fx", TAKER: "fx", HALTED: "crypto", KILLED: "crypto", LAB: None}
PATIENCE = 60.0


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long things take; for a picture people need to see them.

    Attributes:
        scrape: seconds between two scrapes of Prometheus.
        calm: seconds before the first kill, and after the last change.
        killed: seconds that the first switch stays killed.
        cooldown: seconds.
        step: seconds from one restart step to the next.
        twin: whether the first switch is scraped by two jobs, as while two pods of a rollout carry one switch.
    """

    scrape: float = 0.5
    calm: float = 1.0
    killed: float = 1.0
    cooldown: float = 2.0
    step: float = 1.0
    twin: bool = True


class Fleet:
    """The sidecars, what they watch, and who asks them; `close` ends all of it."""

    def __init__(self, folder: Path, pace: Pace) -> None:
        self.folder = folder
        self.pace = pace
        self.exporter = Exporter()
        self.dying = Exporter()
        self.ports = {name: free_port() for name in DESKS}
        self.prometheus = self._prometheus()
        self.sidecars = {name: self._sidecar(name) for name in DESKS}
        self.start = self.killed_at = self.end = time.time()
        self._closed = threading.Event()
        self._askers = [threading.Thread(target=self._ask, args=(name,)) for name in DESKS if name != LAB]

    def close(self) -> None:
        """End every process and thread."""
        self._closed.set()
        for thread in self._askers:
            if thread.is_alive():
                thread.join(15)
        for sidecar in self.sidecars.values():
            sidecar.close()
        self.prometheus.kill()
        self.exporter.close()
        self.dying.close()

    # The story

    def play(self) -> None:
        """Let everything happen; afterwards all that is to be seen is in Prometheus."""
        self._begin()
        time.sleep(self.pace.calm)
        maker, taker, killed = self.sidecars[MAKER], self.sidecars[TAKER], self.sidecars[KILLED]
        self._slide(MAKER, -0.18)
        self.metric(TAKER, "portfolio_drawdown_ratio").set(-0.17)
        for switch in (maker, taker):
            switch.wait_status(
                "the kill to be durable", lambda one: one["state"] == "KILLED" and one["durable"], patience=PATIENCE
            )
        self.metric(MAKER, "quote_spread").drop()
        self._lose_a_source()
        self._refuse_a_file()
        killed.kill_switch("prices of the venue look wrong")
        self.metric(KILLED, "portfolio_drawdown_ratio").set(-0.21)
        self._alert(killed, {"alertname": "VenueDown", "killswitch": "kill"})
        self._alert(maker, {"alertname": "DiskFull"})
        self._seen(f'killswitch_state{{switch="{MAKER}",state="KILLED"}} == 1')
        self._seen('killswitch_trigger_evaluation_failures_total{trigger="quote_spread",reason="missing"} > 1')
        time.sleep(self.pace.killed)
        self.killed_at = self._moment()

        self.metric(MAKER, "portfolio_drawdown_ratio").set(-0.04)
        maker.wait_status("the rule to clear", lambda _: maker.trigger_of()["status"] == "inactive", patience=PATIENCE)
        assert (
            taker.recover(waive=[{"trigger": "portfolio_drawdown", "threshold": -0.25, "until": _tomorrow()}]).status
            == 200
        )
        reply = maker.recover(reason="positions reconciled")
        assert reply.status == 200, reply.body
        for switch in (maker, taker):
            switch.wait_status(
                "full trading", lambda one: one["position_limit_factor"] == 1.0, patience=PATIENCE + 3 * self.pace.step
            )
        self._seen(f'killswitch_position_limit_factor{{switch=~"{MAKER}|{TAKER}"}} == 1', count=2)
        self._seen(f'killswitch_kill_cause{{switch="{KILLED}"}} == 1', count=3)
        self._seen("killswitch_source_up == 0")
        self._seen("killswitch_config_last_reload_successful == 0")
        self._seen("killswitch_trigger_shadow_firings_total > 0")
        time.sleep(self.pace.calm)
        self.end = self._moment()

    def breach_again(self) -> None:
        """Kill the first switch a second time, for whoever wants to see it killed and what went before."""
        self.metric(MAKER, "portfolio_drawdown_ratio").set(-0.16)
        self._seen(f'killswitch_kill_cause{{switch="{MAKER}"}} == 1')
        time.sleep(self.pace.calm / 2)
        self.end = self._moment()

    def metric(self, switch: str, name: str) -> Metric:
        """A metric of the bot beside this switch."""
        return Metric(exporter=self.exporter, name=name, case=switch)

    def _begin(self) -> None:
        for name in DESKS:
            self.metric(name, "portfolio_drawdown_ratio").set(-0.02)
            self.metric(name, "daily_pnl_ratio").set(0.004)
            self.metric(name, "volatility_ratio").set(0.05)
            self.metric(name, "trading_heartbeat_timestamp_seconds").beat()
        self.metric(MAKER, "quote_spread").set(2.0)
        self.dying.set("venue_latency_seconds", HALTED, 0.02)
        self.prometheus.start()
        for sidecar in self.sidecars.values():
            sidecar.launch()
        for sidecar in self.sidecars.values():
            wait_for(sidecar._listens, f"{sidecar.name} to listen", patience=PATIENCE)
            sidecar.wait_status("the gate to open", lambda status: status["ready"], patience=PATIENCE)
        self._seen("sum by (switch) (killswitch_state) > 0", count=len(DESKS))
        self.start = time.time()
        for thread in self._askers:
            thread.start()

    def _slide(self, switch: str, worst: float) -> None:
        """A drawdown that deepens before it breaks its limit."""
        self.metric(MAKER, "volatility_ratio").set(0.14)
        for part in (0.3, 0.5, 0.65, 0.75, 1.0):
            self.metric(switch, "portfolio_drawdown_ratio").set(worst * part)
            time.sleep(self.pace.calm / 5)

    def _lose_a_source(self) -> None:
        self.dying.fail("hang")

    def _refuse_a_file(self) -> None:
        sidecar = self.sidecars[HALTED]
        (sidecar.folder / "rules" / "more.yaml").write_text(
            "groups: [{name: a, rules: [{trigger: x, type: thresold}]}]\n"
        )
        sidecar.signal(signal.SIGHUP)

    def _alert(self, sidecar: Sidecar, labels: Mapping[str, str]) -> None:
        alert = {
            "status": "firing",
            "labels": labels,
            "annotations": {},
            "startsAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "endsAt": "0001-01-01T00:00:00Z",
            "fingerprint": f"{abs(hash(labels['alertname'])):016x}"[:16],
        }
        body = {
            "version": "4",
            "groupKey": "{}",
            "status": "firing",
            "receiver": "killswitch",
            "groupLabels": {},
            "commonLabels": labels,
            "commonAnnotations": {},
            "externalURL": "",
            "truncatedAlerts": 0,
            "alerts": [alert],
        }
        reply = sidecar.operations("/api/v1/alertmanager", method="POST", body=body)
        assert reply.status == 200, reply.body

    def _moment(self) -> float:
        """A time, from now on, at which every target answered: on a busy machine a scrape may come too late."""

        def look() -> float | None:
            at = time.time()
            time.sleep(2 * self.pace.scrape)
            return at if self.prometheus.query(f"min(up @ {at:.3f}) == 1") else None

        return wait_for(look, "all targets to answer Prometheus at one time", patience=PATIENCE)

    def _seen(self, query: str, *, count: int = 1) -> None:
        wait_for(lambda: len(self.prometheus.query(query)) >= count, f"Prometheus to show {query}", patience=PATIENCE)

    def _ask(self, name: str) -> None:
        """What the bot does: ask before each order, and now and then send a cancel or an order that is too large."""
        sidecar = self.sidecars[name]
        for number in range(1_000_000):
            if self._closed.wait(0.1):
                return
            with contextlib.suppress(OSError):
                if number % 7 == 3:
                    sidecar.gate(intent="cancel")
                elif number % 11 == 5:
                    sidecar.order(intent="new", symbol="AAPL", side="buy", quantity=1500, position=0)
                else:
                    sidecar.gate()

    # The cast

    def _prometheus(self) -> Prometheus:
        folder = self.folder / "prometheus"
        folder.mkdir()
        server = Prometheus(folder, target=self.exporter.address)
        jobs = {"trader": [self.exporter.address], "killswitch": [f"127.0.0.1:{port}" for port in self.ports.values()]}
        if self.pace.twin:
            jobs["rollout"] = [f"127.0.0.1:{self.ports[MAKER]}"]
        scrape = {"scrape_interval": _duration(self.pace.scrape), "scrape_timeout": _duration(self.pace.scrape)}
        config = {
            "global": scrape,
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": targets}]} for job, targets in jobs.items()
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        return server

    def _sidecar(self, name: str) -> Sidecar:
        folder = self.folder / name.replace("/", "-")
        for part in ("run", "control", "rules"):
            (folder / part).mkdir(parents=True)
        sidecar = Sidecar(
            folder=folder,
            name=name,
            config=_config(folder, name, [self.prometheus.url]),
            environ={**os.environ, "KILL_SWITCH_APPROVAL_CODE": CODE},
        )
        sidecar.environ.pop("KILLSWITCH_SOCKET", None)
        desk = DESKS[name]
        steps = [
            {"factor": 0.5},
            *({"factor": factor, "after": _duration(self.pace.step * n)} for n, factor in ((1, 0.75), (2, 1.0))),
        ]
        sidecar.write_config(
            switch={
                "name": name,
                "mode": "shadow" if name == LAB else "active",
                "labels": {"desk": desk} if desk else {},
            },
            operations={"listen": f"127.0.0.1:{self.ports[name]}"},
            gate={"position_limits": {"*": 1000}},
            recovery={"cooldown": _duration(self.pace.cooldown), "steps": steps},
            alertmanager={"webhook": {"allow_unauthenticated": True}, "notify": {"urls": []}},
        )
        if name == HALTED:
            venue = {"name": "venue", "url": f"http://{self.dying.address}/metrics"}
            sidecar.write_config(scrape=[{**venue, "interval": "250ms", "timeout": "200ms"}])
        sidecar.write_rules(*self._rules(name))
        return sidecar

    def _rules(self, name: str) -> Sequence[dict[str, Any]]:
        blind = {"hold_for": "2s", "then": "warn", "unreachable": "warn"}
        age = _duration(max(5.0, 4 * self.pace.scrape))

        def query(metric: str) -> str:
            return f"min({self.metric(name, metric).selector})"

        def threshold(trigger: str, metric: str, operator: str, limit: float, **more: Any) -> dict[str, Any]:
            return {
                "trigger": trigger,
                "type": "threshold",
                "query": query(metric),
                "operator": operator,
                "threshold": limit,
                "max_age": age,
                **more,
            }

        rules = [
            threshold(
                "portfolio_drawdown",
                "portfolio_drawdown_ratio",
                "lt",
                -0.15,
                clear=-0.10,
                steps=[{"at": "50%", "action": "warn"}],
            ),
            threshold("daily_loss", "daily_pnl_ratio", "lt", -0.05),
            threshold("volatility_spike", "volatility_ratio", "gt", 0.10, shadow=True),
            {
                "trigger": "trading_heartbeat",
                "type": "heartbeat",
                "query": query("trading_heartbeat_timestamp_seconds"),
                "interval": "5s",
                "max_missed": 3,
                "max_age": age,
            },
            {"trigger": "venue_alert", "type": "alertmanager", "match": ['alertname="VenueDown"']},
            {"trigger": "runaway_orders", "type": "order_rate", "max_orders": 100, "per": "1s", "action": "halt"},
        ]
        if name == MAKER:
            rules.append(threshold("overnight_gap", "overnight_gap_ratio", "lt", -0.2, enabled=False))
            rules.append(threshold("quote_spread", "quote_spread", "gt", 20, action="warn", on_no_data=blind))
        if name == HALTED:
            rules.append(
                {
                    "trigger": "venue_latency",
                    "type": "threshold",
                    "source": "scrape:venue",
                    "query": "max(venue_latency_seconds)",
                    "operator": "gt",
                    "threshold": 0.25,
                    "max_age": age,
                    "on_no_data": {"hold_for": "2s", "unreachable": "halt"},
                }
            )
        return rules


def _duration(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"


def _tomorrow() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 86400))
