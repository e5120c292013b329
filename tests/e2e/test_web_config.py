"""TLS, client certificates and basic auth as docs/SECURITY.md sets them up, on the real Prometheus and Alertmanager."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import shutil
import ssl
import subprocess
import urllib.request
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import bcrypt
import pytest
import trustme
import yaml

from tests.cast import ROOT, Prometheus, Sidecar, free_port, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

pytestmark = pytest.mark.e2e

PASSWORD = "scrape-password-4410"
TOKENS = {name: f"{name}-token-d41c" for name in ("viewer", "operator", "webhook")}
NEVER = {"trigger": "runaway", "type": "order_rate", "max_orders": 100_000, "per": "1s"}
ALERT = {"trigger": "external", "type": "alertmanager", "match": ['severity="critical"']}
HEALTH = ("/-/healthy", "/-/ready", "/livez", "/readyz")


class Secured:
    """A sidecar, its certificate authority, and the files of its web configuration."""

    def __init__(self, sidecar: Sidecar) -> None:
        self.sidecar = sidecar
        self.web = sidecar.folder / "web"
        self.web.mkdir()
        self.ca = trustme.CA()
        self.ca.cert_pem.write_to_path(self.web / "ca.crt")
        self.issue("localhost")
        client = self.ca.issue_cert("prometheus.monitoring")
        client.private_key_and_cert_chain_pem.write_to_path(self.web / "client.pem")
        entries = [
            {"name": name, "roles": [name], "sha256": hashlib.sha256(token.encode()).hexdigest()}
            for name, token in TOKENS.items()
        ]
        (self.web / "tokens.yaml").write_text(yaml.safe_dump(entries))

    def issue(self, *names: str) -> None:
        """Put a fresh server certificate in place, as cert-manager does."""
        certificate = self.ca.issue_cert("127.0.0.1", *names)
        for name, blobs in (("tls.key", [certificate.private_key_pem]), ("tls.crt", certificate.cert_chain_pems)):
            fresh = self.web / f"{name}.new"
            fresh.write_bytes(b"".join(blob.bytes() for blob in blobs))
            fresh.replace(self.web / name)

    def start(self, web: Mapping[str, Any], **operations: Any) -> Secured:
        self.configure(web, **operations)
        self.sidecar.start()
        self.sidecar.wait_status("it to be ready", lambda status: status["ready"])
        return self

    def configure(self, web: Mapping[str, Any], **operations: Any) -> None:
        (self.web / "web.yaml").write_text(yaml.safe_dump(dict(web)))
        files = {"web_config": str(self.web / "web.yaml"), "tokens_file": str(self.web / "tokens.yaml")}
        self.sidecar.write_config(operations={**files, **operations})

    def tls(self, *, client: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.web / "ca.crt"))
        if client:
            context.load_cert_chain(self.web / "client.pem")
        return context

    def get(self, path: str, *, client: bool = False, authorization: str | None = None) -> int:
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.sidecar.operations_port, timeout=10, context=self.tls(client=client)
        )
        try:
            connection.request("GET", path, headers={"Authorization": authorization} if authorization else {})
            return connection.getresponse().status
        finally:
            connection.close()

    def scraped_with(self, **job: Any) -> dict[str, Any]:
        return {
            "job_name": "killswitch",
            "scheme": "https",
            "static_configs": [{"targets": [f"127.0.0.1:{self.sidecar.operations_port}"]}],
            **job,
        }


TLS = {"cert_file": "tls.crt", "key_file": "tls.key"}
MUTUAL = {
    **TLS,
    "client_auth_type": "RequireAndVerifyClientCert",
    "client_ca_file": "ca.crt",
    "client_allowed_sans": ["prometheus.monitoring"],
}
USERS = {"prometheus": bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(6)).decode()}


@pytest.fixture
def secured(make_sidecar: Callable[..., Sidecar]) -> Secured:
    return Secured(make_sidecar([NEVER], []))


@pytest.fixture
def scraper(_programs: None, tmp_path: Path) -> Iterator[Callable[..., Prometheus]]:
    """A real Prometheus with these jobs."""
    started: list[Prometheus] = []

    def start(*jobs: Mapping[str, Any]) -> Prometheus:
        server = Prometheus(tmp_path, target=None)
        config = {"global": {"scrape_interval": "250ms", "scrape_timeout": "200ms"}, "scrape_configs": list(jobs)}
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.kill()


def test_prometheus_scrapes_over_tls_with_a_password_and_over_a_renewal(
    secured: Secured, scraper: Callable[..., Prometheus]
) -> None:
    secured.start({"tls_server_config": TLS, "basic_auth_users": USERS})
    password_file = secured.web / "password"
    password_file.write_text(PASSWORD)
    trust = {"ca_file": str(secured.web / "ca.crt")}
    prometheus = scraper(
        secured.scraped_with(
            tls_config=trust, basic_auth={"username": "prometheus", "password_file": str(password_file)}
        ),
        secured.scraped_with(
            job_name="stranger", tls_config=trust, basic_auth={"username": "prometheus", "password": "wrong"}
        ),
        secured.scraped_with(job_name="token", tls_config=trust, authorization={"credentials": TOKENS["viewer"]}),
    )
    state = 'killswitch_state{job="killswitch",state="ACTIVE"} == 1'
    wait_for(lambda: prometheus.query(state), "a scrape with the password", patience=60)
    wait_for(lambda: prometheus.query('up{job="token"} == 1'), "a scrape with a token", patience=60)
    wait_for(lambda: prometheus.query('up{job="stranger"} == 0'), "a scrape that is refused", patience=60)
    assert prometheus.query('up{job="stranger"} == 1') == []
    for path in HEALTH:
        assert secured.get(path) == 200
    assert secured.get("/metrics") == 401
    assert secured.get("/metrics", authorization=basic("prometheus", PASSWORD)) == 200

    secured.issue("renewed.example")
    names = certificate_names(secured)
    assert "renewed.example" in names
    wait_for(lambda: prometheus.query(state), "scrapes after the renewal", patience=60)

    (secured.web / "tls.key").write_text("no key at all")
    status = secured.sidecar.wait_status("the broken key to be told", lambda status: status["problems"])
    assert "tls_server_config.cert_file" in " ".join(status["problems"])
    assert certificate_names(secured) == names
    secured.issue("mended.example")
    secured.sidecar.wait_status("the mended key to be taken", lambda status: not told(status))
    assert "mended.example" in certificate_names(secured)


def told(status: Mapping[str, Any]) -> list[str]:
    return [problem for problem in status["problems"] if "web_config" in problem]


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def certificate_names(secured: Secured) -> set[str]:
    """The names in the certificate of a fresh handshake."""
    import socket

    with (
        socket.create_connection(("127.0.0.1", secured.sidecar.operations_port), timeout=10) as plain,
        secured.tls().wrap_socket(plain, server_hostname="127.0.0.1") as tls,
    ):
        return {str(value) for _, value in (tls.getpeercert() or {})["subjectAltName"]}


def test_prometheus_scrapes_with_its_certificate_and_probes_have_a_listener_of_their_own(
    secured: Secured, scraper: Callable[..., Prometheus]
) -> None:
    health_port = free_port()
    secured.start({"tls_server_config": MUTUAL}, health_listen=f"127.0.0.1:{health_port}")
    ours = str(secured.web / "client.pem")
    trust = {"ca_file": str(secured.web / "ca.crt")}
    prometheus = scraper(
        secured.scraped_with(tls_config={**trust, "cert_file": ours, "key_file": ours}),
        secured.scraped_with(job_name="stranger", tls_config=trust),
    )
    wait_for(lambda: prometheus.query('up{job="killswitch"} == 1'), "a scrape with a certificate", patience=60)
    wait_for(lambda: prometheus.query('up{job="stranger"} == 0'), "a scrape without one to be refused", patience=60)
    assert secured.get("/api/v1/status", client=True) == 401
    assert secured.get("/api/v1/status", client=True, authorization=f"Bearer {TOKENS['viewer']}") == 200
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
        secured.get("/-/healthy")
    for path, expected in (*((path, 200) for path in HEALTH), ("/metrics", 404), ("/api/v1/status", 404)):
        with urllib.request.urlopen(f"http://127.0.0.1:{health_port}/livez", timeout=10):
            pass
        connection = http.client.HTTPConnection("127.0.0.1", health_port, timeout=10)
        connection.request("GET", path)
        assert connection.getresponse().status == expected
        connection.close()
    assert secured.sidecar.gate().decided == (200, "active")


def test_alertmanager_stops_trading_over_tls_with_a_token(make_sidecar: Callable[..., Sidecar], tmp_path: Path) -> None:
    if shutil.which("prometheus-alertmanager") is None:
        pytest.skip("prometheus-alertmanager is not installed")
    secured = Secured(make_sidecar([NEVER, ALERT], []))
    secured.start({"tls_server_config": TLS, "basic_auth_users": USERS})
    credentials = tmp_path / "token"
    credentials.write_text(TOKENS["webhook"])
    receiver = {
        "url": f"https://127.0.0.1:{secured.sidecar.operations_port}/api/v1/alertmanager",
        "http_config": {
            "authorization": {"credentials_file": str(credentials)},
            "tls_config": {"ca_file": str(secured.web / "ca.crt")},
        },
    }
    config = {
        "route": {"receiver": "killswitch", "group_wait": "0s", "group_interval": "1s"},
        "receivers": [{"name": "killswitch", "webhook_configs": [receiver]}],
    }
    (tmp_path / "alertmanager.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    arguments = [
        "prometheus-alertmanager",
        f"--config.file={tmp_path}/alertmanager.yml",
        f"--storage.path={tmp_path}/am",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]
    with (tmp_path / "alertmanager.log").open("w") as log:
        alertmanager = subprocess.Popen(arguments, stdout=log, stderr=log)
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/-/ready"), "Alertmanager", patience=60)
        now = datetime.now(UTC)
        alert = {
            "labels": {"alertname": "Fire", "severity": "critical"},
            "startsAt": now.isoformat(),
            "endsAt": (now + timedelta(minutes=5)).isoformat(),
        }
        urllib.request.urlopen(
            urllib.request.Request(
                f"http://127.0.0.1:{port}/api/v2/alerts",
                json.dumps([alert]).encode(),
                {"Content-Type": "application/json"},
            ),
            timeout=10,
        ).close()
        secured.sidecar.wait_gate(403, "killed", patience=60)
    finally:
        alertmanager.kill()
        alertmanager.wait(timeout=15)
    assert "external" in json.dumps(secured.sidecar.wait_audit("switch.killed"))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.parametrize(
    ("web", "reason"),
    [
        ({"tls_server_config": {**TLS, "min_version": "TLS10"}}, ":4: tls_server_config.min_version: TLS10 is broken"),
        ({"tls_server_config": {**TLS, "key_file": "none"}}, ":3: tls_server_config.key_file: "),
        ({"basic_auth_users": {"anna": "hunter2"}}, ":2: basic_auth_users.anna: is not a bcrypt hash"),
    ],
)
def test_a_broken_file_at_the_start_ends_the_process_with_its_reason(
    secured: Secured, web: dict[str, Any], reason: str
) -> None:
    secured.configure(web)
    secured.sidecar.launch()
    assert secured.sidecar.process is not None
    assert secured.sidecar.process.wait(timeout=30) == 1
    secured.sidecar.process = None
    said = secured.sidecar.log_file.read_text()
    assert f"{secured.web}/web.yaml{reason}" in said
    assert "hunter2" not in said


@pytest.mark.parametrize("name", ["prometheus.yml", "alertmanager.yml"])
def test_the_documented_configurations_are_what_prometheus_and_alertmanager_take(tmp_path: Path, name: str) -> None:
    checker = {"prometheus.yml": ["promtool", "check", "config"], "alertmanager.yml": ["amtool", "check-config"]}[name]
    if shutil.which(checker[0]) is None:
        pytest.skip(f"{checker[0]} is not installed")
    page = (ROOT / "docs" / "SECURITY.md").read_text(encoding="utf-8")
    examples = re.findall(rf"```yaml\n# {name}[^\n]*\n(.*?)```", page, re.DOTALL)
    assert examples
    for file in ("ca.crt", "client.crt", "client.key", "password", "token"):
        (tmp_path / file).write_text("")
    client = trustme.CA().issue_cert("prometheus.monitoring")
    (tmp_path / "client.crt").write_bytes(client.cert_chain_pems[0].bytes())
    (tmp_path / "client.key").write_bytes(client.private_key_pem.bytes())
    for text in examples:
        (tmp_path / name).write_text(text)
        said = subprocess.run([*checker, str(tmp_path / name)], capture_output=True, text=True, timeout=60, check=False)
        assert said.returncode == 0, said.stdout + said.stderr
