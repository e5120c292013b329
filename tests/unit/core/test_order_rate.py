"""The window slides, forgets nothing that matters, and remembers no more than it must."""

from collections.abc import Iterator
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.order_rate import OrderRateWindow

STEPS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.0, 0.125, 0.25, 0.5, 1.0, 3.0]), st.integers(0, 7), st.booleans()), max_size=80
)


def _moments(steps: list[tuple[float, int, bool]]) -> Iterator[tuple[float, int, bool]]:
    times = accumulate(gap for gap, _, _ in steps)
    for now, (_, orders, only_looks) in zip(times, steps, strict=True):
        yield now, orders, only_looks


@given(max_orders=st.integers(1, 12), per=st.sampled_from([0.25, 0.5, 1.0, 2.5]), steps=STEPS)
def test_the_window_agrees_with_a_list_of_all_orders(
    max_orders: int, per: float, steps: list[tuple[float, int, bool]]
) -> None:
    window = OrderRateWindow(max_orders, per)
    seen: list[float] = []
    for now, orders, only_looks in _moments(steps):
        if only_looks:
            said = window.current(now)
        else:
            said = window.count(now, orders)
            seen += [now] * orders
        truth = sum(1 for time in seen if now - time < per)
        assert (said > max_orders) == (truth > max_orders)
        assert said <= truth
        if truth <= max_orders:
            assert said == truth


@given(max_orders=st.integers(1, 12), steps=STEPS)
def test_the_window_never_remembers_more_batches_than_the_limit_and_one(
    max_orders: int, steps: list[tuple[float, int, bool]]
) -> None:
    window = OrderRateWindow(max_orders, 1.0)
    for now, orders, _ in _moments(steps):
        window.count(now, orders)
        assert len(window._batches) <= max_orders + 1


def test_a_burst_across_the_border_of_two_seconds_is_seen() -> None:
    window = OrderRateWindow(100, 1.0)
    window.count(0.95, 60)
    assert window.count(1.05, 60) == 120


def test_an_order_leaves_the_window_when_it_is_as_old_as_the_window_is_long() -> None:
    window = OrderRateWindow(10, 1.0)
    window.count(5.0)
    assert window.current(5.999) == 1
    assert window.current(6.0) == 0


def test_a_list_larger_than_the_limit_counts_in_full() -> None:
    assert OrderRateWindow(3, 1.0).count(0.0, 1000) == 1000


def test_a_flood_stays_over_the_limit_until_it_has_ended_for_a_whole_window() -> None:
    window = OrderRateWindow(10, 1.0)
    for step in range(1000):
        window.count(step / 1000)
    assert window.current(0.999) == 11
    assert window.current(1.990) == 9
    assert window.current(1.999) == 0


def test_looking_adds_no_order() -> None:
    window = OrderRateWindow(10, 1.0)
    window.count(0.0, 4)
    assert [window.current(0.1), window.current(0.1), window.count(0.1, 0)] == [4, 4, 4]


def test_a_clock_that_goes_back_neither_empties_the_window_nor_prolongs_it() -> None:
    window = OrderRateWindow(10, 1.0)
    window.count(100.0, 5)
    assert window.count(50.0) == 6
    assert window.current(100.999) == 6
    assert window.current(101.0) == 0


@pytest.mark.parametrize(
    ("max_orders", "per"), [(0, 1.0), (-1, 1.0), (1, 0.0), (1, -1.0), (1, float("nan")), (1, float("inf"))]
)
def test_a_limit_that_means_nothing_is_refused(max_orders: int, per: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        OrderRateWindow(max_orders, per)


def test_fewer_than_no_orders_are_refused_and_change_nothing() -> None:
    window = OrderRateWindow(10, 1.0)
    window.count(0.0, 3)
    with pytest.raises(ValueError, match="-1 orders"):
        window.count(0.0, -1)
    assert window.current(0.0) == 3


@pytest.mark.parametrize("now", [float("nan"), float("inf"), float("-inf")])
def test_a_moment_that_is_no_number_is_refused_and_does_not_blind_the_window(now: float) -> None:
    window = OrderRateWindow(10, 1.0)
    window.count(0.0, 3)
    with pytest.raises(ValueError, match="finite"):
        window.count(now)
    with pytest.raises(ValueError, match="finite"):
        window.current(now)
    assert window.current(0.5) == 3
