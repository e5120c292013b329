"""Probes against real local servers that answer, refuse, hang, drip and lie."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from sidecar.adapters.probes import ConnectivityProbes
from sidecar.core.errors import InvariantViolation
from sidecar.rules.model import Connectivity, OrderRate, Rule
from sidecar.rules.readings import Answer

WALL = 1_800_000_000.0
LOOPBACK = [(socket.AF_INET, "127.0.0.1")]

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
async def probes() -> AsyncIterator[ConnectivityProbes]:
    made = ConnectivityProbes(wall=lambda: WALL)
    yield made
    await made.close()


async def value(probes: ConnectivityProbes, condition: Connectivity) -> float:
    answer = await probes.probe(Rule(trigger="venue", group="g", condition=condition))
    assert isinstance(answer, Answer)
    assert answer.evaluated_at == answer.oldest_sample == WALL
    (one,) = answer.series
    return one.value


@asynccontextmanager
async def serving(serve: Serve, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[int]:
    closed: list[asyncio.StreamWriter] = []

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        closed.append(writer)
        try:
            await serve(reader, writer)
        except (ConnectionError, TimeoutError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(one, host, port)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for writer in closed:
            writer.transport.abort()
        await asyncio.sleep(0)


def answering(text: str) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(text.encode())
        await writer.drain()

    return serve


async def _accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def _hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.wait_for(reader.read(-1), 5)


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# TCP


async def test_a_port_that_accepts_is_up_and_one_that_refuses_is_down(
    probes: ConnectivityProbes, closed_port: int
) -> None:
    async with serving(_accept) as port:
        assert await value(probes, Connectivity(tcp=f"127.0.0.1:{port}")) == 1.0
    assert await value(probes, Connectivity(tcp=f"127.0.0.1:{closed_port}")) == 0.0


async def test_a_venue_that_comes_back_is_up_again(probes: ConnectivityProbes) -> None:
    async with serving(_accept) as port:
        condition = Connectivity(tcp=f"localhost:{port}")
        assert await value(probes, condition) == 1.0
    assert await value(probes, condition) == 0.0
    async with serving(_accept, port=port):
        assert await value(probes, condition) == 1.0


async def test_ipv6_addresses_are_written_in_brackets(probes: ConnectivityProbes) -> None:
    async with serving(_accept, host="::1") as port:
        assert await value(probes, Connectivity(tcp=f"[::1]:{port}")) == 1.0
    assert await value(probes, Connectivity(tcp=f"[::1]:{port}")) == 0.0


async def test_a_connection_is_given_up_after_the_timeout(probes: ConnectivityProbes) -> None:
    # A full backlog swallows packets, as a firewall does.
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        began = time.monotonic()
        assert await value(probes, Connectivity(tcp=f"127.0.0.1:{full.getsockname()[1]}", timeout=0.2)) == 0.0
        assert 0.15 < time.monotonic() - began < 2.0
        for filler in fillers:
            filler.close()


async def test_an_address_that_is_dead_does_not_make_the_venue_dead(closed_port: int) -> None:
    probes = ConnectivityProbes(lookup=lambda host: [(socket.AF_INET, "127.0.0.2"), *LOOPBACK])
    async with serving(_accept) as port:
        answer = await probes.probe(
            Rule(trigger="venue", group="g", condition=Connectivity(tcp=f"venue.example:{port}"))
        )
    assert isinstance(answer, Answer)
    assert answer.series[0].value == 1.0


# Names


def _no_such_name(host: str) -> list[tuple[socket.AddressFamily, str]]:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize("condition", [Connectivity(tcp="venue.example:443"), Connectivity(http="https://v.example/")])
async def test_a_name_without_an_address_is_down(condition: Connectivity) -> None:
    probes = ConnectivityProbes(wall=lambda: WALL, lookup=_no_such_name)
    assert await value(probes, condition) == 0.0
    await probes.close()


@pytest.mark.parametrize("condition", [Connectivity(tcp="venue.example:443"), Connectivity(http="http://v.example/")])
async def test_a_name_with_an_empty_answer_is_down(condition: Connectivity) -> None:
    probes = ConnectivityProbes(wall=lambda: WALL, lookup=lambda host: [])
    assert await value(probes, condition) == 0.0
    await probes.close()


@pytest.mark.parametrize("host", ["x" * 64 + ".example", "..", "a..b"])
async def test_a_name_that_is_none_is_down(probes: ConnectivityProbes, host: str) -> None:
    assert await value(probes, Connectivity(tcp=f"{host}:443")) == 0.0
    assert await value(probes, Connectivity(http=f"http://{host}:9/")) == 0.0


async def test_a_resolver_that_hangs_is_bounded_and_takes_one_thread_a_name() -> None:
    release = threading.Event()
    asked: list[str] = []

    def hang(host: str) -> list[tuple[socket.AddressFamily, str]]:
        asked.append(host)
        if host == "dead.example":
            release.wait(10)
        return list(LOOPBACK)

    probes = ConnectivityProbes(wall=lambda: WALL, lookup=hang)
    async with serving(answering("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as port:
        dead = Connectivity(tcp=f"dead.example:{port}", timeout=0.02)
        assert [await value(probes, dead) for _ in range(5)] == [0.0] * 5
        assert await value(probes, Connectivity(http=f"http://dead.example:{port}/", timeout=0.02)) == 0.0
        assert asked == ["dead.example"]
        # Another name is not held up, and the dead one is seen again once its resolver answers.
        assert await value(probes, Connectivity(tcp=f"alive.example:{port}")) == 1.0
        release.set()
        assert await value(probes, Connectivity(tcp=f"dead.example:{port}")) == 1.0
        assert await value(probes, Connectivity(http=f"http://alive.example:{port}/")) == 1.0
    await probes.close()


async def test_a_name_is_looked_up_anew_each_time() -> None:
    asked: list[str] = []

    def lookup(host: str) -> list[tuple[socket.AddressFamily, str]]:
        asked.append(host)
        return list(LOOPBACK)

    probes = ConnectivityProbes(wall=lambda: WALL, lookup=lookup)
    async with serving(answering("HTTP/1.1 204 No Content\r\n\r\n")) as port:
        for _ in range(2):
            assert await value(probes, Connectivity(http=f"http://venue.example:{port}/")) == 1.0
            assert await value(probes, Connectivity(tcp=f"venue.example:{port}")) == 1.0
    await probes.close()
    assert len(asked) == 4


async def test_a_failed_look_up_that_nobody_waits_for_any_more_leaves_no_trace() -> None:
    release = threading.Event()

    def hang(host: str) -> list[tuple[socket.AddressFamily, str]]:
        release.wait(10)
        return _no_such_name(host)

    probes = ConnectivityProbes(wall=lambda: WALL, lookup=hang)
    assert await value(probes, Connectivity(tcp="dead.example:1", timeout=0.01)) == 0.0
    release.set()
    with pytest.raises(OSError, match="not known"):
        await asyncio.wait_for(probes._names.addresses("dead.example"), 5)


async def test_no_thread_to_be_had_is_down(monkeypatch: pytest.MonkeyPatch, probes: ConnectivityProbes) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async with serving(_accept) as port:
        condition = Connectivity(tcp=f"localhost:{port}")
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            assert await value(probes, condition) == 0.0
        assert await value(probes, condition) == 1.0


# HTTP


@pytest.mark.parametrize(
    ("status", "up"),
    [(200, 1.0), (204, 1.0), (301, 1.0), (304, 1.0), (399, 1.0), (400, 0.0), (401, 0.0), (404, 0.0), (503, 0.0)],
)
async def test_success_and_redirection_are_up_and_all_else_is_down(
    probes: ConnectivityProbes, status: int, up: float
) -> None:
    async with serving(answering(f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n")) as port:
        assert await value(probes, Connectivity(http=f"http://127.0.0.1:{port}/health")) == up


async def test_a_redirection_is_not_followed(probes: ConnectivityProbes, closed_port: int) -> None:
    answer = f"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{closed_port}/\r\nContent-Length: 0\r\n\r\n"
    async with serving(answering(answer)) as port:
        assert await value(probes, Connectivity(http=f"http://127.0.0.1:{port}/")) == 1.0


async def test_the_request_is_a_plain_get_of_the_path_and_keeps_no_connection(probes: ConnectivityProbes) -> None:
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n")
        await reader.read()

    async with serving(serve) as port:
        for _ in range(2):
            assert await value(probes, Connectivity(http=f"http://127.0.0.1:{port}/health?deep=1")) == 1.0
    assert len(heads) == 2
    assert all(head.startswith(b"GET /health?deep=1 HTTP/1.1\r\n") for head in heads)
    assert all(b"cookie" not in head.lower() for head in heads)


async def test_an_endless_body_is_not_read(probes: ConnectivityProbes) -> None:
    written = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            written += 65536
            await writer.drain()

    async with serving(serve) as port:
        async with asyncio.timeout(5):
            assert await value(probes, Connectivity(http=f"http://127.0.0.1:{port}/")) == 1.0
    assert written < 50_000_000


async def _drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    for byte in b"HTTP/1.1 200 OK\r\n" + b"X" * 10_000:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.01)


async def _endless_headers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X-A: " + b"b" * 60_000 + b"\r\n")
        await writer.drain()


async def _break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")


@pytest.mark.parametrize(
    "serve",
    [_hang, _drip, _endless_headers, _break_off, answering("SSH-2.0-OpenSSH_9.2\r\n\r\n"), answering("HTTP/1.1 2\r\n")],
)
async def test_a_server_that_hangs_drips_floods_or_lies_is_down_in_bounded_time(
    probes: ConnectivityProbes, serve: Serve
) -> None:
    async with serving(serve) as port:
        began = time.monotonic()
        assert await value(probes, Connectivity(http=f"http://127.0.0.1:{port}/", timeout=0.3)) == 0.0
        assert time.monotonic() - began < 2.0


async def test_a_refused_connection_is_down_and_the_session_still_works(
    probes: ConnectivityProbes, closed_port: int
) -> None:
    assert await value(probes, Connectivity(http=f"http://127.0.0.1:{closed_port}/")) == 0.0
    async with serving(answering("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as port:
        assert await value(probes, Connectivity(http=f"http://127.0.0.1:{port}/")) == 1.0


async def test_plain_text_where_tls_was_wanted_is_down(probes: ConnectivityProbes) -> None:
    async with serving(answering("HTTP/1.1 200 OK\r\n\r\n")) as port:
        assert await value(probes, Connectivity(http=f"https://127.0.0.1:{port}/", timeout=1.0)) == 0.0


async def test_a_url_without_a_host_is_down(probes: ConnectivityProbes) -> None:
    assert await value(probes, Connectivity(http="http://")) == 0.0


# The rest


async def test_a_venue_going_down_and_up_is_logged_once_each(
    probes: ConnectivityProbes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="sidecar.probes")
    async with serving(_accept) as port:
        condition = Connectivity(tcp=f"127.0.0.1:{port}")
        await value(probes, condition)
    for _ in range(3):
        await value(probes, condition)
    async with serving(_accept, port=port):
        for _ in range(2):
            await value(probes, condition)
    assert [record.message for record in caplog.records] == ["probe.down", "probe.up"]


@pytest.mark.parametrize("condition", [OrderRate(), Connectivity(query="exchange_connected")])
async def test_a_rule_without_a_probe_is_our_own_mistake(
    probes: ConnectivityProbes, condition: OrderRate | Connectivity
) -> None:
    with pytest.raises(InvariantViolation, match="no probe"):
        await probes.probe(Rule(trigger="x", group="g", condition=condition))


async def test_closing_twice_or_before_any_probe_does_no_harm(probes: ConnectivityProbes) -> None:
    await probes.close()
    async with serving(answering("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as port:
        assert await value(probes, Connectivity(http=f"http://127.0.0.1:{port}/")) == 1.0
        await probes.close()
        assert await value(probes, Connectivity(http=f"http://127.0.0.1:{port}/")) == 1.0


async def test_cancelling_a_probe_cancels_it(probes: ConnectivityProbes) -> None:
    async with serving(_hang) as port:
        task = asyncio.create_task(value(probes, Connectivity(http=f"http://127.0.0.1:{port}/", timeout=60)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_probes_work_on_the_loop_that_the_sidecar_runs_on() -> None:
    import uvloop

    async def main() -> list[float]:
        probes = ConnectivityProbes(wall=lambda: WALL)
        async with serving(answering("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as port:
            seen = [
                await value(probes, Connectivity(tcp=f"localhost:{port}")),
                await value(probes, Connectivity(http=f"http://localhost:{port}/")),
            ]
        seen.append(await value(probes, Connectivity(tcp=f"localhost:{port}")))
        await probes.close()
        return seen

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == [1.0, 1.0, 0.0]
