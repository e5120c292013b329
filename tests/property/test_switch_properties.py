"""Whatever happens to a switch, in any order: nothing loosens but by an approved recovery, and no epoch repeats."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sidecar.core.compose import Overlay
from sidecar.core.document import state_document, state_from_document
from sidecar.core.errors import InvalidTransition
from sidecar.core.events import (
    Approval,
    Approve,
    BeginRecovery,
    CancelRecovery,
    Cause,
    CauseCode,
    Conclude,
    Demand,
    EndWaiver,
    Event,
    EventKind,
    ExpireApprovals,
    HealthLost,
    HoldRemoved,
    Kill,
    RefuseRecovery,
    Reopen,
    RequestRecovery,
    StepBack,
    StepUp,
    Waiver,
)
from sidecar.core.policy import GatePolicy, RecoveryPolicy, RestartStep
from sidecar.core.states import Action, Instant, Mode, Restriction, Stage, State
from sidecar.core.switch import Change, Proposal, Switch
from sidecar.core.transitions import LOOSENING, Policies, SwitchState, approvals_needed

NAMES = st.sampled_from(["dd", "vol", "beat"])
PEOPLE = st.sampled_from(["ann", "bob"])
STEPS = (
    RestartStep(factor=0.25),
    RestartStep(factor=0.5, after=20.0),
    RestartStep(factor=1.0, after=40.0),
)
PLAIN: tuple[Event, ...] = (
    ExpireApprovals(),
    RefuseRecovery(blockers=("dd",)),
    CancelRecovery(by="ann"),
    HealthLost(failures=("memory",)),
    StepBack(reason="slippage"),
    Conclude(),
    BeginRecovery(),
    Reopen(),
    StepUp(),
)


class SwitchMachine(RuleBasedStateMachine):
    """Random events, with the promise kept in a few plain variables beside the switch."""

    @initialize(
        approvals=st.integers(1, 2),
        killed_policy=st.sampled_from([Restriction.REDUCE_ONLY, Restriction.HALT]),
        clear=st.booleans(),
    )
    def start(self, approvals: int, killed_policy: Restriction, clear: bool) -> None:
        recovery = RecoveryPolicy(
            cooldown=10.0, steps=STEPS, approvals=approvals, approval_ttl=60.0, require_triggers_clear=clear
        )
        self.policies = Policies(recovery=recovery, gate=GatePolicy(killed_policy=killed_policy))
        self.now = Instant(mono=1000.0, wall=1e9)
        self.switch = Switch(name="s", mode=Mode.ACTIVE, state=SwitchState(), policies=self.policies)
        self.switch.cover(Overlay())
        self.proposals: list[Proposal] = []
        self.newest_epoch = 0
        self.owes_recovery = False
        self.began = False
        self.asked: Restriction = Restriction.NONE
        self.factor_allowed = 1.0
        self.demanding: dict[str, tuple[Demand, ...]] = {}

    # What happens

    @rule(seconds=st.sampled_from([0.0, 1.0, 5.0, 20.0, 90.0]), wall=st.sampled_from([0.0, 0.0, -1e5, 1e5]))
    def time_passes(self, seconds: float, wall: float) -> None:
        self.now = Instant(mono=self.now.mono + seconds, wall=self.now.wall + seconds + wall)

    @rule(restriction=st.sampled_from([None, *Restriction]))
    def somebody_kills(self, restriction: Restriction | None) -> None:
        cause = Cause(code=CauseCode.OPERATOR, reason="r", time=self.now.wall, by="ann")
        self._apply(Kill(cause=cause, restriction=restriction))

    @rule(name=NAMES, action=st.sampled_from(list(Action)), keeps=st.booleans())
    def a_rule_asks(self, name: str, action: Action, keeps: bool) -> None:
        old = self.demanding.get(name)
        since = old[0].since if keeps and old else self.now.wall
        demand = Demand(trigger=name, action=action, factor=0.5, code=CauseCode.BREACH, message="m", since=since)
        self.demanding[name] = (demand,)
        self._noted(self.switch.demand(name, (demand,), self.now))

    @rule(name=NAMES)
    def a_rule_clears(self, name: str) -> None:
        self.demanding.pop(name, None)
        self._noted(self.switch.demand(name, (), self.now))

    @rule(name=NAMES)
    def a_rule_is_removed(self, name: str) -> None:
        self.demanding.pop(name, None)
        gone = self.switch.drop_demands(name)
        self._apply(HoldRemoved(demands=tuple(one for one in gone if one.action < Action.KILL)))

    @rule(by=PEOPLE, waived=st.lists(NAMES, unique=True, max_size=2), threshold=st.sampled_from([None, -0.3]))
    def somebody_asks_for_recovery(self, by: str, waived: list[str], threshold: float | None) -> None:
        end = (self.now.wall + 50, self.now.mono + 50)
        waivers = tuple(
            Waiver(trigger=name, threshold=threshold, until=end[0], until_mono=end[1], by=by) for name in waived
        )
        self._apply(RequestRecovery(by=by, reason="r", approval=self._approval(by), waivers=waivers))

    @rule(by=PEOPLE)
    def somebody_approves(self, by: str) -> None:
        self._apply(Approve(approval=self._approval(by)))

    @rule(event=st.sampled_from(PLAIN))
    def something_happens(self, event: Event) -> None:
        self._apply(event)

    @precondition(lambda self: self.switch.state.state is not State.ACTIVE)
    @rule(by=PEOPLE, other=PEOPLE)
    def a_recovery_goes_through(self, by: str, other: str) -> None:
        for name in list(self.demanding):
            self.a_rule_clears(name)
        self._apply(CancelRecovery(by=by))
        self.somebody_asks_for_recovery(by, [], None)
        self.somebody_approves(other)
        self._stored_at_once(BeginRecovery())
        self.now = Instant(mono=self.now.mono + 10, wall=self.now.wall + 10)
        self._stored_at_once(Reopen())

    @precondition(lambda self: self.switch.state.stage is Stage.GRADUAL_RESTART)
    @rule()
    def a_step_is_due_and_stored_at_once(self) -> None:
        self.now = Instant(mono=self.now.mono + 20, wall=self.now.wall + 20)
        self._stored_at_once(StepUp())

    def _stored_at_once(self, event: Event) -> None:
        known = len(self.proposals)
        self._apply(event)
        if len(self.proposals) > known:
            self.a_proposal_was_stored(known)
        self._noted(self.switch.kill_as_demanded(self.now))

    @rule(name=NAMES)
    def a_waiver_ends(self, name: str) -> None:
        self._apply(EndWaiver(trigger=name))
        self._noted(self.switch.kill_as_demanded(self.now))

    @precondition(lambda self: self.proposals)
    @rule(index=st.integers(0, 10))
    def a_proposal_was_stored(self, index: int) -> None:
        proposal = self.proposals[index % len(self.proposals)]
        before = self.switch.state
        unmoved = before is proposal.change.before
        assert self.switch.commit(proposal) is unmoved
        if not unmoved:
            assert self.switch.state is before
            return
        after, kind = proposal.change.after, proposal.change.event.kind
        if kind is EventKind.BEGIN:
            assert before.recovery is not None
            people = {approval.by for approval in before.recovery.approvals}
            assert len(people) >= approvals_needed(self.policies.recovery)
            assert before.state is State.KILLED
            self.began = True
        if kind is EventKind.REOPEN:
            assert self.began
            self.owes_recovery = False
            self.asked = Restriction.NONE
        if kind in (EventKind.REOPEN, EventKind.STEP):
            self.factor_allowed = after.factor

    @rule()
    def a_write_failed(self) -> None:
        self.switch.restamp()
        self._epoch(self.switch.state.epoch)

    @rule(down=st.sampled_from([0.0, 1e6]))
    def the_process_restarts(self, down: float) -> None:
        document = state_document(self.switch.state, self.now)
        self.now = Instant(mono=self.now.mono % 977.0, wall=self.now.wall + down)
        before = self.switch.state
        state = state_from_document(document, self.now)
        assert (state.state, state.kill_restriction, state.factor, state.stage) == (
            before.state,
            before.kill_restriction,
            before.factor,
            before.stage,
        )
        self.switch = Switch(name="s", mode=Mode.ACTIVE, state=state, policies=self.policies)
        self.switch.cover(Overlay())
        self.proposals.clear()
        self.newest_epoch = state.epoch
        for name, demands in self.demanding.items():
            self._noted(self.switch.demand(name, demands, self.now))

    # What is kept in mind

    def _approval(self, by: str) -> Approval:
        return Approval(by=by, by_verified=True, granted=self.now.wall, granted_mono=self.now.mono)

    def _apply(self, event: Event) -> None:
        before = self.switch.state
        try:
            outcome = self.switch.apply(event, self.now)
        except InvalidTransition:
            assert self.switch.state is before
            return
        if isinstance(outcome, Proposal):
            assert event.kind in LOOSENING
            assert self.switch.state is before
            self._epoch(outcome.change.after.epoch)
            self.proposals.append(outcome)
        elif outcome is not None:
            self._noted((outcome,))

    def _noted(self, changes: tuple[Change, ...]) -> None:
        for change in changes:
            assert change.event.kind not in LOOSENING
            assert change.after.factor <= change.before.factor
            self._epoch(change.after.epoch)
            self.factor_allowed = min(self.factor_allowed, change.after.factor)
            if change.after.state is State.KILLED:
                self.owes_recovery, self.began = True, False
            if isinstance(change.event, Kill):
                asked = change.event.restriction or self.policies.gate.killed_policy
                self.asked = max(self.asked, asked)

    def _epoch(self, epoch: int) -> None:
        assert epoch > self.newest_epoch
        self.newest_epoch = epoch

    # What must always hold

    @invariant()
    def no_factor_without_an_approved_recovery_after_a_kill(self) -> None:
        snapshot = self.switch.snapshot()
        if self.owes_recovery:
            assert snapshot.state in (State.KILLED, State.RECOVERING)
            assert self.switch.state.factor == snapshot.factor == snapshot.gate_factor == 0.0
            assert snapshot.gate_restriction >= self.asked > Restriction.NONE

    @invariant()
    def the_factor_never_exceeds_the_last_committed_step(self) -> None:
        assert self.switch.snapshot().gate_factor <= self.factor_allowed

    @invariant()
    def recovering_needs_a_committed_beginning(self) -> None:
        if self.switch.state.state is State.RECOVERING:
            assert self.began

    @invariant()
    def everything_in_force_weighs_on_the_gate(self) -> None:
        snapshot = self.switch.snapshot()
        assert snapshot.gate_restriction >= snapshot.restriction
        for demand in self.switch.demands:
            if demand.action < Action.KILL or snapshot.state is State.ACTIVE:
                assert snapshot.gate_restriction >= demand.action.restriction

    @invariant()
    def a_rule_that_asks_for_a_kill_has_it_unless_it_was_approved_away(self) -> None:
        asking = [demand for demand in self.switch.demands if demand.action is Action.KILL]
        assert not asking or self.switch.state.state is State.KILLED


SwitchMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSwitch = SwitchMachine.TestCase
