"""The desk where recoveries are asked for, approved and driven: checks people, triggers and health, then moves on.

People come in through `recover`, `approve` and `cancel`; time and health through `drive`. Both only ever send events.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from sidecar.adapters.approvers import Approvers
from sidecar.app.audit_trail import audit_event
from sidecar.app.clock import Clock
from sidecar.app.evaluation import Evaluator
from sidecar.app.health import Check, HealthChecks
from sidecar.app.keeper import Keeper
from sidecar.app.step_gates import GateFinding, StepGateKeeper
from sidecar.core.errors import (
    ApprovalError,
    InvalidTransition,
    KillswitchError,
    LockedOut,
    NotDurable,
    RecoveryBlocked,
    StorageError,
)
from sidecar.core.events import (
    Approval,
    Approve,
    BeginRecovery,
    CancelRecovery,
    Cause,
    CauseCode,
    Conclude,
    EndWaiver,
    ExpireApprovals,
    HealthLost,
    Kill,
    RefuseRecovery,
    Reopen,
    RequestRecovery,
    StepBack,
    StepUp,
    Waiver,
)
from sidecar.core.policy import RestartStep
from sidecar.core.recovery import Due, Lockouts, due, ended_waivers, needs_checkpoint
from sidecar.core.states import Stage, State
from sidecar.core.step_gates import Verdict
from sidecar.core.transitions import TABLE, next_step
from sidecar.rules.triggers import with_threshold

log = logging.getLogger("sidecar.recoveries")

DRIVE_SECONDS = 0.1
CHECKPOINT_SECONDS = 5.0
PENDING_CHECKPOINT_SECONDS = 1.0  # what a crash takes from a rule's `for` must be little beside it
DURABLE_WITHIN_SECONDS = 2.0
HEALTH_ROUNDS_TO_LOSE = 3
"""Consecutive unhealthy rounds that abort a recovery, so that one bad look does not."""
UNKNOWN_APPROVER = "(unknown)"
"""The name under which wrong codes in names that nobody has are counted together, so they cannot fill the memory."""


class RecoveryDesk:
    """Takes recoveries from request to full trading.

    Args:
        keeper: where events go.
        clock: where `now` comes from.
        evaluator: knows which rules are clear.
        health: the checks that must hold.
        approvers: whose codes count; None where none are configured.
        gates: measures the conditions of restart steps.
        ready: says what keeps the gate shut apart from the state; None if nothing does.
    """

    def __init__(
        self,
        *,
        keeper: Keeper,
        clock: Clock,
        evaluator: Evaluator,
        health: HealthChecks,
        approvers: Approvers | None,
        gates: StepGateKeeper,
        ready: Callable[[], str | None],
    ) -> None:
        self.lockouts = Lockouts()
        self.last_health: tuple[Check, ...] = ()
        self.health = health
        self.approvers = approvers
        self.step_waits_for: str | None = None
        self.health_interval = 1.0
        self._gates = gates
        self._keeper = keeper
        self._clock = clock
        self._evaluator = evaluator
        self._ready = ready
        self._unhealthy_rounds = 0
        self._next_health = 0.0
        self._last_checkpoint = float("-inf")
        self._verifying = asyncio.Lock()
        # A thread of its own: the allocator keeps the 16 MiB of a hash for the thread that took them, and among the six
        # or more of the default executor that would come to a container's whole limit.
        self._hashing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="approvals")
        self._moving = asyncio.Lock()

    # People

    async def recover(self, *, by: str, reason: str, code: str | None, waivers: Sequence[Mapping[str, object]]) -> None:
        """Ask for a recovery; the code is the first approval. Returns when it has begun, or waits for more approvals.

        Raises:
            InvalidTransition: not possible in this state.
            ApprovalError: the code does not count; LockedOut where it was not even read.
            RecoveryBlocked: triggers or health stand in the way.
            NotDurable: decided, but not on disk within 2 s.
            ValueError: a waiver names no rule, or one without a threshold.
        """
        await self._attempt(
            "recovery.request_refused", by, reason, self._recover(by=by, reason=reason, code=code, waivers=waivers)
        )

    async def approve(self, *, by: str, code: str) -> None:
        """Approve the recovery that waits. Raises as `recover` does."""
        await self._attempt("recovery.approval_refused", by, None, self._approve(by=by, code=code))

    async def _attempt(self, refused: str, by: str, reason: str | None, attempt: Awaitable[None]) -> None:
        try:
            await attempt
        except (KillswitchError, ValueError) as error:
            if not isinstance(error, RecoveryBlocked | NotDurable):
                self._keeper.audit(
                    audit_event(refused, self._clock.now(), by=by, reason=str(error), asked_for=reason or "")
                )
            raise

    async def _recover(
        self, *, by: str, reason: str, code: str | None, waivers: Sequence[Mapping[str, object]]
    ) -> None:
        self._must_be_possible(RequestRecovery)
        if (pending := self._keeper.switch.state.recovery) is not None:
            raise InvalidTransition(
                f"a recovery asked for by {pending.by!r} is already {pending.stage}; approve it or cancel it first"
            )
        causes = self._keeper.switch.state.causes
        approval = await self._approval(by, code) if self._keeper.switch.policies.recovery.require_approval else None
        if self._keeper.switch.state.causes != causes:
            raise InvalidTransition("a new kill came while the code was checked: look at its cause and ask again")
        name = approval.by if approval else by
        waived = tuple(self._waiver(one, name) for one in waivers)
        self._keeper.apply(RequestRecovery(by=name, reason=reason, approval=approval, waivers=waived))
        await self._validate_if_approved()

    async def _approve(self, *, by: str, code: str) -> None:
        self._must_be_possible(Approve)
        asked = self._keeper.switch.state.recovery
        if asked is None:
            state = self._keeper.switch.state.state
            raise InvalidTransition(f"the switch is {state} and there is no recovery to approve; ask for one first")
        if asked.stage is not Stage.PENDING:
            raise InvalidTransition(f"the recovery is {asked.stage} and needs no further approval")
        approval = await self._approval(by, code)
        pending = self._keeper.switch.state.recovery
        if pending is None or pending.requested != asked.requested:
            raise InvalidTransition("the recovery ended while the code was checked: look at the switch and ask again")
        self._keeper.apply(Approve(approval=approval))
        await self._validate_if_approved()

    def cancel(self, *, by: str, reason: str, by_verified: bool) -> None:
        """Take back a recovery that is pending or in its cooldown; raise InvalidTransition where there is none."""
        self._must_be_known()
        try:
            self._keeper.apply(CancelRecovery(by=by, reason=reason, by_verified=by_verified))
        except InvalidTransition as error:
            self._keeper.audit(audit_event("recovery.cancel_refused", self._clock.now(), by=by, reason=str(error)))
            raise

    def _must_be_possible(self, event: type[RequestRecovery | Approve]) -> None:
        # Asked before the code is looked at: a code in the wrong state is no attempt on the code.
        self._must_be_known()
        state = self._keeper.switch.state
        if (state.state, event.kind) not in TABLE:
            name = event.kind.value.replace("_", " ")
            raise InvalidTransition(f"{name} is not possible while the switch is {state.state}")

    def _must_be_known(self) -> None:
        if not self._keeper.restored:
            raise StorageError(self._ready() or "the stored state is not known yet; ask again")

    async def _approval(self, by: str, code: str | None) -> Approval:
        if self.approvers is None or self.approvers.count == 0:
            raise ApprovalError(
                "no approver is configured, so no recovery can be approved: set recovery.approvers_file, or "
                "KILL_SWITCH_APPROVAL_CODE in the sidecar's environment"
            )
        if not code:
            raise ApprovalError("an approval code is needed")
        async with self._verifying:  # one at a time: each takes 16 MiB for a moment, and lock-outs count in order
            account = self._account(self.approvers, by)
            self.lockouts.check(account, self._clock.now())
            try:
                hashing = asyncio.get_running_loop().run_in_executor(self._hashing, self.approvers.verify, by, code)
                verified = await hashing
            except ApprovalError:
                self._wrong_code(account, by)
                raise
            self.lockouts = self.lockouts.succeeded(account)
        now = self._clock.now()
        return Approval(by=verified.name, by_verified=verified.by_verified, granted=now.wall, granted_mono=now.mono)

    @staticmethod
    def _account(approvers: Approvers, by: str) -> str:
        # With the one shared code nobody has a name, and all attempts count together.
        account = approvers.lockout_name(by)
        return account if account in approvers.names or not approvers.names else UNKNOWN_APPROVER

    def _wrong_code(self, account: str, by: str) -> None:
        now = self._clock.now()
        self.lockouts = self.lockouts.failed(account, now)
        self._keeper.audit(audit_event("approval.failed", now, by=by, reason="wrong code or unknown approver"))
        try:
            self.lockouts.check(account, now)
        except LockedOut as locked:
            self._keeper.audit(audit_event("approval.locked_out", now, by=by, reason=str(locked)))
        self._keeper.must_store()  # a restart must not hand out new attempts

    def _waiver(self, asked: Mapping[str, object], by: str) -> Waiver:
        name, threshold, seconds = str(asked["trigger"]), asked.get("threshold"), asked["seconds"]
        rule = next((rule for rule in self._evaluator.rules.rules if rule.trigger == name), None)
        if rule is None:
            known = ", ".join(sorted(rule.trigger for rule in self._evaluator.rules.rules))
            raise ValueError(f"waive: there is no rule {name!r}; the rules are {known}")
        if threshold is not None:
            with_threshold(rule, float(str(threshold)))  # says what is wrong with the rule or the number
        if not isinstance(seconds, float) or seconds <= 0:
            raise ValueError(f"waive: the waiver of {name!r} must end in the future")
        if self._evaluator.is_clear(rule):
            # To waive what does not stand in the way would only mute the rule for later.
            raise InvalidTransition(f"waive: rule {name} is clear, so there is nothing to waive; leave it out")
        now = self._clock.now()
        return Waiver(
            trigger=name,
            threshold=None if threshold is None else float(str(threshold)),
            until=now.wall + seconds,
            until_mono=now.mono + seconds,
            by=by,
        )

    # Validation

    async def _validate_if_approved(self) -> None:
        if self._keeper.switch.state.stage is Stage.VALIDATING:
            await self.validate()

    async def validate(self) -> None:
        """Check triggers and health of an approved recovery; begin it, or raise RecoveryBlocked or NotDurable."""
        async with self._moving:
            recovery = self._keeper.switch.state.recovery
            if recovery is None or recovery.stage is not Stage.VALIDATING:
                return
            await self.check_health()
            if self._keeper.switch.state.recovery is not recovery:
                raise InvalidTransition("the recovery ended while it was being checked: a new kill voids all approvals")
            blockers = self.blockers(recovery.waivers)
            if blockers:
                self._keeper.apply(RefuseRecovery(blockers=tuple(blockers)))
                raise RecoveryBlocked(blockers)
            if not await self._loosen(BeginRecovery(taken_as_clear=tuple(self._taken_as_clear()))):
                if self._keeper.switch.state.recovery is not recovery:
                    raise InvalidTransition("a new kill came while the recovery was stored: all approvals are void")
                # It must not begin by itself after all, once the volume takes it: this answer says that it has not.
                self._keeper.apply(RefuseRecovery(blockers=("the recovery could not be stored",)))
                raise NotDurable(
                    "the recovery could not be stored, so it has not begun; the switch is still KILLED",
                    status={"state": State.KILLED.value, "durable": False},
                )

    def _taken_as_clear(self) -> Iterator[str]:
        known = {rule.trigger for rule in self._evaluator.rules.rules}
        for cause in self._keeper.switch.state.causes:
            if cause.trigger is None:
                yield f"{cause.code.value} by {cause.by}" if cause.by else cause.code.value
            elif cause.trigger not in known:
                yield f"rule {cause.trigger}, which no longer exists"

    def blockers(self, waivers: Sequence[Waiver]) -> list[str]:
        """What stands in the way of trading at the moment, by triggers and the last health checks."""
        found = [check.blocker for check in self.last_health if not check.ok]
        if (unready := self._ready()) is not None:
            found.append(unready)
        if self._keeper.switch.policies.recovery.require_triggers_clear:
            killed_by = {cause.trigger for cause in self._keeper.switch.state.causes if cause.trigger is not None}
            found += self._evaluator.blockers(waivers, killed_by)
        return found

    async def check_health(self) -> tuple[Check, ...]:
        """Run all health checks now."""
        self.last_health = await self.health.run()
        return self.last_health

    # Time

    async def drive(self) -> None:
        """Move recoveries on as time passes, for ever."""
        while True:
            await asyncio.sleep(DRIVE_SECONDS)
            await self.drive_once()

    async def drive_once(self) -> None:
        """Do what is due now."""
        switch = self._keeper.switch
        if switch.state.state is State.DISABLED or not self._keeper.restored:
            return
        self.end_waivers()
        if switch.state.state is State.RECOVERING:
            await self._watch_health()
        else:
            self._unhealthy_rounds = 0
        await self._take_due(due(switch.state, self._clock.now(), switch.policies))
        self._save_timers()

    def end_waivers(self) -> None:
        """Arm the rules again whose waiver is over; never waits for anything, for it tightens."""
        for trigger in list(ended_waivers(self._keeper.switch.state, self._clock.now())):
            self._keeper.apply(EndWaiver(trigger=trigger))

    async def _loosen(self, event: BeginRecovery | Reopen | StepUp) -> bool:
        # Bounded, because what it was decided on grows old while a volume hangs; giving up makes it void.
        try:
            async with asyncio.timeout(DURABLE_WITHIN_SECONDS):
                return await self._keeper.loosen(event)
        except TimeoutError:
            log.warning("recovery.not_stored", extra={"fields": {"event": event.kind.value}})
            return False

    async def _take_due(self, what: Due | None) -> None:
        try:
            match what:
                case Due.EXPIRE:
                    self._keeper.apply(ExpireApprovals())
                case Due.CONCLUDE:
                    self._keeper.apply(Conclude())
                case Due.VALIDATE:
                    await self._validate_quietly()
                case Due.REOPEN:
                    await self._reopen()
                case Due.STEP:
                    await self._step_up()
                case _:
                    pass
        except InvalidTransition as moved:
            # Somebody killed or cancelled between the look and the event; the next look sees that.
            log.info("recovery.moved_on", extra={"fields": {"message": str(moved)}})

    async def _validate_quietly(self) -> None:
        if self._moving.locked():
            return  # a caller is validating it right now
        try:
            await self.validate()
        except (RecoveryBlocked, NotDurable) as refused:
            log.info("recovery.refused", extra={"fields": {"message": str(refused)}})

    async def _watch_health(self) -> None:
        now = self._clock.now()
        if now.mono < self._next_health:
            return
        self._next_health = now.mono + self.health_interval
        failures = [check.blocker for check in await self.check_health() if not check.ok]
        self._unhealthy_rounds = self._unhealthy_rounds + 1 if failures else 0
        if self._unhealthy_rounds >= HEALTH_ROUNDS_TO_LOSE and self._keeper.switch.state.state is State.RECOVERING:
            self._unhealthy_rounds = 0
            self._keeper.apply(HealthLost(failures=tuple(failures)))

    async def _reopen(self) -> None:
        recovery = self._keeper.switch.state.recovery
        if recovery is None:
            return
        if blockers := self.blockers(self._keeper.switch.state.waivers):
            self.step_waits_for = "; ".join(blockers)
            return  # the cooldown is over, but not everything is clear: wait on, blocked as before
        first = self._keeper.switch.policies.recovery.steps[0]
        finding = await self._gates.look(first, recovery.stage_since)
        self._note_wait(finding)
        if finding.verdict is not Verdict.PASS:
            if finding.verdict > Verdict.HOLD:
                self._gates.start_over()  # there is no step before the first: wait on, blocked as before
            return
        async with self._moving:
            if not self.blockers(self._keeper.switch.state.waivers):  # asking the gates took its time
                await self._loosen(Reopen())

    async def _step_up(self) -> None:
        state = self._keeper.switch.state
        step = next_step(state, self._keeper.switch.policies.recovery)
        if state.recovery is None or step is None:
            return
        finding = await self._gates.look(step, state.recovery.step_since)
        if self._keeper.switch.state is not state:
            return  # killed or stepped while we were asking
        self._note_wait(finding)
        match finding.verdict:
            case Verdict.PASS:
                async with self._moving:
                    await self._loosen(StepUp())
            case Verdict.STEP_BACK:
                self._keeper.apply(StepBack(reason=f"a gate of the step to {step.factor:g} failed: {finding.why}"))
            case Verdict.KILL:
                self._kill_for_gate(step, finding)
            case _:
                pass  # wait, or hold: the present factor stays

    def _note_wait(self, finding: GateFinding) -> None:
        held = finding.verdict is Verdict.HOLD
        if held and self.step_waits_for != finding.why:
            self._keeper.audit(audit_event("restart.held", self._clock.now(), by="sidecar", reason=finding.why))
        self.step_waits_for = finding.why or None

    def _kill_for_gate(self, step: RestartStep, finding: GateFinding) -> None:
        reason = f"a gate of the restart step to {step.factor:g} failed: {finding.why}"
        cause = Cause(code=CauseCode.STEP_GATE, reason=reason, time=self._clock.now().wall, by="restart ladder")
        self._keeper.apply(Kill(cause=cause))

    def _save_timers(self) -> None:
        now = self._clock.now()
        counting = needs_checkpoint(self._keeper.switch.state) or any(self._evaluator.running_timers())
        interval = PENDING_CHECKPOINT_SECONDS if self._evaluator.is_pending else CHECKPOINT_SECONDS
        if counting and now.mono - self._last_checkpoint >= interval:
            self._last_checkpoint = now.mono
            self._keeper.checkpoint()
