"""Whoever stands between the sidecar and people: the real Alertmanager with our own example, Slack and a mailbox.

The example's addresses are replaced by loopback, its waits by short ones, and nothing else unless a test says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from aiosmtpd.smtp import SMTP

from tests.cast import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "alertmanager" / "alertmanager.yml"
TOKEN = "alertmanagers-own-token-5f1e"
EXTERNAL = {
    "trigger": "external",
    "type": "alertmanager",
    "match": ['severity=~"critical|page"', "killswitch=kill"],
}
"""A rule of a sidecar that the example's webhook can fire."""


class Alertmanager:
    """The real one, run with the example; a test may change what it likes before the start."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("prometheus-alertmanager") is None:
            pytest.skip("prometheus-alertmanager is not installed")
        self.port = free_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.config: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
        self.config["templates"] = [str(EXAMPLE.parent / "killswitch.tmpl")]
        self.config["global"] = {
            "smtp_smarthost": "127.0.0.1:9",
            "smtp_from": "killswitch@example.com",
            "smtp_require_tls": False,
        }
        for route in self.config["route"]["routes"]:
            if "group_wait" in route:
                route["group_interval"] = "1s"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def route(self, receiver: str) -> dict[str, Any]:
        """The top-level route to this receiver."""
        return next(one for one in self.config["route"]["routes"] if one["receiver"] == receiver)

    def receiver(self, name: str) -> dict[str, Any]:
        return next(one for one in self.config["receivers"] if one["name"] == name)

    def send_to(self, *, sidecar: int | None = None, slack: int = 9, mail: int = 9, people: int | None = None) -> None:
        """Deliver to these ports on loopback."""
        (self._folder / "webhook-token").write_text(TOKEN + "\n")
        (self._folder / "slack-url").write_text(f"http://127.0.0.1:{slack}/services/T0/B0/x")
        self.config["global"]["smtp_smarthost"] = f"127.0.0.1:{mail}"
        for receiver in self.config["receivers"]:
            for hook in receiver.get("webhook_configs", ()):
                hook["url"] = f"http://127.0.0.1:{sidecar or 9}/api/v1/alertmanager"
                hook["http_config"]["authorization"]["credentials_file"] = str(self._folder / "webhook-token")
            for chat in receiver.get("slack_configs", ()):
                chat["api_url_file"] = str(self._folder / "slack-url")
        if people is not None:
            for receiver in self.config["receivers"][-2:]:
                receiver["webhook_configs"] = [{"url": f"http://127.0.0.1:{people}/"}]

    def start(self) -> None:
        file = self._folder / "alertmanager.yml"
        file.write_text(yaml.safe_dump(self.config))
        command = [
            "prometheus-alertmanager",
            f"--config.file={file}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            f"--storage.path={self._folder}/am",
            "--cluster.listen-address=",
        ]
        with (self._folder / "alertmanager.log").open("a") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while not self._is_ready():
            assert self._process.poll() is None, (self._folder / "alertmanager.log").read_text()
            assert time.monotonic() < deadline, "Alertmanager is not ready"
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

    # Its API

    def post(self, *, ends: bool = False, began: datetime | None = None, **labels: str) -> datetime:
        """Raise an alert, or end it; returns when it began."""
        return self.post_all([labels], ends=ends, began=began)

    def post_all(self, alerts: list[dict[str, str]], *, ends: bool = False, began: datetime | None = None) -> datetime:
        """Raise alerts in one request, or end them; returns when they began."""
        began = began or datetime.now(UTC)
        over = datetime.now(UTC) if ends else datetime.now(UTC) + timedelta(minutes=5)
        times = {"startsAt": began.isoformat(), "endsAt": over.isoformat()}
        self._ask("/api/v2/alerts", [{"labels": labels, **times} for labels in alerts])
        return began

    def silence(self, **labels: str) -> None:
        now = datetime.now(UTC)
        matchers = [{"name": name, "value": value, "isRegex": False, "isEqual": True} for name, value in labels.items()]
        times = {"startsAt": now.isoformat(), "endsAt": (now + timedelta(minutes=5)).isoformat()}
        self._ask("/api/v2/silences", {"matchers": matchers, **times, "createdBy": "test", "comment": "test"})

    def suppressed(self, name: str) -> bool:
        """Whether an alert of this name is silenced or inhibited."""
        found = self._ask("/api/v2/alerts")
        return any(one["labels"]["alertname"] == name and one["status"]["state"] == "suppressed" for one in found)

    def metric(self, start: str) -> float:
        """The sum of all samples of its own metrics whose line starts like this."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(start))

    def _ask(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            assert answer.status == 200
            text = answer.read()
        return json.loads(text) if text else None


class Listener:
    """Takes whatever JSON is posted to it; with `hangs` it never answers."""

    def __init__(self, *, hangs: bool = False) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self._release = threading.Event()
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                listener.bodies += [body]
                listener.paths += [self.path]
                if hangs:
                    listener._release.wait()
                with contextlib.suppress(OSError):  # whoever gave up
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(b"ok")

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def heard(self, name: str, status: str, **labels: str) -> list[dict[str, Any]]:
        """Alerts of this name, status and labels in what Alertmanager's webhook sent."""
        wanted = {"alertname": name, **labels}
        alerts = [alert for body in self.bodies for alert in body["alerts"]]
        return [one for one in alerts if one["status"] == status and wanted.items() <= one["labels"].items()]

    def attachments(self, start: str) -> list[Mapping[str, Any]]:
        """What Slack would show: attachments whose title starts like this."""
        shown = [one for body in self.bodies for one in body["attachments"]]
        return [one for one in shown if one["title"].startswith(start)]

    def close(self) -> None:
        self._release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


class Mailbox:
    """A mail server that keeps what it is given."""

    def __init__(self) -> None:
        self.port = 0
        self._mails: list[bytes] = []
        self._loop = asyncio.new_event_loop()
        self._listens = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._listens.wait(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            self._loop.create_server(lambda: SMTP(self, hostname="mail.example", loop=self._loop), "127.0.0.1", 0)
        )
        self.port = server.sockets[0].getsockname()[1]
        self._listens.set()
        self._loop.run_forever()
        server.close()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def handle_DATA(self, server: object, session: object, envelope: Any) -> str:  # noqa: N802 - aiosmtpd's name
        self._mails.append(envelope.content)
        return "250 OK"

    def mails(self, subject: str) -> list[tuple[str, str]]:
        """Recipient and text of the mails whose subject starts like this."""
        found = [message_from_bytes(raw, policy=policy.default) for raw in self._mails]
        return [
            (str(mail["To"]), mail.get_body(("plain",)).get_content())  # type: ignore[union-attr]
            for mail in found
            if str(mail["Subject"]).startswith(subject)
        ]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)


# Fixtures


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
