"""Triggers as plain documents and back: which of their timers outlive the process.

A trigger that fired goes on firing after a restart until a fresh reading says otherwise; a pending one goes on from the
time it had. Whether it could see is not kept: the next process has to look for itself.
"""

from collections.abc import Mapping
from typing import Any

from sidecar.core.errors import StorageError
from sidecar.core.states import Instant
from sidecar.rules.triggers import QUIET, Level, Trigger


def trigger_document(trigger: Trigger, now: Instant) -> dict[str, Any] | None:
    """The durable form of a trigger; None where nothing about it needs to be kept."""
    levels = (trigger.main, *trigger.steps)
    if all(level == QUIET for level in levels) and trigger.failures == 0:
        return None
    return {
        "main": _level_document(trigger.main, now),
        "steps": [_level_document(level, now) for level in trigger.steps],
        "value": trigger.value,
        "failures": trigger.failures,
    }


def trigger_from_document(document: Mapping[str, Any], now: Instant) -> Trigger:
    """Read a trigger back; raise StorageError where it cannot be read."""
    try:
        value = document["value"]
        return Trigger(
            main=_level(document["main"], now),
            steps=tuple(_level(one, now) for one in document["steps"]),
            value=None if value is None else float(value),
            failures=int(document["failures"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"a stored trigger cannot be read: {type(error).__name__} {error}") from error


def _level_document(level: Level, now: Instant) -> dict[str, Any]:
    return {
        "pending": _elapsed(level.pending_since, now),
        "clear": _elapsed(level.clear_since, now),
        "firing": _elapsed(level.firing_since, now),
        "firing_since": level.firing_wall,
    }


def _elapsed(moment: float | None, now: Instant) -> float | None:
    return None if moment is None else now.mono - moment


def _level(document: Mapping[str, Any], now: Instant) -> Level:
    wall = document["firing_since"]
    return Level(
        pending_since=_moment(document["pending"], now),
        clear_since=_moment(document["clear"], now),
        firing_since=_moment(document["firing"], now),
        firing_wall=None if wall is None else float(wall),
    )


def _moment(elapsed: float | None, now: Instant) -> float | None:
    return None if elapsed is None else now.mono - float(elapsed)
