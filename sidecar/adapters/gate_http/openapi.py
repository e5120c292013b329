"""The gate's description in OpenAPI 3.1, from the tables that its questions are read with.

The gate itself serves no description: it knows `/gate` and order checks and answers 404 for all else. So the document
is made by `python -m sidecar.adapters.gate_http.openapi`, stands in `docs/schema/gate.openapi.json`, and is compared by
a test.
"""

import json
from pathlib import Path
from typing import Any, Final

from sidecar.adapters.gate_http.connection import GateLimits
from sidecar.adapters.gate_http.orders_json import INTENTS, MAX_DIGITS, MAX_ORDERS, MAX_SYMBOL, SIDES
from sidecar.core.snapshot import ReasonCode
from sidecar.core.states import Restriction, State

FILE: Final = Path("docs/schema/gate.openapi.json")
"""From the top of the repository."""

METHODS: Final = ("get", "head", "post", "put", "patch", "delete", "options", "trace")
"""Those that OpenAPI can name; the gate takes every other one too."""

Schema = dict[str, Any]

_TEXT: Final[Schema] = {"type": "string"}
_NUMBER: Final[Schema] = {"type": "number"}
_ABOUT: Final = """\
200 is yes and 403 is no, and there is no other answer to a question at /gate; no answer at all must count as no. Any
method will do, and the body is not read. What cannot be read as HTTP gets 400, a head that is too large 431, any
other path 404, all of them as problem documents whose decision is deny. Nobody is asked for a credential: the gate is
read-only and listens on loopback and on a Unix socket.
"""


def describe() -> dict[str, Any]:
    """The whole document."""
    gate = {method: _question(method) for method in METHODS}
    below = {
        "name": "anything",
        "in": "path",
        "required": True,
        "schema": _TEXT,
        "description": "Whatever a proxy appends; it is not looked at, and may hold slashes.",
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "killswitch-sidecar gate", "version": "1", "description": _ABOUT},
        "paths": {
            "/gate": gate,
            "/gate/{anything}": {"parameters": [below], **gate},
            "/v1/orders/check": {"post": _check()},
        },
        "components": {"schemas": _schemas()},
        "security": [],
    }


def _question(method: str) -> Schema:
    return {
        "summary": "May an order be sent?",
        "parameters": [
            {
                "name": "X-Order-Intent",
                "in": "header",
                "required": False,
                "schema": _TEXT,
                "description": "new, reduce or cancel; anything else, and more than one, counts as new.",
            }
        ],
        "responses": {
            "200": _decision("yes", with_body=method != "head"),
            "403": _decision("no", with_body=method != "head"),
        },
    }


def _decision(description: str, *, with_body: bool) -> Schema:
    headers: dict[str, Schema] = {
        "X-Killswitch-Switch": _TEXT,
        "X-Killswitch-State": {"enum": list(State)},
        "X-Killswitch-Restriction": {"enum": [each.label for each in Restriction]},
        "X-Killswitch-Factor": _TEXT,
        "X-Killswitch-Reason": {"enum": list(ReasonCode)},
        "X-Killswitch-Decision-Id": _TEXT,
        "Cache-Control": {"const": "no-store"},
    }
    said: Schema = {
        "description": description,
        "headers": {
            name: {"required": True, "schema": {"type": "string", **schema}} for name, schema in headers.items()
        },
    }
    if with_body:
        said["content"] = {"application/json": {"schema": _reference("Decision")}}
    return said


def _check() -> Schema:
    problem = {"application/problem+json": {"schema": _reference("Refusal")}}
    decisions = {"anyOf": [_reference("Decision"), {"type": "array", "items": _reference("Decision"), "minItems": 1}]}
    orders = {"type": "array", "items": _reference("Order"), "minItems": 1, "maxItems": MAX_ORDERS}
    return {
        "summary": "May these orders be sent? Each is decided with those allowed before it counted as open.",
        "requestBody": {
            "required": True,
            "description": f"At most {GateLimits().check_bytes} bytes.",
            "content": {"application/json": {"schema": {"anyOf": [_reference("Order"), orders]}}},
        },
        "responses": {
            "200": {
                "description": "one decision, or for a list one for each order, in its order",
                "content": {"application/json": {"schema": decisions}},
            },
            "400": {"description": "malformed; nothing may be sent", "content": problem},
            "413": {"description": "the body is too large; nothing may be sent", "content": problem},
        },
    }


def _schemas() -> dict[str, Schema]:
    decision = {
        "decision": {"enum": ["allow", "deny"]},
        "decision_id": _TEXT,
        "switch": _TEXT,
        "state": {"enum": list(State)},
        "restriction": {"enum": [each.label for each in Restriction]},
        "position_limit_factor": {"type": "number", "minimum": 0, "maximum": 1},
        "max_quantity": _or_null({"anyOf": [_NUMBER, _TEXT]}),
        "reason": _reference("Reason"),
        "epoch": {"type": "integer", "minimum": 0},
        "valid_for_ms": {"type": "integer", "minimum": 0},
    }
    problem = {"type": _TEXT, "title": _TEXT, "status": {"type": "integer"}, "detail": _TEXT}
    reason = {
        "code": {"enum": list(ReasonCode)},
        "message": _TEXT,
        "trigger": _or_null(_TEXT),
        "value": _or_null(_NUMBER),
        "limit": _or_null(_NUMBER),
        "since": _or_null({"type": "string", "format": "date-time"}),
        "release": _TEXT,
    }
    return {
        "Order": {"anyOf": [_reference("Cancel"), _reference("NewOrder")]},
        "Cancel": {
            "type": "object",
            "description": "Needs only its intent, and always passes.",
            "required": ["intent"],
            "properties": {"intent": {"const": "cancel"}},
        },
        "NewOrder": _order(),
        "Decision": _object(decision),
        "Reason": _object(reason),
        "Refusal": _object({**problem, **decision, "decision": {"const": "deny"}}),
    }


def _order() -> Schema:
    decimal = {"type": "string", "pattern": rf"^[0-9]{{1,{MAX_DIGITS}}}$"}
    bound = 10**15
    number = {"anyOf": [{"type": "number", "minimum": -bound, "maximum": bound}, decimal]}
    positive = {
        "anyOf": [{"type": "number", "minimum": 1e-9, "maximum": bound}, {**decimal, "pattern": "^[1-9][0-9]{0,15}$"}]
    }
    natural = {"anyOf": [{"type": "number", "minimum": 0, "maximum": bound}, decimal]}
    return {
        "type": "object",
        "description": f"Numbers are JSON numbers or decimal strings of at most {MAX_DIGITS} digits.",
        "required": ["side", "quantity"],
        "additionalProperties": False,
        "properties": {
            "intent": _or_null({"enum": [intent for intent in INTENTS if intent != "cancel"]}),
            "symbol": _or_null({"type": "string", "maxLength": MAX_SYMBOL}),
            "side": {"enum": list(SIDES)},
            "quantity": positive,
            "position": _or_null(number),
            "open_quantity": natural,
            "position_limit": _or_null(natural),
            "reduce_only": _or_null({"type": "boolean"}),
        },
    }


def _object(members: dict[str, Schema]) -> Schema:
    return {"type": "object", "required": list(members), "properties": members, "additionalProperties": False}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def text() -> str:
    """The document as it is kept."""
    return json.dumps(describe(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
