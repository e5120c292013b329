"""Reads the two clocks. Everything else gets the moment as an argument."""

import time
from datetime import UTC, datetime
from typing import Protocol

from sidecar.core.states import Instant


class Clock(Protocol):
    """Where `now` comes from; a test brings its own and jumps it."""

    def now(self) -> Instant:
        """Return the present moment on both clocks."""


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> Instant:
        """Return the present moment on both clocks."""
        return Instant(mono=time.monotonic(), wall=time.time())


def utc(wall: float) -> datetime:
    """Turn Unix seconds into a moment in UTC."""
    return datetime.fromtimestamp(wall, tz=UTC)


def stamp(wall: float | None) -> str | None:
    """Write Unix seconds as RFC 3339 in UTC with milliseconds; None stays None."""
    if wall is None:
        return None
    return utc(wall).isoformat(timespec="milliseconds").replace("+00:00", "Z")
