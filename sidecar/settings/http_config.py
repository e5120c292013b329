"""How to reach an HTTP server that wants credentials or its own TLS: Prometheus' `http_config`, frozen.

Files are read again when they change, because Kubernetes rotates secrets under a running process. Secrets stand in no
repr and no error text. Knows no HTTP library: it gives header values and an `ssl.SSLContext` to whoever sends.
"""

import base64
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal
from urllib.parse import unquote, urlsplit, urlunsplit

from sidecar.core.errors import KillswitchError

TlsVersion = Literal["TLS10", "TLS11", "TLS12", "TLS13"]

MAX_SECRET_BYTES: Final = 65_536
"""A longer file is no password and no token, but perhaps a path that was mistyped."""

_VERSIONS: Final = {
    "TLS10": ssl.TLSVersion.TLSv1,
    "TLS11": ssl.TLSVersion.TLSv1_1,
    "TLS12": ssl.TLSVersion.TLSv1_2,
    "TLS13": ssl.TLSVersion.TLSv1_3,
}


class HttpConfigError(KillswitchError):
    """Credentials or certificates cannot be used; names the file, never what stands in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BasicAuth:
    """User and password, each written out or in a file."""

    username: str = ""
    username_file: str | None = None
    password: str = field(default="", repr=False)
    password_file: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Authorization:
    """Any other `Authorization` header: a type and its credentials, written out or in a file."""

    type: str = "Bearer"
    credentials: str = field(default="", repr=False)
    credentials_file: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsConfig:
    """Whom to trust and who we are; None takes the system's certificate authorities and no client certificate."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None
    insecure_skip_verify: bool = False
    min_version: TlsVersion = "TLS12"


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpConfig:
    """Prometheus' `http_config`, as far as a client of its API needs it; at most one kind of credentials."""

    basic_auth: BasicAuth | None = None
    authorization: Authorization | None = None
    tls_config: TlsConfig | None = None

    def __post_init__(self) -> None:
        """Refuse two kinds of credentials, and a certificate without its key.

        Raises:
            HttpConfigError: both are given, or one half of a pair.
        """
        if self.basic_auth and self.authorization:
            raise HttpConfigError("basic_auth and authorization are both given; keep one")
        tls = self.tls_config
        if tls and bool(tls.cert_file) != bool(tls.key_file):
            raise HttpConfigError("tls_config: cert_file and key_file go together; one of them is missing")


def split_userinfo(url: str) -> tuple[str, str | None]:
    """Take user and password out of a URL.

    Returns:
        The URL without them, safe to show, and the value of the `Authorization` header, None where there are none.
    """
    parts = urlsplit(url)
    userinfo, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, None
    username, _, password = userinfo.partition(":")
    return urlunsplit(parts._replace(netloc=host)), _basic(unquote(username), unquote(password))


class HttpAccess:
    """Credentials and TLS of one `HttpConfig`, kept as fresh as the files behind it.

    `changed()` only looks at the files' names and times, and is cheap enough for an event loop; `refresh()` reads them
    and builds a TLS context, which takes milliseconds and belongs in a thread. Not thread-safe: one caller at a time.
    """

    def __init__(self, config: HttpConfig | None) -> None:
        self._config = config or HttpConfig()
        self._fingerprint: tuple[object, ...] | None = None
        self._tls_fingerprint: tuple[object, ...] | None = None
        self._authorization: str | None = None
        self._tls: ssl.SSLContext | None = None

    @property
    def authorization(self) -> str | None:
        """The value of the `Authorization` header as of the last `refresh()`, None where none is configured."""
        return self._authorization

    @property
    def tls(self) -> ssl.SSLContext | None:
        """The TLS context as of the last `refresh()`; None means the system's defaults.

        A new object after a certificate changed, so that a connection pool keyed by it opens new connections.
        """
        return self._tls

    @property
    def server_name(self) -> str | None:
        """The name to ask for and to verify instead of the URL's host."""
        return self._config.tls_config.server_name if self._config.tls_config else None

    def changed(self) -> bool:
        """Whether a file changed since the last successful `refresh()`; True before the first one."""
        return self._fingerprint is None or self._fingerprint != self._look()

    def refresh(self) -> None:
        """Read every file and, where a certificate changed, build a new TLS context.

        Raises:
            HttpConfigError: a file is missing, unreadable, too long, or not what it should be. What was read before
                stays, but `changed()` remains True, so that the next request tries again instead of using old secrets.
        """
        self._fingerprint = None
        fingerprint = self._look()  # before reading: a change in between is seen next time
        authorization = self._read_authorization()
        tls_fingerprint = _fingerprint(self._tls_files())
        if self._config.tls_config and (self._tls is None or self._tls_fingerprint != tls_fingerprint):
            self._tls = _context(self._config.tls_config)
        self._tls_fingerprint = tls_fingerprint
        self._authorization = authorization
        self._fingerprint = fingerprint

    def _look(self) -> tuple[object, ...]:
        return _fingerprint([*self._secret_files(), *self._tls_files()])

    def _secret_files(self) -> list[str]:
        basic, other = self._config.basic_auth, self._config.authorization
        files = [basic.username_file, basic.password_file] if basic else []
        return [path for path in (*files, other.credentials_file if other else None) if path]

    def _tls_files(self) -> list[str]:
        tls = self._config.tls_config
        return [path for path in (tls.ca_file, tls.cert_file, tls.key_file) if path] if tls else []

    def _read_authorization(self) -> str | None:
        basic, other = self._config.basic_auth, self._config.authorization
        if basic:
            return _basic(_text(basic.username, basic.username_file), _text(basic.password, basic.password_file))
        if other:
            return f"{_header_safe(other.type, None)} {_credentials(other)}"
        return None


def _basic(username: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode("ascii")


def _text(written: str, path: str | None) -> str:
    return _read(path) if path else written


def _credentials(other: Authorization) -> str:
    return _header_safe(_text(other.credentials, other.credentials_file), other.credentials_file)


def _header_safe(text: str, path: str | None) -> str:
    # A line end inside would start a header of its own; the text itself is a secret and stays out of the message.
    if not text.isascii() or not text.isprintable():
        raise HttpConfigError(f"the credentials{f' in {path!r}' if path else ''} are not one line of plain ASCII")
    return text


def _read(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_SECRET_BYTES + 1)
        text = raw.decode("utf-8")
    except OSError as exc:
        raise HttpConfigError(f"cannot read {path!r}: {exc.strerror or type(exc).__name__}") from exc
    except UnicodeDecodeError:
        # Without its cause: that exception carries the bytes it could not read.
        raise HttpConfigError(f"{path!r} is not UTF-8 text") from None
    if len(raw) > MAX_SECRET_BYTES:
        raise HttpConfigError(f"{path!r} is longer than {MAX_SECRET_BYTES} bytes; a secret was wanted")
    return text.strip()


def _fingerprint(paths: list[str]) -> tuple[object, ...]:
    seen: list[object] = []
    for path in paths:
        try:
            stat = Path(path).stat()  # follows symlinks: a ConfigMap or Secret update swaps the folder behind them
        except OSError as exc:
            seen.append((path, exc.errno))
        else:
            seen.append((path, stat.st_ino, stat.st_dev, stat.st_mtime_ns, stat.st_size))
    return tuple(seen)


def _context(tls: TlsConfig) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
        context.minimum_version = _VERSIONS[tls.min_version]
        if tls.cert_file and tls.key_file:
            context.load_cert_chain(tls.cert_file, tls.key_file, password=_no_password)
    except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError
        files = ", ".join(repr(path) for path in (tls.ca_file, tls.cert_file, tls.key_file) if path)
        raise HttpConfigError(f"tls_config cannot be used ({files}): {exc}") from exc
    if tls.insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _no_password() -> str:
    # Without this OpenSSL would ask for the passphrase of an encrypted key on the terminal, and wait.
    raise ValueError("the key is encrypted; an unencrypted key file is wanted")
