"""Keeps the order of effects: gate first and at once when tightening, disk first when loosening, the rest afterwards.

Every change of the switch goes through here. One writer task puts documents and audit lines on disk in the order of
events; it may hang or fail for as long as it likes without delaying a tightening, and nobody is told "durable" before
it is true.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sidecar.app.audit_trail import AuditEvent, audit_event, change_event
from sidecar.app.clock import Clock
from sidecar.core.compose import Overlay, compose
from sidecar.core.errors import StorageError
from sidecar.core.events import Demand, Event
from sidecar.core.snapshot import Snapshot
from sidecar.core.states import Instant, State
from sidecar.core.switch import Change, Proposal, Switch
from sidecar.core.transitions import SwitchState

log = logging.getLogger("sidecar.keeper")

FIRST_RETRY_SECONDS = 0.25
LONGEST_RETRY_SECONDS = 5.0
MOST_WAITING_EVENTS = 10_000
"""Audit events that may wait for a volume that hangs: a day of it must not cost the memory. The rest is counted."""

Document = dict[str, Any]


class Memory(Protocol):
    """Where state and audit become durable."""

    async def write(self, document: Document | None, events: Sequence[AuditEvent]) -> None:
        """Make both durable, in order after every earlier call; raise StorageError if the document is not."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Loosening:
    proposal: Proposal
    done: asyncio.Future[bool]


@dataclass(kw_only=True, slots=True)
class Observers:
    """Who is told of changes after they are in force; none of them may block.

    One that raises keeps neither the others nor the disk from hearing of a kill; `Keeper.broken` then says so.
    """

    snapshot: list[Callable[[Snapshot], None]] = field(default_factory=list)
    change: list[Callable[[Change], None]] = field(default_factory=list)


class Keeper:
    """The one way to change the switch.

    Args:
        switch: the switch.
        clock: where `now` comes from.
        document: builds the durable document for a state; called on the loop.
    """

    def __init__(self, *, switch: Switch, clock: Clock, document: Callable[[SwitchState, Instant], Document]) -> None:
        self.switch = switch
        self.clock = clock
        self.observers = Observers()
        self.write_failures = 0
        self.last_write_error: str | None = None
        self.broken: str | None = None
        self.durable_state: SwitchState | None = None
        self._document = document
        self._memory: Memory | None = None
        self._generation = 0
        self._durable_generation = 0
        self._events: list[AuditEvent] = []
        self._dropped = 0
        self._loosenings: deque[_Loosening] = deque()
        self._under_way: _Loosening | None = None
        self._checkpoint = False
        self._wake = asyncio.Event()
        self._settled = asyncio.Condition()

    @property
    def durable(self) -> bool:
        """Whether all that was decided is on disk."""
        return self.durable_state is not None and self._durable_generation >= self._generation

    @property
    def restored(self) -> bool:
        """Whether the stored state is known."""
        return self._memory is not None

    # Changes

    def apply(self, event: Event) -> Change | None:
        """Apply an event that does not loosen: in force and on the gate when this returns, durable later.

        Raises:
            InvalidTransition: not possible in this state.
        """
        change = self.switch.apply(event, self.clock.now())
        if isinstance(change, Proposal):
            raise TypeError(f"{event!r} loosens; use loosen()")
        if change is not None:
            self._in_force((change,))
        return change

    async def loosen(self, event: Event) -> bool:
        """Apply an event that loosens: durable first, then in force; False where it came to nothing.

        Whoever stops waiting takes it back: what it was decided on may no longer be so when a hung write returns.

        Raises:
            InvalidTransition: not possible in this state.
        """
        proposal = self.switch.apply(event, self.clock.now())
        if not isinstance(proposal, Proposal):
            raise TypeError(f"{event!r} does not loosen; use apply()")
        waiting = _Loosening(proposal=proposal, done=asyncio.get_running_loop().create_future())
        self._loosenings.append(waiting)
        self._wake.set()
        try:
            return await waiting.done
        finally:
            if waiting in self._loosenings and waiting is not self._under_way:
                self._loosenings.remove(waiting)

    def demand(self, trigger: str, demands: Iterable[Demand]) -> tuple[Change, ...]:
        """Set what a rule asks for; the gate shows it when this returns."""
        before = self.switch.demands_of(trigger)
        changes = self.switch.demand(trigger, demands, self.clock.now())
        if changes or self.switch.demands_of(trigger) != before:
            self._in_force(changes)
        return changes

    def cover(self, overlay: Overlay) -> None:
        """Set what keeps the gate shut beside the state; publish if that makes a difference."""
        if overlay != self.switch.overlay:
            self.switch.cover(overlay)
            self.publish()

    def audit(self, event: AuditEvent) -> None:
        """Have an event that changes no state written to the audit log."""
        self._record(event)
        self._wake.set()

    def checkpoint(self) -> None:
        """Have the running timers written soon; nobody waits for it."""
        self._checkpoint = True
        self._wake.set()

    def must_store(self) -> None:
        """Note that something stored beside the state has changed: who waits for `settled` waits for it too."""
        self._generation += 1
        self._wake.set()

    def _in_force(self, changes: Sequence[Change]) -> None:
        # Only noted here, in memory, and before the gate hears of it: whatever goes wrong there, it will be written.
        for change in changes:
            self._generation += 1
            self._record(change_event(change))
        if changes:
            self._wake.set()
        self.publish()
        for change in changes:
            self._tell(change)

    def _record(self, event: AuditEvent) -> None:
        if len(self._events) < MOST_WAITING_EVENTS:
            self._events.append(event)
        else:
            self._dropped += 1

    def publish(self) -> None:
        """Give gate and state page the present snapshot: memory only, at once."""
        snapshot = self.switch.snapshot()
        for observer in self.observers.snapshot:
            self._call(observer, snapshot)

    def _tell(self, change: Change) -> None:
        _log_change(change)
        for observer in self.observers.change:
            self._call(observer, change)

    def _call(self, observer: Callable[[Any], None], news: Snapshot | Change) -> None:
        try:
            observer(news)
        except Exception as error:
            if self.broken is None:
                log.exception("keeper.observer_failed")
                self.broken = f"a change could not be passed on: {type(error).__name__}: {error}"

    def exported(self) -> Snapshot | None:
        """The snapshot as far as it is durable, for metrics; None until state is restored."""
        if self.durable_state is None:
            return None
        switch = self.switch
        state = switch.state if switch.state.state is State.DISABLED else self.durable_state
        return compose(switch.name, switch.mode, state, switch.demands, switch.overlay)

    # Durability

    def attach(self, memory: Memory, state: SwitchState) -> None:
        """Take over the stored state and start writing: from here on what the switch holds replaces what is stored."""
        changes = self.switch.restore(state, self.clock.now())
        self._memory = memory
        self._generation += 1
        self._in_force(changes)
        self._wake.set()

    def go_on_from(self, epoch: int) -> None:
        """Give the present state, and all that follows, an epoch above this one, which was seen of this switch before.

        It is written, or the next start would take what is stored for an older day's.
        """
        if epoch >= self.switch.state.epoch:
            self.switch.raise_epoch(epoch)
            self.switch.restamp()
            self._generation += 1
            self.publish()
            self._wake.set()

    async def settled(self, timeout: float) -> bool:  # noqa: ASYNC109 - the answer to a caller, not a cancellation
        """Wait until all that is decided now is durable; False if it is not within `timeout` seconds."""
        wanted = self._generation
        try:
            async with asyncio.timeout(timeout), self._settled:
                await self._settled.wait_for(lambda: self._durable_generation >= wanted)
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Write for ever, in the order of events."""
        retry = FIRST_RETRY_SECONDS
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._memory is None:
                continue
            if await self._write_all(self._memory):
                retry = FIRST_RETRY_SECONDS
                continue
            await asyncio.sleep(retry)
            retry = min(retry * 2, LONGEST_RETRY_SECONDS)
            self._wake.set()

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109 - as above
        """Wait at an orderly stop until state and audit are written."""
        if self._memory is None:
            return not self._events
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while (self._events or not self.durable) and loop.time() < deadline:
            self._wake.set()
            await asyncio.sleep(0.01)
        return not self._events and self.durable

    async def _write_all(self, memory: Memory) -> bool:
        while self._has_work():
            written = await self._write_loosening(memory) if self._loosenings else await self._write_current(memory)
            if not written:
                return False
        return True

    def _has_work(self) -> bool:
        behind = self._durable_generation < self._generation
        return bool(self._loosenings or behind or self._events or self._checkpoint)

    async def _write_current(self, memory: Memory) -> bool:
        generation, state, events = self._generation, self.switch.state, self._take_events()
        needed = self._durable_generation < generation or self._checkpoint
        self._checkpoint = False
        document = self._document(state, self.clock.now()) if needed else None
        if not await self._write(memory, document, events):
            self._checkpoint = True
            return False
        if needed:
            await self._became_durable(generation, state)
        return True

    async def _write_loosening(self, memory: Memory) -> bool:
        waiting = self._loosenings[0]
        change, generation = waiting.proposal.change, self._generation
        if self.switch.state is not change.before:
            self._finish(waiting, outcome=False)
            return True
        self._under_way = waiting
        written = await self._write(memory, self._document(change.after, self.clock.now()), self._take_events())
        self._under_way = None
        if written and not waiting.done.done() and self.switch.commit(waiting.proposal):
            committed = True
            self._record(change_event(change))
            self.publish()
            self._tell(change)
            await self._became_durable(generation, change.after)
        else:
            committed = False
            # One of the two copies may hold the proposal now: what is in force must be written over it, as the newer.
            self.switch.restamp()
            self._generation += 1
        self._finish(waiting, outcome=committed)
        return written

    def _finish(self, waiting: _Loosening, *, outcome: bool) -> None:
        self._loosenings.popleft()
        if not waiting.done.done():
            waiting.done.set_result(outcome)

    def _take_events(self) -> list[AuditEvent]:
        events, self._events = self._events, []
        if self._dropped:
            reason = f"{self._dropped} audit events did not fit in memory while the volume did not answer"
            events.append(audit_event("audit.dropped", self.clock.now(), by="sidecar", reason=reason))
            self._dropped = 0
        return events

    async def _write(self, memory: Memory, document: Document | None, events: list[AuditEvent]) -> bool:
        try:
            await memory.write(document, events)
        except StorageError as error:
            self.write_failures += 1
            self.last_write_error = str(error)
            log.error(  # noqa: TRY400 - the message says what failed and where; a traceback would say less
                "storage.write_failed", extra={"fields": {"error": str(error)}}
            )
            return False
        if document is not None:
            self.last_write_error = None
        return True

    async def _became_durable(self, generation: int, state: SwitchState) -> None:
        self.durable_state = state
        self._durable_generation = max(self._durable_generation, generation)
        async with self._settled:
            self._settled.notify_all()


def _log_change(change: Change) -> None:
    event = change_event(change)
    data = event["data"]
    fields = {"from": event["from"], "to": event["to"], "by": event["by"], "reason": event["reason"], **data}
    level = logging.WARNING if change.after.state is State.KILLED else logging.INFO
    log.log(
        level, event["type"], extra={"fields": {name: value for name, value in fields.items() if value is not None}}
    )
