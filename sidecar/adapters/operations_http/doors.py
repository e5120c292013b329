"""The ways in: TCP, where host, origin and credentials are looked at, health, and the control socket, which is private.

Knows who may come in and by what name, not what they then ask for.
"""

import base64
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final, Protocol
from urllib.parse import urlsplit

from aiohttp import web

from sidecar.adapters.operations_http.passwords import Passwords
from sidecar.adapters.operations_http.problems import Problem
from sidecar.adapters.operations_http.tokens import Holder, Role, TokensFile
from sidecar.adapters.operations_http.web_access import WebAccess
from sidecar.adapters.operations_http.webhook import SENDER, WebhookAccess

_READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_AUTHORITY = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\[\]:@/?#\s]+)(?::[0-9]{0,5})?")
_ACTS: Final = {"read": Role.VIEWER, "stop": Role.OPERATOR, "recover": Role.RISK}
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

    @property
    def takes_tokens(self) -> bool:
        """Whether a token could let somebody do more than others."""

    def check(self, request: web.BaseRequest) -> None:
        """Look at where the request was sent to and comes from; raise Problem."""

    async def admit(self, request: web.BaseRequest, role: Role | None) -> Caller:
        """Let in who may act in this role (None: everybody); raise Problem 401 or 403."""


class ControlDoor:
    """The control socket: its folder and mode let in nobody else, so nothing more is asked."""

    takes_tokens = False

    def check(self, request: web.BaseRequest) -> None:
        """Refuse what a web page sends, should anything ever carry one here."""
        _check_origin(request, _host_header(request))

    async def admit(self, request: web.BaseRequest, role: Role | None) -> Caller:  # noqa: ARG002
        """Let everybody in, unnamed."""
        return Caller()


class HealthDoor:
    """The listener for probes: nothing is asked but that it be called by a name of ours."""

    takes_tokens = False

    def __init__(self, *, hosts: Collection[str]) -> None:
        self._hosts = _names(hosts)

    def check(self, request: web.BaseRequest) -> None:
        """Refuse hosts that are not ours."""
        _check_host(request, self._hosts)

    async def admit(self, request: web.BaseRequest, role: Role | None) -> Caller:  # noqa: ARG002
        """Let everybody in: nothing but health is behind this door."""
        return Caller(trusted=False)


class PublicDoor:
    """The TCP listener.

    Args:
        hosts: names, in lower case, under which it may be called beside IP addresses and localhost. A web page whose
            name was rebound to our address is none of them.
        tokens: whose tokens count; None leaves reading open and refuses every change.
        webhook: who else may send alerts.
        access: whose basic auth users count. Where there are any, nobody comes in without a credential.
    """

    def __init__(
        self,
        *,
        hosts: Collection[str],
        tokens: TokensFile | None,
        webhook: WebhookAccess,
        access: WebAccess | None = None,
    ) -> None:
        self._hosts = _names(hosts)
        self._tokens = tokens
        self._webhook = webhook
        self._access = access
        self._passwords = Passwords()

    @property
    def takes_tokens(self) -> bool:
        """Whether there is a tokens file."""
        return self._tokens is not None

    def check(self, request: web.BaseRequest) -> None:
        """Refuse hosts that are not ours, and changes that another site's page sends."""
        header = _check_host(request, self._hosts)
        _check_origin(request, header)

    async def admit(self, request: web.BaseRequest, role: Role | None) -> Caller:
        """Ask for a credential where the role needs one, and for any at all where there are users."""
        if self._access is not None:
            await self._access.refresh()
        holder = await self._holder(request) if self._users else None
        if role is None:
            return Caller()
        if role is Role.WEBHOOK:
            return await self._admit_alerts(request)
        if self._tokens is None and role is not Role.VIEWER:
            raise Problem(403, _HINT)
        if self._tokens is None and holder is None:
            return Caller()
        return _caller(holder or await self._holder(request), role)

    def stop(self) -> None:
        """Give back what checks passwords."""
        self._passwords.stop()

    @property
    def _users(self) -> Mapping[str, str]:
        return {} if self._access is None else self._access.config.users

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
        return _caller(await self._holder(request), Role.WEBHOOK)

    async def _holder(self, request: web.BaseRequest) -> Holder:
        """Whose credential came with the request; raise Problem 401 for none, two, or an unknown one."""
        scheme, text = _credentials(request)
        if scheme == "basic" and self._users:
            return await self._user(text)
        # To offer basic auth to a page that came with a token would make the browser ask for a password.
        offered = self._users if scheme != "bearer" else {}
        if scheme != "bearer" or not text:
            raise _unauthorized("send one header Authorization: Bearer <token>", offered)
        if await self._webhook.accepts(text):
            return Holder(name=SENDER, roles=frozenset({Role.WEBHOOK}))
        token = None if self._tokens is None else await self._tokens.holder(text)
        if token is None:
            raise _unauthorized("this token is not known here", offered, error="invalid_token")
        return token

    async def _user(self, text: str) -> Holder:
        name, colon, password = _decoded(text).partition(":")
        if not colon or not await self._passwords.are_right(self._users, name, password):
            raise _unauthorized("user and password are not among basic_auth_users", self._users)
        return Holder(name=name, roles=frozenset({Role.VIEWER}))


async def access_of(door: Door, request: web.BaseRequest) -> dict[str, object]:
    """Say who the caller is behind this door and what would be answered to what, as `GET /api/v1/access` tells it.

    It is asked of `admit` itself, so it cannot promise what is then refused.
    """
    name, found = None, {}
    for act, role in _ACTS.items():
        try:
            caller = await door.admit(request, role)
        except Problem as problem:
            found[act] = {"allowed": False, "status": problem.status, "detail": problem.detail}
        else:
            name = name or caller.name
            found[act] = {"allowed": True, "status": 200, "detail": None}
    return {"name": name, "tokens": door.takes_tokens, **found}


def _caller(holder: Holder, role: Role) -> Caller:
    if not holder.may(role):
        raise Problem(403, f"{holder.name!r} lacks the role {role}")
    return Caller(name=holder.name)


def _names(hosts: Collection[str]) -> frozenset[str]:
    return frozenset(host.lower().rstrip(".") for host in hosts) | {"localhost"}


def _check_host(request: web.BaseRequest, hosts: Collection[str]) -> str:
    header = _host_header(request)
    match = _AUTHORITY.fullmatch(header)
    if match is None:
        raise Problem(400, f"Host: {header!r} is not host or host:port")
    host = match["host"].strip("[]").lower().rstrip(".")
    if host not in hosts and not _is_address(host):
        raise Problem(421, f"{host!r} is no name of this sidecar; use an IP address or add it to operations.hosts")
    return header


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


def _credentials(request: web.BaseRequest) -> tuple[str, str]:
    """Scheme in lower case and what follows it; empty where there is not exactly one such header."""
    sent = request.headers.getall("Authorization", [])
    if len(sent) != 1:
        return "", ""
    scheme, _, text = sent[0].partition(" ")
    return scheme.lower(), text.strip()


def _decoded(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode("utf-8")
    except ValueError:  # binascii.Error and UnicodeDecodeError are some
        return ""


def _unauthorized(detail: str, users: Collection[str], *, error: str | None = None) -> Problem:
    challenges = ['Bearer realm="killswitch"' + (f', error="{error}"' if error else "")]
    if users:
        challenges.append('Basic realm="killswitch", charset="UTF-8"')
    return Problem(401, detail, headers=[("WWW-Authenticate", challenge) for challenge in challenges])
