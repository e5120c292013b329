"""The simulated trader's book: repeatable, bounded, and exact about the loss it is told to make."""

import pytest

from sidecar.demo.book import LARGEST_ORDER, LARGEST_TARGET, Book, Order

pytestmark = pytest.mark.slow


def _traded(seed: int, steps: int) -> Book:
    book = Book(seed=seed)
    for _ in range(steps):
        book.step()
        order = book.next_order()
        if order is not None:
            book.fill(order)
    return book


def test_the_same_seed_gives_the_same_run() -> None:
    one, other, third = _traded(3, 500), _traded(3, 500), _traded(4, 500)
    assert (one.price, one.position, one.equity) == (other.price, other.position, other.equity)
    assert one.price != third.price


@pytest.mark.parametrize("seed", range(5))
def test_an_hour_of_trading_stays_far_from_every_limit(seed: int) -> None:
    book = Book(seed=seed)
    worst_drawdown = worst_day = 0.0
    for _ in range(3600 * 20):
        book.step()
        order = book.next_order()
        if order is not None:
            assert 1 <= order.quantity <= LARGEST_ORDER
            book.fill(order)
        assert abs(book.position) <= LARGEST_TARGET
        worst_drawdown, worst_day = min(worst_drawdown, book.drawdown), min(worst_day, book.daily_pnl)
    assert worst_drawdown > -0.04
    assert worst_day > -0.02


def test_a_fill_changes_the_position_and_not_the_worth() -> None:
    book = _traded(1, 100)
    before, position = book.equity, book.position
    book.fill(Order(side="sell", quantity=30))
    assert book.position == position - 30
    assert book.equity == pytest.approx(before)


@pytest.mark.parametrize("drawdown", [-0.18, -0.01, 0.0, -0.99])
def test_a_gap_makes_exactly_the_drawdown_that_was_asked_for(drawdown: float) -> None:
    book = _traded(2, 300)
    book.gap(-0.5)  # a second gap replaces the first, and does not add to it
    book.gap(drawdown)
    assert book.drawdown == pytest.approx(drawdown)


def test_a_loss_from_the_peak_is_a_loss_of_the_day_too() -> None:
    book = _traded(2, 300)
    book.gap(-0.18)
    assert book.daily_pnl == pytest.approx(-0.18, abs=0.02)


def test_the_market_comes_back_to_where_it_was() -> None:
    book = _traded(2, 300)
    before = book.equity
    book.gap(-0.18)
    book.close_gap()
    assert book.equity == pytest.approx(before)


@pytest.mark.parametrize("impossible", [0.1, -1.0, -2.0, float("nan"), float("inf")])
def test_a_drawdown_that_cannot_be_is_refused_and_changes_nothing(impossible: float) -> None:
    book = _traded(2, 300)
    before = book.equity
    with pytest.raises(ValueError, match="cannot be"):
        book.gap(impossible)
    assert book.equity == before
