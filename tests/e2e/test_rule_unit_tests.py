"""Unit tests of rules against the real promtool: the packs' own tests pass, and the notation means the same there."""

import random
import re
import shutil
from math import isnan
from pathlib import Path

import pytest
from click.testing import CliRunner

from sidecar.adapters.promtool import Question, Refusal, ask
from sidecar.app.rule_tests import run_rule_test
from sidecar.cli.main import killswitch
from sidecar.rules.notation import Word, expand
from sidecar.settings.rule_tests import load_rule_tests

pytestmark = pytest.mark.e2e

RULES = Path(__file__).parents[2] / "rules"
TEST_FILES = sorted(RULES.glob("*.test.yaml"))


@pytest.fixture(autouse=True)
def _promtool():
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")


def in_promtool(notation):
    """What promtool makes of a sequence: one number a step, `stale` where a marker stands, `_` where nothing does."""
    count = len(expand(notation))
    moments = [1000 * step for step in range(count)]
    # The clock beside it keeps a result from being empty; 999 ms look back over exactly one step.
    clock = 'label_replace(vector(time()), "clock", "1", "", "")'
    own = [Question(expr=f"last_over_time(x[999ms]) or {clock}", at=at) for at in moments]
    newest = [Question(expr=f"x or {clock}", at=at) for at in moments]
    results = ask([("x", notation)], 1.0, [*own, *newest])
    values = [_number(result) for result in results]
    return [
        value if value is not None else (Word.STALE if latest is None else Word.MISSING)
        for value, latest in zip(values[:count], values[count:], strict=True)
    ]


def _number(result):
    assert not isinstance(result, Refusal), result
    numbers = [float(row["value"][1]) for row in result if "clock" not in row["metric"]]
    return numbers[0] if numbers else None


def same(ours, theirs):
    return ours == theirs or (isinstance(ours, float) and isinstance(theirs, float) and isnan(ours) and isnan(theirs))


@pytest.mark.parametrize(
    "notation",
    [
        "-0.01x5 -0.16",
        "1 _ 2 _x3 3 stale 4",
        "-2+4x3 1-2x4 1x0",
        "0x3 .5 1. +7 1e3 1E-2x1",
        "0+0.1x20 1-0.3x7",
        "NaN 1 Inf -Inf nan +inf",
        "3 stale stale",
    ],
)
def test_a_sequence_means_the_same_in_promtool(notation):
    ours, theirs = expand(notation), in_promtool(notation)
    # After a marker, nothing and another marker look alike to a query.
    seen = [
        Word.STALE if value is Word.MISSING and _is_gone(ours[:index]) else value for index, value in enumerate(ours)
    ]
    assert all(map(same, seen, theirs)), (ours, theirs)


def _is_gone(before):
    newest = next((value for value in reversed(before) if value is not Word.MISSING), Word.STALE)
    return newest is Word.STALE


def test_random_sequences_mean_the_same_in_promtool():
    choose = random.Random(7)
    items = [
        f"{choose.uniform(-9, 9):.3g}{choose.choice('+-')}{choose.uniform(0, 2):.4g}x{choose.randrange(6)}"
        for _ in range(30)
    ]
    notation = " ".join(items)
    assert list(expand(notation)) == in_promtool(notation)


@pytest.mark.parametrize("notation", ["010", "1+1", "0x1F", "gone", "1x", "1x-3", "_+1x3", "1,2"])
def test_what_is_refused_here_is_refused_or_read_otherwise_there(notation):
    with pytest.raises(ValueError, match="no value"):
        expand(notation)
    if notation != "010":  # octal there
        with pytest.raises(Exception, match="refuses the series"):
            ask([("x", notation)], 1.0, [Question(expr="vector(1)", at=0)])


def test_the_tests_of_all_packs_pass():
    result = CliRunner().invoke(killswitch, ["rules", "test", *map(str, TEST_FILES)])
    assert result.exit_code == 0, result.output
    assert result.output.count(" passed") == len(TEST_FILES) >= 6
    assert "failed" not in result.output


# The smallest changes that a person might make to a rule without meaning to.
MISTAKES = [
    ("threshold", r"threshold: (-?[0-9.]+)", lambda match: f"threshold: {float(match[1]) * 1.5 or 9:g}"),
    ("missed", r"max_missed: 3", lambda match: "max_missed: 9"),
    ("failures", r"max_consecutive_failures: 3", lambda match: "max_consecutive_failures: 4"),
    ("orders", r"max_orders: (\d+)", lambda match: f"max_orders: {match[1]}0"),
    ("action", r"^(        )action: (kill|halt|reduce_only)", lambda match: f"{match[1]}action: warn"),
    ("clear", r"^        clear: .*\n", lambda match: ""),
    ("for", r"^        for: .*\n", lambda match: ""),
    ("hold", r"hold_for: 30s", lambda match: "hold_for: 50s"),
    ("steps", r"^ +- \{at: \d+%, action: (throttle|reduce_only).*\n", lambda match: ""),
    ("keep", r"^        keep_firing_for: .*\n", lambda match: ""),
]


@pytest.mark.parametrize("pack", TEST_FILES, ids=lambda path: path.name.removesuffix(".test.yaml"))
def test_a_changed_rule_does_not_pass_its_tests(pack, tmp_path):
    rules = pack.with_name(pack.name.replace(".test", ""))
    text = rules.read_text()
    (tmp_path / pack.name).write_text(pack.read_text())
    changed = tmp_path / rules.name
    unnoticed, tried = [], 0
    for name, pattern, change in MISTAKES:
        for match in re.finditer(pattern, text, re.MULTILINE):
            changed.write_text(text[: match.start()] + change(match) + text[match.end() :])
            try:
                tests = load_rule_tests(tmp_path / pack.name).tests
            except Exception:  # noqa: BLE001 - the changed file is refused, which is better still
                continue
            tried += 1
            quickest_first = sorted(tests, key=lambda test: len(test.measured))
            if all(run_rule_test(test).passed for test in quickest_first):
                line = text.count("\n", 0, match.start()) + 1
                unnoticed.append(f"{rules.name}:{line}: {name}")
    assert tried >= 3
    assert not unnoticed
