"""Finds what a new configuration allows that the old one did not, so that no safety is taken away unseen."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from decimal import Decimal
from urllib.parse import urlsplit

from sidecar.core.policy import GatePolicy
from sidecar.rules.model import Heartbeat, Operator, Rule, RuleSet, Step, Threshold
from sidecar.settings.config import Alertmanager, Health, Settings

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
            [asdict(step) for step in before.steps],
            [asdict(step) for step in after.steps],
            before.steps != after.steps,
        ),
        "gate.killed_policy": (
            old.gate.policy.killed_policy.label,
            new.gate.policy.killed_policy.label,
            new.gate.policy.killed_policy < old.gate.policy.killed_policy,
        ),
        **_trust(old.gate.policy, new.gate.policy),
        "recovery.backoff": (
            [before.backoff_factor, before.backoff_max],
            [after.backoff_factor, after.backoff_max],
            after.backoff_factor < before.backoff_factor or after.backoff_max < before.backoff_max,
        ),
        "recovery.approval_ttl": (before.approval_ttl, after.approval_ttl, after.approval_ttl > before.approval_ttl),
        "prometheus.on_warnings": (
            old.prometheus.on_warnings,
            new.prometheus.on_warnings,
            (old.prometheus.on_warnings, new.prometheus.on_warnings) == ("inconclusive", "ignore"),
        ),
        **_health(old.recovery.health, new.recovery.health),
    }
    webhook, webhook_now = old.alertmanager.webhook, new.alertmanager.webhook
    found["alertmanager.webhook.match"] = (
        list(webhook.match),
        list(webhook_now.match),
        webhook.match != webhook_now.match,
    )
    found["alertmanager.webhook.expires"] = (
        webhook.expires,
        webhook_now.expires,
        webhook_now.expires < webhook.expires,
    )
    changes: Changes = {place: [was, now] for place, (was, now, looser) in found.items() if looser}
    return {
        **changes,
        **_sources(old, new),
        **_alerts(old, new),
        **_limits(old.gate.policy.position_limits, new.gate.policy.position_limits),
    }


def _trust(old: GatePolicy, new: GatePolicy) -> dict[str, tuple[object, object, bool]]:
    blind = "allow" if old.blind_orders else "deny", "allow" if new.blind_orders else "deny"
    claims = old.trust_reduce_claim, new.trust_reduce_claim
    return {
        "gate.blind_orders": (*blind, blind == ("deny", "allow")),
        "gate.trust_reduce_claim": (*claims, claims == (False, True)),
    }


def _sources(old: Settings, new: Settings) -> Changes:
    # Whoever answers decides what a rule sees, so another one who answers is another source of truth; fewer are not.
    changes: Changes = {}
    if set(new.prometheus.urls) - set(old.prometheus.urls):
        changes["prometheus.urls"] = [_addresses(old.prometheus.urls), _addresses(new.prometheus.urls)]
    known = {target.name: target.url for target in old.scrape}
    for target in new.scrape:
        was = known.get(target.name, target.url)
        if was != target.url:
            changes[f"scrape.{target.name}.url"] = [_address(was), _address(target.url)]
    return changes


def _alerts(old: Settings, new: Settings) -> Changes:
    changes: Changes = {}
    labels, labels_now = dict(old.switch.labels), dict(new.switch.labels)
    if labels != labels_now:  # alerts are matched with them: any other label may make a rule deaf
        changes["switch.labels"] = [labels, labels_now]
    # The listener, and with it its tokens, stays the old one until the next start.
    tokens = old.operations.tokens_file is not None
    ways, ways_now = _ways_in(old.alertmanager, tokens=tokens), _ways_in(new.alertmanager, tokens=tokens)
    if ways and not ways_now:  # no alert gets in any more
        changes["alertmanager.webhook"] = [ways, ways_now]
    told, told_now = old.alertmanager.notify.urls, new.alertmanager.notify.urls
    if set(told) - set(told_now):
        changes["alertmanager.notify.urls"] = [_addresses(told), _addresses(told_now)]
    return changes


def _ways_in(alertmanager: Alertmanager, *, tokens: bool) -> list[str]:
    webhook = alertmanager.webhook
    ways = {
        "token_file": webhook.token_file is not None,
        "allow_unauthenticated": webhook.allow_unauthenticated,
        "operations.tokens_file": tokens,
    }
    return [name for name, is_open in ways.items() if is_open]


def _addresses(urls: Iterable[str]) -> list[str]:
    return [_address(url) for url in urls]


def _address(url: str) -> str:
    """A URL as far as it may be audited: the user, the password and the parameters may be secrets."""
    parts = urlsplit(url)
    hidden = "?…" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{hidden}"


def _limits(old: Mapping[str, Decimal], new: Mapping[str, Decimal]) -> Changes:
    # By what holds for each symbol: one with a limit of its own has not that of `*`, and one that loses its own has.
    changes: Changes = {}
    for symbol in sorted(old.keys() | new.keys()):
        was, now = old.get(symbol, old.get("*")), new.get(symbol, new.get("*"))
        if was is not None and (now is None or now > was):
            changes[f"gate.position_limits.{symbol}"] = [str(was), None if now is None else str(now)]
    return changes


def _health(old: Health, new: Health) -> dict[str, tuple[object, object, bool]]:
    memory, cpu = (old.min_memory_available, new.min_memory_available), (old.max_cpu_percent, new.max_cpu_percent)
    gone = [asdict(query) for query in old.queries if query not in new.queries]
    return {
        "recovery.health.sources_up": _dropped(old.sources_up, new.sources_up),
        "recovery.health.min_memory_available": (
            *memory,
            memory[0] is not None and (memory[1] is None or memory[1] < memory[0]),
        ),
        "recovery.health.max_cpu_percent": (*cpu, cpu[0] is not None and (cpu[1] is None or cpu[1] > cpu[0])),
        "recovery.health.queries": (gone, [asdict(query) for query in new.queries], bool(gone)),
    }


def _dropped(was: bool, now: bool) -> tuple[bool, bool, bool]:  # noqa: FBT001 - two values of one flag
    return was, now, was and not now


def loosened_rules(old: RuleSet, new: RuleSet) -> Changes:
    """Rules that became milder, slower, or are gone."""
    known = {rule.trigger: rule for rule in new.rules}
    before, after = _intervals(old), _intervals(new)
    changes: Changes = {}
    for rule in old.rules:
        name = rule.trigger
        if rule.enforcing:
            for what, was, now in _rule_changes(rule, known.get(name)):
                changes[f"rules.{name}{what}"] = [was, now]
            if after.get(name, 0.0) > before[name]:
                changes[f"rules.{name} (interval of its group)"] = [before[name], after[name]]
    return changes


def _intervals(rules: RuleSet) -> dict[str, float]:
    return {rule.trigger: group.interval for group in rules.groups for rule in group.rules}


def _rule_changes(old: Rule, new: Rule | None) -> Iterator[tuple[str, object, object]]:
    if new is None:
        yield "", "enforcing", "removed"
    elif not new.enforcing:
        yield "", "enforcing", "shadow" if new.shadow else "disabled"
    else:
        yield from _milder(old, new)


def _milder(old: Rule, new: Rule) -> Iterator[tuple[str, object, object]]:
    was, now = old.on_no_data, new.on_no_data
    factor = old.factor is not None and new.factor is not None and new.factor > old.factor
    looser = [
        (".action", old.action.label, new.action.label, new.action < old.action),
        (".factor", old.factor, new.factor, factor),
        (".for", old.for_, new.for_, new.for_ > old.for_),
        (".keep_firing_for", old.keep_firing_for, new.keep_firing_for, new.keep_firing_for < old.keep_firing_for),
        (".max_age", old.max_age, new.max_age, new.max_age > old.max_age),
        (".on_no_data.hold_for", was.hold_for, now.hold_for, now.hold_for > was.hold_for),
        (".on_no_data.then", was.then.label, now.then.label, now.then < was.then),
        (".on_no_data.unreachable", was.unreachable.label, now.unreachable.label, now.unreachable < was.unreachable),
        (".series", old.series, new.series, old.series is not None and new.series != old.series),
        (".source", old.source, new.source, new.source != old.source),
        (".query", old.query, new.query, new.query != old.query),
    ]
    yield from ((place, before, after) for place, before, after, is_looser in looser if is_looser)
    yield from _wider(old, new)


def _wider(old: Rule, new: Rule) -> Iterator[tuple[str, object, object]]:
    match old.condition, new.condition:
        case Threshold() as was, Threshold() as now:
            down = now.threshold < was.threshold and not was.operator.points_up
            up = now.threshold > was.threshold and not was.operator.points_down
            if down or up or was.operator is not now.operator:
                yield (
                    ".threshold",
                    f"{was.operator.symbol} {was.threshold:g}",
                    f"{now.operator.symbol} {now.threshold:g}",
                )
            if was.clear is not None and (now.clear is None or not _as_early(now.operator, was.clear, now.clear)):
                yield ".clear", was.clear, now.clear
            if not _as_strict_on_the_way(was, now, new):
                yield ".steps", _steps(was), _steps(now)
        case Heartbeat() as was, Heartbeat() as now:
            if now.limit > was.limit:
                yield ".interval", was.limit, now.limit
        case was, now:
            if was != now:
                yield "", str(was), str(now)


def _as_early(operator: Operator, was: float, now: float) -> bool:
    """Whether things that get worse come to the new value no later than to the old one."""
    return was == now or (operator.points_down and now > was) or (operator.points_up and now < was)


def _as_strict_on_the_way(was: Threshold, now: Threshold, rule: Rule) -> bool:
    """Whether each old step has a new one, or the new rule itself, as early and as strict."""
    own = Step(at=now.threshold, action=rule.action, factor=rule.factor)
    return all(any(_covers(now, step, old, own=own) for step in (*now.steps, own)) for old in was.steps)


def _covers(now: Threshold, new: Step, old: Step, *, own: Step) -> bool:
    # A step holds at its own value too; the rule itself holds there or only beyond it, as its operator says.
    early = now.operator.holds(old.at, new.at) if new is own else _as_early(now.operator, old.at, new.at)
    return early and (new.action, -(new.factor or 0.0)) >= (old.action, -(old.factor or 0.0))


def _steps(condition: Threshold) -> list[tuple[float, str, float | None]]:
    return [(step.at, step.action.label, step.factor) for step in condition.steps]
