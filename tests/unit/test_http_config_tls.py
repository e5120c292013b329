"""TLS as configured, against a real local server: who is trusted, and who is not, in the loop and in a thread."""

import asyncio
import json
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import web

from sidecar.adapters.history import History, HistoryError
from sidecar.adapters.prometheus import PrometheusSource, Query
from sidecar.rules.readings import Answer, Failure
from sidecar.settings.http_config import HttpConfig, TlsConfig

pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")  # that is what insecure_skip_verify asks for

BODY = {
    "status": "success",
    "data": {"resultType": "vector", "result": [{"metric": {"__ks__": "t"}, "value": [1, "1"]}]},
}


@dataclass(frozen=True)
class Pair:
    cert: str
    key: str

    @property
    def text(self) -> str:
        return Path(self.cert).read_text()


def make_pair(folder: Path, name: str, *, passphrase: str | None = None) -> Pair:
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2",
         "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}", "-out", cert, "-keyout", key,
         *(["-passout", f"pass:{passphrase}"] if passphrase else ["-nodes"])],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    return Pair(cert=str(cert), key=str(key))


@pytest.fixture(scope="session")
def server_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("tls"), "prometheus.example")


@pytest.fixture(scope="session")
def client_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("tls"), "client.example")


@asynccontextmanager
async def serving(pair: Pair, *, clients: Pair | None = None) -> AsyncIterator[str]:
    async def handle(request: web.Request) -> web.StreamResponse:
        return web.Response(text=json.dumps(BODY))

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair.cert, pair.key)
    if clients:
        context.load_verify_locations(clients.cert)
        context.verify_mode = ssl.CERT_REQUIRED
    app = web.Application()
    app.router.add_route("*", "/api/v1/query", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.05)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    try:
        yield f"https://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def loop_trusts(url: str, tls: TlsConfig | None) -> bool:
    source = PrometheusSource(urls=[url], timeout=3.0, http=HttpConfig(tls_config=tls))
    outcome = (await source.query([Query(key="x", text="x", kind="vector")]))["x"]
    await source.close()
    if isinstance(outcome, Failure):
        assert outcome.unreachable is True
    return isinstance(outcome, Answer)


async def thread_trusts(url: str, tls: TlsConfig | None) -> bool:
    reason = await asyncio.to_thread(_reason, url, tls)
    assert reason in (None, "unreachable")
    return reason is None


def _reason(url: str, tls: TlsConfig | None) -> str | None:
    history = History(url, timeout=3.0, http=HttpConfig(tls_config=tls))
    try:
        history.instant("x")
    except HistoryError as exc:
        return exc.reason
    finally:
        history.close()
    return None


@pytest.mark.parametrize("trusts", [loop_trusts, thread_trusts])
async def test_a_server_is_trusted_by_its_authority_and_its_name_only(trusts, server_pair: Pair, client_pair: Pair):
    name = "prometheus.example"
    async with serving(server_pair) as url:
        assert await trusts(url, TlsConfig(ca_file=server_pair.cert, server_name=name))
        assert await trusts(url, TlsConfig(insecure_skip_verify=True))
        assert not await trusts(url, None)
        assert not await trusts(url, TlsConfig(server_name=name))
        assert not await trusts(url, TlsConfig(ca_file=client_pair.cert, server_name=name))
        assert not await trusts(url, TlsConfig(ca_file=server_pair.cert))
        assert not await trusts(url, TlsConfig(ca_file=server_pair.cert, server_name="other.example"))


@pytest.mark.parametrize("trusts", [loop_trusts, thread_trusts])
async def test_a_client_certificate_is_shown_to_who_wants_one(trusts, server_pair: Pair, client_pair: Pair):
    known = TlsConfig(insecure_skip_verify=True, cert_file=client_pair.cert, key_file=client_pair.key)
    async with serving(server_pair, clients=client_pair) as url:
        assert await trusts(url, known)


async def test_a_rotated_authority_is_trusted_without_a_restart(tmp_path: Path, server_pair: Pair, client_pair: Pair):
    ca = tmp_path / "ca.pem"
    ca.write_text(client_pair.text)
    tls = TlsConfig(ca_file=str(ca), server_name="prometheus.example")
    async with serving(server_pair) as url:
        source = PrometheusSource(urls=[url], timeout=3.0, http=HttpConfig(tls_config=tls))
        asked = [Query(key="x", text="x", kind="vector")]
        assert isinstance((await source.query(asked))["x"], Failure)
        ca.write_text(server_pair.text + "\n")
        assert isinstance((await source.query(asked))["x"], Answer)
        await source.close()


def test_an_encrypted_key_is_an_error_and_no_question_on_the_terminal(tmp_path: Path):
    pair = make_pair(tmp_path, "locked.example", passphrase="hunter2")
    http = HttpConfig(tls_config=TlsConfig(cert_file=pair.cert, key_file=pair.key))
    with pytest.raises(HistoryError, match="encrypted"):
        History("https://127.0.0.1:1", timeout=1.0, http=http)
