"""The whole application against a model of a hundred lines: people, alerts, readings, time, reloads, crashes at random.

The application is real, with its files, its sockets and its writer; the clock is the test's, and one probe gives the
reading that the test wants. The model knows what the contract says and no more: where that leaves something open (how
much of a cooldown a crash forgets), it says what is allowed and what never is.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sidecar.adapters.operations_http import ReceivedAlert
from sidecar.app.application import Application
from sidecar.core.errors import KillswitchError
from sidecar.core.states import Instant
from sidecar.rules.readings import Answer, Failure, Series
from sidecar.rules.triggers import Status
from sidecar.settings.config import load_settings

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from sidecar.rules.model import Rule

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # as many examples, however busy the machine

CODE = "let me in"
SHM = "/dev/shm"  # a disk that is busy with other tests would cost most of the time
COOLDOWN, SECOND_STEP, HOLD, SUMMARY = 10.0, 20.0, 60.0, "summary"
CONFIG = """
switch: {name: model}
prometheus: {urls: []}
rules: {files: [rules.yaml], interval: 1h}
gate: {listen: '127.0.0.1:0', socket: gate.sock, page: page}
operations: {listen: '127.0.0.1:0'}
control: {socket: control.sock}
alertmanager: {webhook: {match: ['k="v"']}}
recovery:
  cooldown: 10s
  backoff: {factor: 1}
  steps: [{factor: 0.5}, {factor: 1.0, after: 20s}]
  health: {sources_up: false}
storage: {dir: state}
"""
RULES = """
groups:
  - name: g
    rules:
      - {trigger: busy, type: watchdog, memory_percent: 90, action: kill, on_no_data: {hold_for: 60s, then: kill},
         annotations: {summary: 'SUMMARY'}}
      - {trigger: alert, type: alertmanager, match: ['k="v"'], action: kill}
"""


@dataclass
class Model:
    """What the contract promises, in a few variables."""

    state: str = "ACTIVE"
    factor: float = 1.0
    now: float = 0.0
    reading: str = "good"
    blind_since: float | None = None
    alert: bool = False
    recovering_since: float | None = None
    reopened: float | None = None
    forgetful: bool = False  # a crash may have forgotten some of the running time
    wrong_codes: int = 0

    def kill(self) -> None:
        self.state, self.factor, self.recovering_since, self.reopened = "KILLED", 0.0, None, None

    def look(self) -> None:
        """The rules are evaluated."""
        if self.reading == "blind":
            self.blind_since = self.now if self.blind_since is None else self.blind_since
            if self.now - self.blind_since >= HOLD:
                self.kill()
            return
        self.blind_since = None
        if self.reading == "bad":
            self.kill()

    @property
    def clear(self) -> bool:
        return self.reading == "good" and not self.alert

    def recover(self, *, right: bool) -> bool:
        if self.state != "KILLED":
            return False
        if not right:
            self.wrong_codes += 1
            return False
        self.wrong_codes = 0
        if not self.clear:
            return False
        self.state, self.recovering_since, self.forgetful = "RECOVERING", self.now, False
        return True

    def allowed(self) -> set[tuple[str, float]]:
        """Every state and factor that may be seen now."""
        if self.state == "RECOVERING":
            return self._allowed_while_recovering()
        if self.state == "ACTIVE" and self.reopened is not None:
            due = self.now - self.reopened >= SECOND_STEP
            found = {("ACTIVE", 1.0)} if due else {("ACTIVE", 0.5)}
            return found | {("ACTIVE", 0.5)} if self.forgetful else found
        return {(self.state, self.factor)}

    def _allowed_while_recovering(self) -> set[tuple[str, float]]:
        assert self.recovering_since is not None
        if not self.clear:  # whether it waits or gives up: it does not trade
            return {("RECOVERING", 0.0), ("KILLED", 0.0)}
        over = self.now - self.recovering_since >= COOLDOWN
        found = {("ACTIVE", 0.5)} if over else {("RECOVERING", 0.0)}
        return found | {("RECOVERING", 0.0)} if self.forgetful else found

    def take(self, state: str, factor: float) -> None:
        """Where several things were allowed: what was seen is what is."""
        if self.state == "RECOVERING" and state == "ACTIVE":
            self.reopened = self.now
        self.state, self.factor = state, factor


class FakeClock:
    def __init__(self) -> None:
        self.at = Instant(mono=1000.0, wall=1_700_000_000.0)

    def now(self) -> Instant:
        return self.at


class AppMachine(RuleBasedStateMachine):
    """Does things to both, and looks whether they agree."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.clock = FakeClock()
        self.folder = Path(tempfile.mkdtemp(prefix="ks", dir=SHM if Path(SHM).is_dir() else None))
        (self.folder / "config.yaml").write_text(CONFIG)
        (self.folder / "rules.yaml").write_text(RULES)
        self.loop = asyncio.new_event_loop()
        self.run(self.start())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    async def start(self) -> None:
        environ = {"KILL_SWITCH_APPROVAL_CODE": CODE}
        loaded = load_settings(self.folder / "config.yaml", environ)
        self.app = Application(settings=loaded, environ=environ, clock=self.clock, probes={"watchdog": self.probe})
        self.task = asyncio.create_task(self.app.run())
        async with asyncio.timeout(30):
            while not (self.app.opened and self.app.keeper.durable):
                if self.task.done():
                    self.task.result()
                await asyncio.sleep(0.002)

    async def probe(self, asked: Rule) -> Answer | Failure:
        if self.model.reading == "blind":
            return Failure(reason="bad_response", message="blind", unreachable=False)
        value = 1.5 if self.model.reading == "bad" else 0.5  # of the limit
        wall = self.clock.at.wall
        return Answer(series=(Series(value=value),), evaluated_at=wall, oldest_sample=wall)

    async def turn(self) -> None:
        """Everything that is due happens, and is stored."""
        for group in self.app.evaluator.rules.groups:
            await self.app.evaluator.evaluate_group(group)
        for _ in range(3):  # validated, reopened, stepped up
            await asyncio.sleep(0)
            await self.app.recoveries.drive_once()
        assert await self.app.keeper.settled(30.0)

    def both_look(self) -> None:
        self.model.look()
        self.run(self.turn())

    # What happens

    @rule(restriction=st.sampled_from([None, "halt", "reduce_only"]))
    def somebody_kills(self, restriction: str | None) -> None:
        self.run(self.app.desk.trigger(reason="r", by="ann", by_verified=False, restriction=restriction))
        self.model.kill()

    @rule(reading=st.sampled_from(["good", "good", "bad", "blind"]))
    def the_reading_changes(self, reading: str) -> None:
        self.model.reading = reading
        self.both_look()

    @rule(seconds=st.sampled_from([0.5, 4.0, 11.0, 21.0, 61.0]), wall=st.sampled_from([0.0, 0.0, -86400.0, 86400.0]))
    def time_passes(self, seconds: float, wall: float) -> None:
        if self.model.alert:
            wall = 0.0  # how long an alert blocks a recovery is wall time, by Alertmanager's clock
        self.clock.at = Instant(mono=self.clock.at.mono + seconds, wall=self.clock.at.wall + seconds + wall)
        self.model.now += seconds
        self.both_look()

    @rule(firing=st.booleans())
    def an_alert_comes(self, firing: bool) -> None:
        # By the clock of Prometheus, which does not step with ours: one not newer than a fresh resolve is ignored.
        starts_at = 1.7e9 + self.model.now
        alert = ReceivedAlert(firing=firing, labels={"k": "v"}, annotations={}, starts_at=starts_at, fingerprint="f")
        already = self.model.alert
        self.run(self.app.desk.alertmanager(alerts=[alert], truncated=False, trusted=True))
        if firing and not already:
            self.model.kill()
        self.model.alert = firing
        self.clock.at = Instant(mono=self.clock.at.mono + 1.0, wall=self.clock.at.wall + 1.0)  # the next one is newer
        self.model.now += 1.0
        self.both_look()

    @precondition(lambda self: self.model.wrong_codes < 4)
    @rule(right=st.sampled_from([True, True, True, False]))
    def somebody_asks_for_recovery(self, right: bool) -> None:
        code = CODE if right else "guess"
        try:
            self.run(self.app.recoveries.recover(by="bob", reason="r", code=code, waivers=[]))
            begun = True
        except KillswitchError:
            begun = False
        assert begun == self.model.recover(right=right), (begun, self.model)
        self.both_look()

    @precondition(lambda self: self.model.state == "KILLED")
    @rule(then=st.sampled_from(["good", "good", "blind"]), wait=st.sampled_from([0.5, 11.0]))
    def all_is_well_and_a_recovery_begins(self, then: str, wait: float) -> None:
        """What random events alone would seldom come to."""
        if self.model.alert:
            self.an_alert_comes(firing=False)
        self.the_reading_changes("good")
        self.somebody_asks_for_recovery(right=True)
        self.they_agree()
        self.the_reading_changes(then)
        self.they_agree()
        self.time_passes(wait, 0.0)

    @rule()
    def somebody_cancels(self) -> None:
        try:
            self.app.recoveries.cancel(by="ann", reason="r", by_verified=False)
        except KillswitchError:
            assert self.model.state != "RECOVERING"
        if self.model.state == "RECOVERING":
            self.model.kill()
        self.both_look()

    @rule(text=st.sampled_from(["one", "two"]), broken=st.booleans())
    def the_rules_are_reloaded(self, text: str, broken: bool) -> None:
        (self.folder / "rules.yaml").write_text("groups: [" if broken else RULES.replace("SUMMARY", text))
        try:
            self.run(self.app.desk.reload())
        except KillswitchError:
            assert broken
        if broken:
            (self.folder / "rules.yaml").write_text(RULES)
        self.both_look()

    @precondition(lambda self: self.model.reading == "good")
    @rule(down=st.sampled_from([0.0, 100.0]), kill_first=st.booleans())
    def it_crashes(self, down: float, kill_first: bool) -> None:
        if kill_first:  # acknowledged, and then it dies
            self.somebody_kills(None)
        self.run(self._crash())
        self.clock.at = Instant(mono=self.clock.at.mono % 977.0, wall=self.clock.at.wall + down)
        self.model.forgetful = True
        self.run(self.start())
        self.both_look()

    async def _crash(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for one in left:
            one.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    # What must hold

    @invariant()
    def they_agree(self) -> None:
        state = self.app.switch.state
        seen = (state.state.value, state.factor)
        assert seen in self.model.allowed(), (seen, self.model)
        self.model.take(*seen)
        decision, reason = self.run(self._ask())
        assert (decision == 200) == (self.model.state == "ACTIVE"), (decision, reason, self.model)
        assert self.app.keeper.durable
        assert (self.app.evaluator.triggers["alert"].status is Status.FIRING) == self.model.alert

    async def _ask(self) -> tuple[int, str]:
        assert self.app.gate_address is not None
        reader, writer = await asyncio.open_connection(*self.app.gate_address)
        writer.write(b"GET /gate HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        head = (await reader.read()).decode().partition("\r\n\r\n")[0].splitlines()
        writer.close()
        fields = dict(line.lower().split(": ", 1) for line in head[1:])
        return int(head[0].split()[1]), fields["x-killswitch-reason"]

    def teardown(self) -> None:
        self.run(self._crash())
        self.loop.close()
        shutil.rmtree(self.folder)


TIMES = max(1, int(os.environ.get("FAULTS", "1")))
AppMachine.TestCase.settings = settings(
    max_examples=8 * TIMES,
    stateful_step_count=25,
    deadline=None,
    derandomize=TIMES == 1,  # the same lives for every change; `make faults` looks for new ones
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestApp = AppMachine.TestCase
