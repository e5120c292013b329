"""The simulated trader's book: a seeded price, a position, what it is worth, and the next order.

Pure: no clock, no gate, no metrics. It stands for somebody's trading code, so it knows nothing of kill switches.
"""

import random
from dataclasses import dataclass
from typing import Final, Literal

CAPITAL: Final = 100_000.0
START_PRICE: Final = 100.0
LARGEST_TARGET: Final = 950
"""Below the position limit of the demo, and above three quarters of it, so that each restart step is felt."""
LARGEST_ORDER: Final = 40
_STEPS_PER_TARGET: Final = 30
_VOLATILITY: Final = 0.00003
_PULL: Final = 0.001
"""How strongly the price is drawn back to its start, so that a long run does not lose money by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """A new order: `quantity` is above 0."""

    side: Literal["buy", "sell"]
    quantity: int

    @property
    def signed(self) -> int:
        """What a fill adds to the position."""
        return self.quantity if self.side == "buy" else -self.quantity


class Book:
    """One instrument, traded towards targets that change at random.

    Attributes:
        position: signed; starts flat.
        price: of one unit.
    """

    def __init__(self, *, seed: int) -> None:
        self.position = 0
        self.price = START_PRICE
        self._random = random.Random(seed)  # noqa: S311 - a repeatable price, not a secret
        self._cash = CAPITAL
        self._gap = 0.0
        self._peak = CAPITAL
        self._target = 0
        self._steps = 0

    @property
    def equity(self) -> float:
        """What the book is worth now, in money."""
        return self._cash + self.position * self.price - self._gap

    @property
    def drawdown(self) -> float:
        """Loss from the highest equity, as a ratio: 0 at the peak, -0.10 when 10 % below it."""
        return self.equity / self._peak - 1.0

    @property
    def daily_pnl(self) -> float:
        """Profit and loss of the day over the equity at its start, as a ratio; losses are negative."""
        return self.equity / CAPITAL - 1.0

    def step(self) -> None:
        """Let the price move once."""
        pull = _PULL * (START_PRICE - self.price)
        self.price += pull + self.price * self._random.gauss(0.0, _VOLATILITY)
        self._peak = max(self._peak, self.equity)

    def next_order(self) -> Order | None:
        """The order that brings the position nearer to its target; None once it is there."""
        if self._steps % _STEPS_PER_TARGET == 0:
            self._target = self._random.randint(-LARGEST_TARGET, LARGEST_TARGET)
        self._steps += 1
        missing = self._target - self.position
        if missing == 0:
            return None
        quantity = min(abs(missing), self._random.randint(1, LARGEST_ORDER))
        return Order(side="buy" if missing > 0 else "sell", quantity=quantity)

    def fill(self, order: Order) -> None:
        """Take a filled order into the book, at the present price."""
        self.position += order.signed
        self._cash -= order.signed * self.price

    def gap(self, drawdown: float) -> None:
        """Mark the book down at once, as a gap in the market would, until its drawdown is this ratio.

        Raises:
            ValueError: not between -1 and 0.
        """
        if not -1.0 < drawdown <= 0.0:
            raise ValueError(f"a drawdown of {drawdown!r} cannot be: wanted a ratio from 0 down to, but not, -1")
        self._gap = self.equity + self._gap - self._peak * (1.0 + drawdown)

    def close_gap(self) -> None:
        """Let the market come back to where it was."""
        self._gap = 0.0
