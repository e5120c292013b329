"""Every query of the shipped rules in Prometheus' own engine: valid, quiet while all is well, firing when not."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sidecar.rules.model import Connectivity, Heartbeat, Rule, RuleSet, Threshold
from sidecar.settings.rule_files import load_rules

pytestmark = pytest.mark.e2e

RULES = Path(__file__).parents[2] / "rules"
PROMTOOL = shutil.which("promtool")
SELECTOR = 'namespace="trading",pod="bot-1"'
OURS = 'namespace="trading",pod="bot-1"'
ANOTHER = 'namespace="trading",pod="bot-2"'
ENVIRONMENTS = {"one bot of many": {"KILLSWITCH_SELECTOR": SELECTOR}, "the only bot": {}}

# A sample every 15 s, the slowest scrape that the packs are written for; looked at after ten minutes.
EVAL_SECONDS = 600

WELL = {
    "portfolio_drawdown_ratio": "-0.01x50",
    "daily_pnl_ratio": "0.01x50",
    "portfolio_gross_exposure_ratio": "1.2x50",
    "portfolio_largest_position_ratio": "0.2x50",
    "realized_volatility_ratio": "0.02x50",
    "trading_heartbeat_timestamp_seconds": "0+15x50",
    "exchange_connected": "1x50",
    "price_feed_timestamp_seconds|symbol=A": "0+15x50",
    "price_feed_timestamp_seconds|symbol=B": "0+15x50",
    "market_spread_ratio|symbol=A": "0.001x50",
    "market_spread_ratio|symbol=B": "0.002x50",
    "price_deviation_ratio|symbol=A": "0.001x50",
    "order_ack_seconds_sum": "0+1x50",
    "order_ack_seconds_count": "0+30x50",
    "orders_sent_total": "0+30x50",
    "order_rejects_total": "0+1x50",
    "killswitch_gate_decisions_total|decision=allow,reason=active": "0+30x50",
    "killswitch_gate_decisions_total|decision=allow,reason=cancel": "0+30x50",
    "killswitch_gate_decisions_total|decision=deny,reason=killed": "0x50",
    "killswitch_restriction|restriction=halt": "0x50",
    "killswitch_restriction|restriction=none": "1x50",
    "killswitch_trigger_evaluation_failures_total|trigger=a,reason=stale": "0x50",
    "killswitch_source_up|source=prometheus": "1x50",
    "killswitch_config_last_reload_successful": "1x50",
    "killswitch_audit_write_failures_total": "0x50",
    "killswitch_state_write_failures_total": "0x50",
}

# One way for each rule to go bad: these series instead of those above.
BAD = {
    "portfolio_drawdown": {"portfolio_drawdown_ratio": "-0.01x30 -0.16x20"},
    "drawdown_ladder": {"portfolio_drawdown_ratio": "-0.01x30 -0.16x20"},
    "daily_loss": {"daily_pnl_ratio": "-0.06x50"},
    "daily_loss_ladder": {"daily_pnl_ratio": "-0.06x50"},
    "volatility_spike": {"realized_volatility_ratio": "0.11x50"},
    "volatility_ladder": {"realized_volatility_ratio": "0.11x50"},
    "gross_exposure": {"portfolio_gross_exposure_ratio": "2.1x50"},
    "position_concentration": {"portfolio_largest_position_ratio": "0.51x50"},
    "trading_heartbeat": {"trading_heartbeat_timestamp_seconds": "0+15x10 165x40"},
    "exchange_disconnect": {"exchange_connected": "1x30 0x20"},
    "venue_session": {"exchange_connected": "1x30 0x20"},
    "venue_slow": {"order_ack_seconds_sum": "0+60x50"},
    # One symbol of two stands still.
    "price_feed_stale": {"price_feed_timestamp_seconds|symbol=B": "0+15x30 465x20"},
    "spread_too_wide": {"market_spread_ratio|symbol=B": "0.03x50"},
    "market_crossed": {"market_spread_ratio|symbol=A": "-0.001x50"},
    "price_deviation": {"price_deviation_ratio|symbol=A": "0.04x50"},
    "reject_ratio": {"order_rejects_total": "0+20x50"},
    "denied_orders": {"killswitch_gate_decisions_total|decision=deny,reason=killed": "0+40x50"},
    # The gate allowed half of what was sent; the cancels that it let pass do not make up for it.
    "gate_bypassed": {"killswitch_gate_decisions_total|decision=allow,reason=active": "0+15x50"},
    "traded_while_halted": {"killswitch_restriction|restriction=halt": "1x50"},
    "rules_cannot_see": {"killswitch_trigger_evaluation_failures_total|trigger=a,reason=stale": "0+1x50"},
    "source_down": {"killswitch_source_up|source=prometheus": "0x50"},
    "configuration_refused": {"killswitch_config_last_reload_successful": "0x50"},
    "audit_not_written": {"killswitch_audit_write_failures_total": "0x30 1x20"},
    "state_not_written": {"killswitch_state_write_failures_total": "0x30 1x20"},
}

# What must not fire though it looks close to it.
STILL_WELL = {
    "an idle bot": {
        "orders_sent_total": "5x50",
        "order_rejects_total": "1x50",
        "order_ack_seconds_sum": "1x50",
        "order_ack_seconds_count": "5x50",
        "killswitch_gate_decisions_total|decision=allow,reason=active": "5x50",
    },
    "two orders, one rejected": {"orders_sent_total": "0x35 2x15", "order_rejects_total": "0x35 1x15"},
    "bot and sidecar start anew": {
        "orders_sent_total": "0+30x37 0+30x12",
        "killswitch_gate_decisions_total|decision=allow,reason=active": "0+30x37 0+30x12",
    },
    "the sidecar is scraped one order burst late": {
        "killswitch_gate_decisions_total|decision=allow,reason=active": "0+30x38 1140x12",
        "orders_sent_total": "0+30x38 1150x12",
    },
    "halted, and no order was sent since": {
        "killswitch_restriction|restriction=halt": "0x30 1x20",
        "killswitch_gate_decisions_total|decision=allow,reason=active": "0+30x31 930x20",
        "orders_sent_total": "0+30x31 930x20",
    },
}


@pytest.fixture(scope="module")
def promtool() -> str:
    if PROMTOOL is None:
        pytest.skip("promtool is not installed; it comes with Debian's prometheus")
    return PROMTOOL


def _rules(environ: dict[str, str]) -> RuleSet:
    return load_rules([str(RULES / "*.yaml")], environ=environ)


def _queried(environ: dict[str, str]) -> list[Rule]:
    return [rule for rule in _rules(environ).rules if rule.query is not None]


def _breach(rule: Rule) -> str:
    """The rule as an alert-style expression."""
    match rule.condition:
        case Threshold() as condition:
            return f"({condition.query}) {condition.operator.symbol} {condition.threshold!r}"
        case Heartbeat() as condition:
            return f"time() - ({condition.query}) > {condition.limit!r}"
        case Connectivity() as condition:
            return f"({condition.query}) != 1"
        case _:
            raise AssertionError(f"no translation for rule type {rule.kind}")


def _alert_file(folder: Path, rules: list[Rule]) -> Path:
    alerts = [{"alert": rule.trigger, "expr": _breach(rule)} for rule in rules]
    file = folder / "alerts.json"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "packs", "interval": "15s", "rules": alerts}]}))
    return file


def _series(values: dict[str, str], pod: str) -> list[dict[str, str]]:
    found = []
    for key, samples in values.items():
        name, _, labels = key.partition("|")
        own = "".join(
            f',{label}="{value}"' for label, _, value in (one.partition("=") for one in labels.split(",") if one)
        )
        found.append({"series": f"{name}{{{pod}{own}}}", "values": samples})
    return found


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _expect(
    promtool: str, folder: Path, rules: list[Rule], changed: dict[str, str], firing: set[str], others: dict[str, str]
) -> None:
    """Run Prometheus' unit tests: exactly `firing` of all rules fire."""
    alert_file = _alert_file(folder, rules)
    tests: dict[str, Any] = {
        "interval": "15s",
        "input_series": _series(WELL | changed, OURS) + _series(others, ANOTHER),
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertstate="firing",alertname="{rule.trigger}"}}) or vector(0)',
                "eval_time": f"{EVAL_SECONDS}s",
                "exp_samples": [{"labels": "{}", "value": 1 if rule.trigger in firing else 0}],
            }
            for rule in rules
        ],
    }
    file = folder / "tests.json"
    file.write_text(json.dumps({"rule_files": [str(alert_file)], "evaluation_interval": "15s", "tests": [tests]}))
    _run(promtool, "test", "rules", file)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_prometheus_accepts_every_query(promtool: str, tmp_path: Path, environment: str) -> None:
    _run(promtool, "check", "rules", _alert_file(tmp_path, _queried(ENVIRONMENTS[environment])))


def test_every_rule_with_a_query_has_a_way_to_go_bad() -> None:
    assert {rule.trigger for rule in _queried({})} == set(BAD)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_no_rule_fires_while_all_is_well(promtool: str, tmp_path: Path, environment: str) -> None:
    _expect(promtool, tmp_path, _queried(ENVIRONMENTS[environment]), {}, set(), {})


@pytest.mark.parametrize("case", STILL_WELL)
def test_what_only_looks_bad_fires_no_rule(promtool: str, tmp_path: Path, case: str) -> None:
    _expect(promtool, tmp_path, _queried({}), STILL_WELL[case], set(), {})


@pytest.mark.parametrize("trigger", BAD)
def test_a_rule_fires_when_its_metric_goes_bad_and_no_other_does(promtool: str, tmp_path: Path, trigger: str) -> None:
    together = {name for name, changed in BAD.items() if changed == BAD[trigger]}
    _expect(promtool, tmp_path, _queried({}), BAD[trigger], together, {})


def test_the_selector_keeps_another_bot_out(promtool: str, tmp_path: Path) -> None:
    others = {key: value for changed in BAD.values() for key, value in changed.items()}
    _expect(promtool, tmp_path, _queried(ENVIRONMENTS["one bot of many"]), {}, set(), others)
