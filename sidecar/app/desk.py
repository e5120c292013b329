"""The desk behind the operations API and the control socket: turns requests into events, and the switch into documents.

Answers a stop only once the gate is closed and the state is durable, or says that it is not.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidecar.adapters import audit_log
from sidecar.adapters.operations_http import ReceivedAlert
from sidecar.app.alerts import MOST_ALERTS, Result
from sidecar.app.audit_trail import audit_event
from sidecar.app.clock import stamp
from sidecar.app.health import Check
from sidecar.app.status import recovery_document, status_document, trigger_document
from sidecar.core.errors import ApprovalError, InvalidTransition, NotDurable, RecoveryBlocked
from sidecar.core.events import Cause, CauseCode, Kill
from sidecar.core.orders import Intent, decide_blind
from sidecar.core.states import Mode, Restriction
from sidecar.rules.model import AlertMatch
from sidecar.version import __version__

if TYPE_CHECKING:
    from sidecar.app.application import Application

log = logging.getLogger("sidecar.desk")

DURABLE_WITHIN_SECONDS = 2.0
STREAM_SIZE = 16
STREAM_INTERVAL_SECONDS = 1.0
SAME_MOMENT_SECONDS = 0.05

Document = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Told:
    """What streams were told last: when (monotonic seconds), after which change, and what."""

    at: float
    version: int
    documents: tuple[tuple[str, Document], ...]


class Desk:
    """Serves one application."""

    def __init__(self, app: "Application") -> None:
        self._app = app
        self._changed = asyncio.Event()
        self._reading_audit = asyncio.Lock()
        self._checking: asyncio.Task[Document] | None = None
        self._version = 0
        self._told: _Told | None = None

    # Reading

    def status(self) -> Document:
        """The whole switch, as `/api/v1/status` answers it."""
        app = self._app
        app.refresh()  # else it could say "ready" for one heartbeat while the gate still denies
        snapshot = app.switch.snapshot()
        not_ready = app.not_ready()
        return status_document(
            snapshot=snapshot,
            state=app.switch.state,
            decision=decide_blind(snapshot, app.switch.policies.gate, Intent.NEW),
            demands=app.switch.demands,
            now=app.clock.now(),
            policies=app.switch.policies,
            step_waits_for=app.recoveries.step_waits_for,
            extra={
                "version": __version__,
                "ready": not_ready is None or app.switch.mode is Mode.DISABLED,
                "not_ready_reason": not_ready,
                "sources": [
                    {"name": name, "up": up, "error": error or None} for name, up, error in app.sources.states()
                ],
                "problems": self._problems(),
                "config": app.reloader.document(),
                "durable": app.keeper.durable,
                "audit_head_sequence": app.memory.audit_head if app.memory else 0,
                "started": stamp(app.started.wall),
            },
        )

    def _problems(self) -> list[str]:
        app = self._app
        found = [app.failure[1] if app.failure else None, app.storage_error, app.page_error, app.approvers_error]
        found.append(app.keeper.last_write_error)
        found += app.notifier.problems
        found.append(app.memory.audit_error if app.memory else None)
        found.append(f"the last reload failed: {app.reloader.error}" if app.reloader.error else None)
        if app.switch.mode is Mode.SHADOW:
            found.append("shadow mode: nothing is blocked but by an operator's own kill")
        if app.switch.mode is Mode.DISABLED:
            found.append("disabled: nothing is evaluated and nothing is blocked")
        approvers = app.recoveries.approvers
        if app.switch.policies.recovery.require_approval and (approvers is None or approvers.count == 0):
            found.append(
                "no approver is configured: a kill cannot be recovered from; set recovery.approvers_file or "
                "KILL_SWITCH_APPROVAL_CODE"
            )
        found += [app.reloader.waiting, app.reloader.restart]
        found += app.operations.problems if app.operations else ()
        found.append(self._deaf_alert_rules())
        return [problem for problem in found if problem]

    def _deaf_alert_rules(self) -> str | None:
        settings = self._app.settings
        webhook = settings.alertmanager.webhook
        if webhook.token_file or webhook.allow_unauthenticated or settings.operations.tokens_file:
            return None
        alerts = [rule.trigger for rule in self._app.evaluator.rules.rules if isinstance(rule.condition, AlertMatch)]
        if not alerts:
            return None
        return (
            "no credential lets Alertmanager in (alertmanager.webhook.token_file), so these rules can never fire: "
            + ", ".join(alerts)
        )

    def triggers(self) -> Document:
        """Every rule with its trigger."""
        app = self._app
        waivers = {waiver.trigger: waiver for waiver in app.switch.state.waivers}
        return {
            "triggers": [
                trigger_document(rule, app.evaluator.triggers[rule.trigger], waivers.get(rule.trigger))
                for rule in app.evaluator.rules.rules
            ]
        }

    def recovery(self) -> Document:
        """The recovery part of the status."""
        app = self._app
        return recovery_document(app.switch.state, app.clock.now(), app.switch.policies, app.recoveries.step_waits_for)

    async def health(self) -> Document:
        """Run the health checks now; includes readiness. Who asks while they run gets the same answer."""
        if self._checking is None:
            self._checking = asyncio.create_task(self._check_health(), name="health checks")
            self._checking.add_done_callback(self._checked)
        return await asyncio.shield(self._checking)

    def _checked(self, _: "asyncio.Task[Document]") -> None:
        self._checking = None

    async def _check_health(self) -> Document:
        app = self._app
        checks = list(await app.recoveries.check_health())
        not_ready = app.not_ready()
        checks.append(Check(name="ready", ok=not_ready is None, seen=not_ready or "ready", wanted="ready"))
        return {
            "healthy": all(check.ok for check in checks),
            "checks": [
                {"name": check.name, "ok": check.ok, "seen": check.seen, "wanted": check.wanted} for check in checks
            ],
        }

    async def audit(
        self, *, since: datetime | None, until: datetime | None, types: set[str] | None, limit: int | None
    ) -> list[Document]:
        """The newest audit events that fit, newest last."""
        folder = Path(self._app.settings.storage.dir) / "audit"
        async with self._reading_audit:  # one at a time: each holds the interpreter that the gate needs
            return await asyncio.to_thread(audit_log.read, folder, since=since, until=until, types=types, limit=limit)

    def live(self) -> str | None:
        """Why the process should be restarted; None while it should not."""
        return self._app.live()

    def ready(self) -> str | None:
        """Why the sidecar is not up yet; None once it is. Independent of kills and of Prometheus."""
        return self._app.config_ready()

    def changed(self) -> None:
        """Wake those who stream the status."""
        self._version += 1
        self._changed.set()

    def _shown(self) -> tuple[tuple[str, Document], ...]:
        """What streams tell now; all that ask at the same moment get the same documents, made once."""
        now, told = self._app.clock.now().mono, self._told
        if told is None or told.version != self._version or now - told.at > SAME_MOMENT_SECONDS:
            documents = (("status", self.status()), ("triggers", self.triggers()))
            told = self._told = _Told(at=now, version=self._version, documents=documents)
        return told.documents

    async def subscribe(self) -> AsyncIterator[tuple[str, Document]]:
        """Stream the status: at once, at each change, and once a second so that ages and timers move."""
        while True:
            documents, version = self._shown(), self._version
            for name, document in documents:
                yield name, document
            if version != self._version:
                continue  # it changed while the documents were taken
            self._changed.clear()
            try:
                async with asyncio.timeout(STREAM_INTERVAL_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                continue

    # Changing

    async def trigger(self, *, reason: str, by: str | None, by_verified: bool, restriction: str | None) -> Document:
        """Stop, now.

        Raises:
            InvalidTransition: the switch is disabled.
            NotDurable: stopped, but not on disk within 2 s; the kill stays in force and is written later.
            ValueError: the restriction is not one.
        """
        app, now = self._app, self._app.clock.now()
        asked = None if restriction is None else Restriction.from_label(restriction)
        if asked is Restriction.NONE:
            raise ValueError("a kill restricts: choose halt or reduce_only")
        who = by or "operator"
        cause = Cause(code=CauseCode.OPERATOR, reason=reason, time=now.wall, by=who, by_verified=by_verified)
        try:
            app.keeper.apply(Kill(cause=cause, restriction=asked))
        except InvalidTransition as error:
            app.keeper.audit(audit_event("kill.refused", now, by=who, reason=str(error), asked_for=reason))
            raise
        return await self._durable_status()

    async def recover(
        self, *, by: str, reason: str, code: str | None, waive: Sequence[Mapping[str, object]]
    ) -> Document:
        """Ask for a recovery; see RecoveryDesk.recover for what it raises."""
        await self._refused_durably(self._app.recoveries.recover(by=by, reason=reason, code=code, waivers=waive))
        return await self._durable_status()

    async def approve(self, *, by: str, code: str) -> Document:
        """Approve the recovery that waits; see RecoveryDesk.approve for what it raises."""
        await self._refused_durably(self._app.recoveries.approve(by=by, code=code))
        return await self._durable_status()

    async def cancel(self, *, by: str, reason: str, by_verified: bool) -> Document:
        """Take a recovery back; raise InvalidTransition where there is none."""
        self._app.recoveries.cancel(by=by, reason=reason, by_verified=by_verified)
        return await self._durable_status()

    async def alertmanager(self, *, alerts: Sequence[ReceivedAlert], truncated: bool, trusted: bool) -> Document:
        """Take over alerts; the rules have acted on them when this waits for the disk.

        Raises:
            InvalidTransition: the switch is disabled.
            NotDurable: not on disk within 2 s, or too many to keep; what they fire is in force all the same.
            StorageError: no rules are loaded.
        """
        counts = await self._app.alerts.receive(alerts, truncated=truncated, trusted=trusted)
        status = await self._durable_status()
        if counts[Result.REFUSED]:
            raise NotDurable(
                f"{counts[Result.REFUSED]} alerts fired their rules but cannot be kept: {MOST_ALERTS} are firing "
                "already; let webhook.match and the rules take only alerts that stop trading",
                status=status,
            )
        shown = ("switch", "state", "restriction", "durable", "epoch")
        return {**{result.value: count for result, count in counts.items()}, **{name: status[name] for name in shown}}

    def webhook_turned_away(self, result: str) -> None:
        """Count a notification that was not read: `malformed` or `refused`."""
        self._app.alerts.results[result] += 1

    async def reload(self) -> None:
        """Read configuration and rules again; raise SettingsError or RuleFileError where they cannot be used."""
        await self._app.reloader.reload(by="operator")

    async def _refused_durably(self, attempt: Awaitable[None]) -> None:
        try:
            await attempt
        except (RecoveryBlocked, ApprovalError):
            # The request was stored first: were only that on disk at a crash, a restart would take it up again. And a
            # wrong code counts only once it is on disk.
            await self._app.keeper.settled(DURABLE_WITHIN_SECONDS)
            raise

    async def _durable_status(self) -> Document:
        if await self._app.keeper.settled(DURABLE_WITHIN_SECONDS):
            return self.status()
        status = self.status()
        why = self._app.keeper.last_write_error or self._app.storage_error or "the volume does not answer"
        raise NotDurable(
            f"in force, but NOT durable: {why}. It is written as soon as that is possible; until then a restart of the "
            "sidecar could forget it.",
            status=status,
        )
