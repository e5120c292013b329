"""When Prometheus is asked for the past of the switch, how long, and what an answer or its absence does."""

import asyncio
import json
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from sidecar.adapters.prometheus import RecordReader
from sidecar.app import recollection
from sidecar.app.keeper import Keeper
from sidecar.app.recollection import CHECKING, Recollection, start_from_record
from sidecar.app.restore import Start
from sidecar.core.errors import SourceError
from sidecar.core.events import Cause, CauseCode, Kill
from sidecar.core.record import Record, Sighting
from sidecar.core.recovery import Lockouts
from sidecar.core.states import Instant, Mode, Restriction, State
from sidecar.core.switch import Switch
from sidecar.core.transitions import Policies, SwitchState
from sidecar.settings.config import Prometheus

WALL = 1_700_000_000.0
START = Instant(mono=100.0, wall=WALL)
SILENT = SourceError("nobody there")


class FakeClock:
    def now(self) -> Instant:
        return START


class FakeMemory:
    def __init__(self) -> None:
        self.documents: list[dict[str, Any]] = []

    async def write(self, document: dict[str, Any] | None, events: object) -> None:
        if document is not None:
            self.documents.append(document)


def a_keeper(epoch: int = 0) -> Keeper:
    state = SwitchState(since=WALL, epoch=epoch)
    switch = Switch(name="s", mode=Mode.ACTIVE, state=state, policies=Policies())
    return Keeper(
        switch=switch, clock=FakeClock(), document=lambda state, now: {"epoch": state.epoch, "state": state.state}
    )


class Scripted(Recollection):
    """Answers what it is told, in order, and the last for ever; waits at None until released."""

    def __init__(self, keeper: Keeper, *answers: Record | SourceError | None, timeout: float = 5.0) -> None:
        super().__init__(
            switch="s",
            lookback=86_400.0,
            started=START,
            clock=FakeClock(),
            servers=lambda: Prometheus(urls=("http://127.0.0.1:1",), timeout=timeout),
            keeper=keeper,
        )
        self.answers = list(answers)
        self.asked = 0
        self.release = asyncio.Event()

    async def ask(self) -> Record:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            await self.release.wait()
            return await self.ask()
        if isinstance(answer, SourceError):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recollection, "ASK_AGAIN_SECONDS", 0.0)


def operator_kill() -> Kill:
    return Kill(cause=Cause(code=CauseCode.OPERATOR, reason="stop", time=WALL))


def codes(keeper: Keeper) -> list[CauseCode]:
    return [cause.code for cause in keeper.switch.state.causes]


def killed_record(epoch: int = 17) -> Record:
    sighting = Sighting(time=WALL - 60, state=State.KILLED, restriction=Restriction.HALT)
    return Record(sightings=(sighting,), highest_epoch=epoch)


# Nothing stored


async def test_the_question_is_repeated_until_it_is_answered():
    told: list[str] = []
    asked = Scripted(a_keeper(), SILENT, SILENT, Record(highest_epoch=3))
    assert await asked.recall(told.append) == Record(highest_epoch=3)
    assert told == ["nobody there", "nobody there"]


async def test_a_kill_ends_the_wait_for_an_answer():
    keeper = a_keeper()
    asked = Scripted(keeper, None, SILENT)
    waiting = asyncio.create_task(asked.recall(lambda _: None))
    await asyncio.sleep(0)
    assert not waiting.done()
    keeper.apply(operator_kill())
    assert await waiting is None


async def test_a_kill_from_before_the_question_ends_it_too():
    keeper = a_keeper()
    asked = Scripted(keeper, SILENT)
    keeper.apply(operator_kill())
    assert await asked.recall(lambda _: None) is None


async def test_catching_up_goes_on_from_the_last_epoch_and_adds_what_was_seen():
    keeper = a_keeper(epoch=1)
    keeper.apply(operator_kill())
    await Scripted(keeper, SILENT, killed_record()).catch_up()
    assert codes(keeper) == [CauseCode.OPERATOR, CauseCode.RESTORED]
    assert keeper.switch.state.epoch > 17


async def test_catching_up_kills_nobody_who_was_recovered_meanwhile_but_stores_the_epoch():
    keeper, memory = a_keeper(epoch=5), FakeMemory()
    keeper.attach(memory, keeper.switch.state)
    await Scripted(keeper, killed_record()).catch_up()
    writer = asyncio.create_task(keeper.run())
    assert await keeper.settled(5.0)
    writer.cancel()
    assert keeper.switch.state.state is State.ACTIVE
    assert memory.documents[-1]["epoch"] > 17


async def test_without_any_server_left_there_is_no_answer_rather_than_no_record():
    asked = Recollection(
        switch="s",
        lookback=1.0,
        started=START,
        clock=FakeClock(),
        servers=lambda: Prometheus(urls=()),
        keeper=a_keeper(),
    )
    with pytest.raises(SourceError, match=r"prometheus\.urls is empty"):
        await asked.ask()


def fresh_start(epoch: int = 0) -> Start:
    state = SwitchState(since=WALL, epoch=epoch)
    return Start(state=state, triggers={}, lockouts=Lockouts(), fresh=True)


def test_a_start_without_record_stays_a_first_start():
    start = start_from_record(fresh_start(), Record(), START, Policies())
    assert (start.state, start.fresh, start.note) == (fresh_start().state, True, "")


def test_the_higher_epoch_of_audit_and_record_counts():
    assert start_from_record(fresh_start(9), Record(highest_epoch=4), START, Policies()).state.epoch == 9
    assert start_from_record(fresh_start(4), Record(highest_epoch=9), START, Policies()).state.epoch == 9


def test_a_kill_in_the_record_wins_over_an_audit_that_ends_active():
    start = start_from_record(fresh_start(4), killed_record(), START, Policies())
    assert (start.state.state, start.state.epoch, start.fresh) == (State.KILLED, 18, False)
    assert "2023-11-14T22:12:20.000Z" in start.note
    assert "2023-11-14T22:12:20.000Z" in start.state.causes[0].reason


# Something stored


async def checked(keeper: Keeper, asked: Scripted, stored: int) -> list[State]:
    """Run the check to its end; the states that were in force whenever the gate was let go."""
    states: list[State] = []
    asked.checking = CHECKING

    def note() -> None:
        assert asked.checking is None
        states.append(keeper.switch.state.state)

    await asked.check(stored, note)
    return states


@pytest.mark.parametrize("epoch", [None, 0, 16, 17])
async def test_an_epoch_that_is_not_higher_changes_nothing(epoch: int | None):
    keeper = a_keeper(epoch=17)
    assert await checked(keeper, Scripted(keeper, Record(highest_epoch=epoch)), 17) == [State.ACTIVE]
    assert keeper.switch.state.epoch == 17


async def test_a_higher_epoch_kills_before_the_gate_is_let_go_and_is_passed():
    keeper = a_keeper(epoch=16)
    assert await checked(keeper, Scripted(keeper, Record(highest_epoch=17)), 16) == [State.KILLED]
    assert codes(keeper) == [CauseCode.STATE_ROLLED_BACK]
    assert keeper.switch.state.epoch == 18
    assert keeper.switch.state.kill_restriction is Restriction.HALT


async def test_the_first_failure_lets_the_gate_go_and_a_later_answer_kills():
    keeper = a_keeper(epoch=16)
    assert await checked(keeper, Scripted(keeper, SILENT, SILENT, Record(highest_epoch=17)), 16) == [State.ACTIVE]
    assert codes(keeper) == [CauseCode.STATE_ROLLED_BACK]


async def test_a_server_that_hangs_holds_the_gate_for_one_timeout_only():
    keeper = a_keeper(epoch=16)
    asked = Scripted(keeper, None, Record(highest_epoch=17), timeout=0.01)
    asked.checking = CHECKING
    let_go = asyncio.Event()
    check = asyncio.create_task(asked.check(16, let_go.set))
    await let_go.wait()
    assert keeper.switch.state.state is State.ACTIVE
    asked.release.set()
    await check
    assert codes(keeper) == [CauseCode.STATE_ROLLED_BACK]


async def test_a_rollback_is_judged_by_what_was_stored_and_not_by_what_came_since():
    keeper = a_keeper(epoch=16)
    keeper.apply(operator_kill())
    keeper.apply(operator_kill())
    await checked(keeper, Scripted(keeper, Record(highest_epoch=17)), 16)
    assert codes(keeper)[-1] is CauseCode.STATE_ROLLED_BACK


# The reader, against a server that says what it is told

Answer = Callable[[dict[str, str]], tuple[int, Any]]
Serve = Callable[[Answer], Awaitable[str]]


def success(kind: str, result: Any, **more: Any) -> tuple[int, Any]:
    return 200, {"status": "success", "data": {"resultType": kind, "result": result}, **more}


def vector(value: object) -> tuple[int, Any]:
    return success("vector", [{"metric": {}, "value": [WALL, str(value)]}])


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    runners: list[web.AppRunner] = []

    async def started(answer: Answer) -> str:
        async def handle(request: web.Request) -> web.Response:
            form = dict(urllib.parse.parse_qsl(await request.text()))
            status, body = answer(form)
            return web.Response(status=status, text=json.dumps(body), content_type="application/json")

        app = web.Application()
        app.router.add_post("/api/v1/query", handle)
        runner = web.AppRunner(app)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    yield started
    for runner in runners:
        await runner.cleanup()


async def read(*urls: str, running: float = 10.0, lookback: float = 86_400.0) -> Record:
    reader = RecordReader(urls=urls, timeout=2.0, headers={}, http=None)
    return await reader.read('a"b', running=lambda: running, lookback=lookback)


def past(*, now: float = WALL, epoch: object = 5, at: float = WALL - 20, **wrong: Any) -> Answer:
    """A server with one KILLED sample at `at`; `wrong` answers the query that contains its key."""

    def answer(form: dict[str, str]) -> tuple[int, Any]:
        query = form["query"]
        for part, reply in wrong.items():
            if part in query:
                return reply  # type: ignore[no-any-return]
        if "time()" in query:
            assert "time" not in form
            return vector(now)
        assert float(form["time"]) <= now - 10.0
        assert 'switch="a\\"b"' in query
        if "epoch" in query:
            return vector(epoch)
        if "count(" in query:
            return success("matrix", [{"metric": {}, "values": [[at - at % 300 + 300, "1"]]}])
        labels = {"__name__": "killswitch_state", "state": "KILLED", "switch": 'a"b'}
        shown = [[at, "1"]] if float(form["time"]) - 600 < at <= float(form["time"]) else []
        return success("matrix", [{"metric": labels, "values": shown}])

    return answer


async def test_the_reader_finds_a_sample_in_the_newest_window(serve: Serve):
    record = await read(await serve(past()))
    assert record == Record(sightings=(Sighting(time=WALL - 20, state=State.KILLED),), highest_epoch=5)


async def test_the_reader_finds_an_old_sample(serve: Serve):
    record = await read(await serve(past(at=WALL - 40_000)))
    assert [sighting.time for sighting in record.sightings] == [WALL - 40_000]


async def test_the_start_is_counted_on_the_clock_of_the_server(serve: Serve):
    ahead = await read(await serve(past(now=WALL + 5000, at=WALL + 4980)))
    assert [sighting.time for sighting in ahead.sightings] == [WALL + 4980]


@pytest.mark.parametrize("epoch", ["NaN", "-1", "+Inf", "1e300"])
async def test_an_epoch_that_cannot_be_is_none(serve: Serve, epoch: str):
    assert (await read(await serve(past(epoch=epoch)))).highest_epoch is None


@pytest.mark.parametrize("part", ["time", "epoch", "killswitch_"])
@pytest.mark.parametrize(
    "reply",
    [
        (503, {}),
        (200, {"status": "error", "errorType": "execution", "error": "no"}),
        success("vector", [], warnings=["a store is down"]),
        success("matrix", [], warnings=["a store is down"]),
        success("string", []),
        success("vector", [{"metric": {}}]),
        success("matrix", [{"values": [[1, "1"]]}]),
    ],
)
async def test_half_an_answer_is_none(serve: Serve, part: str, reply: tuple[int, Any]):
    with pytest.raises(SourceError, match=r"127\.0\.0\.1"):
        await read(await serve(past(**{part: reply})))


async def test_all_servers_are_asked_and_one_that_is_down_does_not_hide_the_others(serve: Serve):
    empty = past(epoch=2, at=WALL - 1_000_000, count=success("matrix", []))
    record = await read("http://127.0.0.1:1", await serve(empty), await serve(past()))
    assert (len(record.sightings), record.highest_epoch) == (1, 5)


async def test_with_all_servers_down_each_is_named():
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:1.*127\.0\.0\.1:2"):
        await read("http://127.0.0.1:1", "http://127.0.0.1:2")
