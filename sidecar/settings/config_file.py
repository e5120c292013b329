"""The configuration file as it is written: its keys, their defaults, and what must fit together.

The documentation and the schema for editors are drawn from these classes. What the program uses is `Settings`, which
`sidecar.settings.config` builds from them.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from sidecar.core.states import Mode, Restriction
from sidecar.settings.fields import (
    URL,
    Address,
    BaseURL,
    Comparison,
    Count,
    Duration,
    FilePath,
    Flag,
    Headers,
    Interval,
    KilledPolicy,
    Labels,
    Limits,
    MatcherText,
    Misfit,
    Misfits,
    ModeWord,
    Natural,
    Number,
    Percentage,
    PositiveDuration,
    PrometheusURL,
    Query,
    Section,
    Size,
    Text,
    from_text,
    json_text,
    json_words,
    seconds,
    seen,
    shown,
    split_address,
    taken_names,
    text,
    word,
)
from sidecar.settings.http_section import HttpSection
from sidecar.settings.quantities import DURATION_PATTERN, format_duration, parse_duration, parse_number, parse_size

LONGEST_SOCKET_PATH = 107  # bytes; sun_path of Linux has 108 with the closing NUL
SHORTEST_LEASE = 0.05  # seconds; below it a healthy loop under load looks dead, and a garbage collection blocks trading
LONGEST_LEASE = 60.0  # seconds; a dead sidecar must be noticed while it matters
DEFAULT_RULE_FILES = "/etc/killswitch/rules/*.yaml"
_OFF = frozenset({"off", "false", "no"})  # YAML's own words for it
DEFAULT_SWITCH_NAME = "${POD_NAMESPACE}/${POD_NAME}"


def _switch_name(value: str) -> str:
    if not value.isprintable() or len(value) > 256:
        raise ValueError(f"{seen(value)} is not a name: at most 256 printable characters")
    if not all(value.split("/")):
        raise ValueError(f"{value!r} has an empty part; was a variable empty?")
    return value


class SwitchSection(Section):
    """The switch itself: who it is and how much of it is in force."""

    name: Annotated[str, from_text(_switch_name), json_text("text")] | None = shown(
        None,
        DEFAULT_SWITCH_NAME,
        "Identity over restarts and reschedules, unique in all that Prometheus sees. Where pod names change, a fixed "
        "name. The default needs both variables in the environment.",
    )
    mode: ModeWord = shown(
        Mode.ACTIVE,
        "active",
        "`shadow` runs the whole machine and blocks only an operator's own kill; `disabled` allows everything, for "
        "backtests and break-glass. Read at start only.",
    )
    labels: Labels = Field(default={}, description="Matched by external triggers and fleet scopes.")


class PrometheusSection(Section):
    """The Prometheus that answers the queries of rules."""

    urls: tuple[PrometheusURL, ...] = shown(
        ("http://prometheus:9090",),
        ["http://prometheus:9090"],
        "The first healthy answer counts; a path prefix is kept. `[]` for none, where all rules look elsewhere; none, "
        "too, where it is left out and `scrape` is configured.",
    )
    timeout: PositiveDuration = seconds("2s", "Longest wait for one answer.")
    headers: Headers = Field(default={}, description="Sent with every request, `X-Scope-OrgID` for example.")
    http_config: HttpSection = Field(default_factory=HttpSection)
    on_warnings: Annotated[str, word("inconclusive", "ignore"), json_words("word", ["inconclusive", "ignore"])] = Field(
        default="inconclusive",
        description="What an answer with warnings is worth: `inconclusive` treats it as no data, for partial answers "
        "are not answers; `ignore` takes it.",
    )


def _plain_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", value):
        raise ValueError(f"{value!r} is not a name; use letters, digits, _ . and -")
    return value


class ScrapeSection(Section):
    """One endpoint that is scraped directly, with no Prometheus in the path."""

    name: Annotated[str, from_text(_plain_name), json_text("name")] = Field(
        description="Rules name it as `source: scrape:<name>`."
    )
    url: URL = Field(description="Where the metrics are.")
    interval: Interval = seconds("250ms", "How often it is scraped.")
    timeout: PositiveDuration | None = shown(
        None, "200ms", "Longest wait for one answer; never more than `interval`, and by default no more than it."
    )

    def misfits(self) -> Iterator[Misfit]:
        """A scrape that outlasts its interval would overlap the next one."""
        if self.timeout is not None and self.timeout > self.interval:
            yield ("timeout",), f"must not be longer than the interval of {format_duration(self.interval)}"


class RulesSection(Section):
    """Where the rules are."""

    files: tuple[FilePath, ...] = shown(
        (DEFAULT_RULE_FILES,),
        [DEFAULT_RULE_FILES],
        "Paths, patterns, folders for their `*.yaml`; not `*.test.yaml`. Without any rule file the gate denies.",
    )
    interval: Interval = seconds("5s", "How often groups without their own interval are evaluated.")


def _lease(value: str) -> float:
    lease = parse_duration(value)
    if not SHORTEST_LEASE <= lease <= LONGEST_LEASE:
        shortest, longest = format_duration(SHORTEST_LEASE), format_duration(LONGEST_LEASE)
        raise ValueError(f"must lie between {shortest} and {longest}, not {value}")
    return lease


def _gate_address(value: Any) -> str | None:
    written = text(value)
    if written.lower() in _OFF:
        return None
    split_address(written)
    return written


Lease = Annotated[float, from_text(_lease), json_text("duration, 50ms to 1m", DURATION_PATTERN)]


class GateSection(Section):
    """What answers the trading code."""

    listen: Annotated[
        str | None, BeforeValidator(_gate_address), json_text("host:port or off", type=["string", "boolean"])
    ] = Field(
        default="127.0.0.1:9780",
        description="Address of the gate, which asks for no credentials. `off` leaves only the socket and the page: "
        "where the network is shared, as with hostNetwork, others could ask it too, and ports would collide.",
    )
    socket: FilePath = Field(default="/run/killswitch/gate.sock", description="Unix socket of the gate.")
    page: FilePath = Field(default="/run/killswitch/state.page", description="The state page, for readers in memory.")
    lease: Lease = seconds("500ms", "A client that cannot see a decision younger than this denies.")
    killed_policy: KilledPolicy = shown(
        Restriction.HALT,
        "halt",
        "What a kill means for exits: `halt` denies them too, `reduce_only` passes what truly reduces a position.",
    )
    position_limits: Limits = Field(
        default={},
        description='Absolute limits by symbol, 0 for one that may only be reduced, `"*"` for all others; the position '
        "limit factor scales them.",
    )
    blind_orders: Annotated[str, word("allow", "deny"), json_words("word", ["allow", "deny"])] = Field(
        default="allow",
        description="What a question without a size gets while the factor is between 0 and 1: `allow` or `deny`.",
    )
    trust_reduce_claim: Flag = Field(
        default=False, description="Whether `X-Order-Intent: reduce` is believed under `reduce_only`."
    )


def _host(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.\-]*[A-Za-z0-9])?", value):
        raise ValueError(f"{value!r} is not a host name; write it without scheme, port and path")
    return value.lower()


class OperationsSection(Section):
    """Metrics, health, API, web page and webhook."""

    listen: Address = Field(default="0.0.0.0:9781", description="Address of the operations listener.")
    hosts: tuple[Annotated[str, from_text(_host), json_text("host name")], ...] = Field(
        default=(), description="Names under which it may be called, beside IP addresses and localhost."
    )
    health_listen: Address | None = Field(
        default=None,
        description="Address of a second listener with health alone, in plain HTTP: for probes, where `web_config` "
        "requires client certificates, which a kubelet does not have.",
    )
    web_config: FilePath | None = Field(
        default=None,
        description="File with TLS, client certificates and basic auth in the format of Prometheus' exporters; see "
        "below. Read again when it or a certificate changes.",
    )
    tokens_file: FilePath | None = Field(
        default=None,
        description="YAML list of `{name, roles, sha256}`. Without it reading is open and changes are refused.",
    )


class ControlSection(Section):
    """The way in for the command line."""

    socket: FilePath = Field(
        default="/run/killswitch-control/control.sock",
        description="Unix socket with the whole API and no token: never mount its folder in the trading container. "
        "`KILLSWITCH_SOCKET` in the environment goes before it.",
    )


class WebhookSection(Section):
    """What Alertmanager sends us."""

    match: tuple[MatcherText, ...] = Field(
        default=(),
        description="Alertmanager's matchers. Only an alert that satisfies all of them is looked at; an `alertmanager` "
        "rule then acts.",
    )
    token_file: FilePath | None = Field(default=None, description="File with the bearer token of the webhook.")
    allow_unauthenticated: Flag = Field(default=False, description="Takes alerts from anybody who reaches the port.")
    expires: PositiveDuration = seconds(
        "5h", "A firing alert not sent again for this long no longer stands in the way of an approved recovery."
    )


def _runbook(value: str) -> str:
    if not value or "#" in value:
        raise ValueError(f"must be the address of the whole runbook, not {value!r}: each alert adds its own heading")
    return value


class NotifySection(Section):
    """What we send to Alertmanager."""

    urls: tuple[BaseURL, ...] = shown(
        ("http://alertmanager:9093",),
        ["http://alertmanager:9093"],
        "Every one of them gets our alerts. `[]` for none.",
    )
    runbook_url: Annotated[str, from_text(_runbook), json_text("address", ".+")] = Field(
        default="docs/RUNBOOK.md",
        description="What `runbook_url` of our alerts begins with: where your people read the runbook.",
    )


class AlertmanagerSection(Section):
    """Alerts in and out."""

    webhook: WebhookSection = Field(default_factory=WebhookSection)
    notify: NotifySection = Field(default_factory=NotifySection)


def _backoff_factor(value: str) -> float:
    number = parse_number(value)
    if number < 1:
        raise ValueError(f"must be at least 1, not {value}: a cooldown must not shrink with every kill")
    return number


class BackoffSection(Section):
    """How the cooldown grows when kills follow each other."""

    factor: Annotated[float, from_text(_backoff_factor), json_text("number ≥ 1", type=["number", "string"])] = Field(
        default=2.0, description="Each further kill from ACTIVE within 24 h multiplies the next cooldown; 1 is off."
    )
    max: Duration = seconds("1h", "A cooldown never grows beyond this.")


class ConditionSection(Section):
    """A condition on Prometheus: `query operator threshold`."""

    query: Query = Field(description="PromQL.")
    operator: Comparison = Field(description="`lt le gt ge eq ne`, or the signs in quotes.")
    threshold: Number = Field(description="What the value is compared with.")
    max_age: PositiveDuration = seconds("60s", "An older sample is not known; at least twice the scrape interval.")


class StepGateSection(ConditionSection):
    """A condition that must hold before a restart step is taken; what is not known never advances."""

    interval: PositiveDuration = seconds("10s", "Time between two measurements.")
    failure_limit: Natural = Field(default=0, description="Failed measurements that are borne.")
    inconclusive_limit: Natural = Field(
        default=0, description="Unusable measurements that are borne; one more holds the step until the gate passes."
    )
    consecutive_error_limit: Natural = Field(
        default=4, description="Unanswered measurements in a row that are borne; one more is a failure."
    )
    on_failure: Annotated[str, word("step_back", "kill"), json_words("word", ["step_back", "kill"])] = Field(
        default="step_back", description="What a failure leads to: the step before, or a new kill."
    )


class HealthQuerySection(ConditionSection):
    """A condition that must hold for the switch to count as healthy."""

    name: Text | None = Field(default=None, description="How reports call it; the query by default.")


def _step_factor(value: str) -> float:
    number = parse_number(value)
    if not 0 < number <= 1:
        raise ValueError(f"must be above 0 and at most 1, not {value}")
    return number


class RestartStepSection(Section):
    """One rung of the restart ladder."""

    factor: Annotated[float, from_text(_step_factor), json_text("number, above 0 to 1", type=["number", "string"])] = (
        Field(description="Position limit factor from this step on.")
    )
    after: Duration = seconds("0s", "Running time since trading reopened.")
    gates: tuple[StepGateSection, ...] = Field(
        default=(), description="Conditions that must all hold; what is not known does not hold."
    )


def _ladder(steps: tuple[RestartStepSection, ...]) -> tuple[RestartStepSection, ...]:
    if found := list(_ladder_misfits(steps)):
        raise Misfits(found)
    return steps


def _ladder_misfits(steps: tuple[RestartStepSection, ...]) -> Iterator[Misfit]:
    if not steps:
        yield (), "must hold at least one step"
        return
    if steps[0].after:
        yield (0, "after"), "must be 0 or absent: the first step counts from reopening"
    for index, (earlier, later) in enumerate(pairwise(steps), start=1):
        if later.factor <= earlier.factor:
            yield (index, "factor"), f"must be above {earlier.factor:g} of the step before, not {later.factor:g}"
        if later.after <= earlier.after:
            before, seen_after = format_duration(earlier.after), format_duration(later.after)
            yield (index, "after"), f"must be later than {before} of the step before, not {seen_after}"
    if steps[-1].factor != 1:
        yield (len(steps) - 1, "factor"), f"must be 1.0 in the last step, not {steps[-1].factor:g}"


_DEFAULT_STEPS = (
    RestartStepSection(factor=0.5),
    RestartStepSection(factor=0.75, after=3600.0),
    RestartStepSection(factor=1.0, after=7200.0),
)


class HealthSection(Section):
    """What must be well before and during a recovery."""

    sources_up: Flag = Field(default=True, description="Every source that an enforcing rule needs answers.")
    min_memory_available: Size | None = Field(default=None, description="Memory the host must have left.")
    max_cpu_percent: Percentage | None = Field(default=None, description="CPU use of the host must be below this.")
    queries: tuple[HealthQuerySection, ...] = Field(default=(), description="Conditions that must all hold.")


class RecoverySection(Section):
    """How trading comes back."""

    cooldown: Duration = seconds("5m", "Running time between the approved recovery and the first order.")
    backoff: BackoffSection = Field(default_factory=BackoffSection)
    steps: Annotated[tuple[RestartStepSection, ...], AfterValidator(_ladder)] = shown(
        _DEFAULT_STEPS,
        [{"factor": 0.5}, {"factor": 0.75, "after": "1h"}, {"factor": 1.0, "after": "2h"}],
        "The restart ladder: factors and times rise, the last factor is 1.0.",
    )
    require_approval: Flag = Field(default=True, description="`false` lets a recovery start without any code.")
    approvals: Count = Field(default=1, description="2 = two different approvers; needs `approvers_file`.")
    approvers_file: FilePath | None = Field(
        default=None,
        description="YAML list of `{name, code_hash}`. Without it the one code in `KILL_SWITCH_APPROVAL_CODE` of the "
        "sidecar's environment.",
    )
    approval_ttl: PositiveDuration = seconds("15m", "After this an approval lapses.")
    require_triggers_clear: Flag = Field(
        default=True, description="`false` lets a recovery start while rules still fire."
    )
    health: HealthSection = Field(default_factory=HealthSection)

    @classmethod
    def misfits_as_written(cls, written: Mapping[str, Any]) -> Iterator[Misfit]:
        """Two approvers must be two people."""
        approvals = str(written.get("approvals"))
        if approvals.isdecimal() and int(approvals[:9]) > 1 and written.get("approvers_file") is None:
            yield (
                ("approvals",),
                f"{approvals} need approvers_file: the code in the environment is one approver",
            )


class AuditSection(Section):
    """How much of the audit is kept."""

    max_bytes: Size = shown(parse_size("10MiB"), "10MiB", "A file that has grown to this is closed. At least 4KiB.")
    retention: PositiveDuration = seconds("90d", "Closed files older than this are removed.")

    def misfits(self) -> Iterator[Misfit]:
        """A file must hold more than a few events."""
        if self.max_bytes < parse_size("4KiB"):
            yield ("max_bytes",), f"must be at least 4KiB, not {self.max_bytes}B"


def _restore(value: Any) -> float | None:
    if isinstance(value, float):
        return value  # the default
    written = text(value)
    if written.lower() in _OFF:
        return None
    if (duration := parse_duration(written)) > 0:
        return duration
    raise ValueError(f"{written!r} is neither a duration above 0 nor off")


class StorageSection(Section):
    """What is remembered, and where."""

    dir: FilePath = Field(default="/var/lib/killswitch", description="State and audit. A second sidecar on it exits.")
    audit: AuditSection = Field(default_factory=AuditSection)
    restore_from_prometheus: Annotated[
        float | None,
        BeforeValidator(_restore),
        json_text("duration or off", "off|false|no|" + r"[0-9]+[a-z0-9]+", type=["string", "boolean"]),
    ] = shown(86400.0, "24h", "How far back Prometheus is asked where the folder is empty; `off` does not ask.")


_LEVELS = ("debug", "info", "warning", "error")
_FORMATS = ("json", "console")


class LoggingSection(Section):
    """What is written to standard output."""

    level: Annotated[str, word(*_LEVELS), json_words("word", _LEVELS)] = Field(
        default="info", description="`debug`, `info`, `warning` or `error`."
    )
    format: Annotated[str, word(*_FORMATS), json_words("word", _FORMATS)] = Field(
        default="json", description="`json` or `console`."
    )


class ConfigFile(Section):
    """The whole file."""

    switch: SwitchSection = Field(default_factory=SwitchSection)
    prometheus: PrometheusSection = Field(default_factory=PrometheusSection)
    scrape: tuple[ScrapeSection, ...] = Field(
        default=(), description="Endpoints that are scraped directly, with no Prometheus in the path."
    )
    rules: RulesSection = Field(default_factory=RulesSection)
    gate: GateSection = Field(default_factory=GateSection)
    operations: OperationsSection = Field(default_factory=OperationsSection)
    control: ControlSection = Field(default_factory=ControlSection)
    alertmanager: AlertmanagerSection = Field(default_factory=AlertmanagerSection)
    recovery: RecoverySection = Field(default_factory=RecoverySection)
    storage: StorageSection = Field(default_factory=StorageSection)
    logging: LoggingSection = Field(default_factory=LoggingSection)

    @classmethod
    def misfits_as_written(cls, written: Mapping[str, Any]) -> Iterator[Misfit]:
        """Sources are told apart by their names."""
        yield from taken_names("scrape", written.get("scrape"))
