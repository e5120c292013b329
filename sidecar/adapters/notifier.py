"""Pushes our own alerts to Alertmanagers, API v2: the whole picture at every change and now and then, never a history.

Because each push is the picture of its moment, a server that was away gets all it needs with the next one, and nothing
has to be queued for it. Knows nothing of switches: which alerts there are is somebody else's business.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import aiohttp

log = logging.getLogger("sidecar.notifier")

_MOST_ERROR_BYTES: Final = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnAlert:
    """One alert of ours.

    Attributes:
        labels: what it is known by.
        annotations: what people read.
        starts_at: Unix seconds.
        ends_at: Unix seconds when it was over; None while it holds.
    """

    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    starts_at: float
    ends_at: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How often and how long, in seconds.

    Attributes:
        resend: between two pushes of an unchanged picture; Alertmanager drops what is not sent for four times as long.
        timeout: of one request in all.
        first_retry, longest_retry: wait after a failure, doubled each time.
    """

    resend: float = 60.0
    timeout: float = 5.0
    first_retry: float = 1.0
    longest_retry: float = 30.0


class Notifier:
    """Keeps Alertmanagers up to date: `connect` it, `run` it, `show` it what there is.

    Args:
        pace: how often and how long.
        wall: the time in Unix seconds.
    """

    def __init__(self, *, pace: Pace | None = None, wall: Callable[[], float] = time.time) -> None:
        self._pace = pace or Pace()
        self._wall = wall
        self._urls: tuple[str, ...] = ()
        self._receivers: list[_Receiver] = []
        self._alerts: tuple[OwnAlert, ...] = ()
        self._moved = asyncio.Event()

    @property
    def problems(self) -> list[str]:
        """Which Alertmanagers do not take our alerts, and why."""
        return [one.problem for one in self._receivers if one.problem is not None]

    def connect(self, urls: Sequence[str]) -> None:
        """Push to these from now on; none at all is fine."""
        if tuple(urls) != self._urls:
            self._urls = tuple(urls)
            self._moved.set()

    def show(self, alerts: Sequence[OwnAlert], *, at_once: bool = True) -> None:
        """Push this picture now, or else when the next push is due, and again while it holds. Returns at once."""
        self._alerts = tuple(alerts)
        if at_once:
            for one in self._receivers:
                one.changed.set()

    async def run(self) -> None:
        """Push for ever."""
        timeout = aiohttp.ClientTimeout(total=self._pace.timeout)
        async with aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()) as session:
            while True:
                self._moved.clear()
                try:
                    await self._serve(session)
                except Exception:
                    # A defect here must not stop trading, which the end of this task would.
                    log.exception("notify.defect")
                    await asyncio.sleep(self._pace.longest_retry)

    async def _serve(self, session: aiohttp.ClientSession) -> None:
        """Push to the present Alertmanagers until there are others."""
        self._receivers = [_Receiver(url) for url in dict.fromkeys(self._urls)]
        tasks = [asyncio.create_task(self._feed(one, session), name=f"notify {one.url}") for one in self._receivers]
        moved = asyncio.create_task(self._moved.wait(), name="notify moved")
        try:
            done, _ = await asyncio.wait([*tasks, moved], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # a receiver's task never ends but by a defect
        finally:
            for task in (*tasks, moved):
                task.cancel()
            await asyncio.gather(*tasks, moved, return_exceptions=True)

    async def _feed(self, receiver: "_Receiver", session: aiohttp.ClientSession) -> None:
        retry = self._pace.first_retry
        while True:
            receiver.changed.clear()
            if not self._alerts or await receiver.push(session, self._payload()):
                retry = self._pace.first_retry
                await _wait(receiver.changed, self._pace.resend)
            else:
                # News do not cut the wait short: a server that is down is not asked more often because much happens.
                await asyncio.sleep(retry)
                retry = min(retry * 2, self._pace.longest_retry)

    def _payload(self) -> bytes:
        until = self._wall() + 4 * self._pace.resend
        return json.dumps([_document(alert, until) for alert in self._alerts]).encode()


class _Receiver:
    """One Alertmanager."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.changed = asyncio.Event()
        self.problem: str | None = None
        self._target = url.rstrip("/") + "/api/v2/alerts"

    async def push(self, session: aiohttp.ClientSession, body: bytes) -> bool:
        """Send one picture; False where it did not get there."""
        error = await self._post(session, body)
        problem = None if error is None else f"alerts are not taken by {self.url}: {error}"
        if (problem is None) is not (self.problem is None):
            if problem is None:
                log.info("notify.recovered", extra={"fields": {"url": self.url}})
            else:
                log.warning("notify.failed", extra={"fields": {"url": self.url, "error": error}})
        self.problem = problem
        return problem is None

    async def _post(self, session: aiohttp.ClientSession, body: bytes) -> str | None:
        try:
            headers = {"Content-Type": "application/json"}
            async with session.post(self._target, data=body, headers=headers, allow_redirects=False) as response:
                if 200 <= response.status < 300:
                    return None
                said = (await response.content.read(_MOST_ERROR_BYTES)).decode("utf-8", "replace")
                return f"HTTP {response.status} {said}".strip()
        except TimeoutError:
            return "no answer in time"
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: a host that cannot be encoded
            return str(error) or type(error).__name__


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _document(alert: OwnAlert, until: float) -> dict[str, Any]:
    return {
        "labels": dict(alert.labels),
        "annotations": dict(alert.annotations),
        "startsAt": _time(alert.starts_at),
        "endsAt": _time(until if alert.ends_at is None else alert.ends_at),
    }


def _time(wall: float) -> str:
    return datetime.fromtimestamp(wall, tz=UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
