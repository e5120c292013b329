"""Whatever comes in whatever order, and whatever the volume does: nothing acknowledged is ever forgotten."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.app import keeper as keeper_module
from sidecar.app.keeper import Keeper
from sidecar.core.compose import Overlay
from sidecar.core.document import state_document, state_from_document
from sidecar.core.errors import InvalidTransition, StorageError
from sidecar.core.events import (
    Approval,
    BeginRecovery,
    CancelRecovery,
    Cause,
    CauseCode,
    Kill,
    Reopen,
    RequestRecovery,
    StepUp,
)
from sidecar.core.policy import RecoveryPolicy
from sidecar.core.snapshot import Snapshot
from sidecar.core.states import Instant, Mode, Restriction, State
from sidecar.core.switch import Switch
from sidecar.core.transitions import Policies, SwitchState

POLICIES = Policies(recovery=RecoveryPolicy(cooldown=0.0))
SEVERITY = {State.ACTIVE: 0, State.RECOVERING: 1, State.KILLED: 2}

ACTIONS = st.sampled_from(
    ["kill", "kill hard", "request", "begin", "reopen", "step", "cancel", "give up", "hang", "free", "fail", "turn"]
)


def strictness(state: SwitchState) -> tuple[int, int, float]:
    return SEVERITY[state.state], int(state.kill_restriction), -state.factor


class FakeClock:
    def __init__(self) -> None:
        self.at = Instant(mono=1000.0, wall=1_700_000_000.0)

    def now(self) -> Instant:
        self.at = Instant(mono=self.at.mono + 10_000.0, wall=self.at.wall)  # every cooldown and step is over at once
        return self.at


class Disk:
    """Keeps what was written; a failing write may or may not have reached it, like one of two copies."""

    def __init__(self) -> None:
        self.last: dict[str, Any] | None = None
        self.tried: list[tuple[int, str]] = []
        self.failures = 0
        self.free = asyncio.Event()
        self.free.set()

    def fail_once(self) -> None:
        self.failures += 1

    async def write(self, document: dict[str, Any] | None, events: Sequence[dict[str, Any]]) -> None:
        await self.free.wait()
        if document is None:
            return
        self.tried.append((document["epoch"], document["state"]))
        if self.failures > 0:
            self.failures -= 1
            raise StorageError("no")
        self.last = document


class Run:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.switch = Switch(name="s", mode=Mode.ACTIVE, state=SwitchState(), policies=POLICIES)
        self.keeper = Keeper(switch=self.switch, clock=self.clock, document=state_document)
        self.disk = Disk()
        self.shown: Snapshot | None = None
        self.keeper.observers.snapshot.append(self._show)
        self.waiting: list[asyncio.Task[bool]] = []

    def _show(self, snapshot: Snapshot) -> None:
        self.shown = snapshot

    async def act(self, action: str) -> None:
        calls: dict[str, Callable[[], object]] = {
            "kill": lambda: self.kill(Restriction.REDUCE_ONLY),
            "kill hard": lambda: self.kill(Restriction.HALT),
            "request": self.request,
            "cancel": lambda: self.keeper.apply(CancelRecovery(by="b")),
            "begin": lambda: self.loosen(BeginRecovery()),
            "reopen": lambda: self.loosen(Reopen()),
            "step": lambda: self.loosen(StepUp()),
            "give up": lambda: [task.cancel() for task in self.waiting],
            "hang": self.disk.free.clear,
            "free": self.disk.free.set,
            "fail": self.disk.fail_once,
            "turn": lambda: None,
        }
        with contextlib.suppress(InvalidTransition):
            calls[action]()
        await asyncio.sleep(0)

    def kill(self, asked: Restriction) -> None:
        cause = Cause(code=CauseCode.OPERATOR, reason="r", time=self.clock.at.wall)
        self.keeper.apply(Kill(cause=cause, restriction=asked))
        assert self.shown is not None
        assert self.shown.gate_restriction >= asked

    def request(self) -> None:
        # Granted in the future, because the clock leaps at every look and approvals must not lapse by that.
        later = self.clock.at.mono + 1e9
        approval = Approval(by="b", by_verified=True, granted=self.clock.at.wall, granted_mono=later)
        self.keeper.apply(RequestRecovery(by="b", reason="r", approval=approval))

    def loosen(self, event: BeginRecovery | Reopen | StepUp) -> None:
        self.waiting.append(asyncio.create_task(self.keeper.loosen(event)))

    def check(self) -> None:
        assert self.shown is not None
        state = self.switch.state
        assert self.shown.state is state.state
        assert (self.shown.gate_restriction > Restriction.NONE) == (state.state is not State.ACTIVE)
        durable = self.keeper.durable_state
        if durable is not None and self.keeper.durable and self.disk.last is not None:
            stored = state_from_document(self.disk.last, self.clock.at)
            assert strictness(stored) >= strictness(state)

    async def settle(self) -> None:
        self.disk.free.set()
        self.disk.failures = 0
        assert await self.keeper.settled(5.0)
        await asyncio.wait_for(asyncio.gather(*self.waiting, return_exceptions=True), 5.0)
        assert await self.keeper.settled(5.0)


async def _play(actions: list[str]) -> None:
    run = Run()
    task = asyncio.create_task(run.keeper.run())
    run.keeper.attach(run.disk, SwitchState())
    run.keeper.cover(Overlay())
    assert await run.keeper.settled(5.0)
    try:
        for action in actions:
            await run.act(action)
            run.check()
        await run.settle()
        run.check()
        assert not task.done()
        _check_the_disk(run)
    finally:
        task.cancel()
        await asyncio.gather(task, *run.waiting, return_exceptions=True)


def _check_the_disk(run: Run) -> None:
    assert run.disk.last is not None
    stored = state_from_document(run.disk.last, run.clock.at)
    assert strictness(stored) == strictness(run.switch.state)
    assert stored.epoch == run.switch.state.epoch == max(epoch for epoch, _ in run.disk.tried)
    # An epoch stands for one state for ever: two documents of one epoch never name two states.
    assert len({epoch for epoch, _ in run.disk.tried}) == len(set(run.disk.tried))


@pytest.fixture(autouse=True)
def _retry_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "FIRST_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(keeper_module, "LONGEST_RETRY_SECONDS", 0.0)


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTIONS, max_size=40))
def test_the_last_acknowledged_state_is_never_less_restrictive_than_the_one_in_force(actions: list[str]) -> None:
    asyncio.run(_play(actions))


def test_the_story_that_the_property_rests_on_is_possible() -> None:
    turn = ["turn"] * 4
    actions = ["kill", *turn, "request", *turn, "begin", *turn, "reopen", *turn, "step", *turn, "step", *turn]

    async def story() -> SwitchState:
        run = Run()
        task = asyncio.create_task(run.keeper.run())
        run.keeper.attach(run.disk, SwitchState())
        run.keeper.cover(Overlay())
        for action in actions:
            await run.act(action)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return run.switch.state

    assert asyncio.run(story()).factor == 1.0
