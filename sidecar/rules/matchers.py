"""Alertmanager's matchers, parsed and matched: `severity="critical"`, `desk!~"fx|rates"`, `{"bot.name"="a b"}`.

Takes what Alertmanager's classic and UTF-8 parsers agree on, and refuses what they read differently, so that a matcher
copied from a route means the same here. Knows neither alerts nor rules: text in, a condition on labels out.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sidecar.core.errors import KillswitchError

_RESERVED = frozenset("{}!=~,\\\"'`")
_OPERATORS = ("=~", "!~", "!=", "=")
_BARE_ESCAPES = {"\\": b"\\", '"': b'"', "n": b"\n"}
_CODED_ESCAPES = {"x": 2, "u": 4, "U": 8}
_HEX = frozenset("0123456789abcdefABCDEF")
_LONGEST = 4096  # characters; a route's matcher has a hundred, and a regular expression must not take for ever to build


class MatcherError(KillswitchError):
    """A text that is no matcher; says what was seen, where, and what is wanted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matcher:
    """One condition on one label.

    Attributes:
        name: of the label.
        operator: `=`, `!=`, `=~` or `!~`.
        value: what it is compared with; for the last two a regular expression that must match the whole value.
        pattern: that expression, compiled; None for the first two.
    """

    name: str
    operator: str
    value: str
    pattern: re.Pattern[str] | None = None

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether the label satisfies it; a label that is not there counts as empty, as in Alertmanager."""
        seen = labels.get(self.name, "")
        holds = seen == self.value if self.pattern is None else self.pattern.fullmatch(seen) is not None
        return holds is not self.operator.startswith("!")


def match_all(matchers: Iterable[Matcher], labels: Mapping[str, str]) -> bool:
    """Whether labels satisfy every matcher; true for none at all."""
    return all(matcher.matches(labels) for matcher in matchers)


def parse_matchers(text: str) -> tuple[Matcher, ...]:
    """Read one or several matchers, with or without braces.

    Raises:
        MatcherError: it is none, or one that Alertmanager's own parsers read differently.
    """
    if len(text) > _LONGEST:
        raise MatcherError(f"the matcher is {len(text)} characters long; at most {_LONGEST} are taken")
    return _Parser(text).parse()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Token:
    kind: str  # one of `{`, `}`, `,`, `operator`, `text`
    text: str
    at: int


class _Parser:
    """Recursive descent over the tokens of one text; `wrong` makes every error name text and place."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def parse(self) -> tuple[Matcher, ...]:
        tokens = list(self._tokens())
        inside = self._without_braces(tokens)
        matchers: list[Matcher] = []
        while inside:
            matchers.append(self._matcher(inside[:3]))
            inside = inside[3:]
            if inside and inside[0].kind != ",":
                raise self._wrong(inside[0].at, "expected a comma or the end")
            inside = inside[1:]
        if not matchers:
            raise self._wrong(0, 'holds no matcher; write one such as severity="critical"')
        return tuple(matchers)

    def _without_braces(self, tokens: list[_Token]) -> list[_Token]:
        if not tokens or tokens[0].kind != "{":
            return tokens
        if tokens[-1].kind != "}":
            raise self._wrong(len(self._text), "expected the closing brace")
        return tokens[1:-1]

    def _matcher(self, tokens: list[_Token]) -> Matcher:
        wanted = (("text", "a label name"), ("operator", "=, !=, =~ or !~"), ("text", "a value in double quotes"))
        for index, (kind, what) in enumerate(wanted):
            if index >= len(tokens):
                raise self._wrong(len(self._text), f"expected {what}, found the end")
            if tokens[index].kind != kind:
                raise self._wrong(tokens[index].at, f"expected {what}, found {tokens[index].text!r}")
        name, operator, value = tokens
        if not name.text:
            raise self._wrong(name.at, "a label name is never empty")
        pattern = self._pattern(value) if "~" in operator.text else None
        return Matcher(name=name.text, operator=operator.text, value=value.text, pattern=pattern)

    def _pattern(self, value: _Token) -> re.Pattern[str]:
        # What Python warns about, as [[:alpha:]], RE2 reads as something else: better refused than another condition.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                return re.compile(value.text, re.ASCII)  # \d, \w and \s mean ASCII in Alertmanager's RE2
            except (re.error, RecursionError, OverflowError, Warning) as error:
                raise self._wrong(value.at, f"{value.text!r} is no regular expression that is taken: {error}") from None

    # Tokens

    def _tokens(self) -> Iterator[_Token]:
        while self._at < len(self._text):
            start, first = self._at, self._text[self._at]
            operator = next((one for one in _OPERATORS if self._text.startswith(one, start)), None)
            if first.isspace():
                self._at += 1
            elif operator is not None:
                self._at += len(operator)
                yield _Token(kind="operator", text=operator, at=start)
            elif first in "{},":
                self._at += 1
                yield _Token(kind=first, text=first, at=start)
            else:
                yield _Token(kind="text", text=self._quoted() if first == '"' else self._bare(), at=start)

    def _bare(self) -> str:
        start = self._at
        while self._at < len(self._text) and not self._ends_bare(self._text[self._at]):
            self._at += 1
        if self._at == start:
            raise self._wrong(start, f"{self._text[start]!r} must stand in double quotes")
        return self._text[start : self._at]

    @staticmethod
    def _ends_bare(character: str) -> bool:
        return character.isspace() or character in _RESERVED

    def _quoted(self) -> str:
        start, read = self._at, bytearray()
        self._at += 1
        while self._at < len(self._text):
            character = self._text[self._at]
            self._at += 1
            if character == '"':
                return self._decoded(start, read)
            read += self._escaped() if character == "\\" else character.encode("utf-8", "surrogatepass")
        raise self._wrong(start, "the closing quote is missing")

    def _escaped(self) -> bytes:
        start, letter = self._at - 1, self._text[self._at : self._at + 1]
        self._at += 1
        if letter in _BARE_ESCAPES:
            return _BARE_ESCAPES[letter]
        size = _CODED_ESCAPES.get(letter, 0)
        digits = self._text[self._at : self._at + size]
        if not size or len(digits) < size or not _HEX.issuperset(digits):
            raise self._wrong(
                start,
                f"the escape \\{letter} is not taken: Alertmanager's parsers read it differently; write \\\\{letter}",
            )
        self._at += size
        code = int(digits, 16)
        if letter == "x":
            return bytes([code])
        if code > 0x10FFFF:
            raise self._wrong(start, f"\\{letter}{digits} is no character")
        return chr(code).encode("utf-8", "surrogatepass")

    def _decoded(self, start: int, read: bytearray) -> str:
        try:
            return read.decode()
        except UnicodeDecodeError:
            raise self._wrong(start, "the quoted text is not UTF-8") from None

    def _wrong(self, at: int, reason: str) -> MatcherError:
        return MatcherError(f"{self._text!r} is not an Alertmanager matcher: {reason} (character {at + 1})")
