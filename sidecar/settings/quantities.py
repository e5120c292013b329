"""Numbers, durations, sizes and switches as people write them in a file.

A file hands over text; which type that text stands for depends on the key it belongs to, never on how it looks. So
`on`, `1_000` and `1:30` stay what was written until a key asks for a boolean, a number or a duration. Every function
raises ValueError with a reason that can stand in a report as it is.
"""

import math
import re
from decimal import Decimal

_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_NOT_FINITE = re.compile(r"[-+]?\.?(?:nan|inf|infinity)", re.IGNORECASE)
_LONGEST_NUMBER = 64  # characters; nobody writes more, and arithmetic on a million digits takes minutes

_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

DURATION_PATTERN = (
    r"(?=.)(?:([0-9]{1,9})w)?(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?"
    r"(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s)?(?:([0-9]{1,9})ms)?"
)
"""Prometheus' own form of a duration without years: each unit at most once, from large to small."""

_DURATION = re.compile(DURATION_PATTERN)
_MILLISECONDS = {"w": 604_800_000, "d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
_LONGEST_DURATION = 100 * 366 * 86_400  # seconds; beyond a lifetime it is a mistake, and floats lose milliseconds

SIZE_PATTERN = r"([0-9]{1,15})(B|KiB|MiB|GiB|TiB|KB|MB|GB|TB)"
"""A whole number and its unit."""

_SIZE = re.compile(SIZE_PATTERN)
_BYTES = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def parse_flag(text: str) -> bool:
    """Read true, false, yes, no, on or off, in any case."""
    try:
        return _FLAGS[text.lower()]
    except KeyError:
        raise ValueError(f"{text!r} is neither true nor false") from None


def parse_number(text: str) -> float:
    """Read a finite decimal number."""
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text!r} is not finite; write a number")
    number = float(text) if _is_number(text) else math.nan
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is not a number{_number_hint(text)}")
    return number


def parse_integer(text: str) -> int:
    """Read a whole number in decimal digits, without separators and leading zeros."""
    if len(text) > _LONGEST_NUMBER or not _INTEGER.fullmatch(text):
        raise ValueError(f"{text!r} is not a whole number{_number_hint(text)}")
    return int(text)


def parse_decimal(text: str) -> Decimal:
    """Read an exact decimal number of a size that quantities can have."""
    if not _is_number(text):
        raise ValueError(f"{text!r} is not a number{_number_hint(text)}")
    number = Decimal(text)
    if abs(number.adjusted()) > 30:
        raise ValueError(f"{text!r} is beyond every position there can be")
    return number


def parse_duration(text: str) -> float:
    """Read `250ms`, `5s`, `1m30s`, `24h`, `90d` or `2w` as seconds; `0` needs no unit."""
    if text == "0":
        return 0.0
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration{_duration_hint(text)}")
    counts = (int(count or 0) for count in match.groups())
    seconds = sum(count * unit for count, unit in zip(counts, _MILLISECONDS.values(), strict=True)) / 1000
    if seconds > _LONGEST_DURATION:
        raise ValueError(f"{text!r} is longer than a hundred years")
    return seconds


def format_duration(seconds: float) -> str:
    """Write seconds as `parse_duration` reads them: `5m`, `1m30s`, `250ms`, `0s`."""
    rest = round(seconds * 1000)
    parts = []
    for name, unit in _MILLISECONDS.items():
        count, remainder = divmod(rest, unit)
        # Weeks only where they come out even: nobody thinks of 90 days as 12 weeks and 6 days.
        if count and (name != "w" or not remainder):
            parts.append(f"{count}{name}")
            rest = remainder
    return "".join(parts) or "0s"


def parse_size(text: str) -> int:
    """Read `512B`, `16MiB` or `10MB` as bytes; `0` needs no unit."""
    if text == "0":
        return 0
    match = _SIZE.fullmatch(text)
    if match is None:
        hint = f"; write {text}B, {text}KiB or {text}MiB" if _INTEGER.fullmatch(text) else "; write it like 16MiB"
        raise ValueError(f"{text!r} is not a size{hint}")
    return int(match[1]) * _BYTES[match[2]]


def _is_number(text: str) -> bool:
    return len(text) <= _LONGEST_NUMBER and _NUMBER.fullmatch(text) is not None


def _number_hint(text: str) -> str:
    if re.fullmatch(r"[-+]?[0-9][0-9_,]*[0-9]", text) and not text.isdigit():
        return "; write its digits without separators"
    if re.fullmatch(r"[-+]?0[0-9]+", text):
        return "; write it without the leading zero"
    if re.fullmatch(r"[-+]?[0-9.]+ ?%", text):
        return "; write a percentage as a ratio, 0.15 for 15%"
    return ""


def _duration_hint(text: str) -> str:
    if re.fullmatch(r"[0-9]+", text):
        return f"; it has no unit: write {text}s or {text}ms"
    if re.fullmatch(r"[0-9]*\.[0-9]+ ?[a-z]+", text):
        return "; write whole numbers, 1s500ms for 1.5s"
    return "; write it like 250ms, 5s, 1m30s, 24h or 90d"
