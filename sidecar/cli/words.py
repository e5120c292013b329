"""Times, durations, numbers and foreign text as a terminal shows them."""

import math
from datetime import UTC, datetime
from typing import Final

_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def one_line(text: object) -> str:
    """Make text from outside fit to print: what is not printable is shown escaped.

    A reason or an annotation comes from whoever may send an alert; it must not move the cursor or hide a line.
    """
    return "".join(char if char.isprintable() else _escaped(char) for char in str(text)).strip()


def _escaped(char: str) -> str:
    return " " if char in "\n\r\t" else char.encode("unicode_escape").decode("ascii")


def duration_text(seconds: float) -> str:
    """Write seconds with the two largest units that matter: `2 h 5 min`, `45 s`."""
    left = max(0, math.ceil(seconds))
    parts: list[str] = []
    for size, unit in _UNITS:
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
        if len(parts) == 2 or (parts and not count):
            break
    return " ".join(parts) or "0 s"


def number_text(value: object, *, digits: int = 6) -> str:
    """Write a number short enough for a table; `-` for none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    return f"{value:.{digits}g}"


def percent_text(ratio: object) -> str:
    """Write a ratio as percent: `75 %`; `-` for none. Never rounds a limit that is not reached up to 100 %."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not math.isfinite(ratio):
        return "-"
    percent = ratio * 100
    shown = round(percent)
    return f"{99 if shown == 100 and percent < 100 else shown} %"


def parse_time(text: object) -> datetime | None:
    """Read an RFC 3339 time; None where it is none."""
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def moment_text(text: object, now: datetime) -> str:
    """Write a time in UTC and how long ago, or how far ahead, it is."""
    moment = parse_time(text)
    if moment is None:
        return one_line(text)
    away = (now - moment).total_seconds()
    relative = f"in {duration_text(-away)}" if away < 0 else f"{duration_text(away)} ago"
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC ({relative})"
