"""Pushing our alerts: against a real local server that can refuse, hang and be away."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from sidecar.adapters.notifier import Notifier, OwnAlert, Pace

WALL = 1_700_000_000.0
QUICK = Pace(resend=60.0, timeout=0.2, first_retry=0.01, longest_retry=0.02)


def alert(name: str = "KillswitchKilled", *, ends: float | None = None) -> OwnAlert:
    return OwnAlert(
        labels={"alertname": name, "killswitch_origin": "sidecar"},
        annotations={"summary": "stopped"},
        starts_at=WALL - 5.0,
        ends_at=ends,
    )


class Receiver:
    """An Alertmanager as far as we see it."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.status = 200
        self.hangs = False
        self.asked = 0
        self.url = ""
        self._arrived = asyncio.Event()

    async def take(self, request: web.Request) -> web.Response:
        self.asked += 1
        body = await request.json()
        if self.hangs:
            await asyncio.sleep(30)
        if self.status == 200:
            self.bodies.append(body)
        self._arrived.set()
        return web.Response(status=self.status, text="no thanks" if self.status != 200 else "")

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not holds():
                self._arrived.clear()
                await self._arrived.wait()

    def names(self) -> list[list[str]]:
        return [[one["labels"]["alertname"] for one in body] for body in self.bodies]


@pytest.fixture
async def serve() -> AsyncIterator[Any]:
    runners: list[web.AppRunner] = []

    async def serve() -> Receiver:
        receiver = Receiver()
        app = web.Application()
        app.router.add_post("/am/api/v2/alerts", receiver.take)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        runners.append(runner)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}/am/"
        return receiver

    yield serve
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def notify() -> AsyncIterator[Any]:
    tasks: list[asyncio.Task[None]] = []

    def notify(*urls: str, pace: Pace = QUICK) -> Notifier:
        notifier = Notifier(pace=pace, wall=lambda: WALL)
        notifier.connect(urls)
        tasks.append(asyncio.create_task(notifier.run()))
        return notifier

    yield notify
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_an_alert_arrives_at_every_alertmanager_under_its_path(serve: Any, notify: Any) -> None:
    one, other = await serve(), await serve()
    notifier = notify(one.url, other.url, one.url)
    await turns()
    notifier.show([alert()])
    await one.until(lambda: len(one.bodies) == 1)
    await other.until(lambda: len(other.bodies) == 1)
    assert one.bodies == other.bodies
    assert one.bodies[0] == [
        {
            "labels": {"alertname": "KillswitchKilled", "killswitch_origin": "sidecar"},
            "annotations": {"summary": "stopped"},
            "startsAt": "2023-11-14T22:13:15.000Z",
            "endsAt": "2023-11-14T22:17:20.000Z",
        }
    ]


async def test_one_that_is_over_says_when(serve: Any, notify: Any) -> None:
    receiver = await serve()
    notifier = notify(receiver.url)
    notifier.show([alert(ends=WALL - 1.0)])
    await receiver.until(lambda: receiver.bodies != [])
    assert receiver.bodies[0][0]["endsAt"] == "2023-11-14T22:13:19.000Z"


async def test_what_holds_is_sent_again(serve: Any, notify: Any) -> None:
    receiver = await serve()
    notify(receiver.url, pace=Pace(resend=0.01)).show([alert()])
    await receiver.until(lambda: len(receiver.bodies) >= 3)


async def test_words_that_change_are_sent_when_the_next_push_is_due(serve: Any, notify: Any) -> None:
    receiver = await serve()
    notifier = notify(receiver.url, pace=Pace(resend=0.3))
    notifier.show([alert("A")])
    await receiver.until(lambda: len(receiver.bodies) == 1)
    notifier.show([alert("B")], at_once=False)
    await asyncio.sleep(0.05)
    assert receiver.names() == [["A"]]
    await receiver.until(lambda: ["B"] in receiver.names())


async def test_nothing_is_sent_while_there_is_nothing_to_say(serve: Any, notify: Any) -> None:
    receiver = await serve()
    notifier = notify(receiver.url, pace=Pace(resend=0.005))
    await asyncio.sleep(0.05)
    assert receiver.asked == 0
    notifier.show([alert()])
    await receiver.until(lambda: receiver.asked > 0)


async def test_without_alertmanagers_nothing_happens(notify: Any) -> None:
    notifier = notify()
    await turns()
    notifier.show([alert()])
    assert notifier.problems == []


@pytest.mark.parametrize("fault", ["refuses", "hangs"])
async def test_one_that_fails_gets_the_newest_picture_when_it_is_back_and_is_logged_once(
    serve: Any, notify: Any, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    receiver = await serve()
    receiver.status, receiver.hangs = (500, False) if fault == "refuses" else (200, True)
    caplog.set_level(logging.INFO, "sidecar.notifier")
    notifier = notify(receiver.url)
    notifier.show([alert("Old")])
    async with asyncio.timeout(5):
        while receiver.asked < 3:  # noqa: ASYNC110 - a server that hangs tells nobody
            await asyncio.sleep(0.01)
    assert len(notifier.problems) == 1
    assert ("HTTP 500 no thanks" if fault == "refuses" else "no answer in time") in notifier.problems[0]
    notifier.show([alert("New")])
    receiver.status, receiver.hangs = 200, False
    await receiver.until(lambda: ["New"] in receiver.names())
    async with asyncio.timeout(5):
        while notifier.problems:  # noqa: ASYNC110 - the answer is on its way
            await asyncio.sleep(0)
    assert [record.message for record in caplog.records] == ["notify.failed", "notify.recovered"]


async def test_one_that_is_away_does_not_hold_up_the_others(serve: Any, notify: Any) -> None:
    receiver = await serve()
    notifier = notify("http://127.0.0.1:1", receiver.url)
    notifier.show([alert()])
    await receiver.until(lambda: receiver.bodies != [])


async def test_retries_wait_longer_each_time_up_to_a_bound(notify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    real_sleep = asyncio.sleep
    enough = asyncio.Event()

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 5:
            enough.set()
        await real_sleep(0)

    monkeypatch.setattr("sidecar.adapters.notifier.asyncio.sleep", sleep)
    notify("http://127.0.0.1:1", pace=Pace(first_retry=1.0, longest_retry=5.0)).show([alert()])
    async with asyncio.timeout(5):
        await enough.wait()
    assert waits[:5] == [1.0, 2.0, 4.0, 5.0, 5.0]


async def test_a_reload_moves_to_other_alertmanagers_with_all_there_is(serve: Any, notify: Any) -> None:
    old, new = await serve(), await serve()
    notifier = notify(old.url)
    notifier.show([alert()])
    await old.until(lambda: old.bodies != [])
    notifier.connect([old.url])
    notifier.connect([new.url])
    await new.until(lambda: new.bodies != [])
    notifier.show([alert("Later")])
    await new.until(lambda: ["Later"] in new.names())
    assert old.names() == [["KillswitchKilled"]]


async def test_a_redirect_is_not_followed(serve: Any, notify: Any) -> None:
    receiver = await serve()
    receiver.status = 307
    notifier = notify(receiver.url)
    notifier.show([alert()])
    await receiver.until(lambda: receiver.asked >= 2)
    assert "HTTP 307" in notifier.problems[0]


async def test_a_defect_is_logged_and_does_not_end_the_task(
    serve: Any, notify: Any, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = await serve()
    notifier = notify(receiver.url)
    broken = OwnAlert(labels={"a": object()}, annotations={}, starts_at=WALL)  # type: ignore[dict-item]
    notifier.show([broken])
    async with asyncio.timeout(5):
        while not caplog.records:  # noqa: ASYNC110 - a log line wakes nobody
            await asyncio.sleep(0.01)
    notifier.show([alert()])
    await receiver.until(lambda: receiver.bodies != [])
    assert caplog.records[0].message == "notify.defect"
