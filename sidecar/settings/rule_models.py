"""The rule file as it is written: groups, the keys of every rule type, their defaults, and what must fit together.

The documentation and the schema for editors are drawn from these classes; `build` makes of them the rules that are
evaluated. Cross-checks between rules and files are not here.
"""

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, WrapValidator

from sidecar.core.states import Action
from sidecar.rules.model import (
    AlertMatch,
    Condition,
    Connectivity,
    Expression,
    Heartbeat,
    OnNoData,
    OrderRate,
    Rule,
    Step,
    Threshold,
    Watchdog,
)
from sidecar.settings import promql
from sidecar.settings.fields import (
    URL,
    ActionWord,
    Address,
    Comparison,
    Count,
    Duration,
    FilePath,
    Flag,
    Interval,
    Labels,
    MatcherText,
    Misfit,
    Misfits,
    Number,
    Percentage,
    PositiveDuration,
    Section,
    Text,
    ThrottleFactor,
    check_query,
    from_text,
    json_text,
    mapping,
    seconds,
    shown,
    suggestion,
    taken_names,
    text,
)
from sidecar.settings.quantities import format_duration, parse_number

_TRIGGER = re.compile(r"[a-zA-Z_][a-zA-Z0-9_.:\-]*")
_PROCESS = re.compile(r"process:\S.*")
_LONGEST_PROBE_TIMEOUT = 5.0  # seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleContext:
    """What a rule must be checked against beside itself: the names of the scrape targets."""

    scrape_names: frozenset[str] = frozenset()


def _trigger(value: str) -> str:
    if not _TRIGGER.fullmatch(value) or len(value) > 128:
        raise ValueError(
            f"{value!r} is not a trigger name; use letters, digits and _ . : -, at most 128, and begin with a letter"
        )
    return value


TriggerName = Annotated[str, from_text(_trigger), json_text("name", _TRIGGER.pattern)]


def _source(value: Any, info: ValidationInfo) -> str:
    source = text(value)
    if source == "prometheus":
        return source
    context = info.context or RuleContext()
    kind, colon, name = source.partition(":")
    if kind != "scrape" or not colon:
        raise ValueError(f"{source!r} is not a source; write prometheus or scrape:<name>")
    if name not in context.scrape_names:
        names = ", ".join(sorted(context.scrape_names)) or "none"
        raise ValueError(f"{source!r} names no scrape target of the configuration; there are: {names}")
    return source


def _rule_query(value: Any, info: ValidationInfo) -> str:
    query = text(value)
    source = info.data.get("source")
    if source == "prometheus":
        return check_query(query)
    if source is not None:
        try:
            promql.parse_selector(query)
        except promql.PromQLError as error:
            raise ValueError(str(error)) from None
    return query  # of a source that is wrong itself nobody knows the language


Source = Annotated[str, BeforeValidator(_source), json_text("source", r"prometheus|scrape:.+")]
RuleQuery = Annotated[str, BeforeValidator(_rule_query), json_text("PromQL")]


@dataclass(frozen=True, kw_only=True, slots=True)
class _At:
    """Where a step begins: a value, or a fraction of the threshold."""

    value: float
    is_fraction: bool


def _at(value: str) -> _At:
    number = parse_number(value.removesuffix("%").rstrip())
    if not value.endswith("%"):
        return _At(value=number, is_fraction=False)
    if not 0 < number < 100:
        raise ValueError(f"must lie between 0% and 100% of the threshold, not {value}")
    return _At(value=number / 100, is_fraction=True)


class StepSection(Section):
    """A milder answer on the way to the threshold."""

    at: Annotated[_At, from_text(_at), json_text("percent or number", type=["string", "number"])] = Field(
        description="Part of the threshold, `50%`, where the operator points away from zero; else a value."
    )
    action: ActionWord = Field(description="Never stricter than the rule's own.")
    factor: ThrottleFactor | None = Field(default=None, description="Position limit factor of a throttle.")

    def misfits(self) -> Iterator[Misfit]:
        """A throttle says how much is left."""
        yield from _factor_misfits(self.factor, is_throttle=self.action is Action.THROTTLE)


def _factor_misfits(factor: float | None, *, is_throttle: bool) -> Iterator[Misfit]:
    if is_throttle and factor is None:
        yield ("factor",), "is required with throttle: the part of the position limits that is left, 0.5 for half"
    if not is_throttle and factor is not None:
        yield ("factor",), "belongs to throttle, which is not among the actions here"


class NoDataSection(Section):
    """What a rule does when it cannot see."""

    hold_for: Duration = seconds("60s", "Blindness that is put up with.")
    then: ActionWord | None = shown(
        None, "kill", "For a source that answers with nothing usable. `warn` by default where the rule's action is."
    )
    unreachable: ActionWord | None = shown(
        None, "halt", "For a source that does not answer at all. `warn` by default where the rule's action is."
    )
    factor: ThrottleFactor | None = Field(default=None, description="Position limit factor of a throttle.")

    def misfits(self) -> Iterator[Misfit]:
        """A throttle says how much is left."""
        yield from _factor_misfits(self.factor, is_throttle=Action.THROTTLE in (self.then, self.unreachable))

    def build(self, action: Action) -> OnNoData:
        """Fill in what depends on the rule's action: a rule that only reports must not stop trading by being blind."""
        only_reports = action is Action.WARN
        return OnNoData(
            hold_for=self.hold_for,
            then=_or(self.then, Action.WARN if only_reports else Action.KILL),
            unreachable=_or(self.unreachable, Action.WARN if only_reports else Action.HALT),
            factor=self.factor,
        )


def _or(written: Action | None, default: Action) -> Action:
    return default if written is None else written


class RuleSection(Section):
    """What every rule type has."""

    trigger: TriggerName = Field(description="Name, unique in all rule files.")
    type: str = Field(description="Rule type; decides which further keys there are.")
    action: ActionWord = shown(Action.KILL, "kill", "What it asks for when it fires.")
    factor: ThrottleFactor | None = Field(default=None, description="Position limit factor of a throttle.")
    for_: Duration = seconds("0s", "The condition must hold this long before the rule fires.", alias="for")
    keep_firing_for: Duration = seconds("0s", "It keeps firing this long after the condition ended.")
    max_age: PositiveDuration = seconds("60s", "An older sample is stale; at least twice the scrape interval.")
    on_no_data: NoDataSection = Field(default_factory=NoDataSection, description="What it does when it cannot see.")
    cooldown: Duration = seconds("0s", "The same firing is not reported again within this; never delays the action.")
    enabled: Flag = Field(default=True, description="`false` takes the rule out of evaluation.")
    shadow: Flag = Field(default=False, description="`true` evaluates and reports, but never acts.")
    labels: Labels = Field(default={}, description="Carried into reports.")
    annotations: Labels = Field(
        default={}, description="Carried into reports; `{{ value }}` and `{{ threshold }}` are filled in."
    )

    @classmethod
    def explain_stranger(cls, key: str) -> str:
        """Say to which rule types a key belongs, if to any."""
        owners = [name for name, model in MODELS.items() if key in frozenset(model.keys())]
        if owners:
            noun = "type" if len(owners) == 1 else "types"
            return f"belongs to rules of {noun} {', '.join(owners)}, not {cls.kind()}"
        return f"unknown key{suggestion(key, cls.keys())}"

    @classmethod
    def kind(cls) -> str:
        """The rule type as it is written."""
        return next(name for name, model in MODELS.items() if model is cls)

    def misfits(self) -> Iterator[Misfit]:
        """A throttle says how much is left."""
        yield from _factor_misfits(self.factor, is_throttle=self.action is Action.THROTTLE)

    @abstractmethod
    def condition(self) -> Condition:
        """What makes the rule fire."""

    def build(self, *, group: str, origin: str) -> Rule:
        """Make the rule that is evaluated."""
        return Rule(
            trigger=self.trigger,
            group=group,
            condition=self.condition(),
            action=self.action,
            factor=self.factor,
            for_=self.for_,
            keep_firing_for=self.keep_firing_for,
            max_age=self.max_age,
            on_no_data=self.on_no_data.build(self.action),
            cooldown=self.cooldown,
            enabled=self.enabled,
            shadow=self.shadow,
            labels=tuple(self.labels.items()),
            annotations=tuple(self.annotations.items()),
            origin=origin,
        )


class QueryRuleSection(RuleSection):
    """What rules that ask a source have beside it."""

    source: Source = Field(
        default="prometheus",
        description="`prometheus`, or `scrape:<name>`: then the query is a selector, optionally inside `min()`, "
        "`max()` or `sum()`.",
    )
    series: Count | None = Field(
        default=None, description="How many series the query must return; another count is ambiguous."
    )

    def build(self, *, group: str, origin: str) -> Rule:
        """Make the rule that is evaluated."""
        return replace(super().build(group=group, origin=origin), source=self.source, series=self.series)


class ThresholdSection(QueryRuleSection):
    """Fires when any returned series satisfies `operator threshold`."""

    type: Literal["threshold"] = Field(description="Rule type.")
    query: RuleQuery = Field(description="PromQL.")
    operator: Comparison = Field(description="`lt le gt ge eq ne`, or `< <= > >= == !=` in quotes.")
    threshold: Number = Field(description="Ratios, not percent: -0.15 is a loss of 15 %.")
    clear: Number | None = Field(default=None, description="Hysteresis: the rule clears only from here on.")
    steps: tuple[StepSection, ...] = Field(default=(), description="Milder answers on the way to the threshold.")

    def misfits(self) -> Iterator[Misfit]:
        """Hysteresis and steps lie on the safe side of the threshold."""
        yield from super().misfits()
        directed = self.operator.points_down or self.operator.points_up
        if self.clear is not None:
            yield from self._clear_misfits(self.clear, directed=directed)
        if self.steps and not directed:
            yield ("steps",), f"need an operator with a direction, not {self.operator.value}"
            return
        first: dict[float, int] = {}
        for index, step in enumerate(self.steps):
            for path, reason in self._step_misfits(step):
                yield ("steps", index, *path), reason
            at = self._absolute(step)
            if first.setdefault(at, index) != index:
                yield ("steps", index, "at"), f"begins where steps[{first[at]}] does, at {at:g}"

    def _clear_misfits(self, clear: float, *, directed: bool) -> Iterator[Misfit]:
        if not directed:
            yield ("clear",), f"needs an operator with a direction, not {self.operator.value}"
        elif self.operator.holds(clear, self.threshold):
            yield ("clear",), f"{clear:g} is not on the safe side: {self._breach()} fires the rule"

    def _step_misfits(self, step: StepSection) -> Iterator[Misfit]:
        if step.action > self.action:
            yield ("action",), f"{step.action.label} is stricter than the rule's own {self.action.label}"
        at = self._absolute(step)
        if step.at.is_fraction:
            if not self.operator.points_away_from_zero(self.threshold):
                yield ("at",), f"a percentage means nothing for {self._breach()}; write a value"
        elif self.operator.holds(at, self.threshold) or at == self.threshold:
            yield ("at",), f"{at:g} is not before the threshold: {self._breach()} fires the rule"

    def _breach(self) -> str:
        return f"a value {self.operator.symbol} {self.threshold:g}"

    def _absolute(self, step: StepSection) -> float:
        # 0.75 * -0.15 is -0.11249999999999999: rounded, so that people see, and readings meet, the number they expect.
        return float(f"{step.at.value * self.threshold:.12g}") if step.at.is_fraction else step.at.value

    def condition(self) -> Condition:
        """Steps become absolute values."""
        steps = tuple(
            Step(
                at=self._absolute(step),
                fraction=step.at.value if step.at.is_fraction else None,
                action=step.action,
                factor=step.factor,
            )
            for step in self.steps
        )
        return Threshold(
            query=self.query, operator=self.operator, threshold=self.threshold, clear=self.clear, steps=steps
        )


class ExpressionSection(QueryRuleSection):
    """Fires when the expression returns any series, as an alerting rule of Prometheus does."""

    type: Literal["expression"] = Field(description="Rule type.")
    expr: RuleQuery = Field(
        description="PromQL with its own comparison. Selectors that match nothing are no data only where `series` is "
        "written."
    )

    def condition(self) -> Condition:
        """The expression."""
        return Expression(expr=self.expr)


class HeartbeatSection(QueryRuleSection):
    """Fires when the newest beat is older than `interval` × `max_missed`."""

    type: Literal["heartbeat"] = Field(description="Rule type.")
    query: RuleQuery = Field(description="PromQL that gives the Unix time of the last beat.")
    interval: Interval = seconds("60s", "How often a beat is due.")
    max_missed: Count = Field(default=3, description="So many beats may be missed.")

    def condition(self) -> Condition:
        """The beat."""
        return Heartbeat(query=self.query, interval=self.interval, max_missed=self.max_missed)


def _target(value: str) -> str:
    if value not in ("container", "host") and not _PROCESS.fullmatch(value):
        raise ValueError(f"{value!r} is not a target; write container, host or process:<name>")
    return value


class WatchdogSection(RuleSection):
    """Fires when memory or CPU of its target stays over a limit."""

    type: Literal["watchdog"] = Field(description="Rule type.")
    target: Annotated[str, from_text(_target), json_text("target", "container|host|process:.+")] = Field(
        default="container", description="`container`, `host` or `process:<name>`."
    )
    memory_percent: Percentage | None = shown(90.0, 90, "Of its memory limit; `null` does not look at memory.")
    cpu_percent: Percentage | None = shown(95.0, 95, "Of its CPU limit; `null` does not look at CPU.")
    window: PositiveDuration = seconds("30s", "CPU use is averaged over this.")
    cgroup: FilePath | None = Field(
        default=None, description="Folder of the cgroup to look at; the sidecar's own by default."
    )

    def misfits(self) -> Iterator[Misfit]:
        """A watchdog looks at something."""
        yield from super().misfits()
        if self.memory_percent is None and self.cpu_percent is None:
            yield ("memory_percent",), "is null, and so is cpu_percent: the rule would watch nothing"
        if self.cgroup is not None and self.target != "container":
            yield ("cgroup",), f"belongs to target container, not {self.target}"
        if self.cgroup is not None and not self.cgroup.startswith("/"):
            yield ("cgroup",), f"{self.cgroup!r} is not an absolute path"

    def condition(self) -> Condition:
        """The limits."""
        return Watchdog(
            target=self.target,
            memory_percent=self.memory_percent,
            cpu_percent=self.cpu_percent,
            window=self.window,
            cgroup=self.cgroup,
        )


class ProbeSection(Section):
    """What is tried: one of the two."""

    tcp: Address | None = Field(default=None, description="A connection to `host:port`.")
    http: URL | None = Field(default=None, description="A request to this URL, which must succeed.")

    def misfits(self) -> Iterator[Misfit]:
        """One probe tries one thing."""
        if (self.tcp is None) == (self.http is None):
            yield (), "write exactly one of tcp and http"


class ConnectivitySection(QueryRuleSection):
    """Fires when a venue or price feed fails several times in a row."""

    type: Literal["connectivity"] = Field(description="Rule type.")
    query: RuleQuery | None = Field(default=None, description="PromQL that gives 1 while the connection is up.")
    probe: ProbeSection | None = Field(default=None, description="`{tcp: host:port}` or `{http: url}` instead.")
    interval: Interval = seconds("30s", "How often it is looked at.")
    timeout: PositiveDuration | None = shown(
        None, "5s", "Longest wait for a probe; never more than `interval`, and by default no more than it."
    )
    max_consecutive_failures: Count = Field(default=3, description="So many failures in a row fire the rule.")

    def misfits(self) -> Iterator[Misfit]:
        """There is one way to look, and it ends before the next look begins."""
        yield from super().misfits()
        if (self.query is None) == (self.probe is None):
            yield (), "write exactly one of query and probe"
        if self.timeout is not None and self.timeout > self.interval:
            yield ("timeout",), f"must not be longer than the interval of {format_duration(self.interval)}"
        if self.probe is not None and self.source != "prometheus":
            yield ("source",), "belongs to a query; a probe asks the venue itself"
        if self.probe is not None and self.series is not None:
            yield ("series",), "belongs to a query; a probe returns no series"

    def condition(self) -> Condition:
        """The probe or the query."""
        timeout = min(_LONGEST_PROBE_TIMEOUT, self.interval) if self.timeout is None else self.timeout
        return Connectivity(
            tcp=self.probe.tcp if self.probe else None,
            http=self.probe.http if self.probe else None,
            query=self.query,
            interval=self.interval,
            timeout=timeout,
            max_consecutive_failures=self.max_consecutive_failures,
        )


def _some(matchers: Any) -> Any:
    if matchers == []:
        raise ValueError("must hold at least one matcher: a rule that matches every alert is a mistake")
    return matchers


class AlertmanagerSection(RuleSection):
    """Fires while a matching alert is firing."""

    type: Literal["alertmanager"] = Field(description="Rule type.")
    match: Annotated[tuple[MatcherText, ...], BeforeValidator(_some)] = Field(
        description="Alertmanager's matchers, all of which must hold, on top of `webhook.match`."
    )

    def condition(self) -> Condition:
        """The matchers."""
        return AlertMatch(match=self.match)


class OrderRateSection(RuleSection):
    """Fires on more new or replaced orders than allowed in a sliding window."""

    type: Literal["order_rate"] = Field(description="Rule type.")
    max_orders: Count = Field(default=100, description="So many orders are allowed.")
    per: PositiveDuration = seconds("1s", "Within this time.")

    def condition(self) -> Condition:
        """The limit."""
        return OrderRate(max_orders=self.max_orders, per=self.per)


MODELS: Mapping[str, type[RuleSection]] = {
    "threshold": ThresholdSection,
    "expression": ExpressionSection,
    "heartbeat": HeartbeatSection,
    "watchdog": WatchdogSection,
    "connectivity": ConnectivitySection,
    "alertmanager": AlertmanagerSection,
    "order_rate": OrderRateSection,
}
"""Sections by the rule type they describe."""


def _of_its_type(value: Any, _handler: Any, info: ValidationInfo) -> Any:
    """Choose the section by `type` ourselves: pydantic's unions would put the type into the path of every problem."""
    if isinstance(value, RuleSection):
        return value
    written = mapping(value)
    if "type" not in written:
        raise Misfits([*_strangers(written), (("type",), f"is required: one of {', '.join(MODELS)}")])
    kind = written["type"]
    if not isinstance(kind, str) or kind not in MODELS:
        near = suggestion(str(kind), MODELS)
        raise Misfits([*_strangers(written), (("type",), f"{kind!r} is not a rule type{near}")])
    return MODELS[kind].model_validate(value, context=info.context)


def _strangers(written: Mapping[str, Any]) -> Iterator[Misfit]:
    """Keys that no type of rule has: what can be said of a rule whose type nobody knows."""
    keys = list(dict.fromkeys(key for model in MODELS.values() for key in model.keys()))  # noqa: SIM118 - no mapping
    yield from (((key,), f"unknown key{suggestion(key, keys)}") for key in written if key not in keys)


AnyRule = Annotated[
    ThresholdSection
    | ExpressionSection
    | HeartbeatSection
    | WatchdogSection
    | ConnectivitySection
    | AlertmanagerSection
    | OrderRateSection,
    WrapValidator(_of_its_type),
]


class GroupSection(Section):
    """Rules that are evaluated together."""

    name: Text = Field(description="Unique in its file.")
    interval: Interval | None = shown(
        None, "5s", "How often they are evaluated; by default as `rules.interval` of the configuration says."
    )
    rules: tuple[AnyRule, ...] = Field(description="The rules, each with its `type`.")


class RuleFile(Section):
    """The whole file."""

    groups: tuple[GroupSection, ...] = Field(description="Groups of rules.")

    @classmethod
    def misfits_as_written(cls, written: Mapping[str, Any]) -> Iterator[Misfit]:
        """Groups are told apart by their names."""
        yield from taken_names("groups", written.get("groups"))
