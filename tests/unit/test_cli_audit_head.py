"""`audit verify --prometheus`: the end of the audit is compared with what a server saw, or it is an error."""

import json
import threading
import urllib.parse
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click.testing
import pytest

from sidecar.adapters.audit_log import AuditLog
from sidecar.cli.main import killswitch

NOW = datetime(2026, 1, 31, 8, tzinfo=UTC)


class Server:
    """A Prometheus that gives one answer and keeps what it was asked."""

    def __init__(self) -> None:
        self.result: Any = []
        self.status = 200
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
                server.asked.append(query["query"][0])
                body = {"status": "success", "data": {"resultType": "vector", "result": server.result}}
                payload = json.dumps(body).encode()
                self.send_response(server.status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def shows(self, value: object) -> None:
        self.result = [{"metric": {}, "value": [NOW.timestamp(), str(value)]}]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder with three audit events; no configuration is to be found."""
    monkeypatch.setenv("KILLSWITCH_CONFIG", str(tmp_path / "none.yaml"))
    log = AuditLog.open(tmp_path / "audit", max_bytes=10_000_000, retention_seconds=None, now=NOW)
    log.append([{"type": "switch.killed", "reason": f"r{n}"} for n in range(3)], NOW)
    log.close()
    return tmp_path


def verify(folder: Path, url: str, *more: str) -> click.testing.Result:
    arguments = ["audit", "verify", "--dir", str(folder), "--prometheus", url, *more]
    return click.testing.CliRunner().invoke(killswitch, arguments)


@pytest.mark.parametrize(("seen", "code"), [(0, 0), (2, 0), (3, 0), (4, 1)])
def test_an_end_before_what_was_seen_is_damage(folder: Path, server: Server, seen: int, code: int):
    server.shows(seen)
    result = verify(folder, server.url, "--switch", "s")
    assert result.exit_code == code, result.output
    assert ("DAMAGED" in result.stdout) is bool(code)
    assert f"Prometheus saw seq {seen}" in result.stdout
    answer = json.loads(verify(folder, server.url, "--switch", "s", "-o", "json").stdout)
    assert (answer["ok"], answer["prometheus_head_sequence"]) == (not code, seen)


def test_the_switch_is_the_configuration_s_and_is_quoted(folder: Path, server: Server):
    config = folder / "config.yaml"
    config.write_text("switch: {name: 'a\"b'}\n")
    server.shows(3)
    assert verify(folder, server.url, "--config", str(config)).exit_code == 0
    assert verify(folder, server.url, "--config", str(config), "--switch", "c").exit_code == 0
    assert ['switch="a\\"b"' in query for query in server.asked] == [True, False]


@pytest.mark.parametrize("value", [None, "NaN", "+Inf"])
def test_nothing_to_compare_with_is_an_error(folder: Path, server: Server, value: str | None):
    if value is not None:
        server.shows(value)
    result = verify(folder, server.url, "--switch", "s")
    assert result.exit_code == 1
    assert "was not compared" in result.stderr
    assert "WHOLE" not in result.stdout


def test_a_server_that_does_not_answer_is_an_error(folder: Path, server: Server):
    server.status = 503
    assert "was not compared" in verify(folder, server.url, "--switch", "s").stderr
    result = verify(folder, "http://127.0.0.1:1", "--switch", "s")
    assert (result.exit_code, "was not compared" in result.stderr) == (1, True)


def test_without_switch_and_configuration_nobody_guesses(folder: Path, server: Server):
    result = verify(folder, server.url)
    assert result.exit_code == 1
    assert "--switch" in result.stderr
    assert server.asked == []
