"""The web configuration file of Prometheus' exporters: TLS, client certificates and basic auth for our listener.

Read with the key names and the meaning that exporter-toolkit gives them. What Python's TLS cannot do is refused with
its reason and never half done. Certificates are not opened here: whoever serves them reports back through
`WebConfig.problem`. No value of `basic_auth_users` is ever repeated, for it may be a password in the wrong place.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, cast

from pydantic import BeforeValidator, Field, ValidationError, WithJsonSchema

from sidecar.settings.fields import FilePath, Flag, Misfit, Section, Text, from_text, json_text, json_words, problems_of
from sidecar.settings.problems import Path as KeyPath
from sidecar.settings.problems import Problem, SettingsProblems
from sidecar.settings.yaml_source import Document, read_file

ClientAuth = Literal["NoClientCert", "VerifyClientCertIfGiven", "RequireAndVerifyClientCert"]

DEAREST_HASH: Final = 14
"""Highest cost of a bcrypt hash: about a second. Each further step doubles it, and requests wait for it."""

_CLIENT_AUTHS: Final[Mapping[str, ClientAuth]] = {
    "NoClientCert": "NoClientCert",
    # A certificate that is asked for and not looked at lets in nobody more and nobody less than none at all.
    "RequestClientCert": "NoClientCert",
    "VerifyClientCertIfGiven": "VerifyClientCertIfGiven",
    "RequireAndVerifyClientCert": "RequireAndVerifyClientCert",
}
_ANY_CERTIFICATE: Final = frozenset({"RequireAnyClientCert", "RequireClientCert"})
_VERSIONS: Final = ("TLS12", "TLS13")
_OLD_VERSIONS: Final = frozenset({"TLS10", "TLS11"})
_BCRYPT: Final = re.compile(r"\$2[aby]\$(?P<cost>[0-9]{2})\$[./A-Za-z0-9]{53}")

# Go's names, which exporter-toolkit takes, and OpenSSL's.
CIPHER_SUITES: Final[Mapping[str, str]] = {
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA": "ECDHE-ECDSA-AES128-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA": "ECDHE-ECDSA-AES256-SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305": "ECDHE-RSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA": "ECDHE-RSA-AES128-SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA": "ECDHE-RSA-AES256-SHA",
}
_SUITES_OF_TLS13: Final = frozenset(
    {"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"}
)
CURVES: Final[Mapping[str, str]] = {
    "CurveP256": "prime256v1",
    "CurveP384": "secp384r1",
    "CurveP521": "secp521r1",
    "X25519": "X25519",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsServer:
    """How TLS is served; paths are absolute.

    Attributes:
        client_auth: whose certificates are asked for.
        allowed_sans: one of a client certificate's names must be among these; empty takes every verified certificate.
        ciphers: OpenSSL's names of the suites of TLS 1.2; empty takes OpenSSL's choice.
        curve: OpenSSL's name; None takes OpenSSL's choice.
        server_prefers: whether the order of `ciphers` counts, or the client's.
    """

    cert_file: str
    key_file: str
    client_auth: ClientAuth = "NoClientCert"
    client_ca_file: str | None = None
    allowed_sans: frozenset[str] = frozenset()
    min_version: str = "TLS12"
    max_version: str = "TLS13"
    ciphers: tuple[str, ...] = ()
    curve: str | None = None
    server_prefers: bool = True

    @property
    def files(self) -> tuple[str, ...]:
        """All files that it names."""
        return tuple(path for path in (self.cert_file, self.key_file, self.client_ca_file) if path is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class WebConfig:
    """What one file says.

    Attributes:
        tls: None serves plain HTTP.
        headers: added to every answer.
        users: bcrypt hashes by user; empty asks nobody for a password.
    """

    tls: TlsServer | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    users: Mapping[str, str] = field(default_factory=dict, repr=False)
    _document: Document | None = field(default=None, repr=False, compare=False)

    def problem(self, key: KeyPath, reason: str) -> Problem:
        """Say what is wrong with what stands at a key, with its file and line."""
        if self._document is None:
            return Problem(file="(web_config)", line=1, key=".".join(map(str, key)), reason=reason)
        return self._document.problem(key, reason)


def read_web_config(path: str | Path) -> WebConfig:
    """Read a file; relative paths in it count from its folder.

    Raises:
        SettingsProblems: with every problem of the file.
    """
    path = Path(path)
    document = read_file(path, {})
    try:
        section = WebConfigFile.model_validate(document.data)
    except ValidationError as error:
        raise SettingsProblems([*document.problems, *problems_of(error, document)]) from None
    if document.problems:
        raise SettingsProblems(document.problems)
    return WebConfig(
        tls=_tls(section.tls_server_config, path.absolute().parent),
        headers=_headers(section.http_server_config.headers),
        users=MappingProxyType(dict(section.basic_auth_users)),
        _document=document,
    )


def _tls(section: "TlsServerSection", folder: Path) -> TlsServer | None:
    if section.cert_file is None or section.key_file is None:
        return None
    return TlsServer(
        cert_file=str(folder / section.cert_file),
        key_file=str(folder / section.key_file),
        client_auth=cast("ClientAuth", section.client_auth_type),
        client_ca_file=None if section.client_ca_file is None else str(folder / section.client_ca_file),
        allowed_sans=frozenset(section.client_allowed_sans),
        min_version=section.min_version,
        max_version=section.max_version,
        ciphers=tuple(dict.fromkeys(CIPHER_SUITES[name] for name in section.cipher_suites if name in CIPHER_SUITES)),
        curve=CURVES[section.curve_preferences[0]] if section.curve_preferences else None,
        server_prefers=section.prefer_server_cipher_suites,
    )


def _headers(section: "HeadersSection") -> Mapping[str, str]:
    written = section.model_dump(by_alias=True)
    return MappingProxyType({name: value for name, value in written.items() if value is not None})


# --- the file as it is written --------------------------------------------------------------------------------------


def _client_auth(value: str) -> ClientAuth:
    if value in _ANY_CERTIFICATE:
        raise ValueError(
            f"{value} takes any certificate unverified, which proves nothing and which Python's TLS cannot do; use "
            "RequireAndVerifyClientCert with client_ca_file"
        )
    try:
        return _CLIENT_AUTHS[value]
    except KeyError:
        raise ValueError(f"{value!r} is not one of {', '.join(_CLIENT_AUTHS)}") from None


def _version(value: str) -> str:
    if value in _OLD_VERSIONS:
        raise ValueError(f"{value} is broken, and OpenSSL no longer offers it; write TLS12 or TLS13")
    if value not in _VERSIONS:
        raise ValueError(f"{value!r} is not one of {', '.join(_VERSIONS)}")
    return value


def _suite(value: str) -> str:
    if value not in CIPHER_SUITES and value not in _SUITES_OF_TLS13:
        raise ValueError(f"{value!r} is no cipher suite that is offered; known: {', '.join(CIPHER_SUITES)}")
    return value


def _curve(value: str) -> str:
    if value not in CURVES:
        raise ValueError(f"{value!r} is not one of {', '.join(CURVES)}")
    return value


Version = Annotated[str, from_text(_version), json_words("word", _VERSIONS)]


class TlsServerSection(Section):
    """The listener's certificate, and whose certificates it asks for. Files are read again when they change."""

    cert_file: FilePath | None = Field(default=None, description="Certificate with its chain, PEM; needs `key_file`.")
    key_file: FilePath | None = Field(default=None, description="Its key, PEM, not encrypted.")
    client_auth_type: Annotated[str, from_text(_client_auth), json_words("word", _CLIENT_AUTHS)] = Field(
        default="NoClientCert",
        description="`NoClientCert`, `RequestClientCert` (asks nobody: a certificate would not be looked at), "
        "`VerifyClientCertIfGiven` or `RequireAndVerifyClientCert`. `RequireAnyClientCert` is refused: a certificate "
        "that nobody verified proves nothing.",
    )
    client_ca_file: FilePath | None = Field(
        default=None, description="Authorities that client certificates are verified with, PEM."
    )
    client_allowed_sans: tuple[Text, ...] = Field(
        default=(),
        description="A client certificate must have one of these as a subject alternative name: DNS name, e-mail "
        "address, IP address or URI, exactly as written.",
    )
    min_version: Version = Field(default="TLS12", description="`TLS12` or `TLS13`; older ones are refused.")
    max_version: Version = Field(default="TLS13", description="`TLS12` or `TLS13`.")
    cipher_suites: tuple[Annotated[str, from_text(_suite), json_words("suite", CIPHER_SUITES)], ...] = Field(
        default=(), description="Suites of TLS 1.2 by Go's names, best first; those of TLS 1.3 are always offered."
    )
    prefer_server_cipher_suites: Flag = Field(
        default=True, description="Whether the order of `cipher_suites` counts and not the client's."
    )
    curve_preferences: tuple[Annotated[str, from_text(_curve), json_words("curve", CURVES)], ...] = Field(
        default=(), description="One of `CurveP256`, `CurveP384`, `CurveP521`, `X25519`. More than one is refused."
    )

    @classmethod
    def explain_stranger(cls, key: str) -> str:
        """Name the file keys that stand for what exporters also take inline."""
        inline = {"cert": "cert_file", "key": "key_file", "client_ca": "client_ca_file"}
        if key in inline:
            return f"is not read from here: write it into a file of its own and name it as {inline[key]}"
        return super().explain_stranger(key)

    def misfits(self) -> Iterator[Misfit]:
        """Halves of pairs, and demands on client certificates that nothing would enforce."""
        if self.cert_file is None and self.model_fields_set:
            yield ("cert_file",), "is required: without it nothing of this section would be served"
        if self.cert_file is not None and self.key_file is None:
            yield ("key_file",), "is required beside cert_file"
        verifies = self.client_auth_type != "NoClientCert"
        if verifies and self.client_ca_file is None:
            yield ("client_ca_file",), f"is required by client_auth_type {self.client_auth_type}"
        for key in ("client_ca_file", "client_allowed_sans"):
            if not verifies and getattr(self, key):
                yield (key,), "has no effect without a client_auth_type that verifies certificates"
        if self.min_version > self.max_version:
            yield ("min_version",), f"{self.min_version} is above max_version {self.max_version}"
        yield from self._suite_misfits()

    def _suite_misfits(self) -> Iterator[Misfit]:
        if self.cipher_suites and not any(name in CIPHER_SUITES for name in self.cipher_suites):
            yield (
                ("cipher_suites",),
                "names suites of TLS 1.3 only, which are always offered; to allow no others write min_version: TLS13",
            )
        if len(self.curve_preferences) > 1:
            yield ("curve_preferences",), "holds several curves; Python's TLS takes one, or its own list without any"


def _words(*words: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value.lower() not in words:
            raise ValueError(f"{value!r} is not {' or '.join(words)}, which is what this listener always sends")
        return value

    return check


def _header_text(value: str) -> str:
    if not value.isascii() or not value.isprintable():
        raise ValueError("must be printable ASCII")
    return value


HeaderText = Annotated[str, from_text(_header_text), json_text("header value")]


class HeadersSection(Section):
    """Headers of every answer, beside those that the sidecar always sends."""

    content_security_policy: HeaderText | None = Field(
        default=None,
        alias="Content-Security-Policy",
        description="Sent beside our own policy; browsers obey both, so it can only forbid more.",
    )
    x_frame_options: Annotated[str, from_text(_words("deny")), json_words("word", ["deny"])] | None = Field(
        default=None, alias="X-Frame-Options", description="`deny` is always sent; anything else is refused."
    )
    x_content_type_options: Annotated[str, from_text(_words("nosniff")), json_words("word", ["nosniff"])] | None = (
        Field(
            default=None,
            alias="X-Content-Type-Options",
            description="`nosniff` is always sent; anything else is refused.",
        )
    )
    x_xss_protection: HeaderText | None = Field(
        default=None, alias="X-XSS-Protection", description="As written; today's browsers ignore it."
    )
    strict_transport_security: HeaderText | None = Field(
        default=None, alias="Strict-Transport-Security", description="As written, `max-age=31536000` for example."
    )


class HttpServerSection(Section):
    """HTTP itself."""

    http2: Flag = Field(default=False, description="`true` is refused: HTTP/1.1 is spoken.")
    headers: HeadersSection = Field(default_factory=HeadersSection)

    def misfits(self) -> Iterator[Misfit]:
        """Refuse what is not spoken."""
        if self.http2:
            yield ("http2",), "is not spoken here; leave the key out, clients fall back to HTTP/1.1"


def _user(value: Any) -> str:
    if not isinstance(value, str) or not value or ":" in value or len(value) > 256 or not value.isprintable():
        raise ValueError("is not a user name: 1 to 256 printable characters without a colon")
    return value


def _hash(value: Any) -> str:
    match = _BCRYPT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError('is not a bcrypt hash, as `htpasswd -nBC 10 ""` prints it after the colon')
    if not 4 <= int(match["cost"]) <= DEAREST_HASH:
        raise ValueError(
            f"has the cost {int(match['cost'])}; from 4 to {DEAREST_HASH} is possible, for requests wait for it"
        )
    return cast("str", value)


def _no_users(value: Any) -> Any:
    return {} if value is None else value


class WebConfigFile(Section):
    """The whole file."""

    tls_server_config: TlsServerSection = Field(default_factory=TlsServerSection)
    http_server_config: HttpServerSection = Field(default_factory=HttpServerSection)
    basic_auth_users: Annotated[
        dict[Annotated[str, BeforeValidator(_user)], Annotated[str, BeforeValidator(_hash)]],
        BeforeValidator(_no_users),
        WithJsonSchema(
            {"type": "object", "x-kind": "bcrypt hashes by user", "additionalProperties": {"type": "string"}}
        ),
    ] = Field(
        default={},
        description="Whoever reads needs one of these users or a token; health stays open. Users have the role viewer.",
    )

    @classmethod
    def explain_stranger(cls, key: str) -> str:
        """Say why a key of newer exporters is not taken."""
        if key == "rate_limit":
            return "is not honoured: this listener has limits of its own on connections, time and size"
        return super().explain_stranger(key)
