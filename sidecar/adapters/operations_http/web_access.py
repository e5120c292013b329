"""The web configuration file in force: TLS, users and headers of the TCP listener, as fresh as the files behind them.

File and certificates are looked at with every handshake and every request, which costs some `stat` calls, and are read
again when they change. What cannot be used leaves the last good one in force and is said in `problem`. Nothing turns
TLS or basic auth on or off while the process runs: half a file, read while it is being written, must not open a door.
"""

import asyncio
import logging
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from time import monotonic
from typing import Any, Final

from sidecar.settings.problems import Problem, SettingsProblems
from sidecar.settings.web_config import TlsServer, WebConfig, read_web_config

log = logging.getLogger("sidecar.operations")

_READ_SECONDS: Final = 5.0
_RETRY_SECONDS: Final = 5.0
_VERSIONS: Final = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_VERIFY: Final = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
_SAN_KINDS: Final = frozenset({"DNS", "email", "IP Address", "URI"})

_Signature = tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _InForce:
    config: WebConfig
    context: ssl.SSLContext | None
    signature: _Signature


class WebAccess:
    """What one web configuration file makes of a listener. `load` it before anything else.

    Args:
        path: the file; symlinks are followed, so that a swapped secret is seen.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._now: _InForce | None = None
        self._tried: _Signature = ()
        self._retry = 0.0
        self._reading = asyncio.Lock()
        self.problem: str | None = None
        """What is wrong with the files as they are now; None if nothing is."""

    @property
    def config(self) -> WebConfig:
        """What is in force."""
        return WebConfig() if self._now is None else self._now.config

    @property
    def context(self) -> ssl.SSLContext | None:
        """For the next handshake; None serves plain HTTP."""
        return None if self._now is None else self._now.context

    @property
    def wants_client_certificates(self) -> bool:
        """Whether nobody comes in without a certificate, not even a probe."""
        return self.context is not None and self.context.verify_mode is ssl.CERT_REQUIRED

    async def load(self) -> None:
        """Read it for the first time; raise SettingsProblems where it cannot be used."""
        self._now = await asyncio.to_thread(_read, self._path)
        self._tried = self._now.signature

    async def refresh(self) -> None:
        """Read it again if a file has changed. Never raises: see `problem`."""
        if not self._is_due():
            return
        async with self._reading:
            if self._is_due():
                await self._reread(self._signature())

    def _is_due(self) -> bool:
        # A certificate that a broken file asks for may still come, and nobody looks at its name meanwhile.
        return self._signature() != self._tried or (self.problem is not None and monotonic() >= self._retry)

    async def _reread(self, signature: _Signature) -> None:
        try:
            async with asyncio.timeout(_READ_SECONDS):
                fresh = await asyncio.to_thread(_read, self._path)
                self._refuse_other_doors(fresh.config)
        except TimeoutError:
            self._report(f"{self._path}: could not be read within {_READ_SECONDS:g} s")
        except SettingsProblems as error:
            self._tried = signature
            self._report(str(error))
        else:
            self._now, self._tried, self.problem = fresh, fresh.signature, None
            log.info("operations.web_config_reloaded", extra={"fields": {"path": str(self._path)}})

    def _refuse_other_doors(self, fresh: WebConfig) -> None:
        found = []
        for key, now, then in (
            ("tls_server_config", self.config.tls, fresh.tls),
            ("basic_auth_users", self.config.users, fresh.users),
        ):
            if bool(now) != bool(then):
                turned = "on" if then else "off"
                found.append(fresh.problem((key,), f"cannot be turned {turned} while the sidecar runs; restart it"))
        found += [
            fresh.problem(("tls_server_config", key), "cannot be turned off while the sidecar runs; restart it")
            for key in _given_up(self.config.tls, fresh.tls)
        ]
        if found:
            raise SettingsProblems(found)

    def admits(self, certificate: Mapping[str, Any] | None) -> bool:
        """Whether a verified certificate (None or empty: none was shown) bears one of the names that are allowed."""
        tls = self.config.tls
        if tls is None or not tls.allowed_sans:
            return True
        if not certificate:
            return tls.client_auth == "VerifyClientCertIfGiven"
        names = {value for kind, value in certificate.get("subjectAltName", ()) if kind in _SAN_KINDS}
        return not set(map(_plain, names)).isdisjoint(map(_plain, tls.allowed_sans))

    def _report(self, found: str) -> None:
        problem = f"operations.web_config: {found}; what was read before stays in force"
        if problem != self.problem:
            log.error("operations.web_config_unusable", extra={"fields": {"message": problem}})
        self.problem = problem
        self._retry = monotonic() + _RETRY_SECONDS

    def _signature(self) -> _Signature:
        return _signature(self._path, self.config.tls)


def _given_up(now: TlsServer | None, then: TlsServer | None) -> Iterator[str]:
    """Demands on client certificates that are not made any more: half a file lacks them too, and would let all in."""
    if now is None or then is None or now.client_auth != "RequireAndVerifyClientCert":
        return
    if then.client_auth != now.client_auth:
        yield "client_auth_type"
    if now.allowed_sans and not then.allowed_sans:
        yield "client_allowed_sans"


def _plain(name: str) -> str:
    """One spelling for each IP address; any other name as it is."""
    try:
        return str(ip_address(name))
    except ValueError:
        return name


def _signature(path: Path, tls: TlsServer | None) -> _Signature:
    return (_seen(path), *(_seen(file) for file in (tls.files if tls else ())))


def _seen(path: str | Path) -> tuple[int, ...] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(path: Path) -> _InForce:
    before = _seen(path)  # before reading: a change in between is seen next time
    config = read_web_config(path)
    signature = (before, *_signature(path, config.tls)[1:])
    problems = list(_unreadable(config))
    if problems:
        raise SettingsProblems(problems)
    return _InForce(config=config, context=_context(config), signature=signature)


def _unreadable(config: WebConfig) -> Iterator[Problem]:
    for key in ("cert_file", "key_file", "client_ca_file"):
        file = getattr(config.tls, key, None)
        if file is None:
            continue
        try:
            with Path(file).open("rb"):
                pass
        except OSError as error:
            # A whole key in place of its path would be shown otherwise.
            shown = repr(file) if len(file) < 300 and "\n" not in file else "what is no path"
            yield config.problem(("tls_server_config", key), f"{shown} cannot be read: {error.strerror}")


def _context(config: WebConfig) -> ssl.SSLContext | None:
    tls = config.tls
    if tls is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[tls.min_version]
    context.maximum_version = _VERSIONS[tls.max_version]
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    _choose(context, tls)
    try:
        context.load_cert_chain(tls.cert_file, tls.key_file, password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = f"{tls.cert_file!r} and {tls.key_file!r} are no certificate with its key: {error}"
        raise SettingsProblems([config.problem(("tls_server_config", "cert_file"), reason)]) from None
    if tls.client_ca_file is not None:
        try:
            context.load_verify_locations(tls.client_ca_file)
        except (OSError, ValueError) as error:
            reason = f"{tls.client_ca_file!r} holds no certificates: {error}"
            raise SettingsProblems([config.problem(("tls_server_config", "client_ca_file"), reason)]) from None
    context.verify_mode = _VERIFY[tls.client_auth]
    return context


def _choose(context: ssl.SSLContext, tls: TlsServer) -> None:
    if tls.ciphers:
        context.set_ciphers(":".join(tls.ciphers))
    if tls.curve is not None:
        context.set_ecdh_curve(tls.curve)
    if not tls.server_prefers:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE


def _no_password() -> str:
    # Without this OpenSSL would ask for the passphrase of an encrypted key on the terminal, and wait.
    raise ValueError("the key is encrypted; an unencrypted key file is wanted")
