"""The types that keys can have, and the base of every section, on top of pydantic.

A section collects all its problems at once: unknown keys, values of the wrong type and values that do not fit each
other, each with its path from the section on. Knows the forms of values, not the keys of any file.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from ipaddress import IPv6Address
from typing import Annotated, Any, Self, TypeVar
from urllib.parse import SplitResult, urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from sidecar.core.states import Action, Mode, Restriction
from sidecar.rules.matchers import MatcherError, parse_matchers
from sidecar.rules.model import Operator
from sidecar.settings import promql
from sidecar.settings.problems import Path, Problem
from sidecar.settings.quantities import (
    DURATION_PATTERN,
    SIZE_PATTERN,
    format_duration,
    parse_decimal,
    parse_duration,
    parse_flag,
    parse_integer,
    parse_number,
    parse_size,
)
from sidecar.settings.yaml_source import Document, Unreadable

Misfit = tuple[Path, str]
"""A path from the section on, and what is wrong there."""

_T = TypeVar("_T")
_TRUE_REFERENCE = r"\$\{"  # a value that holds a variable is judged when it is filled in, not by an editor


class Misfits(ValueError):  # noqa: N818 - pydantic collects ValueErrors; this one is a collection itself
    """All that is wrong in one section.

    Attributes:
        found: at least one misfit.
    """

    def __init__(self, found: Iterable[Misfit]) -> None:
        self.found = tuple(found)
        super().__init__("; ".join(reason for _, reason in self.found))


class Section(BaseModel):
    """Base of everything that is written as a mapping with fixed keys; an empty one means all defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, serialize_by_alias=True)

    def misfits(self) -> Iterator[Misfit]:
        """Yield what does not fit together, though every value by itself is fine."""
        yield from ()

    @classmethod
    def misfits_as_written(cls, written: Mapping[str, Any]) -> Iterator[Misfit]:  # noqa: ARG003 - for those who override it
        """Yield what can be seen before anything is read, so that it shows together with values that are wrong."""
        yield from ()

    @classmethod
    def explain_stranger(cls, key: str) -> str:
        """Say why a key does not belong here."""
        return f"unknown key{suggestion(key, cls.keys())}"

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """The keys that may be written, in the order of the documentation."""
        return tuple(info.alias or name for name, info in cls.model_fields.items())

    @model_validator(mode="wrap")
    @classmethod
    def _collect(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(value, cls):
            return value
        written = mapping(value)
        accepted = frozenset(cls.keys())
        known = {key: item for key, item in written.items() if key in accepted}
        found: list[Misfit] = [((key,), cls.explain_stranger(key)) for key in written if key not in known]
        found.extend(cls.misfits_as_written(written))
        try:
            section = handler(known)
        except ValidationError as error:
            raise Misfits([*found, *misfits_of(error)]) from None
        found.extend(section.misfits())
        if found:
            raise Misfits(found)
        return section


def misfits_of(error: ValidationError) -> Iterator[Misfit]:
    """Flatten what pydantic found, following our own collections of misfits inside."""
    for detail in error.errors(include_url=False, include_input=True):
        path: Path = tuple(part for part in detail["loc"] if part != "[key]")
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, ValidationError):
            yield from (((*path, *inner), reason) for inner, reason in misfits_of(cause))
        elif isinstance(cause, Misfits):
            yield from (((*path, *inner), reason) for inner, reason in cause.found)
        else:
            yield path, _reason(detail["type"], detail["msg"], detail["input"], cause)


def problems_of(error: ValidationError, document: Document) -> list[Problem]:
    """Give every misfit its line; values that the document itself could not make sense of are explained already."""
    return [document.problem(path, reason) for path, reason in misfits_of(error) if not document.already_reported(path)]


def _reason(kind: str, message: str, seen_value: Any, cause: Any) -> str:
    if kind == "missing":
        return "is required"
    if kind in ("tuple_type", "list_type"):
        return f"must be a list, not {seen(seen_value)}{_empty_list_hint(seen_value)}"
    if kind == "dict_type":
        return f"must be a mapping, not {seen(seen_value)}"
    return str(cause) if cause is not None else message


def _empty_list_hint(value: Any) -> str:
    return "; write [] for none, or leave the key out for its default" if value is None else ""


def seen(value: Any) -> str:
    """Describe a value for a message."""
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return repr(value if not isinstance(value, str) or len(value) <= 80 else value[:80] + "…")


def mapping(value: Any) -> Mapping[str, Any]:
    """Take a mapping, or nothing at all for an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Misfits([((), f"must be a mapping, not {seen(value)}")])
    return value


def suggestion(word: str, words: Iterable[str]) -> str:
    """Say which word was probably meant, or which there are."""
    choices = list(words)
    near = difflib.get_close_matches(word.lower(), choices, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(choices)}"


def taken_names(key: str, items: Any) -> Iterator[Misfit]:
    """Yield a misfit for each mapping in the list `key` that has the name of an earlier one."""
    first: dict[str, int] = {}
    for index, item in enumerate(items if isinstance(items, list) else []):
        name = item.get("name") if isinstance(item, dict) else None
        if isinstance(name, str) and first.setdefault(name, index) != index:
            yield (key, index, "name"), f"{name!r} is taken by {key}[{first[name]}]"


def text(value: Any) -> str:
    """Take text that is not empty."""
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {seen(value)}")  # noqa: TRY004 - pydantic takes no TypeError
    if not value.strip():
        raise ValueError("must not be empty")
    return value


def from_text(parse: Callable[[str], _T]) -> BeforeValidator:
    """A validator that reads text; a value that is there already, as a default is, passes."""

    def validate(value: Any) -> _T:
        if isinstance(value, str | dict | list | Unreadable) or value is None:
            return parse(text(value))
        return value  # type: ignore[no-any-return] # only defaults, whose type mypy has checked where they are written

    return BeforeValidator(validate)


def choice(words: Mapping[str, _T]) -> Callable[[str], _T]:
    """A reader of one word out of a closed set."""

    def parse(word: str) -> _T:
        try:
            return words[word]
        except KeyError:
            raise ValueError(f"{word!r} is not one of {', '.join(words)}") from None

    return parse


def json_text(kind: str, pattern: str = "", **more: Any) -> WithJsonSchema:
    """The JSON schema of a value that is written as text."""
    schema: dict[str, Any] = {"type": "string", "x-kind": kind, **more}
    if pattern:
        schema["pattern"] = f"^(?:{pattern})$|{_TRUE_REFERENCE}"
    return WithJsonSchema(schema)


def json_words(kind: str, words: Iterable[str]) -> WithJsonSchema:
    """The JSON schema of a word out of a closed set."""
    return WithJsonSchema(
        {"x-kind": kind, "anyOf": [{"enum": list(words)}, {"type": "string", "pattern": _TRUE_REFERENCE}]}
    )


def _json_number(kind: str, json_type: str) -> WithJsonSchema:
    return WithJsonSchema({"type": [json_type, "string"], "x-kind": kind})


def shown(default: Any, written: Any, description: str, **more: Any) -> Any:
    """A field whose default looks different in a file than in memory."""
    return Field(default=default, description=description, json_schema_extra={"default": written}, **more)


def seconds(written: str, description: str, **more: Any) -> Any:
    """A duration field with its default."""
    return shown(parse_duration(written), written, description, **more)


# --- scalar types ---------------------------------------------------------------------------------------------------

Text = Annotated[str, BeforeValidator(text), json_text("text")]


def _matcher(value: str) -> str:
    try:
        parse_matchers(value)
    except MatcherError as error:
        raise ValueError(str(error)) from None
    return value


MatcherText = Annotated[str, from_text(_matcher), json_text("matcher")]
Flag = Annotated[
    bool,
    from_text(parse_flag),
    WithJsonSchema({"x-kind": "boolean", "type": ["boolean", "string"]}),
]
Number = Annotated[float, from_text(parse_number), _json_number("number", "number")]
Integer = Annotated[int, from_text(parse_integer), _json_number("integer", "integer")]


def _count(value: str) -> int:
    number = parse_integer(value)
    if number < 1:
        raise ValueError(f"must be at least 1, not {number}")
    return number


def _natural(value: str) -> int:
    number = parse_integer(value)
    if number < 0:
        raise ValueError(f"must be 0 or more, not {value}")
    return number


Natural = Annotated[int, from_text(_natural), _json_number("integer ≥ 0", "integer")]
Count = Annotated[int, from_text(_count), _json_number("integer ≥ 1", "integer")]


def _percentage(value: str) -> float:
    number = parse_number(value.removesuffix("%").rstrip())
    if not 0 < number <= 100:
        raise ValueError(f"must be above 0 and at most 100, not {value}")
    return number


Percentage = Annotated[float, from_text(_percentage), _json_number("percent, above 0 to 100", "number")]


def _throttle_factor(value: str) -> float:
    number = parse_number(value)
    if not 0 < number < 1:
        raise ValueError(f"must be above 0 and below 1, not {value}")
    return number


ThrottleFactor = Annotated[float, from_text(_throttle_factor), _json_number("number between 0 and 1", "number")]


def _quantity(value: str) -> Decimal:
    number = parse_decimal(value)
    if number <= 0:
        raise ValueError(f"must be above 0, not {value}")
    return number


Quantity = Annotated[Decimal, from_text(_quantity), _json_number("number or decimal text, above 0", "number")]


def _limit(value: str) -> Decimal:
    number = parse_decimal(value)
    if number < 0:
        raise ValueError(f"must be 0 or more, not {value}")
    return number


Limit = Annotated[Decimal, from_text(_limit), _json_number("number or decimal text, 0 or more", "number")]

Duration = Annotated[float, from_text(parse_duration), json_text("duration", f"0|{DURATION_PATTERN}")]

SHORTEST_INTERVAL = 0.01  # seconds; below it a loop does nothing but start over


def _interval(value: str) -> float:
    duration = parse_duration(value)
    if duration < SHORTEST_INTERVAL:
        raise ValueError(f"must be at least {format_duration(SHORTEST_INTERVAL)}, not {value}")
    return duration


Interval = Annotated[float, from_text(_interval), json_text("duration ≥ 10ms", DURATION_PATTERN)]


def _positive_duration(value: str) -> float:
    duration = parse_duration(value)
    if duration <= 0:
        raise ValueError(f"must be above 0, not {value}")
    return duration


PositiveDuration = Annotated[float, from_text(_positive_duration), json_text("duration above 0", DURATION_PATTERN)]
Size = Annotated[int, from_text(parse_size), json_text("size", f"0|{SIZE_PATTERN}")]

_OPERATORS = {operator.value: operator for operator in Operator} | {operator.symbol: operator for operator in Operator}


def _operator(value: Any) -> Operator:
    if isinstance(value, Operator):
        return value
    if value == "":
        # `operator: >` starts a folded block in YAML, which is then empty.
        raise ValueError("is empty; write an operator such as '>' in quotes, or as a word, gt")
    return choice(_OPERATORS)(text(value))


Comparison = Annotated[Operator, BeforeValidator(_operator), json_words("operator", _OPERATORS)]

_ACTIONS = {action.label: action for action in Action}
ActionWord = Annotated[Action, from_text(choice(_ACTIONS)), json_words("action", _ACTIONS)]

_MODES = {mode.value: mode for mode in Mode}
ModeWord = Annotated[Mode, from_text(choice(_MODES)), json_words("mode", _MODES)]

_POLICIES = {policy.label: policy for policy in (Restriction.HALT, Restriction.REDUCE_ONLY)}
KilledPolicy = Annotated[
    Restriction,
    BeforeValidator(lambda value: value if isinstance(value, Restriction) else choice(_POLICIES)(text(value))),
    json_words("restriction", _POLICIES),
]


def word(*words: str) -> Any:
    """Metadata of a text type that takes only these words."""
    return from_text(choice({each: each for each in words}))


def check_query(value: str) -> str:
    """Take PromQL that gives numbers at one instant."""
    try:
        parsed = promql.parse(value)
    except promql.PromQLError as error:
        raise ValueError(str(error)) from None
    if parsed.kind not in ("vector", "scalar"):
        raise ValueError(f"{value!r} gives a {parsed.kind}; a query must give numbers at one instant")
    return value


Query = Annotated[str, from_text(check_query), json_text("PromQL")]

# --- names and places -----------------------------------------------------------------------------------------------

_LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


def _label_name(value: Any) -> str:
    name = text(value)
    if not _LABEL_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a label name; use letters, digits and _, and begin with no digit")
    return name


def _label_value(value: Any) -> str:
    # An empty value is a label that is not there, in Prometheus and in Alertmanager alike; it harms nobody.
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {seen(value)}")  # noqa: TRY004 - pydantic takes no TypeError
    return value


def _nothing_is_an_empty_mapping(value: Any) -> Any:
    return {} if value is None else value


Labels = Annotated[
    dict[Annotated[str, BeforeValidator(_label_name)], Annotated[str, BeforeValidator(_label_value)]],
    BeforeValidator(_nothing_is_an_empty_mapping),
    WithJsonSchema(
        {"type": "object", "x-kind": "labels", "additionalProperties": {"type": ["string", "number", "boolean"]}}
    ),
]

_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110, token


def _header_name(value: Any) -> str:
    name = text(value)
    if not _HEADER_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of an HTTP header")
    return name


def _header_value(value: Any) -> str:
    content = text(value)
    if not content.isascii() or not content.isprintable():
        raise ValueError("must be printable ASCII")  # what was seen may be a secret
    return content


Headers = Annotated[
    dict[Annotated[str, BeforeValidator(_header_name)], Annotated[str, BeforeValidator(_header_value)]],
    BeforeValidator(_nothing_is_an_empty_mapping),
    WithJsonSchema({"type": "object", "x-kind": "headers", "additionalProperties": {"type": "string"}}),
]
Limits = Annotated[
    dict[Text, Limit],
    BeforeValidator(_nothing_is_an_empty_mapping),
    WithJsonSchema(
        {"type": "object", "x-kind": "limits by symbol", "additionalProperties": {"type": ["number", "string"]}}
    ),
]


def split_address(value: str) -> tuple[str, int]:
    """Read `host:port`, an IPv6 host in brackets; raise ValueError for any other form."""
    host, colon, port = value.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = str(IPv6Address(host[1:-1]))
    elif ":" in host:
        raise ValueError(f"{value!r} is not host:port; write an IPv6 address in brackets, [::1]:9780")
    if not colon or not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f"{value!r} is not host:port, such as 127.0.0.1:9780")
    if not re.fullmatch(r"[0-9A-Za-z._:\-]+", host):
        raise ValueError(f"{host!r} is not a host name or an address")
    return host, int(port)


def _address(value: str) -> str:
    split_address(value)
    return value


Address = Annotated[str, from_text(_address), json_text("host:port")]


def _masked(url: str) -> str:
    return repr(re.sub(r"//[^/]*@", "//…@", url))


def _url_parts(value: str) -> SplitResult:
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise ValueError(f"{_masked(value)} is not an http:// or https:// URL") from None
    if not usable or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError(f"{_masked(value)} is not an http:// or https:// URL")
    if parts.fragment:
        raise ValueError(f"has a fragment; leave out #{parts.fragment}")
    return parts


def _without_credentials(value: str) -> str:
    if "@" in _url_parts(value).netloc:
        raise ValueError("must not hold a user or password: they would end up in logs and reports")
    return value


def _base_url(value: str) -> str:
    if _url_parts(value).query:
        raise ValueError(f"{_masked(value)} has a query; write the address alone, a path prefix is kept")
    return value.rstrip("/")


PrometheusURL = Annotated[str, from_text(_base_url), json_text("URL", "https?://.+")]
"""May hold a user and a password, as is usual for Prometheus; whoever shows it must take them out."""

BaseURL = Annotated[
    str, from_text(lambda value: _base_url(_without_credentials(value))), json_text("URL", "https?://.+")
]
URL = Annotated[str, from_text(_without_credentials), json_text("URL", "https?://.+")]


def _file_path(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not hold a NUL character")
    return value


FilePath = Annotated[str, from_text(_file_path), json_text("path")]
