"""Every metric of the sidecar, rendered from what the application shows at the moment of a scrape.

One collector on a registry that is handed in. It keeps only what nobody else counts: the distributions of durations.
All series are there from the first scrape on, whatever has happened yet, so that an alert on them can be trusted; a
number that is not known is NaN, and a state that is not known is shown as the strictest there is. docs/METRICS.md is
the list for readers.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import nan
from typing import Final, Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from sidecar.core.events import CauseCode
from sidecar.core.snapshot import Snapshot
from sidecar.core.states import Mode, Restriction, Stage, State
from sidecar.core.transitions import TABLE
from sidecar.rules.readings import FAILURE_REASONS
from sidecar.rules.triggers import Status

TRANSITIONS: Final = tuple(sorted({(start, end) for (start, _), end in TABLE.items() if start is not end}))
"""The changes of state that are possible."""

WEBHOOK_RESULTS: Final = ("accepted", "ignored", "duplicate", "malformed", "refused")
"""What can become of an alert that the webhook was sent."""

_EVALUATION_BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BREACH_BOUNDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0)
_LEASE_BOUNDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class SwitchTelemetry:
    """The switch.

    Attributes:
        switch: its name.
        mode: active, shadow or disabled.
        version: of the sidecar.
        config_hash: of the configuration in force; empty if there is none.
        exported: the newest durable snapshot; None until state is restored.
        cooldown_remaining: seconds; 0 outside a cooldown.
        last_transition: Unix seconds of the last change of state; None if there was none.
        transitions: changes of state since the start, by (from, to).
        causes: of the present kill, as far as it is durable, by (cause code, rule); no rule is an empty one.
        labels: the switch's own, from the configuration.
    """

    switch: str
    mode: Mode
    version: str
    config_hash: str
    exported: Snapshot | None
    cooldown_remaining: float = 0.0
    last_transition: float | None = None
    transitions: Mapping[tuple[State, State], int] = field(default_factory=dict)
    causes: frozenset[tuple[str, str]] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class TriggerTelemetry:
    """One rule's trigger; numbers are None where they are not known.

    Attributes:
        name: of the rule.
        status: inactive, pending or firing.
        enabled: whether the rule is evaluated at all.
        armed: whether its last evaluation gave a fresh reading.
        waived: whether a recovery overlooks it at present.
        value: what was read last.
        threshold: what it is compared with, a waiver's where there is one.
        limit_used: value ÷ threshold, 1.0 at the limit.
        sample_age: seconds.
        evaluations: since the start.
        shadow_firings: how often it would have restricted trading, had it not been in shadow.
        failures: evaluations without a fresh reading, by reason out of FAILURE_REASONS.
    """

    name: str
    status: Status
    enabled: bool = True
    armed: bool
    waived: bool
    value: float | None
    threshold: float | None
    limit_used: float | None
    sample_age: float | None
    evaluations: int = 0
    shadow_firings: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)


class GateTelemetry(Protocol):
    """What the gate has answered since the start.

    Attributes:
        decisions: by decision and reason code; every pair that can occur is there from the start.
        duration_bounds: upper bounds of the buckets, seconds.
        duration_counts: answers per bucket, not cumulative, one more than bounds.
        duration_sum: seconds.
    """

    @property
    def decisions(self) -> Mapping[tuple[str, str], int]: ...  # noqa: D102
    @property
    def duration_bounds(self) -> Sequence[float]: ...  # noqa: D102
    @property
    def duration_counts(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def duration_sum(self) -> float: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordTelemetry:
    """What was written, and whether that went well.

    Attributes:
        audit_events: appended to the audit since the start.
        audit_write_failures, state_write_failures: attempts that failed.
        audit_head_sequence: `seq` of the newest audit event; 0 before the first.
        reload_successful: whether the last attempt to read the configuration succeeded.
        reload_success: Unix seconds of the last success; None if there was none.
        config_loosened: how often a reload, or this start, made something less strict.
        webhook_alerts: alerts received, by what became of them, out of WEBHOOK_RESULTS.
        log_lines_dropped: lines that nobody took from standard output and error in time.
    """

    audit_events: int = 0
    audit_write_failures: int = 0
    audit_head_sequence: int = 0
    state_write_failures: int = 0
    reload_successful: bool
    reload_success: float | None
    config_loosened: int = 0
    webhook_alerts: Mapping[str, int] = field(default_factory=dict)
    log_lines_dropped: int = 0


class Telemetry(Protocol):
    """Asked at every scrape, on the event loop; each answer is a picture of that moment."""

    def switch(self) -> SwitchTelemetry:
        """The switch."""

    def triggers(self) -> Sequence[TriggerTelemetry]:
        """Every rule that is loaded, each name once."""

    def missed_iterations(self) -> Mapping[str, int]:
        """For every group, how many evaluations were left out because earlier ones took too long."""

    def sources(self) -> Mapping[str, bool | None]:
        """For every source, whether it answered last time; None for one that nobody has asked yet."""

    def gate(self) -> GateTelemetry:
        """The gate."""

    def records(self) -> RecordTelemetry:
        """Audit, state file, configuration and webhook."""


class Instruments(Collector):
    """The collector; registers itself, and those of the process and the platform, on the registry given.

    Args:
        registry: where to.
        telemetry: what to show.
    """

    def __init__(self, registry: CollectorRegistry, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._switch = _SwitchFamilies()
        self._triggers = _TriggerFamilies()
        self._records = _RecordFamilies()
        self._evaluations = Distribution(_EVALUATION_BOUNDS)
        self._breaches = Distribution(_BREACH_BOUNDS)
        self._lease_delays = Distribution(_LEASE_BOUNDS)
        registry.register(self)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

    def observe_evaluation(self, seconds: float) -> None:
        """Count how long one evaluation of a group took, questions to its sources included."""
        self._evaluations.observe(seconds)

    def observe_breach_to_block(self, seconds: float) -> None:
        """Count the time from the sample that broke a limit to the closed gate."""
        self._breaches.observe(seconds)

    def observe_lease_delay(self, seconds: float) -> None:
        """Count how much later than planned the lease was renewed."""
        self._lease_delays.observe(seconds)

    def describe(self) -> Iterable[Metric]:
        """Name the families without asking the telemetry, which may not be ready when we are registered."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every family, as it is now."""
        yield from self._switch.collect(self._telemetry.switch())
        yield from self._triggers.collect(self._telemetry.triggers())
        yield from self._records.collect(self._telemetry, self._evaluations, self._breaches, self._lease_delays)


class Distribution:
    """Counts observations in buckets.

    Args:
        bounds: upper bounds, ascending.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class _Family:
    """One metric. Samples that did not change are the same objects in the next scrape, so nobody writes them anew.

    Args:
        kind: gauge or counter.
        name: without `_total`.
        labels: names.
        documentation: one sentence.
        members: the closed set of values of the last label, where it has one.
    """

    def __init__(
        self, kind: str, name: str, labels: Sequence[str], documentation: str, members: Sequence[str] = ()
    ) -> None:
        self._kind = kind
        self._name = name
        self._sample_name = f"{name}_total" if kind == "counter" else name
        self._labels = tuple(labels)
        self._documentation = documentation
        self._members = tuple((member,) for member in members) or ((),)
        self._shown: dict[tuple[str, ...], tuple[tuple[float, ...], list[Sample]]] = {}

    def of(self, rows: Iterable[tuple[tuple[str, ...], tuple[float, ...]]]) -> Metric:
        """The family with these rows: the values of all labels but the closed one, and one number for each member."""
        before, self._shown = self._shown, {}
        samples: list[Sample] = []
        for labels, values in rows:
            row = before.get(labels)
            if row is None:
                row = (values, self._new(labels, values))
            elif row[0] != values:
                row = (values, [_revalued(sample, value) for sample, value in zip(row[1], values, strict=True)])
            self._shown[labels] = row
            samples += row[1]
        family = Metric(self._name, self._documentation, self._kind)
        family.samples = samples
        return family

    def only(self, value: float) -> Metric:
        """The family with its one series that has no labels."""
        return self.of([((), (value,))])

    def _new(self, labels: tuple[str, ...], values: tuple[float, ...]) -> list[Sample]:
        return [
            Sample(self._sample_name, dict(zip(self._labels, (*labels, *member), strict=True)), value)
            for member, value in zip(self._members, values, strict=True)
        ]


def _revalued(sample: Sample, value: float) -> Sample:
    return sample if sample.value is value or sample.value == value else sample._replace(value=value)


class _Histogram:
    """One distribution, without labels."""

    def __init__(self, name: str, documentation: str) -> None:
        self._name = name
        self._documentation = documentation

    def of(self, bounds: Sequence[float], counts: Sequence[int], total: float) -> Metric:
        """The family with these buckets, given as counts per bucket, not cumulative."""
        family = Metric(self._name, self._documentation, "histogram")
        edges = [*(_number(bound) for bound in bounds), "+Inf"]
        cumulative = list(accumulate(counts))
        family.samples = [
            *(
                Sample(f"{self._name}_bucket", {"le": edge}, count)
                for edge, count in zip(edges, cumulative, strict=True)
            ),
            Sample(f"{self._name}_count", {}, cumulative[-1]),
            Sample(f"{self._name}_sum", {}, total),
        ]
        return family

    def of_distribution(self, distribution: Distribution) -> Metric:
        """The family with one of our own distributions."""
        return self.of(distribution.bounds, distribution.counts, distribution.sum)


def _number(value: float) -> str:
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def _gauge(name: str, labels: Sequence[str], documentation: str, members: Sequence[str] = ()) -> _Family:
    return _Family("gauge", name, labels, documentation, members)


def _counter(name: str, labels: Sequence[str], documentation: str, members: Sequence[str] = ()) -> _Family:
    return _Family("counter", name, labels, documentation, members)


def _known(value: float | None) -> float:
    return nan if value is None else value


class _SwitchFamilies:
    """State, restriction, factor, and how a recovery goes."""

    def __init__(self) -> None:
        self._info = _gauge(
            "killswitch_info",
            ("version", "switch", "mode", "config_hash"),
            "Always 1; which sidecar this is, how much of it is in force, and which configuration it runs.",
        )
        self._state = _gauge(
            "killswitch_state",
            ("switch", "state"),
            "1 for the durable state of the switch, 0 for the others; all 0 until state is restored.",
            tuple(State),
        )
        self._restriction = _gauge(
            "killswitch_restriction",
            ("switch", "restriction"),
            "1 for what the switch restricts orders to, 0 for the others; halt until state is restored.",
            [restriction.label for restriction in Restriction],
        )
        self._factor = _gauge(
            "killswitch_position_limit_factor",
            ("switch",),
            "What position limits are multiplied by, from 0 to 1; 0 until state is restored.",
        )
        self._epoch = _gauge("killswitch_epoch", ("switch",), "Counts durable changes of the switch over its life.")
        self._stage = _gauge(
            "killswitch_recovery_stage",
            ("switch", "stage"),
            "1 for the stage of the recovery, 0 for the others; all 0 until state is restored.",
            tuple(Stage),
        )
        self._cooldown = _gauge(
            "killswitch_recovery_cooldown_remaining_seconds",
            (),
            "How long the cooldown of a recovery still lasts; 0 outside a cooldown.",
        )
        self._last_transition = _gauge(
            "killswitch_last_transition_timestamp_seconds",
            (),
            "Unix time of the last change of state, or of the first start; NaN until state is restored.",
        )
        self._transitions = _counter(
            "killswitch_transitions", ("from", "to"), "Changes of state since the sidecar started."
        )
        self._causes = _gauge(
            "killswitch_kill_cause",
            ("switch", "code", "trigger"),
            "1 for each cause of the present kill; a series with a rule is there only while that rule is one.",
        )
        self._labels = _gauge(
            "killswitch_switch_label_info",
            ("switch", "name", "value"),
            "Always 1; one series for each label that the configuration gives the switch.",
        )

    def collect(self, seen: SwitchTelemetry) -> Iterator[Metric]:
        name, exported = seen.switch, seen.exported
        yield self._info.of([((seen.version, name, seen.mode.value, seen.config_hash), (1.0,))])
        state = None if exported is None else exported.state
        yield self._state.of([((name,), tuple(one is state for one in State))])
        restriction = Restriction.HALT if exported is None else exported.restriction
        yield self._restriction.of([((name,), tuple(one is restriction for one in Restriction))])
        yield self._factor.of([((name,), (0.0 if exported is None else exported.factor,))])
        yield self._epoch.of([((name,), (0 if exported is None else exported.epoch,))])
        stage = None if exported is None else exported.stage
        yield self._stage.of([((name,), tuple(one is stage for one in Stage))])
        yield self._cooldown.only(seen.cooldown_remaining)
        yield self._last_transition.only(_known(seen.last_transition))
        yield self._transitions.of(
            ((start.value, end.value), (seen.transitions.get((start, end), 0),)) for start, end in TRANSITIONS
        )
        known = {(code.value, "") for code in CauseCode} | seen.causes
        yield self._causes.of(((name, *cause), (float(cause in seen.causes),)) for cause in sorted(known))
        yield self._labels.of(((name, *label), (1.0,)) for label in seen.labels.items())


class _TriggerFamilies:
    """What every rule sees and does."""

    def __init__(self) -> None:
        trigger = ("trigger",)
        self._status = _gauge(
            "killswitch_trigger_status",
            ("trigger", "status"),
            "1 for whether the rule is inactive, pending or firing, 0 for the others.",
            tuple(Status),
        )
        self._armed = _gauge(
            "killswitch_trigger_armed", trigger, "1 if the rule's last evaluation gave a fresh reading: it could fire."
        )
        self._enabled = _gauge(
            "killswitch_trigger_enabled", trigger, "1 unless the rule says enabled: false; then it is not evaluated."
        )
        self._waived = _gauge("killswitch_trigger_waived", trigger, "1 while an approved recovery overlooks the rule.")
        self._value = _gauge("killswitch_trigger_value", trigger, "What the rule read last; NaN if nothing.")
        self._threshold = _gauge(
            "killswitch_trigger_threshold",
            trigger,
            "What the value is compared with, a waiver's threshold where there is one; NaN for rules without one.",
        )
        self._limit_used = _gauge(
            "killswitch_trigger_limit_used_ratio",
            trigger,
            "How much of its limit the value has used, 1 at the limit; NaN where that means nothing.",
        )
        self._sample_age = _gauge(
            "killswitch_trigger_sample_age_seconds",
            trigger,
            "Age of the oldest sample behind the value, when its source was asked; NaN if not known.",
        )
        self._evaluations = _counter("killswitch_trigger_evaluations", trigger, "Evaluations of the rule.")
        self._shadows = _counter(
            "killswitch_trigger_shadow_firings",
            trigger,
            "Times that the rule would have restricted trading, had it not been in shadow.",
        )
        self._failures = _counter(
            "killswitch_trigger_evaluation_failures",
            ("trigger", "reason"),
            "Evaluations of the rule that gave no fresh reading, by what was wrong.",
            FAILURE_REASONS,
        )

    def collect(self, triggers: Sequence[TriggerTelemetry]) -> Iterator[Metric]:
        names = [(one.name,) for one in triggers]
        yield self._status.of(zip(names, (_STATUS_ROWS[one.status] for one in triggers), strict=True))
        yield self._armed.of(zip(names, ((one.armed,) for one in triggers), strict=True))
        yield self._enabled.of(zip(names, ((one.enabled,) for one in triggers), strict=True))
        yield self._waived.of(zip(names, ((one.waived,) for one in triggers), strict=True))
        yield self._value.of(zip(names, ((_known(one.value),) for one in triggers), strict=True))
        yield self._threshold.of(zip(names, ((_known(one.threshold),) for one in triggers), strict=True))
        yield self._limit_used.of(zip(names, ((_known(one.limit_used),) for one in triggers), strict=True))
        yield self._sample_age.of(zip(names, ((_known(one.sample_age),) for one in triggers), strict=True))
        yield self._evaluations.of(zip(names, ((one.evaluations,) for one in triggers), strict=True))
        yield self._shadows.of(zip(names, ((one.shadow_firings,) for one in triggers), strict=True))
        yield self._failures.of(zip(names, (_failure_row(one.failures) for one in triggers), strict=True))


_STATUS_ROWS: Final = {status: tuple(float(status is one) for one in Status) for status in Status}
_NO_FAILURES: Final = (0,) * len(FAILURE_REASONS)


def _failure_row(failures: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(failures.get(reason, 0) for reason in FAILURE_REASONS) if failures else _NO_FAILURES


class _RecordFamilies:
    """How evaluation, sources, gate, audit, state file, configuration and webhook are doing."""

    def __init__(self) -> None:
        self._evaluation_duration = _Histogram(
            "killswitch_evaluation_duration_seconds", "How long one evaluation of a group took, questions included."
        )
        self._missed = _counter(
            "killswitch_evaluation_iterations_missed",
            ("group",),
            "Evaluations of the group that were left out because earlier ones took longer than the interval.",
        )
        self._source_up = _gauge(
            "killswitch_source_up",
            ("source",),
            "1 if the source gave a usable answer last time, 0 if not; NaN if no rule asks it.",
        )
        self._breach_to_block = _Histogram(
            "killswitch_breach_to_block_seconds", "Time from the sample that broke a limit to the closed gate."
        )
        self._decisions = _counter(
            "killswitch_gate_decisions", ("decision", "reason"), "Decisions of the gate, by answer and reason code."
        )
        self._decision_duration = _Histogram(
            "killswitch_gate_decision_duration_seconds",
            "Time from the arrival of a question at the gate to its answer.",
        )
        self._lease_delay = _Histogram(
            "killswitch_lease_renewal_delay_seconds",
            "How much later than planned the lease on the gate's answers was renewed; past the lease, readers deny.",
        )
        self._webhook = _counter(
            "killswitch_webhook_alerts",
            ("result",),
            "Alerts that the webhook received, by what became of them.",
            WEBHOOK_RESULTS,
        )
        self._audit_events = _counter("killswitch_audit_events", (), "Events appended to the audit.")
        self._audit_failures = _counter(
            "killswitch_audit_write_failures", (), "Attempts to write the audit that failed; the events are kept."
        )
        self._audit_head = _gauge(
            "killswitch_audit_head_sequence", (), "Sequence number of the newest audit event; it never goes back."
        )
        self._state_failures = _counter(
            "killswitch_state_write_failures", (), "Attempts to write the state file that failed."
        )
        self._reload_successful = _gauge(
            "killswitch_config_last_reload_successful", (), "1 if configuration and rules could be read last time."
        )
        self._reload_success = _gauge(
            "killswitch_config_last_reload_success_timestamp_seconds",
            (),
            "Unix time when configuration and rules were last read with success; NaN if never.",
        )
        self._loosened = _counter(
            "killswitch_config_loosened",
            (),
            "Reloads and starts that made something less strict; the audit has the difference.",
        )
        self._logs_dropped = _counter(
            "killswitch_log_lines_dropped",
            (),
            "Log and audit lines that were not written to standard error and output, for nobody took them in time.",
        )

    def collect(
        self, telemetry: Telemetry, evaluations: Distribution, breaches: Distribution, lease_delays: Distribution
    ) -> Iterator[Metric]:
        yield self._evaluation_duration.of_distribution(evaluations)
        yield self._missed.of(((group,), (count,)) for group, count in telemetry.missed_iterations().items())
        yield self._source_up.of(((source,), (_known(up),)) for source, up in telemetry.sources().items())
        yield self._breach_to_block.of_distribution(breaches)
        yield self._lease_delay.of_distribution(lease_delays)
        gate = telemetry.gate()
        yield self._decisions.of((pair, (count,)) for pair, count in gate.decisions.items())
        yield self._decision_duration.of(gate.duration_bounds, gate.duration_counts, gate.duration_sum)
        yield from self._written(telemetry.records())

    def _written(self, seen: RecordTelemetry) -> Iterator[Metric]:
        yield self._webhook.of([((), tuple(seen.webhook_alerts.get(result, 0) for result in WEBHOOK_RESULTS))])
        yield self._audit_events.only(seen.audit_events)
        yield self._audit_failures.only(seen.audit_write_failures)
        yield self._audit_head.only(seen.audit_head_sequence)
        yield self._state_failures.only(seen.state_write_failures)
        yield self._reload_successful.only(seen.reload_successful)
        yield self._reload_success.only(_known(seen.reload_success))
        yield self._loosened.only(seen.config_loosened)
        yield self._logs_dropped.only(seen.log_lines_dropped)
