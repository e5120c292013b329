"""The API's description of itself in OpenAPI 3.1, made from the same routes and models that serve it.

So it cannot promise a path, a role or a member that is not there. Shapes of answers are in docs/API.md.
"""

from collections.abc import Iterable
from typing import Any, Final, Protocol

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from sidecar.adapters.operations_http.tokens import Role

_REFERENCE: Final = "#/components/schemas/{model}"


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


def describe(routes: Iterable[Described]) -> dict[str, Any]:
    """The description of these routes."""
    routes = tuple(routes)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    bodies = [route.body for route in routes if route.body is not None]
    _, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=_REFERENCE)
    problem = {
        "type": "object",
        "required": ["type", "title", "status", "detail"],
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "killswitch-sidecar operations API", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": {**schemas.get("$defs", {}), "Problem": problem},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Described) -> dict[str, Any]:
    said: dict[str, Any] = {
        "summary": route.summary,
        "responses": {
            "200": {"description": "done", "content": {route.media_type: {}}},
            "default": {
                "description": "why not",
                "content": {"application/problem+json": {"schema": {"$ref": _REFERENCE.format(model="Problem")}}},
            },
        },
    }
    if route.role is not None:
        said["security"] = [{"token": []}]
        said["description"] = f"Over TCP this needs the role {route.role}."
    if route.body is not None:
        schema = {"$ref": _REFERENCE.format(model=route.body.__name__)}
        said["requestBody"] = {
            "required": route.method != "DELETE",
            "content": {"application/json": {"schema": schema}},
        }
    return said
