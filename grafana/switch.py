"""The dashboard of one switch: may it trade, why not, how near are its rules, and does the machinery work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grafana.panels import (
    BARS,
    BLUE,
    COLOURED,
    COUNT,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    REASON_COLOURS,
    RED,
    RESTRICTIONS,
    STAGES,
    STATES,
    STATUSES,
    STEPS,
    UNKNOWN,
    Json,
    bars,
    beyond,
    coded,
    column,
    constant,
    dashboard,
    datasource_variable,
    instant,
    lines,
    link,
    of_query,
    quantiles,
    ranged,
    row,
    short_hash,
    stat,
    table,
    tabular,
    timeline,
    transitions,
    value_map,
    variable,
    words,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

UID: Final = "killswitch-switch"

# Series without a label `switch` are found by the scrape target that carries the switch.
TARGET: Final = 'job=~"$job",instance=~"$instance"'
SWITCH: Final = f'{TARGET},switch="$switch"'
TRIGGER: Final = f'{TARGET},trigger=~"$trigger"'

STATE: Final = coded("killswitch_state", "state", STATES, SWITCH, "switch")
RESTRICTION: Final = coded("killswitch_restriction", "restriction", RESTRICTIONS, SWITCH, "switch")
STAGE: Final = coded("killswitch_recovery_stage", "stage", STAGES, SWITCH, "switch")
STATUS: Final = coded("killswitch_trigger_status", "status", STATUSES, TRIGGER, "trigger")

# Whether a rule could fire: its last evaluation gave a fresh reading, or it did not, or nobody evaluates it.
COULD_FIRE: Final = (
    f"max by (trigger) (killswitch_trigger_armed{{{TRIGGER}}})"
    f" + 2 * (1 - max by (trigger) (killswitch_trigger_enabled{{{TRIGGER}}}))"
)


def build(runbook: str) -> Json:
    """The dashboard, with the address of the runbook that its link opens."""
    return dashboard(
        UID,
        "Kill switch: one switch",
        "One trading pod's switch: whether it may trade and why not, how near each rule is to its limit, and "
        "whether gate, "
        "sources and records work.",
        other=link("Fleet", "/d/killswitch-fleet", "All switches, by desk", "dashboard", keep_time=True),
        variables=[
            datasource_variable(),
            variable("job", "Job", "label_values(killswitch_info, job)", "Scrape jobs of sidecars", many=True),
            variable(
                "switch",
                "Switch",
                'label_values(killswitch_info{job=~"$job"}, switch)',
                "switch.name in the configuration",
            ),
            variable(
                "instance",
                "Instance",
                'label_values(killswitch_info{job=~"$job",switch="$switch"}, instance)',
                "Scrape targets that carried the switch: more than one after a reschedule",
                many=True,
            ),
            variable(
                "trigger",
                "Rule",
                f"label_values(killswitch_trigger_armed{{{TARGET}}}, trigger)",
                "Rules of the switch",
                many=True,
            ),
            constant("runbook", runbook, "Where the link to the runbook leads"),
        ],
        annotations=[
            transitions(
                f"max by (job, instance) (killswitch_last_transition_timestamp_seconds{{{TARGET}}}) * 1000"
                f" * on (job, instance) group_right () (killswitch_state{{{SWITCH}}} == 1)",
                "{{state}}",
                "{{switch}} is {{state}} from here on",
            )
        ],
        parts=[*_now(), *_rules(), *_gate(), *_evaluation(), *_records()],
    )


def _now() -> Iterator[Json]:
    yield row("May it trade?")
    yield stat(
        "State",
        "The durable state. KILLED and RECOVERING block orders until an approved recovery has run its course. NOT "
        "RESTORED: "
        "what held before a restart is not known yet, and the gate denies.",
        instant(STATE),
        size=(4, 4),
        unit="none",
        mappings=words(STATES, "NOT RESTORED"),
    )
    yield stat(
        "In this state since",
        "Time of the last change of state. Empty until the first one.",
        instant(f"max(killswitch_last_transition_timestamp_seconds{{{TARGET}}}) * 1000"),
        size=(4, 4),
        unit="dateTimeFromNow",
        color_mode="none",
        noValue="no change yet",
        mappings=[{"type": "special", "options": {"match": "nan", "result": {"text": "no change yet", "index": 0}}}],
    )
    yield stat(
        "Restriction",
        "The strictest that kill, recovery and firing rules ask for: none, reduce_only (only what shrinks a "
        "position) or halt.",
        instant(RESTRICTION),
        size=(4, 4),
        unit="none",
        mappings=words(RESTRICTIONS, "UNKNOWN"),
    )
    yield stat(
        "Position limit factor",
        "What position limits are multiplied by: 0 % while killed, then the steps of the restart, 100 % in normal "
        "trading.",
        instant(f"min(killswitch_position_limit_factor{{{SWITCH}}})"),
        size=(4, 4),
        unit="percentunit",
        thresholds=beyond(1, below=ORANGE, above=GREEN),
        mappings=value_map({0: ("0 %", RED)}),
    )
    yield stat(
        "Recovery",
        "PENDING waits for approvals, COOLDOWN runs, GRADUAL_RESTART trades with a part of the limits.",
        instant(STAGE),
        size=(4, 4),
        unit="none",
        mappings=words(STAGES, "UNKNOWN"),
    )
    yield stat(
        "Cooldown left",
        "How long the cooldown of the recovery still lasts; none outside one.",
        instant(f"max(killswitch_recovery_cooldown_remaining_seconds{{{TARGET}}})"),
        size=(4, 4),
        unit="s",
        decimals=0,
        color_mode="none",
        mappings=[{"type": "value", "options": {"0": {"text": "none", "index": 0}}}],
    )
    yield timeline(
        "State, restriction and recovery",
        "What held when. Marks are changes of state.",
        [ranged(STATE, "State"), ranged(RESTRICTION, "Restriction"), ranged(STAGE, "Recovery")],
        size=(16, 7),
        overrides=[
            of_query("A", mappings=words(STATES, "NOT RESTORED")),
            of_query("B", mappings=words(RESTRICTIONS, "UNKNOWN")),
            of_query("C", mappings=words(STAGES, "UNKNOWN")),
        ],
    )
    yield table(
        "Why it is killed",
        "Causes of the present kill: breach and no_data come from a rule, alert from Alertmanager, operator from "
        "a person. "
        "`killswitch status` has names, values and times.",
        [tabular(f"max by (code, trigger) (killswitch_kill_cause{{{SWITCH}}} == 1)")],
        size=(8, 7),
        columns={"code": "Cause", "trigger": "Rule"},
        none="It is not killed",
        overrides=[column("Rule", noValue="–")],
    )
    yield lines(
        "Position limit factor over time",
        "After a kill it comes back in steps, each only when its time and its gates allow.",
        [ranged(f"min(killswitch_position_limit_factor{{{SWITCH}}})", "factor")],
        size=(12, 6),
        unit="percentunit",
        min=0,
        max=1,
        custom=STEPS,
    )
    yield lines(
        "Cooldown left over time",
        "A kill or a lost health check during the cooldown ends it; the next one starts anew, and longer with "
        "each kill.",
        [ranged(f"max(killswitch_recovery_cooldown_remaining_seconds{{{TARGET}}})", "cooldown")],
        size=(12, 6),
        unit="s",
        min=0,
    )


def _rules() -> Iterator[Json]:
    yield row("How near are the rules to firing?")
    yield bars(
        "Share of each limit that is used",
        "Value ÷ threshold, 100 % at the limit. Rules without a numeric limit, or whose limit is at zero, are not "
        "here.",
        instant(
            f"sort_desc(max by (trigger) (killswitch_trigger_limit_used_ratio{{{TRIGGER}}}) > -Inf)", "{{trigger}}"
        ),
        size=(8, 9),
        unit="percentunit",
        decimals=0,
        min=0,
        max=1,
        thresholds=beyond(1, below=BLUE, above=RED),
        color={"mode": "thresholds"},
        noValue="No rule has a limit to compare with",
    )
    yield table(
        "Rules now",
        "Can fire: the last evaluation gave a fresh reading. A rule that cannot fire protects nothing. Waived: an "
        "approved "
        "recovery overlooks it for a time, or holds it to another threshold.",
        [
            tabular(STATUS),
            tabular(f"max by (trigger) (killswitch_trigger_value{{{TRIGGER}}})"),
            tabular(f"max by (trigger) (killswitch_trigger_threshold{{{TRIGGER}}})"),
            tabular(COULD_FIRE),
            tabular(f"max by (trigger) (killswitch_trigger_waived{{{TRIGGER}}})"),
            tabular(f"max by (trigger) (killswitch_trigger_sample_age_seconds{{{TRIGGER}}})"),
        ],
        size=(16, 9),
        columns={
            "trigger": "Rule",
            "Value #A": "Status",
            "Value #B": "Value",
            "Value #C": "Threshold",
            "Value #D": "Can fire",
            "Value #E": "Waived",
            "Value #F": "Sample age",
        },
        join="trigger",
        sort="Status",
        none="No rules are loaded",
        overrides=[
            column("Rule", custom__width=170),
            column("Status", mappings=words(STATUSES, "unknown"), **COLOURED),
            column("Value", unit="short", mappings=UNKNOWN),
            column("Threshold", unit="short", mappings=UNKNOWN),
            column("Can fire", mappings=value_map({1: ("yes", GREEN), 0: ("NO", RED), 2: ("off", GREY)}), **COLOURED),
            column("Waived", mappings=value_map({0: ("no", "transparent"), 1: ("WAIVED", PURPLE)}), **COLOURED),
            column("Sample age", unit="s", decimals=1, mappings=UNKNOWN),
        ],
    )
    yield timeline(
        "Status of each rule",
        "pending: the condition holds, but not yet for as long as `for` asks.",
        [ranged(STATUS, "{{trigger}}")],
        size=(12, 8),
        mappings=words(STATUSES, "unknown"),
    )
    yield timeline(
        "Could each rule fire?",
        "A rule is blind while its metric is missing, stale, not a number or ambiguous; what then happens is its "
        "`on_no_data`. "
        "A rule that is switched off in its file protects nothing.",
        [ranged(COULD_FIRE, "{{trigger}}")],
        size=(12, 8),
        mappings=value_map({1: ("could fire", GREEN), 0: ("BLIND", RED), 2: ("switched off", GREY)}),
    )
    yield lines(
        "$trigger: value against threshold",
        "What the rule read, and the threshold in force, a waiver's included. In the rule's own unit.",
        [
            ranged(f"max by (trigger) (killswitch_trigger_value{{{TRIGGER}}}) > -Inf", "value"),
            ranged(f"max by (trigger) (killswitch_trigger_threshold{{{TRIGGER}}}) > -Inf", "threshold"),
        ],
        size=(8, 6),
        unit="short",
        repeat="trigger",
        maxPerRow=3,
        noValue="This rule reads no number",
        overrides=[
            column(
                "threshold",
                color={"mode": "fixed", "fixedColor": RED},
                custom__lineStyle={"fill": "dash", "dash": [8, 6]},
                custom__fillOpacity=0,
            )
        ],
    )
    yield lines(
        "Age of the samples",
        "How old the oldest sample behind each value was when its source was asked. Beyond a rule's max_age it is "
        "stale.",
        [ranged(f"max by (trigger) (killswitch_trigger_sample_age_seconds{{{TRIGGER}}}) > -Inf", "{{trigger}}")],
        size=(8, 7),
        unit="s",
        min=0,
    )
    yield lines(
        "Evaluations without a fresh reading",
        "By rule and by what was wrong; the words are explained in docs/METRICS.md. Nothing here is good.",
        [
            ranged(
                "sum by (trigger, reason)"
                f" (increase(killswitch_trigger_evaluation_failures_total{{{TRIGGER}}}[$__rate_interval])) > 0",
                "{{trigger}}: {{reason}}",
            )
        ],
        size=(8, 7),
        unit="short",
        min=0,
        custom=BARS,
        noValue="Every evaluation gave a fresh reading",
    )

    yield lines(
        "What rules in shadow would have done",
        "Times that a rule in shadow would have restricted trading. Look here before you put it in force.",
        [
            ranged(
                "sum by (trigger)"
                f" (increase(killswitch_trigger_shadow_firings_total{{{TRIGGER}}}[$__rate_interval])) > 0",
                "{{trigger}}",
            )
        ],
        size=(8, 7),
        unit="short",
        min=0,
        custom=BARS,
        noValue="No rule in shadow would have acted",
    )


def _gate() -> Iterator[Json]:
    decisions = f"killswitch_gate_decisions_total{{{TARGET}}}"
    yield row("Does the gate stop orders, and how fast?")
    yield stat(
        "Breaches blocked",
        "How often a breach closed the gate, in the time range shown.",
        instant(f"sum(increase(killswitch_breach_to_block_seconds_count{{{TARGET}}}[$__range]))"),
        size=(4, 7),
        unit="none",
        decimals=0,
        color_mode="none",
    )
    yield panel_breach()
    yield lines(
        "Gate decisions",
        "Questions a second by answer and reason. No decisions while the bot trades means that nobody asks the gate.",
        [
            ranged(
                f"sum by (decision, reason) (rate({decisions}[$__rate_interval]))"
                f" and sum by (decision, reason) (increase({decisions}[$__range])) > 0",
                "{{decision}}: {{reason}}",
            )
        ],
        size=(14, 7),
        unit="reqps",
        min=0,
        custom={"fillOpacity": 40, "stacking": {"mode": "normal", "group": "A"}, **STEPS},
        noValue="Nobody asked the gate",
        overrides=REASON_COLOURS,
    )
    yield lines(
        "Time to answer a question",
        "From the arrival of a question at the gate to its answer; the network and the caller's own time are not "
        "in it.",
        quantiles("", "killswitch_gate_decision_duration_seconds", "$__rate_interval", TARGET),
        size=(12, 7),
        unit="s",
        min=0,
    )
    yield lines(
        "Delay of the lease",
        "How much later than planned the gate's lease was renewed. Near gate.lease (500 ms unless configured) "
        "readers begin "
        "to deny as stale: the pod lacks CPU.",
        quantiles("", "killswitch_lease_renewal_delay_seconds", "$__rate_interval", TARGET),
        size=(12, 7),
        unit="s",
        min=0,
    )


def panel_breach() -> Json:
    """How long breaches took to close the gate: few events, so over the whole range and not as a rate."""
    breach = stat(
        "From breach to block",
        "From the time of the sample that broke a limit to the closed gate, in the time range shown: scrape interval, "
        "evaluation interval and the sidecar's own time together.",
        {},
        size=(6, 7),
        unit="s",
        color_mode="none",
        text_mode="value_and_name",
        noValue="no breach in this range",
        mappings=[{"type": "special", "options": {"match": "nan", "result": {"text": "no breach", "index": 0}}}],
    )
    targets = quantiles("", "killswitch_breach_to_block_seconds", "$__range", TARGET, "increase")
    shared = breach["targets"][0]
    breach["targets"] = [
        {**shared, **target, "range": False, "instant": True, "refId": ref}
        for ref, target in zip("AB", targets, strict=True)
    ]
    return breach


def _evaluation() -> Iterator[Json]:
    yield row("Are rules evaluated, and do sources answer?")
    yield timeline(
        "Sources",
        "Whether each source answered when it was asked last. While one is down its rules wait for `hold_for`, "
        "and then do "
        "what their `on_no_data` says.",
        [ranged(f"min by (source) (killswitch_source_up{{{TARGET}}})", "{{source}}")],
        size=(8, 5),
        mappings=value_map({1: ("up", GREEN), 0: ("DOWN", RED)}),
    )
    yield timeline(
        "The sidecar's own scrape target",
        "DOWN: Prometheus cannot reach the sidecar. If it is gone, every order is denied.",
        [ranged(f"max by (instance) (up{{{TARGET}}})", "{{instance}}")],
        size=(8, 5),
        mappings=value_map({1: ("up", GREEN), 0: ("DOWN", RED)}),
    )
    yield timeline(
        "Last reload of the configuration",
        "REFUSED: the new files could not be read and the old rules are in force; the log and `killswitch status` "
        "say why.",
        [ranged(f"min(killswitch_config_last_reload_successful{{{TARGET}}})", "reload")],
        size=(8, 5),
        mappings=value_map({1: ("in force", GREEN), 0: ("REFUSED", RED)}),
    )
    yield lines(
        "Duration of an evaluation",
        "One evaluation of a group of rules, questions to its sources included. It must stay below the group's "
        "interval.",
        quantiles("", "killswitch_evaluation_duration_seconds", "$__rate_interval", TARGET),
        size=(12, 7),
        unit="s",
        min=0,
    )
    yield lines(
        "Evaluations left out",
        "By group, because earlier ones took longer than the interval. Zero is good.",
        [
            ranged(
                "sum by (group)"
                f" (increase(killswitch_evaluation_iterations_missed_total{{{TARGET}}}[$__rate_interval]))",
                "{{group}}",
            )
        ],
        size=(12, 7),
        unit="short",
        decimals=0,
        min=0,
        custom=COUNT,
    )


def _records() -> Iterator[Json]:
    def increase(metric: str) -> str:
        return f"sum(increase({metric}{{{TARGET}}}[$__rate_interval]))"

    yield row("Is everything recorded, and which configuration is in force?")
    yield lines(
        "Writes that failed",
        "The state file, the audit, and log lines that were dropped. A kill that could not be written is in force, "
        "but a restart could forget it. Zero is good.",
        [
            ranged(increase("killswitch_state_write_failures_total"), "state file"),
            ranged(increase("killswitch_audit_write_failures_total"), "audit"),
            ranged(increase("killswitch_log_lines_dropped_total"), "log"),
        ],
        size=(8, 7),
        unit="short",
        decimals=0,
        min=0,
        custom=COUNT,
    )
    yield lines(
        "Audit events",
        "Events written to the audit; `killswitch audit` shows them.",
        [ranged(increase("killswitch_audit_events_total"), "events")],
        size=(8, 7),
        unit="short",
        min=0,
        custom=BARS,
    )
    yield lines(
        "Epoch",
        "Counts the durable changes of the switch over its life. If it goes back, the state volume was replaced "
        "by an older one.",
        [ranged(f"max(killswitch_epoch{{{SWITCH}}})", "epoch")],
        size=(8, 7),
        unit="none",
        decimals=0,
        custom=STEPS,
    )
    yield lines(
        "Alerts received",
        "By what became of them: accepted, ignored (not ours), duplicate, malformed, refused (no credentials).",
        [
            ranged(
                f"sum by (result) (increase(killswitch_webhook_alerts_total{{{TARGET}}}[$__rate_interval]))"
                f" and sum by (result) (increase(killswitch_webhook_alerts_total{{{TARGET}}}[$__range])) > 0",
                "{{result}}",
            )
        ],
        size=(8, 6),
        unit="short",
        min=0,
        custom=BARS,
        noValue="No alert was received",
    )
    yield lines(
        "Loosened",
        "Reloads and starts that made something less strict: a wider threshold, a rule removed, fewer approvals. "
        "Each is in the "
        "audit as config.loosened.",
        [ranged(increase("killswitch_config_loosened_total"), "loosened")],
        size=(8, 6),
        unit="short",
        min=0,
        custom=BARS,
    )
    yield table(
        "What runs",
        "Mode active enforces; shadow only watches, an operator's own kill excepted; disabled blocks nothing.",
        [tabular(short_hash(f"max by (mode, version, config_hash) (killswitch_info{{{SWITCH}}})"))],
        size=(8, 6),
        columns={"mode": "Mode", "version": "Version", "config_hash": "Configuration"},
        none="The sidecar is not scraped",
        overrides=[
            column(
                "Mode",
                mappings=[
                    {
                        "type": "value",
                        "options": {
                            mode: {"text": text, "color": color, "index": index}
                            for index, (mode, text, color) in enumerate(
                                (
                                    ("active", "active", GREEN),
                                    ("shadow", "SHADOW", PURPLE),
                                    ("disabled", "DISABLED", PURPLE),
                                )
                            )
                        },
                    }
                ],
                **COLOURED,
            )
        ],
    )
    yield lines(
        "Memory",
        "Resident memory of the sidecar. Compare it with the container's limit.",
        [ranged(f"max by (instance) (process_resident_memory_bytes{{{TARGET}}})", "{{instance}}")],
        size=(12, 6),
        unit="bytes",
        min=0,
    )
    yield lines(
        "CPU",
        "Processor time that the sidecar uses, 100 % is one core.",
        [ranged(f"sum by (instance) (rate(process_cpu_seconds_total{{{TARGET}}}[$__rate_interval]))", "{{instance}}")],
        size=(12, 6),
        unit="percentunit",
        min=0,
    )
