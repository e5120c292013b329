"""State folder, audit log and the one thread that writes both: the switch's memory as the keeper sees it."""

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from sidecar.adapters.audit_log import AuditLog, AuditWriteError
from sidecar.adapters.state_file import Loaded, StateFolder
from sidecar.adapters.storage_thread import StorageThread, StorageThreadError
from sidecar.app.audit_trail import AuditEvent
from sidecar.core.errors import StorageError

log = logging.getLogger("sidecar.memory")
trail = logging.getLogger("sidecar.audit_trail")


class DiskMemory:
    """The state folder of one switch, open and locked; all writes go through one thread, in order.

    Use `open` and `load` once, then `write`. Everything but the counters is asynchronous because a volume may hang.
    """

    def __init__(self, *, folder: StateFolder, audit: AuditLog, thread: StorageThread) -> None:
        self._folder = folder
        self._audit = audit
        self._thread = thread
        self._untaken: list[AuditEvent] = []
        self.audit_error: str | None = None
        self.events_written = 0

    @classmethod
    async def open(
        cls, directory: Path, *, switch: str, audit_max_bytes: int, audit_retention: float, thread: StorageThread
    ) -> Self:
        """Lock and open the folder.

        Raises:
            StorageError: it cannot be used; FolderLocked where another process holds it.
        """

        def work() -> tuple[StateFolder, AuditLog]:
            folder = StateFolder.open(directory, switch=switch)
            try:
                audit = AuditLog.open(
                    directory / "audit", max_bytes=audit_max_bytes, retention_seconds=audit_retention, now=_now()
                )
            except StorageError:
                folder.close()
                raise
            return folder, audit

        folder, audit = await thread.submit(work)
        return cls(folder=folder, audit=audit, thread=thread)

    @property
    def opened(self) -> Any:
        """What the audit log found when it was opened."""
        return self._audit.opened

    @property
    def audit_head(self) -> int:
        """Sequence number of the last audit line on disk."""
        return self._audit.head_sequence

    @property
    def audit_write_failures(self) -> int:
        """How often the audit could not be written."""
        return self._audit.write_failures

    async def load(self) -> Loaded:
        """Read both copies of the stored state and decide which to believe."""
        return await self._thread.submit(lambda: self._folder.load(newest_audit_epoch=self._audit.newest_epoch()))

    async def write(self, document: dict[str, Any] | None, events: Sequence[AuditEvent]) -> None:
        """Make a document and audit events durable, after everything that was written before.

        An audit that cannot be written waits in memory and is written later; it does not fail the call.

        Raises:
            StorageError: the document is not durable.
        """
        batch, self._untaken = [*self._untaken, *events], []
        try:
            failure = await self._thread.submit(lambda: self._write(document, batch))
        except StorageThreadError:
            self._untaken = batch  # the thread took nothing, so these lines are still ours to write
            raise
        if failure is not None:
            raise failure

    def _write(self, document: dict[str, Any] | None, events: Sequence[AuditEvent]) -> StorageError | None:
        failure: StorageError | None = None
        if document is not None:
            try:
                self._folder.save(document)
            except StorageError as error:
                failure = error
        self._append(events)
        return failure

    def _append(self, events: Sequence[AuditEvent], *, housekeeping: bool = False) -> None:
        if not events and self._audit.pending == 0 and not housekeeping:
            return
        try:
            lines = self._audit.append(events, _now())
            self.audit_error = None
        except AuditWriteError as error:
            lines = error.lines
            self.audit_error = str(error)
            log.error("audit.write_failed", extra={"fields": {"error": str(error)}})  # noqa: TRY400 - says it all
        self.events_written += len(lines)
        for line in lines:
            trail.info(line)

    async def flush(self) -> None:
        """Write what waits, and let rotation and retention do their work."""
        await self._thread.submit(lambda: self._append((), housekeeping=True))

    async def call(self, work: Callable[[], Any]) -> Any:
        """Run something else in the storage thread, in its turn."""
        return await self._thread.submit(work)

    async def close(self) -> None:
        """Give the folder back after everything queued is written."""

        def work() -> None:
            self._append((), housekeeping=True)
            self._audit.close()
            self._folder.close()

        await self._thread.submit(work)


def _now() -> datetime:
    return datetime.now(UTC)
