"""The dashboard of all switches, by desk: who is killed, since when and why, and whose protection has gaps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grafana.panels import (
    BARS,
    COLOURED,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    REASON_COLOURS,
    RED,
    RESTRICTIONS,
    STATES,
    STEPS,
    UNKNOWN,
    Json,
    beyond,
    coded,
    column,
    constant,
    dashboard,
    datasource_variable,
    instant,
    lines,
    link,
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

UID: Final = "killswitch-fleet"

JOB: Final = 'job=~"$job"'
FLEET: Final = f'{JOB},switch=~"$switch"'

# Which target carries which switch: for the series that have no label `switch` of their own.
CARRIERS: Final = f"group by (job, instance, switch) (killswitch_info{{{FLEET}}})"

# The desk of each switch, "none" where the configuration gives it no such label. One desk only, also while two pods
# carry one switch: a table that fails during a rollout helps nobody.
DESKS: Final = (
    f"label_replace(topk by (switch) (1, group by (switch, desk) (label_replace(killswitch_switch_label_info{{{FLEET},"
    'name="$group"}, "desk", "$1", "value", "(.*)")))'
    f' or on (switch) group by (switch) (killswitch_info{{{FLEET}}}), "desk", "none", "desk", "")'
)


def of_switch(expr: str) -> str:
    """An expression without a label `switch`, with the switch and the desk of its target."""
    return f"({expr}) * on (job, instance) group_left (switch) {CARRIERS} * on (switch) group_left (desk) {DESKS}"


def with_desk(expr: str) -> str:
    """An expression with a label `switch`, with the desk of that switch."""
    return f"({expr}) * on (switch) group_left (desk) {DESKS}"


def build(runbook: str) -> Json:
    """The dashboard, with the address of the runbook that its link opens."""
    return dashboard(
        UID,
        "Kill switch: fleet",
        "All switches by desk: who is killed, since when and why, who trades with reduced limits, and whose "
        "protection has gaps.",
        other=link("One switch", "/d/killswitch-switch", "One switch in detail", "dashboard", keep_time=True),
        variables=[
            datasource_variable(),
            variable("job", "Job", "label_values(killswitch_info, job)", "Scrape jobs of sidecars", many=True),
            variable(
                "group",
                "Group by label",
                f"label_values(killswitch_switch_label_info{{{JOB}}}, name)",
                "Which of switch.labels stands for the desk",
                current={"text": "desk", "value": "desk"},
            ),
            variable(
                "desk",
                "Desk",
                f'label_values(killswitch_switch_label_info{{{JOB},name="$group"}}, value)',
                "Values of that label; switches without it are shown under All",
                many=True,
                allValue=".*",
            ),
            variable(
                "switch",
                "Switch",
                f'query_result(group by (switch) (killswitch_switch_label_info{{{JOB},name="$group",value=~"$desk"}})'
                # No series of killswitch_info has a label `desk`, so that this matches for All only.
                f' or (group by (switch) (killswitch_info{{{JOB},desk=~"$desk"}})'
                f' unless on (switch) killswitch_switch_label_info{{{JOB},name="$group"}}))',
                "Switches of these desks",
                many=True,
                regex='/switch="([^"]+)"/',
            ),
            constant("runbook", runbook, "Where the link to the runbook leads"),
        ],
        annotations=[
            transitions(
                f"max by (job, instance) (killswitch_last_transition_timestamp_seconds{{{JOB}}}) * 1000"
                f' * on (job, instance) group_right () (killswitch_state{{{FLEET},state="KILLED"}} == 1)',
                "{{switch}} KILLED",
                "{{switch}} is KILLED from here on",
            )
        ],
        parts=[*_now(), *_gaps(), *_work()],
    )


OPEN_SWITCH: Final[Json] = {
    "links": [
        {
            "title": "Open this switch",
            "url": "/d/killswitch-switch?var-datasource=${datasource}"
            "&var-switch=${__value.raw:percentencode}&${__url_time_range}",
        }
    ]
}


def _count(title: str, description: str, expr: str, color: str) -> Json:
    return stat(
        title,
        description,
        instant(expr),
        size=(4, 4),
        unit="none",
        thresholds=beyond(1, below=GREEN, above=color),
    )


def _now() -> Iterator[Json]:
    yield row("Who may trade?")
    yield stat(
        "Switches",
        "Sidecars that Prometheus sees, of the desks chosen.",
        instant(f"count(group by (switch) (killswitch_info{{{FLEET}}}))"),
        size=(4, 4),
        unit="none",
        color_mode="none",
    )
    yield _count(
        "Killed",
        "Blocked until an approved recovery.",
        f'sum(max by (switch) (killswitch_state{{{FLEET},state="KILLED"}}))',
        RED,
    )
    yield _count(
        "Recovering",
        "Approved, in the cooldown: still blocked.",
        f'sum(max by (switch) (killswitch_state{{{FLEET},state="RECOVERING"}}))',
        ORANGE,
    )
    yield _count(
        "Restricted, not killed",
        "ACTIVE, but with a part of the limits, or held by a firing rule to halt or reduce_only.",
        f'count(max by (switch) (killswitch_state{{{FLEET},state="ACTIVE"}} == 1) and on (switch)'
        f" (killswitch_position_limit_factor{{{FLEET}}} < 1 or on (switch)"
        f' killswitch_restriction{{{FLEET},restriction!="none"}} == 1)) or vector(0)',
        ORANGE,
    )
    yield _count(
        "Not enforcing",
        "In mode shadow or disabled: their rules block nothing.",
        f'count(group by (switch) (killswitch_info{{{FLEET},mode!="active"}})) or vector(0)',
        PURPLE,
    )
    yield _count(
        "Sidecars out of reach",
        "Targets of these jobs that Prometheus cannot scrape. A sidecar that is gone denies every order.",
        f"count(up{{{JOB}}} == 0) or vector(0)",
        RED,
    )
    yield table(
        "Killed: who, since when, why",
        "One line for each cause. breach and no_data come from the rule named, alert from Alertmanager, operator "
        "from a person; "
        "`killswitch status` in the pod has the name and the words.",
        [
            tabular(
                with_desk(
                    f"max by (job, instance) (killswitch_last_transition_timestamp_seconds{{{JOB}}}) * 1000"
                    f" * on (job, instance) group_right () (killswitch_kill_cause{{{FLEET}}} == 1)"
                    f" * on (job, instance) group_left (state) (killswitch_state{{{FLEET}}} == 1)"
                )
            )
        ],
        size=(14, 7),
        columns={
            "desk": "Desk",
            "switch": "Switch",
            "state": "State",
            "Value": "Since",
            "code": "Cause",
            "trigger": "Rule",
        },
        sort="Since",
        none="No switch is killed",
        overrides=[
            column("Switch", **OPEN_SWITCH),
            column("Since", unit="dateTimeFromNow"),
            column("Rule", noValue="–"),
            column("State", mappings=_state_words(), **COLOURED),
        ],
    )
    yield table(
        "By desk",
        "The strictest switch of a desk gives its factor.",
        [
            tabular(f"count by (desk) ({DESKS})"),
            tabular(
                f'sum by (desk) ({with_desk(f"""max by (switch) (killswitch_state{{{FLEET},state="KILLED"}})""")})'
            ),
            tabular(f"min by (desk) ({with_desk(f'min by (switch) (killswitch_position_limit_factor{{{FLEET}}})')})"),
        ],
        size=(10, 7),
        columns={"desk": "Desk", "Value #A": "Switches", "Value #B": "Killed", "Value #C": "Lowest factor"},
        join="desk",
        sort="Killed",
        none="No switch is scraped",
        overrides=[
            column("Killed", thresholds=beyond(1, below="transparent", above=RED), **COLOURED),
            column("Lowest factor", unit="percentunit"),
        ],
    )
    yield timeline(
        "State of each switch",
        "What held when, switch by switch. Marks are kills.",
        [ranged(coded("killswitch_state", "state", STATES, FLEET, "switch"), "{{switch}}")],
        size=(12, 8),
        mappings=words(STATES, "NOT RESTORED"),
    )
    yield table(
        "All switches",
        "In mode shadow or disabled a switch enforces nothing, whatever its state. Click one to open it.",
        [
            tabular(with_desk(coded("killswitch_state", "state", STATES, FLEET, "switch"))),
            tabular(coded("killswitch_restriction", "restriction", RESTRICTIONS, FLEET, "switch")),
            tabular(f"min by (switch) (killswitch_position_limit_factor{{{FLEET}}})"),
            tabular(f'group by (switch, mode) (killswitch_info{{{FLEET},mode!="active"}})'),
        ],
        size=(12, 8),
        columns={
            "desk": "Desk",
            "switch": "Switch",
            "Value #A": "State",
            "Value #B": "Restriction",
            "Value #C": "Factor",
            "mode": "Mode",
        },
        join="switch",
        sort="State",
        none="No switch is scraped",
        overrides=[
            column("Desk", custom__width=90),
            column("Switch", custom__width=150, **OPEN_SWITCH),
            column("State", mappings=words(STATES, "NOT RESTORED"), **COLOURED),
            column("Restriction", mappings=words(RESTRICTIONS, "UNKNOWN")),
            column("Mode", noValue="enforces"),
            column("Factor", unit="percentunit"),
        ],
    )
    firing = f'killswitch_trigger_status{{{JOB},status="firing"}} == 1'
    yield table(
        "Rules that fire now",
        "Rules that only warn are here too. A kill stays when its rule stops firing.",
        [
            tabular(of_switch(f"killswitch_trigger_{what}{{{JOB}}} and on (job, instance, trigger) {firing}"))
            for what in ("value", "threshold", "limit_used_ratio")
        ],
        size=(14, 7),
        columns={
            "desk": "Desk",
            "switch": "Switch",
            "trigger": "Rule",
            "Value #A": "Value",
            "Value #B": "Threshold",
            "Value #C": "Limit used",
        },
        none="No rule fires",
        overrides=[
            column("Switch", **OPEN_SWITCH),
            column("Rule", custom__width=170),
            column("Value", unit="short", mappings=UNKNOWN),
            column("Threshold", unit="short", mappings=UNKNOWN),
            column("Limit used", unit="percentunit", decimals=0, mappings=UNKNOWN),
        ],
    )
    yield lines(
        "Position limit factor",
        "What each switch multiplies its position limits by.",
        [ranged(f"min by (switch) (killswitch_position_limit_factor{{{FLEET}}})", "{{switch}}")],
        size=(10, 7),
        unit="percentunit",
        min=0,
        max=1,
        custom={**STEPS, "fillOpacity": 0},
    )


def _state_words() -> list[Json]:
    return [
        {
            "type": "value",
            "options": {
                state: {"text": state, "color": color, "index": index}
                for index, (state, color) in enumerate(STATES.items())
            },
        }
    ]


def _gaps() -> Iterator[Json]:
    yield row("Whose protection has gaps?")
    yield table(
        "Rules that cannot fire",
        "Their last evaluation gave no fresh reading, or they are switched off in their file. They protect "
        "nothing now.",
        [
            tabular(
                of_switch(
                    f"killswitch_trigger_enabled{{{JOB}}}"
                    f" and on (job, instance, trigger) killswitch_trigger_armed{{{JOB}}} == 0"
                )
            )
        ],
        size=(8, 6),
        columns={"desk": "Desk", "switch": "Switch", "trigger": "Rule", "Value": "Why"},
        none="Every rule can fire",
        overrides=[
            column("Switch", **OPEN_SWITCH),
            column("Why", mappings=value_map({1: ("no fresh reading", RED), 0: ("switched off", GREY)}), **COLOURED),
        ],
    )
    yield table(
        "Why rules were blind",
        "Evaluations without a fresh reading in the time range, by what was wrong.",
        [tabular(of_switch(f"increase(killswitch_trigger_evaluation_failures_total{{{JOB}}}[$__range]) > 0"))],
        size=(8, 6),
        columns={"switch": "Switch", "trigger": "Rule", "reason": "Reason", "Value": "Evaluations"},
        sort="Evaluations",
        none="Every evaluation gave a fresh reading",
        overrides=[column("Switch", **OPEN_SWITCH), column("Evaluations", unit="short", decimals=0)],
    )
    yield table(
        "Blind sources",
        "Sources that did not answer when they were asked last.",
        [tabular(of_switch(f"killswitch_source_up{{{JOB}}} == 0"))],
        size=(8, 6),
        columns={"desk": "Desk", "switch": "Switch", "source": "Source"},
        none="Every source answers",
        overrides=[column("Switch", **OPEN_SWITCH)],
    )
    yield table(
        "Waived rules",
        "An approved recovery overlooks them for a time, or holds them to another threshold. Put their end in the "
        "calendar.",
        [tabular(of_switch(f"killswitch_trigger_waived{{{JOB}}} == 1"))],
        size=(8, 6),
        columns={"desk": "Desk", "switch": "Switch", "trigger": "Rule"},
        none="No rule is waived",
        overrides=[column("Switch", **OPEN_SWITCH)],
    )
    yield table(
        "Refused configurations",
        "The new files could not be read; the old rules are in force since the time shown.",
        [
            tabular(
                of_switch(
                    f"killswitch_config_last_reload_success_timestamp_seconds{{{JOB}}} * 1000"
                    f" and on (job, instance) killswitch_config_last_reload_successful{{{JOB}}} == 0"
                )
            )
        ],
        size=(8, 6),
        columns={"desk": "Desk", "switch": "Switch", "Value": "Last good one"},
        none="Every configuration was taken",
        overrides=[column("Switch", **OPEN_SWITCH), column("Last good one", unit="dateTimeFromNow")],
    )
    yield table(
        "Gates that nobody asks",
        "No question in the time range. Find out whether the bot really asks before it sends.",
        [
            tabular(
                of_switch(f"sum by (job, instance) (increase(killswitch_gate_decisions_total{{{JOB}}}[$__range])) == 0")
            )
        ],
        size=(8, 6),
        columns={"desk": "Desk", "switch": "Switch"},
        none="Every gate is asked",
        overrides=[column("Switch", **OPEN_SWITCH)],
    )


def _work() -> Iterator[Json]:
    denied = f'killswitch_gate_decisions_total{{{JOB},decision="deny"}}'
    yield row("How does the fleet work?")
    yield lines(
        "Denied orders, by reason",
        "Questions a second that the gates answered with deny.",
        [
            ranged(
                f"sum by (reason) (rate({denied}[$__rate_interval]))"
                f" and sum by (reason) (increase({denied}[$__range])) > 0",
                "{{reason}}",
            )
        ],
        size=(8, 7),
        unit="reqps",
        min=0,
        noValue="Nothing was denied",
        overrides=REASON_COLOURS,
        custom={"fillOpacity": 40, "stacking": {"mode": "normal", "group": "A"}, **STEPS},
    )
    yield lines(
        "Alerts received, by result",
        "What became of the alerts that Alertmanager sent: malformed and refused ones stopped nothing.",
        [
            ranged(
                f"sum by (result) (increase(killswitch_webhook_alerts_total{{{JOB}}}[$__rate_interval]))"
                f" and sum by (result) (increase(killswitch_webhook_alerts_total{{{JOB}}}[$__range])) > 0",
                "{{result}}",
            )
        ],
        size=(8, 7),
        unit="short",
        min=0,
        noValue="No alert was received",
        custom=BARS,
    )
    yield table(
        "What runs",
        "More than one configuration among switches that should be alike is worth a look.",
        [tabular(short_hash(f"count by (mode, version, config_hash) (killswitch_info{{{FLEET}}})"))],
        size=(8, 7),
        columns={"mode": "Mode", "version": "Version", "config_hash": "Configuration", "Value": "Switches"},
        sort="Switches",
        none="No switch is scraped",
    )
