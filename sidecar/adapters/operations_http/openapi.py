"""The API's description of itself in OpenAPI 3.1, made from the same routes and models that serve it.

So it cannot promise a path, a role or a member that is not there. Which refusals a path knows follows from what it is:
who may ask, what it reads, and what the desk may answer it.
"""

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final, Protocol

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from sidecar.adapters.operations_http.answers import SCHEMAS, TEXT, Schema, reference
from sidecar.adapters.operations_http.tokens import Role

_TEMPLATE: Final = "#/components/schemas/{model}"
_ABOUT: Final = """\
The same API is served on the operations listener, where credentials are asked for, and on the control socket, where
reaching it is the credential. `HEAD` works wherever `GET` does. Every error is a problem document (RFC 9457); beside
the answers below, a path that does not exist gets 404, a method that a path does not have 405 with `Allow`, a defect of
ours 500, and what cannot be read as HTTP 400.

Where there are no tokens, reading needs no credential and everything that changes something is refused with 403. Where
the web configuration names users, every path but health needs a user or a token; users have the role viewer.
"""
_WHY: Final = {
    400: "malformed: the body, a parameter, the Host header, or a file that was to be read",
    401: "no credential, or none that is known",
    403: "the credential's roles do not suffice, nobody may change anything here, or the code is wrong",
    408: "the body did not arrive in time",
    409: "not possible in this state",
    413: "the body is too large",
    415: "the body is not application/json, or is compressed",
    417: "an Expect header other than 100-continue",
    421: "the Host header is no name of this sidecar",
    429: "too many wrong codes; the next one is read later",
    503: "not ready, not durable, or too much is asked at once",
}
_HEADERS: Final[dict[int, dict[str, Schema]]] = {
    401: {"WWW-Authenticate": {"schema": TEXT, "required": True, "description": "Bearer, with users also Basic."}},
    429: {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "required": True, "description": "Seconds."}},
}
_OF_EVERY_PATH: Final = frozenset({400, 417, 421, 503})
_OF_A_CREDENTIAL: Final = frozenset({401, 403})
_OF_A_BODY: Final = frozenset({400, 408, 413, 415})


class Described(Protocol):
    """What is said about a route."""

    @property
    def method(self) -> str: ...  # noqa: D102
    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def role(self) -> Role | None: ...  # noqa: D102
    @property
    def summary(self) -> str: ...  # noqa: D102
    @property
    def body(self) -> type[BaseModel] | None: ...  # noqa: D102
    @property
    def media_type(self) -> str: ...  # noqa: D102
    @property
    def answer(self) -> str | None: ...  # noqa: D102
    @property
    def refusals(self) -> frozenset[int]: ...  # noqa: D102
    @property
    def parameters(self) -> tuple[Mapping[str, Any], ...]: ...  # noqa: D102


def describe(routes: Iterable[Described], open_paths: frozenset[str]) -> dict[str, Any]:
    """The description of these routes; `open_paths` ask nobody for a credential."""
    routes = tuple(routes)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, is_open=route.path in open_paths)
    bodies = [route.body for route in routes if route.body is not None]
    _, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=_TEMPLATE)
    return {
        "openapi": "3.1.0",
        "info": {"title": "killswitch-sidecar operations API", "version": "1", "description": _ABOUT},
        "paths": paths,
        "components": {
            "schemas": {**schemas.get("$defs", {}), **SCHEMAS},
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "A token with the role that is named."},
                "user": {"type": "http", "scheme": "basic", "description": "A user of the web configuration."},
            },
        },
    }


def refusals_of(route: Described, *, is_open: bool) -> frozenset[int]:
    """Every status but 200 that a path answers."""
    found = _OF_EVERY_PATH | route.refusals
    if not is_open:
        found |= _OF_A_CREDENTIAL if route.role is not None else {401}
    return found | _OF_A_BODY if route.body is not None else found


def _operation(route: Described, *, is_open: bool) -> dict[str, Any]:
    refusals = {str(status): _refusal(status) for status in sorted(refusals_of(route, is_open=is_open))}
    said: dict[str, Any] = {
        "summary": route.summary,
        "responses": {"200": {"description": "done", "content": _content(route)}, **refusals},
        "security": _security(route, is_open=is_open),
    }
    if route.role is not None:
        said["description"] = f"Over TCP this needs the role {route.role}."
    if route.parameters:
        said["parameters"] = list(route.parameters)
    if route.body is not None:
        said["requestBody"] = {
            "required": route.method != "DELETE",
            "content": {"application/json": {"schema": reference(route.body.__name__)}},
        }
    return said


def _content(route: Described) -> dict[str, Any]:
    types = [part.strip() for part in route.media_type.split(",")]
    schema = TEXT if route.answer is None else reference(route.answer)
    return {media_type: {"schema": schema} for media_type in types}


def _refusal(status: int) -> dict[str, Any]:
    said: dict[str, Any] = {
        "description": _WHY.get(status, HTTPStatus(status).phrase),
        "content": {"application/problem+json": {"schema": reference("Problem")}},
    }
    if status in _HEADERS:
        said["headers"] = _HEADERS[status]
    return said


def _security(route: Described, *, is_open: bool) -> list[dict[str, list[str]]]:
    if is_open:
        return []
    if route.role is None:
        return [{}, {"user": []}, {"token": []}]
    if route.role is Role.VIEWER:
        return [{}, {"user": []}, {"token": [str(route.role)]}]
    return [{"token": [str(route.role)]}]
