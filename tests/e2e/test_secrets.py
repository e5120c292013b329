"""No secret comes out again: not in logs, metrics, audit, state, status, errors, answers, nor in the process list.

Every place where the configuration or a caller can put a secret holds one that is easy to find. All are used, rightly
and wrongly, with the log at its most talkative; then everything that came out is searched, plain and as it travels.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import signal
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import bcrypt
import pytest
import trustme
import yaml

from sidecar.adapters.approvers import hash_code
from tests.cast import ROOT, Sidecar, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.e2e

CANARY = "canary-that-must-be-found"


def secret(name: str) -> str:
    return f"planted-{name}-7f3a91"


ROLES = ("viewer", "operator", "risk", "webhook")
CODE, WRONG_CODE = secret("code"), secret("wrong-code")
PASSWORD, WRONG_PASSWORD = secret("password"), secret("wrong-password")
WEBHOOK, HEADER = secret("webhook-file"), secret("header")
URL_PASSWORD, BASIC_PASSWORD, CREDENTIALS = secret("url-password"), secret("basic-password"), secret("credentials")
ENVIRONMENT_CODE = secret("environment-code")
IN_PLACE_OF_A_HASH = secret("in-place-of-a-hash")
UNKNOWN_TOKEN = secret("unknown-token")
SECRETS = [
    *map(secret, ROLES),
    CODE,
    WRONG_CODE,
    PASSWORD,
    WRONG_PASSWORD,
    WEBHOOK,
    HEADER,
    URL_PASSWORD,
    BASIC_PASSWORD,
    CREDENTIALS,
    ENVIRONMENT_CODE,
    IN_PLACE_OF_A_HASH,
    UNKNOWN_TOKEN,
]
LOSS = {
    "trigger": "daily_loss",
    "type": "threshold",
    "query": "daily_pnl_ratio",
    "operator": "lt",
    "threshold": -0.05,
    "shadow": True,  # asks Prometheus all the same, and does not stand in the way of the recovery
}
BRAKE = {"trigger": "runaway", "type": "order_rate", "max_orders": 100_000, "per": "1s"}


class GuardedPrometheus:
    """Stands for a Prometheus behind credentials; refuses with what it was sent, as a careless proxy does."""

    def __init__(self) -> None:
        self.refuses = False
        self.seen: set[str] = set()
        prometheus = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                sent = [self.headers.get(name, "") for name in ("Authorization", "X-Scope-Secret")]
                prometheus.seen.update(sent)
                status, body = 200, json.dumps({"status": "success", "data": {"resultType": "vector", "result": []}})
                if prometheus.refuses:
                    error = f"401 for {' and '.join(sent)}"
                    status, body = 401, json.dumps({"status": "error", "errorType": "unauthorized", "error": error})
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_POST  # noqa: N815 - the library's name

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


@pytest.fixture
def guarded() -> Iterator[GuardedPrometheus]:
    server = GuardedPrometheus()
    yield server
    server.close()


class World:
    """A sidecar with a secret in every place, and everything that ever came out of it."""

    def __init__(self, sidecar: Sidecar, guarded: GuardedPrometheus, prometheus: dict[str, Any]) -> None:
        self.sidecar = sidecar
        self.out: list[str] = []
        self.files = sidecar.folder / "secrets"
        self.files.mkdir()
        self.ca = trustme.CA()
        served = self.ca.issue_cert("127.0.0.1")
        self.key = served.private_key_pem.bytes().decode()
        self.put("tls.pem", served.private_key_and_cert_chain_pem.bytes().decode())
        self.put("webhook", WEBHOOK + "\n")
        self.put("password", BASIC_PASSWORD)
        self.put("credentials", CREDENTIALS)
        self.good()
        sidecar.environ["KILL_SWITCH_APPROVAL_CODE"] = ENVIRONMENT_CODE
        sidecar.write_config(
            prometheus=prometheus,
            operations={"tokens_file": str(self.files / "tokens"), "web_config": str(self.files / "web")},
            alertmanager={"webhook": {"token_file": str(self.files / "webhook")}, "notify": {"urls": []}},
            recovery={"approvers_file": str(self.files / "approvers")},
            logging={"level": "debug"},
        )

    def put(self, name: str, content: object) -> None:
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        fresh = self.files / f"{name}.new"
        fresh.write_text(text)
        fresh.replace(self.files / name)

    def good(self) -> None:
        digests = {role: hashlib.sha256(secret(role).encode()).hexdigest() for role in ROLES}
        self.put("tokens", [{"name": role, "roles": [role], "sha256": digests[role]} for role in ROLES])
        self.put("approvers", [{"name": "bob", "code_hash": hash_code(CODE)}])
        hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
        tls = {"cert_file": "tls.pem", "key_file": "tls.pem"}
        self.put("web", {"tls_server_config": tls, "basic_auth_users": {"anna": hashed}})

    def bad(self) -> None:
        """Secrets where their hashes should be."""
        self.put("tokens", [{"name": "eve", "roles": ["risk"], "sha256": IN_PLACE_OF_A_HASH}])
        self.put("approvers", [{"name": "bob", "code_hash": IN_PLACE_OF_A_HASH}])
        self.put("web", {"basic_auth_users": {"anna": IN_PLACE_OF_A_HASH}})

    def ask(self, method: str, path: str, authorization: str | None = None, body: object = None, **headers: str) -> int:
        """Ask the TCP listener, and keep what it answers."""
        context = ssl.create_default_context()
        self.ca.configure_trust(context)
        connection = http.client.HTTPSConnection("127.0.0.1", self.sidecar.operations_port, timeout=20, context=context)
        try:
            sent = {**({"Authorization": authorization} if authorization else {}), **headers}
            if body is not None:
                sent["Content-Type"] = "application/json"
            connection.request(method, path, None if body is None else json.dumps(body), sent)
            answer = connection.getresponse()
            self.out += [str(answer.getheaders()), answer.read().decode()]
            return answer.status
        finally:
            connection.close()

    def control(self, method: str, path: str, body: object = None) -> int:
        reply = self.sidecar.control(method, path, body)
        self.out += [str(reply.headers), reply.body.decode()]
        return reply.status

    def command(self, *arguments: str, stdin: str) -> int:
        """Run the command line; look at the process list meanwhile."""
        process = subprocess.Popen(
            [sys.executable, "-m", "sidecar", *arguments, "--config", str(self.sidecar.config_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        self.look_at_processes()
        said, _ = process.communicate(stdin, timeout=60)
        self.out.append(said)
        return process.returncode

    def look_at_processes(self) -> None:
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = entry.read_bytes()
            except OSError:
                continue
            if b"sidecar" in line:
                self.out.append(line.decode(errors="replace"))

    def everything(self) -> str:
        """All that came out, and all files that the sidecar wrote."""
        folders = ("state", "run", "control")
        files = [path for folder in folders for path in (self.sidecar.folder / folder).rglob("*") if path.is_file()]
        files += [self.sidecar.log_file, self.sidecar.folder / "stdout.log"]
        return "\n".join([*self.out, *(path.read_bytes().decode(errors="replace") for path in files)])


def bearer(text: str) -> str:
    return f"Bearer {text}"


def basic(password: str, user: str = "anna") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def forms(text: str) -> set[str]:
    """A secret as it may travel."""
    users = ("anna", "prom", "")
    travelling = {basic(text, user).removeprefix("Basic ").rstrip("=") for user in users}
    return {text, quote(text, safe=""), base64.b64encode(text.encode()).decode().rstrip("="), *travelling}


WAYS: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    "in the address": lambda address, _: {
        "urls": [f"http://prom:{URL_PASSWORD}@{address}"],
        "headers": {"X-Scope-Secret": HEADER},
    },
    "basic_auth": lambda address, files: {
        "urls": [f"http://{address}"],
        "headers": {"X-Scope-Secret": HEADER},
        "http_config": {"basic_auth": {"username": "prom", "password_file": str(files / "password")}},
    },
    "authorization": lambda address, files: {
        "urls": [f"http://{address}"],
        "headers": {"X-Scope-Secret": HEADER},
        "http_config": {"authorization": {"credentials_file": str(files / "credentials")}},
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_no_secret_ever_comes_out(make_sidecar: Callable[..., Sidecar], guarded: GuardedPrometheus, way: str) -> None:
    sidecar = make_sidecar([BRAKE, LOSS], [])
    prometheus = WAYS[way](guarded.address, sidecar.folder / "secrets")
    world = World(sidecar, guarded, prometheus)
    sidecar.start()
    wait_for(lambda: any(HEADER in sent for sent in guarded.seen), "a question with the header")
    wait_for(lambda: len(guarded.seen) > 1, "a question with the credentials")

    if way == "in the address":  # what follows does not depend on the way, and takes its time
        read_everything(world)
        present_everything(world)
    stop_and_release(world)
    guarded.refuses = True
    wait_for(lambda: sidecar.trigger_of("daily_loss")["health"] == "error", "the refusal to be seen")
    world.bad()
    sidecar.wait_status("the bad files to be told", lambda status: len(status["problems"]) >= 2)
    assert world.control("POST", "/-/reload") == 400
    sidecar.signal(signal.SIGHUP)
    read_everything(world)
    world.look_at_processes()
    assert sidecar.terminate() == 0

    came_out = world.everything()
    assert CANARY in came_out
    assert "401" in came_out
    found = [text for text in SECRETS if any(form in came_out for form in forms(text))]
    assert found == []
    assert world.key.splitlines()[1] not in came_out


def read_everything(world: World) -> None:
    for path in ("/metrics", "/openapi.json", "/", "/api/v1/access"):
        assert world.ask("GET", path, bearer(secret("viewer"))) == 200
    assert world.ask("GET", "/metrics", basic(PASSWORD), Accept="application/openmetrics-text") == 200
    for name in ("status", "triggers", "recovery", "health", "audit?limit=10000"):
        assert world.ask("GET", f"/api/v1/{name}", basic(PASSWORD)) == 200
        assert world.control("GET", f"/api/v1/{name}") == 200


def present_everything(world: World) -> None:
    """Each credential where it belongs, where it does not, and wrong ones."""
    kill = {"reason": CANARY}
    for path in ("/metrics", "/api/v1/status", "/nothing"):
        for refused in (bearer(UNKNOWN_TOKEN), basic(WRONG_PASSWORD), basic(PASSWORD, "nobody"), UNKNOWN_TOKEN):
            assert world.ask("GET", path, refused) == 401
    assert world.ask("GET", f"/api/v1/status?token={secret('viewer')}") == 401
    assert world.ask("GET", f"/{UNKNOWN_TOKEN}", bearer(secret("viewer"))) == 404
    assert world.ask("GET", f"/api/v1/audit?code={WRONG_CODE}", bearer(secret("viewer"))) == 400
    assert world.ask("POST", "/api/v1/trigger", basic(PASSWORD), kill) == 403
    assert world.ask("POST", "/api/v1/trigger", bearer(secret("viewer")), kill) == 403
    assert world.ask("POST", "/api/v1/trigger", bearer(secret("operator")), {**kill, "code": WRONG_CODE}) == 400
    alerts = {"version": "4", "alerts": []}
    for token, status in ((WEBHOOK, 200), (secret("webhook"), 200), (UNKNOWN_TOKEN, 401), (secret("viewer"), 403)):
        assert world.ask("POST", "/api/v1/alertmanager", bearer(token), alerts) == status


def stop_and_release(world: World) -> None:
    """Kill; ask for a recovery with wrong codes, then with the right one, over the API and on the command line."""
    sidecar = world.sidecar
    assert world.ask("POST", "/api/v1/trigger", bearer(secret("operator")), {"reason": CANARY}) == 200
    asked = {"reason": CANARY, "by": "bob", "code": WRONG_CODE}
    assert world.ask("POST", "/api/v1/recovery", bearer(secret("risk")), asked) == 403
    assert world.ask("POST", "/api/v1/recovery", bearer(secret("operator")), {**asked, "code": CODE}) == 403
    assert world.control("POST", "/api/v1/recovery", {**asked, "code": [CODE]}) == 400
    recover = ("recover", "--reason", CANARY, "--by", "bob", "--code-stdin")
    assert world.command(*recover, stdin=f"{WRONG_CODE}\n") == 4
    assert world.command(*recover, stdin=f"{CODE}\n") == 0
    sidecar.wait_status("the recovery", lambda status: status["state"] != "KILLED")


def test_a_configuration_that_is_refused_shows_no_secret(make_sidecar: Callable[..., Sidecar]) -> None:
    sidecar = make_sidecar([BRAKE], [])
    sidecar.write_config(
        prometheus={
            "urls": [f"http://prom:{URL_PASSWORD}@[bad"],
            "headers": {"X-Secret": f"{HEADER}\u00e9"},
            "http_config": {
                "basic_auth": {"username": "u", "password": BASIC_PASSWORD, "password_file": "also"},
                "authorization": {"type": "Basic", "credentials": CREDENTIALS},
            },
        },
        alertmanager={"notify": {"urls": [f"http://alert:{URL_PASSWORD}@127.0.0.1:9093"]}},
    )
    sidecar.launch()
    assert sidecar.process is not None
    assert sidecar.process.wait(timeout=30) == 1
    sidecar.process = None
    said = sidecar.log_file.read_text() + (sidecar.folder / "stdout.log").read_text()
    assert "prometheus.urls" in said
    assert "prometheus.http_config" in said
    assert "alertmanager.notify.urls" in said
    assert [text for text in SECRETS if any(form in said for form in forms(text))] == []
