"""What the HTTP side asks of the application: one protocol, so that neither has to know the other.

Shapes of the dictionaries are those of docs/API.md; they go out as they come.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, TypedDict


class Waive(TypedDict):
    """A rule that a recovery asks to overlook for a while.

    Keys: the rule's name, the threshold that holds meanwhile (None leaves the rule without effect), and for how many
    seconds from now.
    """

    trigger: str
    threshold: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceivedAlert:
    """One alert as Alertmanager sent it.

    Attributes:
        firing: False for one that is resolved.
        labels, annotations: as sent.
        starts_at: Unix seconds.
        fingerprint: as sent; empty if there was none.
    """

    firing: bool
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    starts_at: float
    fingerprint: str


class Desk(Protocol):
    """The running sidecar, as far as HTTP may see and move it.

    Methods that change something may raise InvalidTransition (409), RecoveryBlocked (409 with `blockers`),
    ApprovalError (403), LockedOut (429), NotDurable (503), SettingsError or RuleFileError (400 with `problems`) and
    ValueError (400). Anything else is a defect and becomes a bare 500.
    """

    def status(self) -> Mapping[str, Any]:
        """The whole status."""

    def triggers(self) -> Mapping[str, Any]:
        """All rules and their triggers."""

    def recovery(self) -> Mapping[str, Any]:
        """The recovery part of the status."""

    async def health(self) -> Mapping[str, Any]:
        """Run the health checks of a recovery now."""

    async def audit(
        self, *, since: datetime | None, until: datetime | None, types: set[str] | None, limit: int
    ) -> Sequence[Mapping[str, Any]]:
        """The newest `limit` audit events of these types (None: of all), newest last; the times are inclusive."""

    async def trigger(self, *, reason: str, by: str, by_verified: bool, restriction: str | None) -> Mapping[str, Any]:
        """Kill; return the status once the gate is closed and the state is durable."""

    async def recover(self, *, by: str, reason: str, code: str | None, waive: Sequence[Waive]) -> Mapping[str, Any]:
        """Ask for a recovery, with the first approval; return the status."""

    async def approve(self, *, by: str, code: str) -> Mapping[str, Any]:
        """Approve the recovery that waits; return the status."""

    async def cancel(self, *, by: str, reason: str, by_verified: bool) -> Mapping[str, Any]:
        """Take back the recovery under way; return the status."""

    async def alertmanager(
        self, *, alerts: Sequence[ReceivedAlert], truncated: bool, trusted: bool
    ) -> Mapping[str, Any]:
        """Take over alerts; return what became of them once the gate shows it and it is durable.

        Args:
            alerts: as sent.
            truncated: whether some were left out.
            trusted: whether a credential proves the sender.
        """

    def webhook_turned_away(self, result: str) -> None:
        """Count a notification that was not even read: `malformed` or `refused`."""

    async def reload(self) -> None:
        """Read configuration and rules anew; keep the old ones if that fails."""

    def live(self) -> str | None:
        """Why the process should be restarted; None while it lives."""

    def ready(self) -> str | None:
        """Why the sidecar is not ready; None when it is. A kill is no reason."""

    def subscribe(self) -> AsyncIterator[tuple[str, Mapping[str, Any]]]:
        """Events by name and content, for ever: a `status` at once, then whatever changes."""
