"""What Prometheus remembers: instants and ranges of the past, for backtests, checks of rule files and a restore.

Built on prometheus-api-client, whose defaults wait for ever and retry in silence; here every request has a deadline
and a limit, and a partial answer is an error. Synchronous: runs in a thread of its own or in a command. The library is
imported when a `History` is made, because the server seldom needs one and its import costs 6 MiB.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from sidecar.core.errors import SourceError
from sidecar.settings.http_config import HttpAccess, HttpConfig, HttpConfigError, split_userinfo
from sidecar.settings.promql import duration

if TYPE_CHECKING:
    import requests
    from prometheus_api_client import PrometheusConnect

MAX_BODY_BYTES: Final = 64 * 1024 * 1024
"""Largest answer that is read: a month of 200 series at 1 m is about half of it."""

_CHUNK_BYTES: Final = 64 * 1024
_NOT_SERVING_STATUS: Final = frozenset({502, 503, 504})
_INFO_PREFIX: Final = "PromQL info:"


class HistoryError(SourceError):
    """The past cannot be had.

    Attributes:
        reason: `unreachable`, `timeout`, `http_error`, `bad_response`, `query_error`, `wrong_type`, `too_large` or
            `partial`.
        message: for people; for a `query_error` Prometheus' own words, with the position it complains about.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One series at one moment; the moment is the evaluation's, in Unix seconds."""

    labels: Mapping[str, str]
    value: float
    timestamp: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeSeries:
    """One series over time: pairs of Unix seconds and value, in order; a step without a sample has no pair."""

    labels: Mapping[str, str]
    points: tuple[tuple[float, float], ...]


class History:
    """The past as one Prometheus has it. Not thread-safe.

    Args:
        url: base URL; user and password in it are sent as basic auth and never shown.
        timeout: seconds for each request as a whole, a dripping body included.
        headers: sent with each request.
        http: credentials and TLS, read once.

    Raises:
        HistoryError: credentials or certificates cannot be used.
    """

    def __init__(
        self, url: str, *, timeout: float, headers: Mapping[str, str] | None = None, http: HttpConfig | None = None
    ) -> None:
        self._url, userinfo = split_userinfo(url.rstrip("/"))
        self._timeout = timeout
        access = HttpAccess(http)
        try:
            access.refresh()
        except HttpConfigError as exc:
            raise HistoryError("unreachable", f"{self._url} was not asked: {exc}") from exc
        authorization = access.authorization or userinfo
        sent = {**(headers or {}), **({"Authorization": authorization} if authorization else {})}
        self._client = _connect(self._url, timeout, sent, access)

    def instant(self, query: str, at: datetime | None = None) -> list[Sample]:
        """Evaluate a query at one moment; None is the server's now.

        Raises:
            HistoryError: no whole answer, or the result is neither a vector nor a scalar.
        """
        params = {"timeout": duration(self._timeout), **({} if at is None else {"time": repr(at.timestamp())})}
        result = self._ask(lambda: self._client.custom_query(query, params=params))
        try:
            # A scalar comes as one bare pair of time and value.
            rows = [{"metric": {}, "value": result}] if _is_pair(result) else result
            return [_sample(row) for row in rows]
        except (KeyError, TypeError, ValueError) as exc:
            raise _unusable(self._url, "one value a series", exc) from exc

    def range(self, query: str, start: datetime, end: datetime, step: float) -> list[RangeSeries]:
        """Evaluate a query from `start` to `end`, both rounded to seconds, every `step` seconds.

        Raises:
            HistoryError: no whole answer, or the result is no matrix of numbers.
        """
        params = {"timeout": duration(self._timeout)}
        result = self._ask(lambda: self._client.custom_query_range(query, start, end, f"{step:g}", params=params))
        try:
            return [_range_series(row) for row in result]
        except (KeyError, TypeError, ValueError) as exc:
            raise _unusable(self._url, "a list of values a series", exc) from exc

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _ask(self, call: Any) -> Any:
        import requests
        from prometheus_api_client.exceptions import PrometheusApiClientException

        try:
            return call()
        except HistoryError:
            raise
        except requests.exceptions.Timeout as exc:
            raise _timeout(self._url, self._timeout) from exc
        except requests.exceptions.ConnectionError as exc:
            raise HistoryError("unreachable", f"{self._url} does not answer: {_innermost(exc)}") from exc
        except (requests.exceptions.RequestException, OSError) as exc:
            raise HistoryError("unreachable", f"{self._url}: {type(exc).__name__}") from exc
        except (PrometheusApiClientException, KeyError, TypeError, ValueError) as exc:
            raise HistoryError("bad_response", f"{self._url}: {type(exc).__name__}") from exc


def _connect(url: str, timeout: float, headers: Mapping[str, str], access: HttpAccess) -> "PrometheusConnect":
    from prometheus_api_client import PrometheusConnect
    from urllib3.util.retry import Retry

    session = _bounded_session(url, timeout)
    client = PrometheusConnect(
        url=url, headers=dict(headers), session=session, timeout=timeout, retry=Retry(total=0), method="GET"
    )
    # The library mounts an adapter of its own for this URL; ours replaces it.
    session.mount(url, _tls_adapter(access))
    return client


def _tls_adapter(access: HttpAccess) -> "requests.adapters.HTTPAdapter":
    from requests.adapters import HTTPAdapter
    from urllib3.util.retry import Retry

    class Adapter(HTTPAdapter):
        """Takes our TLS context and name instead of the library's bundle of authorities."""

        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            if access.tls is not None:
                kwargs["ssl_context"] = access.tls
            if access.server_name:
                kwargs.update(server_hostname=access.server_name, assert_hostname=access.server_name)
            super().init_poolmanager(*args, **kwargs)

        def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
            if access.tls is None:
                super().cert_verify(conn, url, verify, cert)

        def build_connection_pool_key_attributes(self, request: Any, verify: Any, cert: Any = None) -> Any:
            host, pool = super().build_connection_pool_key_attributes(request, verify, cert)
            if access.tls is not None:
                pool.clear()  # whom to trust stands in the context; the defaults would overrule it
            return host, pool

    # read=False keeps a read timeout what it is; with a count of 0 it would come as "too many retries".
    return Adapter(max_retries=Retry(total=0, read=False))


def _bounded_session(url: str, timeout: float) -> "requests.Session":
    import requests

    class Session(requests.Session):
        """Reads each body under a deadline and a limit, and refuses what the library would not look at."""

        def send(self, request: Any, **kwargs: Any) -> Any:
            deadline = time.monotonic() + timeout
            kwargs.update(stream=True, allow_redirects=False)
            response = super().send(request, **kwargs)
            try:
                body = _read(response.raw, url, deadline, timeout)
            finally:
                response.close()
            response._content = body  # noqa: SLF001 - requests has no public way to hand in a body that was read
            _refuse(response.status_code, body, url)
            return response

    session = Session()
    session.trust_env = False  # neither a proxy nor .netrc of the environment decides where history comes from
    session.headers["Accept-Encoding"] = "identity"
    return session


def _read(raw: Any, url: str, deadline: float, timeout: float) -> bytes:
    from urllib3.exceptions import HTTPError, ReadTimeoutError

    body = bytearray()
    try:
        while chunk := raw.read1(_CHUNK_BYTES):  # read1 returns what is there: a dripping body is seen dripping
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise HistoryError("too_large", f"{url}: the answer is larger than {MAX_BODY_BYTES} bytes")
            if time.monotonic() > deadline:
                raise _timeout(url, timeout)
    except ReadTimeoutError as exc:
        raise _timeout(url, timeout) from exc
    except (HTTPError, OSError) as exc:
        raise HistoryError("bad_response", f"{url}: the answer broke off: {type(exc).__name__}") from exc
    return bytes(body)


def _refuse(status: int, body: bytes, url: str) -> None:
    """Raise for all that is not a whole answer: the library drops warnings, and mixes up every kind of error."""
    envelope = _envelope(body)
    if envelope.get("status") == "error":
        raise _api_error(status, envelope, url)
    if status in _NOT_SERVING_STATUS:
        raise HistoryError("unreachable", f"{url}: HTTP {status}")
    if status != 200:
        raise HistoryError("http_error", f"{url}: HTTP {status}")
    if envelope.get("status") != "success":
        raise HistoryError("bad_response", f"{url}: answered something else than the JSON of a query API")
    if _result_type(envelope) == "string":  # it would pass for a number where it looks like one
        raise HistoryError("wrong_type", f"{url}: the result is a string; numbers were wanted")
    warnings = [text for text in map(str, envelope.get("warnings") or ()) if not text.startswith(_INFO_PREFIX)]
    if warnings:
        raise HistoryError("partial", f"{url}: the answer is not the whole one: {'; '.join(warnings)[:500]}")


def _envelope(body: bytes) -> Mapping[str, Any]:
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _result_type(envelope: Mapping[str, Any]) -> Any:
    data = envelope.get("data")
    return data.get("resultType") if isinstance(data, dict) else None


def _api_error(status: int, envelope: Mapping[str, Any], url: str) -> HistoryError:
    kind, text = str(envelope.get("errorType")), str(envelope.get("error"))
    if kind in ("timeout", "canceled"):
        return HistoryError("timeout", f"{url}: the server gave the query up: {text}")
    if status in (400, 422):
        return HistoryError("query_error", text)
    reason = "unreachable" if status in _NOT_SERVING_STATUS else "http_error"
    return HistoryError(reason, f"{url}: HTTP {status}: {kind}: {text}")


def _timeout(url: str, timeout: float) -> HistoryError:
    return HistoryError("timeout", f"{url}: no complete answer within {timeout:g} s")


def _unusable(url: str, wanted: str, exc: Exception) -> HistoryError:
    if isinstance(exc, KeyError) and exc.args in (("value",), ("values",)):
        return HistoryError("wrong_type", f"{url}: the result is no list of numbers; {wanted} was wanted")
    return HistoryError("bad_response", f"{url}: the result is not of the documented shape; {wanted} was wanted")


def _innermost(exc: BaseException) -> str:
    # requests wraps urllib3 wraps the system's error; only the last says what happened without a memory address.
    while exc.args and isinstance(exc.args[0], BaseException):
        exc = exc.args[0]
    reason = getattr(exc, "reason", exc)
    return type(reason).__name__


def _is_pair(result: Any) -> bool:
    return isinstance(result, list) and len(result) == 2 and isinstance(result[1], str)


def _sample(row: Any) -> Sample:
    moment, value = row["value"]
    return Sample(labels=dict(row["metric"]), value=float(value), timestamp=_finite(moment))


def _range_series(row: Any) -> RangeSeries:
    points = tuple((_finite(moment), float(value)) for moment, value in row["values"])
    return RangeSeries(labels=dict(row["metric"]), points=points)


def _finite(moment: Any) -> float:
    seconds = float(moment)
    if not math.isfinite(seconds):
        raise ValueError("a time that is not finite")
    return seconds
