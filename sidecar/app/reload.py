"""Takes over changed configuration and rule files while running; a bad file changes nothing and is said loudly.

Listeners, storage and mode hold for the life of the process. What loosens is audited as such.
"""

import asyncio
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidecar.adapters.approvers import Approvers
from sidecar.app.audit_trail import audit_event
from sidecar.app.clock import stamp
from sidecar.app.loosening import loosened_rules, loosened_settings
from sidecar.core.errors import RuleFileError, SettingsError
from sidecar.core.states import Instant, Stage, State
from sidecar.rules.model import RuleSet
from sidecar.settings.config import Settings
from sidecar.settings.everything import load_everything
from sidecar.settings.rule_files import rule_paths

if TYPE_CHECKING:
    from sidecar.app.application import Application

log = logging.getLogger("sidecar.reload")

POLL_SECONDS = 5.0
WAITING = "changes to recovery, killed_policy and approvers wait until the switch is ACTIVE and its restart complete"
FILE_LIMIT = 1024 * 1024


class Reloader:
    """Reloads one application: on demand, and when the content of its files changes."""

    def __init__(self, app: "Application") -> None:
        self.successful = True
        self.loaded = app.started.wall
        self.error: str | None = None
        self.waiting: str | None = None
        self.restart: str | None = None
        """What was changed and counts only from the next start on; None where nothing was."""
        self.loosened: tuple[Instant, str] | None = None
        """When a reload last made something less strict, and what."""
        self._app = app
        self._pending: Settings | None = None
        self._seen: str | None = None
        self._reloading = asyncio.Lock()

    def document(self) -> dict[str, Any]:
        """The `config` part of the status."""
        return {
            "path": self._app.settings.path,
            "hash": self.hash,
            "last_reload_successful": self.successful,
            "last_reload": stamp(self.loaded),
            "error": self.error,
        }

    @property
    def hash(self) -> str:
        """Hash of configuration and rules in force."""
        both = f"{self._app.settings.content_hash}\n{self._app.evaluator.rules.content_hash}"
        return hashlib.sha256(both.encode()).hexdigest()

    def failed(self, error: str) -> None:
        """Record that the files cannot be used."""
        self.successful = False
        self.error = error
        if not self._app.evaluator.rules.rules:
            self._app.rules_error = error  # nothing else can be in force, so this is why the gate is shut

    async def watch(self) -> None:
        """Look at the files' content every few seconds, for ever; reload where it has changed."""
        await self._catch_up()
        while True:
            await asyncio.sleep(POLL_SECONDS)
            self._apply_pending()
            await self._refresh_approvers()
            found = await asyncio.to_thread(self._fingerprint)
            if found != self._seen:
                try:
                    await self.reload(by="file change")
                except (SettingsError, RuleFileError):
                    continue  # recorded and logged where it was raised

    async def _catch_up(self) -> None:
        # What changed between the reading at the start and the first look here would never be noticed otherwise.
        self._seen = await asyncio.to_thread(self._fingerprint)
        try:
            settings, rules = await asyncio.to_thread(self._read)
        except (SettingsError, RuleFileError):
            return  # as at the start, or the next look at the content finds it mended
        app = self._app
        if (settings.content_hash, rules.content_hash) != (app.settings.content_hash, app.evaluator.rules.content_hash):
            self._seen = None

    async def reload(self, *, by: str) -> None:
        """Read everything again and take it over.

        Raises:
            SettingsError, RuleFileError: it cannot be used; what was in force stays in force.
        """
        async with self._reloading:
            self._seen = await asyncio.to_thread(self._fingerprint)
            try:
                settings, rules = await asyncio.to_thread(self._read)
            except (SettingsError, RuleFileError) as error:
                self.failed(str(error))
                log.error("config.reload_failed", extra={"fields": {"error": str(error)}})  # noqa: TRY400
                self._audit("config.reload_failed", by, reason=str(error))
                raise
            self._take(settings, rules, by)

    def _read(self) -> tuple[Settings, RuleSet]:
        try:
            settings, rules = load_everything(self._app.settings.path, self._app.environ)
            if settings.recovery.approvers_file is not None:
                Approvers.from_file(settings.recovery.approvers_file)
        except OSError as error:
            raise SettingsError(f"a file cannot be read: {error}; correct its mode or its mount") from error
        if not rules.files:  # more likely a mount that is being swapped than the wish to trade under no rule
            raise RuleFileError(
                f"nothing matches rules.files {list(settings.rules.files)}; check the path and the mount"
            )
        return settings, rules

    def _take(self, settings: Settings, rules: RuleSet, by: str) -> None:
        app = self._app
        changes = {
            **loosened_settings(self._known(), settings),
            **loosened_rules(app.evaluator.rules, rules),
        }
        self._note_restart(settings)
        app.rules_error = None
        app.take_sources(settings)
        app.take_alertmanager(settings)
        app.take_rules(rules)
        app.take_limits(settings)
        self.successful, self.error, self.loaded = True, None, app.clock.now().wall
        self._pending = settings
        self._apply_pending()
        self._audit("config.reloaded", by, hash=self.hash)
        log.info("config.reloaded", extra={"fields": {"by": by, "hash": self.hash}})
        if changes:
            app.config_loosened += 1
            self.loosened = (app.clock.now(), "; ".join(changes))
            self._audit("config.loosened", by, reason="; ".join(changes), changes=changes)
            log.warning("config.loosened", extra={"fields": {"changes": changes}})

    def _known(self) -> Settings:
        """The settings in force, with what waits in its place: a loosening that waits was told when it came."""
        kept, waits = self._app.settings, self._pending
        if waits is None:
            return kept
        policy = replace(kept.gate.policy, killed_policy=waits.gate.policy.killed_policy)
        return replace(kept, recovery=waits.recovery, gate=replace(kept.gate, policy=policy))

    def _note_restart(self, settings: Settings) -> None:
        keys = list(waits_for_restart(self._app.settings, settings))
        self.restart = f"changes to {', '.join(keys)} take effect at the next start" if keys else None
        if keys:
            log.warning("config.waits_for_restart", extra={"fields": {"keys": keys, "message": self.restart}})

    def _apply_pending(self) -> None:
        settings, app = self._pending, self._app
        if settings is None:
            return
        # COMPLETE is a finished ladder that is shown for a while: there is nothing left for a change to disturb.
        done = app.switch.state.stage in (Stage.NONE, Stage.COMPLETE)
        if app.switch.state.state is not State.ACTIVE or not done:
            self.waiting = WAITING if self._has_to_wait(settings) else None
            return
        try:
            app.take_recovery(settings)
        except SettingsError as error:
            self.failed(str(error))
            log.error("config.reload_failed", extra={"fields": {"error": str(error)}})  # noqa: TRY400
        self._pending, self.waiting = None, None

    def _has_to_wait(self, settings: Settings) -> bool:
        kept = self._app.settings
        policies = settings.gate.policy.killed_policy, kept.gate.policy.killed_policy
        return settings.recovery != kept.recovery or policies[0] is not policies[1]

    async def _refresh_approvers(self) -> None:
        app = self._app
        approvers = app.recoveries.approvers
        if approvers is None or app.switch.state.state is not State.ACTIVE or not approvers.changed():
            return
        try:
            await asyncio.to_thread(approvers.refresh)
            app.approvers_error = None
            self._audit("approvers.reloaded", "file change", names=list(approvers.names))
        except SettingsError as error:
            app.approvers_error = str(error)

    def _audit(self, kind: str, by: str, *, reason: str | None = None, **data: object) -> None:
        self._app.keeper.audit(audit_event(kind, self._app.clock.now(), by=by, reason=reason, **data))

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in [self._app.settings.path, *rule_paths(self._app.settings.rules.files)]:
            digest.update(str(path).encode() + b"\0")
            try:
                with Path(path).open("rb") as file:
                    digest.update(file.read(FILE_LIMIT))
            except OSError as error:
                digest.update(repr(error.errno).encode())
        return digest.hexdigest()


def waits_for_restart(old: Settings, new: Settings) -> Iterator[str]:
    """The keys that differ and hold for the life of the process, as they are written."""
    pairs: dict[str, tuple[Any, Any]] = {
        "switch": (old.switch, new.switch),
        "gate": (old.gate, new.gate),
        "operations": (old.operations, new.operations),
        "control": (old.control, new.control),
        "storage": (old.storage, new.storage),
        "logging": (old.logging, new.logging),
    }
    for section, (was, now) in pairs.items():
        for field in fields(was):
            key = f"{section}.{field.name}"
            if key not in _TAKEN_AT_ONCE and getattr(was, field.name) != getattr(now, field.name):
                yield _WRITTEN.get(key, key)


_TAKEN_AT_ONCE = frozenset({"switch.labels", "gate.policy"})
_WRITTEN = {"storage.audit_max_bytes": "storage.audit.max_bytes", "storage.audit_retention": "storage.audit.retention"}
