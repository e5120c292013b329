"""Direct scraping of an exposition endpoint: the shortest way from a trader's own metrics to a rule.

Keeps the samples of the latest scrape and answers from them, so that asking costs nothing and waits for nothing. A
scrape that failed is not an old scrape that is still good: until the next good one every answer is a failure.
"""

import asyncio
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sidecar.rules.readings import Answer, Failure, Series
from sidecar.settings.http_config import split_userinfo
from sidecar.settings.promql import Aggregation, ScrapeQuery

MAX_BODY_BYTES: Final = 4 * 1024 * 1024
"""Largest exposition that is read; a trading process exports a few hundred KiB at most."""

INLINE_PARSE_BYTES: Final = 8 * 1024
"""Larger expositions are parsed in a thread: the parser is plain Python and takes about 1 ms for this much."""

_CHUNK_BYTES: Final = 64 * 1024
_ACCEPT: Final = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
_NOT_SERVING_STATUS: Final = frozenset({502, 503, 504})
_NEVER_METRICS: Final = frozenset({"text/html", "application/json"})  # exporters err in this header, but not like that


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    labels: Mapping[str, str]
    value: float
    timestamp: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scrape:
    """One good scrape: its samples by name, and the moment it began by both clocks."""

    samples: Mapping[str, tuple[_Sample, ...]]
    wall: float
    monotonic: float


class _Garbage(Exception):  # noqa: N818 - stays inside this module
    """The body is no exposition."""


class ScrapeSource:
    """One exposition endpoint, scraped again and again.

    The age of an answer is measured by the monotonic clock from the start of its scrape, so that a step of the wall
    clock neither hides nor invents an old sample. Where the exposition carries its own timestamps those count.

    Args:
        name: as in the configuration.
        url: of the exposition; user and password in it are sent as basic auth and never shown.
        interval: seconds from the start of one scrape to the start of the next.
        timeout: seconds for a whole scrape, connecting and a slow body included.
        wall: gives Unix seconds.
        monotonic: gives seconds that never go back.
    """

    def __init__(
        self,
        *,
        name: str,
        url: str,
        interval: float,
        timeout: float,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._url, self._authorization = split_userinfo(url)
        self._interval = interval
        self._timeout = timeout
        self._wall = wall
        self._monotonic = monotonic
        self._latest: _Scrape | Failure = self._unreachable("not scraped yet")
        self._tried = False

    @property
    def up(self) -> bool:
        """Whether the latest scrape was good; False before the first."""
        return isinstance(self._latest, _Scrape)

    @property
    def tried(self) -> bool:
        """Whether a scrape has ended, well or not: before that there is no answer, and nothing is down either."""
        return self._tried

    async def run(self) -> None:
        """Scrape at every interval until cancelled; a scrape that takes longer skips the intervals it missed."""
        loop = asyncio.get_running_loop()
        async with _new_session() as session:
            due = loop.time()
            while True:
                await self.scrape(session)
                missed = max(math.floor((loop.time() - due) / self._interval), 0)
                due += self._interval * (missed + 1)
                await asyncio.sleep(due - loop.time())

    async def scrape(self, session: aiohttp.ClientSession) -> None:
        """Scrape once; a fault of the endpoint becomes what `query()` answers, never an exception."""
        wall, monotonic = self._wall(), self._monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                outcome = await self._fetch(session)
        except TimeoutError:
            outcome = self._unreachable(f"no complete exposition within {self._timeout:g} s", reason="timeout")
        except aiohttp.ClientPayloadError as exc:
            outcome = self._failed("bad_response", f"the exposition broke off: {exc}")
        except (aiohttp.ClientResponseError, aiohttp.InvalidURL) as exc:
            outcome = self._failed("bad_response", f"the answer is not HTTP: {type(exc).__name__}")
        except _Garbage as exc:
            outcome = self._failed("bad_response", f"not an exposition: {exc}")
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            outcome = self._unreachable(str(exc) or type(exc).__name__)
        self._tried = True
        if isinstance(outcome, Failure):
            self._latest = outcome
        else:
            self._latest = _Scrape(samples=outcome, wall=wall, monotonic=monotonic)

    def query(self, query: ScrapeQuery) -> Answer | Failure:
        """Answer from the latest scrape, without I/O; no match is an answer without series.

        An aggregation over a NaN is NaN, unlike in PromQL: a drawdown that is not a number must not hide behind
        another that is.
        """
        latest = self._latest
        if isinstance(latest, Failure):
            return latest
        matching = [
            sample
            for sample in latest.samples.get(query.metric, ())
            if all(matcher.matches(sample.labels) for matcher in query.matchers)
        ]
        times = [latest.wall if sample.timestamp is None else sample.timestamp for sample in matching]
        return Answer(
            series=_aggregated(query.aggregation, query.metric, matching),
            evaluated_at=latest.wall + (self._monotonic() - latest.monotonic),
            oldest_sample=min(times, default=None),
        )

    async def _fetch(self, session: aiohttp.ClientSession) -> Mapping[str, tuple[_Sample, ...]] | Failure:
        headers = {"Accept": _ACCEPT, "Accept-Encoding": "identity"}
        if self._authorization:
            headers["Authorization"] = self._authorization
        # A dropped keep-alive connection is retried by aiohttp itself: GET is idempotent.
        async with session.get(self._url, headers=headers, allow_redirects=False) as response:
            if response.status != 200:
                return self._http_error(response.status)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                return self._failed("bad_response", "the exposition is compressed, which was not asked for")
            if response.content_type in _NEVER_METRICS:
                return self._failed("bad_response", f"answered {response.content_type}, not an exposition")
            body = await _read(response)
            if body is None:
                return self._failed("too_large", f"the exposition is larger than {MAX_BODY_BYTES} bytes")
            openmetrics = response.content_type == "application/openmetrics-text"
            work = functools.partial(_parsed, body, openmetrics=openmetrics)
            return work() if len(body) <= INLINE_PARSE_BYTES else await asyncio.to_thread(work)

    def _http_error(self, status: int) -> Failure:
        if status in _NOT_SERVING_STATUS:
            return self._unreachable(f"HTTP {status}")
        hint = " (a redirect is not followed)" if 300 <= status < 400 else ""
        return self._failed("http_error", f"HTTP {status}{hint}")

    def _failed(self, reason: str, message: str) -> Failure:
        return Failure(reason=reason, message=f"{self._url}: {message}", unreachable=False)

    def _unreachable(self, message: str, *, reason: str = "unreachable") -> Failure:
        return Failure(reason=reason, message=f"{self._url}: {message}", unreachable=True)


def _new_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        auto_decompress=False,  # asked for uncompressed: the limit on the body is then a limit on memory
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),  # each scrape has a deadline of its own
    )


async def _read(response: aiohttp.ClientResponse) -> bytes | None:
    """Read the body; None as soon as it is longer than the limit, and the connection is dropped."""
    body = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            response.close()
            return None
    return bytes(body)


def _parsed(body: bytes, *, openmetrics: bool) -> Mapping[str, tuple[_Sample, ...]]:
    """Parse an exposition into samples by name.

    Raises:
        _Garbage: anything that the parser cannot take; half an exposition is none.
    """
    found: dict[str, list[_Sample]] = {}
    parse = parse_openmetrics if openmetrics else parse_text
    try:
        for family in parse(body.decode("utf-8")):
            for one in family.samples:
                sample = _Sample(labels=dict(one.labels), value=float(one.value), timestamp=_moment(one.timestamp))
                found.setdefault(one.name, []).append(sample)
    except Exception as exc:  # the parser raises whatever its string handling stumbles over
        raise _Garbage(f"{type(exc).__name__}: {str(exc)[:200]}") from exc
    return {name: tuple(samples) for name, samples in found.items()}


def _moment(stamp: Any) -> float | None:
    if stamp is None:
        return None
    seconds = float(stamp)
    if not math.isfinite(seconds):  # no comparison with NaN is ever true: such a sample would never be too old
        raise ValueError(f"timestamp {stamp!r} is not a time")
    return seconds


def _aggregated(aggregation: Aggregation | None, metric: str, samples: Iterable[_Sample]) -> tuple[Series, ...]:
    if aggregation is None:
        return tuple(Series(labels={"__name__": metric, **sample.labels}, value=sample.value) for sample in samples)
    values = [sample.value for sample in samples]
    if not values:
        return ()
    return (Series(value=_combined(aggregation, values)),)


def _combined(aggregation: Aggregation, values: list[float]) -> float:
    if any(math.isnan(value) for value in values):
        return math.nan
    match aggregation:
        case "min":
            return min(values)
        case "max":
            return max(values)
        case "sum":
            return math.fsum(values) if all(math.isfinite(value) for value in values) else sum(values)
