"""Commands that change the running switch: trigger, recover, approve, cancel-recovery.

Each prints the state that the sidecar reports afterwards and succeeds only where that is what was asked for. Messages
say first what did not happen: somebody may be about to trust that trading is blocked.
"""

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import click

from sidecar.cli.codes import read_code, stdin_is_terminal
from sidecar.cli.context import Command, Context, examples, pass_context
from sidecar.cli.control import Reply, Unreachable
from sidecar.cli.outcomes import Failure, refused, unreachable
from sidecar.cli.status import banner, print_status, recovery_lines, status_document
from sidecar.cli.tables import print_body
from sidecar.cli.words import one_line

_NOTHING: Final = "NOTHING was blocked."
_UNKNOWN: Final = "It is NOT KNOWN whether trading is blocked: ask `killswitch status`."
_NOT_DURABLE: Final = "blocked, NOT durable"
_CLIENT_ERRORS: Final = range(400, 500)
_WAIVER: Final = re.compile(
    r"(?P<trigger>[^=]+?)(?:=(?P<threshold>[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?))?"
    r":(?P<until>(?:[0-9]+(?:ms|[smhdw]))+|[0-9]{4}-[0-9]{2}-[0-9]{2}T.+)"
)


def _not_blank(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise click.BadParameter("must not be empty")
    return value


def _waivers(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> list[dict[str, Any]]:
    return [_waiver(value) for value in values]


def _waiver(value: str) -> dict[str, Any]:
    match = _WAIVER.fullmatch(value)
    if match is None:
        raise click.BadParameter(f"{value!r} is not TRIGGER:24h or TRIGGER=THRESHOLD:24h (or an RFC 3339 time)")
    waiver: dict[str, Any] = {"trigger": match["trigger"].strip(), "until": match["until"]}
    if match["threshold"] is not None:
        try:
            threshold = float(match["threshold"])
        except ValueError:
            threshold = math.nan
        if not math.isfinite(threshold):
            raise click.BadParameter(f"{match['threshold']!r} is not a number")
        waiver["threshold"] = threshold
    return waiver


_code_stdin = click.option(
    "--code-stdin", is_flag=True, help="Read the code from standard input (always so without a terminal)."
)


@click.command(
    cls=Command,
    epilog=examples(
        'killswitch trigger --reason "fat finger in AAPL" --by alice',
        'killswitch trigger --reason "flatten only" --restriction reduce_only --confirm',
        'kubectl exec trader-0 -c killswitch -- killswitch trigger --reason "venue is down" --confirm',
    ),
)
@click.option("--reason", required=True, callback=_not_blank, help="Why; it goes into the audit.")
@click.option("--by", metavar="NAME", callback=_not_blank, help="Who you are; recorded as a claim.")
@click.option(
    "--restriction",
    type=click.Choice(["halt", "reduce_only"]),
    help="Deny everything but cancels, or let exits pass that truly reduce.  [default: gate.killed_policy]",
)
@click.option("--confirm", is_flag=True, help="Do not ask; needed where there is no terminal.")
@pass_context
def trigger(context: Context, *, reason: str, by: str | None, restriction: str | None, confirm: bool) -> None:
    """Block trading now, until an approved recovery.

    Asks before it acts; without a terminal it needs --confirm. Succeeds only when the sidecar reports that the gate is
    closed and the state is on disk. Cancels always pass.
    """
    if not confirm:
        _confirm(context)
    asked = {"reason": reason, "by": by, "restriction": restriction}
    body = {key: value for key, value in asked.items() if value is not None}
    try:
        reply = context.control().ask("POST", "/api/v1/trigger", body)
    except Unreachable as error:
        raise unreachable(error, effect=_UNKNOWN if error.asked else _nothing_and_now()) from None
    if reply.status == 503 and reply.document().get("durable") is False:
        _in_force_not_durable(context, reply)
    if not reply.ok:
        if context.as_json:
            print_body(reply)
        raise refused(reply, effect=_NOTHING if reply.status in _CLIENT_ERRORS else _UNKNOWN)
    document = _show(context, reply)
    if document.get("state") != "KILLED":
        raise Failure(f"The sidecar answered, but reports {one_line(document.get('state'))}. {_UNKNOWN}")
    if document.get("durable") is False:
        raise Failure(f"{_NOT_DURABLE}: the kill is in force, but a restart may forget it; writing is tried again.")


def _nothing_and_now() -> str:
    return (
        f"{_NOTHING} Code that asks the gate denies by itself while no sidecar runs; to be sure that trading stops, "
        "stop the trading process."
    )


def _confirm(context: Context) -> None:
    if not stdin_is_terminal():
        raise click.UsageError(f"There is no terminal to ask on: add --confirm. {_NOTHING}")
    reply = context.ask("GET", "/api/v1/status", effect=_nothing_and_now())
    name = one_line(reply.document().get("switch") or f"the sidecar on {context.control().where}")
    if not click.confirm(f"Block trading of {name} now?", err=True):
        raise Failure(_NOTHING)


def _in_force_not_durable(context: Context, reply: Reply) -> None:
    """The kill holds, but a restart might forget it: the one answer that is neither success nor nothing."""
    problem = reply.document()
    if context.as_json:
        print_body(reply)
    else:
        state = one_line(problem.get("state") or "KILLED")
        click.echo(f"{_NOT_DURABLE}: {state} is in force now, but it is not on disk; writing is tried again.")
    raise Failure(
        "\n".join(
            [
                f"{_NOT_DURABLE}: {one_line(problem.get('detail') or problem.get('title') or 'no reason given')}",
                "Free the disk of the state folder and check `killswitch status` before this pod restarts.",
            ]
        )
    )


@click.command(
    cls=Command,
    epilog=examples(
        'killswitch recover --reason "feed is back" --by bob',
        'killswitch recover --reason "limit raised by risk" --by bob --waive portfolio_drawdown=-0.20:24h',
        "kubectl exec -i trader-0 -c killswitch -- killswitch recover --reason ok --by bob < code.txt",
    ),
)
@click.option("--reason", required=True, callback=_not_blank, help="Why it is safe; it goes into the audit.")
@click.option("--by", metavar="NAME", required=True, callback=_not_blank, help="The approver whose code it is.")
@click.option(
    "--waive",
    metavar="TRIGGER[=THRESHOLD]:UNTIL",
    multiple=True,
    callback=_waivers,
    help="Let this rule go on firing until then (24h, or an RFC 3339 time), or give it another threshold.",
)
@_code_stdin
@pass_context
def recover(context: Context, *, reason: str, by: str, waive: list[dict[str, Any]], code_stdin: bool) -> None:  # noqa: ARG001
    """Ask for trading to start again; your approval code is the first approval.

    The code is prompted for, or is one line of standard input. After the last approval the sidecar checks triggers and
    health, waits for the cooldown and comes back in steps.
    """
    code = _code_of(context, by)
    body: dict[str, Any] = {"reason": reason, "by": by, "code": code}
    if waive:
        body["waive"] = waive
    _change(context, "POST", "/api/v1/recovery", body)


@click.command(cls=Command, epilog=examples("killswitch approve --by carol"))
@click.option("--by", metavar="NAME", required=True, callback=_not_blank, help="The approver whose code it is.")
@_code_stdin
@pass_context
def approve(context: Context, *, by: str, code_stdin: bool) -> None:  # noqa: ARG001
    """Add your approval to the recovery that waits for it."""
    _change(context, "POST", "/api/v1/recovery/approvals", {"by": by, "code": _code_of(context, by)})


@click.command(
    "cancel-recovery",
    cls=Command,
    epilog=examples('killswitch cancel-recovery --by alice --reason "the feed dropped again"'),
)
@click.option("--by", metavar="NAME", callback=_not_blank, help="Who you are; recorded as a claim.")
@click.option("--reason", callback=_not_blank, help="Why; it goes into the audit.")
@pass_context
def cancel_recovery(context: Context, *, by: str | None, reason: str | None) -> None:
    """Take a recovery back: all approvals are void and trading stays blocked."""
    body = {key: value for key, value in {"by": by, "reason": reason}.items() if value is not None}
    _change(context, "DELETE", "/api/v1/recovery", body or None)


def _code_of(context: Context, by: str) -> str:
    prompt = f"Approval code of {one_line(by)}"
    if stdin_is_terminal():
        # Whoever types a code should see what it releases, and not type it in vain.
        reply = context.ask("GET", "/api/v1/status", effect="Nothing was released.")
        document = reply.document()
        if reply.ok and document.get("switch"):
            click.echo(f"{one_line(document['switch'])}: {banner(document)[0]}", err=True)
            for _, text in recovery_lines(document, datetime.now(UTC)):
                click.echo(f"  {text}", err=True)
            prompt += f" for {one_line(document['switch'])}"
    return read_code(prompt)


def _change(context: Context, method: str, path: str, body: object) -> None:
    try:
        reply = context.control().ask(method, path, body)
    except Unreachable as error:
        effect = (
            "It is NOT KNOWN whether this took effect: ask `killswitch status`." if error.asked else "Nothing changed."
        )
        raise unreachable(error, effect=effect) from None
    if not reply.ok:
        if context.as_json:
            print_body(reply)
        raise refused(reply)
    document = _show(context, reply)
    if document.get("durable") is False:
        raise Failure("This is in force, but NOT durable: a restart may forget it; writing is tried again.")


def _show(context: Context, reply: Reply) -> Mapping[str, Any]:
    document = status_document(reply.document())
    if context.as_json:
        print_body(reply)
    else:
        print_status(document, command=context.command, now=datetime.now(UTC))
    return document
