"""How `http_config` is written: Prometheus' own key names, read into `sidecar.settings.http_config`.

Never repeats a secret in a problem: what is wrong is said without what was seen.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, cast

from pydantic import Field

from sidecar.settings.fields import FilePath, Flag, Misfit, Section, Text, json_words, word
from sidecar.settings.http_config import Authorization, BasicAuth, HttpConfig, TlsConfig, TlsVersion

_VERSIONS = ("TLS10", "TLS11", "TLS12", "TLS13")

Place = Callable[[str | None], str | None]
"""Makes a path absolute; None stays None."""


class BasicAuthSection(Section):
    """User and password."""

    username: Text | None = Field(default=None, description="The user.")
    username_file: FilePath | None = Field(default=None, description="File that holds the user instead.")
    password: Text | None = Field(default=None, description="The password; better kept in a file.")
    password_file: FilePath | None = Field(default=None, description="File that holds the password instead.")

    def misfits(self) -> Iterator[Misfit]:
        """Each half is given at most once, and there is a user."""
        if (self.username is None) == (self.username_file is None):
            yield ("username",), "write exactly one of username and username_file"
        if self.password is not None and self.password_file is not None:
            yield ("password",), "write only one of password and password_file"


class AuthorizationSection(Section):
    """Any other `Authorization` header."""

    type: Text = Field(default="Bearer", description="The word before the credentials.")
    credentials: Text | None = Field(default=None, description="The credentials; better kept in a file.")
    credentials_file: FilePath | None = Field(default=None, description="File that holds the credentials instead.")

    def misfits(self) -> Iterator[Misfit]:
        """There is one place that holds the credentials, and they are not basic ones."""
        if (self.credentials is None) == (self.credentials_file is None):
            yield ("credentials",), "write exactly one of credentials and credentials_file"
        if self.type.lower() == "basic":
            yield ("type",), "user and password are written as basic_auth"


class TlsSection(Section):
    """Whom to trust and who we are."""

    ca_file: FilePath | None = Field(default=None, description="Certificate authorities; the system's by default.")
    cert_file: FilePath | None = Field(default=None, description="Client certificate; needs `key_file`.")
    key_file: FilePath | None = Field(default=None, description="Its key, not encrypted.")
    server_name: Text | None = Field(default=None, description="Name to verify instead of the URL's host.")
    insecure_skip_verify: Flag = Field(default=False, description="Trusts whoever answers.")
    min_version: Annotated[str, word(*_VERSIONS), json_words("word", _VERSIONS)] = Field(
        default="TLS12", description="Oldest version of TLS: `TLS10`, `TLS11`, `TLS12` or `TLS13`."
    )

    def misfits(self) -> Iterator[Misfit]:
        """A certificate is of no use without its key."""
        if self.cert_file is not None and self.key_file is None:
            yield ("cert_file",), "needs key_file"
        if self.key_file is not None and self.cert_file is None:
            yield ("key_file",), "needs cert_file"


class HttpSection(Section):
    """Credentials and TLS; files are read again when they change."""

    basic_auth: BasicAuthSection | None = Field(default=None, description="User and password.")
    authorization: AuthorizationSection | None = Field(default=None, description="Any other `Authorization` header.")
    tls_config: TlsSection | None = Field(default=None, description="Whom to trust and who we are.")

    def misfits(self) -> Iterator[Misfit]:
        """A request carries one `Authorization` header."""
        if self.basic_auth is not None and self.authorization is not None:
            yield ("authorization",), "write only one of basic_auth and authorization"


def http_config(section: HttpSection, place: Place) -> HttpConfig | None:
    """Build what the program uses; None where nothing is configured."""
    basic, other, tls = section.basic_auth, section.authorization, section.tls_config
    if basic is None and other is None and tls is None:
        return None
    return HttpConfig(
        basic_auth=_basic_auth(basic, place) if basic else None,
        authorization=_authorization(other, place) if other else None,
        tls_config=_tls(tls, place) if tls else None,
    )


def _basic_auth(section: BasicAuthSection, place: Place) -> BasicAuth:
    return BasicAuth(
        username=section.username or "",
        username_file=place(section.username_file),
        password=section.password or "",
        password_file=place(section.password_file),
    )


def _authorization(section: AuthorizationSection, place: Place) -> Authorization:
    return Authorization(
        type=section.type,
        credentials=section.credentials or "",
        credentials_file=place(section.credentials_file),
    )


def _tls(section: TlsSection, place: Place) -> TlsConfig:
    return TlsConfig(
        ca_file=place(section.ca_file),
        cert_file=place(section.cert_file),
        key_file=place(section.key_file),
        server_name=section.server_name,
        insecure_skip_verify=section.insecure_skip_verify,
        min_version=cast("TlsVersion", section.min_version),
    )
