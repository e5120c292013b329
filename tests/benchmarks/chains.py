"""From a breach to the rule that blocks, by every way that a breach can take, many breaches of each in one run.

Each breach is a series of its own with a rule of its own, so that all ways run side by side on the same machine.
"""

import json
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from figures import Figure, Section, percentile
from surroundings import CannotMeasure, Exporter, free_port, process, prometheus, sidecar, wait_for

EVALUATION_SECONDS: Final = 1.0
SLOW_SCRAPE_SECONDS: Final = 5.0
DIRECT_SECONDS: Final = 0.25
DEFAULT_GROUP_WAIT_SECONDS: Final = 30.0
PHASE_SECONDS: Final = 10.0
"""Breaches come at random moments within so long, longer than any interval on the way."""
MACHINE_SECONDS: Final = 0.1
"""What the programs themselves may add to the intervals."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Way:
    """One way from a breach to a block; `intervals` are those that a breach may just have missed, in seconds."""

    label: str
    key: str
    intervals: float
    rule: Mapping[str, Any]

    def rule_for(self, number: int) -> dict[str, Any]:
        """The rule that blocks on breach `number` of this way."""
        text = json.dumps(self.rule).replace("WAY", self.key).replace("NUMBER", str(number))
        return {"trigger": f"{self.key}_{number}", "action": "halt", **json.loads(text)}


_SERIES: Final = 'bench_case{way="WAY",number="NUMBER"'
_THRESHOLD: Final = {"type": "threshold", "operator": "gt", "threshold": 0.5, "max_age": "30s"}
_WEBHOOK: Final = {"type": "alertmanager", "match": ['way="WAY"', 'number="NUMBER"']}
_WAYS: Final = (
    _Way(
        label="Prometheus, scrape 1 s, evaluation 1 s",
        key="fast",
        intervals=1.0 + EVALUATION_SECONDS,
        rule={**_THRESHOLD, "query": f'max({_SERIES},job="bench"}})'},
    ),
    _Way(
        label="Prometheus, scrape 5 s, evaluation 1 s",
        key="slow",
        intervals=SLOW_SCRAPE_SECONDS + EVALUATION_SECONDS,
        rule={**_THRESHOLD, "query": f'max({_SERIES},job="slow"}})'},
    ),
    _Way(
        label="direct scrape 250 ms, evaluation 250 ms",
        key="direct",
        intervals=2 * DIRECT_SECONDS,
        rule={**_THRESHOLD, "query": f"max({_SERIES}}})", "source": "scrape:trader", "max_age": "5s"},
    ),
    _Way(
        label="rule on ALERTS, scrape 1 s, alert 1 s, evaluation 1 s",
        key="alerts",
        intervals=1.0 + EVALUATION_SECONDS + EVALUATION_SECONDS,
        rule={"type": "expression", "expr": 'ALERTS{alertstate="firing",way="WAY",number="NUMBER"}'},
    ),
    _Way(
        label="Alertmanager webhook, group_wait 0 s",
        key="webhook",
        intervals=1.0 + EVALUATION_SECONDS,
        rule=_WEBHOOK,
    ),
    _Way(
        label="Alertmanager webhook, group_wait 30 s (its default)",
        key="waiting",
        intervals=1.0 + EVALUATION_SECONDS + DEFAULT_GROUP_WAIT_SECONDS,
        rule=_WEBHOOK,
    ),
)


def measure_chains(folder: Path, source: Exporter, *, breaches: int) -> Section:
    """From the moment the exporter shows a breach to the moment its rule fires, by each way."""
    folder.mkdir()
    numbers = range(breaches)
    for way in _WAYS:
        for number in numbers:
            source.set(_series(way, number), 0.0)
    with ExitStack() as stack:
        operations = free_port()
        alertmanager = stack.enter_context(_alertmanager(folder / "alertmanager", operations))
        url = stack.enter_context(
            prometheus(folder / "prometheus", source.port, slow_seconds=SLOW_SCRAPE_SECONDS, **_alerting(alertmanager))
        )
        running = stack.enter_context(
            sidecar(
                folder / "sidecar",
                _rules(numbers),
                prometheus_url=url,
                operations={"listen": f"127.0.0.1:{operations}"},
                scrape=[
                    {
                        "name": "trader",
                        "url": f"http://127.0.0.1:{source.port}/metrics",
                        "interval": f"{DIRECT_SECONDS * 1000:g}ms",
                        "timeout": "200ms",
                    }
                ],
                alertmanager={
                    "webhook": {"match": ['alertname="Bench"'], "allow_unauthenticated": True},
                    "notify": {"urls": []},
                },
            )
        )
        running.wait_until_allowed(seconds=60.0)
        shown = _break_all(source, numbers)
        fired = _wait_until_fired(folder / "sidecar" / "state" / "audit", set(shown))
    times = {way.key: [fired[name] - shown[name] for name in shown if name.startswith(f"{way.key}_")] for way in _WAYS}
    return Section(
        title="3b. Breach to block, by each way",
        method=f"{breaches} breaches by each way at random moments of {PHASE_SECONDS:g} s, all ways side by side: from "
        f"the exporter's showing the value to the audited moment at which its rule fires (the gate closes in the same "
        f"turn of the loop), to the ms. Bound: all intervals on the way, just missed, + {MACHINE_SECONDS * 1e3:g} ms.",
        figures=[_spread(way, times[way.key]) for way in _WAYS],
    )


def _spread(way: _Way, times: list[float]) -> Figure:
    bound = way.intervals + MACHINE_SECONDS
    spread = ", ".join(f"p{share * 100:g} {percentile(times, share):.2f}" for share in (0.0, 0.5, 0.9))
    note = f"{spread} s of {len(times)}; longest {max(times) / bound:.2f} of the bound"
    return Figure(name=f"{way.label}: longest", value=max(times), unit="s", aim=bound, note=note)


def _series(way: _Way, number: int) -> str:
    return f'bench_case{{way="{way.key}",number="{number}"}}'


def _rules(numbers: range) -> dict[str, Any]:
    groups = [
        {
            "name": way.key,
            "interval": f"{DIRECT_SECONDS * 1000:g}ms" if way.key == "direct" else f"{EVALUATION_SECONDS:g}s",
            "rules": [way.rule_for(number) for number in numbers],
        }
        for way in _WAYS
    ]
    return {"groups": groups}


def _break_all(source: Exporter, numbers: range) -> dict[str, float]:
    """Break each at its random moment; returns the moments (Unix seconds) by the name of the rule."""
    due = sorted((random.uniform(0.0, PHASE_SECONDS), way, number) for number in numbers for way in range(len(_WAYS)))
    start, shown = time.monotonic(), {}
    for moment, index, number in due:
        time.sleep(max(0.0, start + moment - time.monotonic()))
        way = _WAYS[index]
        at = source.set(_series(way, number), 1.0)
        shown[f"{way.key}_{number}"] = at - time.monotonic() + time.time()
    return shown


def _wait_until_fired(audit: Path, wanted: set[str]) -> dict[str, float]:
    """The moments (Unix seconds) at which the rules fired, from the audit."""
    fired: dict[str, float] = {}

    def is_all_there() -> bool:
        for file in audit.glob("*.jsonl"):
            for line in file.read_text().splitlines():
                event = json.loads(line)
                if event["type"] == "trigger.firing":
                    fired.setdefault(event["data"]["trigger"], datetime.fromisoformat(event["time"]).timestamp())
        return wanted <= fired.keys()

    try:
        wait_for("all rules to fire", is_all_there, seconds=90.0, pause=0.5)
    except CannotMeasure as error:
        raise CannotMeasure(f"{error}; {sorted(wanted - fired.keys())} did not") from error
    return fired


def _alerting(alertmanager: int) -> dict[str, Any]:
    alert = {"alert": "Bench", "expr": 'bench_case{way=~"alerts|webhook|waiting",job="bench"} > 0.5'}
    return {
        "alert_rules": {"groups": [{"name": "bench", "interval": f"{EVALUATION_SECONDS:g}s", "rules": [alert]}]},
        "alertmanager": f"127.0.0.1:{alertmanager}",
    }


@contextmanager
def _alertmanager(folder: Path, operations: int) -> Iterator[int]:
    """An Alertmanager that sends each alert by itself to the sidecar's webhook; yields its port."""
    binary = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
    if binary is None:
        raise CannotMeasure("Alertmanager is not installed; `make test` installs it")
    folder.mkdir()
    port = free_port()
    waiting = {"matchers": ['way="waiting"'], "receiver": "killswitch"}
    webhook = {"url": f"http://127.0.0.1:{operations}/api/v1/alertmanager", "send_resolved": True}
    config = {
        "route": {
            "receiver": "nobody",
            "group_by": ["way", "number"],
            "routes": [waiting, {"matchers": ['way="webhook"'], "receiver": "killswitch", "group_wait": "0s"}],
        },
        "receivers": [{"name": "nobody"}, {"name": "killswitch", "webhook_configs": [webhook]}],
    }
    (folder / "alertmanager.yml").write_text(json.dumps(config))
    command = [
        binary,
        f"--config.file={folder / 'alertmanager.yml'}",
        f"--storage.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
        "--log.level=error",
    ]
    with process(command, folder / "log"):
        yield port
