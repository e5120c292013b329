"""What a person writes in a rule file, after it was checked: frozen, complete, in seconds and absolute values.

Knows no YAML and no source; `sidecar.settings` builds these, `sidecar.rules.triggers` evaluates them.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, assert_never

from sidecar.core.states import Action


class Operator(StrEnum):
    """How a value is compared with a threshold."""

    LT = "lt"
    LE = "le"
    GT = "gt"
    GE = "ge"
    EQ = "eq"
    NE = "ne"

    def holds(self, value: float, threshold: float) -> bool:
        """Whether `value operator threshold` is true; any comparison with NaN but `ne` is false, as in PromQL."""
        match self:
            case Operator.LT:
                return value < threshold
            case Operator.LE:
                return value <= threshold
            case Operator.GT:
                return value > threshold
            case Operator.GE:
                return value >= threshold
            case Operator.EQ:
                return value == threshold
            case Operator.NE:
                return value != threshold
            case _:
                assert_never(self)

    @property
    def symbol(self) -> str:
        """The sign, for messages."""
        return _SYMBOLS[self]

    @property
    def points_down(self) -> bool:
        """True for `lt` and `le`: the smaller the value, the worse."""
        return self in (Operator.LT, Operator.LE)

    @property
    def points_up(self) -> bool:
        """True for `gt` and `ge`: the larger the value, the worse."""
        return self in (Operator.GT, Operator.GE)

    def points_away_from_zero(self, threshold: float) -> bool:
        """Whether value ÷ threshold grows as things get worse, so that "75 % of the limit" means something."""
        return (self.points_down and threshold < 0) or (self.points_up and threshold > 0)

    def worst(self, values: list[float], threshold: float) -> float:
        """The value to show for several: the one nearest to, or farthest beyond, the threshold."""
        if self.points_down:
            return min(values)
        if self.points_up:
            return max(values)
        return next((value for value in values if self.holds(value, threshold)), values[0])


_SYMBOLS = {
    Operator.LT: "<",
    Operator.LE: "<=",
    Operator.GT: ">",
    Operator.GE: ">=",
    Operator.EQ: "==",
    Operator.NE: "!=",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A milder answer on the way to the threshold.

    Attributes:
        at: absolute value from which on the step holds; compared with the rule's own operator, or equal.
        fraction: the part of the threshold that was written (0.75 for `75%`), None where `at` was written as a value.
        action: what it asks for; never stricter than the rule's own action.
        factor: position limit factor of a throttle, else None.
    """

    at: float
    fraction: float | None = None
    action: Action
    factor: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OnNoData:
    """What a rule does when it cannot see.

    Attributes:
        hold_for: seconds of blindness before anything is done.
        then: for readings of a source that answers, but with nothing usable.
        unreachable: for a source that does not answer at all.
        factor: position limit factor where one of the two is a throttle.
    """

    hold_for: float = 60.0
    then: Action = Action.KILL
    unreachable: Action = Action.HALT
    factor: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold:
    """Fires when any returned series satisfies `operator threshold`; clears only from `clear` on, where given."""

    query: str
    operator: Operator
    threshold: float
    clear: float | None = None
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Expression:
    """Fires when an alert-style PromQL expression returns any series."""

    expr: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """Fires when the newest beat (Unix seconds) is older than `interval` × `max_missed` seconds."""

    query: str
    interval: float = 60.0
    max_missed: int = 3

    @property
    def limit(self) -> float:
        """Age in seconds beyond which the beat is missed."""
        return self.interval * self.max_missed


@dataclass(frozen=True, kw_only=True, slots=True)
class Watchdog:
    """Fires when memory or CPU of its target stays over a limit for all of `window` seconds.

    Attributes:
        target: `container`, `host` or `process:<name>`.
        memory_percent: of the target's memory limit (of the host's memory where it has none); None does not look at it.
        cpu_percent: of the target's CPU limit (of all cores where it has none); None does not look at it.
        window: seconds that CPU use is averaged over.
        cgroup: folder of the cgroup to look at instead of the sidecar's own; None for its own.
    """

    target: str = "container"
    memory_percent: float | None = 90.0
    cpu_percent: float | None = 95.0
    window: float = 30.0
    cgroup: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Connectivity:
    """Fires after `max_consecutive_failures` failures in a row of a probe, or of a query whose value must be 1.

    Exactly one of `tcp` (`host:port`), `http` (a URL) and `query` is set.
    """

    tcp: str | None = None
    http: str | None = None
    query: str | None = None
    interval: float = 30.0
    timeout: float = 5.0
    max_consecutive_failures: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class AlertMatch:
    """Fires while an alert that matches all of `match` (Alertmanager matcher syntax) is firing."""

    match: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderRate:
    """Fires on more than `max_orders` new or replaced orders within `per` seconds."""

    max_orders: int = 100
    per: float = 1.0


Condition = Threshold | Expression | Heartbeat | Watchdog | Connectivity | AlertMatch | OrderRate

KINDS: MappingProxyType[str, type[Any]] = MappingProxyType(
    {
        "threshold": Threshold,
        "expression": Expression,
        "heartbeat": Heartbeat,
        "watchdog": Watchdog,
        "connectivity": Connectivity,
        "alertmanager": AlertMatch,
        "order_rate": OrderRate,
    }
)
"""Rule types by the name that stands in a rule file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One trigger rule.

    Attributes:
        trigger: its name, unique in all rule files.
        group: the group it stands in; rules of a group are evaluated together.
        condition: what makes it fire.
        action, factor: what it then asks for; the factor belongs to a throttle.
        for_, keep_firing_for: seconds, as in Prometheus' alerting rules.
        max_age: seconds; an older sample is stale.
        on_no_data: what it does when it cannot see.
        cooldown: seconds in which the same firing is not reported again; never delays the action.
        series: how many series the query must return; None takes any number above zero.
        source: `prometheus` or `scrape:<name>`.
        enabled: False takes the rule out of evaluation.
        shadow: True evaluates and reports, but never acts.
        labels, annotations: carried into reports.
        origin: file and line it came from.
    """

    trigger: str
    group: str
    condition: Condition
    action: Action = Action.KILL
    factor: float | None = None
    for_: float = 0.0
    keep_firing_for: float = 0.0
    max_age: float = 60.0
    on_no_data: OnNoData = field(default_factory=OnNoData)
    cooldown: float = 0.0
    series: int | None = None
    source: str = "prometheus"
    enabled: bool = True
    shadow: bool = False
    labels: tuple[tuple[str, str], ...] = ()
    annotations: tuple[tuple[str, str], ...] = ()
    origin: str = ""

    @property
    def kind(self) -> str:
        """The rule type as written in rule files."""
        return next(name for name, kind in KINDS.items() if isinstance(self.condition, kind))

    @property
    def query(self) -> str | None:
        """The PromQL text (or scrape selector) to ask; None for rules that look elsewhere."""
        match self.condition:
            case Threshold() | Heartbeat() | Connectivity():
                return self.condition.query
            case Expression():
                return self.condition.expr
            case _:
                return None

    @property
    def can_restrict(self) -> bool:
        """Whether any of its actions does more than report."""
        actions = [self.action, self.on_no_data.then, self.on_no_data.unreachable]
        if isinstance(self.condition, Threshold):
            actions += [step.action for step in self.condition.steps]
        return max(actions) > Action.WARN

    @property
    def enforcing(self) -> bool:
        """Whether the gate depends on it: enabled, not in shadow, and able to do more than report."""
        return self.enabled and not self.shadow and self.can_restrict


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Rules that are evaluated together every `interval` seconds."""

    name: str
    interval: float
    rules: tuple[Rule, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleSet:
    """All rules of all files, as one consistent whole.

    Attributes:
        groups: in file order.
        content_hash: SHA-256 hex of what was read, to notice a change.
        files: the paths that were read.
    """

    groups: tuple[Group, ...] = ()
    content_hash: str = ""
    files: tuple[str, ...] = ()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Every rule, in order of groups."""
        return tuple(rule for group in self.groups for rule in group.rules)
