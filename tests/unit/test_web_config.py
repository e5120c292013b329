"""The web configuration file: exporter-toolkit's keys, or every reason against it with its line."""

from pathlib import Path

import pytest

from sidecar.settings.problems import SettingsProblems
from sidecar.settings.web_config import CIPHER_SUITES, TlsServer, WebConfig, read_web_config

HASH = "$2y$10$" + "a" * 53
FULL = f"""\
tls_server_config:
  cert_file: tls/tls.crt
  key_file: /secrets/tls.key
  client_auth_type: RequireAndVerifyClientCert
  client_ca_file: ca.crt
  client_allowed_sans: [prometheus.monitoring, 10.0.0.1]
  min_version: TLS12
  max_version: TLS13
  cipher_suites: [TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, TLS_AES_128_GCM_SHA256]
  prefer_server_cipher_suites: false
  curve_preferences: [CurveP384]
http_server_config:
  http2: false
  headers:
    Strict-Transport-Security: max-age=31536000
    X-Frame-Options: deny
    X-Content-Type-Options: nosniff
    Content-Security-Policy: sandbox
    X-XSS-Protection: "0"
basic_auth_users:
  prometheus: {HASH}
  "anna b": {HASH.replace("y", "b")}
"""


def read(folder: Path, text: str) -> WebConfig:
    file = folder / "web.yaml"
    file.write_text(text)
    return read_web_config(file)


def faults(folder: Path, text: str) -> str:
    with pytest.raises(SettingsProblems) as caught:
        read(folder, text)
    return str(caught.value).replace(f"{folder}/", "")


def test_every_key_is_read_and_paths_count_from_the_files_folder(tmp_path: Path) -> None:
    config = read(tmp_path, FULL)
    assert config.tls == TlsServer(
        cert_file=f"{tmp_path}/tls/tls.crt",
        key_file="/secrets/tls.key",
        client_auth="RequireAndVerifyClientCert",
        client_ca_file=f"{tmp_path}/ca.crt",
        allowed_sans=frozenset({"prometheus.monitoring", "10.0.0.1"}),
        ciphers=("ECDHE-RSA-AES128-GCM-SHA256",),
        curve="secp384r1",
        server_prefers=False,
    )
    assert config.users == {"prometheus": HASH, "anna b": HASH.replace("y", "b")}
    assert dict(config.headers) == {
        "Content-Security-Policy": "sandbox",
        "X-Frame-Options": "deny",
        "X-Content-Type-Options": "nosniff",
        "X-XSS-Protection": "0",
        "Strict-Transport-Security": "max-age=31536000",
    }
    assert HASH not in repr(config)


@pytest.mark.parametrize("text", ["", "{}", "tls_server_config:\nhttp_server_config:\nbasic_auth_users:\n"])
def test_an_empty_file_asks_for_nothing(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == WebConfig()


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ("NoClientCert", "NoClientCert"),
        ("RequestClientCert", "NoClientCert"),
        ("VerifyClientCertIfGiven", "VerifyClientCertIfGiven"),
        ("RequireAndVerifyClientCert", "RequireAndVerifyClientCert"),
    ],
)
def test_every_client_auth_type_that_proves_something_or_nothing_is_taken(
    tmp_path: Path, written: str, means: str
) -> None:
    ca = "" if means == "NoClientCert" else ", client_ca_file: ca"
    config = read(tmp_path, f"tls_server_config: {{cert_file: a, key_file: b, client_auth_type: {written}{ca}}}")
    assert config.tls is not None
    assert config.tls.client_auth == means


def tls(more: str, *, pair: str = "cert_file: a, key_file: b, ") -> str:
    return f"tls_server_config: {{{pair}{more}}}"


REFUSED = [
    ("tls_server_confg: {}", "web.yaml:1: tls_server_confg: unknown key; did you mean 'tls_server_config'?"),
    (tls("cert_fil: x"), "web.yaml:1: tls_server_config.cert_fil: unknown key; did you mean 'cert_file'?"),
    (tls("", pair="cert_file: a"), "web.yaml:1: tls_server_config.key_file: is required beside cert_file"),
    (tls("", pair="key_file: a"), "web.yaml:1: tls_server_config.cert_file: is required"),
    (tls("", pair="min_version: TLS13"), "web.yaml:1: tls_server_config.cert_file: is required"),
    (tls("cert: PEM"), "tls_server_config.cert: is not read from here: write it into a file of its own and name it as"),
    (tls("key: PEM"), "tls_server_config.key: is not read from here"),
    (tls("client_ca: PEM"), "tls_server_config.client_ca: is not read from here"),
    (tls("client_auth_type: RequireAnyClientCert"), "takes any certificate unverified, which proves nothing"),
    (tls("client_auth_type: RequireClientCert"), "takes any certificate unverified, which proves nothing"),
    (tls("client_auth_type: Maybe"), "'Maybe' is not one of NoClientCert, RequestClientCert"),
    (tls("client_auth_type: RequireAndVerifyClientCert"), "tls_server_config.client_ca_file: is required by"),
    (tls("client_auth_type: VerifyClientCertIfGiven"), "tls_server_config.client_ca_file: is required by"),
    (tls("client_ca_file: ca"), "tls_server_config.client_ca_file: has no effect without a client_auth_type"),
    (tls("client_allowed_sans: [a]"), "tls_server_config.client_allowed_sans: has no effect without"),
    (tls("min_version: TLS10"), "tls_server_config.min_version: TLS10 is broken, and OpenSSL no longer offers it"),
    (tls("max_version: TLS11"), "tls_server_config.max_version: TLS11 is broken"),
    (tls("max_version: SSL3"), "'SSL3' is not one of TLS12, TLS13"),
    (tls("min_version: TLS13, max_version: TLS12"), "min_version: TLS13 is above max_version TLS12"),
    (tls("cipher_suites: [TLS_RSA_WITH_RC4_128_SHA]"), "cipher_suites[0]: 'TLS_RSA_WITH_RC4_128_SHA' is no cipher"),
    (tls("cipher_suites: [TLS_AES_128_GCM_SHA256]"), "cipher_suites: names suites of TLS 1.3 only"),
    (tls("curve_preferences: [CurveP256, X25519]"), "curve_preferences: holds several curves"),
    (tls("curve_preferences: [P256]"), "curve_preferences[0]: 'P256' is not one of CurveP256"),
    ("http_server_config: {http2: true}", "web.yaml:1: http_server_config.http2: is not spoken here"),
    ("http_server_config: {headers: {X-Frame-Options: sameorigin}}", "'sameorigin' is not deny, which is what"),
    ("http_server_config: {headers: {X-Content-Type-Options: sniff}}", "'sniff' is not nosniff"),
    ("http_server_config: {headers: {X-Powered-By: us}}", "headers.X-Powered-By: unknown key"),
    ('http_server_config: {headers: {X-XSS-Protection: "a\\r\\nSet-Cookie: b"}}', "must be printable ASCII"),
    ("rate_limit: {interval: 1s}", "web.yaml:1: rate_limit: is not honoured"),
    ("basic_auth_users: {'a:b': x}", "is not a user name"),
    ("basic_auth_users: [a]", "web.yaml:1: basic_auth_users: must be a mapping, not a list"),
    (f"basic_auth_users: {{a: {HASH.replace('10', '15')}}}", "has the cost 15; from 4 to 14 is possible"),
    (f"basic_auth_users: {{a: {HASH.replace('10', '03')}}}", "has the cost 3; from 4 to 14 is possible"),
    ("basic_auth_users: {a: x}\nbasic_auth_users: {}", "web.yaml:2: basic_auth_users: is written twice"),
    ("basic_auth_users: {a: '${HOME}'}", "basic_auth_users.a: environment variable HOME is not set"),
]


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_what_cannot_be_honoured_is_refused_with_place_and_reason(tmp_path: Path, text: str, reason: str) -> None:
    assert reason in faults(tmp_path, text)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    text = f"tls_server_config:\n  min_version: TLS10\n  x: 1\nbasic_auth_users:\n  a: pass\n  b: {HASH}\nmore: 1\n"
    assert [line.partition(": ")[0] for line in faults(tmp_path, text).splitlines()] == [
        "web.yaml:2",
        "web.yaml:3",
        "web.yaml:5",
        "web.yaml:7",
    ]


@pytest.mark.parametrize("password", ["hunter2-in-the-wrong-place", "$2y$10$hunter2-in-the-wrong-place"])
def test_a_password_in_place_of_its_hash_is_never_shown(tmp_path: Path, password: str) -> None:
    told = faults(tmp_path, f"basic_auth_users: {{anna: '{password}'}}")
    assert "basic_auth_users.anna: is not a bcrypt hash" in told
    assert "hunter2" not in told


def test_a_file_that_is_not_there_is_a_problem_like_any_other(tmp_path: Path) -> None:
    with pytest.raises(SettingsProblems, match=r"web\.yaml:1: \(file\): cannot be read: No such file"):
        read_web_config(tmp_path / "web.yaml")


def test_every_suite_is_one_that_openssl_knows() -> None:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for suite in CIPHER_SUITES.values():
        context.set_ciphers(suite)
        assert suite in {cipher["name"] for cipher in context.get_ciphers()}
