"""Metrics as text: prometheus-client's own formats, with lines that did not change since the last scrape kept.

The library formats every label of every sample anew, which takes 25 ms (OpenMetrics 65 ms) for 200 rules and holds the
interpreter that the gate needs. Series hardly ever change their labels and seldom their value, so what the library made
of them once is remembered; nothing is formatted here in a way of our own.
"""

import asyncio
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

_REMEMBERED: Final = ("text/plain; version=0.0.4;", "application/openmetrics-text; version=1.0.0;")
_IN_THREAD_FROM: Final = 300  # samples; below that a thread costs more than the work
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

    Collecting happens on the loop, so that collectors may read what the loop changes; what is long to write or to
    compress goes to a thread.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._writers: dict[str, FamilyWriter] = {}
        self._scraping = asyncio.Lock()

    async def render(self, accept: str | None, accept_encoding: str | None) -> Exposed:
        """Render all metrics in the format and encoding that the headers of the scrape ask for."""
        encoder, content_type = choose_encoder(accept or "")
        gzipped = gzip_accepted(accept_encoding or "")
        async with self._scraping:
            families = list(self._registry.collect())
            write = self._writer(content_type, encoder)
            if sum(len(family.samples) for family in families) < _IN_THREAD_FROM:
                body = _finish(write, families, gzipped=gzipped)
            else:
                body = await asyncio.to_thread(_finish, write, families, gzipped=gzipped)
        return Exposed(body=body, content_type=content_type, gzipped=gzipped)

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
        self._heads: dict[tuple[str, str, str, str], str] = {}
        self._lines: dict[int, tuple[Sample, str]] = {}
        self._prefixes: dict[tuple[int, str], tuple[dict[str, str], str | None]] = {}

    def write(self, families: Iterable[Metric]) -> bytes:
        """Write these families; what is remembered of series that are not among them is forgotten."""
        # An id may come back for another object once the first is gone. Each memory holds on to the object it is about
        # and is built anew in each scrape, so nothing is mistaken and nothing piles up.
        self._old_lines, self._lines = self._lines, {}
        self._old_prefixes, self._prefixes = self._prefixes, {}
        text = "".join(self._family(family) for family in families)
        self._old_lines, self._old_prefixes = {}, {}
        return text.encode() + (_OPENMETRICS_END if self._ends_with_eof else b"")

    def _family(self, family: Metric) -> str:
        parts = [self._head(family)]
        old, new = self._old_lines, self._lines
        for sample in family.samples:
            known = old.get(id(sample))
            if known is None or known[0] is not sample:
                line = self._line(family, sample)
                if line is None:
                    return self._whole(family)
                known = (sample, line)
            new[id(sample)] = known
            parts.append(known[1])
        return "".join(parts)

    def _line(self, family: Metric, sample: Sample) -> str | None:
        if sample.timestamp is not None or sample.exemplar is not None:
            return None
        key = (id(sample.labels), sample.name)
        known = self._prefixes.get(key) or self._old_prefixes.get(key)
        if known is None or known[0] is not sample.labels:
            known = (sample.labels, self._prefix(family, sample))
        self._prefixes[key] = known
        return None if known[1] is None else f"{known[1]}{_number(sample.value)}\n"

    def _prefix(self, family: Metric, sample: Sample) -> str | None:
        """The line up to its value; None where the format makes anything else of the sample than one line."""
        lone = _like(family)
        lone.samples = [Sample(sample.name, sample.labels, 0.0)]
        head, text = self._head(family), self._whole(lone)
        line = text.removeprefix(head)
        if text == line or not line.endswith(_ZERO) or line.count("\n") != 1 or line.startswith("#"):
            return None
        return line.removesuffix(_ZERO)

    def _head(self, family: Metric) -> str:
        key = (family.name, family.type, family.documentation, family.unit)
        if key not in self._heads:
            self._heads[key] = self._whole(_like(family))
        return self._heads[key]

    def _whole(self, family: Metric) -> str:
        text = self._encoder(_Collected([family]))
        return (text.removesuffix(_OPENMETRICS_END) if self._ends_with_eof else text).decode()


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
