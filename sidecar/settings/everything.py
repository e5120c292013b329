"""Configuration and rule files looked at together, so that one reading tells all that is wrong with either.

A configuration that cannot be used may still say where its rule files are: they are read as far as that goes.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from sidecar.core.errors import SettingsError
from sidecar.rules.model import RuleSet
from sidecar.settings.config import Settings, load_settings
from sidecar.settings.config_file import RulesSection
from sidecar.settings.problems import Problem, RuleFileProblems, SettingsProblems
from sidecar.settings.rule_files import load_rules
from sidecar.settings.yaml_source import read_file


def load_everything(path: str | Path, environ: Mapping[str, str]) -> tuple[Settings, RuleSet]:
    """Read the configuration and the rule files that it names.

    Raises:
        SettingsProblems: with every problem of the configuration, and of its rule files as far as they can be found.
        RuleFileProblems: the configuration can be used, and these are the problems of its rule files.
    """
    try:
        settings = load_settings(path, environ)
    except SettingsError as error:
        raise with_rules(error, path, environ) from None
    return settings, load_rules(settings.rules.files, settings.rules.interval, environ, settings.scrape_names)


def with_rules(error: SettingsError, path: str | Path, environ: Mapping[str, str]) -> SettingsError:
    """The problems of a configuration, and those of the rule files that it names all the same."""
    file = Path(path)
    if not isinstance(error, SettingsProblems) or not file.is_file():
        return error
    return SettingsProblems([*error.problems, *_rule_problems(file, environ)])


def _rule_problems(file: Path, environ: Mapping[str, str]) -> tuple[Problem, ...]:
    data = read_file(file, environ).data
    if not isinstance(data, dict):
        return ()
    patterns = [str(file.absolute().parent / pattern) for pattern in _patterns(data)]
    try:
        load_rules(patterns, environ=environ, scrape_names=frozenset(_scrape_names(data)))
    except RuleFileProblems as error:
        return error.problems
    return ()


def _patterns(data: Mapping[str, object]) -> Iterator[str]:
    section = data.get("rules")
    written = section.get("files") if isinstance(section, dict) else None
    yield from (one for one in written if isinstance(one, str)) if isinstance(written, list) else RulesSection().files


def _scrape_names(data: Mapping[str, object]) -> Iterator[str]:
    sources = data.get("scrape")
    for source in sources if isinstance(sources, list) else ():
        if isinstance(source, dict) and isinstance(source.get("name"), str):
            yield source["name"]
