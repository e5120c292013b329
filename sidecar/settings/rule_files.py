"""Rule files to one consistent set of rules, or every problem of every file at once.

Finds the files, reads each once however many names it has, checks what only shows across rules and files, and gives the
doubts that `rules check` prints. Knows no source and evaluates nothing.
"""

import glob
import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from sidecar.rules.model import Group, RuleSet
from sidecar.settings.fields import problems_of
from sidecar.settings.problems import Path as KeyPath
from sidecar.settings.problems import Problem, RuleFileProblems, in_order
from sidecar.settings.rule_lints import doubts
from sidecar.settings.rule_models import GroupSection, RuleContext, RuleFile
from sidecar.settings.yaml_source import Document, read_file

TEST_SUFFIXES = (".test.yaml", ".test.yml")
_DEFAULT_INTERVAL = 5.0


def load_rules(
    patterns: Sequence[str],
    default_interval: float = _DEFAULT_INTERVAL,
    environ: Mapping[str, str] | None = None,
    scrape_names: Collection[str] = (),
) -> RuleSet:
    """Read all rule files that the patterns name.

    Args:
        patterns: paths, folders (their *.yaml) or glob patterns; what matches nothing gives a set without files.
        default_interval: seconds, for groups without their own interval.
        environ: for `${VAR}`; None takes the process's own.
        scrape_names: what may follow `scrape:` in the source of a rule.

    Raises:
        RuleFileProblems: with every problem of every file.
    """
    return _read(patterns, default_interval, environ, scrape_names).rules


def check_rules(
    patterns: Sequence[str],
    default_interval: float = _DEFAULT_INTERVAL,
    environ: Mapping[str, str] | None = None,
    scrape_names: Collection[str] = (),
) -> tuple[RuleSet, tuple[Problem, ...]]:
    """Read as `load_rules` does, and say also what is allowed but probably not what was meant.

    Returns:
        The rules, and the doubts about them.

    Raises:
        RuleFileProblems: with every problem of every file.
    """
    loaded = _read(patterns, default_interval, environ, scrape_names)
    found = [
        Problem(file=pattern, line=1, key="(file)", reason="matches no rule file")
        for pattern in patterns
        if not _files_of(pattern)
    ]
    for checked in loaded.files:
        for path, reason in doubts(checked.groups):
            found.append(checked.document.problem(path, reason))
    return loaded.rules, in_order(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Checked:
    document: Document
    groups: tuple[GroupSection, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Loaded:
    rules: RuleSet
    files: tuple[_Checked, ...]


def _read(
    patterns: Sequence[str],
    default_interval: float,
    environ: Mapping[str, str] | None,
    scrape_names: Collection[str],
) -> _Loaded:
    environ = os.environ if environ is None else environ
    paths = rule_paths(patterns)
    documents = [read_file(Path(path), environ) for path in paths]
    problems = [*_absent(patterns, found_any=bool(paths)), *_taken_triggers(documents)]
    checked: list[_Checked] = []
    for document in documents:
        problems.extend(document.problems)
        try:
            file = RuleFile.model_validate(document.data, context=RuleContext(scrape_names=frozenset(scrape_names)))
        except ValidationError as error:
            problems.extend(problems_of(error, document))
        else:
            checked.append(_Checked(document=document, groups=file.groups))
    if problems:
        raise RuleFileProblems(problems)
    groups = tuple(group for one in checked for group in _groups(one, default_interval))
    digest = hashlib.sha256(repr((default_interval, [one.digest for one in documents])).encode()).hexdigest()
    return _Loaded(rules=RuleSet(groups=groups, content_hash=digest, files=tuple(paths)), files=tuple(checked))


def rule_paths(patterns: Sequence[str]) -> list[str]:
    """The rule files that the patterns name, sorted within each pattern; a file with several names counts once.

    A mounted ConfigMap shows each file twice, by its name and in a folder that a symlink `..data` points to: hidden
    names are found only by patterns that spell the dot, and what leads to the same file is read once.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        for path in _files_of(pattern):
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _files_of(pattern: str) -> list[str]:
    # A path that exists as written is meant as written, also with brackets in its name; a folder means what is in it.
    if Path(pattern).is_dir():
        pattern = str(Path(glob.escape(pattern)) / "*.yaml")
    matches = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)  # noqa: PTH207 - absolute
    return sorted(path for path in matches if not path.endswith(TEST_SUFFIXES) and not Path(path).is_dir())


def _absent(patterns: Sequence[str], *, found_any: bool) -> Iterator[Problem]:
    """A file that is named outright and missing among others would be a rule that silently never fires.

    Where nothing at all is found the set is empty, and the gate says so.
    """
    if not found_any:
        return
    for pattern in patterns:
        if not glob.has_magic(pattern) and not os.path.lexists(pattern):
            yield Problem(file=pattern, line=1, key="(file)", reason="there is no such file; correct rules.files")


def _taken_triggers(documents: Sequence[Document]) -> Iterator[Problem]:
    first: dict[str, str] = {}
    for document in documents:
        for path, name in _trigger_names(document.data):
            place = f"{document.file}:{document.line(path)}"
            if name in first:
                yield document.problem(path, f"{name!r} is taken: {first[name]} has a rule of this name")
            first.setdefault(name, place)


def _trigger_names(data: object) -> Iterator[tuple[KeyPath, str]]:
    """Find the names in data that may be wrong in every other way, so that this problem shows with the others."""
    for group_index, group in _items(_value(data, "groups")):
        for rule_index, rule in _items(_value(group, "rules")):
            name = _value(rule, "trigger")
            if isinstance(name, str):
                yield ("groups", group_index, "rules", rule_index, "trigger"), name


def _value(data: object, key: str) -> object:
    return data.get(key) if isinstance(data, dict) else None


def _items(data: object) -> Iterator[tuple[int, object]]:
    return iter(enumerate(data)) if isinstance(data, list) else iter(())


def _groups(checked: _Checked, default_interval: float) -> Iterator[Group]:
    document = checked.document
    for group_index, group in enumerate(checked.groups):
        rules = tuple(
            rule.build(
                group=group.name,
                origin=f"{document.file}:{document.line(('groups', group_index, 'rules', rule_index))}",
            )
            for rule_index, rule in enumerate(group.rules)
        )
        interval = default_interval if group.interval is None else group.interval
        yield Group(name=group.name, interval=interval, rules=rules)
