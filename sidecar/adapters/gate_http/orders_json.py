"""Read orders from JSON as strictly as money asks: exact decimals, no unknown or repeated keys, no NaN, all bounded.

An unknown key is refused by name, because a misspelt `postion` that is silently ignored would be an order without a
position. A cancel is the exception: it needs only its intent, and nothing else that stands in it is looked at, for a
cancel always passes. Knows nothing of HTTP and nothing of how orders are decided.
"""

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, NoReturn

from sidecar.core.orders import ZERO, Intent, Order, Side

MAX_ORDERS = 1000
MAX_SYMBOL = 64
MAX_DIGITS = 40
MAX_EXPONENT = 30

_KEYS = ("intent", "symbol", "side", "quantity", "position", "open_quantity", "position_limit", "reduce_only")
_KNOWN = frozenset(_KEYS)
INTENTS = {"new": Intent.NEW, "replace": Intent.REPLACE, "cancel": Intent.CANCEL}
SIDES = {"buy": Side.BUY, "sell": Side.SELL}
_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"[+-]?([0-9]+)(?:\.([0-9]+))?(?:[eE]([+-]?[0-9]{1,3}))?", re.ASCII)
_LONGEST_NUMBER = MAX_DIGITS + 8  # its digits, two signs, point, e and an exponent of three


class OrderError(ValueError):
    """The orders cannot be read; the message says which, where, what was seen and what is wanted."""


class _Unfit:
    """A number literal beyond the bounds; kept as text, so that it only matters where it is used."""

    def __init__(self, literal: str) -> None:
        self.literal = literal


def _decimal(literal: str) -> Decimal | None:
    match = _NUMBER.fullmatch(literal) if len(literal) <= _LONGEST_NUMBER else None
    if match is None:
        return None
    whole, fraction, exponent = match.groups()
    if len(whole) + len(fraction or "") > MAX_DIGITS or abs(int(exponent or "0")) > MAX_EXPONENT:
        return None
    return Decimal(literal)


def _literal(text: str) -> Decimal | _Unfit:
    number = _decimal(text)
    return _Unfit(text) if number is None else number


def _refuse_constant(text: str) -> NoReturn:
    raise OrderError(f"{text} is not JSON; leave out what you do not know")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise OrderError(f"{_seen(twice)} stands more than once in one object; which one is meant?")
    return document


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_float=_literal, parse_int=_literal, parse_constant=_refuse_constant
)


class OrderReader:
    """Reads a body, an order or a list of them, one order at a time so that the caller can make pauses.

    Attributes:
        is_list: whether the body is a list, which is answered with a list.

    Raises OrderError from the constructor and while iterating.
    """

    def __init__(self, body: bytes) -> None:
        try:
            self._text = body.decode()
        except UnicodeDecodeError as error:
            raise OrderError(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
        self._at = self._skip_space(0)
        opening = self._text[self._at : self._at + 1]
        if opening not in {"{", "["}:
            raise OrderError(f"the body starts with {opening!r}; send one order as a JSON object, or a list of them")
        self.is_list = opening == "["

    def __iter__(self) -> Iterator[Order]:
        """Yield the orders as they stand."""
        if self.is_list:
            yield from self._orders_of_list()
        else:
            yield parse_order(self._value(), "")
        self._at = self._skip_space(self._at)
        if self._at != len(self._text):
            raise OrderError(f"something follows the orders, at character {self._at}: send one document")

    def _orders_of_list(self) -> Iterator[Order]:
        index = 0
        self._at = self._skip_space(self._at + 1)
        if self._text[self._at : self._at + 1] == "]":
            raise OrderError("the list is empty; send at least one order")
        while True:
            if index == MAX_ORDERS:
                raise OrderError(f"the list has more than {MAX_ORDERS} orders; ask in several requests")
            self._at = self._skip_space(self._at)
            yield parse_order(self._value(), f"[{index}]")
            index += 1
            self._at = self._skip_space(self._at)
            mark = self._text[self._at : self._at + 1]
            self._at += 1
            if mark == "]":
                return
            if mark != ",":
                raise OrderError(f"character {self._at - 1} is {mark!r} where ',' or ']' should be")

    def _value(self) -> object:
        try:
            value, self._at = _DECODER.raw_decode(self._text, self._at)
        except json.JSONDecodeError as error:
            raise OrderError(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
        except RecursionError:
            raise OrderError("nested too deeply; an order is one flat object") from None
        return value

    def _skip_space(self, at: int) -> int:
        match = _SPACE.match(self._text, at)
        return at if match is None else match.end()


def parse_order(document: object, where: str) -> Order:
    """Make an order of one decoded JSON object; `where` is its place in a list, for messages. Raise OrderError."""
    if not isinstance(document, dict):
        raise OrderError(f"{where or 'the order'}: {_seen(document)} is not an order; send an object with {_KEYS}")
    intent = _intent(document.get("intent"), where)
    if intent is Intent.CANCEL:
        return Order(intent=intent)
    if not document.keys() <= _KNOWN:
        strange = next(key for key in document if key not in _KNOWN)
        raise OrderError(f"{_at(where, strange)}: unknown key; known are {', '.join(_KEYS)}")
    return Order(
        intent=intent,
        symbol=_symbol(document.get("symbol"), where),
        side=_side(document, where),
        quantity=_quantity(document, where),
        position=_optional_number(document, "position", where),
        open_quantity=_open_quantity(document, where),
        position_limit=_position_limit(document, where),
        reduce_only=_flag(document.get("reduce_only"), where),
    )


def _intent(value: object, where: str) -> Intent:
    if value is None:
        return Intent.NEW
    intent = INTENTS.get(value) if isinstance(value, str) else None
    if intent is None:
        raise OrderError(f"{_at(where, 'intent')}: {_seen(value)} is none of new, replace, cancel")
    return intent


def _symbol(value: object, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > MAX_SYMBOL:
        raise OrderError(f"{_at(where, 'symbol')}: {_seen(value)} is not a text of at most {MAX_SYMBOL} characters")
    return value


def _side(document: Mapping[str, object], where: str) -> Side:
    value = document.get("side")
    side = SIDES.get(value) if isinstance(value, str) else None
    if side is None:
        seen = f"{_seen(value)} is neither buy nor sell" if "side" in document else "missing; give buy or sell"
        raise OrderError(f"{_at(where, 'side')}: {seen}")
    return side


def _quantity(document: Mapping[str, object], where: str) -> Decimal:
    if "quantity" not in document:
        raise OrderError(f"{_at(where, 'quantity')}: missing; give a number greater than 0")
    number = _number(document["quantity"], "quantity", where)
    if number <= ZERO:
        raise OrderError(f"{_at(where, 'quantity')}: {number} is not greater than 0; the direction goes in `side`")
    return number


def _open_quantity(document: Mapping[str, object], where: str) -> Decimal:
    # A null is not taken for 0 here: who does not know what is working must not be told that all of it fits.
    number = _number(document["open_quantity"], "open_quantity", where) if "open_quantity" in document else ZERO
    if number < ZERO:
        raise OrderError(f"{_at(where, 'open_quantity')}: {number} is below 0; it counts working orders of this side")
    return number


def _position_limit(document: Mapping[str, object], where: str) -> Decimal | None:
    number = _optional_number(document, "position_limit", where)
    if number is not None and number < ZERO:
        raise OrderError(f"{_at(where, 'position_limit')}: {number} is below 0; limits are absolute")
    return number


def _optional_number(document: Mapping[str, object], key: str, where: str) -> Decimal | None:
    value = document.get(key)
    return None if value is None else _number(value, key, where)


def _number(value: object, key: str, where: str) -> Decimal:
    number = _decimal(value) if isinstance(value, str) else value
    if isinstance(number, Decimal):
        return number
    raise OrderError(
        f"{_at(where, key)}: {_seen(value)} is not a number or decimal string of at most {MAX_DIGITS} digits "
        f"and an exponent of at most {MAX_EXPONENT}"
    )


def _flag(value: object, where: str) -> bool:
    if value is None:
        return False
    if not isinstance(value, bool):
        raise OrderError(f"{_at(where, 'reduce_only')}: {_seen(value)} is neither true nor false")
    return value


def _at(where: str, key: str) -> str:
    name = key if key in _KNOWN else _seen(key)
    return f"{where}.{name}" if where else name


def _seen(value: object) -> str:
    """What stood there, short enough for a log line."""
    text = value.literal if isinstance(value, _Unfit) else str(value) if isinstance(value, Decimal) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
