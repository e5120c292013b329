"""`killswitch status` and `health`: what a tired person must see at a glance, in the sidecar's own words."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import click

from sidecar.cli.context import Command, Context, examples, pass_context
from sidecar.cli.control import Unreachable
from sidecar.cli.outcomes import Exit, Failure, reader_may_leave, refused
from sidecar.cli.tables import print_banner, print_body, print_field, print_table
from sidecar.cli.words import duration_text, moment_text, number_text, one_line, percent_text

_STATES: Final = frozenset({"ACTIVE", "KILLED", "RECOVERING", "DISABLED"})
_BLIND_CODES: Final = frozenset({"not_ready", "stale", "internal_error"})
"""Denials that say: the sidecar does not know enough to allow anything."""

_ORDER: Final = {"firing": 0, "pending": 1}


@click.command(
    cls=Command,
    epilog=examples(
        "killswitch status",
        "killswitch status --output json",
        "kubectl exec trader-0 -c killswitch -- killswitch status",
    ),
)
@pass_context
def status(context: Context) -> None:
    """Show whether trading is allowed, why not, and who can change it.

    Ends with 0 for ACTIVE and DISABLED, 3 for KILLED, RECOVERING or not ready, 1 if no sidecar answers. `--output json`
    prints /api/v1/status.
    """
    reply = context.ask("GET", "/api/v1/status")
    if not reply.ok:
        raise refused(reply)
    document = status_document(reply.document())
    with reader_may_leave():
        if context.as_json:
            print_body(reply)
        else:
            print_status(document, command=context.command, now=datetime.now(UTC))
            _print_triggers(context)
    raise SystemExit(exit_code(document))


@click.command(cls=Command, epilog=examples("killswitch health"))
@pass_context
def health(context: Context) -> None:
    """Show the checks that a recovery depends on.

    Ends with 0 if all are well, 3 if one is not, 1 if no sidecar answers.
    """
    reply = context.ask("GET", "/api/v1/health")
    if not reply.ok:
        raise refused(reply)
    document = reply.document()
    checks = _mappings(document.get("checks"))
    if "healthy" not in document:
        raise Failure(f"The answer of the sidecar is not a health report: {one_line(reply.text[:200])!r}")
    healthy = document["healthy"] is True
    with reader_may_leave():
        if context.as_json:
            print_body(reply)
        else:
            print_banner("HEALTHY" if healthy else "UNHEALTHY", "green" if healthy else "red")
            if checks:
                rows = [
                    (_text(c, "name"), "ok" if c.get("ok") is True else "FAILED", _text(c, "seen"), _text(c, "wanted"))
                    for c in checks
                ]
                print_table(("check", "result", "seen", "wanted"), rows)
    raise SystemExit(Exit.DONE if healthy else Exit.BLOCKED)


def status_document(document: dict[str, Any]) -> dict[str, Any]:
    """Return the status as it is.

    Raises:
        Failure: it is none, so that nothing may be concluded from it.
    """
    if not isinstance(document.get("state"), str) or "restriction" not in document:
        raise Failure("The answer of the sidecar is not a status; is this the control socket of killswitch-sidecar?")
    return document


def exit_code(document: Mapping[str, Any]) -> Exit:
    """0 for ACTIVE and ready, and for DISABLED; 3 for everything else, a state that is not known here included."""
    state = document.get("state")
    if state == "DISABLED":
        return Exit.DONE
    blind = _gate(document).get("decision") == "deny" and _gate_code(document) in _BLIND_CODES
    return Exit.DONE if state == "ACTIVE" and document.get("ready") is True and not blind else Exit.BLOCKED


def banner(document: Mapping[str, Any]) -> tuple[str, str]:
    """The first line and its colour; says that trading is allowed only where the gate itself says so."""
    state, gate = str(document.get("state")), _gate(document)
    if state == "DISABLED":
        return "TRADING ALLOWED – SWITCH DISABLED, NOTHING IS BLOCKED", "yellow"
    if gate.get("decision") == "allow":
        return _allowed(document, state)
    if state not in _STATES:
        return f"BLOCKED – UNKNOWN STATE {one_line(state)}", "red"
    if state != "ACTIVE":
        return f"BLOCKED – {state}", "red"
    if document.get("ready") is not True:
        return "BLOCKED – NOT READY", "red"
    return _denied_while_active(document)


def _allowed(document: Mapping[str, Any], state: str) -> tuple[str, str]:
    if document.get("mode") == "shadow":
        would = "" if state == "ACTIVE" else f", WOULD BE {one_line(state)}"
        return f"TRADING ALLOWED – SHADOW MODE, RULES DO NOT BLOCK{would}", "yellow"
    factor = document.get("position_limit_factor")
    if factor != 1:
        return f"REDUCED – {percent_text(factor)} of limits", "yellow"
    return "TRADING ALLOWED", "green"


def _denied_while_active(document: Mapping[str, Any]) -> tuple[str, str]:
    code = _gate_code(document)
    if code in _BLIND_CODES:
        return f"BLOCKED – {code.replace('_', ' ').upper()}", "red"
    if document.get("restriction") == "reduce_only":
        return "REDUCED – REDUCE ONLY, exits that shrink a position pass", "yellow"
    if document.get("restriction") == "halt":
        return "BLOCKED – HALTED by a rule", "red"
    if code == "blind_order":
        return (
            f"REDUCED – {percent_text(document.get('position_limit_factor'))} of limits, blind orders denied",
            "yellow",
        )
    return f"BLOCKED – {one_line(code).replace('_', ' ').upper() or 'THE GATE DOES NOT SAY WHY'}", "red"


def print_status(document: Mapping[str, Any], *, command: str, now: datetime) -> None:
    """Print the screen; `command` is how this sidecar is called, for the next step that it suggests."""
    print_banner(*banner(document))
    mode = document.get("mode")
    print_field("Switch", _text(document, "switch") + (f" ({one_line(mode)} mode)" if mode != "active" else ""))
    print_field("Since", moment_text(document.get("since"), now))
    for label, text in _why(document, now):
        print_field(label, text)
    print_field("Limits", _limits(document))
    for label, text in recovery_lines(document, now):
        print_field(label, text)
    for waiver in _mappings(document.get("waivers")):
        print_field("Waived", _waiver(waiver, now))
    for source in _mappings(document.get("sources")):
        if source.get("up") is False:  # null: no rule asks it
            print_field("Source", f"{_text(source, 'name')} is DOWN: {_text(source, 'error') or 'no reason given'}")
    for problem in _problems(document):
        print_field("Problem", problem)
    print_field("Release", _text(_reason(document), "release"))
    print_field("Next", next_command(document, command))


def _why(document: Mapping[str, Any], now: datetime) -> Iterator[tuple[str, str]]:
    label = "Why"
    if document.get("ready") is not True and document.get("not_ready_reason"):
        yield label, f"not ready: {_text(document, 'not_ready_reason')}"
        label = ""
    causes = _mappings(document.get("causes"))
    for cause in causes:
        yield label, _cause(cause, now)
        label = ""
    for demand in _mappings(document.get("demands")):
        yield label, _demand(demand)
        label = ""
    reason = _reason(document)
    if label and _gate(document).get("decision") == "deny":
        yield label, _text(reason, "message") or _text(reason, "code")


def _cause(cause: Mapping[str, Any], now: datetime) -> str:
    who = _text(cause, "trigger") or _text(cause, "by")
    claimed = "" if cause.get("trigger") or cause.get("by_verified") is True or not who else " (unverified)"
    count = cause.get("count")
    often = f", {count} times" if isinstance(count, int) and count > 1 else ""
    said = _text(cause, "reason") or _text(cause, "code")
    return f"{who}{claimed}: {said}{often}, {moment_text(cause.get('time'), now)}" if who else said


def _demand(demand: Mapping[str, Any]) -> str:
    action = _text(demand, "action")
    if action == "throttle":
        action += f" to {percent_text(demand.get('factor'))}"
    return f"{_text(demand, 'trigger')} asks for {action}: {_text(demand, 'message') or _text(demand, 'code')}"


def _limits(document: Mapping[str, Any]) -> str:
    factor = document.get("position_limit_factor")
    return f"{percent_text(factor)} of position limits, restriction {_text(document, 'restriction')}"


def recovery_lines(document: Mapping[str, Any], now: datetime) -> Iterator[tuple[str, str]]:
    """What there is to say of a recovery, as labels and texts; nothing where there is none."""
    recovery = document.get("recovery")
    recovery = recovery if isinstance(recovery, dict) else {}
    stage = one_line(recovery.get("stage") or document.get("stage") or "NONE")
    if stage == "NONE":
        return
    asked = f", asked for by {_text(recovery, 'by')}: {_text(recovery, 'reason')}" if recovery.get("by") else ""
    when = f" ({moment_text(recovery.get('requested'), now)})" if recovery.get("requested") else ""
    yield "Recovery", f"{stage.replace('_', ' ')}{asked}{when}"
    yield "", _approvals(recovery)
    if stage in ("PENDING", "VALIDATING"):
        for waiver in _mappings(recovery.get("waivers")):
            yield "", f"would waive {_waiver(waiver, now)}"
    if stage == "COOLDOWN":
        waits = f", waits for {_text(recovery, 'waits_for')}" if recovery.get("waits_for") else ""
        yield "", f"cooldown: {_seconds(recovery.get('cooldown_remaining_seconds'))} left{waits}"
    step = recovery.get("next_step")
    if isinstance(step, dict):
        waits = f", waits for {_text(step, 'waits_for')}" if step.get("waits_for") else ""
        yield "", f"next step: {percent_text(step.get('factor'))} in {_seconds(step.get('in_seconds'))}{waits}"


def _approvals(recovery: Mapping[str, Any]) -> str:
    approvals = _mappings(recovery.get("approvals"))
    needed = recovery.get("approvals_needed")
    if not approvals and not needed:
        return ""
    names = ", ".join(_text(a, "by") + ("" if a.get("by_verified") is True else " (unverified)") for a in approvals)
    return f"approvals: {len(approvals)} of {needed}" + (f" ({names})" if names else "")


def _waiver(waiver: Mapping[str, Any], now: datetime) -> str:
    threshold = waiver.get("threshold")
    limit = f" at {number_text(threshold)}" if threshold is not None else ""
    by = f", by {_text(waiver, 'by')}" if waiver.get("by") else ""
    return f"{_text(waiver, 'trigger')}{limit} until {moment_text(waiver.get('until'), now)}{by}"


def _problems(document: Mapping[str, Any]) -> Iterator[str]:
    problems = document.get("problems")
    if isinstance(problems, list):
        yield from (one_line(problem) for problem in problems)
    if document.get("durable") is False:
        yield "NOT durable: what you see is in force, but not on disk; a restart may forget it"


def next_command(document: Mapping[str, Any], command: str) -> str:
    """The exact command that comes next for whoever may give it; empty where there is nothing to do."""
    state, ready = document.get("state"), document.get("ready") is True
    if state == "RECOVERING":
        return f"wait; to take it back: {command} cancel-recovery --reason TEXT"
    if state == "KILLED":
        if (document.get("stage") or "NONE") == "PENDING":
            return f"{command} approve --by APPROVER"
        return f"{command} recover --reason TEXT --by APPROVER"
    if state == "ACTIVE" and not ready:
        return f"{command} rules list, and {command} health"
    return ""


def _print_triggers(context: Context) -> None:
    try:
        reply = context.control().ask("GET", "/api/v1/triggers")
    except Unreachable as error:
        click.echo(f"\nTriggers are not known: {error.reason}")
        return
    triggers = _mappings(reply.document().get("triggers"))
    if not reply.ok or not triggers:
        click.echo("\nNo rules are loaded." if reply.ok else f"\nTriggers are not known: HTTP {reply.status}")
        return
    click.echo("")
    print_triggers(triggers)


def print_triggers(triggers: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of triggers, those that ask for something first."""
    ordered = sorted(triggers, key=lambda t: (_ORDER.get(str(t.get("status")), 2), t.get("health") == "ok"))
    rows = [
        (
            _text(trigger, "trigger"),
            number_text(trigger.get("value")),
            _threshold(trigger),
            percent_text(trigger.get("limit_used_ratio")),
            _trigger_status(trigger),
            _text(trigger, "health") or "unknown",
        )
        for trigger in ordered
    ]
    columns = ("trigger", "value", "threshold", "used", "status", "health")
    print_table(columns, rows, right=frozenset({"value", "threshold", "used"}))


def _threshold(trigger: Mapping[str, Any]) -> str:
    if trigger.get("threshold") is None:
        return "-"
    return f"{_text(trigger, 'operator')} {number_text(trigger.get('threshold'))}".strip()


def _trigger_status(trigger: Mapping[str, Any]) -> str:
    text = _text(trigger, "status") or "unknown"
    if text == "firing":
        text = f"FIRING ({_text(trigger, 'action')})"
    elif step := _text(trigger, "step"):
        text = f"{text}, at its step {step}"
    notes = [
        note
        for note, holds in (
            ("disabled", trigger.get("enabled") is False),
            ("shadow", trigger.get("shadow") is True),
            ("waived", trigger.get("waived") is True),
            ("not ready", trigger.get("ready") is False and trigger.get("enabled") is not False),
            ("not armed", trigger.get("armed") is False and trigger.get("ready") is True),
        )
        if holds
    ]
    return ", ".join([text, *notes])


def _seconds(value: object) -> str:
    return duration_text(value) if isinstance(value, int | float) else "an unknown time"


def _gate(document: Mapping[str, Any]) -> Mapping[str, Any]:
    gate = document.get("gate")
    return gate if isinstance(gate, dict) else {}


def _reason(document: Mapping[str, Any]) -> Mapping[str, Any]:
    reason = _gate(document).get("reason")
    return reason if isinstance(reason, dict) else {}


def _gate_code(document: Mapping[str, Any]) -> str:
    return str(_reason(document).get("code") or "")


def _mappings(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(mapping: Mapping[str, Any], key: str) -> str:
    value = mapping.get(key)
    return "" if value is None else one_line(value)
