"""What takes bytes from outside, each as a function of bytes that fails where more than a refusal comes of them.

tests/faults/test_fuzz.py feeds them mutated examples for some seconds each; fuzz_by_coverage.py, which is `make fuzz`,
lets what the code does with them lead to the next ones, for as long as one likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidecar.adapters import audit_log
from sidecar.adapters.audit_log import AuditLog
from sidecar.adapters.gate_http.connection import GateConnection, GateLimits, Roster
from sidecar.adapters.gate_http.desk import Desk
from sidecar.adapters.operations_http.webhook import WebhookQuestion
from sidecar.adapters.prometheus.batch import Envelope, MalformedResult, Query, sort_out
from sidecar.adapters.state_file import BACKUP_NAME, STATE_NAME, StateFolder, encode
from sidecar.app.clock import utc
from sidecar.app.restore import CannotRestore, choose_start
from sidecar.core.document import state_document
from sidecar.core.errors import RuleFileError, SettingsError, StorageError
from sidecar.core.events import Cause, CauseCode, Kill
from sidecar.core.policy import GatePolicy
from sidecar.core.snapshot import Reason, ReasonCode, Snapshot
from sidecar.core.states import Instant, Mode, Restriction, Stage, State
from sidecar.core.transitions import Policies, SwitchState, transition
from sidecar.settings.config import load_settings
from sidecar.settings.rule_files import load_rules

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
NOW = Instant(mono=1000.0, wall=1_700_000_000.0)
SHM = "/dev/shm"


@cache
def scratch() -> Path:
    """A folder in memory, for the targets that read files."""
    return Path(tempfile.mkdtemp(prefix="ks-fuzz", dir=SHM if Path(SHM).is_dir() else None))


def rule_file(data: bytes) -> None:
    """Either rules, or problems."""
    path = scratch() / "rules.yaml"
    path.write_bytes(data)
    with contextlib.suppress(RuleFileError, SettingsError):
        load_rules([str(path)], 5.0, {"POD_NAME": "bot-1"}, {"trader"})


def configuration(data: bytes) -> None:
    """Either settings, or problems."""
    path = scratch() / "config.yaml"
    path.write_bytes(data)
    with contextlib.suppress(SettingsError):
        load_settings(path, {"POD_NAMESPACE": "fx", "POD_NAME": "bot-1"})


def webhook_body(data: bytes) -> None:
    """Either alerts, or a ValueError that becomes a 400."""
    try:
        question = WebhookQuestion.model_validate_json(data)
    except ValueError:
        return
    for alert in question.received():
        assert isinstance(alert.starts_at, float)
        assert all(isinstance(text, str) for text in (*alert.labels, *alert.labels.values()))


def _killed() -> Snapshot:
    reason = Reason(code=ReasonCode.KILLED, message="killed", release="an approved recovery")
    return Snapshot(
        switch="fuzz",
        mode=Mode.ACTIVE,
        state=State.KILLED,
        stage=Stage.NONE,
        restriction=Restriction.HALT,
        factor=0.0,
        epoch=1,
        since=0.0,
        gate_restriction=Restriction.HALT,
        gate_factor=0.0,
        reason=reason,
    )


class _Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closing = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def writelines(self, list_of_data: Any) -> None:
        self.written += b"".join(list_of_data)

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    abort = close
    write_eof = close

    def pause_reading(self) -> None:
        """Nothing is read here."""

    resume_reading = pause_reading

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """There is no buffer."""

    def get_write_buffer_size(self) -> int:
        return 0


@cache
def _loop() -> asyncio.AbstractEventLoop:
    logging.disable(logging.CRITICAL)
    return asyncio.new_event_loop()


def gate_request(data: bytes) -> None:
    """A killed switch lets nothing pass but cancels, whatever the bytes and however they are cut."""
    desk = Desk("fuzz")
    desk.update(_killed(), GatePolicy())
    transport = _Transport()
    loop = _loop()

    async def talk() -> None:
        connection = GateConnection(desk, GateLimits(), Roster(limit=10), asyncio.get_running_loop())
        connection.connection_made(transport)
        middle = len(data) // 2
        for part in (data[:middle], data[middle:]):
            if not transport.closing:
                connection.data_received(part)
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        connection.connection_lost(None)

    loop.run_until_complete(talk())
    for (decision, code), count in desk.statistics(0, 0).decisions.items():
        assert decision == "deny" or count == 0 or code == "cancel", (code, transport.written[:500])
    if transport.written:
        status = int(transport.written.split(b" ", 2)[1])
        assert status in {100, 200, 400, 403, 404, 405, 413, 431, 500}, status
        assert status != 500, transport.written[:500]


def order_check(data: bytes) -> None:
    """The body of an order check on a killed switch: only cancels are allowed."""
    desk = Desk("fuzz")
    desk.update(_killed(), GatePolicy())
    work = desk.check(data)
    while True:
        try:
            next(work)
        except StopIteration as done:
            status, body = done.value
            break
    assert status in {200, 400}, body
    for (decision, code), count in desk.statistics(0, 0).decisions.items():
        assert decision == "deny" or count == 0 or code == "cancel", body


@cache
def _state_folder() -> StateFolder:
    return StateFolder.open(scratch() / "state", switch="fuzz")


@cache
def stored_kill() -> bytes:
    """The file of a killed switch."""
    cause = Cause(code=CauseCode.OPERATOR, reason="stop", time=NOW.wall, by="ann")
    killed = transition(SwitchState(since=NOW.wall), Kill(cause=cause, restriction=None), NOW, Policies())
    return encode({"switch": "fuzz", **state_document(killed, NOW)}, switch="fuzz")


def state_file(data: bytes) -> None:
    """Both copies are these bytes: killed or not restored, unless they carry a checksum that fits."""
    folder = _state_folder()
    for name in (STATE_NAME, BACKUP_NAME):
        (scratch() / "state" / name).write_bytes(data)
    try:
        start = choose_start(folder.load(newest_audit_epoch=None), [], NOW, Policies())
    except CannotRestore:
        return
    assert start.state.state is State.KILLED


@cache
def audited() -> bytes:
    """A file of some audit events."""
    folder = scratch() / "seed"
    log = _open_audit(folder)
    for number in range(5):
        event = {"type": "switch.killed", "from": "ACTIVE", "to": "KILLED", "by": "ann", "reason": "r", "data": {}}
        log.append([{**event, "data": {"epoch": number}}], utc(NOW.wall + number))
    log.close()
    return next(folder.glob("*.jsonl")).read_bytes()


def _open_audit(folder: Path) -> AuditLog:
    return AuditLog.open(folder, max_bytes=1 << 20, retention_seconds=None, now=utc(NOW.wall))


def audit_file(data: bytes) -> None:
    """Read, verified and written on: refusals are StorageErrors, and no change of an event goes unnoticed."""
    folder = scratch() / "audit"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    audited()
    name = next((scratch() / "seed").glob("*.jsonl")).name
    (folder / name).write_bytes(data)
    with contextlib.suppress(StorageError):
        audit_log.read(folder, limit=10)
    with contextlib.suppress(StorageError):
        if audit_log.verify(folder, head_sequence=5).ok:  # a torn line behind the last whole one is only mentioned
            assert audit_log.read(folder) == audit_log.read(scratch() / "seed"), "a change went unnoticed"
    with contextlib.suppress(StorageError):
        log = _open_audit(folder)
        log.append([{"type": "sidecar.started", "from": None, "to": None, "by": None, "reason": "r"}], utc(NOW.wall))
        log.close()


def prometheus_answer(data: bytes) -> None:
    """Each query gets an answer or a failure, or all of it is malformed."""
    queries = [Query(key="a", text="x", kind="vector"), Query(key="b", text="y", kind="vector")]
    try:
        result = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(result, list):
        with contextlib.suppress(MalformedResult):
            assert sort_out(Envelope(result=result, warnings=()), queries).keys() == {"a", "b"}


def _seeds() -> dict[str, list[bytes]]:
    request = b"GET /gate HTTP/1.1\r\nHost: localhost\r\nX-Order-Intent: new\r\n\r\n"
    order = (
        b'{"intent":"new","symbol":"AAPL","side":"buy","quantity":100,"position":-40,"open_quantity":0,'
        b'"position_limit":800,"reduce_only":false}'
    )
    check = b"POST /v1/orders/check HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(order), order)
    alert = {
        "version": "4",
        "status": "firing",
        "alerts": [{"status": "firing", "labels": {"a": "b"}, "startsAt": "2026-01-02T03:04:05Z", "fingerprint": "f"}],
    }
    answer = [
        {"metric": {"__ks__": tag, "pod": "p"}, "value": [NOW.wall, text]}
        for tag, text in (("t", "1"), ("q0", "1"), ("q1", "NaN"))
    ]
    data = ROOT / "tests" / "unit" / "settings_data"
    return {
        "rule_file": [file.read_bytes() for file in sorted((ROOT / "rules").glob("*.yaml"))]
        + [(data / "rules_full.good.yaml").read_bytes()],
        "configuration": [
            (data / "config_full.good.yaml").read_bytes(),
            (data / "config_values.bad.yaml").read_bytes(),
        ],
        "webhook_body": [json.dumps(alert).encode()],
        "gate_request": [request, check, request.replace(b"new", b"cancel"), check + request],
        "order_check": [order, b"[" + order + b"," + order + b"]", b'{"intent":"cancel"}'],
        "state_file": [stored_kill()],
        "audit_file": [audited()],
        "prometheus_answer": [json.dumps(answer).encode()],
    }


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        rule_file,
        configuration,
        webhook_body,
        gate_request,
        order_check,
        state_file,
        audit_file,
        prometheus_answer,
    )
}


@cache
def seeds() -> dict[str, list[bytes]]:
    """Good examples by target, from which mutation starts."""
    return _seeds()
