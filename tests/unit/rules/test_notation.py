"""promtool's notation of values over time, and the words beside it."""

from math import isnan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.rules.notation import MOST_VALUES, Word, expand


@pytest.mark.parametrize(
    ("notation", "values"),
    [
        ("1", [1]),
        ("-0.01x5 -0.16", [-0.01] * 6 + [-0.16]),
        ("1x4", [1, 1, 1, 1, 1]),
        ("1x0", [1]),
        ("0x2", [0, 0, 0]),
        ("-2+4x3", [-2, 2, 6, 10]),
        ("1-2x4", [1, -1, -3, -5, -7]),
        ("1 _x3 stale", [1, "_", "_", "_", "stale"]),
        ("_", ["_"]),
        ("_x0 1", [1]),
        ("  1\n\t2 ", [1, 2]),
        ("+1 .5 1. 1e3 1E-2x1", [1, 0.5, 1, 1000, 0.01, 0.01]),
        ("Inf -inf +INF", [float("inf"), float("-inf"), float("inf")]),
        ("unreachablex2 failed partial stalex1", ["unreachable"] * 3 + ["failed", "partial", "stale", "stale"]),
    ],
)
def test_a_sequence_expands_as_promtool_expands_it(notation, values):
    assert list(expand(notation)) == values


def test_nan_is_a_value():
    (value,) = expand("nan")
    assert isinstance(value, float)
    assert isnan(value)


def test_steps_are_added_up_one_by_one():
    assert expand("0+0.1x3")[3] == 0.1 + 0.1 + 0.1 != 0.3


@pytest.mark.parametrize(
    ("notation", "complaint"),
    [
        ("", "holds no value"),
        ("_x0", "holds no value"),
        ("1, 2", "parted by blanks"),
        ("010", "octal"),
        ("1+1", "'1+1' is no value"),
        ("0x1F", "'0x1F' is no value"),
        ("gone", "'gone' is no value"),
        ("1x", "'1x' is no value"),
        ("1x-3", "'1x-3' is no value"),
        ("_+1x3", "no value"),
        ("1e", "no value"),
        ("1x999999999", f"more than {MOST_VALUES} values"),
        ("1x60000 1x60000", f"more than {MOST_VALUES} values"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(notation, complaint):
    with pytest.raises(ValueError, match=complaint.replace("+", r"\+")):
        expand(notation)


@given(
    st.lists(
        st.one_of(
            st.sampled_from(list(Word)),
            st.floats(allow_nan=False, allow_infinity=False, width=32).map(lambda x: round(x, 3)),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_what_is_written_out_reads_as_itself(values):
    assert list(expand(" ".join(str(value) for value in values))) == values
