"""What a measurement says: figures with units and aims, sections with the method by which they were got.

Figures are shown, never asserted: a busy machine makes every one of them worse, and only a reader knows that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan
from typing import Any, Final

_NAME_COLUMNS: Final = 62
_VALUE_COLUMNS: Final = 17
_AIM_COLUMNS: Final = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One number.

    Attributes:
        name: what was measured, in words.
        value: the number.
        unit: of the number; `×` for a ratio of two numbers of the same run.
        aim: largest value that is good; None where there is no aim, only something to know.
        limit: largest value that is bearable, where that is another one than the aim.
        note: what the number stands beside.
    """

    name: str
    value: float
    unit: str
    aim: float | None = None
    limit: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """`OK` within the aim, `near` between aim and limit, `OVER` beyond; empty without an aim."""
        if self.aim is None:
            return ""
        if self.value <= self.aim:
            return "OK"
        return "near" if self.limit is not None and self.value <= self.limit else "OVER"

    def document(self) -> dict[str, Any]:
        """The same as JSON."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Figures that were got in the same way."""

    title: str
    method: str
    figures: Sequence[Figure]

    def document(self) -> dict[str, Any]:
        """The same as JSON."""
        return {"title": self.title, "method": self.method, "figures": [one.document() for one in self.figures]}

    def text(self, earlier: Mapping[str, float] | None = None) -> str:
        """The same as a table; beside each figure its ratio to the one of the same name in `earlier`."""
        rows = [_row(figure, (earlier or {}).get(figure.name)) for figure in self.figures]
        return "\n".join([f"\n{self.title}", f"  {self.method}", *rows])


def figures_of(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a report that was written as JSON, by name."""
    return {figure["name"]: figure["value"] for section in report["sections"] for figure in section["figures"]}


def _row(figure: Figure, earlier: float | None) -> str:
    value = f"{_number(figure.value)} {figure.unit}"
    aim = "" if figure.aim is None else f"≤ {_number(figure.aim)} {figure.unit}"
    if figure.limit is not None:
        aim += f", at most {_number(figure.limit)}"
    row = f"  {figure.name:<{_NAME_COLUMNS}}{value:>{_VALUE_COLUMNS}}   {aim:<{_AIM_COLUMNS}} {figure.verdict:<5}"
    compared = f"[{figure.value / earlier:.2f} × the earlier {_number(earlier)}] " if earlier else ""
    return f"{row} {compared}{figure.note}".rstrip()


def _number(value: float) -> str:
    if isnan(value):
        return "–"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):d}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of all values do not exceed.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("nothing was measured, so there is no percentile")
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]
