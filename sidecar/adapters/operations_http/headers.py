"""The headers of every answer: what browsers are told, in one place, for the page, the API and every error.

Nothing here allows another site anything: there is no CORS header, and that is on purpose.
"""

from collections.abc import Mapping
from typing import Final

from multidict import CIMultiDict

PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""For HTML: scripts and styles from files of our own, nothing inline, nothing from elsewhere, in nobody's frame."""

DATA_POLICY: Final = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""For everything else, should a browser ever show it as a document."""

ALWAYS: Final[Mapping[str, str]] = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Server": "killswitch",  # and not the versions of what it is built of
}

_POLICY: Final = "Content-Security-Policy"


def dress(headers: CIMultiDict[str], further: Mapping[str, str]) -> None:
    """Put on an answer's headers what every answer has; may be done twice.

    Args:
        headers: of the answer, with its Content-Type.
        further: what the configuration adds. A policy of its own stands beside ours, and browsers obey both.
    """
    headers.update(ALWAYS)
    is_page = headers.get("Content-Type", "").startswith("text/html")
    headers[_POLICY] = PAGE_POLICY if is_page else DATA_POLICY
    for name, value in further.items():
        if name == _POLICY:
            headers.add(name, value)
        elif name not in ALWAYS:
            headers[name] = value
