"""Alertmanager's webhook: who may send it, and its payload of version 4, read into plain alerts.

Anybody may be allowed to stop trading without a credential; what such a sender says can then never end a firing. What
an alert means is not decided here.
"""

import asyncio
import hashlib
import hmac
import logging
from pathlib import Path
from typing import Annotated, Final, Literal

from aiohttp import web
from pydantic import AwareDatetime, ConfigDict, Field, StringConstraints

from sidecar.adapters.operations_http.desk import ReceivedAlert
from sidecar.adapters.operations_http.problems import Problem
from sidecar.adapters.operations_http.questions import Question

log = logging.getLogger("sidecar.operations")

PAYLOAD_BYTES: Final = 1024 * 1024
SENDER: Final = "alertmanager"
_TOKEN_BYTES: Final = 64 * 1024
_READ_SECONDS: Final = 2.0


class SentAlert(Question):
    """One alert of a payload; what else Alertmanager may add is of no interest."""

    model_config = ConfigDict(extra="ignore")

    status: Literal["firing", "resolved"]
    labels: dict[str, str]
    annotations: dict[str, str] | None = None
    startsAt: AwareDatetime  # noqa: N815 - Alertmanager's own spelling
    fingerprint: Annotated[str, StringConstraints(max_length=200)] | None = None


class WebhookQuestion(Question):
    """What Alertmanager sends. Group status and receiver are not looked at: each alert speaks for itself.

    Null is what leaving a member out is, or a proxy that writes it would lose the alert that fires beside it.
    """

    model_config = ConfigDict(extra="ignore")

    version: Literal["4"] | None = "4"
    truncatedAlerts: Annotated[int, Field(ge=0)] | None = 0  # noqa: N815 - as above
    alerts: Annotated[tuple[SentAlert, ...], Field(strict=False)]

    def received(self) -> list[ReceivedAlert]:
        """The alerts, in the order sent."""
        return [
            ReceivedAlert(
                firing=one.status == "firing",
                labels=one.labels,
                annotations=one.annotations or {},
                starts_at=one.startsAt.timestamp(),
                fingerprint=one.fingerprint or "",
            )
            for one in self.alerts
        ]


class WebhookAccess:
    """Who may send alerts, beside those with a token of the role `webhook`; may be changed while it is in use."""

    def __init__(self) -> None:
        self.problem: str | None = None
        """What is wrong with the token file as it is now; None if nothing is."""
        self.allow_unauthenticated = False
        self._path: Path | None = None
        self._digest: bytes | None = None
        self._seen: tuple[int, ...] | None = None

    def configure(self, *, token_file: str | None, allow_unauthenticated: bool) -> None:
        """Let these in from now on.

        Args:
            token_file: path of a file that holds the text of the one token; re-read when it changes.
            allow_unauthenticated: whether alerts without a credential are taken.
        """
        path = None if token_file is None else Path(token_file)
        if path != self._path:
            self._path, self._digest, self._seen, self.problem = path, None, None, None
        self.allow_unauthenticated = allow_unauthenticated

    @property
    def has_token(self) -> bool:
        """Whether there is a token of its own."""
        return self._path is not None

    async def accepts(self, token: str) -> bool:
        """Whether this is the token in the file; compared in constant time."""
        await self.refresh()
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        return self._digest is not None and hmac.compare_digest(self._digest, digest)

    async def refresh(self) -> None:
        """Read the file if it has changed. Never raises; a file that cannot be used leaves the last good token."""
        path = self._path
        if path is None:
            return
        signature = _signature(path)
        if signature is not None and signature == self._seen:
            return
        try:
            async with asyncio.timeout(_READ_SECONDS):
                digest = await asyncio.to_thread(_read, path)
        except TimeoutError:
            self._report(f"{path}: could not be read within {_READ_SECONDS:g} s")
        except (OSError, ValueError) as error:
            self._report(f"alertmanager.webhook.token_file {path}: {error}")
        else:
            if path == self._path:
                self._digest, self._seen, self.problem = digest, signature, None

    def _report(self, problem: str) -> None:
        if problem != self.problem:
            log.error("webhook.token_unusable", extra={"fields": {"message": problem}})
        self.problem = problem


def _signature(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        token = file.read(_TOKEN_BYTES).strip()
    if not token:
        raise ValueError("is empty; write the token's text into it")
    return hashlib.sha256(token).digest()


async def read_payload(request: web.BaseRequest) -> bytes:
    """Read a body of up to PAYLOAD_BYTES; raise Problem 413 as soon as it is longer."""
    if (request.content_length or 0) > PAYLOAD_BYTES:
        raise _too_large()
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > PAYLOAD_BYTES:
            raise _too_large()
    return bytes(body)


def _too_large() -> Problem:
    return Problem(413, "the body is larger than 1 MiB; set max_alerts in the receiver, or group by more labels")
