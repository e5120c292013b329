"""Asks Prometheus what it remembers of this switch: where nothing is stored, and whether what is stored is the newest.

Where nothing is stored the answer is waited for, for ever, and the gate denies meanwhile; an operator's kill ends the
wait, for with it nothing has to be known any more to be strict. Where a state is stored it counts at once, and an
answer that comes later can only tighten.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from sidecar.adapters.prometheus import RecordReader
from sidecar.app.clock import Clock, stamp
from sidecar.app.keeper import Keeper
from sidecar.app.restore import Start
from sidecar.core.errors import SourceError
from sidecar.core.record import (
    Record,
    Sighting,
    kill_from_sighting,
    last_word,
    rollback_kill,
    state_from_sighting,
)
from sidecar.core.states import Instant, State
from sidecar.core.switch import Change
from sidecar.core.transitions import Policies
from sidecar.settings.config import Prometheus

log = logging.getLogger("sidecar.recollection")

ASK_AGAIN_SECONDS: Final = 3.0
ASKING: Final = "nothing is stored here; Prometheus is being asked for the last known state"
CHECKING: Final = "Prometheus is being asked whether the stored state is the newest one"


class Recollection:
    """What Prometheus remembers of one switch.

    Args:
        switch: its name.
        lookback: seconds before the start of this process beyond which nothing counts.
        started: when this process started.
        clock: where `now` comes from.
        servers: whom to ask, as configured at the moment of each question.
        keeper: where kills come in, and where a rollback is made one.
    """

    def __init__(
        self,
        *,
        switch: str,
        lookback: float,
        started: Instant,
        clock: Clock,
        servers: Callable[[], Prometheus],
        keeper: Keeper,
    ) -> None:
        self.checking: str | None = None
        self._switch = switch
        self._lookback = lookback
        self._started = started
        self._clock = clock
        self._servers = servers
        self._keeper = keeper
        self._killed = asyncio.Event()
        keeper.observers.change.append(self._note_kill)

    def _note_kill(self, change: Change) -> None:
        if change.after.state is State.KILLED:
            self._killed.set()

    async def ask(self) -> Record:
        """Ask once.

        Raises:
            SourceError: no whole answer.
        """
        servers = self._servers()
        if not servers.urls:
            raise SourceError("prometheus.urls is empty since the last reload; restart to start without its record")
        reader = RecordReader(urls=servers.urls, timeout=servers.timeout, headers=servers.headers, http=servers.http)
        return await reader.read(
            self._switch, running=lambda: self._clock.now().mono - self._started.mono, lookback=self._lookback
        )

    async def recall(self, failed: Callable[[str], None]) -> Record | None:
        """Ask until there is an answer; None where a kill came first.

        Args:
            failed: is told each time why there is none yet.
        """
        asking = asyncio.create_task(self._ask_for_ever(failed), name="recollection")
        killed = asyncio.create_task(self._killed.wait(), name="killed meanwhile")
        try:
            await asyncio.wait({asking, killed}, return_when=asyncio.FIRST_COMPLETED)
            return asking.result() if asking.done() else None
        finally:
            asking.cancel()
            killed.cancel()

    async def check(self, stored_epoch: int, checked: Callable[[], None]) -> None:
        """Kill if Prometheus has seen a later epoch than was stored; returns once that is known.

        While `checking` is set the gate should stay shut. That ends with the first attempt, whatever came of it, or
        with the time of one: a server that is down delays a restart by no more.

        Args:
            stored_epoch: what this process started from.
            checked: is called when `checking` is over.
        """
        attempted = asyncio.Event()
        report = _Once("recollection.check_waits")

        def failed(error: str) -> None:
            report(error)
            attempted.set()

        asking = asyncio.create_task(self._ask_for_ever(failed), name="rollback check")
        asking.add_done_callback(lambda _: attempted.set())
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._servers().timeout):
                    await attempted.wait()
            if asking.done():
                self._judge(asking.result(), stored_epoch)
            self.checking = None
            checked()
            if not asking.done():
                self._judge(await asking, stored_epoch)
        finally:
            asking.cancel()
            self.checking = None

    def _judge(self, record: Record, stored_epoch: int) -> None:
        if record.epoch > stored_epoch:
            self._keeper.switch.raise_epoch(record.epoch)
            self._keeper.apply(rollback_kill(record.epoch, stored_epoch, self._clock.now()))

    async def catch_up(self) -> None:
        """After a start with a kill in place of an answer: go on from the last epoch, and add what was seen killed."""
        record = await self._ask_for_ever(_Once("recollection.catch_up_waits"))
        self._keeper.go_on_from(record.epoch)
        seen = last_word(record)
        if seen is not None and seen.state is not State.ACTIVE and self._keeper.switch.state.state is State.KILLED:
            self._keeper.apply(kill_from_sighting(seen, self._clock.now(), _when(seen)))

    async def _ask_for_ever(self, failed: Callable[[str], None]) -> Record:
        while True:
            try:
                return await self.ask()
            except SourceError as error:
                failed(str(error))
            await asyncio.sleep(ASK_AGAIN_SECONDS)


class _Once:
    """Logs why there is no answer yet, once for each new reason."""

    def __init__(self, event: str) -> None:
        self._event = event
        self._last: str | None = None

    def __call__(self, error: str) -> None:
        if error != self._last:
            log.warning(self._event, extra={"fields": {"error": error}})
        self._last = error


def start_from_record(start: Start, record: Record, now: Instant, policies: Policies) -> Start:
    """Where to start when nothing is stored: what the record says, on top of what the audit knew.

    Args:
        start: the choice without the record; ACTIVE, for anything else needs no record.
        record: what Prometheus remembers.
        now: the present moment.
        policies: for the restriction of a kill and the restart ladder.
    """
    epoch = max(start.state.epoch, record.epoch)
    seen = last_word(record)
    if seen is None:
        return replace(start, state=replace(start.state, epoch=epoch))
    state = state_from_sighting(seen, now, policies, epoch=epoch, when=_when(seen))
    note = f"nothing is stored; Prometheus' record shows {seen.state}, last seen at {_when(seen)}"
    return replace(start, state=state, note=note, fresh=False)


def _when(seen: Sighting) -> str:
    return stamp(seen.time) or "an unknown time"
