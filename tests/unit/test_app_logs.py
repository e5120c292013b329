import ast
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from sidecar.app import logs as logs_module
from sidecar.app.logs import Logs

log = logging.getLogger("sidecar.test")
trail = logging.getLogger("sidecar.audit_trail")


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[Logs, StringIO, StringIO]]]:
    running: list[Logs] = []
    level = logging.getLogger("sidecar").level

    def start(level: str = "info", form: str = "json") -> tuple[Logs, StringIO, StringIO]:
        stderr, stdout = StringIO(), StringIO()
        running.append(Logs(level=level, form=form, stderr=stderr, stdout=stdout))
        return running[-1], stderr, stdout

    yield start
    for logs in running:
        logs.stop()
    logging.getLogger("sidecar").setLevel(level)


def test_log_lines_are_json_on_standard_error(start: Callable[..., Any]) -> None:
    logs, stderr, stdout = start()
    log.info("switch.killed", extra={"fields": {"trigger": "dd", "value": -0.2}})
    logs.stop()
    line = json.loads(stderr.getvalue())
    assert (line["event"], line["level"], line["trigger"], line["value"]) == ("switch.killed", "info", "dd", -0.2)
    assert line["time"].endswith("Z")
    assert stdout.getvalue() == ""


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_traceback_stands_beside_the_event_and_not_in_its_name(start: Callable[..., Any], form: str) -> None:
    logs, stderr, _ = start(form=form)
    try:
        int("defect")
    except ValueError:
        log.exception("task.failed")
    logs.stop()
    text = stderr.getvalue()
    assert "ValueError: invalid literal" in text
    if form == "json":
        line = json.loads(text)
        assert line["event"] == "task.failed"
        assert "Traceback" in line["exception"]
    else:
        assert text.splitlines()[0].endswith("task.failed")


def test_a_console_line_shows_its_fields(start: Callable[..., Any]) -> None:
    logs, stderr, _ = start(form="console")
    log.warning("source.down", extra={"fields": {"source": "prometheus"}})
    logs.stop()
    assert "WARNING source.down source=prometheus" in stderr.getvalue()


def test_audit_lines_go_to_standard_output_as_they_are_whatever_the_level(start: Callable[..., Any]) -> None:
    logs, stderr, stdout = start(level="error")
    trail.info('{"seq":1}')
    log.info("not this")
    logs.stop()
    assert stdout.getvalue() == '{"seq":1}\n'
    assert stderr.getvalue() == ""


def test_a_reader_that_takes_nothing_blocks_neither_the_writer_nor_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs_module, "QUEUE_SIZE", 2)
    monkeypatch.setattr(logs_module, "STOP_SECONDS", 0.05)
    free, entered = threading.Event(), threading.Event()

    class Stuck(StringIO):
        def write(self, text: str) -> int:
            entered.set()
            free.wait(5.0)
            return len(text)

    level = logging.getLogger("sidecar").level
    logs = Logs(level="info", form="json", stderr=Stuck(), stdout=StringIO())
    try:
        log.info("first")
        assert entered.wait(2.0)
        for _ in range(5):
            log.info("more")
        assert logs.dropped == 3
        logs.stop()
    finally:
        free.set()
        logging.getLogger("sidecar").setLevel(level)


LOGGERS = {"log", "_log"}
LEVELS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
SIDECAR = Path(logs_module.__file__).parents[1]


def log_calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call that writes a log line, with its place."""
    for file in sorted(SIDECAR.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS):
                continue
            if isinstance(node.func.value, ast.Name) and node.func.value.id in LOGGERS:
                yield f"{file.relative_to(SIDECAR)}:{node.lineno}", node


def test_every_log_line_is_an_event_with_a_dotted_name_and_fields() -> None:
    calls = list(log_calls())
    assert len(calls) > 40
    for place, call in calls:
        event, *rest = call.args[1:] if call.func.attr == "log" else call.args  # type: ignore[attr-defined]
        assert not rest, f"{place}: what belongs to an event goes into its fields"
        if isinstance(event, ast.Constant):
            assert re.fullmatch(r"[a-z]+\.[a-z_]+", event.value), f"{place}: {event.value!r}"
        assert {word.arg for word in call.keywords} <= {"extra", "exc_info"}, place


def test_no_request_is_logged_at_the_default_level() -> None:
    asks = ("adapters/gate_http", "adapters/operations_http")
    found = {
        str(call.args[0].value)  # type: ignore[attr-defined]
        for place, call in log_calls()
        if place.startswith(asks) and call.func.attr == "info"  # type: ignore[attr-defined]
    }
    assert found <= {"operations.web_config_reloaded"}
