"""Credentials and TLS: read afresh when their files change, and never shown."""

import os
import ssl
from pathlib import Path

import pytest

from sidecar.settings.http_config import (
    Authorization,
    BasicAuth,
    HttpAccess,
    HttpConfig,
    HttpConfigError,
    TlsConfig,
    split_userinfo,
)

SECRET = "s3cr3t-hunter2"


def refreshed(config: HttpConfig) -> HttpAccess:
    access = HttpAccess(config)
    access.refresh()
    return access


def test_nothing_configured_sends_nothing():
    access = refreshed(HttpConfig())
    assert (access.authorization, access.tls, access.server_name, access.changed()) == (None, None, None, False)


def test_basic_auth_is_encoded():
    assert refreshed(HttpConfig(basic_auth=BasicAuth(username="u", password="p"))).authorization == "Basic dTpw"


def test_files_win_and_lose_their_line_end(tmp_path: Path):
    (tmp_path / "user").write_text("u\n")
    (tmp_path / "password").write_text("p\r\n")
    basic = BasicAuth(username_file=str(tmp_path / "user"), password_file=str(tmp_path / "password"))
    assert refreshed(HttpConfig(basic_auth=basic)).authorization == "Basic dTpw"


def test_a_token_has_a_type():
    assert refreshed(HttpConfig(authorization=Authorization(credentials="t"))).authorization == "Bearer t"
    assert refreshed(HttpConfig(authorization=Authorization(type="Token", credentials="t"))).authorization == "Token t"


def test_a_rotated_token_is_read_again(tmp_path: Path):
    token = tmp_path / "token"
    token.write_text("one")
    access = refreshed(HttpConfig(authorization=Authorization(credentials_file=str(token))))
    assert access.changed() is False
    fresh = tmp_path / "fresh"
    fresh.write_text("two")
    fresh.replace(token)
    assert access.changed() is True
    access.refresh()
    assert access.authorization == "Bearer two"


def test_a_secret_behind_a_swapped_symlink_is_read_again(tmp_path: Path):
    for generation in ("1", "2"):
        (tmp_path / generation).mkdir()
        (tmp_path / generation / "token").write_text(generation)
    (tmp_path / "..data").symlink_to("1")
    (tmp_path / "token").symlink_to("..data/token")
    access = refreshed(HttpConfig(authorization=Authorization(credentials_file=str(tmp_path / "token"))))
    (tmp_path / "next").symlink_to("2")
    (tmp_path / "next").replace(tmp_path / "..data")
    assert access.changed() is True
    access.refresh()
    assert access.authorization == "Bearer 2"


def test_a_secret_that_vanished_is_an_error_until_it_is_back(tmp_path: Path):
    token = tmp_path / "token"
    token.write_text("one")
    access = refreshed(HttpConfig(authorization=Authorization(credentials_file=str(token))))
    token.unlink()
    for _ in range(2):
        assert access.changed() is True
        with pytest.raises(HttpConfigError, match="token"):
            access.refresh()
    token.write_text("one")
    access.refresh()
    assert access.changed() is False


@pytest.mark.parametrize("content", [f"{SECRET}\nX-Injected: 1", f"{SECRET}\x00", f"{SECRET}é", SECRET * 10_000])
def test_a_token_that_is_no_header_value_is_refused_without_being_shown(tmp_path: Path, content: str):
    token = tmp_path / "token"
    token.write_text(content)
    access = HttpAccess(HttpConfig(authorization=Authorization(credentials_file=str(token))))
    with pytest.raises(HttpConfigError) as caught:
        access.refresh()
    assert SECRET not in str(caught.value)
    assert str(token) in str(caught.value)


def test_bytes_that_are_no_text_are_refused_without_being_shown(tmp_path: Path):
    token = tmp_path / "token"
    token.write_bytes(SECRET.encode() + b"\xff")
    with pytest.raises(HttpConfigError, match="UTF-8") as caught:
        HttpAccess(HttpConfig(authorization=Authorization(credentials_file=str(token)))).refresh()
    assert SECRET not in repr(caught.getrepr())


def test_no_secret_stands_in_a_repr():
    config = HttpConfig(basic_auth=BasicAuth(username="u", password=SECRET))
    other = HttpConfig(authorization=Authorization(credentials=SECRET))
    assert SECRET not in repr(config) + repr(other) + repr(HttpAccess(config))


def test_contradictions_are_refused():
    with pytest.raises(HttpConfigError, match="keep one"):
        HttpConfig(basic_auth=BasicAuth(), authorization=Authorization())
    with pytest.raises(HttpConfigError, match="go together"):
        HttpConfig(tls_config=TlsConfig(cert_file="/c"))


def test_tls_keeps_verification_unless_told():
    strict = refreshed(HttpConfig(tls_config=TlsConfig(server_name="a.example", min_version="TLS13")))
    assert strict.tls is not None
    assert (strict.tls.verify_mode, strict.tls.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert (strict.tls.minimum_version, strict.server_name) == (ssl.TLSVersion.TLSv1_3, "a.example")
    lax = refreshed(HttpConfig(tls_config=TlsConfig(insecure_skip_verify=True)))
    assert lax.tls is not None
    assert (lax.tls.verify_mode, lax.tls.check_hostname) == (ssl.CERT_NONE, False)


def test_a_context_is_kept_until_its_files_change(tmp_path: Path):
    ca = tmp_path / "ca.pem"
    ca.write_text(_some_authority())
    access = refreshed(HttpConfig(tls_config=TlsConfig(ca_file=str(ca))))
    first = access.tls
    access.refresh()
    assert access.tls is first
    os.utime(ca, ns=(1, 1))
    access.refresh()
    assert access.tls is not first


def test_a_bad_certificate_names_its_file(tmp_path: Path):
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(HttpConfigError, match=r"ca\.pem"):
        refreshed(HttpConfig(tls_config=TlsConfig(ca_file=str(tmp_path / "ca.pem"))))


@pytest.mark.parametrize(
    ("url", "clean", "header"),
    [
        ("http://h:1/p?q=1", "http://h:1/p?q=1", None),
        ("http://u:p@h:1/p", "http://h:1/p", "Basic dTpw"),
        ("https://u:p%40%3A@[::1]:1", "https://[::1]:1", "Basic dTpwQDo="),
    ],
)
def test_user_and_password_are_taken_out_of_a_url(url: str, clean: str, header: str | None):
    assert split_userinfo(url) == (clean, header)


def _some_authority() -> str:
    authorities = ssl.create_default_context().get_ca_certs(binary_form=True)
    return ssl.DER_cert_to_PEM_cert(authorities[0])
