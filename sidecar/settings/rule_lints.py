"""What is allowed in a rule, but is probably not what its author meant.

Each doubt comes from a way in which a rule can look right and never fire, or fire always. Nothing here stops a rule.
"""

import re
from collections.abc import Iterator, Sequence

from sidecar.rules.model import Operator
from sidecar.settings.fields import Misfit
from sidecar.settings.promql import parse
from sidecar.settings.rule_models import (
    ConnectivitySection,
    ExpressionSection,
    GroupSection,
    HeartbeatSection,
    QueryRuleSection,
    RuleSection,
    ThresholdSection,
)

_LOSS = re.compile(r"drawdown|pnl|profit|loss", re.IGNORECASE)
_ALERTS = re.compile(r"ALERTS\b")
_FILLED_GAP = re.compile(r"\bor\s+(?:on\s*\([^()]*\)\s*)?vector\s*\(", re.IGNORECASE)


def doubts(groups: Sequence[GroupSection]) -> Iterator[Misfit]:
    """Yield the doubts about all rules of one file, each with its path from the top of the file."""
    for group_index, group in enumerate(groups):
        for rule_index, rule in enumerate(group.rules):
            for path, reason in _doubts_of(rule):
                yield ("groups", group_index, "rules", rule_index, *path), reason


def _doubts_of(rule: RuleSection) -> Iterator[Misfit]:
    if isinstance(rule, ThresholdSection):
        yield from _wrong_sign(rule)
    if isinstance(rule, ExpressionSection):
        yield from _silent_expression(rule)
    if isinstance(rule, QueryRuleSection):
        yield from _filled_gap(rule)
        yield from _own_alerts(rule)


def _wrong_sign(rule: ThresholdSection) -> Iterator[Misfit]:
    names = parse(rule.query).metric_names
    suspect = next((name for name in names if _LOSS.search(name)), None)
    if suspect is None or rule.threshold <= 0:
        return
    written = f"{suspect} {rule.operator.symbol} {rule.threshold:g}"
    convention = "drawdown and PnL are ratios with losses negative"
    if rule.operator in (Operator.GT, Operator.GE):
        yield ("operator",), f"{written}: {convention}; is lt and {-rule.threshold:g} meant?"
    elif rule.operator.points_down:
        meant = f"is {-rule.threshold:g} meant?"
        yield ("threshold",), f"{written}: {convention}; this fires while nothing is lost; {meant}"


def _silent_expression(rule: ExpressionSection) -> Iterator[Misfit]:
    if rule.source != "prometheus":
        return
    parsed = parse(rule.expr)
    if parsed.kind == "scalar":
        yield ("expr",), "is a scalar, which always is a series: the rule fires always"
    elif rule.series is None and parsed.selectors:
        what = ", ".join(parsed.metric_names) or parsed.selectors[0].text
        advice = "write series, or use a threshold rule"
        yield ("expr",), f"looks healthy when {what} matches nothing, misspelt or no longer exported; {advice}"


def _own_alerts(rule: QueryRuleSection) -> Iterator[Misfit]:
    key, query = _query(rule)
    if query is None or rule.source != "prometheus":
        return
    for selector in parse(query).selectors:
        if _ALERTS.match(selector.text) and "killswitch_origin" not in selector.text:
            yield (key,), 'also sees alerts about sidecars: one kill may call for another; add killswitch_origin=""'


def _query(rule: QueryRuleSection) -> tuple[str, str | None]:
    if isinstance(rule, ThresholdSection | HeartbeatSection | ConnectivitySection):
        return "query", rule.query
    return "expr", rule.expr if isinstance(rule, ExpressionSection) else None


def _filled_gap(rule: QueryRuleSection) -> Iterator[Misfit]:
    key, query = _query(rule)
    if query is not None and _FILLED_GAP.search(query):
        yield (key,), "'or vector(...)' puts a number where data is missing: on_no_data will never see it"
