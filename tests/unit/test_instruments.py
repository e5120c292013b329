"""Every metric, name and label set by name: dashboards and alerts of others hang on them."""

import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isnan
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from sidecar.adapters.instruments import (
    Instruments,
    RecordTelemetry,
    SwitchTelemetry,
    TriggerTelemetry,
)
from sidecar.adapters.operations_http.exposition import FamilyWriter
from sidecar.core.events import CauseCode
from sidecar.core.snapshot import ALL_CLEAR, ReasonCode, Snapshot
from sidecar.core.states import Mode, Restriction, Stage, State
from sidecar.rules.triggers import Status

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
SWITCH = "trading/bot-0"
STATES = ("ACTIVE", "KILLED", "RECOVERING", "DISABLED")
STAGES = ("NONE", "PENDING", "VALIDATING", "COOLDOWN", "GRADUAL_RESTART", "COMPLETE")
ACTIVE = Snapshot(
    switch=SWITCH,
    mode=Mode.ACTIVE,
    state=State.ACTIVE,
    stage=Stage.GRADUAL_RESTART,
    restriction=Restriction.REDUCE_ONLY,
    factor=0.5,
    epoch=17,
    since=1.0,
    gate_restriction=Restriction.HALT,
    gate_factor=0.0,
    reason=ALL_CLEAR,
)


@dataclass
class FakeGate:
    decisions: Mapping[tuple[str, str], int] = field(
        default_factory=lambda: {("deny", code.value): 0 for code in ReasonCode} | {("allow", "active"): 3}
    )
    duration_bounds: Sequence[float] = (0.000025, 0.00005)
    duration_counts: Sequence[int] = (1, 2, 3)
    duration_sum: float = 0.5


def trigger(name: str = "drawdown", **more: Any) -> TriggerTelemetry:
    known: dict[str, Any] = {
        "status": Status.PENDING,
        "armed": True,
        "waived": False,
        "value": -0.1,
        "threshold": -0.2,
        "limit_used": 0.5,
        "sample_age": 1.5,
        "evaluations": 9,
        "failures": {"stale": 2},
    }
    return TriggerTelemetry(name=name, **{**known, **more})


class FakeTelemetry:
    def __init__(self) -> None:
        self.seen = SwitchTelemetry(
            switch=SWITCH,
            mode=Mode.ACTIVE,
            version="1.2.3",
            config_hash="abc",
            exported=ACTIVE,
            labels={"desk": "fx", "venue": "XETR"},
        )
        self.rules: Sequence[TriggerTelemetry] = (trigger(),)
        self.missed: Mapping[str, int] = {"portfolio": 0}
        self.up: Mapping[str, bool | None] = {"prometheus": True, "scrape:trader": False}
        self.answers = FakeGate()
        self.written = RecordTelemetry(reload_successful=True, reload_success=5.0)

    def switch(self) -> SwitchTelemetry:
        return self.seen

    def triggers(self) -> Sequence[TriggerTelemetry]:
        return self.rules

    def missed_iterations(self) -> Mapping[str, int]:
        return self.missed

    def sources(self) -> Mapping[str, bool | None]:
        return self.up

    def gate(self) -> FakeGate:
        return self.answers

    def records(self) -> RecordTelemetry:
        return self.written


class Scraped:
    """A telemetry with its instruments, and what a scrape of them shows."""

    def __init__(self) -> None:
        self.telemetry = FakeTelemetry()
        self.registry = CollectorRegistry(auto_describe=False)
        self.instruments = Instruments(self.registry, self.telemetry)

    def value(self, name: str, **labels: str) -> float:
        found = self.registry.get_sample_value(name, labels)
        assert found is not None, f"there is no {name}{labels}"
        return found

    def one_hot(self, name: str, label: str, **labels: str) -> dict[str, float]:
        return {
            sample.labels[label]: sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        }


@pytest.fixture
def scraped() -> Scraped:
    return Scraped()


CONTRACT: dict[str, tuple[str, set[tuple[str, ...]]]] = {
    "killswitch_info": ("gauge", {("config_hash", "mode", "switch", "version")}),
    "killswitch_state": ("gauge", {("state", "switch")}),
    "killswitch_restriction": ("gauge", {("restriction", "switch")}),
    "killswitch_position_limit_factor": ("gauge", {("switch",)}),
    "killswitch_epoch": ("gauge", {("switch",)}),
    "killswitch_recovery_stage": ("gauge", {("stage", "switch")}),
    "killswitch_recovery_cooldown_remaining_seconds": ("gauge", {()}),
    "killswitch_last_transition_timestamp_seconds": ("gauge", {()}),
    "killswitch_transitions_total": ("counter", {("from", "to")}),
    "killswitch_kill_cause": ("gauge", {("code", "switch", "trigger")}),
    "killswitch_switch_label_info": ("gauge", {("name", "switch", "value")}),
    "killswitch_trigger_status": ("gauge", {("status", "trigger")}),
    "killswitch_trigger_armed": ("gauge", {("trigger",)}),
    "killswitch_trigger_enabled": ("gauge", {("trigger",)}),
    "killswitch_trigger_waived": ("gauge", {("trigger",)}),
    "killswitch_trigger_value": ("gauge", {("trigger",)}),
    "killswitch_trigger_threshold": ("gauge", {("trigger",)}),
    "killswitch_trigger_limit_used_ratio": ("gauge", {("trigger",)}),
    "killswitch_trigger_sample_age_seconds": ("gauge", {("trigger",)}),
    "killswitch_trigger_evaluations_total": ("counter", {("trigger",)}),
    "killswitch_trigger_shadow_firings_total": ("counter", {("trigger",)}),
    "killswitch_trigger_evaluation_failures_total": ("counter", {("reason", "trigger")}),
    "killswitch_evaluation_duration_seconds": ("histogram", {(), ("le",)}),
    "killswitch_evaluation_iterations_missed_total": ("counter", {("group",)}),
    "killswitch_source_up": ("gauge", {("source",)}),
    "killswitch_breach_to_block_seconds": ("histogram", {(), ("le",)}),
    "killswitch_gate_decisions_total": ("counter", {("decision", "reason")}),
    "killswitch_gate_decision_duration_seconds": ("histogram", {(), ("le",)}),
    "killswitch_lease_renewal_delay_seconds": ("histogram", {(), ("le",)}),
    "killswitch_webhook_alerts_total": ("counter", {("result",)}),
    "killswitch_audit_events_total": ("counter", {()}),
    "killswitch_audit_write_failures_total": ("counter", {()}),
    "killswitch_audit_head_sequence": ("gauge", {()}),
    "killswitch_state_write_failures_total": ("counter", {()}),
    "killswitch_config_last_reload_successful": ("gauge", {()}),
    "killswitch_config_last_reload_success_timestamp_seconds": ("gauge", {()}),
    "killswitch_config_loosened_total": ("counter", {()}),
    "killswitch_log_lines_dropped_total": ("counter", {()}),
}


def test_the_metrics_are_those_that_are_documented_with_their_labels_and_types(scraped: Scraped) -> None:
    families = list(parse_plain(generate_latest(scraped.registry).decode()))
    ours = {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            {tuple(sorted(sample.labels)) for sample in family.samples},
        )
        for family in families
        if family.name.startswith("killswitch_")
    }
    assert ours == CONTRACT
    assert all(family.documentation for family in families)


def test_every_metric_stands_in_the_document_and_no_other(scraped: Scraped) -> None:
    page = (Path(__file__).parents[2] / "docs" / "METRICS.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(killswitch_\w+)` \|", page, re.MULTILINE)) == set(CONTRACT)


def test_the_process_and_the_platform_are_shown_too(scraped: Scraped) -> None:
    names = {family.name for family in scraped.registry.collect()}
    assert {"process_resident_memory_bytes", "python_info"} <= names


def test_nothing_reaches_the_registry_that_all_programs_share() -> None:
    from prometheus_client import REGISTRY

    before = generate_latest(REGISTRY)
    Scraped()
    assert [line for line in generate_latest(REGISTRY).splitlines() if b"killswitch" in line] == []
    assert b"killswitch" not in before


def test_a_durable_snapshot_is_shown_as_it_is(scraped: Scraped) -> None:
    assert scraped.one_hot("killswitch_state", "state") == {
        "ACTIVE": 1, "KILLED": 0, "RECOVERING": 0, "DISABLED": 0,
    }  # fmt: skip
    assert scraped.one_hot("killswitch_restriction", "restriction") == {"none": 0, "reduce_only": 1, "halt": 0}
    stages = scraped.one_hot("killswitch_recovery_stage", "stage")
    assert stages == {stage: float(stage == "GRADUAL_RESTART") for stage in STAGES}
    assert scraped.value("killswitch_position_limit_factor", switch=SWITCH) == 0.5
    assert scraped.value("killswitch_epoch", switch=SWITCH) == 17
    info = {"version": "1.2.3", "switch": SWITCH, "mode": "active", "config_hash": "abc"}
    assert scraped.value("killswitch_info", **info) == 1


def test_until_state_is_restored_no_state_is_claimed_and_the_strictest_is_shown(scraped: Scraped) -> None:
    scraped.telemetry.seen = replace(scraped.telemetry.seen, exported=None)
    assert scraped.one_hot("killswitch_state", "state") == dict.fromkeys(STATES, 0)
    assert scraped.one_hot("killswitch_recovery_stage", "stage") == dict.fromkeys(STAGES, 0)
    assert scraped.one_hot("killswitch_restriction", "restriction") == {"none": 0, "reduce_only": 0, "halt": 1}
    assert scraped.value("killswitch_position_limit_factor", switch=SWITCH) == 0
    assert scraped.value("killswitch_epoch", switch=SWITCH) == 0


def test_only_possible_changes_of_state_are_counted_and_all_of_them_from_the_start(scraped: Scraped) -> None:
    scraped.telemetry.seen = replace(scraped.telemetry.seen, transitions={(State.ACTIVE, State.KILLED): 2})
    seen = {
        (sample.labels["from"], sample.labels["to"]): sample.value
        for family in scraped.registry.collect()
        if family.name == "killswitch_transitions"
        for sample in family.samples
    }
    assert seen == {
        ("ACTIVE", "KILLED"): 2,
        ("KILLED", "RECOVERING"): 0,
        ("RECOVERING", "KILLED"): 0,
        ("RECOVERING", "ACTIVE"): 0,
    }


def test_each_cause_of_a_kill_is_shown_and_those_without_a_rule_from_the_start(scraped: Scraped) -> None:
    def causes() -> dict[tuple[str, str], float]:
        return {
            (sample.labels["code"], sample.labels["trigger"]): sample.value
            for family in scraped.registry.collect()
            if family.name == "killswitch_kill_cause"
            for sample in family.samples
        }

    assert causes() == {(code.value, ""): 0 for code in CauseCode}
    found = frozenset({("breach", "drawdown"), ("operator", "")})
    scraped.telemetry.seen = replace(scraped.telemetry.seen, causes=found)
    assert {cause for cause, value in causes().items() if value} == found
    assert causes()["breach", ""] == 0
    scraped.telemetry.seen = replace(scraped.telemetry.seen, causes=frozenset())
    assert causes() == {(code.value, ""): 0 for code in CauseCode}


def test_the_switchs_own_labels_are_shown_by_name_and_value(scraped: Scraped) -> None:
    labels = scraped.one_hot("killswitch_switch_label_info", "name", switch=SWITCH)
    assert labels == {"desk": 1, "venue": 1}
    assert scraped.one_hot("killswitch_switch_label_info", "value", switch=SWITCH) == {"fx": 1, "XETR": 1}


def test_a_trigger_is_shown_with_all_reasons_why_it_could_not_see(scraped: Scraped) -> None:
    assert scraped.one_hot("killswitch_trigger_status", "status", trigger="drawdown") == {
        "inactive": 0, "pending": 1, "firing": 0,
    }  # fmt: skip
    failures = scraped.one_hot("killswitch_trigger_evaluation_failures_total", "reason", trigger="drawdown")
    assert failures.keys() == {
        "stale", "missing", "ambiguous", "partial", "not_a_number", "future", "unreachable", "timeout", "http_error",
        "bad_response", "query_error", "wrong_type", "too_large",
    }  # fmt: skip
    assert sum(failures.values()) == failures["stale"] == 2
    for name, value in {"value": -0.1, "threshold": -0.2, "limit_used_ratio": 0.5, "sample_age_seconds": 1.5}.items():
        assert scraped.value(f"killswitch_trigger_{name}", trigger="drawdown") == value


def test_what_is_not_known_is_nan_and_not_zero(scraped: Scraped) -> None:
    scraped.telemetry.rules = [trigger(value=None, threshold=None, limit_used=None, sample_age=None)]
    scraped.telemetry.written = replace(scraped.telemetry.written, reload_success=None)
    for name in ("value", "threshold", "limit_used_ratio", "sample_age_seconds"):
        assert isnan(scraped.value(f"killswitch_trigger_{name}", trigger="drawdown"))
    assert isnan(scraped.value("killswitch_last_transition_timestamp_seconds"))
    assert isnan(scraped.value("killswitch_config_last_reload_success_timestamp_seconds"))


def test_a_rule_that_is_gone_leaves_no_series(scraped: Scraped) -> None:
    scraped.telemetry.rules = [trigger("a"), trigger("b")]
    assert scraped.one_hot("killswitch_trigger_armed", "trigger") == {"a": 1, "b": 1}
    scraped.telemetry.rules = [trigger("b", armed=False)]
    assert scraped.one_hot("killswitch_trigger_armed", "trigger") == {"b": 0}


def test_webhook_results_are_there_before_the_first_alert(scraped: Scraped) -> None:
    results = scraped.one_hot("killswitch_webhook_alerts_total", "result")
    assert results == dict.fromkeys(("accepted", "ignored", "duplicate", "malformed", "refused"), 0)


@pytest.mark.parametrize(
    ("observe", "name"),
    [
        ("observe_evaluation", "killswitch_evaluation_duration_seconds"),
        ("observe_breach_to_block", "killswitch_breach_to_block_seconds"),
        ("observe_lease_delay", "killswitch_lease_renewal_delay_seconds"),
    ],
)
def test_a_duration_counts_in_every_bucket_from_its_own_on(scraped: Scraped, observe: str, name: str) -> None:
    for seconds in (0.05, 0.051, 1000.0):
        getattr(scraped.instruments, observe)(seconds)
    assert scraped.value(f"{name}_bucket", le="0.025") == 0
    assert scraped.value(f"{name}_bucket", le="0.05") == 1
    assert scraped.value(f"{name}_bucket", le="0.1") == 2
    assert scraped.value(f"{name}_bucket", le="+Inf") == scraped.value(f"{name}_count") == 3
    assert scraped.value(f"{name}_sum") == pytest.approx(1000.101)


def test_the_gates_own_counts_are_shown_cumulated(scraped: Scraped) -> None:
    name = "killswitch_gate_decision_duration_seconds"
    buckets = [scraped.value(f"{name}_bucket", le=le) for le in ("2.5e-05", "5e-05", "+Inf")]
    assert buckets == [1, 3, 6]
    assert scraped.value(f"{name}_sum") == 0.5
    assert scraped.value("killswitch_gate_decisions_total", decision="allow", reason="active") == 3


# Writing it


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_remembered_lines_are_byte_for_byte_what_the_library_writes(scraped: Scraped, accept: str) -> None:
    encoder, _ = choose_encoder(accept)
    writer = FamilyWriter(encoder)
    telemetry = scraped.telemetry
    changes: list[Sequence[TriggerTelemetry]] = [
        [trigger("a"), trigger("b")],
        [trigger("a"), trigger("b")],
        [trigger("a", value=None), trigger("b", value=float("inf"))],
        [trigger("a", value=None), trigger("b", value=1e21)],
        [trigger('q"uote\\s\nä', value=-0.0)],
        [],
        [trigger("b", value=123456789.0), trigger("c")],
    ]
    for rules in changes:
        telemetry.rules = rules
        scraped.instruments.observe_evaluation(0.01)
        families = list(scraped.registry.collect())
        assert writer.write(families) == encoder(Collected(families))


class Collected:
    def __init__(self, families: list[Any]) -> None:
        self._families = families

    def collect(self) -> list[Any]:
        return self._families


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_families_with_timestamps_exemplars_or_creation_times_are_left_to_the_library(accept: str) -> None:
    from prometheus_client import Counter
    from prometheus_client.core import GaugeMetricFamily

    registry = CollectorRegistry()
    Counter("plain", "A counter.", ["a"], registry=registry).labels("x").inc(exemplar={"trace": "1"})
    stamped = GaugeMetricFamily("stamped", "A gauge.", labels=["a"])
    stamped.add_metric(["x"], 1.0, timestamp=5.0)
    families = [*registry.collect(), stamped]
    encoder, _ = choose_encoder(accept)
    writer = FamilyWriter(encoder)
    for _ in range(2):
        assert writer.write(families) == encoder(Collected(families))


def test_the_openmetrics_form_is_valid(scraped: Scraped) -> None:
    encoder, _ = choose_encoder(OPENMETRICS)
    families = {
        family.name
        for family in text_string_to_metric_families(encoder(scraped.registry).decode())  # type: ignore[no-untyped-call]
    }
    assert "killswitch_state" in families


@pytest.mark.e2e
def test_promtool_has_nothing_to_say_against_our_metrics(scraped: Scraped) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    text = generate_latest(scraped.registry)
    ours = b"".join(line + b"\n" for line in text.splitlines() if b"killswitch_" in line)
    checked = subprocess.run([promtool, "check", "metrics"], input=ours, capture_output=True, timeout=30, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_a_scrape_of_two_hundred_rules_is_cheap(scraped: Scraped) -> None:
    # The library alone takes 30 ms, for OpenMetrics 75. The limit is far above what we measure, so that a busy machine
    # does not fail it, and far enough below the library's to notice when nothing is remembered.
    encoder, _ = choose_encoder(OPENMETRICS)
    writer = FamilyWriter(encoder)
    took = []
    for round_ in range(6):
        scraped.telemetry.rules = [trigger(f"rule_{n}", value=n / (round_ + 3), evaluations=round_) for n in range(200)]
        began = time.process_time()
        families = list(scraped.registry.collect())
        collected = time.process_time()
        writer.write(families)
        took.append((time.process_time() - began, collected - began))
    print("seconds, in all and collecting:", took)
    assert min(took)[0] < 0.025
