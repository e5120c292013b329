"""Finds what a new configuration allows that the old one did not, so that no safety is taken away unseen."""

from collections.abc import Iterator

from sidecar.rules.model import Heartbeat, Rule, RuleSet, Threshold
from sidecar.settings.config import Settings

Changes = dict[str, list[object]]
"""What was loosened: the place, with the old and the new value."""


def loosened_settings(old: Settings, new: Settings) -> Changes:
    """Settings that became more permissive."""
    before, after = old.recovery.policy, new.recovery.policy
    found = {
        "recovery.cooldown": (before.cooldown, after.cooldown, after.cooldown < before.cooldown),
        "recovery.approvals": (before.approvals, after.approvals, after.approvals < before.approvals),
        "recovery.require_approval": _dropped(before.require_approval, after.require_approval),
        "recovery.require_triggers_clear": _dropped(before.require_triggers_clear, after.require_triggers_clear),
        "recovery.steps": (
            [(step.factor, step.after) for step in before.steps],
            [(step.factor, step.after) for step in after.steps],
            before.steps != after.steps,
        ),
        "gate.killed_policy": (
            old.gate.policy.killed_policy.label,
            new.gate.policy.killed_policy.label,
            new.gate.policy.killed_policy < old.gate.policy.killed_policy,
        ),
        "gate.blind_orders": _dropped(not old.gate.policy.blind_orders, not new.gate.policy.blind_orders),
        "gate.trust_reduce_claim": _dropped(
            not old.gate.policy.trust_reduce_claim, not new.gate.policy.trust_reduce_claim
        ),
        "recovery.health.sources_up": _dropped(old.recovery.health.sources_up, new.recovery.health.sources_up),
    }
    changes: Changes = {place: [was, now] for place, (was, now, looser) in found.items() if looser}
    for symbol, limit in old.gate.policy.position_limits.items():
        other = new.gate.policy.position_limits.get(symbol)
        if other is None or other > limit:
            changes[f"gate.position_limits.{symbol}"] = [str(limit), None if other is None else str(other)]
    return changes


def _dropped(was: bool, now: bool) -> tuple[bool, bool, bool]:  # noqa: FBT001 - two values of one flag
    return was, now, was and not now


def loosened_rules(old: RuleSet, new: RuleSet) -> Changes:
    """Rules that became milder, slower, or are gone."""
    known = {rule.trigger: rule for rule in new.rules}
    changes: Changes = {}
    for rule in old.rules:
        if rule.enforcing:
            for what, was, now in _rule_changes(rule, known.get(rule.trigger)):
                changes[f"rules.{rule.trigger}{what}"] = [was, now]
    return changes


def _rule_changes(old: Rule, new: Rule | None) -> Iterator[tuple[str, object, object]]:
    if new is None:
        yield "", "enforcing", "removed"
    elif not new.enforcing:
        yield "", "enforcing", "shadow" if new.shadow else "disabled"
    else:
        yield from _milder(old, new)


def _milder(old: Rule, new: Rule) -> Iterator[tuple[str, object, object]]:
    if new.action < old.action:
        yield ".action", old.action.label, new.action.label
    if new.factor is not None and old.factor is not None and new.factor > old.factor:
        yield ".factor", old.factor, new.factor
    if new.for_ > old.for_:
        yield ".for", old.for_, new.for_
    if new.max_age > old.max_age:
        yield ".max_age", old.max_age, new.max_age
    if new.on_no_data.hold_for > old.on_no_data.hold_for:
        yield ".on_no_data.hold_for", old.on_no_data.hold_for, new.on_no_data.hold_for
    if new.on_no_data.then < old.on_no_data.then:
        yield ".on_no_data.then", old.on_no_data.then.label, new.on_no_data.then.label
    if new.on_no_data.unreachable < old.on_no_data.unreachable:
        yield ".on_no_data.unreachable", old.on_no_data.unreachable.label, new.on_no_data.unreachable.label
    if old.query != new.query:
        yield ".query", old.query, new.query
    yield from _wider(old, new)


def _wider(old: Rule, new: Rule) -> Iterator[tuple[str, object, object]]:
    match old.condition, new.condition:
        case Threshold() as was, Threshold() as now:
            down = was.operator.points_down and now.threshold < was.threshold
            up = was.operator.points_up and now.threshold > was.threshold
            if down or up or was.operator is not now.operator:
                yield (
                    ".threshold",
                    f"{was.operator.symbol} {was.threshold:g}",
                    f"{now.operator.symbol} {now.threshold:g}",
                )
            if was.steps != now.steps:
                yield ".steps", [step.at for step in was.steps], [step.at for step in now.steps]
        case Heartbeat() as was, Heartbeat() as now:
            if now.limit > was.limit:
                yield ".interval", was.limit, now.limit
        case was, now:
            if was != now and not isinstance(was, Threshold | Heartbeat):
                yield "", str(was), str(now)
