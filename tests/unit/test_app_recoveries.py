import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from sidecar.adapters.approvers import Verified
from sidecar.app import keeper as keeper_module
from sidecar.app import recoveries as recoveries_module
from sidecar.app.evaluation import Evaluator
from sidecar.app.health import Check
from sidecar.app.keeper import Keeper
from sidecar.app.recoveries import RecoveryDesk
from sidecar.app.step_gates import StepGateKeeper
from sidecar.core.compose import Overlay
from sidecar.core.document import state_document
from sidecar.core.errors import (
    ApprovalError,
    InvalidTransition,
    LockedOut,
    NotDurable,
    RecoveryBlocked,
    StorageError,
)
from sidecar.core.events import Cause, CauseCode, Kill
from sidecar.core.policy import RecoveryPolicy, RestartStep, StepGate
from sidecar.core.states import Action, Instant, Mode, Stage, State
from sidecar.core.switch import Switch
from sidecar.core.transitions import Policies, SwitchState
from sidecar.rules.model import Expression, Group, Operator, Rule, RuleSet, Threshold
from sidecar.rules.readings import Answer, Failure, Series

RIGHT, WRONG = "right-code", "wrong-code"
STEPS = (RestartStep(factor=0.5), RestartStep(factor=1.0, after=100.0))
POLICY = RecoveryPolicy(cooldown=60.0, steps=STEPS, approval_ttl=900.0)
RULE = Rule(trigger="dd", group="g", condition=Threshold(query="q", operator=Operator.LT, threshold=-0.15))


class FakeClock:
    def __init__(self) -> None:
        self.at = Instant(mono=1000.0, wall=1_700_000_000.0)

    def now(self) -> Instant:
        return self.at

    def jump(self, seconds: float) -> None:
        self.at = Instant(mono=self.at.mono + seconds, wall=self.at.wall + seconds)


class FakeMemory:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.documents: list[dict[str, Any]] = []
        self.failures = 0
        self.free = asyncio.Event()
        self.free.set()

    async def write(self, document: dict[str, Any] | None, events: Sequence[dict[str, Any]]) -> None:
        await self.free.wait()
        self.events += events
        if document is not None:
            if self.failures > 0:
                self.failures -= 1
                raise StorageError("full")
            self.documents.append(document)


class FakeApprovers:
    """One code for everybody known; counts how often a code was looked at, and can be held up."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.read = 0
        self.meanwhile: Callable[[], None] = lambda: None

    @property
    def count(self) -> int:
        return len(self.names)

    def lockout_name(self, by: str) -> str:
        return by

    def verify(self, by: str, code: str) -> Verified:
        self.read += 1
        self.meanwhile()
        if by not in self.names or code != RIGHT:
            raise ApprovalError("the approval code is not that of this approver")
        return Verified(name=by, by_verified=True)


class FakeHealth:
    def __init__(self) -> None:
        self.ok = True
        self.runs = 0
        self.meanwhile: Callable[[], None] = lambda: None

    async def run(self) -> tuple[Check, ...]:
        self.runs += 1
        self.meanwhile()
        return (Check(name="sources_up", ok=self.ok, seen="prometheus: down", wanted="every source answers"),)


class NoSources:
    timeout = 2.0

    async def ask(self, rules: Any, receive: Any) -> None:
        raise AssertionError("nobody asks here")


class World:
    def __init__(self, policy: RecoveryPolicy, *, mode: Mode = Mode.ACTIVE) -> None:
        self.clock = FakeClock()
        self.switch = Switch(name="s", mode=mode, state=SwitchState(), policies=Policies(recovery=policy))
        self.keeper = Keeper(switch=self.switch, clock=self.clock, document=state_document)
        self.memory = FakeMemory()
        self.evaluator = Evaluator(
            keeper=self.keeper, clock=self.clock, sources=NoSources(), pod="p", warnings_count=True
        )
        self.evaluator.load(RuleSet(groups=(Group(name="g", interval=1.0, rules=(RULE,)),)), opened=False)
        self.health = FakeHealth()
        self.approvers = FakeApprovers("ann", "bob")
        self.gate_answers: list[Answer | Failure] = []
        self.shut: str | None = None
        self.desk = self._desk()
        self.read(0.0)

    def _desk(self) -> RecoveryDesk:
        desk = RecoveryDesk(
            keeper=self.keeper,
            clock=self.clock,
            evaluator=self.evaluator,
            health=self.health,  # type: ignore[arg-type]
            approvers=self.approvers,  # type: ignore[arg-type]
            gates=StepGateKeeper(clock=self.clock, ask=self._ask),
            ready=lambda: self.shut,
        )
        desk.health_interval = 5.0
        return desk

    async def _ask(self, queries: Sequence[str]) -> Sequence[Answer | Failure]:
        return [self.gate_answers.pop(0) for _ in queries]

    def read(self, value: float) -> None:
        at = self.clock.now().wall
        answer = Answer(series=(Series(value=value),), evaluated_at=at, oldest_sample=at)
        (rule,) = self.evaluator.rules.rules
        self.evaluator.receive(rule, answer)

    def kill(self, reason: str = "enough") -> None:
        cause = Cause(code=CauseCode.OPERATOR, reason=reason, time=self.clock.now().wall, by="ann")
        self.keeper.apply(Kill(cause=cause))

    async def recover(self, *, by: str = "bob", code: str | None = RIGHT, waive: Sequence[Any] = ()) -> None:
        await self.desk.recover(by=by, reason="fixed", code=code, waivers=waive)

    async def pass_time(self, seconds: float, *, looks: int = 1) -> None:
        for _ in range(looks):
            self.clock.jump(seconds / looks)
            await self.desk.drive_once()

    async def restarting(self) -> None:
        self.kill()
        await self.recover()
        await self.pass_time(60.0)
        assert self.where() == (State.ACTIVE, Stage.GRADUAL_RESTART)

    def where(self) -> tuple[State, Stage]:
        return self.switch.state.state, self.switch.state.stage

    async def audited(self) -> list[str]:
        async with asyncio.timeout(2):
            while self.keeper._events:  # noqa: ASYNC110 - plain state, nothing sleeps
                await asyncio.sleep(0)
        return [event["type"] for event in self.memory.events]


@asynccontextmanager
async def running(policy: RecoveryPolicy = POLICY, *, mode: Mode = Mode.ACTIVE) -> AsyncIterator[World]:
    world = World(policy, mode=mode)
    task = asyncio.create_task(world.keeper.run())
    world.keeper.attach(world.memory, SwitchState())
    world.keeper.cover(Overlay())
    try:
        yield world
    finally:
        assert not task.done(), task.exception()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture(autouse=True)
def _be_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "FIRST_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(recoveries_module, "DURABLE_WITHIN_SECONDS", 0.05)


# The whole way


async def test_a_recovery_goes_from_approval_over_cooldown_and_steps_to_full_trading() -> None:
    async with running() as world:
        world.kill()
        await world.recover()
        assert world.where() == (State.RECOVERING, Stage.COOLDOWN)
        await world.pass_time(59.0)
        assert world.where() == (State.RECOVERING, Stage.COOLDOWN)
        await world.pass_time(1.0)
        assert world.where() == (State.ACTIVE, Stage.GRADUAL_RESTART)
        assert world.switch.state.factor == 0.5
        await world.pass_time(99.0)
        assert world.switch.state.factor == 0.5
        await world.pass_time(1.0)
        assert world.where() == (State.ACTIVE, Stage.COMPLETE)
        assert world.switch.state.factor == 1.0
        await world.pass_time(60.0)
        assert world.where() == (State.ACTIVE, Stage.NONE)
        assert await world.audited() == [
            "switch.killed",
            "recovery.requested",
            "recovery.started",
            "switch.reopened",
            "restart.step",
            "recovery.concluded",
        ]


async def test_a_wall_clock_step_changes_neither_cooldown_nor_steps() -> None:
    async with running() as world:
        world.kill()
        await world.recover()
        world.clock.at = replace(world.clock.at, wall=world.clock.at.wall + 1e6)
        await world.desk.drive_once()
        assert world.where() == (State.RECOVERING, Stage.COOLDOWN)


async def test_a_kill_during_the_restart_starts_the_whole_story_again() -> None:
    async with running() as world:
        await world.restarting()
        world.kill()
        assert world.where() == (State.KILLED, Stage.NONE)
        await world.pass_time(1000.0, looks=5)
        assert world.where() == (State.KILLED, Stage.NONE)


async def test_without_required_approval_no_code_is_looked_at() -> None:
    async with running(replace(POLICY, require_approval=False)) as world:
        world.kill()
        await world.recover(code=None)
        assert world.where() == (State.RECOVERING, Stage.COOLDOWN)
        assert world.approvers.read == 0


async def test_nothing_moves_before_state_is_restored() -> None:
    world = World(POLICY)
    world.kill()
    world.clock.jump(1e6)
    await world.desk.drive_once()
    assert world.health.runs == 0


# Codes


async def test_a_wrong_code_recovers_nothing_and_is_audited_without_the_code() -> None:
    async with running() as world:
        world.kill()
        with pytest.raises(ApprovalError):
            await world.recover(code=WRONG)
        assert world.where() == (State.KILLED, Stage.NONE)
        assert (await world.audited())[1:] == ["approval.failed", "recovery.request_refused"]
        assert WRONG not in json.dumps(world.memory.events, default=str)


@pytest.mark.parametrize("code", [None, ""])
async def test_a_missing_code_is_refused_and_is_no_attempt(code: str | None) -> None:
    async with running() as world:
        world.kill()
        with pytest.raises(ApprovalError, match="needed"):
            await world.recover(code=code)
        assert world.approvers.read == 0


async def test_without_approvers_a_recovery_is_refused_saying_what_to_do() -> None:
    async with running() as world:
        world.kill()
        world.desk.approvers = None
        with pytest.raises(ApprovalError, match="approvers_file"):
            await world.recover()
        assert "recovery.request_refused" in await world.audited()


async def test_five_wrong_codes_lock_out_even_the_right_one_unread() -> None:
    async with running() as world:
        world.kill()
        for _ in range(5):
            with pytest.raises(ApprovalError):
                await world.recover(code=WRONG)
        read = world.approvers.read
        with pytest.raises(LockedOut) as locked:
            await world.recover()
        assert locked.value.retry_after == 30.0
        assert world.approvers.read == read
        assert "approval.locked_out" in await world.audited()
        world.clock.jump(29.0)
        with pytest.raises(LockedOut) as locked:
            await world.recover()
        assert locked.value.retry_after == pytest.approx(1.0)
        world.clock.jump(1.0)
        await world.recover()
        assert world.where() == (State.RECOVERING, Stage.COOLDOWN)


async def test_a_lockout_of_one_approver_does_not_touch_another() -> None:
    async with running() as world:
        world.kill()
        for _ in range(5):
            with pytest.raises(ApprovalError):
                await world.recover(by="ann", code=WRONG)
        await world.recover(by="bob")
        assert world.switch.state.state is State.RECOVERING


async def test_unknown_names_are_counted_together_and_cannot_fill_the_memory() -> None:
    async with running() as world:
        world.kill()
        for number in range(5):
            with pytest.raises(ApprovalError):
                await world.recover(by=f"guess {number}", code=WRONG)
        with pytest.raises(LockedOut):
            await world.recover(by="yet another", code=WRONG)
        assert len(world.desk.lockouts.by_name) == 1


async def test_with_the_shared_code_every_name_counts_together_even_the_accounts_own() -> None:
    class Shared(FakeApprovers):
        count = 1  # type: ignore[assignment]

        def lockout_name(self, by: str) -> str:
            return "(shared)"

    async with running() as world:
        world.kill()
        world.desk.approvers = Shared()  # type: ignore[assignment]
        for name in ("a", "b", "(shared)", "c", "(unknown)"):
            with pytest.raises(ApprovalError):
                await world.recover(by=name, code=WRONG)
        with pytest.raises(LockedOut):
            await world.recover(by="(shared)")


async def test_a_right_code_forgets_the_wrong_ones() -> None:
    async with running(replace(POLICY, approvals=2)) as world:
        world.kill()
        for _ in range(4):
            with pytest.raises(ApprovalError):
                await world.recover(code=WRONG)
        await world.recover()
        assert world.desk.lockouts.by_name == {}


async def test_requests_in_a_wrong_state_are_audited_and_are_no_attempt_on_the_code() -> None:
    async with running() as world:
        with pytest.raises(InvalidTransition, match="ACTIVE"):
            await world.recover(code=WRONG)
        with pytest.raises(InvalidTransition, match="ACTIVE"):
            await world.desk.approve(by="bob", code=WRONG)
        world.kill()
        with pytest.raises(InvalidTransition, match="no recovery to approve"):
            await world.desk.approve(by="bob", code=WRONG)
        await world.recover()
        with pytest.raises(InvalidTransition, match="RECOVERING"):
            await world.recover(code=WRONG)
        assert world.approvers.read == 1
        audited = await world.audited()
        assert audited.count("recovery.request_refused") == 2
        assert audited.count("recovery.approval_refused") == 2


# Several approvals


async def test_dual_approval_takes_two_different_people() -> None:
    async with running(replace(POLICY, approvals=2)) as world:
        world.kill()
        await world.recover(by="ann")
        assert world.where() == (State.KILLED, Stage.PENDING)
        with pytest.raises(InvalidTransition, match="another person"):
            await world.desk.approve(by="ann", code=RIGHT)
        assert world.where() == (State.KILLED, Stage.PENDING)
        await world.desk.approve(by="bob", code=RIGHT)
        assert world.where() == (State.RECOVERING, Stage.COOLDOWN)


async def test_a_second_request_while_one_is_pending_is_refused_unread() -> None:
    async with running(replace(POLICY, approvals=2)) as world:
        world.kill()
        await world.recover(by="ann")
        with pytest.raises(InvalidTransition, match="'ann'"):
            await world.recover(by="bob")
        assert world.approvers.read == 1


async def test_approvals_lapse_after_their_time() -> None:
    async with running(replace(POLICY, approvals=2)) as world:
        world.kill()
        await world.recover(by="ann")
        await world.pass_time(901.0)
        assert world.where() == (State.KILLED, Stage.NONE)
        assert "recovery.expired" in await world.audited()


async def test_a_new_cause_voids_the_approvals() -> None:
    async with running(replace(POLICY, approvals=2)) as world:
        world.kill()
        await world.recover(by="ann")
        world.kill("another")
        assert world.where() == (State.KILLED, Stage.NONE)


async def test_a_cause_that_comes_while_the_code_is_checked_is_not_approved_with_it() -> None:
    async with running() as world:
        world.kill("seen")
        loop = asyncio.get_running_loop()
        world.approvers.meanwhile = lambda: _on(loop, lambda: world.kill("unseen"))
        with pytest.raises(InvalidTransition, match="new kill"):
            await world.recover()
        assert world.where() == (State.KILLED, Stage.NONE)


async def test_an_approval_counts_only_for_the_recovery_it_was_given_to() -> None:
    async with running(replace(POLICY, approvals=2)) as world:
        world.kill()
        await world.recover(by="ann")
        loop = asyncio.get_running_loop()
        world.approvers.meanwhile = lambda: _on(loop, lambda: world.kill("unseen"))
        with pytest.raises(InvalidTransition, match="ended"):
            await world.desk.approve(by="bob", code=RIGHT)
        assert world.where() == (State.KILLED, Stage.NONE)


def _on(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    async def work() -> None:
        call()

    asyncio.run_coroutine_threadsafe(work(), loop).result(2.0)


# Validation


async def test_a_firing_rule_refuses_the_recovery_which_then_is_gone() -> None:
    async with running() as world:
        world.read(-0.2)
        assert world.switch.state.state is State.KILLED
        with pytest.raises(RecoveryBlocked) as blocked:
            await world.recover()
        assert "dd is firing" in blocked.value.blockers[0]
        assert world.where() == (State.KILLED, Stage.NONE)
        audited = await world.audited()
        assert "recovery.refused" in audited
        assert "recovery.request_refused" not in audited


async def test_a_refusal_takes_back_only_the_last_of_two_approvals() -> None:
    async with running(replace(POLICY, approvals=2)) as world:
        world.read(-0.2)
        await world.recover(by="ann")
        with pytest.raises(RecoveryBlocked):
            await world.desk.approve(by="bob", code=RIGHT)
        assert world.where() == (State.KILLED, Stage.PENDING)
        world.read(0.0)
        await world.desk.approve(by="bob", code=RIGHT)
        assert world.where() == (State.RECOVERING, Stage.COOLDOWN)


async def test_ill_health_and_a_sidecar_that_is_not_ready_refuse_the_recovery_together() -> None:
    async with running() as world:
        world.kill()
        world.health.ok, world.shut = False, "group 'g' was last evaluated long ago"
        with pytest.raises(RecoveryBlocked) as blocked:
            await world.recover()
        assert any("sources_up" in one for one in blocked.value.blockers)
        assert world.shut in blocked.value.blockers


async def test_triggers_need_not_be_clear_where_the_policy_says_so() -> None:
    async with running(replace(POLICY, require_triggers_clear=False)) as world:
        world.read(-0.2)
        await world.recover()
        assert world.where() == (State.RECOVERING, Stage.COOLDOWN)


async def test_a_kill_during_validation_ends_the_recovery() -> None:
    async with running() as world:
        world.kill()
        world.health.meanwhile = lambda: world.kill("another")
        with pytest.raises(InvalidTransition, match="new kill"):
            await world.recover()
        assert world.where() == (State.KILLED, Stage.NONE)


@pytest.mark.parametrize("approvals", [1, 2])
async def test_a_recovery_that_cannot_be_stored_has_not_begun_and_does_not_begin_by_itself_later(
    approvals: int,
) -> None:
    async with running(replace(POLICY, approvals=approvals)) as world:
        world.kill()
        if approvals == 2:
            await world.recover(by="ann")
        await world.keeper.settled(2.0)
        world.memory.free.clear()
        with pytest.raises(NotDurable):
            await (world.recover() if approvals == 1 else world.desk.approve(by="bob", code=RIGHT))
        refused = (State.KILLED, Stage.NONE if approvals == 1 else Stage.PENDING)
        assert world.where() == refused
        world.memory.free.set()
        await world.keeper.settled(2.0)
        await world.desk.drive_once()
        assert world.where() == refused
        await (world.recover() if approvals == 1 else world.desk.approve(by="bob", code=RIGHT))
        assert world.where() == (State.RECOVERING, Stage.COOLDOWN)


async def test_a_failed_write_leaves_the_switch_killed() -> None:
    async with running() as world:
        world.kill()
        await world.keeper.settled(2.0)
        world.keeper.observers.change.append(
            lambda change: setattr(world.memory, "failures", 99 if change.after.stage is Stage.VALIDATING else 0)
        )
        with pytest.raises(NotDurable):
            await world.recover()
        assert world.switch.state.state is State.KILLED
        world.memory.failures = 0


# Waivers


def waive(trigger: str = "dd", threshold: float | None = None, seconds: float = 3600.0) -> dict[str, object]:
    return {"trigger": trigger, "threshold": threshold, "seconds": seconds}


async def test_a_waived_rule_lets_trading_come_back_until_the_waiver_ends() -> None:
    async with running() as world:
        world.read(-0.2)
        await world.recover(waive=[waive(threshold=-0.25)])
        await world.pass_time(60.0)
        world.read(-0.2)
        assert world.where() == (State.ACTIVE, Stage.GRADUAL_RESTART)
        await world.pass_time(3600.0)
        world.read(-0.2)
        assert world.switch.state.state is State.KILLED
        assert "waiver.ended" in await world.audited()


async def test_a_waiver_ends_while_a_step_hangs_in_the_volume() -> None:
    async with running() as world:
        world.read(-0.2)
        await world.recover(waive=[waive(seconds=200.0)])
        await world.pass_time(60.0)
        await world.keeper.settled(2.0)
        world.memory.free.clear()
        world.clock.jump(100.0)
        stepping = asyncio.create_task(world.desk.drive_once())
        await asyncio.sleep(0)
        world.clock.jump(50.0)
        world.desk.end_waivers()
        assert world.switch.state.waivers == ()
        await stepping
        assert world.switch.state.factor == 0.5
        world.memory.free.set()


@pytest.mark.parametrize(
    ("waiver", "message"),
    [
        (waive("nobody"), "there is no rule 'nobody'; the rules are dd"),
        (waive(seconds=0.0), "in the future"),
        (waive(threshold=float("inf")), "finite"),
    ],
)
async def test_a_waiver_that_means_nothing_is_refused_and_audited(waiver: dict[str, object], message: str) -> None:
    async with running() as world:
        world.kill()
        with pytest.raises(ValueError, match=message):
            await world.recover(waive=[waiver])
        assert world.where() == (State.KILLED, Stage.NONE)
        assert "recovery.request_refused" in await world.audited()


async def test_a_rule_that_is_clear_cannot_be_waived() -> None:
    async with running() as world:
        world.kill()
        with pytest.raises(InvalidTransition, match="rule dd is clear"):
            await world.recover(waive=[waive()])
        assert world.where() == (State.KILLED, Stage.NONE)


@pytest.mark.parametrize("change", [{"enabled": False}, {"shadow": True}])
async def test_a_rule_that_killed_and_is_not_enforced_any_more_is_not_clear(change: dict[str, Any]) -> None:
    async with running() as world:
        world.read(-0.2)
        rule = replace(RULE, **change)
        world.evaluator.load(RuleSet(groups=(Group(name="g", interval=1.0, rules=(rule,)),)), opened=True)
        with pytest.raises(RecoveryBlocked, match="rule dd killed and is not enforced any more"):
            await world.recover()
        await world.recover(waive=[waive()])
        assert world.where() == (State.RECOVERING, Stage.COOLDOWN)
        await world.pass_time(60.0)
        assert world.where() == (State.ACTIVE, Stage.GRADUAL_RESTART)


async def test_what_counts_as_clear_without_a_rule_is_audited() -> None:
    async with running() as world:
        world.read(-0.2)
        world.kill()
        world.evaluator.load(RuleSet(groups=()), opened=True)
        await world.recover()
        await world.audited()
        (started,) = [event for event in world.memory.events if event["type"] == "recovery.started"]
        assert started["data"]["taken_as_clear"] == ["rule dd, which no longer exists", "operator by ann"]


async def test_nothing_is_recovered_before_it_is_known_what_there_is_to_recover_from() -> None:
    world = World(POLICY)
    world.shut = "the stored state is not known: asking Prometheus"
    for attempt in (world.recover(), world.desk.approve(by="bob", code=RIGHT)):
        with pytest.raises(StorageError, match="asking Prometheus"):
            await attempt
    with pytest.raises(StorageError, match="asking Prometheus"):
        world.desk.cancel(by="bob", reason="r", by_verified=False)
    assert world.approvers.read == 0


async def test_a_cooldown_that_is_over_says_what_it_waits_for() -> None:
    async with running() as world:
        world.kill()
        await world.recover()
        world.shut = "the feed is not there"
        await world.pass_time(60.0)
        assert world.where() == (State.RECOVERING, Stage.COOLDOWN)
        assert world.desk.step_waits_for == "the feed is not there"


async def test_a_threshold_for_a_rule_that_has_none_is_refused() -> None:
    async with running() as world:
        rule = replace(RULE, condition=Expression(expr="x"))
        world.evaluator.load(RuleSet(groups=(Group(name="g", interval=1.0, rules=(rule,)),)), opened=True)
        world.kill()
        with pytest.raises(ValueError, match="expression"):
            await world.recover(waive=[waive(threshold=1.0)])


async def test_what_a_crash_takes_from_a_pending_rule_is_a_second_and_otherwise_five() -> None:
    async with running() as world:
        slow = replace(RULE, for_=60.0)
        world.evaluator.load(RuleSet(groups=(Group(name="g", interval=1.0, rules=(slow,)),)), opened=True)
        saved: list[float] = []
        world.keeper.checkpoint = lambda: saved.append(world.clock.now().mono)  # type: ignore[method-assign]
        world.kill()
        await world.pass_time(10.0, looks=100)
        assert len(saved) <= 3  # the time since the kill counts, for the back-off
        world.read(-0.2)
        saved.clear()
        await world.pass_time(10.0, looks=100)
        assert len(saved) >= 9


# Losing it again


async def test_health_is_lost_after_three_bad_rounds_in_a_row_and_not_before() -> None:
    async with running() as world:
        world.kill()
        await world.recover()
        world.health.ok = False
        await world.pass_time(5.0)
        await world.pass_time(5.0)
        world.health.ok = True
        await world.pass_time(5.0)
        world.health.ok = False
        await world.pass_time(10.0, looks=2)
        assert world.where() == (State.RECOVERING, Stage.COOLDOWN)
        await world.pass_time(5.0)
        assert world.where() == (State.KILLED, Stage.NONE)
        assert "recovery.health_lost" in await world.audited()


async def test_bad_rounds_of_one_recovery_do_not_count_in_the_next() -> None:
    async with running() as world:
        world.kill()
        await world.recover()
        world.health.ok = False
        await world.pass_time(10.0, looks=2)
        world.kill("meanwhile")
        await world.desk.drive_once()
        world.health.ok = True
        await world.recover()
        world.health.ok = False
        await world.pass_time(10.0, looks=2)
        assert world.where() == (State.RECOVERING, Stage.COOLDOWN)


async def test_the_cooldown_is_over_but_a_rule_fires_so_trading_waits() -> None:
    async with running(replace(POLICY, require_triggers_clear=True)) as world:
        rule = replace(RULE, action=Action.HALT)
        world.evaluator.load(RuleSet(groups=(Group(name="g", interval=1.0, rules=(rule,)),)), opened=True)
        world.kill()
        await world.recover()
        world.read(-0.2)
        await world.pass_time(120.0)
        assert world.where() == (State.RECOVERING, Stage.COOLDOWN)
        world.read(0.0)
        await world.pass_time(1.0)
        assert world.where() == (State.ACTIVE, Stage.GRADUAL_RESTART)


async def test_cancelling_goes_back_to_killed_and_nothing_to_cancel_is_refused_and_audited() -> None:
    async with running() as world:
        world.kill()
        with pytest.raises(InvalidTransition):
            world.desk.cancel(by="ann", reason="changed my mind", by_verified=False)
        await world.recover()
        world.desk.cancel(by="ann", reason="changed my mind", by_verified=False)
        assert world.where() == (State.KILLED, Stage.NONE)
        audited = await world.audited()
        assert audited.count("recovery.cancel_refused") == 1
        assert audited.count("recovery.cancelled") == 1


async def test_a_disabled_switch_refuses_everything() -> None:
    async with running(mode=Mode.DISABLED) as world:
        with pytest.raises(InvalidTransition, match="DISABLED"):
            await world.recover()
        await world.desk.drive_once()


# Gates of steps


def gated(**changes: Any) -> RecoveryPolicy:
    gate = replace(StepGate(query="errors", operator="lt", threshold=1.0), **changes)
    return replace(POLICY, steps=(STEPS[0], replace(STEPS[1], gates=(gate,))))


def seen(value: float) -> Answer:
    return Answer(series=(Series(value=value),), evaluated_at=0.0, oldest_sample=None)


DOWN = Failure(reason="unreachable", message="refused", unreachable=True)


async def test_a_step_waits_for_its_gates_and_says_for_what() -> None:
    async with running(gated(inconclusive_limit=0)) as world:
        await world.restarting()
        world.gate_answers = [DOWN, Answer(series=(), evaluated_at=0.0, oldest_sample=None), seen(0.0)]
        await world.pass_time(100.0)
        assert world.switch.state.factor == 0.5
        assert "refused" in (world.desk.step_waits_for or "")
        await world.pass_time(10.0)
        assert "no data" in (world.desk.step_waits_for or "")
        await world.pass_time(10.0)
        assert world.switch.state.factor == 1.0
        assert world.desk.step_waits_for is None


async def test_a_failed_gate_leads_back_and_with_kill_to_a_kill() -> None:
    async with running(gated()) as world:
        await world.restarting()
        world.gate_answers = [seen(5.0)]
        await world.pass_time(100.0)
        assert "restart.step_back" in await world.audited()
        assert world.switch.state.factor == 0.5
    async with running(gated(on_failure="kill")) as world:
        await world.restarting()
        world.gate_answers = [seen(5.0)]
        await world.pass_time(100.0)
        assert world.switch.state.causes[0].code is CauseCode.STEP_GATE


async def test_a_gate_of_the_first_step_keeps_trading_shut_until_it_passes() -> None:
    gate = StepGate(query="errors", operator="lt", threshold=1.0)
    policy = replace(POLICY, steps=(replace(STEPS[0], gates=(gate,)), STEPS[1]))
    async with running(policy) as world:
        world.kill()
        await world.recover()
        world.gate_answers = [seen(5.0), seen(5.0), seen(0.0)]
        await world.pass_time(60.0)
        await world.pass_time(1.0)
        assert len(world.gate_answers) == 2  # measured at its own pace
        await world.pass_time(9.0)
        assert world.where() == (State.RECOVERING, Stage.COOLDOWN)
        await world.pass_time(10.0)
        assert world.where() == (State.ACTIVE, Stage.GRADUAL_RESTART)


async def test_running_time_is_saved_now_and_then_while_it_counts() -> None:
    async with running() as world:
        world.kill()
        await world.recover()
        await world.keeper.settled(2.0)
        written = len(world.memory.documents)
        for _ in range(4):
            await world.pass_time(1.0)
        await world.audited()
        await asyncio.sleep(0)
        assert len(world.memory.documents) == written + 1
