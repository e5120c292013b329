"""Counts orders in a sliding window, so that a runaway bot is noticed within the very order that is one too many.

Knows no rule, no gate and no clock: the caller brings `now` and compares the count with the limit. Fixed windows would
let twice the limit pass across their border; this window slides with each order.
"""

from collections import deque
from math import isfinite


class OrderRateWindow:
    """The orders of the last `per` seconds.

    Counts are exact up to `max_orders`. Beyond it they say at least `max_orders + 1` and never more than the truth:
    what else came is forgotten, so that a flood of orders takes no memory. An order that is `per` seconds old has left.

    Args:
        max_orders: how many orders are allowed in a window; decides how much is remembered.
        per: length of the window in seconds.

    Raises:
        ValueError: a limit below 1, or a window that is not a positive number of seconds.
    """

    __slots__ = ("_batches", "_max_orders", "_now", "_per", "_total")

    def __init__(self, max_orders: int, per: float) -> None:
        if max_orders < 1:
            raise ValueError(f"max_orders is {max_orders!r}; it must be at least 1")
        if not (isfinite(per) and per > 0):
            raise ValueError(f"per is {per!r}; it must be a positive number of seconds")
        self._max_orders = max_orders
        self._per = per
        self._batches: deque[tuple[float, int]] = deque()
        self._total = 0
        self._now = float("-inf")

    def count(self, now_mono: float, orders: int = 1) -> int:
        """Add orders and say how many the window holds with them; amortised constant time.

        Args:
            now_mono: monotonic seconds; a moment before an earlier one counts as that one.
            orders: how many came together, as in a list; they all count, also those that the gate denies.

        Raises:
            ValueError: fewer than 0 orders, or a moment that is no finite number.
        """
        if orders < 0:
            raise ValueError(f"{orders!r} orders cannot be counted; it must be 0 or more")
        self._slide(now_mono)
        if orders:
            self._batches.append((self._now, orders))
            self._total += orders
            self._forget_surplus()
        return self._total

    def current(self, now_mono: float) -> int:
        """Say how many orders the window holds, without adding any.

        Raises:
            ValueError: a moment that is no finite number.
        """
        self._slide(now_mono)
        return self._total

    def _slide(self, now_mono: float) -> None:
        # NaN compares false with everything: the window would never empty, or never fill, from then on.
        if not isfinite(now_mono):
            raise ValueError(f"now is {now_mono!r}; it must be a finite number of seconds")
        self._now = max(self._now, now_mono)
        while self._batches and self._now - self._batches[0][0] >= self._per:
            self._drop_oldest()

    def _forget_surplus(self) -> None:
        # The newest orders stay longest: as long as they alone exceed the limit, the older ones change no verdict.
        while self._total - self._batches[0][1] > self._max_orders:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self._total -= self._batches.popleft()[1]
