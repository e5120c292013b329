"""Direct scraping against real local servers: what is answered, how old it is, and that a failed scrape is none."""

import asyncio
import math
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import generate_latest as plain_text
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_text

from sidecar.adapters.scrape import MAX_BODY_BYTES, ScrapeSource
from sidecar.rules.readings import Answer, Failure
from sidecar.settings.promql import parse_selector

PLAIN = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class Clocks:
    """Two clocks that only tests move, each by itself."""

    def __init__(self) -> None:
        self.wall, self.monotonic = 1_700_000_000.0, 50.0

    def pass_time(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


class Trader:
    """An exporter whose next reply is set by the test."""

    def __init__(self) -> None:
        self.reply: dict[str, Any] = {"text": "", "headers": {"Content-Type": PLAIN}}
        self.delay = 0.0
        self.requests: list[web.Request] = []
        self.connections: set[Any] = set()
        self.asked = asyncio.Event()

    async def asked_twice(self) -> None:
        """Wait until a scrape that began after this call is over, and the next one began."""
        for _ in range(2):
            self.asked.clear()
            async with asyncio.timeout(5):
                await self.asked.wait()

    def exports(self, text: str, content_type: str = PLAIN) -> None:
        self.reply = {"body": text.encode(), "headers": {"Content-Type": content_type}}

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        self.asked.set()
        assert request.transport is not None
        self.connections.add(request.transport.get_extra_info("peername"))
        await asyncio.sleep(self.delay)
        return web.Response(**self.reply)


@asynccontextmanager
async def serving(trader: Trader) -> AsyncIterator[str]:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await trader(request)

    app = web.Application()
    app.router.add_get("/metrics", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.05)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/metrics"
    finally:
        await runner.cleanup()


@pytest.fixture
def trader() -> Trader:
    return Trader()


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
async def source(trader: Trader, clocks: Clocks) -> AsyncIterator[ScrapeSource]:
    async with serving(trader) as url:
        yield source_for(url, clocks)


def source_for(url: str, clocks: Clocks, *, interval: float = 0.02, limit: float = 1.0) -> ScrapeSource:
    return ScrapeSource(
        name="trader", url=url, interval=interval, timeout=limit,
        wall=lambda: clocks.wall, monotonic=lambda: clocks.monotonic,
    )  # fmt: skip


async def scrape(source: ScrapeSource) -> None:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        await source.scrape(session)


def answer(source: ScrapeSource, query: str) -> Answer:
    found = source.query(parse_selector(query))
    assert isinstance(found, Answer), found
    return found


def failure(source: ScrapeSource) -> Failure:
    found = source.query(parse_selector("x"))
    assert isinstance(found, Failure), found
    return found


def values(source: ScrapeSource, query: str) -> list[float]:
    return [series.value for series in answer(source, query).series]


def test_before_the_first_scrape_there_is_no_answer(clocks: Clocks):
    source = source_for("http://127.0.0.1:1/metrics", clocks)
    assert (failure(source).reason, failure(source).unreachable, source.up) == ("unreachable", True, False)


async def test_it_was_tried_once_a_scrape_has_ended_well_or_not(source: ScrapeSource, clocks: Clocks):
    refused = source_for("http://127.0.0.1:1/metrics", clocks)
    for one in (source, refused):
        assert one.tried is False
        await scrape(one)
        assert one.tried is True


async def test_selectors_and_aggregations_are_answered(source: ScrapeSource, trader: Trader):
    trader.exports('x{pod="a"} 1\nx{pod="b"} -2\ny 7\n')
    await scrape(source)
    assert source.up is True
    assert values(source, "x") == [1.0, -2.0]
    assert values(source, 'x{pod="b"}') == [-2.0]
    assert values(source, 'x{pod=~"a|c"}') == [1.0]
    assert [values(source, f"{name}(x)") for name in ("min", "max", "sum")] == [[-2.0], [1.0], [-1.0]]
    assert dict(answer(source, 'x{pod="a"}').series[0].labels) == {"__name__": "x", "pod": "a"}
    assert dict(answer(source, "min(x)").series[0].labels) == {}


async def test_no_match_is_an_answer_without_series(source: ScrapeSource, trader: Trader):
    trader.exports("y 1\n")
    await scrape(source)
    for query in ("x", "min(x)", 'y{a="b"}'):
        found = answer(source, query)
        assert (found.series, found.oldest_sample) == ((), None)


async def test_an_aggregate_does_not_hide_what_is_not_a_number(source: ScrapeSource, trader: Trader):
    trader.exports('x{a="1"} NaN\nx{a="2"} 1\nz{a="1"} +Inf\nz{a="2"} 1\n')
    await scrape(source)
    assert all(math.isnan(values(source, f"{name}(x)")[0]) for name in ("min", "max", "sum"))
    assert values(source, "sum(z)") == [math.inf]


async def test_an_answer_grows_old_by_the_monotonic_clock(source: ScrapeSource, trader: Trader, clocks: Clocks):
    trader.exports("x 1\n")
    await scrape(source)
    clocks.pass_time(3.0)
    clocks.wall -= 3600.0
    found = answer(source, "x")
    assert found.oldest_sample is not None
    assert found.evaluated_at - found.oldest_sample == 3.0


async def test_timestamps_of_the_exposition_count(source: ScrapeSource, trader: Trader, clocks: Clocks):
    trader.exports(f'x{{a="1"}} 1 {int((clocks.wall - 20) * 1000)}\nx{{a="2"}} 1\n')
    await scrape(source)
    assert answer(source, "min(x)").oldest_sample == clocks.wall - 20
    assert answer(source, 'x{a="2"}').oldest_sample == clocks.wall


async def test_both_formats_of_the_real_library_are_read(source: ScrapeSource, trader: Trader):
    registry = CollectorRegistry()
    Gauge("drawdown", "Help with \\ and é", ["pod"], registry=registry).labels('a"b\\').set(-0.5)
    Counter("orders", "Orders", registry=registry).inc(3)
    for text, kind in ((plain_text(registry), PLAIN), (openmetrics_text(registry), OPENMETRICS)):
        trader.exports(text.decode(), kind)
        await scrape(source)
        assert values(source, "drawdown{pod='a\"b\\\\'}") == [-0.5]
        assert values(source, "orders_total") == [3.0]


async def test_a_large_exposition_is_read_too(source: ScrapeSource, trader: Trader):
    trader.exports("".join(f'x{{n="{n}"}} {n}\n' for n in range(2000)))
    await scrape(source)
    assert values(source, "max(x)") == [1999.0]


@pytest.mark.parametrize(
    ("reply", "reason", "unreachable"),
    [
        ({"status": 503}, "unreachable", True),
        ({"status": 500}, "http_error", False),
        ({"status": 302, "headers": {"Location": "/login"}}, "http_error", False),
        ({"text": "<html>\n</html>", "content_type": "text/html"}, "bad_response", False),
        ({"text": "<html>\n<body>log in</body></html>"}, "bad_response", False),
        ({"text": "x one\n"}, "bad_response", False),
        ({"text": 'x{a="b 1\n'}, "bad_response", False),
        ({"text": "x 1 NaN\n"}, "bad_response", False),
        ({"text": "x 1\ny\n"}, "bad_response", False),
        ({"body": b"x\xff 1\n"}, "bad_response", False),
        ({"body": b"x 1\n", "headers": {"Content-Type": OPENMETRICS}}, "bad_response", False),
        ({"body": b"\x1f\x8b", "headers": {"Content-Encoding": "gzip"}}, "bad_response", False),
        ({"body": b"#" * (MAX_BODY_BYTES + 1)}, "too_large", False),
    ],
)
async def test_a_scrape_that_went_wrong_is_a_failure_until_the_next_good_one(
    source: ScrapeSource, trader: Trader, reply: Any, reason: str, unreachable: bool
):
    trader.exports("x 1\n")
    await scrape(source)
    trader.reply = reply
    await scrape(source)
    assert (failure(source).reason, failure(source).unreachable, source.up) == (reason, unreachable, False)
    trader.exports("x 2\n")
    await scrape(source)
    assert values(source, "x") == [2.0]


async def test_a_slow_endpoint_times_out(source: ScrapeSource, trader: Trader):
    trader.delay = 5.0
    await scrape(source)
    assert (failure(source).reason, failure(source).unreachable) == ("timeout", True)


async def test_a_refused_connection_is_unreachable_and_no_password_is_shown(clocks: Clocks):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        source = source_for(f"http://me:hunter2@127.0.0.1:{probe.getsockname()[1]}/metrics", clocks)
        await scrape(source)
    assert (failure(source).reason, failure(source).unreachable) == ("unreachable", True)
    assert "hunter2" not in failure(source).message


async def test_running_scrapes_again_and_again_over_one_connection(trader: Trader, clocks: Clocks):
    async with serving(trader) as url:
        source = source_for(url.replace("http://", "http://u:p@"), clocks)
        task = asyncio.create_task(source.run())
        for number in range(3):
            trader.exports(f"x {number}\n")
            await trader.asked_twice()
            assert values(source, "x") == [float(number)]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert len(trader.connections) == 1
    assert trader.requests[0].headers["Authorization"] == "Basic dTpw"
