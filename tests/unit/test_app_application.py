"""The application as a whole: real files and sockets, a clock that jumps, and a probe that the test moves."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar.app import application as application_module
from sidecar.app import desk as desk_module
from sidecar.app import keeper as keeper_module
from sidecar.app import reload as reload_module
from sidecar.app.application import AnotherSidecar, Application
from sidecar.app.telemetry import AppTelemetry
from sidecar.core.errors import InvalidTransition, NotDurable, RuleFileError, SettingsError
from sidecar.core.snapshot import Snapshot
from sidecar.core.states import Instant, Restriction, Stage, State
from sidecar.rules.model import Rule
from sidecar.rules.readings import Answer, Failure, Series
from sidecar.settings.config import load_settings

pytestmark = pytest.mark.slow

CODE = "let me in"
RULES = """
groups:
  - name: g
    interval: 50ms
    rules:
      - {trigger: busy, type: watchdog, memory_percent: 90, action: ACTION}
"""


class FakeClock:
    def __init__(self) -> None:
        self.at = Instant(mono=1000.0, wall=1_700_000_000.0)

    def now(self) -> Instant:
        return self.at

    def jump(self, seconds: float) -> None:
        self.at = Instant(mono=self.at.mono + seconds, wall=self.at.wall + seconds)


class World:
    """One switch's folder, and the application that runs on it at the moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = FakeClock()
        self.value = 0.5
        self.error: Exception | None = None
        self.extra = ""
        self.mode = "active"
        self.port = 0
        self.environ = {"KILL_SWITCH_APPROVAL_CODE": CODE}
        self.write_rules()
        self.write_config()

    def write_rules(self, action: str = "kill", text: str | None = None) -> None:
        (self.folder / "rules.yaml").write_text(RULES.replace("ACTION", action) if text is None else text)

    def write_config(self, extra: str = "") -> None:
        (self.folder / "config.yaml").write_text(
            f"switch: {{name: test, mode: {self.mode}}}\n"
            "prometheus: {urls: []}\n"
            "rules: {files: [rules.yaml], interval: 1s}\n"
            f"gate: {{listen: '127.0.0.1:{self.port}', socket: gate.sock, page: run/page}}\n"
            "operations: {listen: '127.0.0.1:0'}\n"
            "control: {socket: control.sock}\n"
            f"storage: {{dir: state}}\n{extra}\n"
        )

    async def probe(self, rule: Rule) -> Answer | Failure:
        if self.error is not None:
            raise self.error
        now = self.clock.now().wall
        return Answer(series=(Series(value=self.value),), evaluated_at=now, oldest_sample=now)

    def build(self) -> Application:
        settings = load_settings(self.folder / "config.yaml", self.environ)
        return Application(settings=settings, environ=self.environ, clock=self.clock, probes={"watchdog": self.probe})

    @asynccontextmanager
    async def running(self, *, ready: bool = True) -> AsyncIterator[Application]:
        app = self.build()
        task = asyncio.create_task(app.run())
        try:
            if ready:
                await until(lambda: app.opened and app.keeper.durable, task)
            else:
                await until(lambda: app.operations_address is not None, task)
            yield app
        finally:
            app.stop()
            await asyncio.wait_for(task, 10.0)

    def audit(self) -> list[dict[str, Any]]:
        files = sorted((self.folder / "state" / "audit").glob("*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


async def until(condition: Callable[[], object], task: "asyncio.Task[Any] | None" = None) -> None:
    async with asyncio.timeout(8):
        while not condition():
            if task is not None and task.done():
                task.result()
            await asyncio.sleep(0.005)


async def gate(app: Application) -> tuple[int, str]:
    assert app.gate_address is not None
    reader, writer = await asyncio.open_connection(*app.gate_address)
    writer.write(b"GET /gate HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    head = (await reader.read()).decode().split("\r\n\r\n")[0].splitlines()
    writer.close()
    fields = dict(line.lower().split(": ", 1) for line in head[1:])
    return int(head[0].split()[1]), fields["x-killswitch-reason"]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(application_module, "STORAGE_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(keeper_module, "FIRST_RETRY_SECONDS", 0.01)
    return World(tmp_path)


# Starting


async def test_it_starts_denying_and_allows_once_every_rule_has_seen_something(world: World) -> None:
    async with world.running() as app:
        assert await gate(app) == (200, "active")
        status = app.desk.status()
        assert (status["ready"], status["state"], status["durable"]) == (True, "ACTIVE", True)
        assert app.config_ready() is None
        assert app.live() is None
    assert [event["type"] for event in world.audit()] == ["state.restored", "sidecar.started", "sidecar.stopped"]


async def test_a_gate_port_that_is_taken_ends_the_start(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        world.port = taken.getsockname()[1]
        world.write_config()
        with pytest.raises(OSError, match="address already in use"):
            await world.build().run()
    world.port = 0
    world.write_config()
    async with world.running() as app:  # nothing was left locked or bound
        assert await gate(app) == (200, "active")


async def test_a_page_that_cannot_be_used_is_a_problem_shown_and_no_reason_to_stop(world: World) -> None:
    (world.folder / "run").write_text("a file where the folder should be")
    async with world.running() as app:
        assert await gate(app) == (200, "active")
        assert any("state page" in problem for problem in app.desk.status()["problems"])


async def test_a_second_sidecar_on_the_same_folder_does_not_start(world: World) -> None:
    async with world.running() as app:
        with pytest.raises(AnotherSidecar, match="held by another"):
            await world.build().run()
        assert await gate(app) == (200, "active")


async def test_a_second_sidecar_does_not_stay_although_the_volume_was_slow_to_say_so(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.running():
        monkeypatch.setattr(application_module, "STORAGE_PATIENCE_SECONDS", 0.0)
        path = world.folder / "config.yaml"
        path.write_text(
            path.read_text().replace("gate.sock", "2.gate").replace("control.sock", "2.control").replace("run/", "2/")
        )
        with pytest.raises(AnotherSidecar):
            await asyncio.wait_for(world.build().run(), 8.0)


async def test_without_a_usable_folder_it_denies_kills_without_durability_and_goes_on_when_it_is_mended(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(application_module, "STORAGE_PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(desk_module, "DURABLE_WITHIN_SECONDS", 0.1)
    (world.folder / "state").write_text("a file where the folder should be")
    async with world.running(ready=False) as app:
        await until(lambda: app.storage_error and "cannot be used" in app.storage_error)
        assert await gate(app) == (403, "not_ready")
        assert app.config_ready() is None or "groups" in (app.config_ready() or "")
        with pytest.raises(NotDurable) as early:
            await app.desk.trigger(reason="now", by="ann", by_verified=False, restriction="halt")
        assert early.value.status["state"] == "KILLED"
        (world.folder / "state").unlink()
        await until(lambda: app.keeper.durable)
        assert await gate(app) == (403, "killed")
    assert "switch.killed" in [event["type"] for event in world.audit()]


async def test_a_kill_outlives_the_process_and_nothing_is_open_in_between(world: World) -> None:
    async with world.running() as app:
        await app.desk.trigger(reason="enough", by="ann", by_verified=False, restriction=None)
    shown: list[Restriction] = []
    app = world.build()
    app.keeper.observers.snapshot.append(lambda snapshot: shown.append(snapshot.gate_restriction))
    task = asyncio.create_task(app.run())
    await until(lambda: app.opened and app.keeper.durable, task)
    assert set(shown) == {Restriction.HALT}
    assert app.switch.state.state is State.KILLED
    assert app.switch.state.causes[0].reason == "enough"
    app.stop()
    await task


async def test_a_newer_format_keeps_the_gate_shut_and_the_file_untouched(world: World) -> None:
    async with world.running():
        pass
    path = world.folder / "state" / "state.json"
    newer = path.read_text().replace('"version":1', '"version":9')
    path.write_text(newer)
    async with world.running(ready=False) as app:
        await until(lambda: app.storage_error and "version 9" in app.storage_error)
        assert await gate(app) == (403, "not_ready")
        assert app.config_ready() is None or "groups" in (app.config_ready() or "")
    assert path.read_text() == newer


async def test_the_state_file_holds_what_a_restart_and_an_auditor_look_for(world: World) -> None:
    async with world.running():
        pass
    stored = json.loads((world.folder / "state" / "state.json").read_text())
    assert stored.keys() >= {
        *("version", "switch", "state", "restriction", "causes", "timers"),
        *("recovery", "factor", "epoch", "alerts", "waivers", "checksum"),
    }


async def test_disabled_evaluates_nothing_refuses_commands_and_leaves_the_stored_state(world: World) -> None:
    async with world.running() as app:
        await app.desk.trigger(reason="enough", by="ann", by_verified=False, restriction=None)
    stored = (world.folder / "state" / "state.json").read_text()
    world.mode = "disabled"
    world.write_config()
    async with world.running(ready=False) as app:
        await until(lambda: app.keeper.durable)
        assert await gate(app) == (200, "disabled")
        with pytest.raises(InvalidTransition):
            await app.desk.trigger(reason="again", by=None, by_verified=False, restriction=None)
        assert any("disabled" in problem for problem in app.desk.status()["problems"])
        assert app.config_loosened == 1
        assert app.reloader.loosened is not None
        assert app.reloader.loosened[1] == "switch.mode at this start: active → disabled"
        await app.desk.reload()
    assert (world.folder / "state" / "state.json").read_text() == stored
    types = [event["type"] for event in world.audit()]
    assert "kill.refused" in types
    assert "config.loosened" in types


# Rules at the start


async def test_broken_rule_files_keep_the_gate_shut_until_a_reload_finds_them_mended(world: World) -> None:
    world.write_rules(text="groups: [{name: g")
    async with world.running(ready=False) as app:
        await until(lambda: app.reloader.error)
        assert await gate(app) == (403, "not_ready")
        assert "rules.yaml" in app.desk.status()["gate"]["reason"]["message"]
        world.write_rules()
        await app.desk.reload()
        await until(lambda: app.opened)
        assert await gate(app) == (200, "active")


async def test_no_rules_at_all_keep_the_gate_shut(world: World) -> None:
    (world.folder / "rules.yaml").unlink()
    async with world.running(ready=False) as app:
        assert await gate(app) == (403, "not_ready")
        assert "nothing matches rules.files" in (app.not_ready() or "")


async def test_files_without_a_rule_keep_the_gate_shut_and_are_named(world: World) -> None:
    world.write_rules(text="groups: []")
    async with world.running(ready=False) as app:
        assert await gate(app) == (403, "not_ready")
        assert app.not_ready() == f"no rules are loaded: no rule stands in {world.folder / 'rules.yaml'}"


# Failing


async def test_a_defect_in_an_evaluation_denies_everything_and_fails_liveness_after_a_while(world: World) -> None:
    async with world.running() as app:
        world.error = RuntimeError("defect")
        await until(lambda: app.failure)
        assert await gate(app) == (403, "internal_error")
        assert app.live() is None
        world.clock.jump(31.0)
        assert "defect" in (app.live() or "")
        assert "defect" in str(app.desk.status()["problems"])
    assert "sidecar.degraded" in [event["type"] for event in world.audit()]


async def test_a_task_that_ends_denies_everything(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ends(self: object) -> None:
        return None

    monkeypatch.setattr(reload_module.Reloader, "watch", ends)
    async with world.running(ready=False) as app:
        await until(lambda: app.failure)
        assert await gate(app) == (403, "internal_error")
        assert app.failure is not None
        assert app.failure[1] == "the task 'reload' ended: it returned"


async def test_a_snapshot_that_could_not_be_shown_denies_everything(world: World) -> None:
    def broken(_: Snapshot) -> None:
        raise RuntimeError("defect")

    async with world.running() as app:
        app.keeper.observers.snapshot.append(broken)
        app.keeper.publish()
        await until(lambda: app.failure)
        assert await gate(app) == (403, "internal_error")


async def test_a_stalled_evaluation_denies_as_stale_blocks_recoveries_and_fails_liveness(world: World) -> None:
    async with world.running() as app:
        await app.evaluator.stop()
        world.clock.jump(10.0)
        await until(lambda: app.switch.overlay.stale)
        assert await gate(app) == (403, "stale")
        assert "last evaluated" in (app.shut() or "")
        assert app.live() is None
        world.clock.jump(31.0)
        assert "last evaluated" in (app.live() or "")


# The desk


async def test_a_kill_by_an_operator_answers_with_the_durable_status(world: World) -> None:
    async with world.running() as app:
        status = await app.desk.trigger(reason="enough", by=None, by_verified=False, restriction="reduce_only")
        assert (status["state"], status["restriction"], status["durable"]) == ("KILLED", "reduce_only", True)
        assert status["causes"][0]["by"] == "operator"
        with pytest.raises(ValueError, match="restricts"):
            await app.desk.trigger(reason="x", by=None, by_verified=False, restriction="none")
        with pytest.raises(InvalidTransition):
            await app.desk.cancel(by="ann", reason="none", by_verified=False)


async def test_a_recovery_through_the_desk(world: World) -> None:
    async with world.running() as app:
        await app.desk.trigger(reason="enough", by=None, by_verified=False, restriction=None)
        status = await app.desk.recover(by="bob", reason="fixed", code=CODE, waive=())
        assert (status["state"], status["stage"]) == ("RECOVERING", "COOLDOWN")
        assert status["recovery"]["cooldown_remaining_seconds"] == 300.0
        assert app.desk.recovery() == status["recovery"]
        world.clock.jump(300.0)
        await until(lambda: app.switch.state.state is State.ACTIVE)
        await until(lambda: app.desk.status()["position_limit_factor"] == 0.5)
        assert app.desk.recovery()["next_step"] == {"factor": 0.75, "in_seconds": 3600.0, "waits_for": None}
    assert CODE not in json.dumps(world.audit())


async def test_many_who_ask_for_health_or_the_audit_at_once_cost_one_check_and_one_reading_at_a_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most = 0, 0

    async def slow(*_: Any, **__: Any) -> list[Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return []

    async with world.running() as app:
        checked = 0
        check = app.recoveries.check_health

        async def counted() -> Any:
            nonlocal checked
            checked += 1
            return await check()

        app.recoveries.check_health = counted  # type: ignore[method-assign]
        assert len({str(one) for one in await asyncio.gather(*(app.desk.health() for _ in range(20)))}) == 1
        assert checked == 1
        assert (await app.desk.health())["healthy"]
        assert checked == 2
        monkeypatch.setattr(asyncio, "to_thread", slow)
        await asyncio.gather(*(app.desk.audit(since=None, until=None, types=None, limit=1) for _ in range(5)))
        monkeypatch.undo()
    assert most == 1


async def test_streams_that_wake_together_are_told_the_same_documents(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.app.desk.STREAM_INTERVAL_SECONDS", 300.0)
    async with world.running() as app:
        one, two = app.desk.subscribe(), app.desk.subscribe()
        first = [await anext(one), await anext(one)]
        assert [document is first[place][1] for place, (_, document) in enumerate([await anext(two), await anext(two)])]
        await app.desk.trigger(reason="drill", by="ann", by_verified=False, restriction=None)
        assert (await anext(one))[1]["state"] == "KILLED", "never older than the last change"
        assert (await anext(two))[1]["state"] == "KILLED"
        await one.aclose()
        await two.aclose()


async def test_health_triggers_audit_and_the_stream_show_the_same_switch(world: World) -> None:
    async with world.running() as app:
        health = await app.desk.health()
        assert health["healthy"]
        assert [check["name"] for check in health["checks"]] == ["sources_up", "ready"]
        (trigger,) = app.desk.triggers()["triggers"]
        assert (trigger["trigger"], trigger["armed"], trigger["value"]) == ("busy", True, 0.5)
        stream = app.desk.subscribe()
        assert (await anext(stream))[0] == "status"
        assert (await anext(stream))[0] == "triggers"
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        await app.desk.trigger(reason="enough", by="ann", by_verified=True, restriction=None)
        name, document = await waiting
        assert (name, document["state"]) == ("status", "KILLED")
        await until(lambda: any(event["type"] == "switch.killed" for event in world.audit()))
        events = await app.desk.audit(since=None, until=None, types={"switch.killed"}, limit=1)
        assert events[0]["by"] == "ann"


async def test_every_document_is_json(world: World) -> None:
    async with world.running() as app:
        world.value = 2.0
        await until(lambda: app.switch.state.state is State.KILLED)
        for document in (app.desk.status(), app.desk.triggers(), await app.desk.health()):
            json.dumps(document, allow_nan=False)


@pytest.mark.parametrize(("webhook", "deaf"), [("{}", True), ("{allow_unauthenticated: true}", False)])
async def test_alert_rules_that_nobody_may_fire_are_a_problem_shown(world: World, webhook: str, deaf: bool) -> None:
    paged = "      - {trigger: paged, type: alertmanager, match: ['a=\"b\"']}\n"
    world.write_rules(text=RULES.replace("ACTION", "kill") + paged)
    world.write_config(f"alertmanager: {{webhook: {webhook}}}")
    async with world.running() as app:
        assert any("paged" in problem for problem in app.desk.status()["problems"]) is deaf


# Metrics


async def test_telemetry_shows_only_what_is_durable(world: World) -> None:
    app = world.build()
    telemetry = AppTelemetry(app)
    assert telemetry.switch().exported is None
    assert telemetry.switch().last_transition is None
    assert telemetry.records().audit_events == 0
    async with world.running() as running:
        await running.desk.trigger(reason="enough", by=None, by_verified=False, restriction=None)
        telemetry = AppTelemetry(running)
        exported = telemetry.switch().exported
        assert exported is not None
        assert exported.state is State.KILLED
        (trigger,) = telemetry.triggers()
        assert (trigger.name, trigger.armed, trigger.waived) == ("busy", True, False)
        assert trigger.evaluations > 0
        assert set(telemetry.missed_iterations()) == {"g"}
        assert telemetry.sources() == {}
        assert telemetry.records().audit_events > 0
        assert telemetry.records().log_lines_dropped == 0


def test_a_source_that_nobody_asked_is_shown_as_neither_up_nor_down(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = world.build()
    states = [("prometheus", None, ""), ("scrape:a", False, "refused"), ("scrape:b", True, "")]
    monkeypatch.setattr(app.sources, "states", lambda: states)
    assert AppTelemetry(app).sources() == {"prometheus": None, "scrape:a": False, "scrape:b": True}
    assert app.desk.status()["sources"] == [
        {"name": "prometheus", "up": None, "error": None},
        {"name": "scrape:a", "up": False, "error": "refused"},
        {"name": "scrape:b", "up": True, "error": None},
    ]


# Reloading


async def test_a_broken_rule_file_changes_nothing_and_is_shown(world: World) -> None:
    async with world.running() as app:
        world.write_rules(text="groups: 3")
        with pytest.raises(RuleFileError):
            await app.desk.reload()
        document = app.reloader.document()
        assert document["last_reload_successful"] is False
        assert "rules.yaml" in document["error"]
        assert await gate(app) == (200, "active")
        world.value = 2.0
        await until(lambda: app.switch.state.state is State.KILLED)
        world.write_rules()
        await app.desk.reload()
        assert app.reloader.document()["last_reload_successful"] is True
    assert "config.reload_failed" in [event["type"] for event in world.audit()]


async def test_a_broken_configuration_or_a_folder_that_cannot_be_read_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.running() as app:
        world.write_config("nonsense: 1")
        with pytest.raises(SettingsError, match="nonsense"):
            await app.desk.reload()

        def unreadable(*_: object) -> None:
            raise PermissionError(13, "Permission denied", "config.yaml")

        monkeypatch.setattr(reload_module, "load_everything", unreadable)
        with pytest.raises(SettingsError, match="cannot be read"):
            await app.desk.reload()
        assert app.failure is None


async def test_an_approvers_file_that_cannot_be_used_refuses_the_whole_reload(world: World) -> None:
    async with world.running() as app:
        world.write_config("recovery: {cooldown: 1s, approvers_file: nobody.yaml}")
        with pytest.raises(SettingsError, match=r"nobody\.yaml"):
            await app.desk.reload()
        assert app.switch.policies.recovery.cooldown == 300.0
        assert app.reloader.successful is False
        assert app.recoveries.approvers is not None
        assert app.recoveries.approvers.count == 1


async def test_a_loosening_is_audited_and_counted_with_the_difference(world: World) -> None:
    async with world.running() as app:
        world.write_rules("halt")
        world.write_config("recovery: {cooldown: 1s}")
        await app.desk.reload()
        assert app.config_loosened == 1
        assert app.switch.policies.recovery.cooldown == 1.0
    (event,) = [event for event in world.audit() if event["type"] == "config.loosened"]
    assert event["data"]["changes"] == {"recovery.cooldown": [300.0, 1.0], "rules.busy.action": ["kill", "halt"]}


async def test_while_not_active_changes_to_recovery_and_killed_policy_wait_and_rules_do_not(world: World) -> None:
    async with world.running() as app:
        await app.desk.trigger(reason="enough", by=None, by_verified=False, restriction=None)
        world.write_rules("halt")
        text = (world.folder / "config.yaml").read_text()
        (world.folder / "config.yaml").write_text(
            text.replace("page: run/page", "page: run/page, killed_policy: reduce_only, blind_orders: deny")
            + "recovery: {cooldown: 1s}\n"
        )
        await app.desk.reload()
        assert app.switch.policies.recovery.cooldown == 300.0
        assert app.switch.policies.gate.killed_policy is Restriction.HALT
        assert app.switch.policies.gate.blind_orders is False
        assert app.evaluator.rules.rules[0].action.label == "halt"
        assert app.reloader.waiting in app.desk.status()["problems"]


async def test_a_change_that_waits_is_told_as_a_loosening_once(world: World) -> None:
    async with world.running() as app:
        await app.desk.trigger(reason="enough", by=None, by_verified=False, restriction=None)
        for cooldown in ("1s", "1s", "2s", "1s"):
            world.write_config(f"recovery: {{cooldown: {cooldown}}}")
            await app.desk.reload()
        assert app.config_loosened == 2
    changes = [event["data"]["changes"] for event in world.audit() if event["type"] == "config.loosened"]
    assert changes == [{"recovery.cooldown": [300.0, 1.0]}, {"recovery.cooldown": [2.0, 1.0]}]


async def test_what_waits_is_taken_over_once_the_ladder_is_complete_although_that_is_shown_for_a_while(
    world: World,
) -> None:
    world.write_config("recovery: {cooldown: 1s, steps: [{factor: 1.0}]}")
    async with world.running() as app:
        await app.desk.trigger(reason="enough", by=None, by_verified=False, restriction=None)
        world.write_config("recovery: {cooldown: 2s, steps: [{factor: 1.0}]}")
        await app.desk.reload()
        await app.desk.recover(reason="checked", by="ann", code=CODE, waive=())
        await until(lambda: app.switch.state.stage is Stage.COOLDOWN)
        world.clock.jump(1.5)
        await until(lambda: app.switch.state.stage is Stage.COMPLETE)
        app.reloader._apply_pending()
        assert app.switch.policies.recovery.cooldown == 2.0
        assert app.reloader.waiting is None
        assert app.switch.state.stage is Stage.COMPLETE


async def test_changes_that_count_from_the_next_start_on_are_named_until_they_are_put_back(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async with world.running() as app:
        text = (world.folder / "config.yaml").read_text()
        changed = text.replace("name: test", "name: other, labels: {desk: fx}").replace("dir: state", "dir: elsewhere")
        (world.folder / "config.yaml").write_text(changed.replace("run/page", "run/page, lease: 1s"))
        await app.desk.reload()
        told = "changes to switch.name, gate.lease, storage.dir take effect at the next start"
        assert told in app.desk.status()["problems"]
        (line,) = [line for line in caplog.records if line.getMessage() == "config.waits_for_restart"]
        assert line.fields["keys"] == ["switch.name", "gate.lease", "storage.dir"]  # type: ignore[attr-defined]
        assert app.switch.name == "test"
        (world.folder / "config.yaml").write_text(text)
        await app.desk.reload()
        assert told not in app.desk.status()["problems"]


async def test_a_reload_that_finds_no_rule_file_keeps_the_rules_and_fails(world: World) -> None:
    async with world.running() as app:
        (world.folder / "rules.yaml").unlink()
        with pytest.raises(RuleFileError, match=r"nothing matches rules\.files"):
            await app.desk.reload()
        assert app.reloader.document()["last_reload_successful"] is False
        assert [rule.trigger for rule in app.evaluator.rules.rules] == ["busy"]
        assert await gate(app) == (200, "active")
        world.write_rules("halt")
        await app.desk.reload()
        assert app.reloader.successful is True
        assert app.evaluator.rules.rules[0].action.label == "halt"


async def test_files_that_change_are_taken_over_by_themselves(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload_module, "POLL_SECONDS", 0.02)
    async with world.running() as app:
        world.write_rules("halt")
        await until(lambda: app.evaluator.rules.rules[0].action.label == "halt")
        world.write_rules(text="groups: 3")
        await until(lambda: app.reloader.error)
        world.write_rules("kill")
        await until(lambda: app.evaluator.rules.rules[0].action.label == "kill")
        assert app.failure is None


async def test_files_that_changed_between_their_reading_and_the_first_look_are_taken_over(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload_module, "POLL_SECONDS", 0.02)
    app = world.build()
    load_rules = app._load_rules

    def load_then_change() -> None:
        load_rules()
        world.write_rules("halt")

    monkeypatch.setattr(app, "_load_rules", load_then_change)
    task = asyncio.create_task(app.run())
    await until(lambda: app.evaluator.rules.rules and app.evaluator.rules.rules[0].action.label == "halt", task)
    app.stop()
    await task


async def test_a_reload_while_a_rule_restricts_neither_unkills_nor_opens(world: World) -> None:
    async with world.running() as app:
        world.value = 2.0
        await until(lambda: app.switch.state.state is State.KILLED)
        shown: list[Snapshot] = []
        app.keeper.observers.snapshot.append(shown.append)
        world.write_rules("warn")
        await app.desk.reload()
        assert {snapshot.gate_restriction for snapshot in shown} <= {Restriction.HALT}
        assert await gate(app) == (403, "killed")
