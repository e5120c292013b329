"""Draws the transition table, so that the picture in the documentation is the table and not somebody's memory of it."""

from collections.abc import Mapping

from sidecar.core.events import EventKind
from sidecar.core.states import State
from sidecar.core.transitions import LOOSENING, TABLE


def mermaid(table: Mapping[tuple[State, EventKind], State] = TABLE) -> str:
    """Draw a table as Mermaid text: one arrow for each pair of states, loosening events marked with `*`."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.ACTIVE}", f"    [*] --> {State.DISABLED}: mode disabled"]
    for (source, target), kinds in _arrows(table).items():
        lines.append(f"    {source} --> {target}: {', '.join(_label(kind) for kind in kinds)}")
    return "\n".join(lines) + "\n"


def _arrows(table: Mapping[tuple[State, EventKind], State]) -> dict[tuple[State, State], list[EventKind]]:
    arrows: dict[tuple[State, State], list[EventKind]] = {}
    for (source, kind), target in table.items():
        arrows.setdefault((source, target), []).append(kind)
    return arrows


def _label(kind: EventKind) -> str:
    words = kind.value.replace("_", " ")
    return f"{words} *" if kind in LOOSENING else words
