"""Write decisions and problems as JSON, in the one shape that every answer of the gate has.

Everything that does not change from answer to answer is written once for each snapshot. Numbers are written from
decimals digit by digit; a float that JSON has no word for (NaN, infinite) becomes null. Knows nothing of HTTP.
"""

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal

from sidecar.core.orders import Decision, plain
from sidecar.core.policy import GatePolicy
from sidecar.core.snapshot import Reason, Snapshot

_LARGEST_WHOLE = 2.0**53


def _number(value: float | None) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < _LARGEST_WHOLE else value


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _compact(document: Mapping[str, object]) -> str:
    return json.dumps(document, separators=(",", ":"), allow_nan=False)


def reason_document(reason: Reason) -> dict[str, object]:
    """The `reason` of an answer; `since` is RFC 3339 in UTC with milliseconds."""
    return {
        "code": reason.code.value,
        "message": reason.message,
        "trigger": reason.trigger,
        "value": _number(reason.value),
        "limit": _number(reason.limit),
        "since": _time(reason.since),
        "release": reason.release,
    }


class DecisionWriter:
    """Writes decisions taken from one snapshot."""

    def __init__(self, snapshot: Snapshot, policy: GatePolicy) -> None:
        standing = {
            "switch": snapshot.switch,
            "state": snapshot.state.value,
            "restriction": snapshot.gate_restriction.label,
            "position_limit_factor": snapshot.gate_factor,
        }
        self._standing = _compact(standing)[1:-1]
        self._ending = _compact({"epoch": snapshot.epoch, "valid_for_ms": policy.lease_ms})[1:]
        self._last_reason: tuple[Reason | None, str] = (None, "")

    def parts(self, decision: Decision) -> tuple[str, str]:
        """A decision's document as what stands before its id and what stands after it."""
        word = "allow" if decision.allow else "deny"
        most = self._plain(decision.max_quantity)
        reason = self._reason(decision.reason)
        before = f'{{"decision":"{word}","decision_id":"'
        after = f'",{self._standing},"max_quantity":{most},"reason":{reason},{self._ending}'
        return before, after

    def document(self, decision: Decision, identity: str) -> str:
        """A decision's whole document."""
        before, after = self.parts(decision)
        return f"{before}{identity}{after}"

    def problem(self, decision: Decision, identity: str, *, status: int, title: str) -> bytes:
        """The same as a problem document: what was wrong with the question, and that the answer is no."""
        problem = {"type": "about:blank", "title": title, "status": status, "detail": decision.reason.message}
        return f"{_compact(problem)[:-1]},{self.document(decision, identity)[1:]}".encode()

    def _reason(self, reason: Reason) -> str:
        # Most orders of a list share one reason object; identity is enough, equality would cost more than it saves.
        last, text = self._last_reason
        if last is not reason:
            text = _compact(reason_document(reason))
            self._last_reason = (reason, text)
        return text

    @staticmethod
    def _plain(quantity: Decimal | None) -> str:
        return "null" if quantity is None else plain(quantity)
