"""The sole holder of the switch's state: every change goes in as an event and comes out as a record of what changed.

Pure and single-threaded: no clock, no I/O. A tightening is in force when `apply` returns. A loosening comes back as a
proposal, which counts only when its owner has made it durable and hands it to `commit`; if anything moved meanwhile, it
is void.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sidecar.core.compose import Overlay, compose
from sidecar.core.errors import InvariantViolation
from sidecar.core.events import CauseCode, Demand, Event, Kill
from sidecar.core.snapshot import Snapshot
from sidecar.core.states import Action, Instant, Mode, State
from sidecar.core.transitions import LOOSENING, Policies, SwitchState, transition


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One event that changed the switch, for the audit log, metrics and notifications."""

    event: Event
    before: SwitchState
    after: SwitchState
    at: Instant


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """A loosening that waits to become durable; `change.before` is what it was decided on."""

    change: Change


class Switch:
    """The switch of one pod.

    Args:
        name: its identity, as in metrics.
        mode: fixed for the life of the process.
        state: what was restored, or a fresh one.
        policies: the operator's decisions.
    """

    def __init__(self, *, name: str, mode: Mode, state: SwitchState, policies: Policies) -> None:
        self.name = name
        self.mode = mode
        self.policies = policies
        self._refuse_disabled(state)
        self._state = replace(state, state=State.DISABLED) if mode is Mode.DISABLED else state
        self._highest_epoch = state.epoch
        self._demands: dict[str, tuple[Demand, ...]] = {}
        self._overlay = Overlay(unrestored="starting: state is not restored yet")

    @property
    def state(self) -> SwitchState:
        """What is decided; a proposal is not part of it until committed."""
        return self._state

    @property
    def demands(self) -> tuple[Demand, ...]:
        """What firing rules ask for at the moment, without fully waived ones, with what removed rules left behind."""
        running = (demand for trigger in self._demands for demand in self.demands_of(trigger))
        return (*running, *self._state.held)

    def demands_of(self, trigger: str) -> tuple[Demand, ...]:
        """What one rule asks for at the moment; nothing while it is fully waived."""
        asked = self._demands.get(trigger, ())
        if not asked or any(one.trigger == trigger and one.threshold is None for one in self._state.waivers):
            return ()
        return tuple(demand for demand in asked if not self._is_acknowledged(demand))

    def _is_acknowledged(self, demand: Demand) -> bool:
        # Only the kill was taken into the bargain: a milder step of the same firing goes on restricting.
        firing = (demand.trigger, demand.code.value, demand.since)
        return demand.action is Action.KILL and firing in self._state.acknowledged

    @property
    def overlay(self) -> Overlay:
        """What else keeps the gate shut."""
        return self._overlay

    def apply(self, event: Event, now: Instant) -> Change | Proposal | None:
        """Apply an event.

        Returns:
            A Change that is in force, a Proposal that must be made durable first, or None where nothing changed.

        Raises:
            InvalidTransition: not possible in this state; nothing was changed.
        """
        before = self._state
        after = transition(before, event, now, self.policies)
        if after is before:
            return None
        # An epoch is never used twice, not even after a proposal that came to nothing: its file may have been written.
        self._highest_epoch += 1
        change = Change(event=event, before=before, after=replace(after, epoch=self._highest_epoch), at=now)
        if event.kind in LOOSENING:
            return Proposal(change=change)
        self._state = change.after
        return change

    def commit(self, proposal: Proposal) -> bool:
        """Put a durable proposal in force; False where the switch has moved since, which makes it void."""
        if self._state is not proposal.change.before:
            return False
        self._state = proposal.change.after
        for waiver in self._state.waivers:
            # What the rule asked for at its old threshold ends here; its next evaluation knows only the new one.
            if waiver not in proposal.change.before.waivers:
                self._demands.pop(waiver.trigger, None)
        return True

    def restore(self, state: SwitchState, now: Instant) -> tuple[Change, ...]:
        """Take over the stored state; kills that came in before it was known are applied on top of it.

        Raises:
            InvariantViolation: the stored state is DISABLED, which is never stored, and this switch enforces.
        """
        self._refuse_disabled(state)
        early, asked = self._state.causes, self._state.kill_restriction
        self._highest_epoch = max(self._highest_epoch, state.epoch)
        if self.mode is Mode.DISABLED:
            # Nothing of it is in force, but it is the same switch: an epoch that falls to 0 would mean rolled back.
            self._state = replace(self._state, epoch=self._highest_epoch)
            return ()
        self._state = state
        changes = [self.apply(Kill(cause=cause, restriction=asked), now) for cause in early]
        return tuple(change for change in changes if isinstance(change, Change))

    def _refuse_disabled(self, state: SwitchState) -> None:
        if self.mode is not Mode.DISABLED and state.state is State.DISABLED:
            raise InvariantViolation(
                f"switch {self.name!r} is to run {self.mode.value} from a state that is DISABLED, which must never be "
                "stored: what was in force before is unknown"
            )

    def restamp(self) -> None:
        """Give the present state an epoch above any that was proposed, because it must win over a void proposal."""
        self._highest_epoch += 1
        self._state = replace(self._state, epoch=self._highest_epoch)

    def raise_epoch(self, epoch: int) -> None:
        """Give every change from now on an epoch above this one, which somebody else has seen of this switch."""
        self._highest_epoch = max(self._highest_epoch, epoch)

    def demand(self, trigger: str, demands: Iterable[Demand], now: Instant) -> tuple[Change, ...]:
        """Set what one rule asks for, and kill if it asks for that; return the changes that kills made."""
        current = tuple(demands)
        if current:
            self._demands[trigger] = current
        else:
            self._demands.pop(trigger, None)
        return self._kill_for(self.demands_of(trigger), now)

    def drop_demands(self, trigger: str) -> tuple[Demand, ...]:
        """Forget what a rule asks for because it no longer exists; return what it was asking for."""
        return self._demands.pop(trigger, ())

    def kill_as_demanded(self, now: Instant) -> tuple[Change, ...]:
        """Kill for every rule that asks for it and is not among the causes yet.

        It looks at what holds now and not at what just changed, so a rule that goes on firing kills again whatever
        opened the switch in between. `demand` does the same for its one rule.
        """
        return self._kill_for(self.demands, now)

    def _kill_for(self, demands: Iterable[Demand], now: Instant) -> tuple[Change, ...]:
        if self._state.state is State.DISABLED:
            return ()
        # One cause for each rule and code: two demands that shared one would take turns in being the new one for ever.
        asking: dict[tuple[str, CauseCode], Demand] = {}
        for demand in demands:
            if demand.action is Action.KILL:
                asking.setdefault((demand.trigger, demand.code), demand)
        changes = [
            self.apply(Kill(cause=demand.as_cause()), now) for demand in asking.values() if not self._is_cause(demand)
        ]
        return tuple(change for change in changes if isinstance(change, Change))

    def _is_cause(self, demand: Demand) -> bool:
        return self._state.state is State.KILLED and any(
            (cause.trigger, cause.code, cause.time) == (demand.trigger, demand.code, demand.since)
            for cause in self._state.causes
        )

    def cover(self, overlay: Overlay) -> None:
        """Set what keeps the gate shut beside the state itself: not ready, stale, degraded."""
        self._overlay = overlay

    def snapshot(self) -> Snapshot:
        """The picture that gate, status and metrics show now."""
        return compose(self.name, self.mode, self._state, self.demands, self._overlay)
