"""Tries to reach a venue or a price feed: a TCP connection, or an HTTP request.

An attempt that fails is the very thing looked for, so it is an answer of 0 and not a failure to answer. How many in a
row matter is for `sidecar.rules` to judge. Sends nothing that a venue could act on, and reads no body.
"""

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from sidecar.core.errors import InvariantViolation
from sidecar.rules.model import Connectivity, Rule
from sidecar.rules.readings import Answer, Failure, Series

log = logging.getLogger("sidecar.probes")

UP = 1.0
DOWN = 0.0

Lookup = Callable[[str], list[tuple[socket.AddressFamily, str]]]
"""Finds the addresses of a host name; may block, and raises OSError or UnicodeError where there are none."""


class ConnectivityProbes:
    """Answers connectivity rules that have a probe.

    Args:
        wall: Unix seconds.
        lookup: finds addresses; None asks the system's resolver.
    """

    def __init__(self, *, wall: Callable[[], float] = time.time, lookup: Lookup | None = None) -> None:
        self._wall = wall
        self._names = _Names(lookup or _system_lookup)
        self._session: aiohttp.ClientSession | None = None
        self._down: dict[str, str] = {}

    async def probe(self, rule: Rule) -> Answer | Failure:
        """Try once, within the rule's timeout in all: name, connection, handshake and answer.

        Returns:
            One series: 1 where the venue was reached, 0 where it was not, for whatever reason.

        Raises:
            InvariantViolation: the rule is of another type, or asks a query.
        """
        condition = rule.condition
        if not isinstance(condition, Connectivity) or (condition.tcp is None and condition.http is None):
            raise InvariantViolation(f"rule {rule.trigger!r} of type {rule.kind} has no probe to try")
        if condition.tcp is not None:
            attempt = self._connect(condition.tcp, condition.timeout)
        else:
            attempt = self._request(condition.http or "")
        error = await _error_of(attempt, condition.timeout)
        self._tell(rule.trigger, error)
        at = self._wall()
        return Answer(series=(Series(value=DOWN if error else UP),), evaluated_at=at, oldest_sample=at)

    async def close(self) -> None:
        """Let go of the HTTP session; a later probe makes a new one."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _connect(self, address: str, timeout: float) -> None:  # noqa: ASYNC109 - a share of it for each address
        host, _, port = address.rpartition(":")
        found = await self._names.addresses(host.strip("[]"))
        # An address that swallows packets must not eat the time of the others: one dead route is not a dead venue.
        share = timeout / len(found)
        problem: Exception | None = None
        for family, ip in found:
            try:
                async with asyncio.timeout(share):
                    return await _touch(family, ip, int(port))
            except (OSError, TimeoutError) as error:
                problem = error
        raise problem or InvariantViolation(f"the look-up of {host!r} gave an empty list")

    async def _request(self, url: str) -> None:
        # The body stays unread and the connection is never used again: an endless answer costs its headers.
        response = await self._http().get(url, allow_redirects=False)
        response.close()
        if not 200 <= response.status < 400:
            raise OSError(f"HTTP status {response.status}")

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(resolver=_Resolver(self._names), use_dns_cache=False, force_close=True)
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": "killswitch-sidecar", "Accept": "*/*"},
                timeout=aiohttp.ClientTimeout(total=None),  # each probe has its own, around all of it
            )
        return self._session

    def _tell(self, trigger: str, error: str) -> None:
        # Once on the way down and once on the way up: the trigger's status tells the rest.
        if error and trigger not in self._down:
            log.warning("probe.down", extra={"fields": {"trigger": trigger, "error": error}})
            self._down[trigger] = error
        elif not error and self._down.pop(trigger, None) is not None:
            log.info("probe.up", extra={"fields": {"trigger": trigger}})


async def _error_of(attempt: Awaitable[None], timeout: float) -> str:  # noqa: ASYNC109 - the one place that applies it
    try:
        async with asyncio.timeout(timeout):
            await attempt
    except TimeoutError:
        return f"no answer within {timeout:g} s"
    # ValueError: a name that cannot be encoded, a URL without a host, a status line that is no status line.
    except (OSError, aiohttp.ClientError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


async def _touch(family: socket.AddressFamily, ip: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(asyncio.Protocol, ip, port, family=family)
    transport.close()


class _Names:
    """Finds addresses in threads of its own, one a name at most.

    A resolver that hangs cannot be interrupted. In the loop's own pool a few of them would hold up everything else that
    runs there, and one dead name would make all other venues look dead.
    """

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._pending: dict[str, asyncio.Future[list[tuple[socket.AddressFamily, str]]]] = {}

    async def addresses(self, host: str) -> list[tuple[socket.AddressFamily, str]]:
        """Find the addresses of a name; whoever asks while it is being looked up waits for the same look.

        Raises:
            OSError: there are none.
            UnicodeError: it is no host name.
        """
        pending = self._pending.get(host)
        if pending is None:
            pending = self._start(host)
        return await asyncio.shield(pending)

    def _start(self, host: str) -> "asyncio.Future[list[tuple[socket.AddressFamily, str]]]":
        loop = asyncio.get_running_loop()
        pending: asyncio.Future[list[tuple[socket.AddressFamily, str]]] = loop.create_future()

        def done(found: list[tuple[socket.AddressFamily, str]] | Exception) -> None:
            self._pending.pop(host, None)
            if isinstance(found, Exception):
                pending.set_exception(found)
                pending.exception()  # seen: whoever asked may have run out of time
            else:
                pending.set_result(found)

        def work() -> None:
            found: list[tuple[socket.AddressFamily, str]] | Exception
            try:
                found = self._lookup(host) or OSError(f"{host!r} has no address")
            except Exception as error:  # noqa: BLE001 - carried to whoever waits
                found = error
            with contextlib.suppress(RuntimeError):  # the loop is gone, and with it whoever asked
                loop.call_soon_threadsafe(done, found)

        self._pending[host] = pending
        try:
            threading.Thread(target=work, name=f"lookup {host}", daemon=True).start()
        except RuntimeError as error:  # no more threads to be had
            done(OSError(f"no thread could be started: {error}"))
        return pending


def _system_lookup(host: str) -> list[tuple[socket.AddressFamily, str]]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


class _Resolver(AbstractResolver):
    """The same names for HTTP."""

    def __init__(self, names: _Names) -> None:
        self._names = names

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        return [
            ResolveResult(hostname=host, host=ip, port=port, family=found, proto=0, flags=socket.AI_NUMERICHOST)
            for found, ip in await self._names.addresses(host)
            if family in (socket.AF_UNSPEC, found)
        ]

    async def close(self) -> None:
        return None
