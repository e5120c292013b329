"""What may be asked: bodies and query parameters, read strictly and within bounds, or refused with every reason.

Unknown members are refused, so that a misspelt `restriction` cannot quietly become a milder one.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from typing import Annotated, Any, Final, Literal, TypeVar

from aiohttp import web
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from sidecar.adapters.operations_http.desk import Waive
from sidecar.adapters.operations_http.problems import Problem
from sidecar.settings.quantities import parse_duration

BODY_BYTES: Final = 64 * 1024
_BODY_SECONDS: Final = 10.0
_MOST_WAIVERS: Final = 1000
_MOST_EVENTS: Final = 10_000
_DEFAULT_EVENTS: Final = 100
_MOST_TYPES: Final = 100
_LONGEST_REASON: Final = 1000  # characters
_LONGEST_NAME: Final = 100
_CUT: Final = "… (cut)"
_INTEGER = re.compile(r"[0-9]{1,9}")
_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


def _one_line(text: str) -> str:
    # A control character would let a reason forge lines of a log or of a terminal. Refusing it instead would let a
    # stray tab stop a kill.
    return "".join(character if character.isprintable() else " " for character in text)


def _cut(most: int) -> AfterValidator:
    return AfterValidator(lambda text: text if len(text) <= most else text[: most - len(_CUT)] + _CUT)


Reason = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=_LONGEST_REASON),
    AfterValidator(_one_line),
]
Name = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=_LONGEST_NAME),
    AfterValidator(_one_line),
]
_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1), AfterValidator(_one_line)]
Code = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class Question(BaseModel):
    """Base of all bodies."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


class TriggerQuestion(Question):
    """Kill. Anyone who may stop can stop at once: a text that is too long is cut, not refused."""

    reason: Annotated[_Text, _cut(_LONGEST_REASON), Field(description=f"Is cut to {_LONGEST_REASON} characters.")]
    by: Annotated[_Text, _cut(_LONGEST_NAME)] | None = Field(
        default=None, description=f"Is cut to {_LONGEST_NAME} characters."
    )
    restriction: Literal["halt", "reduce_only"] | None = None


class WaiveQuestion(Question):
    """One rule to overlook in a recovery; `until` is a duration from now or an RFC 3339 time."""

    trigger: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    until: Annotated[str, StringConstraints(min_length=1, max_length=64)]

    def waive(self, now: float) -> Waive:
        """The same with its end as seconds from `now` (Unix seconds); raise ValueError for an end that is none."""
        return Waive(trigger=self.trigger, threshold=self.threshold, seconds=seconds_until(self.until, now))


class RecoveryQuestion(Question):
    """Trade again; the code is the first approval."""

    reason: Reason
    by: Name
    code: Code | None = None
    waive: Annotated[tuple[WaiveQuestion, ...], Field(max_length=_MOST_WAIVERS, strict=False)] | None = None

    def waivers(self, now: float) -> list[Waive]:
        """What it asks to overlook; raise Problem naming every end that is none."""
        found, faults = [], []
        for index, one in enumerate(self.waive or ()):
            try:
                found.append(one.waive(now))
            except ValueError as error:
                faults.append(f"waive[{index}].until: {error}")
        if faults:
            raise _malformed(faults)
        return found


class ApprovalQuestion(Question):
    """One more approval."""

    by: Name
    code: Code


class CancelQuestion(Question):
    """Take a recovery back."""

    by: Name | None = None
    reason: Reason | None = None


_Q = TypeVar("_Q", bound=Question)
Read = Callable[[web.BaseRequest], Awaitable[bytes]]


async def read_question(
    request: web.BaseRequest, model: type[_Q], *, optional: bool = False, read: Read | None = None
) -> _Q:
    """Read a JSON body.

    Args:
        request: the request.
        model: what is asked.
        optional: True takes no body at all as an empty object.
        read: takes the body off the connection, where it may be larger than BODY_BYTES.

    Raises:
        Problem: 400 malformed, 408 too slow, 413 too large, 415 not JSON.
    """
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Problem(415, "send the body without Content-Encoding")
    if "Content-Type" in request.headers and not _is_json(request):
        raise Problem(415, f"Content-Type is {request.content_type!r}; send application/json")
    body = await _read(request, read or web.BaseRequest.read)
    if not body:
        if optional:
            body = b"{}"
        else:
            raise Problem(400, "the body is empty; send a JSON object")
    elif not _is_json(request):
        raise Problem(415, "there is no Content-Type; send application/json")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _malformed(_fault(detail) for detail in error.errors(include_url=False, include_input=False)) from None


def _is_json(request: web.BaseRequest) -> bool:
    return request.content_type == "application/json"


async def _read(request: web.BaseRequest, read: Read) -> bytes:
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            return await read(request)
    except TimeoutError:
        raise Problem(408, f"the body did not arrive within {_BODY_SECONDS:g} s") from None
    except web.RequestPayloadError:
        raise Problem(400, "the body ended early or is badly framed") from None


def _fault(detail: Mapping[str, object]) -> str:
    location = detail["loc"]
    place = ".".join(str(part) for part in location) if isinstance(location, tuple) else ""
    return f"{place}: {detail['msg']}" if place else str(detail["msg"])


def _malformed(faults: Iterable[str]) -> Problem:
    problems = list(faults)
    return Problem(400, "; ".join(problems), extra={"problems": problems})


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditQuestion:
    """Which audit events; `types` None means all."""

    since: datetime | None
    until: datetime | None
    types: set[str] | None
    limit: int


AUDIT_PARAMETERS: Final[tuple[Mapping[str, Any], ...]] = (
    {
        "name": "since",
        "in": "query",
        "description": "RFC 3339, inclusive.",
        "schema": {"type": "string", "format": "date-time"},
    },
    {
        "name": "until",
        "in": "query",
        "description": "RFC 3339, inclusive.",
        "schema": {"type": "string", "format": "date-time"},
    },
    {
        "name": "type",
        "in": "query",
        "description": "May be repeated, or hold several names with commas.",
        "schema": {"type": "array", "items": {"type": "string"}, "maxItems": _MOST_TYPES},
    },
    {
        "name": "limit",
        "in": "query",
        "schema": {"type": "integer", "minimum": 1, "maximum": _MOST_EVENTS, "default": _DEFAULT_EVENTS},
    },
)
"""What `read_audit_question` reads, as OpenAPI writes it."""


def read_audit_question(query: Mapping[str, str], types: Iterable[str]) -> AuditQuestion:
    """Read the query parameters of the audit.

    Args:
        query: the parameters; `since`, `until` and `limit` are looked at, and that there is none unknown.
        types: all values of `type`, each one name or several with commas.

    Raises:
        Problem: 400 with every reason.
    """
    names = tuple(name.strip() for value in types for name in value.split(",") if name.strip())
    faults = [f"{key}: there is no such parameter" for key in query if key not in {"since", "until", "type", "limit"}]
    faults += [f"type: {len(names)} names; at most {_MOST_TYPES}"] if len(names) > _MOST_TYPES else []
    since, until, limit = None, None, _DEFAULT_EVENTS
    try:
        since = parse_time(query["since"]) if "since" in query else None
        until = parse_time(query["until"]) if "until" in query else None
        limit = _limit(query["limit"]) if "limit" in query else limit
    except ValueError as error:
        faults.append(str(error))
    if faults:
        raise _malformed(faults)
    return AuditQuestion(since=since, until=until, types=set(names) or None, limit=limit)


def _limit(text: str) -> int:
    if not _INTEGER.fullmatch(text) or not 1 <= int(text) <= _MOST_EVENTS:
        raise ValueError(f"limit: {text!r} is not a whole number from 1 to {_MOST_EVENTS}")
    return int(text)


def parse_time(text: str) -> datetime:
    """Read an RFC 3339 time; raise ValueError for any other text."""
    if not _RFC3339.fullmatch(text):
        raise ValueError(f"{text!r} is not an RFC 3339 time such as 2026-01-30T14:30:00Z")
    try:
        return datetime.fromisoformat(text.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a time that exists") from None


def seconds_until(text: str, now: float) -> float:
    """Read a duration, or an RFC 3339 time after `now` (Unix seconds), as seconds from now; raise ValueError."""
    if _RFC3339.fullmatch(text):
        seconds = parse_time(text).timestamp() - now
        if seconds <= 0:
            raise ValueError(f"{text!r} is not in the future")
    else:
        seconds = parse_duration(text)
    if not isfinite(seconds) or seconds <= 0:
        raise ValueError(f"{text!r} ends at once; write a duration such as 24h or a time to come")
    return seconds
