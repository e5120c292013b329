"""How a command ends: the exit codes that scripts rely on, and the failures that carry them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import IO, Any

import click

from sidecar.cli.control import Reply, Unreachable
from sidecar.cli.words import duration_text, one_line


class Exit(IntEnum):
    """What a script may rely on."""

    DONE = 0
    ERROR = 1
    USAGE = 2
    BLOCKED = 3
    REFUSED = 4


REFUSALS = frozenset({401, 403, 409, 429})
"""HTTP answers that mean: understood, and no."""


class Failure(click.ClickException):
    """The command did not do what it was asked; the message is for people, on standard error."""

    def __init__(self, message: str, code: Exit = Exit.ERROR) -> None:
        super().__init__(message)
        self.code = code

    @property
    def exit_code(self) -> int:  # type: ignore[override]  # click has it as an attribute of the class
        """What the process ends with."""
        return int(self.code)

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message as it is: it says itself what went wrong."""
        click.echo(self.format_message(), file=file, err=file is None)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Print as far as somebody reads: behind `| head` the exit code still is the command's own."""
    try:
        yield
    except BrokenPipeError:
        # What is still buffered would fail once more when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def unreachable(error: Unreachable, *, effect: str = "") -> Failure:
    """Say that no sidecar answered, where, and what to do; `effect` says first what did not happen."""
    lines = [effect] if effect else []
    lines.append(f"No answer from the sidecar on {error.where}: {error.reason}.")
    if not error.asked:
        lines.append(
            "Is it running? In Kubernetes: kubectl exec POD -c killswitch -- killswitch … ; "
            "elsewhere name its control socket with --socket or KILLSWITCH_SOCKET."
        )
    return Failure("\n".join(lines))


def refused(reply: Reply, *, effect: str = "") -> Failure:
    """Hand on what the sidecar said to a question that it did not answer with 2xx, word for word."""
    code = Exit.REFUSED if reply.status in REFUSALS else Exit.ERROR
    verb = "Refused" if code is Exit.REFUSED else "Failed"
    lines = [effect] if effect else []
    lines.extend(_problem_lines(reply, verb))
    return Failure("\n".join(lines), code)


def _problem_lines(reply: Reply, verb: str) -> list[str]:
    problem = reply.document()
    title, detail = (one_line(problem.get(key) or "") for key in ("title", "detail"))
    if not title and not detail:
        title = one_line(reply.text[:500]) or "the answer is empty"
    lines = [f"{verb} ({reply.status}): {title or detail}"]
    if detail and title and detail != title:
        lines.append(detail)
    for key in ("blockers", "problems"):
        items = problem.get(key)
        lines.extend(f"  - {one_line(item)}" for item in items if item) if isinstance(items, list) else None
    wait = reply.headers.get("retry-after", "")
    if wait.isdigit():
        lines.append(f"Try again in {duration_text(int(wait))}.")
    return lines
