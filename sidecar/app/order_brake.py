"""The runaway brake: counts questions about new orders at the gate, and lets its rules decide within the very question.

Works on the loop, in the turn of the request: when a rule fires here, the gate answers this question from the snapshot
that the kill has just made.
"""

from sidecar.app.clock import Clock
from sidecar.app.evaluation import Evaluator
from sidecar.core.order_rate import OrderRateWindow
from sidecar.core.snapshot import Reason
from sidecar.rules.model import OrderRate, Rule, RuleSet
from sidecar.rules.readings import Answer, Failure, Series
from sidecar.rules.triggers import Status


class OrderBrake:
    """Keeps one sliding window for each `order_rate` rule."""

    def __init__(self, *, evaluator: Evaluator, clock: Clock) -> None:
        self._evaluator = evaluator
        self._clock = clock
        self._rules: list[tuple[Rule, OrderRateWindow]] = []

    def load(self, rules: RuleSet) -> None:
        """Take over a rule set; a window whose rule kept its limit keeps its count."""
        known = {(rule.trigger, rule.condition): window for rule, window in self._rules}
        self._rules = [
            (rule, known.get((rule.trigger, rule.condition)) or _window(rule.condition))
            for rule in rules.rules
            if rule.enabled and isinstance(rule.condition, OrderRate)
        ]

    @property
    def counts(self) -> bool:
        """Whether any rule wants orders counted; where none does, the gate need not ask."""
        return bool(self._rules)

    def admit(self, intent: str) -> Reason | None:
        """Count one `new` or `replace` question; the rules act through the switch, so there is no reason of our own."""
        del intent  # both count alike
        now = self._clock.now().mono
        for rule, window in self._rules:
            beyond = window.count(now) > _limit(rule)
            if beyond and self._evaluator.triggers[rule.trigger].status is not Status.FIRING:
                self._evaluator.receive(rule, self._answer(window))
        return None

    async def probe(self, rule: Rule) -> Answer | Failure:
        """Answer a rule at its group's turn, so that it also clears."""
        window = next((window for own, window in self._rules if own.trigger == rule.trigger), None)
        if window is None:
            return Failure(reason="query_error", message=f"{rule.trigger!r} is not counted", unreachable=False)
        return self._answer(window)

    def _answer(self, window: OrderRateWindow) -> Answer:
        now = self._clock.now()
        count = float(window.current(now.mono))
        return Answer(series=(Series(value=count),), evaluated_at=now.wall, oldest_sample=now.wall)


def _window(condition: OrderRate) -> OrderRateWindow:
    return OrderRateWindow(condition.max_orders, condition.per)


def _limit(rule: Rule) -> int:
    return rule.condition.max_orders if isinstance(rule.condition, OrderRate) else 0
