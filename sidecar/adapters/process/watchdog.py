"""Answers watchdog rules: looks at the target in a thread, keeps each rule's window, gives the worse of two shares."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sidecar.adapters.process.cgroups import Cgroups
from sidecar.adapters.process.machine import Machine, PsutilMachine
from sidecar.adapters.process.targets import Targets
from sidecar.adapters.process.usage import CpuHistory, Usage
from sidecar.core.errors import InvariantViolation
from sidecar.rules.model import Rule
from sidecar.rules.model import Watchdog as Condition
from sidecar.rules.readings import Answer, Failure, Series

log = logging.getLogger("sidecar.watchdog")

LOOK_SECONDS = 2.0
"""Longest wait for one look: /proc of a process in uninterruptible sleep can hang for as long as that sleep lasts."""

_LIMIT = 1.0


class Watchdog:
    """Looks after memory and CPU.

    The value of an answer is the larger of `memory used ÷ memory allowed` and `CPU used ÷ CPU allowed`, so that 1.0 is
    the limit. Memory counts as it is now, for memory that has run out does not wait. CPU counts as the average of the
    last `window` seconds; until a whole window has been seen it counts as 0, since it cannot have been too high for
    that long, and the rule is ready at once.

    Args:
        clock: monotonic seconds.
        wall: Unix seconds.
        proc: where /proc is, for the control group that a process is in.
        cgroup_root: where control groups are mounted.
        machine: the host and its processes; None takes the real ones.
        timeout: seconds that one look may take.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        proc: Path = Path("/proc"),
        cgroup_root: Path = Path("/sys/fs/cgroup"),
        machine: Machine | None = None,
        timeout: float = LOOK_SECONDS,
    ) -> None:
        self._clock = clock
        self._wall = wall
        self._targets = Targets(cgroups=Cgroups(proc=proc, root=cgroup_root), machine=machine or PsutilMachine())
        self._timeout = timeout
        self._windows: dict[str, tuple[Condition, CpuHistory]] = {}
        self._looking: set[str] = set()
        self._told: dict[str, str] = {}

    async def probe(self, rule: Rule) -> Answer | Failure:
        """Look at the target of a watchdog rule once; never blocks the loop, never takes longer than the timeout.

        Returns:
            One series with the larger share; no series where no process has the name; a failure where anything that
            the rule asks for cannot be read, unless what can be read is over its limit already.

        Raises:
            InvariantViolation: the rule is of another type.
        """
        condition = rule.condition
        if not isinstance(condition, Condition):
            raise InvariantViolation(f"rule {rule.trigger!r} of type {rule.kind} was given to the watchdog")
        usage = await self._in_thread(rule.trigger, condition)
        if isinstance(usage, Failure):
            return usage
        return self._answer(rule.trigger, condition, usage)

    async def _in_thread(self, trigger: str, condition: Condition) -> Usage | Failure:
        # A look that hangs cannot be ended. One thread a rule waits for it, and a daemon: it must not stop our exit.
        if trigger in self._looking:
            return _failure("timeout", "the look before this one still hangs")
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[Usage | Failure] = loop.create_future()

        def done(outcome: Usage | Failure) -> None:
            self._looking.discard(trigger)
            if not arrived.done():
                arrived.set_result(outcome)

        def work() -> None:
            outcome = self._look_once(condition)
            with contextlib.suppress(RuntimeError):  # the loop is gone, and with it whoever asked
                loop.call_soon_threadsafe(done, outcome)

        self._looking.add(trigger)
        try:
            threading.Thread(target=work, name=f"watchdog {trigger}", daemon=True).start()
        except RuntimeError as error:  # no more threads to be had
            self._looking.discard(trigger)
            return _failure("bad_response", f"no thread could be started: {error}")
        try:
            async with asyncio.timeout(self._timeout):
                return await arrived
        except TimeoutError:
            return _failure("timeout", f"{condition.target} could not be looked at within {self._timeout:g} s")

    def _look_once(self, condition: Condition) -> Usage | Failure:
        try:
            return self._targets.look(condition, at=self._clock(), wall=self._wall())
        except Exception as error:  # noqa: BLE001 - whatever a foreign /proc throws blinds this rule and no other
            return _failure("bad_response", f"{condition.target}: {str(error) or repr(error)}")

    def _answer(self, trigger: str, condition: Condition, usage: Usage) -> Answer | Failure:
        self._tell(trigger, usage.note)
        if not usage.present:
            return Answer(series=(), evaluated_at=usage.wall, oldest_sample=None)
        shares = tuple(self._shares(trigger, condition, usage))
        worst = max(shares, default=0.0)
        if usage.problems and worst <= _LIMIT:
            return _failure("bad_response", f"{condition.target}: {'; '.join(usage.problems)}")
        return Answer(series=(Series(value=worst),), evaluated_at=usage.wall, oldest_sample=usage.wall)

    def _tell(self, trigger: str, note: str) -> None:
        if note and self._told.get(trigger) != note:
            log.warning("watchdog.limit_unseen", extra={"fields": {"trigger": trigger, "message": note}})
        self._told[trigger] = note

    def _shares(self, trigger: str, condition: Condition, usage: Usage) -> Iterator[float]:
        if usage.memory is not None and condition.memory_percent is not None:
            yield usage.memory.percent / condition.memory_percent
        if usage.cpu is not None and condition.cpu_percent is not None:
            history = self._history(trigger, condition)
            history.add(usage, usage.cpu)
            cores = history.average_cores()
            yield 0.0 if cores is None else 100.0 * cores / usage.cpu.cores / condition.cpu_percent

    def _history(self, trigger: str, condition: Condition) -> CpuHistory:
        known = self._windows.get(trigger)
        if known is None or known[0] != condition:
            known = (condition, CpuHistory(condition.window))
            self._windows[trigger] = known
        return known[1]


def _failure(reason: str, message: str) -> Failure:
    # Never `unreachable`: that is the milder policy, for a server that restarts. This machine does answer, uselessly.
    return Failure(reason=reason, message=message, unreachable=False)
