"""`killswitch rules test`: unit tests of rule files, on a virtual clock and with the very code that decides live.

Registered by `sidecar.cli.rules`. Needs no running sidecar; a test with `metrics` needs promtool.
"""

import glob
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidecar.cli.context import Command, Context, examples, pass_context
from sidecar.cli.outcomes import Exit, Failure

if TYPE_CHECKING:
    from sidecar.rules.testing import Mismatch, Verdict


@click.command(
    "test",
    cls=Command,
    epilog=examples("killswitch rules test rules/*.test.yaml", "killswitch rules test rules/portfolio.yaml"),
)
@click.argument("files", nargs=-1, metavar="[FILES]...")
@pass_context
def rules_test(context: Context, files: tuple[str, ...]) -> None:
    """Run unit tests of rule files: what triggers, switch and gate do when their queries return this and that.

    FILES are tests (*.test.yaml) or rule files, whose tests stand beside them; a folder stands for its *.yaml. Without
    FILES, those beside the rule files of the configuration. Ends with 0 if all tests passed,
    1 if not. docs/RULE_TESTS.md shows how to write them.
    """
    outcomes = [_run_file(path) for path in _test_files(context, files)]
    if context.as_json:
        click.echo(json.dumps({"ok": all(one.ok for one in outcomes), "files": [_document(one) for one in outcomes]}))
    else:
        _print(outcomes)
    raise SystemExit(Exit.DONE if all(one.ok for one in outcomes) else Exit.ERROR)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """How the tests of one file went; `problems` keep it, or one of its tests, from being run."""

    path: Path
    verdicts: "tuple[Verdict, ...]" = ()
    problems: tuple[str, ...] = ()

    @property
    def failed(self) -> "list[Verdict]":
        return [verdict for verdict in self.verdicts if not verdict.passed]

    @property
    def ok(self) -> bool:
        return not self.problems and not self.failed


def _test_files(context: Context, files: Sequence[str]) -> list[Path]:
    from sidecar.settings.rule_files import TEST_SUFFIXES

    found: dict[Path, None] = {}
    named = files or _configured_rule_files(context)
    for name in (file for one in named for file in _in_folder(one)):
        if name.endswith(TEST_SUFFIXES):
            found[Path(name)] = None
            continue
        if not Path(name).exists():
            raise Failure(f"There is no file {name}.")
        beside = [Path(name).with_suffix(suffix) for suffix in TEST_SUFFIXES]
        found.update({path: None for path in beside if path.exists()})
    if not found:
        raise Failure(
            f"No tests found for {', '.join(named) or 'the configuration, which names no rule file that exists'}: "
            "they stand beside a rule file x.yaml as x.test.yaml."
        )
    return list(found)


def _in_folder(name: str) -> list[str]:
    """The *.yaml of a folder, as `rules check` takes it; what is no folder stands for itself."""
    if not Path(name).is_dir():
        return [name]
    return sorted(glob.glob(str(Path(glob.escape(name)) / "*.yaml")))  # noqa: PTH207 - skips hidden names


def _configured_rule_files(context: Context) -> list[str]:
    from sidecar.core.errors import SettingsError
    from sidecar.settings.config import load_settings
    from sidecar.settings.rule_files import rule_paths
    from sidecar.settings.rule_tests import STAND_INS

    path = Path(context.config_path)
    if not path.exists():
        raise Failure(f"There is no configuration in {path}: name the tests, or the configuration with --config.")
    try:
        return rule_paths(load_settings(path, {**STAND_INS, **os.environ}).rules.files)
    except SettingsError as error:
        raise Failure(str(error)) from None


def _run_file(path: Path) -> _Outcome:
    from sidecar.app.rule_tests import run_rule_test
    from sidecar.core.errors import RuleFileError, SourceError
    from sidecar.settings.rule_tests import load_rule_tests

    try:
        tests = load_rule_tests(path).tests
    except RuleFileError as error:
        return _Outcome(path=path, problems=tuple(str(error).splitlines()))
    verdicts, problems = [], []
    for test in tests:
        try:
            verdicts.append(run_rule_test(test))
        except SourceError as error:
            problems.append(f"{test.origin}: {test.name}: {error}")
    return _Outcome(path=path, verdicts=tuple(verdicts), problems=tuple(problems))


def _print(outcomes: Sequence[_Outcome]) -> None:
    for outcome in outcomes:
        for problem in outcome.problems:
            click.echo(problem)
        for verdict in outcome.failed:
            click.echo(f"FAILED {verdict.test.origin}: {verdict.test.name}")
            for mismatch in verdict.mismatches:
                _print_mismatch(mismatch)
        passed = len(outcome.verdicts) - len(outcome.failed)
        lost = [f"{len(outcome.failed)} failed"] if outcome.failed else []
        lost += ["cannot be run" if not outcome.verdicts else "some cannot be run"] if outcome.problems else []
        click.echo(f"{outcome.path}: {', '.join([f'{passed} passed', *lost])}")


def _print_mismatch(mismatch: "Mismatch") -> None:
    from sidecar.rules.testing import shown
    from sidecar.settings.quantities import format_duration

    wanted, seen = shown(mismatch.wanted), shown(mismatch.seen)
    at = format_duration(mismatch.at)
    click.echo(f"  {mismatch.origin}: at {at}: {mismatch.what}: expected {wanted}, but it is {seen}")
    for line in mismatch.context:
        click.echo(f"      {line}")


def _document(outcome: _Outcome) -> dict[str, Any]:
    return {
        "file": str(outcome.path),
        "ok": outcome.ok,
        "problems": list(outcome.problems),
        "tests": [
            {
                "name": verdict.test.name,
                "origin": verdict.test.origin,
                "passed": verdict.passed,
                "mismatches": [
                    {
                        "origin": mismatch.origin,
                        "at_seconds": mismatch.at,
                        "what": mismatch.what,
                        "expected": mismatch.wanted,
                        "seen": mismatch.seen,
                        "context": list(mismatch.context),
                    }
                    for mismatch in verdict.mismatches
                ],
            }
            for verdict in outcome.verdicts
        ],
    }
