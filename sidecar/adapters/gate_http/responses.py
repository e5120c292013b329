"""The HTTP/1.1 text around an answer: status line and headers, with values that cannot break out of their line."""

_PHRASES = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Content Too Large",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
}
JSON = "application/json"
PROBLEM_JSON = "application/problem+json"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def header_value(text: str) -> str:
    """Make a text fit for a header: latin-1, no control characters, so that no name can add a header of its own."""
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return printable.encode("latin-1", "replace").decode("latin-1").strip()


def response_head(
    status: int, length: int, *, close: bool, content_type: str, headers: tuple[tuple[str, str], ...] = ()
) -> bytes:
    """Write status line and headers, without the empty line that ends them."""
    lines = [
        f"HTTP/1.1 {status} {_PHRASES[status]}",
        f"Content-Type: {content_type}",
        f"Content-Length: {length}",
        "Cache-Control: no-store",
        # Said in both cases: a client that speaks HTTP/1.0 would close without it.
        f"Connection: {'close' if close else 'keep-alive'}",
        *(f"{name}: {header_value(value)}" for name, value in headers),
    ]
    return "\r\n".join(lines).encode("latin-1")


def response(
    status: int,
    body: bytes,
    *,
    close: bool,
    head: bool = False,
    content_type: str = JSON,
    headers: tuple[tuple[str, str], ...] = (),
) -> bytes:
    """Write a whole response; `head` leaves the body out and keeps its length, as HEAD wants it."""
    start = response_head(status, len(body), close=close, content_type=content_type, headers=headers)
    return start + b"\r\n\r\n" + (b"" if head else body)
