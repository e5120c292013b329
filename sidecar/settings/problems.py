"""What is wrong with a file, and where: one record for each problem, so that all of them reach the reader at once.

Knows nothing of YAML or of any key; every reader of files in this package speaks in these.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sidecar.core.errors import RuleFileError, SettingsError

Path = tuple[str | int, ...]
"""The way from the top of a file to a value: names of keys and positions in lists."""

TOP = "(file)"
"""Stands for the key where a problem concerns a file as a whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong, or (from `rules check`) doubtful.

    Attributes:
        file: path as the reader gave it.
        line: counted from 1.
        key: the key as a dotted path, `recovery.steps[1].factor`.
        reason: what was seen, what was wanted, what to do.
    """

    file: str
    line: int
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.key}: {self.reason}"


class SettingsProblems(SettingsError):  # noqa: N818 - an error by its base, named for what it holds
    """The configuration cannot be used.

    Attributes:
        problems: every problem found, in order of lines.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = in_order(problems)
        super().__init__(as_text(self.problems))


class RuleFileProblems(RuleFileError):  # noqa: N818 - an error by its base, named for what it holds
    """At least one rule file cannot be used, so none is.

    Attributes:
        problems: every problem of all files, by file and line.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = in_order(problems)
        super().__init__(as_text(self.problems))


def in_order(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Sort by file and line; problems of one line keep the order in which they were found, and none is said twice."""
    return tuple(sorted(dict.fromkeys(problems), key=lambda problem: (problem.file, problem.line)))


def as_text(problems: Sequence[Problem]) -> str:
    """One line for each problem."""
    return "\n".join(str(problem) for problem in problems)


def dotted(path: Path) -> str:
    """Write a path as people do: `recovery.steps[1].factor`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or TOP
