"""Each known failure of kill switches that this one must not have, provoked on the whole application where it can be.

Every test fails when its failure is put back. Triggers, recovery and audit are exercised through the parts that serve
an operator (configuration files in, status and audit out), so a part that is right but not wired fails here too.
"""

import asyncio
import contextlib
import io
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from sidecar.adapters import audit_log
from sidecar.adapters.approvers import hash_code
from sidecar.adapters.audit_log import AuditLog
from sidecar.adapters.prometheus import Query
from sidecar.adapters.storage_thread import StorageThread
from sidecar.app import evaluation
from sidecar.app.application import Application
from sidecar.app.keeper import Keeper
from sidecar.app.logs import Logs
from sidecar.app.memory import DiskMemory
from sidecar.app.sources import Probe
from sidecar.core.compose import Overlay
from sidecar.core.document import state_document
from sidecar.core.errors import ApprovalError, RecoveryBlocked
from sidecar.core.events import Approval, BeginRecovery, Cause, CauseCode, Kill, RequestRecovery
from sidecar.core.states import Instant, Mode, Stage, State
from sidecar.core.switch import Switch
from sidecar.core.transitions import Policies, SwitchState
from sidecar.embedded import KillSwitch
from sidecar.rules.model import Rule
from sidecar.rules.readings import Answer, Failure, Series
from sidecar.settings.config import load_settings

WALL = datetime(2026, 3, 1, 12, 0, tzinfo=UTC).timestamp()
LADDER = "{cooldown: 300s, steps: [{factor: 0.5}, {factor: 0.75, after: 1h}, {factor: 1.0, after: 2h}]"
DRAWDOWN = "{trigger: drawdown, type: threshold, query: drawdown, operator: lt, threshold: -0.15"


class FakeClock:
    def __init__(self) -> None:
        self.at = Instant(mono=1000.0, wall=WALL)

    def now(self) -> Instant:
        return self.at

    def jump(self, seconds: float) -> None:
        self.at = Instant(mono=self.at.mono + seconds, wall=self.at.wall + seconds)


class FakePrometheus:
    """Answers each query with the number under its text: no entry is no series, None is a server that is not there."""

    def __init__(self, clock: FakeClock) -> None:
        self.values: dict[str, float | None] = {}
        self.asked: list[str] = []
        self._clock = clock

    up = True

    async def query(
        self, queries: Sequence[Query], arrived: Callable[[str, Answer | Failure], None] | None = None
    ) -> dict[str, Answer | Failure]:
        outcomes = {query.key: self._answer(query.text) for query in queries}
        for key, outcome in outcomes.items():
            if arrived is not None:
                arrived(key, outcome)
        return outcomes

    def _answer(self, text: str) -> Answer | Failure:
        self.asked.append(text)
        value = self.values.get(text, "missing")
        if value is None:
            return Failure(reason="unreachable", message="nobody there", unreachable=True)
        now = self._clock.now().wall
        if isinstance(value, str):
            return Answer(series=(), evaluated_at=now, oldest_sample=None)
        return Answer(series=(Series(value=value),), evaluated_at=now, oldest_sample=now)

    async def close(self) -> None:
        pass


class World:
    """One sidecar with its own clock and Prometheus; all else is real."""

    def __init__(self, app: Application, clock: FakeClock, prometheus: FakePrometheus) -> None:
        self.app, self.clock, self.prometheus = app, clock, prometheus
        self.values = prometheus.values

    async def look(self) -> dict[str, Any]:
        """Evaluate every rule once, let what runs beside finish, and show the status."""
        for group in self.app.evaluator.rules.groups:
            await self.app.evaluator.evaluate_group(group)
        await asyncio.gather(*(task for task in asyncio.all_tasks() if task.get_name().startswith("probe ")))
        self.app.refresh()
        return self.status()

    def status(self) -> dict[str, Any]:
        return self.app.desk.status()

    async def kill(self, reason: str = "enough") -> None:
        await self.app.desk.trigger(reason=reason, by="alice", by_verified=False, restriction=None)

    async def recover(self, code: str = "bob-code", by: str = "bob") -> None:
        await self.app.desk.recover(by=by, reason="fixed", code=code, waive=())

    async def pass_time(self, seconds: float) -> None:
        self.clock.jump(seconds)
        await self.look()
        await self.app.recoveries.drive_once()
        self.app.refresh()

    async def audited(self) -> list[dict[str, Any]]:
        await self.app.keeper.drain(5.0)
        return await self.app.desk.audit(since=None, until=None, types=None, limit=None)


@cache
def code_hash(name: str) -> str:
    return hash_code(f"{name}-code")


def write_config(folder: Path, rules: str, recovery: str) -> Path:
    # One group that is never evaluated by itself within a test: each look is the test's own.
    (folder / "rules.yaml").write_text(f"groups: [{{name: g, interval: 1h, rules: [{rules}]}}]\n")
    codes = [{"name": name, "code_hash": code_hash(name)} for name in ("bob", "carol")]
    (folder / "approvers.yaml").write_text(json.dumps(codes))
    config = folder / "config.yaml"
    config.write_text(
        "switch: {name: s}\nrules: {files: [rules.yaml]}\nstorage: {dir: state, restore_from_prometheus: off}\n"
        f"recovery: {recovery}, approvers_file: approvers.yaml}}\n"
        "gate: {listen: '127.0.0.1:0', socket: gate.sock, page: state.page}\n"
        "operations: {listen: '127.0.0.1:0'}\ncontrol: {socket: control.sock}\nalertmanager: {notify: {urls: []}}\n"
    )
    return config


@asynccontextmanager
async def sidecar(
    folder: Path,
    *rules: str,
    recovery: str = LADDER,
    clock: FakeClock | None = None,
    probes: dict[str, Probe] | None = None,
    values: dict[str, float | None] | None = None,
) -> AsyncIterator[World]:
    clock = clock or FakeClock()
    settings = load_settings(write_config(folder, ", ".join(rules), recovery), {})
    app = Application(settings=settings, environ={}, clock=clock, probes=probes or {})
    prometheus = FakePrometheus(clock)
    prometheus.values.update(values or {})
    app.prometheus = prometheus  # type: ignore[assignment]
    app.sources.connect(prometheus, 1.0, {})  # type: ignore[arg-type]
    # Time moves when the test says so.
    app.recoveries.drive = _sleep_for_ever  # type: ignore[method-assign]
    running = asyncio.create_task(app.run())
    try:
        async with asyncio.timeout(10):
            while app.reloader._seen is None or app.evaluator.never_evaluated():
                assert not running.done(), running.result()
                await asyncio.sleep(0.001)
        yield World(app, clock, prometheus)
    finally:
        app.stop()
        await running


async def _sleep_for_ever() -> None:
    await asyncio.Event().wait()


# Triggers that are configured but never loaded


async def test_every_rule_of_the_configured_files_is_evaluated_and_can_kill(tmp_path: Path) -> None:
    rules = {
        "drawdown": ("threshold, query: drawdown, operator: lt, threshold: -0.15", -0.01, -0.16),
        "rejects": ("expression, expr: rejects", None, 1.0),
        "beat": ("heartbeat, query: beat", WALL, WALL - 181),
        "session": ("connectivity, query: session, max_consecutive_failures: 1", 1.0, 0.0),
    }
    texts = [f"{{trigger: {name}, type: {text}}}" for name, (text, _, _) in rules.items()]
    for name, (_, good, bad) in rules.items():
        folder = tmp_path / name
        folder.mkdir()
        well: dict[str, float | None] = {key: good for key, (_, good, _) in rules.items() if good is not None}
        async with sidecar(folder, *texts, values=well) as world:
            status = await world.look()
            assert {one["trigger"] for one in world.app.desk.triggers()["triggers"]} == set(rules)
            assert (status["state"], status["gate"]["decision"]) == ("ACTIVE", "allow"), status["not_ready_reason"]
            assert set(world.prometheus.asked) == {"drawdown", "rejects", "beat", "session"}
            world.values[name] = bad
            world.clock.jump(60.0)
            status = await world.look()
            assert (status["state"], [one["trigger"] for one in status["causes"]]) == ("KILLED", [name]), good


async def test_rule_files_that_hold_nothing_or_cannot_be_read_keep_the_gate_shut(tmp_path: Path) -> None:
    for name, text in {"none": "", "bad": "{trigger: x, type: threshold}"}.items():
        (tmp_path / name).mkdir()
        async with sidecar(tmp_path / name, *([text] if text else ())) as world:
            status = await world.look()
            assert status["gate"]["decision"] == "deny"
            assert status["gate"]["reason"]["code"] == "not_ready"
            assert "no rules are loaded" in status["not_ready_reason"]


# An approval code that is asked for but never compared


@pytest.mark.parametrize(
    ("by", "code"), [("bob", "wrong"), ("bob", "carol-code"), ("bob", ""), ("mallory", "bob-code")]
)
async def test_only_the_approvers_own_code_releases(tmp_path: Path, by: str, code: str) -> None:
    async with sidecar(tmp_path, f"{DRAWDOWN}}}", values={"drawdown": 0.0}) as world:
        await world.look()
        await world.kill()
        with pytest.raises(ApprovalError):
            await world.recover(code=code, by=by)
        assert (world.status()["state"], world.status()["stage"]) == ("KILLED", "NONE")
        await world.recover()
        assert world.status()["state"] == "RECOVERING"


# Health checks without approval, recovery without health checks


TWO = LADDER.replace("{cooldown", "{approvals: 2, cooldown")
CHECKED = LADDER + ", health: {queries: [{name: feed, query: feed_up, operator: eq, threshold: 1}]}"


async def test_a_recovery_moves_on_to_its_checks_only_with_every_approval(tmp_path: Path) -> None:
    async with sidecar(tmp_path, f"{DRAWDOWN}}}", recovery=TWO, values={"drawdown": 0.0}) as world:
        await world.look()
        await world.kill()
        await world.recover()
        await world.app.recoveries.validate()
        await world.pass_time(60.0)
        assert (world.status()["state"], world.status()["stage"]) == ("KILLED", "PENDING")
        await world.app.desk.approve(by="carol", code="carol-code")
        assert world.status()["state"] == "RECOVERING"


@pytest.mark.parametrize(("feed", "seen"), [(0.0, "seen 0"), (float("nan"), "seen nan"), (None, "nobody there")])
async def test_no_recovery_begins_while_a_health_check_fails_or_cannot_see(
    tmp_path: Path, feed: float | None, seen: str
) -> None:
    async with sidecar(tmp_path, f"{DRAWDOWN}}}", recovery=CHECKED, values={"drawdown": 0.0, "feed_up": feed}) as world:
        await world.look()
        await world.kill()
        with pytest.raises(RecoveryBlocked) as refused:
            await world.recover()
        assert "health check feed" in str(refused.value)
        assert seen in str(refused.value)
        assert world.status()["state"] == "KILLED"
        assert world.prometheus.asked.count("feed_up") == 1


async def test_health_is_looked_at_again_before_trading_reopens(tmp_path: Path) -> None:
    async with sidecar(tmp_path, f"{DRAWDOWN}}}", recovery=CHECKED, values={"drawdown": 0.0, "feed_up": 1.0}) as world:
        await world.look()
        await world.kill()
        await world.recover()
        world.values["feed_up"] = 0.0
        await world.pass_time(301.0)
        assert world.status()["state"] == "RECOVERING"
        world.values["feed_up"] = 1.0
        await world.pass_time(5.0)
        assert world.status()["state"] == "ACTIVE"


# A factor of 1.0 while killed, or after a restart


def exported_factor(world: World) -> float:
    text = generate_latest(world.app.registry).decode()
    line = next(line for line in text.splitlines() if line.startswith("killswitch_position_limit_factor{"))
    return float(line.rsplit(" ", 1)[1])


async def test_the_factor_is_0_while_killed_and_recovering_and_survives_a_restart_in_every_state(
    tmp_path: Path,
) -> None:
    clock = FakeClock()

    async def factor_after_restart(move: Callable[[World], Any] | None) -> tuple[str, float]:
        async with sidecar(tmp_path, f"{DRAWDOWN}}}", clock=clock, values={"drawdown": 0.0}) as world:
            await world.look()
            if move is not None:
                await move(world)
            status = world.status()
            assert await world.app.keeper.drain(5.0)
            assert exported_factor(world) == status["position_limit_factor"]
            stored = json.loads((tmp_path / "state" / "state.json").read_text())
            assert stored["factor"] == status["position_limit_factor"]
        async with sidecar(tmp_path, f"{DRAWDOWN}}}", clock=clock, values={"drawdown": 0.0}) as world:
            again = await world.look()
            assert (again["state"], again["position_limit_factor"]) == (
                status["state"],
                status["position_limit_factor"],
            )
            return again["state"], again["position_limit_factor"]

    assert await factor_after_restart(World.kill) == ("KILLED", 0.0)
    assert await factor_after_restart(World.recover) == ("RECOVERING", 0.0)
    assert await factor_after_restart(lambda world: world.pass_time(300.0)) == ("ACTIVE", 0.5)
    assert await factor_after_restart(lambda world: world.pass_time(3600.0)) == ("ACTIVE", 0.75)
    assert await factor_after_restart(lambda world: world.pass_time(3600.0)) == ("ACTIVE", 1.0)


# A watchdog or a price feed that can never fire


async def test_a_rule_whose_probe_is_not_wired_keeps_the_gate_shut_and_says_which(tmp_path: Path) -> None:
    rule = "{trigger: memory, type: watchdog, target: host, action: kill}"
    async with sidecar(tmp_path, rule, probes={}) as world:
        status = await world.look()
        assert status["gate"]["reason"]["code"] == "not_ready"
        assert "memory" in status["not_ready_reason"]
        assert world.app.desk.triggers()["triggers"][0]["armed"] is False


async def test_a_wired_watchdog_kills(tmp_path: Path) -> None:
    used = 0.5

    async def probe(_: Rule) -> Answer:
        return Answer(series=(Series(value=used),), evaluated_at=WALL, oldest_sample=None)

    rule = "{trigger: memory, type: watchdog, target: host, action: kill}"
    async with sidecar(tmp_path, rule, probes={"watchdog": probe}) as world:
        assert (await world.look())["gate"]["decision"] == "allow"
        used = 1.01
        assert (await world.look())["state"] == "KILLED"


async def test_a_price_feed_that_stops_kills(tmp_path: Path) -> None:
    rule = "{trigger: feed, type: heartbeat, query: price_time, interval: 5s, max_missed: 2}"
    async with sidecar(tmp_path, rule, values={"price_time": WALL}) as world:
        assert (await world.look())["gate"]["decision"] == "allow"
        world.clock.jump(11.0)
        assert (await world.look())["state"] == "KILLED"


# A missing heartbeat that counts as healthy


async def test_a_heartbeat_that_never_came_keeps_the_gate_shut_and_one_that_went_missing_kills(tmp_path: Path) -> None:
    async with sidecar(tmp_path, "{trigger: beat, type: heartbeat, query: beat}") as world:
        status = await world.look()
        assert (status["state"], status["gate"]["reason"]["code"]) == ("ACTIVE", "not_ready")
        world.values["beat"] = WALL
        assert (await world.look())["gate"]["decision"] == "allow"
        del world.values["beat"]
        await world.look()
        trigger = world.app.desk.triggers()["triggers"][0]
        assert (trigger["health"], trigger["armed"]) == ("no_data", False)
        world.clock.jump(61.0)
        status = await world.look()
        assert (status["state"], status["causes"][0]["code"]) == ("KILLED", "no_data")


# A time with a time zone that disables a trigger


async def test_a_beat_written_in_another_time_zone_is_no_beat(tmp_path: Path) -> None:
    two_hours_ahead = WALL + 7200.0
    async with sidecar(tmp_path, "{trigger: beat, type: heartbeat, query: beat}", values={"beat": WALL}) as world:
        await world.look()
        world.values["beat"] = two_hours_ahead
        await world.look()
        assert world.app.desk.triggers()["triggers"][0]["health"] == "error"
        world.clock.jump(61.0)
        assert (await world.look())["state"] == "KILLED"


async def test_an_evaluation_that_breaks_down_shuts_the_gate_instead_of_switching_its_rule_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise TypeError("can't compare offset-naive and offset-aware datetimes")

    async with sidecar(tmp_path, f"{DRAWDOWN}}}".replace("g, interval: 1h", "g"), values={"drawdown": 0.0}) as world:
        await world.look()
        monkeypatch.setattr(evaluation, "evaluate", breaks)
        group = world.app.evaluator.rules.groups[0]
        task = asyncio.create_task(world.app.evaluator.evaluate_group(group))
        world.app.evaluator._tasks["g"].cancel()
        world.app.evaluator._tasks["g"] = task
        await asyncio.wait({task})
        world.app.refresh()
        status = world.status()
        assert (status["gate"]["decision"], status["gate"]["reason"]["code"]) == ("deny", "internal_error")
        assert "offset-naive" in status["gate"]["reason"]["message"]


# A trigger on cooldown that is blind to a worse breach


async def test_a_worse_breach_acts_within_the_cooldown_of_a_milder_one(tmp_path: Path) -> None:
    steps = "steps: [{at: 50%, action: throttle, factor: 0.5}, {at: 90%, action: reduce_only}]"
    async with sidecar(tmp_path, f"{DRAWDOWN}, cooldown: 1h, {steps}}}", values={"drawdown": 0.0}) as world:
        await world.look()
        seen = []
        for value in (-0.08, -0.14, -0.16):
            world.values["drawdown"] = value
            world.clock.jump(1.0)
            status = await world.look()
            seen.append((status["state"], status["restriction"], status["position_limit_factor"]))
        assert seen == [("ACTIVE", "none", 0.5), ("ACTIVE", "reduce_only", 0.5), ("KILLED", "halt", 0.0)]


async def test_a_rule_that_has_killed_kills_again_within_its_cooldown(tmp_path: Path) -> None:
    async with sidecar(tmp_path, f"{DRAWDOWN}, cooldown: 24h}}", values={"drawdown": -0.2}) as world:
        assert (await world.look())["state"] == "KILLED"
        world.values["drawdown"] = 0.0
        await world.look()
        await world.recover()
        await world.pass_time(300.0)
        assert world.status()["state"] == "ACTIVE"
        world.values["drawdown"] = -0.3
        assert (await world.look())["state"] == "KILLED"


# Further kill reasons and refused recoveries that are not audited


async def test_every_cause_and_every_refusal_is_audited(tmp_path: Path) -> None:
    async with sidecar(tmp_path, f"{DRAWDOWN}}}", values={"drawdown": 0.0}) as world:
        await world.look()
        await world.kill("first")
        await world.kill("second")
        world.values["drawdown"] = -0.2
        await world.look()
        with pytest.raises(ApprovalError):
            await world.recover(code="wrong")
        with pytest.raises(RecoveryBlocked):
            await world.recover()
        told = [(event["type"], event["reason"]) for event in await world.audited()]
    assert ("switch.killed", "first") in told
    assert ("switch.cause_added", "second") in told
    assert ("switch.cause_added", "drawdown: -0.2 < -0.15") in told
    assert "approval.failed" in dict(told)
    assert "recovery.request_refused" in dict(told)
    assert "drawdown is firing" in (dict(told)["recovery.refused"] or "")


# Audit lines that are lost


NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def opened(folder: Path, *, max_bytes: int = 10**6, days: float = 90.0, now: datetime = NOON) -> AuditLog:
    return AuditLog.open(folder, max_bytes=max_bytes, retention_seconds=days * 86_400, now=now)


def reasons(folder: Path, **question: Any) -> list[Any]:
    return [event["reason"] for event in audit_log.read(folder, **question)]


def test_no_audit_line_is_lost_when_files_are_rotated_by_size_and_by_day(tmp_path: Path) -> None:
    log = opened(tmp_path, max_bytes=4096)
    for number in range(100):
        log.append([{"type": "t", "reason": str(number)}], NOON + timedelta(hours=number))
    log.close()
    assert len(list(tmp_path.glob("*.jsonl.gz"))) > 5
    assert reasons(tmp_path) == [str(number) for number in range(100)]
    assert audit_log.verify(tmp_path).ok


@pytest.mark.parametrize("odd", ["line\nbreak", "\u2028", "ünïcödé ⚠", "nul\x00", "half \ud800 a pair", '"\\'])
def test_no_audit_line_is_lost_to_an_odd_character(tmp_path: Path, odd: str) -> None:
    log = opened(tmp_path)
    log.append([{"type": "t", "reason": odd, "data": {odd: object()}}, {"type": "t", "reason": "after"}], NOON)
    log.close()
    assert len(reasons(tmp_path)) == 2
    assert reasons(tmp_path)[1] == "after"
    assert audit_log.verify(tmp_path).ok


def test_no_audit_line_is_lost_after_a_torn_last_line(tmp_path: Path) -> None:
    log = opened(tmp_path)
    log.append([{"type": "t", "reason": "before"}], NOON)
    log.close()
    with next(tmp_path.glob("*.jsonl")).open("ab") as file:
        file.write(b'{"seq":2,"type":"half a li')
    log = opened(tmp_path)
    log.append([{"type": "t", "reason": "after"}], NOON)
    log.close()
    assert reasons(tmp_path) == ["before", "after"]
    assert audit_log.verify(tmp_path).ok


def test_no_audit_line_is_lost_to_a_folder_that_is_missing_or_goes_missing(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    log = opened(folder)
    folder.rmdir()
    log.append([{"type": "t", "reason": "kept"}], NOON)
    log.close()
    assert reasons(folder) == ["kept"]


# Queries that return the oldest events, or none for a time with a time zone


def test_a_limited_query_returns_the_newest_events_newest_last(tmp_path: Path) -> None:
    log = opened(tmp_path, max_bytes=4096)
    log.append([{"type": "t", "reason": str(number)} for number in range(60)], NOON)
    log.close()
    assert reasons(tmp_path, limit=3) == ["57", "58", "59"]


@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=2)), timezone(timedelta(hours=-5)), None])
def test_since_finds_its_events_in_any_time_zone(tmp_path: Path, zone: timezone | None) -> None:
    log = opened(tmp_path)
    for minute in range(3):
        log.append([{"type": "t", "reason": str(minute)}], NOON + timedelta(minutes=minute))
    log.close()
    since = NOON + timedelta(minutes=1)
    asked = since.replace(tzinfo=None) if zone is None else since.astimezone(zone)
    assert reasons(tmp_path, since=asked) == ["1", "2"]


# Retention that never runs


def test_retention_runs_at_the_start_and_while_running(tmp_path: Path) -> None:
    log = opened(tmp_path, days=7)
    for day in (0, 5, 9):
        log.append([{"type": "t", "reason": f"day {day}"}], NOON + timedelta(days=day))
    assert reasons(tmp_path) == ["day 5", "day 9"]
    log.close()
    log = opened(tmp_path, days=2, now=NOON + timedelta(days=10))
    log.close()
    assert reasons(tmp_path) == ["day 9"]


async def test_the_configured_retention_reaches_the_audit_of_the_running_sidecar(tmp_path: Path) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=200)
    log = opened(tmp_path / "state" / "audit", now=long_ago)
    log.append([{"type": "t", "reason": "long ago"}], long_ago)
    log.close()
    async with sidecar(tmp_path, f"{DRAWDOWN}}}", values={"drawdown": 0.0}) as world:
        assert "long ago" not in [event["reason"] for event in await world.audited()]


# A slow log handler or callback that delays the gate


class _Stuck(io.StringIO):
    """An output that takes nothing until it is let go, like a pipe that nobody reads."""

    def __init__(self, let_go: threading.Event) -> None:
        super().__init__()
        self._let_go = let_go

    def write(self, text: str) -> int:
        self._let_go.wait(10)
        return super().write(text)


def test_a_log_output_that_hangs_delays_no_kill(tmp_path: Path) -> None:
    let_go = threading.Event()
    stuck = _Stuck(let_go)
    logs = Logs(level="info", form="json", stderr=stuck, stdout=stuck)
    try:
        began = time.monotonic()
        keeper, shown = _bare_keeper()
        for number in range(3):
            keeper.apply(Kill(cause=Cause(code=CauseCode.OPERATOR, reason=str(number), time=WALL)))
            logging.getLogger("sidecar.audit_trail").info("a line")
        assert shown[-1].state is State.KILLED
        assert time.monotonic() - began < 2.0
    finally:
        let_go.set()
        logs.stop()
    assert "switch.killed" in stuck.getvalue()


def test_a_callback_that_hangs_delays_no_kill_and_no_decision() -> None:
    entered, let_go = threading.Event(), threading.Event()
    switch = KillSwitch()

    def hangs(_: object) -> None:
        entered.set()
        let_go.wait(10)

    switch.register_on_kill(hangs)
    stopping = threading.Thread(target=switch.trigger, args=("enough",))
    began = time.monotonic()
    try:
        stopping.start()  # it waits for its callback; nobody else does
        assert entered.wait(2)
        assert switch.check_and_block()
        switch.trigger("more")
        assert len(switch.get_status()["causes"]) == 2
        assert time.monotonic() - began < 2.0
        assert stopping.is_alive()
    finally:
        let_go.set()
        stopping.join()


# A kill that is saved in the wrong order


def _document(state: SwitchState, now: Instant) -> dict[str, Any]:
    return {"switch": "s", **state_document(state, now)}


def _bare_keeper() -> tuple[Keeper, list[Any]]:
    switch = Switch(name="s", mode=Mode.ACTIVE, state=SwitchState(), policies=Policies())
    switch.cover(Overlay())
    keeper = Keeper(switch=switch, clock=FakeClock(), document=_document)
    shown: list[Any] = []
    keeper.observers.snapshot.append(shown.append)
    return keeper, shown


class _HangingMemory:
    """Notes what the gate shows when a document arrives, and keeps it until the test lets it go."""

    def __init__(self, shown: list[Any]) -> None:
        self.shown = shown
        self.written: list[tuple[str, str]] = []
        self.let_go = asyncio.Event()
        self.entered = asyncio.Event()

    async def write(self, document: dict[str, Any] | None, events: Sequence[Any]) -> None:
        if document is not None:
            self.written.append((document["state"], self.shown[-1].state.value))
        self.entered.set()
        await self.let_go.wait()


async def test_a_kill_shuts_the_gate_before_it_is_written_and_is_written_after_what_came_before() -> None:
    keeper, shown = _bare_keeper()
    memory = _HangingMemory(shown)
    memory.let_go.set()
    writer = asyncio.create_task(keeper.run())
    try:
        keeper.attach(memory, SwitchState())
        keeper.apply(Kill(cause=Cause(code=CauseCode.OPERATOR, reason="first", time=WALL)))
        approval = Approval(by="bob", by_verified=True, granted=WALL, granted_mono=1000.0)
        keeper.apply(RequestRecovery(by="bob", reason="fixed", approval=approval))
        assert keeper.switch.state.stage is Stage.VALIDATING
        assert await keeper.settled(5.0)
        memory.let_go.clear()
        memory.entered.clear()
        begins = asyncio.create_task(keeper.loosen(BeginRecovery()))
        async with asyncio.timeout(5):
            await memory.entered.wait()
        # The release is on its way to the disk and not in force; a kill in that moment beats it on gate and disk.
        assert shown[-1].state is State.KILLED
        keeper.apply(Kill(cause=Cause(code=CauseCode.OPERATOR, reason="second", time=WALL)))
        memory.let_go.set()
        assert await begins is False
        assert await keeper.settled(5.0)
    finally:
        writer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await writer
    assert [state for state, _ in memory.written][-2:] == ["RECOVERING", "KILLED"]
    assert all(gate == "KILLED" for _, gate in memory.written[1:])
    assert keeper.switch.state.state is State.KILLED


async def test_documents_reach_the_disk_in_the_order_of_events(tmp_path: Path) -> None:
    thread = StorageThread()
    memory = await DiskMemory.open(tmp_path, switch="s", audit_max_bytes=10**6, audit_retention=86_400, thread=thread)
    await memory.load()
    keeper, _ = _bare_keeper()
    writer = asyncio.create_task(keeper.run())
    try:
        keeper.attach(memory, SwitchState())
        for number in range(20):
            keeper.apply(Kill(cause=Cause(code=CauseCode.OPERATOR, reason=str(number), time=WALL)))
            await asyncio.sleep(0)
        assert await keeper.settled(5.0)
        await keeper.drain(5.0)
    finally:
        writer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await writer
        await memory.close()
        await thread.stop(5.0)
    stored = json.loads((tmp_path / "state.json").read_text())
    assert stored["state"] == "KILLED"
    assert [cause["reason"] for cause in stored["causes"]] == [str(number) for number in range(20)]
    epochs = [event["data"]["epoch"] for event in audit_log.read(tmp_path / "audit") if event["to"]]
    assert epochs == sorted(epochs)
