"""What Prometheus remembers of one switch from before this process started: the newest look of each scrape target.

Asked once in the life of a process, so it brings its own connections and gives them back. All servers are asked, and
what they remember is put together: a replica that has just lost its disk remembers nothing, and its neighbour does.
Decides nothing: what follows from a record is decided in core.
"""

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import aiohttp

from sidecar.adapters.prometheus.batch import Envelope
from sidecar.adapters.prometheus.exchange import Endpoint
from sidecar.adapters.prometheus.source import new_session
from sidecar.core.errors import SourceError
from sidecar.core.record import EQUALLY_NEW_SECONDS, Record, Sighting, joined
from sidecar.core.states import Restriction, State
from sidecar.rules.readings import Failure
from sidecar.settings.http_config import HttpConfig
from sidecar.settings.promql import duration, quote

MOST_STEPS: Final = 10_000
"""Windows that a search over the past may have; Prometheus answers at most 11,000 points a series."""

LARGEST_EPOCH: Final = 2**53
"""Larger numbers are not exact in a sample, so they are not ours."""

_METRICS: Final = "killswitch_(state|restriction|position_limit_factor)"
_OWN_LABELS: Final = frozenset({"__name__", "state", "restriction"})
_SEVERITY: Final = {State.ACTIVE: 0, State.RECOVERING: 1, State.KILLED: 2}
_IN_FORCE: Final = "|".join(_SEVERITY)  # DISABLED says nothing about what was in force

_Times = dict[float, float]
_Look = dict[str, dict[str, _Times]]  # metric -> value of its one-hot label, if any -> time -> sample


class RecordReader:
    """Reads the record of a switch from one or more Prometheus servers.

    Args:
        urls: of the servers.
        timeout: seconds for each request; a record takes up to five of them.
        headers, http: as for queries.
    """

    def __init__(
        self, *, urls: Sequence[str], timeout: float, headers: Mapping[str, str], http: HttpConfig | None
    ) -> None:
        self._endpoints = [Endpoint(url, headers=headers, http=http) for url in urls]
        self._timeout = timeout

    async def read(self, switch: str, *, running: Callable[[], float], lookback: float) -> Record:
        """Read all that is remembered from before this process started.

        Args:
            switch: its name.
            running: tells for how many seconds this process has been running; the start is counted back from the
                server's own clock, which may differ from ours.
            lookback: seconds before the start beyond which nothing counts.

        Raises:
            SourceError: no server gave a whole answer; it says what each of them did.
        """
        async with new_session() as session:
            dialogues = [_Dialogue(one, session, self._timeout, switch, lookback) for one in self._endpoints]
            outcomes = await asyncio.gather(*(dialogue.record(running) for dialogue in dialogues))
        records = [outcome for outcome in outcomes if isinstance(outcome, Record)]
        if not records:
            raise SourceError("; ".join(str(outcome) for outcome in outcomes))
        return joined(records)


class _NoAnswerError(Exception):
    """The server did not answer as it should; stays in this module."""


class _Dialogue:
    """All questions to one server."""

    def __init__(
        self, endpoint: Endpoint, session: aiohttp.ClientSession, timeout: float, switch: str, lookback: float
    ) -> None:
        self._endpoint = endpoint
        self._session = session
        self._timeout = timeout
        self._switch = quote(switch)
        self._lookback = lookback
        self._step = max(EQUALLY_NEW_SECONDS, math.ceil(lookback / MOST_STEPS))

    async def record(self, running: Callable[[], float]) -> Record | _NoAnswerError:
        """The whole record, or why there is none."""
        try:
            end = await self._start_of_this_process(running)
            return Record(sightings=await self._sightings(end), highest_epoch=await self._highest_epoch(end))
        except _NoAnswerError as failure:
            return failure
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            return _NoAnswerError(f"{self._endpoint.name}: the result is not as documented: {type(error).__name__}")

    async def _start_of_this_process(self, running: Callable[[], float]) -> float:
        answer = await self._ask("vector(time())")
        # The time of the answer is taken after it arrived: that makes the start rather too early than too late, so no
        # sample of our own can slip in.
        return math.floor((float(answer[0]["value"][1]) - running()) * 1000.0) / 1000.0

    async def _highest_epoch(self, end: float) -> int | None:
        span = duration(self._lookback)
        answer = await self._ask(f"max(max_over_time(killswitch_epoch{{switch={self._switch}}}[{span}]))", at=end)
        epochs = [float(row["value"][1]) for row in answer]
        return max((int(epoch) for epoch in epochs if 0 <= epoch <= LARGEST_EPOCH), default=None)

    async def _sightings(self, end: float) -> tuple[Sighting, ...]:
        recent = await self._looks(end, end)
        if any(sighting.time > end - self._step for sighting in recent):
            return recent
        # Nothing in the newest window: find the window that has the newest sample, and look closely at that one only,
        # for a day of raw samples is megabytes.
        window = await self._newest_window(end)
        return recent if window is None else await self._looks(window, end)

    async def _newest_window(self, end: float) -> float | None:
        step, span = duration(self._step), duration(self._lookback)
        seen = f"max_over_time(killswitch_state{{switch={self._switch},state=~{quote(_IN_FORCE)}}}[{step}]) > 0"
        answer = await self._ask(f"count({seen})[{span}:{step}]", at=end, wanted="matrix")
        return max((float(moment) for row in answer for moment, _ in row["values"]), default=None)

    async def _looks(self, at: float, end: float) -> tuple[Sighting, ...]:
        """The newest look of each target within two steps before `at`, and not before the horizon."""
        window = duration(2 * self._step)
        query = f"{{__name__=~{quote(_METRICS)},switch={self._switch}}}[{window}]"
        answer = await self._ask(query, at=at, wanted="matrix")
        return tuple(sightings(answer, since=end - self._lookback))

    async def _ask(self, query: str, *, at: float | None = None, wanted: str = "vector") -> list[Any]:
        deadline = asyncio.get_running_loop().time() + self._timeout
        outcome = await self._endpoint.ask(self._session, query, deadline=deadline, at=at, wanted=wanted)
        if isinstance(outcome, Failure):
            raise _NoAnswerError(outcome.message)
        return _whole(outcome, self._endpoint.name)


def _whole(answer: Envelope, server: str) -> list[Any]:
    if answer.warnings:
        raise _NoAnswerError(f"{server}: the answer is not the whole one: {'; '.join(answer.warnings)}")
    return answer.result


def sightings(rows: Sequence[Any], *, since: float) -> Iterator[Sighting]:
    """Read raw samples of the switch's metrics, as a matrix has them, into the newest look of each scrape target.

    A look without a state is none: until its own state is restored, a sidecar shows none.

    Args:
        rows: the `result` of a matrix; samples of one scrape have the same time.
        since: Unix seconds; older looks do not count.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: not the documented shape.
    """
    for look in _by_target(rows).values():
        states = look.get("killswitch_state", {})
        newest = max((time for state in _SEVERITY for time in _times_set(states, state)), default=None)
        if newest is None or newest < since:
            continue
        shown = [state for state in _SEVERITY if newest in _times_set(states, state)]
        yield Sighting(
            time=newest,
            state=max(shown, key=lambda state: _SEVERITY[state]),
            restriction=_restriction(look.get("killswitch_restriction", {}), newest),
            factor=_factor(look.get("killswitch_position_limit_factor", {}), newest),
        )


def _by_target(rows: Sequence[Any]) -> Mapping[frozenset[tuple[str, str]], _Look]:
    targets: dict[frozenset[tuple[str, str]], _Look] = defaultdict(dict)
    for row in rows:
        labels = row["metric"]
        target = frozenset((name, value) for name, value in labels.items() if name not in _OWN_LABELS)
        member = next((labels[name] for name in ("state", "restriction") if name in labels), "")
        times = targets[target].setdefault(labels["__name__"], {}).setdefault(member, {})
        times.update((float(moment), float(value)) for moment, value in row.get("values", ()))
    return targets


def _times_set(members: Mapping[str, _Times], member: str) -> set[float]:
    return {time for time, value in members.get(member, {}).items() if value > 0}


def _restriction(members: Mapping[str, _Times], time: float) -> Restriction | None:
    shown = [one for one in Restriction if time in _times_set(members, one.label)]
    return max(shown, default=None)


def _factor(members: Mapping[str, _Times], time: float) -> float | None:
    factor = members.get("", {}).get(time, math.nan)
    return factor if 0.0 <= factor <= 1.0 else None
