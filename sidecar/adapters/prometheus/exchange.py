"""One request to the query API of one Prometheus, bounded in time and size, and every way it can go wrong named.

A foreign exception, a login page or half an answer ends here as a `Failure` with a reason out of a closed set. Knows
nothing of batches: text in, the decoded envelope out.
"""

import asyncio
import base64
import json
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import aiohttp

from sidecar.adapters.prometheus.batch import Envelope
from sidecar.rules.readings import Failure
from sidecar.settings.http_config import HttpAccess, HttpConfig, HttpConfigError, split_userinfo

MAX_BODY_BYTES: Final = 16 * 1024 * 1024
"""Largest answer that is read: a thousand rules need a hundredth of it, and the container's memory is small."""

MAX_ERROR_BYTES: Final = 64 * 1024
"""Largest body that is read of an HTTP error: Prometheus' own are a line of JSON."""

INLINE_DECODE_BYTES: Final = 64 * 1024
"""Larger answers are decoded in a thread: this much takes about 1 ms, and the loop also answers the gate."""

_CHUNK_BYTES: Final = 64 * 1024
_MESSAGE_CHARACTERS: Final = 500
_SHORTEST_SECRET: Final = 4  # a shorter one is no secret, and would blot out half the message
_SERVER_SHARE_OF_TIME: Final = 0.9  # the server should give up, and say so, just before we do
_QUERY_ERROR_STATUS: Final = frozenset({400, 422})
_NOT_SERVING_STATUS: Final = frozenset({502, 503, 504})
_INFO_PREFIX: Final = "PromQL info:"

QUERY_FAULTS: Final = frozenset({"query_error", "wrong_type", "too_large"})
"""Reasons that lie in the query: another server would answer the same, and other queries may do better."""


def is_final(outcome: Envelope | Failure) -> bool:
    """Whether asking another server is pointless: there is an answer, or the query itself is at fault."""
    if isinstance(outcome, Envelope):
        return True
    return outcome.reason in QUERY_FAULTS or (outcome.reason == "timeout" and not outcome.unreachable)


T = TypeVar("T")


class Endpoint:
    """One server: its address, credentials and TLS."""

    def __init__(self, url: str, *, headers: Mapping[str, str], http: HttpConfig | None) -> None:
        clean, userinfo = split_userinfo(url)
        self.name = clean
        self._url = clean.rstrip("/") + "/api/v1/query"
        self._headers = {**headers, "Accept": "application/json", "Accept-Encoding": "identity"}
        self._own_headers = tuple(headers.values())
        self._userinfo = userinfo
        self._access = HttpAccess(http)
        self._refreshing = asyncio.Lock()

    async def ask(
        self,
        session: aiohttp.ClientSession,
        query: str,
        *,
        deadline: float,
        at: float | None = None,
        wanted: str = "vector",
    ) -> Envelope | Failure:
        """Ask one query; the whole exchange ends at the loop time `deadline`.

        `at` is the moment to evaluate it at, Unix seconds, None the server's now; `wanted` is the type of the result,
        `vector` or `matrix`.

        A dropped connection is tried once more: the usual cause is a kept-alive one that the server had just closed,
        and a query changes nothing, so asking twice is safe.
        """
        form = {"query": query} if at is None else {"query": query, "time": f"{at:.3f}"}
        try:
            async with asyncio.timeout_at(deadline):
                await self._refresh()
                try:
                    return await self._exchange(session, form, deadline, wanted)
                except aiohttp.ClientConnectorError:
                    raise
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError):
                    return await self._exchange(session, form, deadline, wanted)
        except TimeoutError:
            return self._unreachable("no complete answer in time", reason="timeout")
        except HttpConfigError as exc:
            return self._unreachable(f"was not asked: {exc}")
        except aiohttp.ClientPayloadError as exc:
            return self._failed("bad_response", f"the answer broke off: {exc}")
        except (aiohttp.ClientResponseError, aiohttp.InvalidURL) as exc:
            return self._failed("bad_response", f"the answer is not HTTP: {type(exc).__name__}")
        except (aiohttp.ClientError, OSError, ValueError) as exc:  # ValueError: a host name that cannot be encoded
            return self._unreachable(str(exc) or type(exc).__name__)

    async def _refresh(self) -> None:
        if not self._access.changed():
            return
        async with self._refreshing:  # many requests start together; one of them reads the files
            if self._access.changed():
                await asyncio.to_thread(self._access.refresh)

    async def _exchange(
        self, session: aiohttp.ClientSession, asked: Mapping[str, str], deadline: float, wanted: str
    ) -> Envelope | Failure:
        left = max(deadline - asyncio.get_running_loop().time(), 0.0)
        form = {**asked, "timeout": f"{max(round(left * _SERVER_SHARE_OF_TIME * 1000), 1)}ms"}
        authorization = self._access.authorization or self._userinfo
        async with session.post(
            self._url,
            data=form,
            headers={**self._headers, "Authorization": authorization} if authorization else self._headers,
            ssl=self._access.tls or True,
            server_hostname=self._access.server_name,
            allow_redirects=False,  # a redirected query is a login page, or somebody else's server
        ) as response:
            body = await _read(response, MAX_BODY_BYTES if response.status == 200 else MAX_ERROR_BYTES)
            if body is None and response.status == 200:
                return self._failed("too_large", f"the answer is larger than {MAX_BODY_BYTES} bytes; narrow the query")
            if response.headers.get("Content-Encoding", "identity") != "identity":
                return self._failed("bad_response", "the answer is compressed, which was not asked for")
            return self._judge(response, await _decoded(body or b""), wanted)

    def _judge(self, response: aiohttp.ClientResponse, body: Any, wanted: str) -> Envelope | Failure:
        if isinstance(body, dict) and body.get("status") == "error":
            return self._api_error(response.status, body)
        if response.status != 200:
            return self._http_error(response.status)
        if not isinstance(body, dict) or body.get("status") != "success":
            answered = self._quoted(response.content_type)
            return self._failed("bad_response", f"answered {answered}, not the JSON of a query API")
        data = body.get("data")
        if not isinstance(data, dict) or not isinstance(data.get("result"), list):
            return self._failed("bad_response", "the JSON has no data.result")
        if data.get("resultType") != wanted:
            found = self._quoted(repr(data.get("resultType")))
            return self._failed("wrong_type", f"the result is a {found}; a {wanted} was wanted")
        return Envelope(result=data["result"], warnings=self._warnings(body.get("warnings")))

    def _api_error(self, status: int, body: Mapping[str, Any]) -> Failure:
        kind, text = self._quoted(body.get("errorType")), self._quoted(body.get("error"))
        if kind in ("timeout", "canceled"):
            return self._failed("timeout", f"the server gave the query up: {text}")
        if status in _QUERY_ERROR_STATUS:
            return self._failed("query_error", f"{kind}: {text}")
        if status in _NOT_SERVING_STATUS:
            return self._unreachable(f"HTTP {status}: {text}")
        return self._failed("http_error", f"HTTP {status}: {kind}: {text}")

    def _warnings(self, seen: Any) -> tuple[str, ...]:
        # Prometheus 2.48 to 2.55 put remarks on style among the warnings; later versions keep them apart as `infos`.
        if not seen:
            return ()
        texts = [self._quoted(one) for one in (seen if isinstance(seen, list) else [seen])]
        return tuple(text for text in texts if not text.startswith(_INFO_PREFIX))

    def _quoted(self, text: object) -> str:
        """What a server said, cut short, without the secrets that it was sent: some proxies repeat them in errors."""
        told = str(text)
        for secret in self._secrets():
            told = told.replace(secret, "…")
        return _short(told)

    def _secrets(self) -> list[str]:
        authorization = self._access.authorization or self._userinfo or ""
        scheme, _, credentials = authorization.partition(" ")
        found = {authorization, credentials, *self._own_headers}
        if scheme == "Basic":
            found.add(base64.b64decode(credentials).decode().partition(":")[2])
        return sorted((secret for secret in found if len(secret) >= _SHORTEST_SECRET), key=len, reverse=True)

    def _http_error(self, status: int) -> Failure:
        if status in _NOT_SERVING_STATUS:
            return self._unreachable(f"HTTP {status}")
        if status == 413:
            return self._failed("too_large", "HTTP 413: something on the way takes no request of this size")
        hint = " (a redirect is not followed)" if 300 <= status < 400 else ""
        return self._failed("http_error", f"HTTP {status}{hint}")

    def _failed(self, reason: str, message: str) -> Failure:
        return Failure(reason=reason, message=f"{self.name}: {message}", unreachable=False)

    def _unreachable(self, message: str, *, reason: str = "unreachable") -> Failure:
        return Failure(reason=reason, message=f"{self.name}: {message}", unreachable=True)


async def off_the_loop(size: int, work: Callable[[], T]) -> T:
    """Do the work at once where the body is small, and in a thread where it would hold up the gate."""
    return work() if size <= INLINE_DECODE_BYTES else await asyncio.to_thread(work)


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes | None:
    """Read the body; None as soon as it is longer than the limit, and the connection is dropped."""
    body = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
        body += chunk
        if len(body) > limit:
            response.close()
            return None
    return bytes(body)


async def _decoded(body: bytes) -> Any:
    # The hook does nothing, but it is Python: without it the decoder never lets go of the interpreter, and a thread
    # would hold up the loop as if it ran there. On the loop it would only cost time.
    hook: Callable[[Any], Any] | None = None if len(body) <= INLINE_DECODE_BYTES else lambda parsed: parsed

    def decode() -> Any:
        try:
            return json.loads(body, object_hook=hook)
        except (ValueError, RecursionError):
            return None

    return await off_the_loop(len(body), decode)


def _short(text: str) -> str:
    return text if len(text) <= _MESSAGE_CHARACTERS else text[:_MESSAGE_CHARACTERS] + "…"
