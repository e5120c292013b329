"""What the proxy tests play with: a venue over TLS, a wire with faults before the gate, real Envoy, nginx and Caddy.

The proxies run the very files of docs/examples/proxies; only addresses and file paths are replaced.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import trustme
from aiohttp import web

from tests.cast import ROOT, free_port, wait_for

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping

EXAMPLES = ROOT / "docs" / "examples" / "proxies"
NAMES = ("Envoy", "nginx", "Caddy")
VENUE_NAME = "venue.example"


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request as the venue saw it."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


class Venue:
    """An order entry API over TLS that remembers what arrives; `status` and `headers` are what it answers with."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.authority_file = folder / "authority.pem"
        authority.cert_pem.write_to_path(str(self.authority_file))
        self._certificate = authority.issue_cert(VENUE_NAME)
        self.port = free_port()
        self.arrivals: list[Arrival] = []
        self.status = 200
        self.headers: dict[str, str] = {}
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(20)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._listen())
        self._ready.set()
        self._loop.run_forever()

    async def _listen(self) -> None:
        server = web.Server(self._answer)
        self._runner = web.ServerRunner(server)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self._tls()).start()

    def _tls(self) -> ssl.SSLContext:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._certificate.configure_cert(context)
        return context

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get("Upgrade") == "websocket":
            tunnel = web.WebSocketResponse()
            await tunnel.prepare(request)
            return tunnel
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.arrivals.append(Arrival(method=request.method, target=request.raw_path, headers=headers, body=body))
        return web.json_response({"venue": "done"}, status=self.status, headers=self.headers)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()


class Wire:
    """A TCP relay to the gate with faults.

    Attributes:
        delay: seconds before each answer.
        drip: seconds after each byte; 0 sends an answer as it came.
        cut: whether answers break off in the middle.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.delay = 0.0
        self.drip = 0.0
        self.cut = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target_port), timeout=5)
            except OSError:
                near.close()
                continue
            threading.Thread(target=self._pump, args=(near, far), daemon=True).start()
            threading.Thread(target=self._answer, args=(far, near), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError), target:
            while data := source.recv(65536):
                target.sendall(data)

    def _answer(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError), target:
            while data := source.recv(65536):
                time.sleep(self.delay)
                if self.cut:
                    target.sendall(data[:40])
                    return
                for part in [bytes([byte]) for byte in data] if self.drip else [data]:
                    target.sendall(part)
                    time.sleep(self.drip)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@dataclass(kw_only=True)
class Proxy:
    """One real proxy on the file that the documents show."""

    name: str
    folder: Path
    venue: Venue
    gate_port: int
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Proxy:
        self.folder.mkdir()
        command, environ = getattr(self, f"_{self.name.lower()}")()
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **environ}, cwd=self.folder
            )
        wait_for(self._listens, f"{self.name} to listen")
        return self

    def _listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "log").read_text()
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def _config(self, example: str, *changes: tuple[str, str]) -> Path:
        text = (EXAMPLES / example).read_text()
        for shown, here in changes:
            assert shown in text, f"{example} no longer says {shown!r}"
            text = text.replace(shown, here)
        path = self.folder / example
        path.write_text(text)
        return path

    def _envoy(self) -> tuple[list[str], dict[str, str]]:
        config = self._config(
            "envoy.yaml",
            ("port_value: 9790", f"port_value: {self.port}"),
            ("port_value: 9780", f"port_value: {self.gate_port}"),
            ("address: venue.example, port_value: 443", f"address: 127.0.0.1, port_value: {self.venue.port}"),
            ("/etc/ssl/certs/ca-certificates.crt", str(self.venue.authority_file)),
        )
        program = Path(sys.executable).with_name("envoy")
        assert program.exists(), "the development dependencies bring Envoy: make setup"
        # Without hot restart several Envoys can stand side by side; two workers, as nginx has.
        return [
            str(program), "-c", str(config), "--concurrency", "2", "--disable-hot-restart", "--log-level", "warning",
        ], {}  # fmt: skip

    def _nginx(self) -> tuple[list[str], dict[str, str]]:
        config = self._config(
            "nginx.conf",
            ("listen 127.0.0.1:9790", f"listen 127.0.0.1:{self.port}"),
            ("127.0.0.1:9780", f"127.0.0.1:{self.gate_port}"),
            ("venue.example:443", f"127.0.0.1:{self.venue.port}"),
            ("/etc/ssl/certs/ca-certificates.crt", str(self.venue.authority_file)),
            ("/tmp/nginx", f"{self.folder}/nginx"),
        )
        program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        assert program, "nginx is missing: make setup"
        return [program, "-c", str(config), "-e", "stderr", "-g", "daemon off;"], {}

    def _caddy(self) -> tuple[list[str], dict[str, str]]:
        config = self._config(
            "Caddyfile",
            ("http://:9790", f"http://:{self.port}"),
            ("127.0.0.1:9780", f"127.0.0.1:{self.gate_port}"),
            ("https://venue.example", f"https://127.0.0.1:{self.venue.port}"),
        )
        program = shutil.which("caddy")
        assert program, "caddy is missing: make setup"
        home = {name: str(self.folder) for name in ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")}
        run = [program, "run", "--config", str(config), "--adapter", "caddyfile"]
        return run, {**home, "SSL_CERT_FILE": str(self.venue.authority_file)}

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def close(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
            self.process = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a bot got from a proxy; status 0 where the connection was closed without an answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    @property
    def reason(self) -> str | None:
        """The kill switch's reason, which no venue can give."""
        return self.headers.get("x-killswitch-reason")

    @property
    def shown(self) -> str:
        """How the table of outcomes shows it."""
        return "passes" if self.status == 200 else f"{self.status} {self.reason}"


def ask(port: int, sent: bytes, *, patience: float = 15.0) -> Outcome:
    """Send raw bytes as a bot would, or worse, and read one answer."""
    method = sent.split(b" ", 1)[0].decode("latin-1")
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as connection:
        connection.sendall(sent)
        answer = http.client.HTTPResponse(connection, method=method)
        try:
            answer.begin()
            body = answer.read()
        except (http.client.HTTPException, ConnectionError):
            return Outcome(status=0, headers={}, body=b"", seconds=time.monotonic() - begun)
    headers = {name.lower(): value for name, value in answer.getheaders()}
    return Outcome(status=answer.status, headers=headers, body=body, seconds=time.monotonic() - begun)


def request(method: str, target: str, *headers: str, body: bytes = b"") -> bytes:
    """The bytes of a request; a body gets its length."""
    lines = [f"{method} {target} HTTP/1.1", "Host: 127.0.0.1:9790", *headers]
    if body or method in ("POST", "PUT", "PATCH"):
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
