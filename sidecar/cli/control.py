"""HTTP to the running sidecar over its Unix sockets, with the standard library: it must start fast and weigh little.

Knows no command. Tells apart what a person in an incident needs apart: nobody was asked, or nobody answered.
"""

import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

CONNECT_SECONDS: Final = 2.0
ANSWER_SECONDS: Final = 15.0
"""Longer than a kill may take to become durable (2 s) and an approval to be checked, on a starved machine."""

MAX_BODY_BYTES: Final = 16 * 1024 * 1024
"""The largest answer that is read: a thousand triggers, or an audit of many thousand lines."""


class Unreachable(Exception):  # noqa: N818 - reads as what happened
    """No usable answer came.

    Attributes:
        where: the socket or address.
        reason: what the system said.
        asked: False where the question cannot have reached anybody; True where it may have, with its effect.
    """

    def __init__(self, where: str, reason: str, *, asked: bool) -> None:
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason
        self.asked = asked


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """One HTTP answer; names of headers in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode("utf-8", "replace")

    def document(self) -> dict[str, Any]:
        """The body as a JSON object; empty where it is none."""
        try:
            parsed = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return parsed if isinstance(parsed, dict) else {}


class _UnixConnection(http.client.HTTPConnection):
    """An HTTP connection to a Unix socket; the host is a name that every `Host` check takes."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CONNECT_SECONDS)
        self._path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(CONNECT_SECONDS)
            sock.connect(self._path)
        except BaseException:
            sock.close()
            raise
        self.sock = sock


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """Where one sidecar answers: `socket` is a path, `url` an `http://host:port`; exactly one is set."""

    socket: str = ""
    url: str = ""

    @property
    def where(self) -> str:
        """The path or URL, for messages."""
        return self.socket or self.url

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: dict[str, str] | None = None,
        timeout: float = ANSWER_SECONDS,
    ) -> Reply:
        """Ask one question; `body` is sent as JSON unless it is None.

        Raises:
            Unreachable: there was no whole answer.
        """
        connection = self._connection()
        try:
            connection.connect()
        except (OSError, ValueError) as error:
            connection.close()
            raise Unreachable(self.where, _reason(error), asked=False) from None
        try:
            return _exchange(connection, method, path, body, headers or {}, timeout)
        except TimeoutError:
            raise Unreachable(self.where, f"no answer within {timeout:g} s", asked=True) from None
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(self.where, _reason(error), asked=True) from None
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self.socket:
            return _UnixConnection(self.socket)
        try:
            parts = urlsplit(self.url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise Unreachable(self.where, str(error), asked=False) from None
        if parts.scheme != "http" or not host:
            raise Unreachable(self.where, "wanted http://host:port", asked=False)
        return http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)


def _exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: object,
    headers: dict[str, str],
    timeout: float,
) -> Reply:
    connection.sock.settimeout(timeout)
    payload = None if body is None else json.dumps(body).encode("utf-8")
    kind = {} if payload is None else {"Content-Type": "application/json"}
    connection.request(method, path, body=payload, headers={"Accept": "application/json", **kind, **headers})
    response = connection.getresponse()
    content = response.read(MAX_BODY_BYTES + 1)
    if len(content) > MAX_BODY_BYTES:
        raise http.client.HTTPException(f"the answer is larger than {MAX_BODY_BYTES} bytes")
    return Reply(
        status=response.status,
        headers={name.lower(): value for name, value in response.getheaders()},
        body=content,
    )


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"cannot be connected within {CONNECT_SECONDS:g} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
