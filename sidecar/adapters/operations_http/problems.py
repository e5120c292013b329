"""Errors as problem documents (RFC 9457): what each exception means in HTTP, and nothing that a caller should not see.

The one place where the project's error tree meets status codes.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from math import ceil
from types import MappingProxyType
from typing import Any

from aiohttp import web
from multidict import CIMultiDict

from sidecar.adapters.operations_http.headers import dress
from sidecar.core.errors import (
    ApprovalError,
    InvalidTransition,
    LockedOut,
    NotDurable,
    RecoveryBlocked,
    RuleFileError,
    SettingsError,
    StorageError,
)

log = logging.getLogger("sidecar.operations")

_SHOWN_WITH_NOT_DURABLE = ("switch", "state", "restriction", "position_limit_factor", "epoch")


class Problem(Exception):  # noqa: N818 - the RFC's own word
    """A request that is answered with a problem document.

    Attributes:
        status: HTTP status code.
        detail: one sentence for a person: what was seen, what was wanted, what to do.
        headers: further headers of the answer; a list of pairs where one occurs twice.
        extra: further members of the document.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
        extra: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = CIMultiDict(headers)
        self.extra = dict(extra or {})

    def response(self, further: Mapping[str, str] = MappingProxyType({})) -> web.Response:
        """The answer to send, with these headers of the configuration beside those that every answer has."""
        document = {
            **self.extra,
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
        }
        response = web.Response(
            status=self.status,
            body=json.dumps(document).encode(),
            content_type="application/problem+json",
            headers=self.headers,
        )
        dress(response.headers, further)
        return response


def problem_of(error: Exception, status: Callable[[], Mapping[str, Any]]) -> Problem:
    """Say what an exception means to the caller; what is nobody's doing is logged and becomes a bare 500.

    Args:
        error: what was raised while answering.
        status: asks for the switch's status, where the error needs it and does not bring it.
    """
    match error:
        case Problem():
            return error
        case web.HTTPException():
            return problem_of_http(error)
        case NotDurable():
            return _of_not_durable(error, status)
        case SettingsError() | RuleFileError():
            return _of_files(error)
    return _of_refusal(error) or _unexpected(error)


def _of_refusal(error: Exception) -> Problem | None:
    match error:
        case RecoveryBlocked():
            return Problem(409, str(error), extra={"blockers": list(error.blockers)})
        case InvalidTransition():
            return Problem(409, str(error))
        case LockedOut():
            return Problem(429, str(error), headers={"Retry-After": str(max(1, ceil(error.retry_after)))})
        case ApprovalError():
            return Problem(403, str(error))
        case StorageError():
            return Problem(503, str(error))
        case TimeoutError():
            return Problem(503, "the answer took too long; look at the status before asking again")
        case ValueError():
            return Problem(400, str(error))
    return None


def _unexpected(error: Exception) -> Problem:
    log.error("operations.request_failed", exc_info=error)
    return Problem(500, "an internal error; the log has the details")


def problem_of_http(error: web.HTTPException) -> Problem:
    """Say what the library refused."""
    headers = {name: error.headers[name] for name in ("Allow",) if name in error.headers}
    match error:
        case web.HTTPNotFound():
            detail = "there is nothing at this path; docs/API.md lists what there is"
        case web.HTTPMethodNotAllowed():
            detail = f"{error.method} is not possible here; {', '.join(sorted(error.allowed_methods))} is"
        case web.HTTPRequestEntityTooLarge():
            detail = "the body is larger than 64 KiB"
        case _:
            detail = error.reason
    return Problem(error.status, detail, headers=headers)


def _of_not_durable(error: NotDurable, status: Callable[[], Mapping[str, Any]]) -> Problem:
    seen = error.status or status()
    shown = {name: seen[name] for name in _SHOWN_WITH_NOT_DURABLE if name in seen}
    return Problem(503, str(error), extra={**shown, "durable": False})


def _of_files(error: Exception) -> Problem:
    found = getattr(error, "problems", None) or str(error).splitlines()
    problems = [str(problem) for problem in found]
    return Problem(400, f"the old configuration stays in force: {error}", extra={"problems": problems})
