"""Sets up logging: log lines on standard error, audit lines on standard output, written by a thread of their own.

A terminal or pipe that does not take what is written to it must never hold up the gate, so the loop only ever puts
records into a bounded queue; what does not fit is dropped and counted.
"""

import contextlib
import copy
import json
import logging
import logging.handlers
import queue
import sys
import threading
from datetime import UTC, datetime
from typing import Any, TextIO

QUEUE_SIZE = 10_000
STOP_SECONDS = 2.0
TRAIL = "sidecar.audit_trail"

_TRACEBACKS = logging.Formatter()


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_text:
            line["exception"] = record.exc_text
        return json.dumps(line, default=str)


class _ConsoleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={value}" for key, value in getattr(record, "fields", {}).items())
        line = f"{_stamp(record)} {record.levelname:<7} {record.getMessage()} {fields}".rstrip()
        return f"{line}\n{record.exc_text}" if record.exc_text else line


def _stamp(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, tz=UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Dropping(logging.handlers.QueueHandler):
    """Puts records into a bounded queue, and counts what does not fit."""

    def __init__(self, records: "queue.Queue[Any]") -> None:
        super().__init__(records)
        self.dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # The library's own would fold a traceback into the message, and the message is the name of the event.
        prepared = copy.copy(record)
        prepared.msg, prepared.args = record.getMessage(), None
        if record.exc_info:
            prepared.exc_text = _TRACEBACKS.formatException(record.exc_info)
        prepared.exc_info = None
        return prepared

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


class Logs:
    """The log output of one process. Call `stop` at the end, so that nothing written is lost."""

    def __init__(self, *, level: str, form: str, stderr: TextIO | None = None, stdout: TextIO | None = None) -> None:
        records: queue.Queue[Any] = queue.Queue(QUEUE_SIZE)
        lines = logging.StreamHandler(stderr or sys.stderr)
        lines.setFormatter(_JsonFormatter() if form == "json" else _ConsoleFormatter())
        lines.addFilter(lambda record: record.name != TRAIL)
        trail = logging.StreamHandler(stdout or sys.stdout)
        trail.setFormatter(logging.Formatter("%(message)s"))
        trail.addFilter(lambda record: record.name == TRAIL)
        self._handler = _Dropping(records)
        self._listener = logging.handlers.QueueListener(records, lines, trail)
        self._root = logging.getLogger("sidecar")
        self._root.setLevel(level.upper())
        logging.getLogger(TRAIL).setLevel(logging.INFO)
        self._stopped = False
        self._root.addHandler(self._handler)
        self._root.propagate = False
        self._listener.start()

    @property
    def dropped(self) -> int:
        """Lines that did not fit because nobody took them."""
        return self._handler.dropped

    def stop(self) -> None:
        """Write what is queued and end the thread; give up after a moment where nobody takes what is written.

        Idempotent.
        """
        if self._stopped:
            return
        self._stopped = True
        self._root.removeHandler(self._handler)
        self._root.propagate = True
        ending = threading.Thread(target=self._end, name="end of logs", daemon=True)
        ending.start()
        ending.join(STOP_SECONDS)

    def _end(self) -> None:
        with contextlib.suppress(queue.Full):  # the writer is stuck, and being a daemon it ends with the process
            self._listener.stop()
