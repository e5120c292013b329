"""TLS, client certificates and basic auth of the operations listener, over real connections."""

import asyncio
import base64
import hashlib
import json
import os
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import bcrypt
import pytest
import trustme
import yaml
from prometheus_client import CollectorRegistry

from sidecar.adapters.operations_http import (
    OperationsLimits,
    OperationsServer,
    WebAccess,
    WebhookAccess,
    listener,
    passwords,
)
from sidecar.adapters.operations_http.passwords import MOST_PROVEN, MOST_WAITING, Passwords
from sidecar.adapters.operations_http.problems import Problem
from sidecar.settings.problems import SettingsProblems

HEALTH = ("/-/healthy", "/-/ready", "/livez", "/readyz")
PASSWORD = "correct horse battery staple"
HASHES = {name: bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode() for name in ("prometheus", "anna")}
TOKENS = {name: f"{name}-token-91c3" for name in ("viewer", "webhook", "operator", "risk")}


class Desk:
    """Answers what these tests ask."""

    def status(self) -> dict[str, Any]:
        return {"state": "ACTIVE"}

    async def trigger(self, **asked: Any) -> dict[str, Any]:
        return {"state": "KILLED", **asked}

    async def alertmanager(self, *, trusted: bool, **_: Any) -> dict[str, Any]:
        return {"trusted": trusted}

    def webhook_turned_away(self, result: str) -> None:
        pass

    def live(self) -> None:
        return None

    ready = live


class Files:
    """A certificate authority, a server certificate, and the web configuration file that names them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "web.yaml"
        self.ca = trustme.CA()
        self.ca.cert_pem.write_to_path(folder / "ca.crt")
        self.issue("localhost")

    def issue(self, *names: str) -> None:
        certificate = self.ca.issue_cert("127.0.0.1", *names)
        self.put("tls.crt", b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        self.put("tls.key", certificate.private_key_pem.bytes())

    def put(self, name: str, content: bytes) -> None:
        fresh = self.folder / f"{name}.new"
        fresh.write_bytes(content)
        fresh.replace(self.folder / name)

    def write(self, *, tls: Mapping[str, Any] | None = None, **more: Any) -> Path:
        served = {} if tls is None else {"tls_server_config": {"cert_file": "tls.crt", "key_file": "tls.key", **tls}}
        self.put("web.yaml", yaml.safe_dump({**served, **more}).encode())
        return self.config

    def trusting(self, ca: trustme.CA | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context()
        (ca or self.ca).configure_trust(context)
        return context

    def client(self, *names: str, ca: trustme.CA | None = None) -> ssl.SSLContext:
        context = self.trusting()
        (ca or self.ca).issue_cert(*names).configure_cert(context)
        return context


class Serving:
    """A server with this access, and the ways to ask it."""

    def __init__(self, server: OperationsServer, access: WebAccess, port: int, health_port: int) -> None:
        self.server = server
        self.access = access
        self.port = port
        self.health_port = health_port

    async def ask(
        self,
        path: str = "/api/v1/status",
        *,
        tls: ssl.SSLContext | None = None,
        method: str = "GET",
        auth: tuple[str, str] | str | None = None,
        health: bool = False,
        **more: Any,
    ) -> Any:
        headers = {} if auth is None else {"Authorization": authorization(auth)}
        base = f"http{'s' if tls else ''}://127.0.0.1:{self.health_port if health else self.port}"
        connector = aiohttp.TCPConnector(ssl=tls or True, force_close=True)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.request(method, base + path, headers=headers, **more) as response,
        ):
            response.body = await response.read()  # type: ignore[attr-defined]
            return response

    async def certificate(self, tls: ssl.SSLContext) -> set[str]:
        """The names in the certificate that a fresh handshake shows."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=tls)
        names = {value for _, value in writer.get_extra_info("peercert")["subjectAltName"]}
        writer.close()
        return names


def authorization(auth: tuple[str, str] | str) -> str:
    if isinstance(auth, str):
        return f"Bearer {TOKENS.get(auth, auth)}"
    return "Basic " + base64.b64encode(":".join(auth).encode()).decode()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.yaml"
    entries = [
        {"name": name, "roles": [name], "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for name, text in TOKENS.items()
    ]
    path.write_text(yaml.safe_dump(entries))
    return path


@pytest.fixture
async def serve(files: Files) -> AsyncIterator[Callable[..., Any]]:
    running: list[OperationsServer] = []

    async def serve(**settings: Any) -> Serving:
        access = WebAccess(files.config)
        await access.load()
        server = OperationsServer(Desk(), CollectorRegistry(), access=access, **settings)  # type: ignore[arg-type]
        running.append(server)
        _, port = await server.start_tcp("127.0.0.1", 0)
        _, health_port = await server.start_health("127.0.0.1", 0)
        return Serving(server, access, port, health_port)

    yield serve
    for server in running:
        await server.stop()


# TLS


async def test_a_certificate_is_served_and_plain_http_is_not(serve: Callable[..., Any], files: Files) -> None:
    files.write(tls={})
    serving = await serve()
    assert (await serving.ask(tls=files.trusting())).status == 200
    with pytest.raises(aiohttp.ClientError):
        await serving.ask()
    assert (await serving.ask(tls=files.trusting())).status == 200


async def test_a_renewed_certificate_is_in_the_next_handshake(serve: Callable[..., Any], files: Files) -> None:
    files.write(tls={})
    serving = await serve()
    assert "localhost" in await serving.certificate(files.trusting())
    files.issue("renewed.example")
    assert "renewed.example" in await serving.certificate(files.trusting())
    assert serving.access.problem is None


@pytest.mark.parametrize("broken", ["tls.crt", "tls.key", "web.yaml"])
async def test_a_broken_renewal_keeps_the_old_certificate_and_says_so_until_it_is_mended(
    serve: Callable[..., Any], files: Files, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    files.write(tls={})
    serving = await serve()
    good = (files.folder / broken).read_bytes()
    files.put(broken, b"tls_server_config: {nonsense: 1}")
    for _ in range(3):
        assert "localhost" in await serving.certificate(files.trusting())
    (problem,) = serving.server.problems
    assert f"{files.config}:" in problem
    assert "tls_server_config" in problem
    assert "what was read before stays in force" in problem
    assert len([record for record in caplog.records if record.msg == "operations.web_config_unusable"]) == 1
    files.put(broken, good)
    assert "localhost" in await serving.certificate(files.trusting())
    assert serving.server.problems == ()


async def test_certificates_behind_a_swapped_symlink_are_seen(serve: Callable[..., Any], files: Files) -> None:
    # As Kubernetes does with a secret: the files are links into a folder whose name is swapped.
    for name, host in (("one", "one.example"), ("two", "two.example")):
        folder = files.folder / name
        folder.mkdir()
        files.issue(host)
        for file in ("tls.crt", "tls.key"):
            (files.folder / file).replace(folder / file)
    (files.folder / "..data").symlink_to("one")
    for file in ("tls.crt", "tls.key"):
        (files.folder / file).symlink_to(f"..data/{file}")
    files.write(tls={})
    serving = await serve()
    assert "one.example" in await serving.certificate(files.trusting())
    (files.folder / "..data_tmp").symlink_to("two")
    (files.folder / "..data_tmp").replace(files.folder / "..data")
    assert "two.example" in await serving.certificate(files.trusting())


@pytest.mark.parametrize(
    ("tls", "line", "reason"),
    [
        ({"cert_file": "none.crt"}, "tls_server_config.cert_file", "cannot be read: No such file or directory"),
        ({"key_file": "none.key"}, "tls_server_config.key_file", "cannot be read: No such file or directory"),
        ({"key_file": "other.key"}, "tls_server_config.cert_file", "are no certificate with its key"),
        ({"key_file": "locked.key"}, "tls_server_config.cert_file", "the key is encrypted"),
        (
            {"client_auth_type": "RequireAndVerifyClientCert", "client_ca_file": "tls.key"},
            "tls_server_config.client_ca_file",
            "holds no certificates",
        ),
    ],
)
async def test_what_cannot_be_served_is_refused_at_the_start_with_its_line(
    files: Files, tls: dict[str, Any], line: str, reason: str
) -> None:
    from cryptography.hazmat.primitives import serialization as pem

    other = trustme.CA().issue_cert("localhost").private_key_pem.bytes()
    files.put("other.key", other)
    key = pem.load_pem_private_key(other, None)
    how = pem.BestAvailableEncryption(b"secret")
    locked = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, how)
    files.put("locked.key", locked)
    files.write(tls=tls)
    with pytest.raises(SettingsProblems) as caught:
        await WebAccess(files.config).load()
    (told,) = str(caught.value).splitlines()
    assert told.startswith(f"{files.config}:")
    assert f": {line}: " in told
    assert reason in told


async def test_the_oldest_version_and_the_suites_are_those_that_were_asked_for(
    serve: Callable[..., Any], files: Files
) -> None:
    files.write(tls={"max_version": "TLS12", "cipher_suites": ["TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"]})
    serving = await serve()
    _, writer = await asyncio.open_connection("127.0.0.1", serving.port, ssl=files.trusting())
    assert writer.get_extra_info("cipher")[:2] == ("ECDHE-ECDSA-AES256-GCM-SHA384", "TLSv1.2")
    writer.close()
    files.write(tls={"min_version": "TLS13"})
    old = files.trusting()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", serving.port, ssl=old)
    assert (await serving.ask(tls=files.trusting())).status == 200


# Client certificates


async def refuses(serving: Serving, tls: ssl.SSLContext) -> None:
    with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
        await serving.ask(tls=tls)


async def test_a_required_certificate_must_be_there_and_from_our_authority(
    serve: Callable[..., Any], files: Files
) -> None:
    files.write(tls={"client_auth_type": "RequireAndVerifyClientCert", "client_ca_file": "ca.crt"})
    serving = await serve()
    assert serving.access.wants_client_certificates
    assert (await serving.ask(tls=files.client("prometheus.example"))).status == 200
    await refuses(serving, files.trusting())
    await refuses(serving, files.client("prometheus.example", ca=trustme.CA()))


async def test_a_certificate_that_need_not_be_given_is_verified_if_it_is(
    serve: Callable[..., Any], files: Files
) -> None:
    files.write(tls={"client_auth_type": "VerifyClientCertIfGiven", "client_ca_file": "ca.crt"})
    serving = await serve()
    assert not serving.access.wants_client_certificates
    assert (await serving.ask(tls=files.trusting())).status == 200
    assert (await serving.ask(tls=files.client("prometheus.example"))).status == 200
    await refuses(serving, files.client("prometheus.example", ca=trustme.CA()))


@pytest.mark.parametrize("allowed", ["prometheus.example", "10.1.2.3", "0:0::1", "scraper@example.com"])
async def test_only_certificates_with_an_allowed_name_come_in(
    serve: Callable[..., Any], files: Files, allowed: str
) -> None:
    files.write(
        tls={
            "client_auth_type": "RequireAndVerifyClientCert",
            "client_ca_file": "ca.crt",
            "client_allowed_sans": [allowed],
        }
    )
    serving = await serve()
    names = {"0:0::1": "::1"}.get(allowed, allowed)
    assert (await serving.ask(tls=files.client("other.example", names))).status == 200
    await refuses(serving, files.client("other.example"))
    await refuses(serving, files.client("sub.prometheus.example"))


async def test_who_may_come_in_follows_the_file(serve: Callable[..., Any], files: Files) -> None:
    mutual = {"client_auth_type": "RequireAndVerifyClientCert", "client_ca_file": "ca.crt"}
    files.write(tls=mutual)
    serving = await serve()
    client = files.client("prometheus.example")
    assert (await serving.ask(tls=client)).status == 200
    trustme.CA().cert_pem.write_to_path(files.folder / "ca.crt")
    await refuses(serving, client)


@pytest.mark.parametrize(
    ("left", "key"),
    [
        ({}, "client_auth_type"),
        ({"client_auth_type": "VerifyClientCertIfGiven", "client_ca_file": "ca.crt"}, "client_auth_type"),
        ({"client_auth_type": "RequireAndVerifyClientCert", "client_ca_file": "ca.crt"}, "client_allowed_sans"),
    ],
)
async def test_half_a_file_lets_nobody_in_without_the_certificate_that_was_asked_for(
    serve: Callable[..., Any], files: Files, left: dict[str, Any], key: str
) -> None:
    whole = {"client_auth_type": "RequireAndVerifyClientCert", "client_ca_file": "ca.crt"}
    files.write(tls={**whole, "client_allowed_sans": ["prometheus.example"]})
    serving = await serve()
    files.write(tls=left)
    await refuses(serving, files.trusting())
    await refuses(serving, files.client("other.example"))
    assert (await serving.ask(tls=files.client("prometheus.example"))).status == 200
    (problem,) = serving.server.problems
    assert f"{key}: cannot be turned off while the sidecar runs; restart it" in problem


async def test_health_of_its_own_is_plain_and_serves_nothing_else(serve: Callable[..., Any], files: Files) -> None:
    files.write(
        tls={"client_auth_type": "RequireAndVerifyClientCert", "client_ca_file": "ca.crt"}, basic_auth_users=HASHES
    )
    serving = await serve()
    for path in HEALTH:
        assert (await serving.ask(path, health=True)).status == 200
    for path in ("/", "/metrics", "/api/v1/status", "/openapi.json", "/nothing"):
        response = await serving.ask(path, health=True)
        assert response.status == 404
        assert response.content_type == "application/problem+json"
    assert (await serving.ask("/livez", health=True, method="POST")).status == 405
    assert (await serving.ask("/api/v1/trigger", health=True, method="POST", json={"reason": "x"})).status == 404


# Handshakes that never end


@pytest.mark.slow
async def test_handshakes_that_never_end_keep_nobody_out(
    serve: Callable[..., Any], files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_HANDSHAKE_SECONDS", 300.0)
    files.write(tls={})
    serving = await serve(limits=OperationsLimits(connections=4))
    silent = [await asyncio.open_connection("127.0.0.1", serving.port) for _ in range(100)]
    async with asyncio.timeout(20):
        assert (await serving.ask(tls=files.trusting())).status == 200
    for _, writer in silent:
        writer.transport.abort()


# Basic auth


@pytest.mark.parametrize("path", ["/", "/metrics", "/openapi.json", "/api/v1/status", "/nothing"])
async def test_with_users_every_path_but_health_needs_a_credential(
    serve: Callable[..., Any], files: Files, tokens_file: Path, path: str
) -> None:
    files.write(basic_auth_users=HASHES)
    serving = await serve(tokens_file=tokens_file)
    for auth in (None, ("prometheus", "wrong"), ("nobody", PASSWORD), ("", ""), "unknown-token"):
        refused = await serving.ask(path, auth=auth)
        assert refused.status == 401, (auth, refused.body)
        assert refused.content_type == "application/problem+json"
        schemes = [value.split()[0] for value in refused.headers.getall("WWW-Authenticate")]
        assert schemes == (["Bearer"] if isinstance(auth, str) else ["Bearer", "Basic"])
    expected = 404 if path == "/nothing" else 200
    assert (await serving.ask(path, auth=("prometheus", PASSWORD))).status == expected
    assert (await serving.ask(path, auth="viewer")).status == expected


@pytest.mark.parametrize("path", HEALTH)
async def test_health_stays_open_with_users(serve: Callable[..., Any], files: Files, path: str) -> None:
    files.write(basic_auth_users=HASHES)
    serving = await serve()
    assert (await serving.ask(path)).status == 200
    assert (await serving.ask(path, auth=("prometheus", "wrong"))).status == 200


async def test_metrics_stay_open_without_users(serve: Callable[..., Any], files: Files) -> None:
    files.write(tls={})
    serving = await serve()
    assert (await serving.ask("/metrics", tls=files.trusting())).status == 200


async def kill(serving: Serving, auth: Any) -> int:
    response = await serving.ask("/api/v1/trigger", method="POST", auth=auth, json={"reason": "drill"})
    return int(response.status)


async def test_a_user_is_a_viewer_and_a_token_has_its_own_roles(
    serve: Callable[..., Any], files: Files, tokens_file: Path
) -> None:
    files.write(basic_auth_users=HASHES)
    serving = await serve(tokens_file=tokens_file)
    wanted = {("anna", PASSWORD): 403, "viewer": 403, "webhook": 403, "operator": 200, "risk": 200, None: 401}
    assert {auth: await kill(serving, auth) for auth in wanted} == wanted


async def test_without_a_tokens_file_users_read_and_nobody_changes_anything(
    serve: Callable[..., Any], files: Files
) -> None:
    files.write(basic_auth_users=HASHES)
    serving = await serve()
    assert (await serving.ask(auth=("anna", PASSWORD))).status == 200
    assert await kill(serving, ("anna", PASSWORD)) == 403
    assert await kill(serving, None) == 401


@pytest.mark.parametrize("open_to_all", [False, True])
async def test_the_webhooks_token_passes_where_there_are_users(
    serve: Callable[..., Any], files: Files, tmp_path: Path, open_to_all: bool
) -> None:
    files.write(basic_auth_users=HASHES)
    (tmp_path / "webhook.token").write_text("webhook-secret\n")
    webhook = WebhookAccess()
    webhook.configure(token_file=str(tmp_path / "webhook.token"), allow_unauthenticated=open_to_all)
    serving = await serve(webhook=webhook)

    async def send(auth: Any) -> tuple[int, Any]:
        asked = {"version": "4", "alerts": []}
        response = await serving.ask("/api/v1/alertmanager", method="POST", auth=auth, json=asked)
        return response.status, json.loads(response.body).get("trusted")

    assert await send("webhook-secret") == (200, True)
    assert await send(None) == (401, None)
    assert await send(("anna", PASSWORD)) == ((200, False) if open_to_all else (403, None))
    assert (await serving.ask("/api/v1/status", auth="webhook-secret")).status == 403


async def test_a_changed_password_counts_at_once_and_the_old_one_no_longer(
    serve: Callable[..., Any], files: Files
) -> None:
    files.write(basic_auth_users=HASHES)
    serving = await serve()
    assert (await serving.ask(auth=("anna", PASSWORD))).status == 200
    files.write(basic_auth_users={**HASHES, "anna": bcrypt.hashpw(b"new", bcrypt.gensalt(4)).decode()})
    assert (await serving.ask(auth=("anna", PASSWORD))).status == 401
    assert (await serving.ask(auth=("anna", "new"))).status == 200
    files.write(basic_auth_users={"prometheus": HASHES["prometheus"]})
    assert (await serving.ask(auth=("anna", "new"))).status == 401


@pytest.mark.parametrize("left", [{}, {"tls": {}}, {"basic_auth_users": HASHES}])
async def test_half_a_file_never_opens_a_door(serve: Callable[..., Any], files: Files, left: dict[str, Any]) -> None:
    files.write(tls={}, basic_auth_users=HASHES)
    serving = await serve()
    files.write(**left)
    assert (await serving.ask(tls=files.trusting())).status == 401
    with pytest.raises(aiohttp.ClientError):
        await serving.ask()
    (problem,) = serving.server.problems
    assert "cannot be turned off while the sidecar runs; restart it" in problem


async def test_configured_headers_are_on_every_answer_and_cannot_soften_ours(
    serve: Callable[..., Any], files: Files
) -> None:
    policy = "default-src *; frame-ancestors *"
    added = {"Content-Security-Policy": policy, "Strict-Transport-Security": "max-age=1", "X-Frame-Options": "Deny"}
    files.write(tls={}, http_server_config={"headers": added})
    serving = await serve()
    for path in ("/metrics", "/nothing"):
        answer = await serving.ask(path, tls=files.trusting())
        ours, theirs = answer.headers.getall("Content-Security-Policy")
        assert "frame-ancestors 'none'" in ours
        assert theirs == policy
        assert answer.headers.getall("X-Frame-Options") == ["DENY"]
        assert answer.headers["Strict-Transport-Security"] == "max-age=1"


# Passwords


@pytest.fixture
def right() -> Any:
    made = Passwords()
    yield made
    made.stop()


class Counted:
    """Stands before bcrypt's check and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.costs: list[int] = []
        self.hold = threading.Event()
        self.hold.set()
        check = bcrypt.checkpw

        def counting(password: bytes, hashed: bytes) -> bool:
            self.hold.wait(10)
            self.costs.append(int(hashed[4:6]))
            return check(password, hashed)

        monkeypatch.setattr(passwords.bcrypt, "checkpw", counting)


async def test_a_proven_password_is_checked_once_and_a_wrong_one_each_time(
    right: Passwords, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    for _ in range(3):
        assert await right.are_right(HASHES, "anna", PASSWORD)
    assert len(counted.costs) == 1
    for _ in range(3):
        assert not await right.are_right(HASHES, "anna", "wrong")
    assert len(counted.costs) == 4
    assert not await right.are_right({}, "anna", PASSWORD), "a user who is gone is not remembered"


@pytest.mark.slow
async def test_only_so_many_proven_passwords_are_remembered(right: Passwords) -> None:
    for number in range(MOST_PROVEN + 10):
        assert await right.are_right({f"u{number}": HASHES["anna"]}, f"u{number}", PASSWORD)
    assert len(right._proven) == MOST_PROVEN


async def test_an_unknown_user_costs_what_the_dearest_hash_costs(
    right: Passwords, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    users = {**HASHES, "dear": bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(6)).decode()}
    for name, password in (("nobody", PASSWORD), ("dear", "x" * 73), ("dear", "a\0b"), ("dear", "wrong")):
        assert not await right.are_right(users, name, password)
    assert counted.costs == [6, 6, 6, 6]


@pytest.mark.parametrize("password", ["x" * 72, "pässwörd", "a:b", " ", "\udc80"])
async def test_any_password_that_bcrypt_takes_is_taken(right: Passwords, password: str) -> None:
    raw = password.encode("utf-8", "surrogateescape")
    users = {"anna": bcrypt.hashpw(raw, bcrypt.gensalt(4)).decode()}
    assert await right.are_right(users, "anna", password)
    assert not await right.are_right(users, "anna", password + "x")


async def test_a_flood_of_passwords_is_turned_away_and_leaves_the_loop_alone(
    right: Passwords, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await right.are_right(HASHES, "anna", PASSWORD)
    counted = Counted(monkeypatch)
    counted.hold.clear()
    flood = [asyncio.create_task(right.are_right(HASHES, "anna", f"guess {n}")) for n in range(MOST_WAITING)]
    await asyncio.sleep(0)
    with pytest.raises(Problem) as turned:
        await right.are_right(HASHES, "anna", "one guess more")
    assert turned.value.status == 503
    assert turned.value.headers["Retry-After"] == "1"
    assert await right.are_right(HASHES, "anna", PASSWORD), "who is known already does not wait"
    counted.hold.set()
    assert await asyncio.gather(*flood) == [False] * MOST_WAITING
    assert not await right.are_right(HASHES, "anna", "after the flood")


def test_the_thread_that_checks_passwords_stands_back_and_the_process_does_not() -> None:
    seen = []
    thread = threading.Thread(
        target=lambda: seen.extend(
            [passwords._stand_back(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())]
        )
    )
    before = os.getpriority(os.PRIO_PROCESS, 0)
    thread.start()
    thread.join()
    assert seen == [None, 10]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
