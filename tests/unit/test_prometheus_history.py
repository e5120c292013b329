"""The past, from real local servers that misbehave; the good answers are asked of the real Prometheus elsewhere."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sidecar.adapters.history import History, HistoryError
from sidecar.settings.http_config import Authorization, HttpConfig

Behaviour = Callable[[BaseHTTPRequestHandler], None]
AT = datetime(2024, 1, 1, tzinfo=UTC)


@contextmanager
def serving(behave: Behaviour) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            behave(self)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def replying(body: Any, status: int = 200, **headers: str) -> Behaviour:
    def behave(handler: BaseHTTPRequestHandler) -> None:
        raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(raw)))
        handler.end_headers()
        handler.wfile.write(raw)

    return behave


def vector(*rows: Any, **extra: Any) -> dict[str, Any]:
    return {"status": "success", "data": {"resultType": "vector", "result": list(rows)}, **extra}


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(150):
        try:
            handler.wfile.write(b" ")
        except OSError:
            return
        time.sleep(0.02)


def break_off(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"status":')


def hang(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1.0)


def caught(behave: Behaviour, *, limit: float = 0.3) -> HistoryError:
    with serving(behave) as url:
        history = History(url, timeout=limit)
        with pytest.raises(HistoryError) as found:
            history.instant("x", AT)
        history.close()
    return found.value


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        (hang, "timeout"),
        (drip, "timeout"),
        (break_off, "bad_response"),
        (replying("Service Unavailable", 503), "unreachable"),
        (replying("no", 401), "http_error"),
        (replying("", 302, Location="http://127.0.0.1:1/"), "http_error"),
        (replying("<html>"), "bad_response"),
        (replying("[]"), "bad_response"),
        (replying({"status": "success"}), "bad_response"),
        (replying(vector({"metric": {}})), "wrong_type"),
        (replying(vector({"metric": {}, "histogram": []})), "wrong_type"),
        (replying(vector({"metric": {}, "value": [1]})), "bad_response"),
        (replying(vector({"metric": {}, "value": [1, "x"]})), "bad_response"),
        (replying(vector(warnings=["one store is down"])), "partial"),
        (replying({"status": "error", "errorType": "timeout", "error": "slow"}, 503), "timeout"),
        (replying({"status": "error", "errorType": "internal", "error": "?"}, 500), "http_error"),
    ],
)
def test_no_whole_answer_is_an_error_with_its_reason(behave: Behaviour, reason: str):
    began = time.monotonic()
    assert caught(behave).reason == reason
    assert time.monotonic() - began < 4.0  # hidden retries would take six


def test_a_refused_connection_fails_at_once_because_nothing_is_retried():
    with serving(replying("")) as url:
        pass
    history = History(url, timeout=2.0)
    began = time.monotonic()
    with pytest.raises(HistoryError) as found:
        history.instant("x")
    assert found.value.reason == "unreachable"
    assert time.monotonic() - began < 4.0  # hidden retries would take six


def test_prometheus_own_words_are_kept():
    text = '1:5: parse error: unexpected "}" in label matching'
    error = caught(replying({"status": "error", "errorType": "bad_data", "error": text}, 400))
    assert (error.reason, error.message) == ("query_error", text)


def test_remarks_on_style_make_no_answer_partial():
    row = {"metric": {"a": "b"}, "value": [5.5, "NaN"]}
    with serving(replying(vector(row, warnings=["PromQL info: not a counter"]))) as url:
        (sample,) = History(url, timeout=2.0).instant("x", AT)
    assert (sample.labels, sample.timestamp, str(sample.value)) == ({"a": "b"}, 5.5, "nan")


def test_credentials_and_headers_are_sent_and_not_shown():
    seen: list[dict[str, str | None]] = []

    def behave(handler: BaseHTTPRequestHandler) -> None:
        seen.append({name: handler.headers[name] for name in ("Authorization", "X-Scope")})
        replying("no", 403)(handler)

    with serving(behave) as url:
        with_user = url.replace("http://", "http://me:hunter2@")
        config = HttpConfig(authorization=Authorization(credentials="hunter2"))
        for http in (None, config):
            history = History(with_user, timeout=2.0, headers={"X-Scope": "a"}, http=http)
            with pytest.raises(HistoryError) as found:
                history.instant("x")
            assert "hunter2" not in str(found.value)
    assert seen == [
        {"Authorization": "Basic bWU6aHVudGVyMg==", "X-Scope": "a"},
        {"Authorization": "Bearer hunter2", "X-Scope": "a"},
    ]


def test_unreadable_credentials_are_said_before_anything_is_asked():
    http = HttpConfig(authorization=Authorization(credentials_file="/no/such/file"))
    with pytest.raises(HistoryError, match="/no/such/file"):
        History("http://127.0.0.1:1", timeout=1.0, http=http)


def test_importing_the_module_does_not_import_the_library():
    code = "import sys, sidecar.adapters.history; print({'prometheus_api_client', 'requests'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "set()"
