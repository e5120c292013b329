"""Durations, sizes, numbers and switches as people write them."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.settings import quantities as q


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250ms", 0.25),
        ("5s", 5),
        ("1m30s", 90),
        ("24h", 86400),
        ("90d", 7776000),
        ("2w", 1209600),
        ("0", 0),
        ("0s", 0),
        ("1s500ms", 1.5),
        ("90s", 90),
    ],
)
def test_a_duration_is_read_as_seconds(text: str, seconds: float) -> None:
    assert q.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "5", "1.5s", "5 s", "s", "1s1m", "1s1s", "-1s", "1y", "5S", "1e3s", "٣s", "99999999w"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a duration|longer than"):
        q.parse_duration(text)


@given(st.integers(min_value=0, max_value=3_000_000_000_000))
def test_a_duration_survives_being_written_and_read(milliseconds: int) -> None:
    assert q.parse_duration(q.format_duration(milliseconds / 1000)) == milliseconds / 1000


@pytest.mark.parametrize(
    ("seconds", "text"), [(7776000, "90d"), (300, "5m"), (1209600, "2w"), (0, "0s"), (90.25, "1m30s250ms")]
)
def test_a_duration_is_written_as_people_would(seconds: float, text: str) -> None:
    assert q.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "size"), [("16MiB", 16 * 2**20), ("10MB", 10**7), ("1B", 1), ("0", 0), ("2GiB", 2**31)]
)
def test_a_size_is_read_as_bytes(text: str, size: int) -> None:
    assert q.parse_size(text) == size


@pytest.mark.parametrize("text", ["512", "1.5GiB", "1 MiB", "1mib", "-1B", "", "1M"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        q.parse_size(text)


@pytest.mark.parametrize(
    ("text", "number"), [("-0.15", -0.15), (".5", 0.5), ("1e3", 1000), ("+2", 2), ("010", 10), ("-.5", -0.5)]
)
def test_a_number_is_decimal(text: str, number: float) -> None:
    assert q.parse_number(text) == number


@pytest.mark.parametrize(
    "text", ["1_000", "1,000", "0x10", "nan", ".inf", "-Infinity", "1e999", "15%", "", "one", "٣", "9" * 99]
)
def test_what_is_no_finite_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a number|is not finite"):
        q.parse_number(text)


@pytest.mark.parametrize("text", ["1.0", "010", "1_0", "", "x", "1e3", "9" * 99])
def test_what_is_no_integer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a whole number"):
        q.parse_integer(text)


def test_a_decimal_keeps_every_digit_and_has_a_bound() -> None:
    assert q.parse_decimal("0.10") == Decimal("0.1")
    with pytest.raises(ValueError, match="beyond every position"):
        q.parse_decimal("1e99999999")


@pytest.mark.parametrize(("text", "flag"), [("true", True), ("ON", True), ("Yes", True), ("off", False), ("no", False)])
def test_a_flag_has_six_words(text: str, flag: bool) -> None:
    assert q.parse_flag(text) is flag


@pytest.mark.parametrize("text", ["1", "0", "y", "t", "", "maybe"])
def test_what_is_no_flag_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="neither true nor false"):
        q.parse_flag(text)
