import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from sidecar.adapters.storage_thread import StorageBusy
from sidecar.app import keeper as keeper_module
from sidecar.app.audit_trail import audit_event
from sidecar.app.keeper import Keeper
from sidecar.app.memory import DiskMemory
from sidecar.core.compose import Overlay
from sidecar.core.document import state_document
from sidecar.core.errors import InvalidTransition, StorageError
from sidecar.core.events import (
    Approval,
    BeginRecovery,
    Cause,
    CauseCode,
    Demand,
    EndWaiver,
    Kill,
    Reopen,
    RequestRecovery,
)
from sidecar.core.policy import RecoveryPolicy
from sidecar.core.states import Action, Instant, Mode, Restriction, State
from sidecar.core.switch import Switch
from sidecar.core.transitions import Policies, SwitchState

if TYPE_CHECKING:
    from sidecar.core.snapshot import Snapshot

RESTORED = Overlay()


class FakeClock:
    def __init__(self) -> None:
        self.at = Instant(mono=1000.0, wall=1_700_000_000.0)

    def now(self) -> Instant:
        return self.at

    def jump(self, seconds: float) -> None:
        self.at = Instant(mono=self.at.mono + seconds, wall=self.at.wall + seconds)


class FakeMemory:
    """Takes documents and events; can hang until released, and fail as often as told."""

    def __init__(self) -> None:
        self.documents: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.calls = 0
        self.failures = 0
        self.free = asyncio.Event()
        self.free.set()
        self.entered = asyncio.Event()

    def hang(self) -> None:
        self.free.clear()
        self.entered.clear()

    async def write(self, document: dict[str, Any] | None, events: Sequence[dict[str, Any]]) -> None:
        self.calls += 1
        self.entered.set()
        await self.free.wait()
        self.events += events
        if self.failures > 0:
            self.failures -= 1
            raise StorageError("the volume says no")
        if document is not None:
            self.documents.append(document)


class World:
    def __init__(self) -> None:
        self.clock = FakeClock()
        policies = Policies(recovery=RecoveryPolicy(cooldown=60.0))
        self.switch = Switch(name="s", mode=Mode.ACTIVE, state=SwitchState(), policies=policies)
        self.keeper = Keeper(switch=self.switch, clock=self.clock, document=state_document)
        self.memory = FakeMemory()
        self.shown: list[Snapshot] = []
        self.keeper.observers.snapshot.append(self.shown.append)

    def kill(self, reason: str = "enough", restriction: Restriction | None = None) -> None:
        cause = Cause(code=CauseCode.OPERATOR, reason=reason, time=self.clock.now().wall, by="ann")
        self.keeper.apply(Kill(cause=cause, restriction=restriction))

    def request(self) -> None:
        now = self.clock.now()
        approval = Approval(by="bob", by_verified=True, granted=now.wall, granted_mono=now.mono)
        self.keeper.apply(RequestRecovery(by="bob", reason="fixed", approval=approval))

    def types(self) -> list[str]:
        return [event["type"] for event in self.memory.events]

    def states(self) -> list[str]:
        return [document["state"] for document in self.memory.documents]

    def epochs(self) -> list[int]:
        return [document["epoch"] for document in self.memory.documents]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(2):
            while not condition():  # noqa: ASYNC110 - conditions on plain state; nothing sleeps
                await asyncio.sleep(0)


@asynccontextmanager
async def running(*, attached: bool = True) -> AsyncIterator[World]:
    world = World()
    task = asyncio.create_task(world.keeper.run())
    if attached:
        world.keeper.attach(world.memory, SwitchState())
        world.keeper.cover(RESTORED)
        await world.until(lambda: world.keeper.durable)
        world.shown.clear()
    try:
        yield world
    finally:
        assert not task.done(), task.exception()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture(autouse=True)
def _retry_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "FIRST_RETRY_SECONDS", 0.0)


# Tightening


async def test_a_kill_is_on_the_gate_before_anything_is_written() -> None:
    async with running() as world:
        calls = world.memory.calls
        world.kill()
        assert world.shown[-1].gate_restriction is Restriction.HALT
        assert world.shown[-1].state is State.KILLED
        assert world.memory.calls == calls


async def test_a_kill_is_on_the_gate_while_an_earlier_write_hangs() -> None:
    async with running() as world:
        world.memory.hang()
        world.keeper.checkpoint()
        await world.memory.entered.wait()
        world.kill()
        assert world.shown[-1].gate_restriction is Restriction.HALT
        assert not world.keeper.durable


async def test_settled_is_false_while_a_write_hangs_and_true_once_it_is_done() -> None:
    async with running() as world:
        world.memory.hang()
        world.kill()
        await world.memory.entered.wait()
        assert await world.keeper.settled(0.01) is False
        world.memory.free.set()
        assert await world.keeper.settled(2.0) is True
        assert world.memory.documents[-1]["state"] == "KILLED"


async def test_a_kill_whose_write_fails_stays_in_force_and_is_written_later() -> None:
    async with running() as world:
        world.memory.failures = 2
        world.kill()
        assert await world.keeper.settled(2.0) is True
        assert world.keeper.write_failures == 2
        assert world.memory.documents[-1]["state"] == "KILLED"
        assert world.keeper.last_write_error is None


async def test_a_kill_that_comes_while_a_write_hangs_is_not_called_durable_by_that_write() -> None:
    async with running() as world:
        world.memory.hang()
        world.kill("first")
        await world.memory.entered.wait()
        world.kill("second")
        waiting = asyncio.create_task(world.keeper.settled(2.0))
        world.memory.free.set()
        assert await waiting is True
        assert [cause["reason"] for cause in world.memory.documents[-1]["causes"]] == ["first", "second"]


async def test_events_reach_the_audit_once_each_and_in_order_whatever_fails() -> None:
    async with running() as world:
        world.memory.failures = 1
        world.kill("one")
        world.keeper.audit(audit_event("kill.refused", world.clock.now()))
        world.kill("two")
        assert await world.keeper.settled(2.0)
        world.keeper.audit(audit_event("config.reloaded", world.clock.now()))
        await world.until(lambda: "config.reloaded" in world.types())
        assert world.types() == ["switch.killed", "kill.refused", "switch.cause_added", "config.reloaded"]


async def test_an_event_alone_is_written_without_a_document() -> None:
    async with running() as world:
        before = len(world.memory.documents)
        world.keeper.audit(audit_event("config.reloaded", world.clock.now()))
        await world.until(lambda: "config.reloaded" in world.types())
        assert len(world.memory.documents) == before


async def test_a_checkpoint_writes_the_same_epoch_again() -> None:
    async with running() as world:
        before = world.epochs()
        world.keeper.checkpoint()
        await world.until(lambda: len(world.memory.documents) > len(before))
        assert world.epochs() == [*before, before[-1]]


async def test_a_rules_kill_demand_is_on_the_gate_when_demand_returns() -> None:
    async with running() as world:
        demand = Demand(trigger="dd", action=Action.KILL, code=CauseCode.BREACH, message="dd", since=5.0)
        changes = world.keeper.demand("dd", (demand,))
        assert [change.after.state for change in changes] == [State.KILLED]
        assert world.shown[-1].gate_restriction is Restriction.HALT


async def test_a_demand_that_lifts_is_shown_without_being_written() -> None:
    async with running() as world:
        halt = Demand(trigger="dd", action=Action.HALT, code=CauseCode.BREACH, message="dd", since=5.0)
        world.keeper.demand("dd", (halt,))
        documents = len(world.memory.documents)
        world.keeper.demand("dd", ())
        assert world.shown[-1].gate_restriction is Restriction.NONE
        await asyncio.sleep(0)
        assert len(world.memory.documents) == documents


async def test_an_overlay_is_published_only_when_it_changes() -> None:
    async with running() as world:
        world.keeper.cover(RESTORED)
        assert world.shown == []
        world.keeper.cover(Overlay(stale="stopped"))
        assert [one.gate_restriction for one in world.shown] == [Restriction.HALT]


async def test_apply_refuses_what_loosens_and_loosen_what_does_not() -> None:
    async with running() as world:
        world.kill()
        world.request()
        with pytest.raises(TypeError, match="loosens"):
            world.keeper.apply(BeginRecovery())
        with pytest.raises(TypeError, match="does not loosen"):
            await world.keeper.loosen(Kill(cause=Cause(code=CauseCode.OPERATOR, reason="r", time=0.0)))


# An observer that fails


async def test_a_failing_observer_keeps_neither_the_others_nor_the_disk_from_hearing_of_a_kill() -> None:
    async with running() as world:
        heard: list[Any] = []

        def broken(_: Any) -> None:
            raise RuntimeError("defect")

        world.keeper.observers.snapshot.insert(0, broken)
        world.keeper.observers.change += [broken, heard.append]
        world.kill()
        assert world.shown[-1].gate_restriction is Restriction.HALT
        assert len(heard) == 1
        assert world.keeper.broken is not None
        assert "defect" in world.keeper.broken
        assert await world.keeper.settled(2.0)
        assert world.memory.documents[-1]["state"] == "KILLED"


# Loosening


async def begun(world: World) -> bool:
    return await world.keeper.loosen(BeginRecovery())


async def test_a_loosening_reaches_the_gate_only_after_it_is_written() -> None:
    async with running() as world:
        world.kill()
        world.request()
        await world.keeper.settled(2.0)
        world.memory.hang()
        waiting = asyncio.create_task(begun(world))
        await world.memory.entered.wait()
        assert world.switch.state.state is State.KILLED
        assert world.shown[-1].state is State.KILLED
        world.memory.free.set()
        assert await waiting is True
        assert world.shown[-1].state is State.RECOVERING
        assert world.memory.documents[-1]["state"] == "RECOVERING"
        assert world.keeper.durable


async def test_a_loosening_that_is_not_possible_is_refused() -> None:
    async with running() as world:
        with pytest.raises(InvalidTransition):
            await world.keeper.loosen(Reopen())


async def test_a_kill_during_a_loosenings_write_makes_it_void_and_is_written_over_it() -> None:
    async with running() as world:
        world.kill("first")
        world.request()
        await world.keeper.settled(2.0)
        world.memory.hang()
        waiting = asyncio.create_task(begun(world))
        await world.memory.entered.wait()
        world.kill("second")
        assert world.shown[-1].state is State.KILLED
        world.memory.free.set()
        assert await waiting is False
        assert await world.keeper.settled(2.0)
        assert [document["state"] for document in world.memory.documents[-2:]] == ["RECOVERING", "KILLED"]
        assert world.epochs()[-1] > world.epochs()[-2]
        assert world.switch.state.state is State.KILLED
        assert "recovery.started" not in world.types()


async def test_a_loosening_whose_write_fails_is_void_and_the_present_state_is_written_with_a_higher_epoch() -> None:
    async with running() as world:
        world.kill()
        world.request()
        await world.keeper.settled(2.0)
        proposed = world.switch.state.epoch + 1
        world.memory.failures = 1
        assert await begun(world) is False
        assert await world.keeper.settled(2.0)
        assert world.memory.documents[-1]["state"] == "KILLED"
        assert world.epochs()[-1] > proposed


async def test_of_two_loosenings_of_the_same_state_the_second_is_void() -> None:
    async with running() as world:
        world.kill()
        world.request()
        await world.keeper.settled(2.0)
        assert await asyncio.gather(begun(world), begun(world)) == [True, False]


async def test_a_loosening_nobody_waits_for_any_more_is_void_even_though_it_was_written() -> None:
    async with running() as world:
        world.kill()
        world.request()
        await world.keeper.settled(2.0)
        world.memory.hang()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await begun(world)
        world.memory.free.set()
        await world.until(lambda: len(world.memory.documents) >= 2 and world.keeper.durable)
        await world.until(lambda: world.states()[-2:] == ["RECOVERING", "KILLED"])
        assert world.switch.state.state is State.KILLED


async def test_a_loosening_that_a_kill_overtook_is_not_even_written() -> None:
    async with running() as world:
        world.kill("first")
        world.request()
        await world.keeper.settled(2.0)
        waiting = asyncio.create_task(begun(world))
        await asyncio.sleep(0)
        world.kill("second")
        assert await waiting is False
        assert "RECOVERING" not in world.states()


async def test_loosenings_that_were_given_up_do_not_pile_up_behind_a_hung_write() -> None:
    async with running() as world:
        world.kill()
        world.request()
        await world.keeper.settled(2.0)
        world.memory.hang()
        world.keeper.checkpoint()
        await world.memory.entered.wait()
        for _ in range(5):
            waiting = asyncio.create_task(begun(world))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        assert len(world.keeper._loosenings) == 0


# Restoring


async def test_nothing_is_durable_or_exported_before_the_memory_is_attached() -> None:
    async with running(attached=False) as world:
        assert not world.keeper.durable
        assert not world.keeper.restored
        assert world.keeper.exported() is None
        world.kill()
        assert await world.keeper.settled(0.01) is False


async def test_a_kill_from_before_the_restore_is_merged_into_what_was_stored() -> None:
    async with running(attached=False) as world:
        world.kill("early")
        world.keeper.attach(world.memory, SwitchState(epoch=41, factor=0.5))
        world.keeper.cover(RESTORED)
        assert world.switch.state.state is State.KILLED
        assert world.switch.state.epoch > 41
        assert await world.keeper.settled(2.0)
        assert [cause["reason"] for cause in world.memory.documents[-1]["causes"]] == ["early"]
        assert world.shown[-1].gate_restriction is Restriction.HALT


async def test_a_kill_from_before_the_restore_keeps_the_restriction_that_it_asked_for() -> None:
    async with running(attached=False) as world:
        world.switch.policies = Policies(gate=type(world.switch.policies.gate)(killed_policy=Restriction.REDUCE_ONLY))
        world.kill("flat and out", Restriction.HALT)
        world.keeper.attach(world.memory, SwitchState(epoch=3))
        assert world.switch.state.kill_restriction is Restriction.HALT


async def test_exported_shows_only_what_is_durable() -> None:
    async with running() as world:
        world.memory.hang()
        world.kill()
        exported = world.keeper.exported()
        assert exported is not None
        assert exported.state is State.ACTIVE
        world.memory.free.set()
        assert await world.keeper.settled(2.0)
        exported = world.keeper.exported()
        assert exported is not None
        assert exported.state is State.KILLED


async def test_an_event_that_changes_nothing_is_no_change() -> None:
    async with running() as world:
        assert world.keeper.apply(EndWaiver(trigger="none")) is None


# Bounds


async def test_events_that_wait_for_a_hung_volume_are_bounded_and_the_loss_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper_module, "MOST_WAITING_EVENTS", 3)
    async with running(attached=False) as world:
        for _ in range(5):
            world.keeper.audit(audit_event("kill.refused", world.clock.now()))
        world.keeper.attach(world.memory, SwitchState())
        assert await world.keeper.settled(2.0)
        assert world.types() == ["kill.refused"] * 3 + ["audit.dropped"]
        assert "2 audit events" in world.memory.events[-1]["reason"]


async def test_drain_ends_with_everything_written_or_says_that_it_is_not() -> None:
    async with running() as world:
        world.kill()
        assert await world.keeper.drain(2.0) is True
        world.memory.hang()
        world.kill("again")
        assert await world.keeper.drain(0.02) is False


async def test_audit_lines_that_the_storage_thread_did_not_take_are_written_with_the_next_call() -> None:
    class Thread:
        def __init__(self) -> None:
            self.busy = True

        def submit(self, call: Callable[[], Any]) -> "asyncio.Future[Any]":
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            if self.busy:
                future.set_exception(StorageBusy("too much"))
            else:
                future.set_result(call())
            return future

    class Audit:
        pending = 0

        def __init__(self) -> None:
            self.taken: list[str] = []

        def append(self, events: Sequence[dict[str, Any]], now: Any) -> tuple[str, ...]:
            self.taken += [event["type"] for event in events]
            return tuple(self.taken)

    thread, audit = Thread(), Audit()
    memory = DiskMemory(folder=None, audit=audit, thread=thread)  # type: ignore[arg-type]
    with pytest.raises(StorageBusy):
        await memory.write(None, [{"type": "one"}])
    thread.busy = False
    await memory.write(None, [{"type": "two"}])
    assert audit.taken == ["one", "two"]
