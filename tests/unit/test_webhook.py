"""The webhook over real connections: who may send alerts, what a payload is, and what the desk gets of it."""

import hashlib
import io
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from sidecar.adapters.operations_http import OperationsServer, ReceivedAlert, WebhookAccess
from sidecar.core.errors import InvalidTransition, NotDurable, StorageError

PATH = "/api/v1/alertmanager"
TOKEN = "alertmanagers-own-token"
ROLE_TOKENS = {name: f"{name}-token" for name in ("viewer", "webhook", "operator", "risk")}


class FakeDesk:
    """Takes alerts, and raises what the test wants raised."""

    def __init__(self) -> None:
        self.taken: list[tuple[list[ReceivedAlert], bool, bool]] = []
        self.turned_away: list[str] = []
        self.error: Exception | None = None

    async def alertmanager(self, *, alerts: list[ReceivedAlert], truncated: bool, trusted: bool) -> dict[str, Any]:
        self.taken.append((alerts, truncated, trusted))
        if self.error is not None:
            raise self.error
        return {"accepted": len(alerts)}

    def webhook_turned_away(self, result: str) -> None:
        self.turned_away.append(result)

    def status(self) -> dict[str, Any]:
        return {"state": "KILLED", "durable": False}


class Listening:
    def __init__(self, desk: FakeDesk, access: WebhookAccess, address: tuple[str, int], socket: Path) -> None:
        self.desk = desk
        self.access = access
        self._base = f"http://127.0.0.1:{address[1]}"
        self._socket = socket

    async def post(
        self, body: object = None, *, token: str | None = None, control: bool = False, **more: Any
    ) -> tuple[int, dict[str, Any]]:
        headers = {"Content-Type": "application/json", **more.pop("headers", {})}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        data = body if isinstance(body, bytes) else json.dumps(payload() if body is None else body).encode()
        connector = aiohttp.UnixConnector(str(self._socket)) if control else None
        base = "http://localhost" if control else self._base
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post(base + PATH, data=io.BytesIO(data), headers=headers, **more) as response,
        ):
            return response.status, json.loads(await response.read())


def alert(**changes: Any) -> dict[str, Any]:
    return {
        "status": "firing",
        "labels": {"alertname": "Halt", "killswitch": "kill"},
        "annotations": {"summary": "stop"},
        "startsAt": "2026-01-30T14:30:00.123456789Z",
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": "http://prometheus:9090/graph",
        "fingerprint": "f00",
        **changes,
    }


def payload(*alerts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "version": "4",
        "groupKey": '{}:{alertname="Halt"}',
        "truncatedAlerts": 0,
        "status": "firing",
        "receiver": "killswitch\\.x",
        "groupLabels": {},
        "commonLabels": {},
        "commonAnnotations": {},
        "externalURL": "http://alertmanager:9093",
        "alerts": list(alerts or [alert()]),
        **changes,
    }


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    servers: list[OperationsServer] = []

    async def start(*, token: str | None = None, tokens_file: bool = False, unauthenticated: bool = False) -> Listening:
        access, desk, socket = WebhookAccess(), FakeDesk(), tmp_path / "c" / "control.sock"
        if token is not None:
            (tmp_path / "token").write_text(token)
        access.configure(
            token_file=None if token is None else str(tmp_path / "token"), allow_unauthenticated=unauthenticated
        )
        if tokens_file:
            lines = (
                f"- {{name: {name}, roles: [{name}], sha256: {hashlib.sha256(text.encode()).hexdigest()}}}\n"
                for name, text in ROLE_TOKENS.items()
            )
            (tmp_path / "tokens.yaml").write_text("".join(lines))
        server = OperationsServer(
            desk=desk,  # type: ignore[arg-type] # it is asked for nothing else
            registry=CollectorRegistry(),
            tokens_file=tmp_path / "tokens.yaml" if tokens_file else None,
            webhook=access,
        )
        servers.append(server)
        address = await server.start_tcp("127.0.0.1", 0)
        await server.start_control(socket)
        return Listening(desk, access, address, socket)

    yield start
    for server in servers:
        await server.stop()


# Who may send


async def test_without_credentials_configured_nobody_may_send_and_the_answer_says_what_to_set(
    start: Callable[..., Any],
) -> None:
    listening = await start()
    status, problem = await listening.post(token="anything")
    assert status == 403
    assert "token_file" in problem["detail"]
    assert listening.desk.taken == []
    assert listening.desk.turned_away == ["refused"]


async def test_the_token_in_the_file_lets_in_and_no_other(start: Callable[..., Any]) -> None:
    listening = await start(token=f"{TOKEN}\n")
    assert (await listening.post())[0] == 401
    assert (await listening.post(token="wrong"))[0] == 401
    assert listening.desk.taken == []
    assert (await listening.post(token=TOKEN))[0] == 200
    assert [trusted for _, _, trusted in listening.desk.taken] == [True]


async def test_a_token_of_the_role_webhook_lets_in_and_no_other_role_does(start: Callable[..., Any]) -> None:
    listening = await start(tokens_file=True)
    assert (await listening.post(token="nobody"))[0] == 401
    for role in ("viewer", "operator", "risk"):
        assert (await listening.post(token=ROLE_TOKENS[role]))[0] == 403
    assert listening.desk.taken == []
    assert (await listening.post(token=ROLE_TOKENS["webhook"]))[0] == 200
    assert listening.desk.taken[0][2] is True


async def test_both_kinds_of_token_work_side_by_side(start: Callable[..., Any]) -> None:
    listening = await start(token=TOKEN, tokens_file=True)
    assert (await listening.post(token=TOKEN))[0] == 200
    assert (await listening.post(token=ROLE_TOKENS["webhook"]))[0] == 200


@pytest.mark.parametrize("token", [None, "wrong"])
async def test_where_anybody_may_send_a_sender_without_a_right_token_is_not_trusted(
    start: Callable[..., Any], token: str | None
) -> None:
    listening = await start(token=TOKEN, unauthenticated=True)
    assert (await listening.post(token=token))[0] == 200
    assert (await listening.post(token=TOKEN))[0] == 200
    assert [trusted for _, _, trusted in listening.desk.taken] == [False, True]


async def test_anybody_may_send_where_that_alone_is_configured(start: Callable[..., Any]) -> None:
    listening = await start(unauthenticated=True)
    assert (await listening.post())[0] == 200
    assert listening.desk.taken[0][2] is False


async def test_the_control_socket_is_trusted(start: Callable[..., Any]) -> None:
    listening = await start()
    assert (await listening.post(control=True))[0] == 200
    assert listening.desk.taken[0][2] is True


async def test_a_changed_token_file_counts_at_once_and_a_broken_one_leaves_the_last_good_token(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    listening = await start(token=TOKEN)
    (tmp_path / "token").write_text("the-next-token")
    assert (await listening.post(token=TOKEN))[0] == 401
    assert (await listening.post(token="the-next-token"))[0] == 200
    for broken in ("", None):
        (tmp_path / "token").unlink()
        if broken is not None:
            (tmp_path / "token").write_text(broken)
        assert (await listening.post(token="the-next-token"))[0] == 200
        assert listening.access.problem is not None
    (tmp_path / "token").write_text(TOKEN)
    assert (await listening.post(token=TOKEN))[0] == 200
    assert listening.access.problem is None


async def test_an_empty_token_file_lets_in_nobody(start: Callable[..., Any]) -> None:
    listening = await start(token="\n")
    assert (await listening.post(token="x"))[0] == 401
    assert "empty" in str(listening.access.problem)


async def test_the_page_of_another_site_may_not_send(start: Callable[..., Any]) -> None:
    listening = await start(unauthenticated=True)
    assert (await listening.post(headers={"Origin": "http://evil.example"}))[0] == 403
    assert listening.desk.taken == []


# What is sent


async def test_the_desk_gets_the_alerts_as_sent(start: Callable[..., Any]) -> None:
    listening = await start(token=TOKEN)
    resolved = alert(status="resolved", fingerprint="ba5", startsAt="2026-01-30T16:30:00+02:00")
    assert await listening.post(payload(alert(), resolved), token=TOKEN) == (200, {"accepted": 2})
    ((first, second),) = [taken for taken, _, _ in listening.desk.taken]
    assert first == ReceivedAlert(
        firing=True,
        labels={"alertname": "Halt", "killswitch": "kill"},
        annotations={"summary": "stop"},
        starts_at=1769783400.123456,
        fingerprint="f00",
    )
    assert (second.firing, second.starts_at, second.fingerprint) == (False, 1769783400.0, "ba5")


async def test_unknown_fields_are_ignored_and_annotations_and_fingerprint_may_be_absent(
    start: Callable[..., Any],
) -> None:
    listening = await start(token=TOKEN)
    bare = alert(novelty=[1])
    del bare["annotations"], bare["fingerprint"]
    assert (await listening.post(payload(bare, novelty={"x": 1}), token=TOKEN))[0] == 200
    assert listening.desk.taken[0][0][0].annotations == {}
    assert listening.desk.taken[0][0][0].fingerprint == ""


async def test_null_is_what_leaving_it_out_is(start: Callable[..., Any]) -> None:
    # Else the alert that fires beside it would be lost with a 400, which Alertmanager does not try again.
    listening = await start(token=TOKEN)
    body = payload(alert(annotations=None, fingerprint=None), alert(), version=None, truncatedAlerts=None)
    assert (await listening.post(body, token=TOKEN))[0] == 200
    ((null, beside), truncated, _) = listening.desk.taken[0]
    assert (null.annotations, null.fingerprint) == ({}, "")
    assert (beside.firing, truncated) == (True, False)


@pytest.mark.parametrize(("count", "truncated"), [(0, False), (1, True), (900, True)])
async def test_truncation_is_told(start: Callable[..., Any], count: int, truncated: bool) -> None:
    listening = await start(token=TOKEN)
    assert (await listening.post(payload(truncatedAlerts=count), token=TOKEN))[0] == 200
    assert listening.desk.taken[0][1] is truncated


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff",
        {},
        {**payload(), "version": "5"},
        {**payload(), "version": 4},
        {**payload(), "truncatedAlerts": -1},
        {**payload(), "truncatedAlerts": "1"},
        {**payload(), "alerts": None},
        {**payload(), "alerts": [alert(), {}]},
        payload(alert(status="pending")),
        payload(alert(labels=None)),
        payload(alert(labels={"a": 1})),
        payload(alert(startsAt="yesterday")),
        payload(alert(startsAt="2026-01-30T14:30:00")),
        payload(alert(startsAt=None)),
        payload(alert(fingerprint="f" * 201)),
    ],
)
async def test_a_malformed_payload_is_400_and_changes_nothing(start: Callable[..., Any], body: object) -> None:
    listening = await start(token=TOKEN)
    status, problem = await listening.post(body, token=TOKEN)
    assert status == 400, problem
    assert problem["status"] == 400
    assert listening.desk.taken == []
    assert listening.desk.turned_away == ["malformed"]


async def test_a_body_of_up_to_one_mebibyte_is_taken_and_a_larger_one_is_413(start: Callable[..., Any]) -> None:
    listening = await start(token=TOKEN)
    body = json.dumps(payload()).encode()
    assert (await listening.post(body.ljust(1024 * 1024), token=TOKEN))[0] == 200
    status, problem = await listening.post(body.ljust(1024 * 1024 + 1), token=TOKEN)
    assert (status, problem["status"]) == (413, 413)
    assert "1 MiB" in problem["detail"]
    assert len(listening.desk.taken) == 1
    assert listening.desk.turned_away == ["malformed"]


async def test_a_large_body_of_unknown_length_is_413_too(start: Callable[..., Any]) -> None:
    listening = await start(token=TOKEN)

    async def drip() -> AsyncIterator[bytes]:
        for _ in range(18):
            yield b" " * 65536

    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(listening._base + PATH, data=drip(), headers=headers) as response,
    ):
        assert response.status == 413


async def test_a_body_that_is_not_declared_json_is_415(start: Callable[..., Any]) -> None:
    listening = await start(token=TOKEN)
    assert (await listening.post(token=TOKEN, headers={"Content-Type": "text/plain"}))[0] == 415


async def test_credentials_are_asked_for_before_the_body_is_read(start: Callable[..., Any]) -> None:
    listening = await start(token=TOKEN)
    assert (await listening.post(b"{"))[0] == 401


# What the desk says


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotDurable("in force, not stored", status={"state": "KILLED"}), 503),
        (StorageError("no rules are loaded"), 503),
        (InvalidTransition("disabled"), 409),
    ],
)
async def test_what_could_not_be_stored_is_503_so_that_alertmanager_sends_again(
    start: Callable[..., Any], error: Exception, status: int
) -> None:
    listening = await start(token=TOKEN)
    listening.desk.error = error
    got, problem = await listening.post(token=TOKEN)
    assert (got, problem["status"]) == (status, status)
    if isinstance(error, NotDurable):
        assert (problem["state"], problem["durable"]) == ("KILLED", False)


async def test_the_webhook_is_described(start: Callable[..., Any]) -> None:
    listening = await start()
    async with (
        aiohttp.ClientSession() as session,
        session.get(listening._base + "/openapi.json") as response,
    ):
        described = await response.json()
    assert "post" in described["paths"][PATH]
    assert "WebhookQuestion" in described["components"]["schemas"]
