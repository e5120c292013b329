"""`killswitch audit`: who did what to the switch, asked of the running sidecar or of its files, and are they whole.

The files are only ever read. They are asked where no sidecar answers, for that is when somebody wants to know why.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import click

from sidecar.cli.context import Context, Group, examples, pass_context
from sidecar.cli.control import Reply, Unreachable
from sidecar.cli.outcomes import Failure, refused
from sidecar.cli.tables import print_body
from sidecar.cli.words import one_line

FOLLOW_SECONDS: Final = 1.0
_FOLLOW_LIMIT: Final = 1000
_DAY: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")

Event = dict[str, Any]


def parse_moment(text: str, *, now: datetime, end_of_day: bool = False) -> datetime:
    """Read `24h` or `7d` as so long ago, and an ISO date or time as it is; without a zone it is UTC.

    A bare date is its first moment, or its last millisecond with `end_of_day`, so that `--until` includes the day.

    Raises:
        ValueError: it is neither.
    """
    from sidecar.settings.quantities import parse_duration

    try:
        return now - timedelta(seconds=parse_duration(text))
    except (ValueError, OverflowError):
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is neither a time ago, like 24h or 7d, nor a date, like 2026-01-31T08:00Z"
        ) from None
    if _DAY.fullmatch(text) and end_of_day:
        moment += timedelta(days=1, milliseconds=-1)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _moment(_context: click.Context, parameter: click.Parameter, value: str | None) -> datetime | None:
    if value is None:
        return None
    try:
        return parse_moment(value, now=datetime.now(UTC), end_of_day=parameter.name == "until")
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.group(
    cls=Group,
    invoke_without_command=True,
    epilog=examples(
        "killswitch audit --since 24h",
        "killswitch audit --since 2026-01-30 --until 2026-01-31 --limit 500",
        "killswitch audit --type switch.killed --type switch.reopened --follow",
        "killswitch audit verify",
    ),
)
@click.option(
    "--since", metavar="24h|7d|DATE", callback=_moment, help="Not older than this; times without a zone are UTC."
)
@click.option(
    "--until", metavar="24h|7d|DATE", callback=_moment, help="Not newer than this; a bare date includes its day."
)
@click.option("--type", "kinds", metavar="TYPE", multiple=True, help="Only events of this type; may be given again.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=20, show_default=True, help="The newest so many, newest last."
)
@click.option("--follow", is_flag=True, help="Go on and print new events as they come, until Ctrl-C.")
@click.pass_context
def audit(
    click_context: click.Context,
    since: datetime | None,
    until: datetime | None,
    kinds: tuple[str, ...],
    limit: int,
    *,
    follow: bool,
) -> None:
    """Show the newest audit events, newest last.

    Asks the running sidecar; where none answers, reads the files in its state folder. With --output json the answer of
    /api/v1/audit is printed, and with --follow one JSON event a line.
    """
    if click_context.invoked_subcommand is not None:
        return
    context = click_context.ensure_object(Context)
    question = Question(since=since, until=until, kinds=kinds, limit=limit)
    if not follow:
        _list(context, question, lines=False)
        return
    with contextlib.suppress(KeyboardInterrupt):  # how it is meant to end
        last = _list(context, question, lines=True)
        for event in _new_events(context, question, last):
            _print_event(event, as_json=context.as_json)


class Question:
    """What is asked of the audit; `since` and `until` are inclusive, no `kinds` means every type."""

    def __init__(self, *, since: datetime | None, until: datetime | None, kinds: Sequence[str], limit: int) -> None:
        self.since = since
        self.until = until
        # As the API takes them: several in one, with commas.
        self.kinds = tuple(one.strip() for kind in kinds for one in kind.split(",") if one.strip())
        self.limit = limit

    def path(self) -> str:
        """The path and query of the API."""
        parameters: dict[str, str | int] = {"limit": self.limit}
        if self.since is not None:
            parameters["since"] = _rfc3339(self.since)
        if self.until is not None:
            parameters["until"] = _rfc3339(self.until)
        if self.kinds:
            parameters["type"] = ",".join(self.kinds)
        return f"/api/v1/audit?{urlencode(parameters)}"


def _rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _list(context: Context, question: Question, *, lines: bool) -> int:
    """Print what is there and return the newest seq, 0 for none; `lines` prints JSON one event a line."""
    events: list[Event]
    try:
        reply = context.control().ask("GET", question.path())
    except Unreachable as error:
        events = _from_files(context, question, error)
        if context.as_json and not lines:
            click.echo(json.dumps({"events": events}))
            return _newest(events)
    else:
        if not reply.ok:
            raise refused(reply)
        events = _events(reply)
        if context.as_json and not lines:
            print_body(reply)
            return _newest(events)
    for event in events:
        _print_event(event, as_json=context.as_json)
    if not events and not context.as_json:
        click.echo("No audit events fit.", err=True)
    return _newest(events)


def _events(reply: Reply) -> list[Event]:
    events = reply.document().get("events")
    if not isinstance(events, list):
        raise Failure("The answer of the sidecar holds no audit events; is this its control socket?")
    return [event for event in events if isinstance(event, dict)]


def _newest(events: list[Event]) -> int:
    return max((event["seq"] for event in events if isinstance(event.get("seq"), int)), default=0)


def _from_files(context: Context, question: Question, error: Unreachable) -> list[Event]:
    from sidecar.adapters.audit_log import read
    from sidecar.core.errors import StorageError

    folder = audit_folder(context.storage_dir())
    complaint = f"No answer from the sidecar on {error.where}: {error.reason}."
    if not folder.is_dir():
        raise Failure(f"{complaint}\nAnd there is no audit in {folder}; name another with --config.")
    click.echo(f"{complaint} Reading the files in {folder}.", err=True)
    types = set(question.kinds) or None
    try:
        return read(folder, since=question.since, until=question.until, types=types, limit=question.limit)
    except StorageError as failure:
        raise Failure(str(failure)) from None


def audit_folder(folder: Path) -> Path:
    """The audit in a state folder; the folder itself where it is one already."""
    return folder / "audit" if (folder / "audit").is_dir() or not any(folder.glob("*.jsonl*")) else folder


def _new_events(context: Context, question: Question, last: int) -> Iterator[Event]:
    """Yield what comes, for ever. A sidecar that goes away is said once, and asked again."""
    away = False
    start = datetime.now(UTC) if last == 0 else None
    while question.until is None or datetime.now(UTC) <= question.until:
        time.sleep(FOLLOW_SECONDS)
        since = start or question.since
        polled = Question(since=since, until=question.until, kinds=question.kinds, limit=_FOLLOW_LIMIT)
        events = _polled(context, polled)
        if events is None:
            if not away:
                click.echo("The sidecar does not answer; still trying.", err=True)
            away = True
            continue
        away = False
        fresh = [event for event in events if isinstance(event.get("seq"), int) and event["seq"] > last]
        last = max(last, _newest(fresh))
        yield from fresh


def _polled(context: Context, question: Question) -> list[Event] | None:
    try:
        reply = context.control().ask("GET", question.path())
    except Unreachable:
        return None
    return _events(reply) if reply.ok else None


def _print_event(event: Event, *, as_json: bool) -> None:
    click.echo(json.dumps(event) if as_json else event_line(event))


def event_line(event: Event) -> str:
    """One event in one line: time, type, change of state, who, why."""
    text = {key: one_line(value) for key, value in event.items() if value not in (None, "") and key != "data"}
    change = f"{text.get('from', '-')} -> {text.get('to', '-')}" if "from" in text or "to" in text else ""
    by = f"by {text['by']}" if "by" in text else ""
    reason = f"- {text['reason']}" if "reason" in text else ""
    parts = [text.get("time", "?"), f"#{text.get('seq', '?')}", text.get("type", "?"), change, by, reason]
    return "  ".join(part for part in parts if part)


@audit.command(
    "verify",
    epilog=examples(
        "killswitch audit verify",
        "killswitch audit verify --dir /backup/killswitch",
        "killswitch audit verify --prometheus http://prometheus:9090",
    ),
)
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="State or audit folder.  [default: storage.dir]")
@click.option("--prometheus", "url", metavar="URL", help="Compare the end with what this server saw in the last 24 h.")
@click.option("--switch", metavar="NAME", help="Whose audit it is, for --prometheus.  [default: switch.name]")
@pass_context
def verify_command(context: Context, folder: Path | None, url: str | None, switch: str | None) -> None:
    """Check every line of the audit, its hash and its place in the chain.

    Reads the files; the sidecar may run or not. Ends with 0 if all is whole, 1 if a line was changed, is missing or was
    cut, or nothing can be read. Whoever can write the files can cut the end off and leave no trace in them: with
    --prometheus the end is compared with killswitch_audit_head_sequence, and if that cannot be had it ends with 1 too.
    """
    from sidecar.adapters.audit_log import verify
    from sidecar.core.errors import StorageError

    place = audit_folder(folder or context.storage_dir())
    # Before the lines are read: those that come meanwhile are then ahead of what is wanted, never behind.
    head = None if url is None else _seen_head(context, url, switch)
    try:
        report = verify(place, head_sequence=head)
    except StorageError as error:
        raise Failure(str(error)) from None
    if context.as_json:
        from dataclasses import asdict

        seen = {} if head is None else {"prometheus_head_sequence": head}
        click.echo(json.dumps({"ok": report.ok, "dir": str(place), **seen, **asdict(report)}))
    else:
        _print_report(report, place)
        if head is not None:
            click.echo(f"Prometheus saw seq {head} in the last 24 h.")
    raise SystemExit(0 if report.ok else 1)


def _seen_head(context: Context, url: str, switch: str | None) -> int:
    from sidecar.cli.audit_head import seen_head

    return seen_head(url, switch=switch, config=Path(context.config_path), is_named=context.config is not None)


def _print_report(report: Any, place: Path) -> None:
    say: Callable[[str], None] = click.echo
    verdict = "WHOLE" if report.ok else "DAMAGED"
    span = f", seq {report.first_seq} to {report.last_seq}" if report.first_seq is not None else ""
    say(f"{verdict}: {report.checked} lines checked in {place}{span}")
    if report.starts_at_seq is not None:
        say(f"It starts at seq {report.starts_at_seq}: what stood before was removed, by retention or by somebody.")
    for problem in report.problems:
        line = f":{problem.line}" if problem.line is not None else ""
        say(f"{one_line(problem.file)}{line}: {one_line(problem.what)}")
    for note in report.notes:
        say(f"Note: {one_line(note)}")
