"""Who is asked together and who alone, and which of several servers: one call answers every query of a group.

Chunks of queries go out as one request each. If a chunk fails by a query's fault, or is late, its queries are asked
one by one, so that a broken or slow query costs only itself; from then on it is asked alone. Knows no rule and no HTTP.
"""

import asyncio
import functools
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import aiohttp

from sidecar.adapters.prometheus.batch import Envelope, MalformedResult, Query, compose, sort_out
from sidecar.adapters.prometheus.exchange import QUERY_FAULTS, Endpoint, is_final, off_the_loop
from sidecar.rules.readings import Answer, Failure
from sidecar.settings.http_config import HttpConfig

CHUNK_QUERIES: Final = 50
"""Queries in one request: larger chains cost the server more than the requests that they save."""

SINGLES_AT_ONCE: Final = 8
"""Queries asked alone at the same time: below Prometheus' own limit of 20, which others need too."""

GOOD_ANSWERS_TO_REJOIN: Final = 100
"""So many good answers in a row bring a query back among the others: one hiccup of a server must not last for ever."""

HANDED_ON_AT_ONCE: Final = 8
"""Outcomes handed on in one turn of the loop: evaluating a rule takes some 60 µs, and the gate cannot wait for all."""

MAX_REMEMBERED: Final = 1024
"""Texts of queries that go alone; the least recently asked is forgotten first, as one that no rule has any more."""

DIFFUSE_WARNINGS_SECONDS: Final = 30.0
"""Where most of a chunk carries warnings the server is the cause, and the next search for a culprit can wait."""

_BYTES_A_SERIES: Final = 100  # of JSON, roughly: decides whether sorting them out belongs in a thread

T = TypeVar("T")
Outcome = Answer | Failure
Outcomes = dict[str, Outcome]


Arrived = Callable[[str, Outcome], None]


@dataclass(kw_only=True, slots=True)
class _Round:
    """One call of `query()`: when it must end, what arrived, and what it learns."""

    deadline: float
    half_time: float
    arrived: Arrived | None
    answered: bool = False
    results: Outcomes = field(default_factory=dict)
    asked_alone: dict[str, Outcome] = field(default_factory=dict)
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(SINGLES_AT_ONCE))
    to_hand_on: deque[str] = field(default_factory=deque)
    handing_on: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def take(self, outcomes: Outcomes) -> None:
        """Keep the first outcome of each key and hand it on; whom a timeout blames is known only at the end."""
        fresh = {key: outcome for key, outcome in outcomes.items() if key not in self.results}
        self.results.update(fresh)
        await self._hand_on([key for key, outcome in fresh.items() if not _is_unreachable_timeout(outcome)])

    async def finish(self) -> None:
        """Blame the timeouts, and hand them on."""
        late = [key for key, outcome in self.results.items() if _is_unreachable_timeout(outcome)]
        self.results.update({key: _blame(self.results[key], self) for key in late})
        await self._hand_on(late)

    async def _hand_on(self, keys: Iterable[str]) -> None:
        # Through a queue, so that whoever is cancelled in the middle leaves the rest to the next, at last to finish().
        self.to_hand_on.extend(keys)
        # One at a time: several chunks that arrive together would otherwise take their shares of one and the same turn.
        async with self.handing_on:
            handed_on = 0
            while self.to_hand_on:
                key = self.to_hand_on.popleft()
                if self.arrived is not None:
                    self.arrived(key, self.results[key])
                handed_on += 1
                if handed_on % HANDED_ON_AT_ONCE == 0:
                    await asyncio.sleep(0)


class PrometheusSource:
    """Instant queries against one or more Prometheus servers that hold the same data.

    With several URLs the last good one is asked first. The next joins as soon as one has failed, or when its share of
    the time is over while the slow one may still answer; the first healthy answer wins. A call of `query()` takes at
    most `timeout` seconds, however many URLs, chunks and repetitions it needs.

    Attributes:
        up: whether the last call got an answer of the query API, if only "your query is wrong"; False before the first.
    """

    def __init__(
        self,
        *,
        urls: Sequence[str],
        timeout: float,
        headers: Mapping[str, str] | None = None,
        http: HttpConfig | None = None,
    ) -> None:
        if not urls:
            raise ValueError("PrometheusSource wants at least one URL")
        self._endpoints = [Endpoint(url, headers=headers or {}, http=http) for url in urls]
        self._preferred = 0
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None
        self._alone: OrderedDict[str, int] = OrderedDict()  # text -> good answers still wanted before it may rejoin
        self._diffuse_until = float("-inf")
        self.up = False

    async def query(self, queries: Sequence[Query], arrived: Arrived | None = None) -> Outcomes:
        """Ask all queries now; keys are unique among them.

        Args:
            queries: what to ask.
            arrived: called once for each key as soon as its outcome is there, so that a slow query delays no other;
                must not block.

        Returns:
            One outcome for each key, in the order of the queries. A fault of a source is a `Failure`, never an
            exception; cancellation passes.
        """
        now = _loop_time()
        round_ = _Round(deadline=now + self._timeout, half_time=now + self._timeout / 2, arrived=arrived)
        await round_.take({query.key: _wrong_type(query) for query in queries if not _is_askable(query)})
        askable = [query for query in queries if _is_askable(query)]
        if askable:
            await self._ask_all(askable, round_)
            self.up = round_.answered
            await round_.finish()
            self._learn(round_)
        return {query.key: round_.results[query.key] for query in queries}

    async def close(self) -> None:
        """Close the connections; the next query would open new ones."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def _ask_all(self, queries: Sequence[Query], round_: _Round) -> None:
        suspects = [query for query in queries if query.text in self._alone]
        others = [query for query in queries if query.text not in self._alone]
        chunks = [_in_turn(place, self._ask_chunk(chunk, round_)) for place, chunk in enumerate(_chunks(others))]
        async with _started(*chunks, *(self._ask_alone(query, round_) for query in suspects)) as tasks:
            await asyncio.gather(*tasks)

    async def _ask_chunk(self, chunk: Sequence[Query], round_: _Round) -> None:
        if len(chunk) == 1:
            await self._ask_alone(chunk[0], round_)
            return
        async with _started(self._ask(chunk, round_)) as (batch,):
            await asyncio.wait({batch}, timeout=max(round_.half_time - _loop_time(), 0.0))
            if batch.done() and not self._calls_for_singles(batch.result()):
                await round_.take(batch.result())
            else:
                await self._ask_one_by_one(chunk, batch, round_)

    def _calls_for_singles(self, outcomes: Outcomes) -> bool:
        if any(isinstance(outcome, Answer) and outcome.warnings for outcome in outcomes.values()):
            return _loop_time() >= self._diffuse_until
        return _has_failed_by_query(outcomes)

    async def _ask_one_by_one(self, chunk: Sequence[Query], batch: asyncio.Task[Outcomes], round_: _Round) -> None:
        late = not batch.done()
        async with _started(*(self._ask_alone(query, round_) for query in chunk)) as singles:
            waiting: set[asyncio.Task[Any]] = {*singles, batch} if late else set(singles)
            while not waiting.isdisjoint(singles):
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if late and batch in done and _is_whole(batch.result()):
                    await round_.take(batch.result())  # slow, but there: no need to wait for the singles
                    return
            await asyncio.gather(*singles)
        self._search_culprit(chunk, round_, failed=not late and _has_failed_by_query(batch.result()))

    def _search_culprit(self, chunk: Sequence[Query], round_: _Round, *, failed: bool) -> None:
        results = [round_.results[query.key] for query in chunk]
        warned = [query for query, outcome in zip(chunk, results, strict=True) if _has_warnings(outcome)]
        if len(warned) > len(chunk) // 2:
            self._diffuse_until = _loop_time() + DIFFUSE_WARNINGS_SECONDS
            for query in warned:
                round_.asked_alone.pop(query.text, None)
        elif failed and all(_is_good(outcome) for outcome in results):
            # Each is fine and all together are not (a proxy's limit, say): without this, every round would be two.
            for query in chunk:
                self._suspect(query.text)

    async def _ask_alone(self, query: Query, round_: _Round) -> None:
        try:
            async with asyncio.timeout_at(round_.deadline):
                await round_.turns.acquire()
        except TimeoutError:
            text = f"no turn within {self._timeout:g} s: {SINGLES_AT_ONCE} other queries took all the time"
            await round_.take({query.key: Failure(reason="timeout", message=text, unreachable=True)})
            return
        try:
            outcomes = await self._ask([query], round_)
        finally:
            round_.turns.release()
        round_.asked_alone[query.text] = outcomes[query.key]
        await round_.take(outcomes)

    async def _ask(self, queries: Sequence[Query], round_: _Round) -> Outcomes:
        outcome = await self._first_healthy(compose(queries), round_)
        if isinstance(outcome, Failure):
            round_.answered |= is_final(outcome)
            return {query.key: outcome for query in queries}
        try:
            size = len(outcome.result) * _BYTES_A_SERIES
            outcomes = await off_the_loop(size, functools.partial(sort_out, outcome, queries))
        except MalformedResult as exc:
            failure = Failure(reason="bad_response", message=str(exc), unreachable=False)
            return {query.key: failure for query in queries}
        round_.answered = True
        return outcomes

    async def _first_healthy(self, text: str, round_: _Round) -> Envelope | Failure:
        count = len(self._endpoints)
        to_come = [(self._preferred + step) % count for step in range(count)]
        share = max(round_.deadline - _loop_time(), 0.0) / count
        running: dict[asyncio.Task[Envelope | Failure], int] = {}
        failures: list[Failure] = []
        try:
            while to_come or running:
                if to_come:
                    index = to_come.pop(0)
                    running[asyncio.create_task(self._ask_endpoint(index, text, round_))] = index
                done, _ = await asyncio.wait(
                    running, timeout=share if to_come else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    index, outcome = running.pop(task), task.result()
                    if is_final(outcome):
                        self._preferred = index
                        return outcome
                    failures.append(outcome)  # type: ignore[arg-type]  # an Envelope is final
        finally:
            await _stop(running)
        return _of_all(failures)

    async def _ask_endpoint(self, index: int, text: str, round_: _Round) -> Envelope | Failure:
        if self._session is None:
            self._session = new_session()
        return await self._endpoints[index].ask(self._session, text, deadline=round_.deadline)

    def _learn(self, round_: _Round) -> None:
        for text, outcome in round_.asked_alone.items():
            blamed = _blame(outcome, round_)
            if _is_good(blamed):
                self._absolve(text)
            elif _has_warnings(blamed) or _is_query_fault(blamed):
                self._suspect(text)

    def _suspect(self, text: str) -> None:
        self._alone[text] = GOOD_ANSWERS_TO_REJOIN
        self._alone.move_to_end(text)
        while len(self._alone) > MAX_REMEMBERED:
            self._alone.popitem(last=False)

    def _absolve(self, text: str) -> None:
        if text not in self._alone:
            return
        self._alone[text] -= 1
        self._alone.move_to_end(text)
        if self._alone[text] <= 0:
            del self._alone[text]


def new_session() -> aiohttp.ClientSession:
    """Connections for queries: no cookies, no decompression, no deadline of their own."""
    return aiohttp.ClientSession(
        auto_decompress=False,  # answers are asked for uncompressed: the limit on their size is then a limit on memory
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),  # each exchange has a deadline of its own
    )


def _is_askable(query: Query) -> bool:
    return query.kind in ("scalar", "vector")


def _wrong_type(query: Query) -> Failure:
    message = f"the query is a {query.kind}; a scalar or an instant vector was wanted"
    return Failure(reason="wrong_type", message=message, unreachable=False)


def _chunks(queries: Sequence[Query]) -> Iterator[Sequence[Query]]:
    for start in range(0, len(queries), CHUNK_QUERIES):
        yield queries[start : start + CHUNK_QUERIES]


def _has_warnings(outcome: Outcome) -> bool:
    return isinstance(outcome, Answer) and bool(outcome.warnings)


def _is_good(outcome: Outcome) -> bool:
    return isinstance(outcome, Answer) and not outcome.warnings


def _is_query_fault(outcome: Outcome) -> bool:
    if not isinstance(outcome, Failure):
        return False
    return outcome.reason in QUERY_FAULTS or (outcome.reason == "timeout" and not outcome.unreachable)


def _has_failed_by_query(outcomes: Outcomes) -> bool:
    """Whether the request of a chunk failed as a whole; one native histogram among answers is no such failure."""
    return all(_is_query_fault(outcome) for outcome in outcomes.values())


def _is_whole(outcomes: Outcomes) -> bool:
    """Whether the request of a chunk was answered without warnings, which concern all of it."""
    return any(_is_good(outcome) for outcome in outcomes.values())


def _is_unreachable_timeout(outcome: Outcome) -> bool:
    return isinstance(outcome, Failure) and outcome.reason == "timeout" and outcome.unreachable


def _blame(outcome: Outcome, round_: _Round) -> Outcome:
    # A server that answers others within the same call is not unreachable: this query is too slow for it.
    if isinstance(outcome, Failure) and _is_unreachable_timeout(outcome) and round_.answered:
        return replace(outcome, unreachable=False)
    return outcome


def _of_all(failures: Sequence[Failure]) -> Failure:
    """One failure for all servers: unreachable only if every one of them is."""
    first = next((failure for failure in failures if not failure.unreachable), failures[0])
    return replace(first, message="; ".join(failure.message for failure in failures))


def _loop_time() -> float:
    return asyncio.get_running_loop().time()


async def _in_turn(turns: int, work: Coroutine[Any, Any, T]) -> T:
    """Start the work after so many turns of the loop: writing a request takes half a millisecond each."""
    try:
        for _ in range(turns):
            await asyncio.sleep(0)
    except BaseException:
        work.close()
        raise
    return await work


@asynccontextmanager
async def _started(*work: Coroutine[Any, Any, T]) -> AsyncIterator[list[asyncio.Task[T]]]:
    """Run coroutines as tasks that do not outlive the block."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        yield tasks
    finally:
        await _stop(tasks)


async def _stop(tasks: Mapping[asyncio.Task[T], Any] | Sequence[asyncio.Task[T]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
