"""Says as alerts what people must hear of: transitions, recoveries, blind sources, failing writes, loosened safeties.

Looks at the application as it stands and says which alerts hold; how they reach Alertmanager is the notifier's affair.
Every one carries the label by which a sidecar's webhook knows that it must not act on it.
"""

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from sidecar.adapters.notifier import Notifier, OwnAlert
from sidecar.app.alerts import ORIGIN_LABEL
from sidecar.core.events import Cause, CauseCode
from sidecar.core.states import Action, Instant, Mode, Stage, State
from sidecar.rules.model import Rule
from sidecar.rules.triggers import Status, Trigger, explain, fill

if TYPE_CHECKING:
    from sidecar.app.application import Application

log = logging.getLogger("sidecar.notifications")

LOOK_SECONDS = 1.0
ENDED_SECONDS = 300.0
"""An alert that is over is shown so long, that a receiver which was away hears that too; later it has forgotten it."""
LOOSENED_SECONDS = 900.0
"""A moment is no alert. What a reload loosened is one for so long, for somebody must see it."""
START_SECONDS = 60.0
"""Time to get ready after a start, before not being ready is worth an alert."""
Key = tuple[tuple[str, str], ...]


class Board:
    """The alerts that hold, and those that were over a moment ago; pure."""

    def __init__(self) -> None:
        self._alerts: dict[Key, OwnAlert] = {}

    @property
    def alerts(self) -> tuple[OwnAlert, ...]:
        """All of them."""
        return tuple(self._alerts.values())

    def update(self, holding: Iterable[OwnAlert], now: Instant) -> bool:
        """Take over which alerts hold now; True where one began, began anew, or is over."""
        current = {tuple(sorted(alert.labels.items())): alert for alert in holding}
        moved = False
        for key, alert in current.items():
            known = self._alerts.get(key)
            moved = moved or known is None or known.ends_at is not None or known.starts_at != alert.starts_at
        for key, known in self._alerts.items():
            if key not in current and known.ends_at is None:
                current[key] = replace(known, ends_at=max(now.wall, known.starts_at))
                moved = True
            elif key not in current and known.ends_at is not None and now.wall - known.ends_at < ENDED_SECONDS:
                current[key] = known
        self._alerts = current
        return moved

    def since(self, labels: Mapping[str, str], now: Instant) -> float:
        """Since when an alert holds; now, for one that does not yet."""
        known = self._alerts.get(tuple(sorted(labels.items())))
        return now.wall if known is None or known.ends_at is not None else known.starts_at


class Notifications:
    """Shows the notifier what there is to say about one application."""

    def __init__(self, app: "Application", notifier: Notifier) -> None:
        self._app = app
        self._notifier = notifier
        self._board = Board()
        self._wake = asyncio.Event()
        self._failed = False
        app.keeper.observers.change.append(lambda _change: self._wake.set())

    async def run(self) -> None:
        """Look at every change and once a second, for ever."""
        while True:
            self._wake.clear()
            self._look_safely()
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._wake.wait()

    def _look_safely(self) -> None:
        try:
            self.look()
            self._failed = False
        except Exception:
            # What cannot be said must not stop trading, which the end of this task would.
            if not self._failed:
                log.exception("notifications.defect")
            self._failed = True

    def look(self) -> None:
        """Look once, and show what there is where it changed."""
        before = self._board.alerts
        moved = self._board.update(self._holding(), self._app.clock.now())
        if self._board.alerts != before:
            # Words that change while an alert holds, as a rule's value does every second, wait for the next push.
            self._notifier.show(self._board.alerts, at_once=moved)

    def _holding(self) -> Iterator[OwnAlert]:
        yield from self._state()
        yield from self._recovery()
        yield from self._rules()
        yield from self._sources()
        yield from self._writes()
        yield from self._health()
        yield from self._configuration()

    # What there is to say

    def _state(self) -> Iterator[OwnAlert]:
        app, state = self._app, self._app.switch.state
        causes = "; ".join(_told(cause) for cause in state.causes) or "for an unknown cause"
        triggers = tuple(dict.fromkeys(cause.trigger for cause in state.causes if cause.trigger))
        if state.state is State.KILLED and app.switch.snapshot().would_be is not None:
            yield self._alert(
                "KillswitchShadowKill",
                "warning",
                "would have stopped trading; in shadow mode it does not",
                causes,
                since=state.since,
                triggers=triggers,
            )
        elif state.state is State.KILLED:
            yield self._alert(
                "KillswitchKilled",
                "critical",
                f"trading is stopped ({state.kill_restriction.label})",
                f"{causes}. Only an approved recovery releases it: killswitch recover --reason TEXT --by NAME",
                since=state.since,
                triggers=triggers,
            )
        elif state.state is State.RECOVERING:
            yield self._alert(
                "KillswitchRecovering",
                "warning",
                "trading is still stopped; an approved recovery is in its cooldown",
                causes,
                since=state.since,
                triggers=triggers,
            )
        elif state.state is State.DISABLED:
            yield self._alert(
                "KillswitchDisabled", "critical", "the switch is disabled", "nothing is evaluated, nothing is blocked"
            )

    def _recovery(self) -> Iterator[OwnAlert]:
        state, needed = self._app.switch.state, self._app.switch.policies.recovery.approvals
        if state.recovery is None:
            return
        asked = f"asked for by {state.recovery.by}: {state.recovery.reason}"
        match state.stage:
            case Stage.PENDING:
                yield self._alert(
                    "KillswitchApprovalPending",
                    "warning",
                    f"a recovery waits for approval ({len(state.recovery.approvals)} of {needed})",
                    asked,
                    since=state.recovery.requested,
                )
            case Stage.GRADUAL_RESTART:
                yield self._alert(
                    "KillswitchRestartStep",
                    "info",
                    f"trading restarts at {state.factor:g} of the position limits",
                    asked,
                    factor=f"{state.factor:g}",
                )
            case Stage.COMPLETE:
                yield self._alert("KillswitchRecovered", "info", "trading is back at full position limits", asked)
            case _:
                pass

    def _rules(self) -> Iterator[OwnAlert]:
        evaluator = self._app.evaluator
        for rule in evaluator.rules.rules:
            trigger = evaluator.triggers[rule.trigger]
            if rule.enabled and trigger.status is Status.FIRING and not (rule.shadow and rule.action is Action.WARN):
                yield self._firing(rule, trigger)
        for demand in self._app.switch.demands:
            if demand.code is CauseCode.NO_DATA:
                yield self._alert(
                    "KillswitchTriggerBlind",
                    "critical" if demand.action > Action.WARN else "warning",
                    f"rule {demand.trigger} cannot see",
                    demand.message,
                    since=demand.since,
                    trigger=demand.trigger,
                    action=demand.action.label,
                )

    def _firing(self, rule: Rule, trigger: Trigger) -> OwnAlert:
        shadow_kill = rule.shadow and rule.action is Action.KILL
        name = "KillswitchShadowKill" if shadow_kill else "KillswitchTriggerFiring"
        said = explain(rule, trigger.value)
        alert = self._alert(
            name,
            "critical" if rule.action > Action.WARN and not rule.shadow else "warning",
            f"rule {rule.trigger} fires{' in shadow and does nothing' if rule.shadow else ''}",
            said,
            since=trigger.main.firing_wall,
            rule_labels=dict(rule.labels),
            trigger=rule.trigger,
            action=rule.action.label,
        )
        own = {name: fill(text, rule, trigger.value) for name, text in rule.annotations}
        return replace(alert, annotations={**alert.annotations, **own})

    def _sources(self) -> Iterator[OwnAlert]:
        for name, up, error in self._app.sources.states():
            if not up and error:  # without an error no rule asks it
                yield self._alert(
                    "KillswitchSourceDown", "critical", f"source {name} does not answer", error, source=name
                )

    def _writes(self) -> Iterator[OwnAlert]:
        app = self._app
        state_error = app.keeper.last_write_error or app.storage_error
        if state_error is not None and self._has_started():
            yield self._alert("KillswitchStateNotDurable", "critical", "the state cannot be stored", state_error)
        if app.memory is not None and app.memory.audit_error is not None:
            yield self._alert(
                "KillswitchAuditNotWritten", "critical", "the audit cannot be written", app.memory.audit_error
            )

    def _has_started(self) -> bool:
        return self._app.opened or self._app.clock.now().mono - self._app.started.mono > START_SECONDS

    def _health(self) -> Iterator[OwnAlert]:
        overlay = self._app.switch.overlay
        if overlay.internal_error is not None:
            yield self._alert(
                "KillswitchDegraded", "critical", "a part of the sidecar has failed", overlay.internal_error
            )
        if overlay.stale is not None:
            yield self._alert("KillswitchStale", "critical", "rules are not evaluated any more", overlay.stale)
        if overlay.not_ready is not None and self._has_started():
            yield self._alert("KillswitchNotReady", "critical", "orders are denied: not ready", overlay.not_ready)

    def _configuration(self) -> Iterator[OwnAlert]:
        app, reloader = self._app, self._app.reloader
        if reloader.error is not None:
            yield self._alert(
                "KillswitchReloadFailed", "warning", "the configuration cannot be used; the old one is", reloader.error
            )
        if reloader.loosened is not None:
            at, what = reloader.loosened
            if app.clock.now().mono - at.mono < LOOSENED_SECONDS:
                yield self._alert(
                    "KillswitchConfigLoosened",
                    "warning",
                    "a change of the configuration made a safety weaker",
                    what,
                    since=at.wall,
                )
        if app.switch.mode is Mode.SHADOW:
            yield self._alert(
                "KillswitchShadowMode", "warning", "the switch only watches", "nothing is blocked but by an operator"
            )

    def _alert(
        self,
        name: str,
        severity: str,
        summary: str,
        description: str,
        *,
        since: float | None = None,
        triggers: Sequence[str] = (),
        rule_labels: Mapping[str, str] | None = None,
        **labels: str,
    ) -> OwnAlert:
        app = self._app
        everything = {
            **app.settings.switch.labels,
            "severity": severity,
            **(rule_labels or {}),
            **labels,
            "alertname": name,
            "switch": app.switch.name,
            ORIGIN_LABEL: "sidecar",
        }
        known = {label: value for label, value in everything.items() if value}
        return OwnAlert(
            labels=known,
            annotations={
                "summary": f"{app.switch.name}: {summary}",
                "description": description,
                # The runbook has a heading for every alert.
                "runbook_url": f"{app.settings.alertmanager.notify.runbook_url}#{name.lower()}",
                # Not a label: what an alert is known by must not change when one more rule asks for the same kill.
                **({"triggers": ", ".join(triggers)} if triggers else {}),
            },
            starts_at=self._board.since(known, app.clock.now()) if since is None else since,
        )


def _told(cause: Cause) -> str:
    """What one cause says, and who: a rule's own summary need not name the rule."""
    who = cause.trigger or cause.by
    return cause.reason if who is None or who in cause.reason else f"{who}: {cause.reason}"
