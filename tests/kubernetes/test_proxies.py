"""Orders through Envoy, nginx and Caddy, in every situation of the kill switch; docs/ENFORCEMENT.md says the same.

One sidecar is walked through its situations while all three proxies run in front of one venue. What each kind of
request met in each situation is collected once and then looked at by the tests.
"""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.cast import CODE, ROOT, Sidecar, _config, free_port, wait_for
from tests.kubernetes.proxies import NAMES, Outcome, Proxy, Venue, Wire, ask, request

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.e2e

ORDER = b'{"symbol": "AAPL", "side": "buy", "quantity": 100}'
REQUESTS = {
    "order": request("POST", "/api/v1/orders", body=ORDER),
    "order that claims to be a cancel": request("POST", "/api/v1/orders", "X-Order-Intent: cancel", body=ORDER),
    "cancel": request("DELETE", "/api/v1/orders/42"),
    "market data": request("GET", "/api/v1/market/AAPL?depth=5"),
}
TIMEOUT_SECONDS = 0.25
SLACK_SECONDS = 0.25  # this machine's other work, at the quickest of several tries
TRIES = 2
TRIES_UNDER_LOAD = 40

# What an order meets; cancels and market data pass in every one of them.
SITUATIONS = {
    "ACTIVE": "passes",
    "KILLED, `reduce_only`": "403 killed",
    "KILLED, `halt`": "403 killed",
    "factor 0.5, `blind_orders: deny`": "403 blind_order",
    "factor 0.5, `blind_orders: allow`": "passes",
    "sidecar stopped (SIGSTOP)": "503 stale",
    "sidecar dead (SIGKILL)": "503 stale",
    "sidecar back": "passes",
    "answer after 50 ms": "passes",
    "answer after 1 s": "503 stale",
    "answer breaks off": "503 stale",
    "gate's port taken by something that answers 404": "503 stale",
}


class Stage:
    """A venue, a sidecar, and two of each proxy: straight to the gate, and over a wire with faults."""

    def __init__(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.folder = tmp_path_factory.mktemp("px")
        self.venue = Venue(self.folder)
        self.sidecar = self._sidecar()
        self.wire = Wire(self.sidecar.gate_port)
        self.straight = self._proxies(self.sidecar.gate_port, "straight")
        self.wired = self._proxies(self.wire.port, "wired")

    def _sidecar(self) -> Sidecar:
        for name in ("run", "control", "rules"):
            (self.folder / name).mkdir()
        config = _config(self.folder, "desk/proxied", [])
        config["gate"] |= {"listen": f"127.0.0.1:{free_port()}", "blind_orders": "deny"}
        config["recovery"] |= {"cooldown": "0s", "steps": [{"factor": 0.5}, {"factor": 1.0, "after": "1h"}]}
        sidecar = Sidecar(
            folder=self.folder,
            name="desk/proxied",
            config=config,
            environ={**os.environ, "KILL_SWITCH_APPROVAL_CODE": CODE},
        )
        sidecar.environ.pop("KILLSWITCH_SOCKET", None)
        sidecar.write_config()
        sidecar.write_rules({"trigger": "risk_desk", "type": "alertmanager", "match": ['desk="fx"'], "action": "kill"})
        return sidecar.start()

    def _proxies(self, gate_port: int, kind: str) -> dict[str, Proxy]:
        return {
            name: Proxy(
                name=name, folder=self.folder / f"{kind}-{name.lower()}", venue=self.venue, gate_port=gate_port
            ).start()
            for name in NAMES
        }

    def close(self) -> None:
        for proxy in [*self.straight.values(), *self.wired.values()]:
            proxy.close()
        self.wire.close()
        self.sidecar.close()
        self.venue.close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory)
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def outcomes(stage: Stage) -> dict[str, dict[str, dict[str, list[Outcome]]]]:
    """What every request met at every proxy in every situation: outcomes[situation][request][proxy]."""
    return dict(_walk(stage))


def _walk(stage: Stage) -> Iterator[tuple[str, dict[str, dict[str, list[Outcome]]]]]:
    switch, straight, wired = stage.sidecar, stage.straight, stage.wired
    switch.wait_gate(200, "active")
    yield "ACTIVE", _send_all(straight)
    switch.kill_switch(restriction="reduce_only")
    yield "KILLED, `reduce_only`", _send_all(straight)
    switch.kill_switch(restriction="halt")
    yield "KILLED, `halt`", _send_all(straight)
    assert switch.recover().status == 200
    switch.wait_gate(403, "blind_order")
    yield "factor 0.5, `blind_orders: deny`", _send_all(straight)
    switch.write_config(gate={"blind_orders": "allow"})
    assert switch.control("POST", "/-/reload").status == 200
    switch.wait_gate(200, "active")
    yield "factor 0.5, `blind_orders: allow`", _send_all(straight)
    stage.wire.delay = 0.05
    yield "answer after 50 ms", _send_all(wired)
    stage.wire.delay = 1.0
    yield "answer after 1 s", _send_all(wired, answered=False)
    stage.wire.delay, stage.wire.cut = 0.0, True
    yield "answer breaks off", _send_all(wired, answered=False)
    stage.wire.cut = False
    switch.signal(signal.SIGSTOP)
    yield "sidecar stopped (SIGSTOP)", _send_all(straight, answered=False)
    switch.signal(signal.SIGCONT)
    switch.wait_gate(200, "active")
    switch.kill9()
    yield "sidecar dead (SIGKILL)", _send_all(straight, answered=False)
    switch.start()
    switch.wait_gate(200, "active")
    yield "sidecar back", _send_all(straight)
    stage.wire.target_port = switch.operations_port
    yield "gate's port taken by something that answers 404", _send_all(wired, answered=False)
    stage.wire.target_port = switch.gate_port


def _send_all(proxies: dict[str, Proxy], *, answered: bool = True) -> dict[str, dict[str, list[Outcome]]]:
    """Send every kind of request to every proxy, the proxies side by side."""
    with ThreadPoolExecutor(len(proxies)) as pool:
        sending = {name: pool.submit(_send_each, proxy, answered=answered) for name, proxy in proxies.items()}
        by_proxy = {name: sent.result() for name, sent in sending.items()}
    return {kind: {name: met[kind] for name, met in by_proxy.items()} for kind in REQUESTS}


def _send_each(proxy: Proxy, *, answered: bool) -> dict[str, list[Outcome]]:
    """Send each kind of request `TRIES` times.

    Where the sidecar answers, this machine's other work may make an answer too late now and then. That is a refusal, as
    it should be, and asked again; never the other way round.
    """
    met: dict[str, list[Outcome]] = {kind: [] for kind in REQUESTS}
    for kind, sent in REQUESTS.items():
        for _ in range(TRIES_UNDER_LOAD):
            one = ask(proxy.port, sent)
            if not (answered and one.shown == "503 stale"):
                met[kind].append(one)
            if len(met[kind]) == TRIES:
                break
    return met


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_each_request_meets_what_the_situation_asks_for(
    outcomes: dict[str, dict[str, dict[str, list[Outcome]]]], situation: str, name: str
) -> None:
    wanted = SITUATIONS[situation]
    met = {kind: {one.shown for one in by_proxy[name]} for kind, by_proxy in outcomes[situation].items()}
    assert met == {
        "order": {wanted},
        "order that claims to be a cancel": {wanted},
        "cancel": {"passes"},
        "market data": {"passes"},
    }


def test_the_documents_show_what_was_met(outcomes: dict[str, dict[str, dict[str, list[Outcome]]]]) -> None:
    assert _table(outcomes) in (ROOT / "docs" / "ENFORCEMENT.md").read_text()


def _table(outcomes: dict[str, dict[str, dict[str, list[Outcome]]]]) -> str:
    lines = [f"| the kill switch | {' | '.join(REQUESTS)} |", "|---" * (len(REQUESTS) + 1) + "|"]
    for situation in SITUATIONS:
        cells = [_cell(outcomes[situation][kind]) for kind in REQUESTS]
        lines.append(f"| {situation} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(by_proxy: dict[str, list[Outcome]]) -> str:
    shown = {name: "/".join(sorted({one.shown for one in met})) for name, met in by_proxy.items()}
    alike = set(shown.values())
    return alike.pop() if len(alike) == 1 else ", ".join(f"{name} {met}" for name, met in shown.items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("situation", "waited"),
    [("sidecar stopped (SIGSTOP)", True), ("answer after 1 s", True), ("sidecar dead (SIGKILL)", False)],
)
def test_a_refusal_comes_within_the_configured_time(
    outcomes: dict[str, dict[str, dict[str, list[Outcome]]]], name: str, situation: str, waited: bool
) -> None:
    met = outcomes[situation]["order"][name] + outcomes[situation]["order that claims to be a cancel"][name]
    quickest = min(one.seconds for one in met)
    assert quickest < TIMEOUT_SECONDS + SLACK_SECONDS
    if waited:  # it was our limit that ended it, nothing else
        assert quickest >= 0.9 * TIMEOUT_SECONDS


@pytest.mark.parametrize("name", NAMES)
def test_a_denied_order_says_why_as_the_gate_did(
    outcomes: dict[str, dict[str, dict[str, list[Outcome]]]], name: str
) -> None:
    for one in outcomes["KILLED, `halt`"]["order"][name]:
        assert one.reason == "killed"
        assert b"kill" in one.body


# One request after another. Each test says how the switch stands.


@pytest.fixture
def allowed(outcomes: object, stage: Stage) -> Stage:
    """The stage with a switch that lets orders through, and a venue that has seen nothing."""
    if stage.sidecar.status()["state"] == "KILLED":
        assert stage.sidecar.recover().status == 200
    stage.sidecar.wait_gate(200, "active")
    return _fresh(stage)


@pytest.fixture
def killed(outcomes: object, stage: Stage) -> Stage:
    """The stage with a killed switch, and a venue that has seen nothing."""
    stage.sidecar.kill_switch()
    return _fresh(stage)


def _fresh(stage: Stage) -> Stage:
    stage.venue.status, stage.venue.headers = 200, {}
    stage.venue.arrivals.clear()
    return stage


def _post(*headers: str, target: str = "/api/v1/orders") -> bytes:
    return request("POST", target, *headers, body=ORDER)


SMUGGLED = {
    "claims of two kinds": _post("X-Order-Intent: new", "X-Order-Intent: cancel"),
    "the same claim twice": _post("X-Order-Intent: cancel", "X-Order-Intent: cancel"),
    "a claim in capitals": _post("X-ORDER-INTENT: CANCEL"),
    "a claim with underscores": _post("X_Order_Intent: cancel"),
    "a claim with a space before the colon": _post("X-Order-Intent : cancel"),
    "a claim on a folded line": _post("X-Order-Intent: new\r\n cancel"),
    "a claim named in Connection": _post("X-Order-Intent: cancel", "Connection: X-Order-Intent"),
    "a reducing claim": _post("X-Order-Intent: reduce"),
    "another method in a header": _post("X-HTTP-Method-Override: DELETE"),
    "another method in the query": _post(target="/api/v1/orders?_method=DELETE"),
    "another path in a header": _post("X-Original-URL: /api/v1/market/AAPL", "X-Rewrite-URL: /api/v1/market/AAPL"),
    "another path for Envoy": _post("X-Envoy-Original-Path: /api/v1/market/AAPL"),
    "a trailing slash": _post(target="/api/v1/orders/"),
    "two slashes": _post(target="//api//v1/orders"),
    "a dot": _post(target="/api/v1/./orders"),
    "two dots": _post(target="/api/v1/market/../orders"),
    "escaped dots": _post(target="/api/v1/market/%2e%2e/orders"),
    "escaped slashes": _post(target="/api/v1/market%2f..%2forders"),
    "escaped letters": _post(target="/api/v1/%6frders"),
    "a path parameter": _post(target="/api/v1/orders;/market/AAPL"),
    "a harmless path as its query": _post(target="/api/v1/orders?x=/api/v1/market/AAPL"),
    "capital letters": _post(target="/API/V1/ORDERS"),
    "an absolute target": _post(target="http://127.0.0.1:9790/api/v1/orders"),
    "an order on a harmless path": _post(target="/api/v1/market/AAPL"),
    "a path nobody thought of": _post(target="/api/v2/batch"),
    "a replaced order": request("PUT", "/api/v1/orders/42", body=ORDER),
    "a patched order": request("PATCH", "/api/v1/orders/42", body=ORDER),
    "a method in small letters": request("post", "/api/v1/orders", f"Content-Length: {len(ORDER)}") + ORDER,
    "a position that is closed": request("DELETE", "/api/v1/positions/AAPL"),
    "a cancel that climbs": request("DELETE", "/api/v1/orders/../positions/AAPL"),
    "a cancel that climbs in disguise": request("DELETE", "/api/v1/orders/%2e%2e%2fpositions"),
    "a read that climbs": request("GET", "/api/v1/market/../trade"),
    "a read of a path nobody thought of": request("GET", "/api/v1/trade?side=buy"),
    "a read that claims another method": request("GET", "/api/v1/orders?_method=POST"),
    "a read that claims it in disguise": request("GET", "/api/v1/orders?a=1&%5Fmethod=POST"),
    "nginx' own location": request("GET", "/killswitch-gate"),
    "a second length": _post("Content-Length: 0"),
    "a chunked order": request("POST", "/api/v1/orders", "Transfer-Encoding: chunked").replace(
        b"Content-Length: 0\r\n", b""
    )
    + b"%x\r\n%s\r\n0\r\n\r\n" % (len(ORDER), ORDER),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sent", SMUGGLED.values(), ids=SMUGGLED)
def test_nothing_but_reads_and_cancels_passes_a_killed_switch(killed: Stage, name: str, sent: bytes) -> None:
    met = ask(killed.straight[name].port, sent)
    assert met.status != 200
    assert killed.venue.arrivals == []


BEHIND = b"POST /api/v1/orders HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(ORDER), ORDER)
HIDING = {
    "in the body of a read": request("GET", "/api/v1/market/AAPL", f"Content-Length: {len(BEHIND)}") + BEHIND,
    "behind a read": request("GET", "/api/v1/market/AAPL") + BEHIND,
    "behind an empty chunk that the length says is more": request(
        "GET", "/api/v1/market/AAPL", f"Content-Length: {len(BEHIND) + 5}", "Transfer-Encoding: chunked"
    )
    + b"0\r\n\r\n"
    + BEHIND,
    "behind a coding nobody knows": request(
        "GET", "/api/v1/market/AAPL", f"Content-Length: {len(BEHIND)}", "Transfer-Encoding: xchunked"
    )
    + BEHIND,
    "behind a coding with a space": request(
        "GET", "/api/v1/market/AAPL", f"Content-Length: {len(BEHIND) + 5}", "Transfer-Encoding : chunked"
    )
    + b"0\r\n\r\n"
    + BEHIND,
    "behind an upgrade": request("GET", "/api/v1/market/AAPL", "Connection: Upgrade", "Upgrade: websocket") + BEHIND,
    "behind a cleartext HTTP/2 upgrade": request(
        "GET", "/api/v1/market/AAPL", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"
    )
    + BEHIND,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sent", HIDING.values(), ids=HIDING)
def test_an_order_hidden_behind_a_read_does_not_arrive(killed: Stage, name: str, sent: bytes) -> None:
    port = killed.straight[name].port
    ask(port, sent)
    # The proxy works off what came on one connection in turn; an order of ours that is refused now is behind all that.
    assert ask(port, _post()).shown == "403 killed"
    wait_for(lambda: all(one.method == "GET" for one in killed.venue.arrivals) or None, "nothing but reads")
    assert {one.method for one in killed.venue.arrivals} <= {"GET"}


HANDSHAKE = request(
    "GET",
    "/api/v1/market/AAPL",
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


@pytest.mark.parametrize("name", NAMES)
def test_no_tunnel_comes_about_though_the_venue_offers_one(killed: Stage, name: str) -> None:
    assert ask(killed.straight[name].port, HANDSHAKE).status != 101


@pytest.mark.parametrize("name", NAMES)
def test_what_passes_ungated_arrives_without_another_method_in_a_header(killed: Stage, name: str) -> None:
    overrides = (
        "X-HTTP-Method-Override: POST",
        "X-HTTP-Method: POST",
        "X-Method-Override: POST",
        "X-Order-Intent: new",
    )
    port = killed.straight[name].port
    assert ask(port, request("GET", "/api/v1/orders?symbol=AAPL&limit=5", *overrides)).status == 200
    assert ask(port, request("DELETE", "/api/v1/orders", *overrides)).status == 200
    assert [(one.method, one.target) for one in killed.venue.arrivals] == [
        ("GET", "/api/v1/orders?symbol=AAPL&limit=5"),
        ("DELETE", "/api/v1/orders"),
    ]
    for one in killed.venue.arrivals:
        assert (
            not {"x-http-method-override", "x-http-method", "x-method-override", "x-order-intent"} & one.headers.keys()
        )


@pytest.mark.parametrize("name", NAMES)
def test_an_allowed_order_arrives_whole_and_once(allowed: Stage, name: str) -> None:
    headers = ("Authorization: Bearer abc", "X-Order-Intent: cancel", "x-envoy-retry-on: 5xx", "x-envoy-max-retries: 3")
    met = _until_answered(allowed.straight[name], _post(*headers, target="/api/v1/orders?account=7"))
    assert (met.status, met.reason, met.body) == (200, None, b'{"venue": "done"}')
    (one,) = allowed.venue.arrivals
    assert (one.method, one.target, one.body) == ("POST", "/api/v1/orders?account=7", ORDER)
    assert one.headers["host"] == "venue.example"
    assert one.headers["authorization"] == "Bearer abc"
    assert "x-order-intent" not in one.headers


@pytest.mark.parametrize("status", [403, 404, 429, 500, 503])
@pytest.mark.parametrize("name", NAMES)
def test_a_refusal_of_the_venue_is_never_taken_for_the_switch(allowed: Stage, name: str, status: int) -> None:
    allowed.venue.status, allowed.venue.headers = status, {"X-Killswitch-Reason": "killed"}
    met = _until_answered(allowed.straight[name], _post("x-envoy-retry-on: 5xx"))
    assert (met.status, met.reason) == (status, None)
    assert len(allowed.venue.arrivals) == 1


def _until_answered(proxy: Proxy, sent: bytes) -> Outcome:
    """Ask again where this machine's other work made the sidecar's answer too late; nothing has left then."""
    return wait_for(lambda: met if (met := ask(proxy.port, sent)).shown != "503 stale" else None, "an answer in time")


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_that_drips_is_late_as_a_whole(allowed: Stage, name: str) -> None:
    allowed.wire.drip = 0.005
    try:
        met = ask(allowed.wired[name].port, _post())
    finally:
        allowed.wire.drip = 0.0
    assert met.shown == "503 stale"
    assert allowed.venue.arrivals == []


@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_orders_at_once_get_an_answer_each(allowed: Stage, name: str) -> None:
    with ThreadPoolExecutor(16) as pool:
        met = list(pool.map(lambda _: _until_answered(allowed.straight[name], _post()), range(100)))
    assert {one.shown for one in met} == {"passes"}
    assert len(allowed.venue.arrivals) == 100
