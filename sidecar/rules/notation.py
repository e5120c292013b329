"""Values over time as promtool writes them: `-0.01x5 -0.16`, `0+10x6`, `_`, `stale`, `NaN`.

A rule's unit test says in it what its query returned. The numbers expand exactly as in promtool's own test files, so
that who knows one knows the other; a few words more stand for what a source can do beside returning a number.
"""

import re
from collections.abc import Iterator
from enum import StrEnum

MOST_VALUES = 100_000
"""A sequence that expands to more is refused: a day of seconds fits, a mistyped `x999999999` does not."""


class Word(StrEnum):
    """What may stand for a number.

    MISSING is nothing at all; STALE a sample older than the rule allows. The others concern the source and so the whole
    answer: UNREACHABLE does not answer, FAILED answers with an error, PARTIAL warns that this is not the whole answer.
    """

    MISSING = "_"
    STALE = "stale"
    UNREACHABLE = "unreachable"
    FAILED = "failed"
    PARTIAL = "partial"


Value = float | Word

_NUMBER = r"(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_ITEM = re.compile(
    rf"(?:(?P<word>_|stale|unreachable|failed|partial)|(?P<first>[+-]?(?:{_NUMBER}|(?i:inf|nan)))(?P<by>[+-]{_NUMBER})?)"
    r"(?:x(?P<times>[0-9]{1,9}))?"
)


def expand(notation: str) -> tuple[Value, ...]:
    """Write out a sequence.

    `axn` is `a` and n more of it, `a+bxn` is `a` and n more, each greater by b, and `_xn` is n times nothing: all three
    as in promtool.

    Raises:
        ValueError: an item cannot be read, or there are none, or too many values; the message names the item.
    """
    values: list[Value] = []
    for item in notation.split():
        count, expanded = _read(item)
        if len(values) + count > MOST_VALUES:
            raise ValueError(f"{item!r} leads to more than {MOST_VALUES} values; choose a longer interval")
        values.extend(expanded)
    if not values:
        raise ValueError("holds no value; write numbers such as '-0.01x5 -0.16', or _ for nothing")
    return tuple(values)


def _read(item: str) -> tuple[int, Iterator[Value]]:
    match = _ITEM.fullmatch(item)
    if match is None or (match["by"] is not None and match["times"] is None):
        raise ValueError(f"{item!r} is no value{_hint(item)}; write 1, -0.5x3, 0+10x6, NaN, {', '.join(Word)}")
    times = int(match["times"] or 0)
    if match["word"] == Word.MISSING and match["times"] is not None:
        return times, _repeated(Word.MISSING, times)
    if match["word"] is not None:
        return times + 1, _repeated(Word(match["word"]), times + 1)
    return times + 1, _rising(float(match["first"]), float(match["by"] or 0), times + 1)


def _hint(item: str) -> str:
    if re.fullmatch(r"[+-]?0[0-9]+.*", item):
        return " (promtool takes a leading zero for octal; leave it out)"
    if "," in item:
        return " (values are parted by blanks)"
    return ""


def _repeated(word: Word, count: int) -> Iterator[Value]:
    return (word for _ in range(count))


def _rising(first: float, by: float, count: int) -> Iterator[Value]:
    # Added up one by one, as promtool does: a product would differ in the last digit.
    value = first
    for _ in range(count):
        yield value
        value += by
