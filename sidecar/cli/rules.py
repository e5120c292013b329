"""`killswitch rules`: whether rule files can be used, and what the running sidecar makes of them.

Checks read files with the very code the sidecar uses, so what passes here loads there.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from sidecar.cli.context import Context, Group, examples, pass_context
from sidecar.cli.outcomes import Exit, Failure, refused
from sidecar.cli.rules_test import rules_test
from sidecar.cli.tables import print_body, print_table

if TYPE_CHECKING:
    from sidecar.cli.rules_live import Finding
    from sidecar.rules.model import RuleSet
    from sidecar.settings.config import Settings

_POD_VARIABLES: Final = ("POD_NAME", "POD_NAMESPACE", "NODE_NAME", "POD_UID", "POD_IP")
"""What the downward API gives a sidecar, and what a machine that only checks files does not have."""


@click.group(cls=Group)
def rules() -> None:
    """Check trigger rules, test and list them."""


rules.add_command(rules_test)


@rules.command(
    "check",
    epilog=examples("killswitch rules check rules/*.yaml", "killswitch rules check --prometheus http://127.0.0.1:9090"),
)
@click.argument("files", nargs=-1, metavar="[FILES]...")
@click.option("--prometheus", "url", metavar="URL", help="Also ask this live server what each query returns now.")
@pass_context
def check_command(context: Context, files: tuple[str, ...], url: str | None) -> None:
    """Check rule files as the sidecar reads them: all problems at once, as file:line: key: reason.

    A folder stands for its *.yaml. Without FILES, those of the configuration, and its own problems with them. Warnings
    tell what is allowed but probably not meant. With --prometheus each query is asked: whether the server takes it,
    whether it returns data now, as many series as `series` says, and how far apart samples are. Ends with 0 if the
    rules can be used, 1 if not.
    """
    from sidecar.core.errors import RuleFileError, SettingsError
    from sidecar.settings.rule_files import check_rules

    try:
        settings = _settings(context, files)
        patterns = _rule_files(files) or (settings.rules.files if settings else ())
        interval = settings.rules.interval if settings else 5.0
        names = settings.scrape_names if settings else ()
        rule_set, doubts = check_rules(patterns, interval, _environment(patterns), names)
    except (RuleFileError, SettingsError) as error:
        _print_problems(context, str(error).splitlines())
        raise SystemExit(Exit.ERROR) from None
    if not rule_set.files:
        raise Failure(f"No rule file found in {', '.join(patterns)}: without one the gate denies.")
    if not rule_set.rules:
        raise Failure(f"No rule stands in {', '.join(rule_set.files)}: without one the gate denies.")
    findings: tuple[Finding, ...] = ()
    if url is not None:
        from sidecar.cli.rules_live import ask_about

        findings = ask_about(rule_set, url, settings.prometheus if settings else None)
    _report(context, rule_set, [str(doubt) for doubt in doubts], findings)


def _rule_files(files: tuple[str, ...]) -> tuple[str, ...]:
    """The files without the tests that a shell's *.yaml brings along; those too where there is nothing else."""
    from sidecar.settings.rule_files import TEST_SUFFIXES

    return tuple(file for file in files if not (file.endswith(TEST_SUFFIXES) and Path(file).exists())) or files


def _settings(context: Context, files: tuple[str, ...]) -> "Settings | None":
    """The configuration; None where files are named and there is no configuration beside them."""
    from sidecar.core.errors import SettingsError
    from sidecar.settings.config import load_settings

    path = Path(context.config_path)
    if files and context.config is None and not path.exists():
        return None
    if not files and not path.exists():
        raise Failure(f"There is no configuration in {path}: name the rule files, or the configuration with --config.")
    try:
        return load_settings(path, _environment([str(path)]))
    except SettingsError as error:
        if not files:
            from sidecar.settings.everything import with_rules

            raise with_rules(error, path, _environment([str(path)])) from None
        if context.config is not None:
            raise
        click.echo(f"Warning: the configuration cannot be used, going on without it:\n{error}", err=True)
        return None


def _environment(files: tuple[str, ...] | list[str]) -> Mapping[str, str]:
    """The environment, with stand-ins for what only a pod has, so that files can be checked before there is one."""
    missing = {name: name.lower().replace("_", "-") for name in _POD_VARIABLES if name not in os.environ}
    used = [name for name in missing if any(f"${{{name}}}" in _content(file) for file in files)]
    for name in used:
        click.echo(f"Note: {name} is not set here; checked with {missing[name]!r} in its place.", err=True)
    return {**os.environ, **missing}


def _content(file: str) -> str:
    try:
        return Path(file).read_text("utf-8", "replace")
    except OSError:
        return ""  # a pattern, or a file that the reader will complain about


def _print_problems(context: Context, problems: list[str]) -> None:
    if context.as_json:
        click.echo(json.dumps({"ok": False, "problems": problems, "warnings": []}))
        return
    for problem in problems:
        click.echo(problem)
    click.echo(f"{_count(len(problems), 'problem')}: these rules cannot be used.")


def _report(context: Context, rule_set: "RuleSet", doubts: list[str], findings: "tuple[Finding, ...]") -> None:
    problems = [str(finding) for finding in findings if finding.is_problem]
    warnings = [*doubts, *(str(finding) for finding in findings if not finding.is_problem)]
    if context.as_json:
        click.echo(json.dumps({"ok": not problems, "problems": problems, "warnings": warnings}))
    else:
        for line in problems:
            click.echo(line)
        for line in warnings:
            click.echo(f"warning: {line}")
        count, files = _count(len(rule_set.rules), "rule"), _count(len(rule_set.files), "file")
        verdict = "these rules would not work now" if problems else "can be used"
        told = f", {_count(len(problems), 'problem')}, {_count(len(warnings), 'warning')}"
        click.echo(f"{count} in {files}: {verdict}{told if problems or warnings else ''}.")
    raise SystemExit(Exit.ERROR if problems else Exit.DONE)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


@rules.command("list", epilog=examples("killswitch rules list", "killswitch rules list rules/default.yaml"))
@click.argument("files", nargs=-1, metavar="[FILES]...")
@pass_context
def list_command(context: Context, files: tuple[str, ...]) -> None:
    """List the running sidecar's rules with their values, or the rules in FILES."""
    if files:
        _list_files(context, files)
        return
    from sidecar.cli.status import print_triggers

    reply = context.ask("GET", "/api/v1/triggers")
    if not reply.ok:
        raise refused(reply)
    triggers = reply.document().get("triggers")
    if not isinstance(triggers, list):
        raise Failure("The answer of the sidecar holds no triggers; is this its control socket?")
    if context.as_json:
        print_body(reply)
    elif triggers:
        print_triggers([trigger for trigger in triggers if isinstance(trigger, dict)])
    else:
        click.echo("No rules are loaded.")


def _list_files(context: Context, files: tuple[str, ...]) -> None:
    from sidecar.core.errors import RuleFileError, SettingsError
    from sidecar.settings.rule_files import load_rules

    try:
        settings = _settings(context, files)
        names = settings.scrape_names if settings else ()
        loaded = load_rules(files, settings.rules.interval if settings else 5.0, _environment(files), names)
    except (RuleFileError, SettingsError) as error:
        raise Failure(str(error)) from None
    if not loaded.files:
        raise Failure(f"No rule file found in {', '.join(files)}.")
    listed: list[dict[str, Any]] = [
        {
            "trigger": rule.trigger,
            "group": rule.group,
            "type": rule.kind,
            "query": rule.query,
            "action": rule.action.label,
            "enabled": rule.enabled,
            "shadow": rule.shadow,
        }
        for rule in loaded.rules
    ]
    if context.as_json:
        click.echo(json.dumps({"triggers": listed}))
        return
    rows = [(rule["trigger"], rule["type"], rule["action"], _mode(rule), rule["query"] or "-") for rule in listed]
    print_table(("trigger", "type", "action", "mode", "query"), rows)


def _mode(rule: Mapping[str, Any]) -> str:
    return "disabled" if not rule["enabled"] else "shadow" if rule["shadow"] else "enforced"
