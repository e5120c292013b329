"""Asks promtool what PromQL queries return on series that are written down, at moments of a virtual clock.

promtool only compares: it is given expectations that cannot be met, and says in its complaint what it saw instead. So
the real engine answers, with its own rules for gaps and staleness markers, and no server, port or disk of samples is
needed. Synchronous; for tests of rule files, never for the running sidecar.
"""

import ast
import json
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sidecar.core.errors import SourceError

PROGRAM: Final = "promtool"

TIMEOUT_SECONDS: Final = 120.0
"""Longest wait for one run: an hour of seconds with a few queries takes some ten."""

_BLOCK = re.compile(r"^ {4}expr: \"", re.MULTILINE)
_GOT = re.compile(r"^ {8}got: ?(.*)\Z", re.MULTILINE | re.DOTALL)
_ERROR = re.compile(r"\", time: [0-9a-z]+, err: (.*)\Z", re.DOTALL)
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)=("(?:[^"\\]|\\.)*")(?:, )?')
_VALUE = re.compile(r" ([-+0-9.eE]+|NaN|[-+]?Inf)(?:, |\Z)")


class PromtoolError(SourceError):
    """promtool cannot be run, or refuses the series, or answers in a way that is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One query at one moment, in milliseconds from the start."""

    expr: str
    at: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """What the engine said against a query."""

    message: str


Rows = list[dict[str, Any]]
"""A result as the HTTP API of Prometheus gives it: `{"metric": {...}, "value": [time, "1"]}`."""


def ask(
    series: Sequence[tuple[str, str]], interval: float, questions: Sequence[Question]
) -> tuple[Rows | Refusal, ...]:
    """Evaluate queries on series.

    Args:
        series: name with labels, and values, both in promtool's notation.
        interval: seconds between two values; the first is at 0.
        questions: no result may be empty, or promtool has nothing to complain of.

    Returns:
        One result for each question, in order.

    Raises:
        PromtoolError: promtool is not installed, did not finish, or refused the series.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise PromtoolError(f"{PROGRAM} is not installed, and tests with `metrics` need it; it comes with Prometheus")
    with tempfile.TemporaryDirectory(prefix="killswitch-rules-") as folder:
        file = Path(folder, "questions.yaml")
        file.write_text(
            json.dumps(_unit_test(series, interval, questions), ensure_ascii=False), "utf-8"
        )  # JSON is YAML
        said = _run(program, file)
    blocks = _BLOCK.split(said)[1:]
    if len(blocks) != len(questions):
        raise PromtoolError(f"{PROGRAM} refuses the series: {_complaint(said)}")
    return tuple(_result(block, question) for block, question in zip(blocks, questions, strict=True))


def _unit_test(series: Sequence[tuple[str, str]], interval: float, questions: Sequence[Question]) -> dict[str, Any]:
    return {
        "rule_files": [],
        # promtool loads samples up to whole multiples of this only: what lies between would not be there yet.
        "evaluation_interval": _finest(interval, questions),
        "tests": [
            {
                "interval": _duration(round(interval * 1000)),
                "input_series": [{"series": name, "values": values} for name, values in series],
                "promql_expr_test": [
                    {"expr": question.expr, "eval_time": _duration(question.at), "exp_samples": []}
                    for question in questions
                ],
            }
        ],
    }


def _finest(interval: float, questions: Sequence[Question]) -> str:
    return _duration(math.gcd(round(interval * 1000), *(question.at for question in questions)))


def _duration(milliseconds: int) -> str:
    return f"{milliseconds}ms"


def _run(program: str, file: Path) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - a fixed program, and a file of our own
            [program, "test", "rules", str(file)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PromtoolError(f"{PROGRAM} did not finish within {TIMEOUT_SECONDS:g} s; shorten the test") from None
    except OSError as error:
        raise PromtoolError(f"{program} cannot be run: {error.strerror or error}") from None
    return done.stdout + done.stderr


def _complaint(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("Unit Testing:")]
    return "; ".join(line for line in lines if line != "FAILED:")[:500] or "it says nothing"


def _result(block: str, question: Question) -> Rows | Refusal:
    block = block.rstrip()
    refused = _ERROR.search(block)
    got = _GOT.search(block)
    if got is None:
        if refused is None:
            raise PromtoolError(f"the answer of {PROGRAM} is not known: {block[-200:]!r}")
        return Refusal(message=refused[1])
    return list(_rows(got[1], question.at / 1000))


def _rows(text: str, seconds: float) -> Iterator[dict[str, Any]]:
    at = 0
    while at < len(text):
        labels: dict[str, str] = {}
        at = _expect(text, at, "{")
        while match := _LABEL.match(text, at):
            # Go and Python escape the same way in quotes.
            labels[match[1]] = ast.literal_eval(match[2])
            at = match.end()
        at = _expect(text, at, "}")
        value = _VALUE.match(text, at)
        if value is None:
            raise PromtoolError(f"the answer of {PROGRAM} is not known at {text[at : at + 80]!r}")
        at = value.end()
        yield {"metric": labels, "value": [seconds, value[1]]}


def _expect(text: str, at: int, sign: str) -> int:
    if text[at : at + 1] != sign:
        raise PromtoolError(f"the answer of {PROGRAM} has {text[at : at + 80]!r} where {sign!r} was wanted")
    return at + 1
