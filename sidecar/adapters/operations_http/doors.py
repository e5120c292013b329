"""The two ways in: TCP, where host, origin and token are looked at, and the control socket, where reaching it suffices.

Knows who may come in and by what name, not what they then ask for.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final, Protocol
from urllib.parse import urlsplit

from aiohttp import web

from sidecar.adapters.operations_http.problems import Problem
from sidecar.adapters.operations_http.tokens import Role, TokensFile
from sidecar.adapters.operations_http.webhook import SENDER, WebhookAccess

_READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_AUTHORITY = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\[\]:@/?#\s]+)(?::[0-9]{0,5})?")
_NO_WEBHOOK: Final = (
    "alerts are taken only from senders that are known: set alertmanager.webhook.token_file, give a token of "
    "operations.tokens_file the role webhook, or set alertmanager.webhook.allow_unauthenticated, which lets anybody "
    "stop trading and nobody end an alert"
)
_HINT: Final = (
    "nothing can be changed here without credentials: set operations.tokens_file, or use the killswitch command in the "
    "sidecar's container, which goes through the control socket"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        name: None where no credential proves one.
        trusted: False where nothing at all speaks for the caller, who may only stop.
    """

    name: str | None = None
    trusted: bool = True

    def by(self, claimed: str | None) -> str:
        """The name for the audit: the proven one, else the claimed one, else "operator"."""
        return self.name or claimed or "operator"

    @property
    def verified(self) -> bool:
        """Whether a credential proves the name."""
        return self.name is not None


class Door(Protocol):
    """One way in."""

    def check(self, request: web.BaseRequest) -> None:
        """Look at where the request was sent to and comes from; raise Problem."""

    async def admit(self, request: web.BaseRequest, role: Role | None) -> Caller:
        """Let in who may act in this role (None: everybody); raise Problem 401 or 403."""


class ControlDoor:
    """The control socket: its folder and mode let in nobody else, so nothing more is asked."""

    def check(self, request: web.BaseRequest) -> None:
        """Refuse what a web page sends, should anything ever carry one here."""
        _check_origin(request, _host_header(request))

    async def admit(self, request: web.BaseRequest, role: Role | None) -> Caller:  # noqa: ARG002
        """Let everybody in, unnamed."""
        return Caller()


class PublicDoor:
    """The TCP listener.

    Args:
        hosts: names, in lower case, under which it may be called beside IP addresses and localhost. A web page whose
            name was rebound to our address is none of them.
        tokens: whose tokens count; None leaves reading open and refuses every change.
        webhook: who else may send alerts.
    """

    def __init__(self, *, hosts: Collection[str], tokens: TokensFile | None, webhook: WebhookAccess) -> None:
        self._hosts = frozenset(host.lower().rstrip(".") for host in hosts) | {"localhost"}
        self._tokens = tokens
        self._webhook = webhook

    def check(self, request: web.BaseRequest) -> None:
        """Refuse hosts that are not ours, and changes that another site's page sends."""
        header = _host_header(request)
        match = _AUTHORITY.fullmatch(header)
        if match is None:
            raise Problem(400, f"Host: {header!r} is not host or host:port")
        host = match["host"].strip("[]").lower().rstrip(".")
        if host not in self._hosts and not _is_address(host):
            raise Problem(421, f"{host!r} is no name of this sidecar; use an IP address or add it to operations.hosts")
        _check_origin(request, header)

    async def admit(self, request: web.BaseRequest, role: Role | None) -> Caller:
        """Ask for a token where the role needs one."""
        if role is None:
            return Caller()
        if role is Role.WEBHOOK:
            return await self._admit_alerts(request)
        if self._tokens is None:
            if role is Role.VIEWER:
                return Caller()
            raise Problem(403, _HINT)
        token = await self._tokens.holder(_bearer(request))
        if token is None:
            raise _unauthorized("this token is not in operations.tokens_file", error="invalid_token")
        if not token.may(role):
            raise Problem(403, f"the token of {token.name!r} lacks the role {role}")
        return Caller(name=token.name)

    async def _admit_alerts(self, request: web.BaseRequest) -> Caller:
        # Where alerts are taken from anybody, a wrong token is no reason to refuse a stop; it only proves nothing.
        try:
            return await self._sender(request)
        except Problem:
            if not self._webhook.allow_unauthenticated:
                raise
        return Caller(trusted=False)

    async def _sender(self, request: web.BaseRequest) -> Caller:
        if self._tokens is None and not self._webhook.has_token:
            raise Problem(403, _NO_WEBHOOK)
        text = _bearer(request)
        if await self._webhook.accepts(text):
            return Caller(name=SENDER)
        token = None if self._tokens is None else await self._tokens.holder(text)
        if token is None:
            raise _unauthorized("this token is not the webhook's", error="invalid_token")
        if not token.may(Role.WEBHOOK):
            raise Problem(403, f"the token of {token.name!r} lacks the role {Role.WEBHOOK}")
        return Caller(name=token.name)


def _host_header(request: web.BaseRequest) -> str:
    hosts = request.headers.getall("Host", [])
    if len(hosts) != 1:
        raise Problem(400, f"{len(hosts)} Host headers; send exactly one")
    return hosts[0]


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _check_origin(request: web.BaseRequest, host: str) -> None:
    # Browsers send Origin with every request that can change something; other programs do not send it at all.
    if request.method in _READING:
        return
    for origin in request.headers.getall("Origin", []):
        if urlsplit(origin).netloc.lower() != host.lower():
            raise Problem(403, f"the page of {origin!r} may not change anything at {host!r}")


def _bearer(request: web.BaseRequest) -> str:
    credentials = request.headers.getall("Authorization", [])
    if len(credentials) == 1:
        scheme, _, token = credentials[0].partition(" ")
        if scheme.lower() == "bearer" and token.strip():
            return token.strip()
    raise _unauthorized("send one header Authorization: Bearer <token>")


def _unauthorized(detail: str, *, error: str | None = None) -> Problem:
    challenge = 'Bearer realm="killswitch"' + (f', error="{error}"' if error else "")
    return Problem(401, detail, headers={"WWW-Authenticate": challenge})
