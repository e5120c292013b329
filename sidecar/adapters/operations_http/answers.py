"""The shapes of answers, as JSON Schema, for the description of the API.

Words come from the types that the documents are drawn from, so that a state or a stage cannot be missing here. A member
that is answered and not described here is found by the tests. Members may be added: a client ignores those it does not
know.
"""

from collections.abc import Iterable
from typing import Any, Final

from sidecar.core.events import CauseCode
from sidecar.core.snapshot import ReasonCode
from sidecar.core.states import Action, Mode, Restriction, Stage, State
from sidecar.rules.triggers import Health, Status

Schema = dict[str, Any]

TEXT: Final[Schema] = {"type": "string"}
NUMBER: Final[Schema] = {"type": "number"}
COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
FLAG: Final[Schema] = {"type": "boolean"}
TIME: Final[Schema] = {"type": "string", "format": "date-time"}
FACTOR: Final[Schema] = {"type": "number", "minimum": 0, "maximum": 1}


def or_null(schema: Schema) -> Schema:
    """The same, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def words(*among: Iterable[str]) -> Schema:
    """One word of these sets."""
    return {"type": "string", "enum": [word for each in among for word in each]}


def listed(items: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": items}


def members(described: dict[str, Schema], *, optional: Iterable[str] = ()) -> Schema:
    """An object with these members."""
    absent = set(optional)
    return {
        "type": "object",
        "required": [name for name in described if name not in absent],
        "properties": described,
    }


def reference(name: str) -> Schema:
    """One of the schemas below."""
    return {"$ref": f"#/components/schemas/{name}"}


_RESTRICTION: Final = words(each.label for each in Restriction)
_ACTION: Final = words(each.label for each in Action)
_STATE: Final = words(State)

_REASON: Final = members(
    {
        "code": words(ReasonCode),
        "message": TEXT,
        "trigger": or_null(TEXT),
        "value": or_null(NUMBER),
        "limit": or_null(NUMBER),
        "since": or_null(TIME),
        "release": TEXT,
    }
)
_GATE: Final = members({"query": TEXT, "operator": TEXT, "threshold": NUMBER})
_WAIVER: Final = members({"trigger": TEXT, "threshold": or_null(NUMBER), "until": TIME, "by": TEXT})
_RECOVERY: Final = members(
    {
        "stage": words(Stage),
        "by": or_null(TEXT),
        "reason": or_null(TEXT),
        "requested": or_null(TIME),
        "approvals": listed(members({"by": TEXT, "by_verified": FLAG, "time": TIME})),
        "waivers": listed(_WAIVER),
        "approvals_needed": COUNT,
        "approvals_lapse_in_seconds": or_null(NUMBER),
        "cooldown_seconds": NUMBER,
        "cooldown_remaining_seconds": NUMBER,
        "waits_for": or_null(TEXT),
        "steps": listed(members({"factor": FACTOR, "after_seconds": NUMBER, "gates": listed(_GATE)})),
        "next_step": or_null(members({"factor": FACTOR, "in_seconds": NUMBER, "waits_for": or_null(TEXT)})),
    }
)
_CAUSE: Final = members(
    {
        "code": words(CauseCode),
        "trigger": or_null(TEXT),
        "reason": TEXT,
        "by": or_null(TEXT),
        "by_verified": FLAG,
        "time": TIME,
        "value": or_null(NUMBER),
        "limit": or_null(NUMBER),
        "count": COUNT,
    }
)
_DEMAND: Final = members(
    {
        "trigger": TEXT,
        "action": _ACTION,
        "factor": or_null(FACTOR),
        "code": TEXT,
        "message": TEXT,
        "value": or_null(NUMBER),
        "limit": or_null(NUMBER),
        "since": or_null(TIME),
    }
)
_STATUS: Final = members(
    {
        "switch": TEXT,
        "mode": words(Mode),
        "state": _STATE,
        "restriction": _RESTRICTION,
        "position_limit_factor": FACTOR,
        "stage": words(Stage),
        "since": TIME,
        "epoch": COUNT,
        "time": TIME,
        "killed_policy": _RESTRICTION,
        "audit_head_sequence": COUNT,
        "causes": listed(reference("Cause")),
        "gate": members({"decision": words(["allow", "deny"]), "reason": reference("Reason")}),
        "recovery": reference("Recovery"),
        "waivers": listed(_WAIVER),
        "demands": listed(reference("Demand")),
        "version": TEXT,
        "ready": FLAG,
        "not_ready_reason": or_null(TEXT),
        "sources": listed(members({"name": TEXT, "up": or_null(FLAG), "error": or_null(TEXT)})),
        "problems": listed(TEXT),
        "config": members(
            {
                "path": TEXT,
                "hash": TEXT,
                "last_reload_successful": FLAG,
                "last_reload": TIME,
                "error": or_null(TEXT),
            }
        ),
        "durable": FLAG,
        "started": TIME,
    }
)
_TRIGGER: Final = members(
    {
        "trigger": TEXT,
        "group": TEXT,
        "type": TEXT,
        "query": or_null(TEXT),
        "enabled": FLAG,
        "shadow": FLAG,
        "enforcing": FLAG,
        "action": _ACTION,
        "status": words(Status),
        "health": words(Health),
        "armed": FLAG,
        "ready": FLAG,
        "waived": FLAG,
        "step": or_null(_ACTION),
        "value": or_null(NUMBER),
        "threshold": or_null(NUMBER),
        "operator": or_null(TEXT),
        "limit_used_ratio": or_null(NUMBER),
        "sample_age_seconds": or_null(NUMBER),
        "since": or_null(TIME),
        "last_evaluation": or_null(TIME),
        "message": TEXT,
        "labels": {"type": "object", "additionalProperties": TEXT},
        "annotations": {"type": "object", "additionalProperties": TEXT},
    }
)
_AUDIT_EVENT: Final = members(
    {
        "seq": COUNT,
        "time": TIME,
        "type": TEXT,
        "from": or_null(_STATE),
        "to": or_null(_STATE),
        "by": or_null(TEXT),
        "reason": or_null(TEXT),
        "data": {"type": "object"},
        "prev": TEXT,
        "hash": TEXT,
    }
)
_TAKEN: Final = members(
    {
        "accepted": COUNT,
        "duplicate": COUNT,
        "ignored": COUNT,
        "refused": COUNT,
        "switch": TEXT,
        "state": _STATE,
        "restriction": _RESTRICTION,
        "durable": FLAG,
        "epoch": COUNT,
    }
)
_PROBLEM: Final = members(
    {
        "type": TEXT,
        "title": TEXT,
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": TEXT,
        "problems": {**listed(TEXT), "description": "Everything that is wrong with what was sent or read."},
        "blockers": {**listed(TEXT), "description": "What keeps a recovery from beginning."},
        "switch": TEXT,
        "state": _STATE,
        "restriction": _RESTRICTION,
        "position_limit_factor": FACTOR,
        "epoch": COUNT,
        "durable": {**FLAG, "description": "False where what is in force could not be written."},
    },
    optional=(
        "problems",
        "blockers",
        "switch",
        "state",
        "restriction",
        "position_limit_factor",
        "epoch",
        "durable",
    ),
)

SCHEMAS: Final[dict[str, Schema]] = {
    "Access": members(
        {
            "name": or_null(TEXT),
            "tokens": FLAG,
            **{act: reference("Permission") for act in ("read", "stop", "recover")},
        }
    ),
    "Permission": members({"allowed": FLAG, "status": {"type": "integer"}, "detail": or_null(TEXT)}),
    "Reason": _REASON,
    "Recovery": _RECOVERY,
    "Cause": _CAUSE,
    "Demand": _DEMAND,
    "Status": _STATUS,
    "Trigger": _TRIGGER,
    "Triggers": members({"triggers": listed(reference("Trigger"))}),
    "Health": members(
        {
            "healthy": FLAG,
            "checks": listed(members({"name": TEXT, "ok": or_null(FLAG), "seen": TEXT, "wanted": TEXT})),
        }
    ),
    "AuditEvent": _AUDIT_EVENT,
    "Audit": members({"events": listed(reference("AuditEvent"))}),
    "Taken": _TAKEN,
    "Reloaded": members({"reloaded": FLAG}),
    "Description": members({"openapi": TEXT, "info": {"type": "object"}, "paths": {"type": "object"}}),
    "Problem": _PROBLEM,
}
"""By the names that routes give to their answers."""
