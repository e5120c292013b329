"""Approval codes on their way in: one prompt or one line of standard input, never an argument, never the environment.

Whoever may `kubectl exec` inherits the container's environment, and arguments stand in the process list; a code found
there would prove nothing about a person.
"""

import json
import secrets
import sys

import click

from sidecar.cli.context import Command, Context, examples, pass_context


def stdin_is_terminal() -> bool:
    """Whether a person can be asked."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_code(prompt: str, *, twice: bool = False) -> str:
    """Read a code: from the terminal without showing it, else one line of standard input, read once.

    Raises:
        click.UsageError: it is empty, or no code could look like it.
    """
    code = _prompted(prompt, twice=twice) if stdin_is_terminal() else _first_line()
    from sidecar.adapters.approvers import checked_code

    try:
        return checked_code(code)
    except ValueError as error:
        hint = "" if code else ": type it at the prompt, or pass one line on standard input"
        raise click.UsageError(f"{error}{hint}.") from None


def _prompted(prompt: str, *, twice: bool) -> str:
    import getpass

    code = getpass.getpass(f"{prompt}: ")
    if twice and getpass.getpass(f"{prompt}, again: ") != code:
        raise click.UsageError("The two codes differ.")
    return code


def _first_line() -> str:
    if sys.stdin is None:
        return ""
    # A bound, for a file that was piped in by mistake; what is cut is too long for a code in any case.
    raw = sys.stdin.buffer.readline(8192).removesuffix(b"\n").removesuffix(b"\r")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise click.UsageError("The approval code on standard input is not UTF-8.") from None


@click.command(
    "hash-code",
    cls=Command,
    epilog=examples("killswitch hash-code", "killswitch hash-code < code.txt", "killswitch hash-code --token"),
)
@click.option("--token", is_flag=True, help="Make a random API token instead; print it and its hash.")
@click.option("--code-stdin", is_flag=True, help="Read the code from standard input (always so without a terminal).")
@pass_context
def hash_code(context: Context, *, token: bool, code_stdin: bool) -> None:  # noqa: ARG001 - see read_code
    """Hash an approval code for the approvers file, or make an API token for the tokens file.

    The hash is the last line. The code is asked for twice on a terminal; otherwise it is one line of standard input.
    """
    if token:
        _print_token(as_json=context.as_json)
        return
    code = read_code("Approval code", twice=True)
    from sidecar.adapters.approvers import hash_code as hashed

    text = hashed(code)
    click.echo(json.dumps({"code_hash": text}) if context.as_json else text)


def _print_token(*, as_json: bool) -> None:
    import hashlib

    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode("ascii")).hexdigest()
    if as_json:
        click.echo(json.dumps({"token": token, "sha256": digest}))
        return
    click.echo("Token, for whoever calls the API; it is shown only now:")
    click.echo(token)
    click.echo("Its sha256, for the tokens file:")
    click.echo(digest)
