"""`killswitch check`: what the gate would answer, asked of the gate itself as trading code asks it.

Goes to the gate's own socket or address and needs no control socket: it shows what an order would really meet.
"""

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Final

import click

from sidecar.cli.context import Command, Context, examples, pass_context
from sidecar.cli.control import Reply, Server, Unreachable
from sidecar.cli.outcomes import Exit, Failure, reader_may_leave
from sidecar.cli.tables import print_body
from sidecar.cli.words import number_text, one_line

GATE_SECONDS: Final = 5.0
"""A gate that takes longer is no gate; trading code gives up after a tenth of a second."""

_HEADERS: Final = "x-killswitch-"


def _decimal(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    try:
        finite = Decimal(value).is_finite()
    except InvalidOperation:
        finite = False
    if not finite:
        raise click.BadParameter(f"{value!r} is not a number")
    return value


@click.command(
    cls=Command,
    epilog=examples(
        "killswitch check",
        "killswitch check --symbol AAPL --side sell --quantity 100 --position 250",
        "killswitch check --intent cancel",
        "killswitch check --gate http://127.0.0.1:9780",
    ),
)
@click.option("--intent", type=click.Choice(["new", "replace", "cancel"]), help="What the order does.  [default: new]")
@click.option("--symbol", help="Instrument.")
@click.option("--side", type=click.Choice(["buy", "sell"]))
@click.option("--quantity", callback=_decimal, help="Size; of a replace the new total.")
@click.option("--position", callback=_decimal, help="Signed position now.")
@click.option("--open-quantity", callback=_decimal, help="Working orders on the same side, without the one replaced.")
@click.option(
    "--position-limit", callback=_decimal, help="Your own limit; the smaller of it and the configured one holds."
)
@click.option("--reduce-only", is_flag=True, help="Mark the order as reduce-only.")
@click.option("--gate-socket", metavar="PATH", help="Socket of the gate.  [default: gate.socket of the configuration]")
@click.option("--gate", "gate_url", metavar="URL", help="Address of the gate instead, http://127.0.0.1:9780.")
@pass_context
def check(context: Context, gate_socket: str | None, gate_url: str | None, **order: Any) -> None:
    """Ask the gate whether an order may go out.

    Without options about an order it asks for a new one of unknown size, as /gate does. Ends with 0 if allowed, 3 if
    denied, 1 if the gate does not answer. Cancels always pass, also when nobody answers.
    """
    if gate_socket and gate_url:
        raise click.UsageError("--gate-socket and --gate exclude each other.")
    server = Server(socket=gate_socket) if gate_socket else Server(url=gate_url) if gate_url else context.gate()
    asked = {key: value for key, value in order.items() if value not in (None, False)}
    try:
        reply = _ask(server, asked)
    except Unreachable as error:
        _gate_is_silent(error, asked)
        return
    decision = _decision(reply)
    with reader_may_leave():
        if context.as_json:
            print_body(reply)
        else:
            _print_decision(decision)
    raise SystemExit(Exit.DONE if decision["decision"] == "allow" else Exit.BLOCKED)


def _ask(server: Server, order: Mapping[str, Any]) -> Reply:
    if order.keys() <= {"intent"} and order.get("intent", "new") == "new":
        return server.ask("GET", "/gate", headers={"X-Order-Intent": "new"}, timeout=GATE_SECONDS)
    return server.ask("POST", "/v1/orders/check", {"intent": "new", **order}, timeout=GATE_SECONDS)


def _gate_is_silent(error: Unreachable, order: Mapping[str, Any]) -> None:
    said = f"No answer from the gate on {error.where}: {error.reason}."
    if order.get("intent") == "cancel":
        click.echo(f"allow (cancel): cancels always pass. {said}")
        return
    raise Failure(
        f"{said} Without one, code that asks it denies orders.\nName another gate with --gate-socket or --gate URL."
    )


def _decision(reply: Reply) -> dict[str, Any]:
    """Read a decision out of the answer of either question; anything but a clear one is a failure."""
    document = reply.document()
    if reply.status == 400 and document.get("decision") == "deny":
        return {"decision": "deny", "reason": {"code": "bad_order", "message": _problem(document)}}
    if reply.status in (200, 403) and "x-killswitch-reason" in reply.headers and "decision" not in document:
        return _from_headers(reply)
    if document.get("decision") not in ("allow", "deny") or reply.status not in (200, 403):
        raise Failure(f"This is not the answer of a gate (HTTP {reply.status}): {one_line(reply.text[:200])!r}")
    if reply.status == 403 and document["decision"] == "allow":
        raise Failure("The gate contradicts itself: it answered 403 with the decision allow.")
    return document


def _from_headers(reply: Reply) -> dict[str, Any]:
    said = {name.removeprefix(_HEADERS): value for name, value in reply.headers.items() if name.startswith(_HEADERS)}
    return {
        "decision": "allow" if reply.status == 200 else "deny",
        "switch": said.get("switch"),
        "state": said.get("state"),
        "restriction": said.get("restriction"),
        "position_limit_factor": said.get("factor"),
        "decision_id": said.get("decision-id"),
        "reason": {"code": said.get("reason")},
    }


def _problem(document: Mapping[str, Any]) -> str:
    return one_line(document.get("detail") or document.get("title") or "the order is malformed")


def _print_decision(decision: Mapping[str, Any]) -> None:
    found = decision.get("reason")
    reason: Mapping[str, Any] = found if isinstance(found, dict) else {}
    message = f": {one_line(reason['message'])}" if reason.get("message") else ""
    click.echo(f"{decision['decision']} ({one_line(reason.get('code') or 'no reason given')}){message}")
    if decision.get("max_quantity") is not None:
        click.echo(f"At most {one_line(decision['max_quantity'])} would pass.")
    if reason.get("release"):
        click.echo(f"Release: {one_line(reason['release'])}")
    facts = {
        "switch": decision.get("switch"),
        "state": decision.get("state"),
        "restriction": decision.get("restriction"),
        "factor": _factor(decision.get("position_limit_factor")),
    }
    click.echo(", ".join(f"{key} {one_line(value)}" for key, value in facts.items() if value is not None))


def _factor(value: object) -> str | None:
    return None if value is None else value if isinstance(value, str) else number_text(value)
