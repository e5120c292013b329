"""Metrics as text: prometheus-client's own formats, with lines that did not change since the last scrape kept.

The library formats every label of every sample anew, which takes 25 ms (OpenMetrics 65 ms) for 200 rules and holds the
interpreter that the gate needs. Series hardly ever change their labels and seldom their value, so what the library made
of them once is remembered; nothing is formatted here in a way of our own.
"""

import asyncio
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

_REMEMBERED: Final = ("text/plain; version=0.0.4;", "application/openmetrics-text; version=1.0.0;")
_IN_THREAD_FROM: Final = 300  # samples; below that a thread costs more than the work
_TURN_SECONDS: Final = 0.0005  # all of it is 4 ms for 200 rules, which one order in some hundred would wait for
_OPENMETRICS_END: Final = b"# EOF\n"
_GZIP_LEVEL: Final = 1  # a third larger than level 6, in a fifth of its time
_GZIP_FORMAT: Final = 16 + zlib.MAX_WBITS
_ZERO: Final = "0.0\n"
_number: Callable[[float], str] = floatToGoString


@dataclass(frozen=True, kw_only=True, slots=True)
class Exposed:
    """One scrape's answer."""

    body: bytes
    content_type: str
    gzipped: bool


class Exposition:
    """Renders a registry, one scrape at a time.

    Collecting happens on the loop, so that collectors may read what the loop changes, in short turns between which the
    gate answers; each family is a picture of one moment. What is long to write or to compress goes to a thread.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._writers: dict[str, FamilyWriter] = {}
        self._scraping = asyncio.Lock()
        self._next: dict[tuple[str, bool], asyncio.Task[Exposed]] = {}

    async def render(self, accept: str | None, accept_encoding: str | None) -> Exposed:
        """Render all metrics in the format and encoding that the headers of the scrape ask for.

        Scrapes that wait while another one is rendered share the next rendering, which begins after all of them came.
        """
        encoder, content_type = choose_encoder(accept or "")
        gzipped = gzip_accepted(accept_encoding or "")
        key = (content_type, gzipped)
        task = self._next.get(key)
        if task is None:
            task = self._next[key] = asyncio.create_task(self._render(encoder, content_type, gzipped=gzipped))
        return await asyncio.shield(task)

    async def _render(
        self, encoder: Callable[[CollectorRegistry], bytes], content_type: str, *, gzipped: bool
    ) -> Exposed:
        async with self._scraping:
            del self._next[content_type, gzipped]
            families = await self._collect()
            write = self._writer(content_type, encoder)
            if sum(len(family.samples) for family in families) < _IN_THREAD_FROM:
                body = _finish(write, families, gzipped=gzipped)
            else:
                body = await asyncio.to_thread(_finish, write, families, gzipped=gzipped)
        return Exposed(body=body, content_type=content_type, gzipped=gzipped)

    async def _collect(self) -> list[Metric]:
        families, began = [], perf_counter()
        for family in self._registry.collect():
            families.append(family)
            if perf_counter() - began >= _TURN_SECONDS:
                await asyncio.sleep(0)
                began = perf_counter()
        return families

    def _writer(self, content_type: str, encoder: Callable[[Any], bytes]) -> Callable[[list[Metric]], bytes]:
        for known in _REMEMBERED:
            if content_type.startswith(known):
                return self._writers.setdefault(known, FamilyWriter(encoder)).write
        return lambda families: encoder(_Collected(families))


class FamilyWriter:
    """Writes families in one format, as the library's encoder for that format does, byte for byte.

    Not for two threads at a time.
    """

    def __init__(self, encoder: Callable[[Any], bytes]) -> None:
        self._encoder = encoder
        self._ends_with_eof = encoder(_Collected([])) == _OPENMETRICS_END
        self._written: dict[_Key, _Written] = {}

    def write(self, families: Iterable[Metric]) -> bytes:
        """Write these families; what is remembered of families that are not among them is forgotten."""
        before, self._written = self._written, {}
        text = "".join(self._family(family, before) for family in families)
        return text.encode() + (_OPENMETRICS_END if self._ends_with_eof else b"")

    def _family(self, family: Metric, before: dict["_Key", "_Written"]) -> str:
        key = (family.name, family.type, family.documentation, family.unit)
        written = before.get(key)
        if written is None or len(written.samples) != len(family.samples):
            written = _Written(head=self._whole(_like(family)), size=len(family.samples))
        for place, (sample, known) in enumerate(zip(family.samples, written.samples, strict=True)):
            if sample is not known and not self._rewrite(family, written, place, sample):
                return self._whole(family)
        self._written[key] = written
        return written.head + "".join(written.lines)

    def _rewrite(self, family: Metric, written: "_Written", place: int, sample: Sample) -> bool:
        """Write one line anew; False where the format makes anything else of the sample than one line."""
        if sample.timestamp is not None or sample.exemplar is not None:
            return False
        known = written.samples[place]
        if known is None or known.labels is not sample.labels or known.name != sample.name:
            prefix = self._prefix(family, written.head, sample)
            if prefix is None:
                return False
            written.prefixes[place] = prefix
        written.samples[place] = sample
        written.lines[place] = f"{written.prefixes[place]}{_number(sample.value)}\n"
        return True

    def _prefix(self, family: Metric, head: str, sample: Sample) -> str | None:
        """The library's line for this sample up to the value; None where it writes something else."""
        lone = _like(family)
        lone.samples = [Sample(sample.name, sample.labels, 0.0)]
        text = self._whole(lone)
        line = text.removeprefix(head)
        if not text.startswith(head) or not line.endswith(_ZERO) or line.count("\n") != 1 or line.startswith("#"):
            return None
        return line.removesuffix(_ZERO)

    def _whole(self, family: Metric) -> str:
        text = self._encoder(_Collected([family]))
        return (text.removesuffix(_OPENMETRICS_END) if self._ends_with_eof else text).decode()


_Key = tuple[str, str, str, str]


class _Written:
    """What was written of one family: for every sample, in its order, the line and the line without the value."""

    def __init__(self, *, head: str, size: int) -> None:
        self.head = head
        self.samples: list[Sample | None] = [None] * size
        self.prefixes = [""] * size
        self.lines = [""] * size


class _Collected:
    """Families in the place of a registry, which is all that an encoder wants of one."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _like(family: Metric) -> Metric:
    return Metric(family.name, family.documentation, family.type, family.unit)


def _finish(write: Callable[[list[Metric]], bytes], families: list[Metric], *, gzipped: bool) -> bytes:
    body = write(families)
    if not gzipped:
        return body
    compressor = zlib.compressobj(_GZIP_LEVEL, wbits=_GZIP_FORMAT)
    return compressor.compress(body) + compressor.flush()
