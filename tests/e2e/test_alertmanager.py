"""With the real Alertmanager: its webhook stops trading; our alerts reach people through it, and never ourselves."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

pytestmark = pytest.mark.e2e

TOKEN = "alertmanagers-own-token-5f1e"
EXTERNAL = {
    "trigger": "external",
    "type": "alertmanager",
    "match": ['severity=~"critical|page"', "killswitch=kill"],
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Program:
    """A server of somebody else's on loopback."""

    def __init__(self, folder: Path, name: str) -> None:
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
        self.port = free_port()
        self._folder = folder
        self._name = name
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, config: Mapping[str, Any], *more: str) -> None:
        file = self._folder / f"{self._name}.yml"
        file.write_text(yaml.safe_dump(dict(config)))
        arguments = [f"--config.file={file}", f"--web.listen-address=127.0.0.1:{self.port}", *more]
        with (self._folder / f"{self._name}.log").open("a") as log:
            self._process = subprocess.Popen([self._name, *arguments], stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while not self._is_ready():
            assert self._process.poll() is None, (self._folder / f"{self._name}.log").read_text()
            assert time.monotonic() < deadline, f"{self._name} is not ready"
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=15)
            self._process = None


class Alertmanager(Program):
    """The real one, which sends to a sidecar what is labelled so, and to people what sidecars say."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "prometheus-alertmanager")

    def serve(self, sidecar_port: int, people_port: int) -> None:
        immediately = {"group_wait": "0s", "group_interval": "1s", "repeat_interval": "1h"}
        config = {
            "route": {
                "receiver": "nobody",
                "group_by": ["..."],
                **immediately,
                "routes": [
                    {"receiver": "people", "matchers": ['killswitch_origin!=""'], "continue": True},
                    {"receiver": "sidecar.v1", "matchers": ['killswitch="kill"']},
                ],
            },
            "receivers": [
                {"name": "nobody"},
                {"name": "people", "webhook_configs": [{"url": f"http://127.0.0.1:{people_port}/"}]},
                {
                    "name": "sidecar.v1",
                    "webhook_configs": [
                        {
                            "url": f"http://127.0.0.1:{sidecar_port}/api/v1/alertmanager",
                            "max_alerts": 0,
                            "http_config": {"authorization": {"credentials": TOKEN}},
                        }
                    ],
                },
            ],
        }
        self.start(config, f"--storage.path={self._folder}/am", "--cluster.listen-address=")

    def post(self, *, ends: bool = False, began: datetime | None = None, **labels: str) -> datetime:
        """Raise an alert, or end it; returns when it began."""
        began = began or datetime.now(UTC)
        over = datetime.now(UTC) if ends else datetime.now(UTC) + timedelta(minutes=5)
        alert = {"labels": labels, "startsAt": began.isoformat(), "endsAt": over.isoformat()}
        request = urllib.request.Request(
            f"{self.url}/api/v2/alerts", json.dumps([alert]).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=5) as answer:
            assert answer.status == 200
        return began


class People:
    """Whoever is told by Alertmanager: a webhook receiver."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        people = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                people.told += json.loads(body)["alerts"]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def heard(self, name: str, status: str, **labels: str) -> list[dict[str, Any]]:
        wanted = {"alertname": name, **labels}
        return [one for one in self.told if one["status"] == status and wanted.items() <= one["labels"].items()]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


@pytest.fixture
def people() -> Iterator[People]:
    people = People()
    yield people
    people.close()


@pytest.fixture
def alertmanager(tmp_path: Path) -> Iterator[Alertmanager]:
    server = Alertmanager(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def guarded(
    make_sidecar: Callable[..., Any], alertmanager: Alertmanager, people: People, tmp_path: Path
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
        alertmanager.serve(sidecar.operations_port, people.port)
        return sidecar

    return start


def fresh(sidecar: Any) -> bool:
    return bool(sidecar.trigger_of("external")["status"] == "inactive")


def test_a_real_alert_kills_its_resolve_releases_nothing_and_a_new_one_kills_again(
    guarded: Callable[..., Any], alertmanager: Alertmanager, people: People, wait: Callable[..., Any]
) -> None:
    sidecar = guarded()
    assert sidecar.gate().decided == (200, "active")
    began = alertmanager.post(alertname="VenueDown", severity="page", killswitch="kill")
    sidecar.wait_gate(403, "killed")
    status = sidecar.status()
    assert (status["causes"][0]["code"], status["causes"][0]["trigger"]) == ("alert", "external")
    assert sidecar.recover().status == 409, "the alert still fires"
    wait(lambda: people.heard("KillswitchKilled", "firing", switch=sidecar.name, desk="fx"), "people to hear of it")

    alertmanager.post(alertname="VenueDown", severity="page", killswitch="kill", began=began, ends=True)
    wait(lambda: fresh(sidecar), "the resolve")
    assert sidecar.gate().decided == (403, "killed")

    assert sidecar.recover().status == 200
    sidecar.wait_status("trading", lambda status: status["state"] == "ACTIVE")
    wait(lambda: people.heard("KillswitchKilled", "resolved", switch=sidecar.name), "people to hear that it is over")
    wait(lambda: people.heard("KillswitchRestartStep", "firing", factor="0.5"), "people to hear of the first step")
    # Our own alerts went to the sidecar too, for the switch's labels match the route; they never trigger us.
    wait(
        lambda: sidecar.metrics().get('killswitch_webhook_alerts_total{result="ignored"}'),
        "our own alert at our own webhook",
    )
    assert sidecar.status()["state"] == "ACTIVE"

    alertmanager.post(alertname="VenueDown", severity="page", killswitch="kill")
    sidecar.wait_gate(403, "killed")


def test_a_firing_alert_survives_a_crash_and_still_holds_the_halt(
    guarded: Callable[..., Any], alertmanager: Alertmanager
) -> None:
    sidecar = guarded({**EXTERNAL, "action": "halt"})
    alertmanager.post(alertname="VenueDown", severity="critical", killswitch="kill")
    sidecar.wait_gate(403, "halted")
    alertmanager.stop()
    sidecar.restart()
    sidecar.wait_gate(403, "halted")
    sidecar.assert_gate_stays(403, "halted", seconds=1.0)


def test_an_alert_that_cannot_be_stored_is_sent_again_until_it_is(
    guarded: Callable[..., Any], alertmanager: Alertmanager, wait: Callable[..., Any]
) -> None:
    sidecar = guarded({**EXTERNAL, "action": "halt"})
    state = sidecar.state_folder
    (state / "state.json.bak").unlink()
    (state / "state.json.bak").mkdir()  # nothing can be put in its place, not even by root
    try:
        alertmanager.post(alertname="VenueDown", severity="critical", killswitch="kill")
        sidecar.wait_gate(403, "halted")
        wait(
            lambda: sidecar.metrics().get('killswitch_webhook_alerts_total{result="duplicate"}'),
            "Alertmanager to send again",
        )
    finally:
        (state / "state.json.bak").rmdir()
    sidecar.wait_status("the disk", lambda status: status["durable"])
    stored = json.loads((state / "state.json").read_text())
    assert "VenueDown" in json.dumps(stored)


def test_both_ways_from_a_prometheus_alert_to_the_gate_are_timed(
    guarded: Callable[..., Any],
    alertmanager: Alertmanager,
    exporter: Any,
    drawdown: Any,
    wait: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prometheus = Program(tmp_path, "prometheus")
    rules = tmp_path / "alerts.yml"
    alert = {
        "alert": "BotDrawdown",
        "expr": f"{drawdown.selector} < -0.15",
        "labels": {"severity": "critical", "killswitch": "kill"},
    }
    rules.write_text(yaml.safe_dump({"groups": [{"name": "bots", "interval": "250ms", "rules": [alert]}]}))
    own = drawdown.rule(trigger="own", action="warn")
    series = {
        "trigger": "series",
        "type": "expression",
        "expr": 'ALERTS{alertname="BotDrawdown",alertstate="firing"}',
        "action": "warn",
    }
    try:
        prometheus.start(
            {
                "global": {"scrape_interval": "250ms", "scrape_timeout": "200ms", "evaluation_interval": "250ms"},
                "rule_files": [str(rules)],
                "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager.port}"]}]}]},
                "scrape_configs": [{"job_name": "trader", "static_configs": [{"targets": [exporter.address]}]}],
            },
            f"--storage.tsdb.path={tmp_path}/data",
        )
        sidecar = guarded(EXTERNAL, own, series, urls=(prometheus.url,))
        wait(lambda: sidecar.trigger_of("own")["armed"], "the first scrape")
        drawdown.set(-0.2)
        began = time.monotonic()
        seen: dict[str, float] = {}
        while len(seen) < 3:
            assert time.monotonic() - began < 40, seen
            for trigger in {"external", "own", "series"} - seen.keys():
                if sidecar.trigger_of(trigger)["status"] == "firing":
                    seen[trigger] = time.monotonic() - began
            time.sleep(0.02)
        assert sidecar.gate().decided == (403, "killed")
    finally:
        prometheus.stop()
    with capsys.disabled():
        print(
            f"\nbot metric to trigger: webhook {seen['external']:.2f} s, rule on ALERTS {seen['series']:.2f} s, "
            f"own rule {seen['own']:.2f} s"
        )
