"""Shows the application to the metrics collector, as it stands at the moment of a scrape."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sidecar.adapters.instruments import GateTelemetry, RecordTelemetry, SwitchTelemetry, TriggerTelemetry
from sidecar.core.recovery import cooldown_remaining
from sidecar.core.states import State
from sidecar.core.switch import Change
from sidecar.core.transitions import SwitchState
from sidecar.rules.model import Rule
from sidecar.rules.triggers import eased, limit_of, limit_used
from sidecar.version import __version__

if TYPE_CHECKING:
    from sidecar.app.application import Application


class AppTelemetry:
    """What one application has to tell."""

    def __init__(self, app: "Application") -> None:
        self._app = app
        self._transitions: dict[tuple[State, State], int] = {}
        app.keeper.observers.change.append(self._count)

    def _count(self, change: Change) -> None:
        pair = (change.before.state, change.after.state)
        if pair[0] is not pair[1]:
            self._transitions[pair] = self._transitions.get(pair, 0) + 1

    def switch(self) -> SwitchTelemetry:
        """The switch, as far as it is durable."""
        app = self._app
        durable = app.keeper.durable_state
        return SwitchTelemetry(
            switch=app.switch.name,
            mode=app.switch.mode,
            version=__version__,
            config_hash=app.reloader.hash,
            exported=app.keeper.exported(),
            cooldown_remaining=0.0 if durable is None else cooldown_remaining(durable, app.clock.now()),
            last_transition=_last_transition(durable),
            transitions=self._transitions,
            causes=_causes(durable),
            labels=app.settings.switch.labels,
        )

    def triggers(self) -> Sequence[TriggerTelemetry]:
        """Every loaded rule with its trigger."""
        app = self._app
        waivers = {waiver.trigger: waiver.threshold for waiver in app.switch.state.waivers}
        return [self._trigger(rule, waivers) for rule in app.evaluator.rules.rules]

    def _trigger(self, rule: Rule, waivers: Mapping[str, float | None]) -> TriggerTelemetry:
        name, counters = rule.trigger, self._app.evaluator.counters
        trigger = self._app.evaluator.triggers[name]
        waived = waivers.get(name)
        return TriggerTelemetry(
            name=name,
            status=trigger.status,
            enabled=rule.enabled,
            armed=rule.enabled and trigger.armed,
            waived=name in waivers,
            value=trigger.value,
            threshold=limit_of(rule.condition) if waived is None else waived,
            limit_used=limit_used(eased(rule, waived), trigger),
            sample_age=trigger.sample_age,
            evaluations=counters.evaluations.get(name, 0),
            shadow_firings=counters.shadow_firings.get(name, 0),
            failures=counters.failures.get(name, {}),
        )

    def missed_iterations(self) -> Mapping[str, int]:
        """Left-out evaluations by group."""
        missed = self._app.evaluator.counters.missed
        return {name: missed.get(name, 0) for name in self._app.evaluator.group_names()}

    def sources(self) -> Mapping[str, bool | None]:
        """Whether each source gave a usable answer last time; None for one that no rule asks."""
        return {name: up for name, up, _ in self._app.sources.states()}

    def gate(self) -> GateTelemetry:
        """What the gate has answered."""
        return self._app.gate.statistics()

    def records(self) -> RecordTelemetry:
        """Audit, state file and configuration."""
        app, memory = self._app, self._app.memory
        return RecordTelemetry(
            audit_events=memory.events_written if memory else 0,
            audit_write_failures=memory.audit_write_failures if memory else 0,
            audit_head_sequence=memory.audit_head if memory else 0,
            state_write_failures=app.keeper.write_failures,
            config_loosened=app.config_loosened,
            webhook_alerts=app.alerts.results,
            log_lines_dropped=app.dropped_log_lines(),
            reload_successful=app.reloader.successful,
            reload_success=app.reloader.loaded,
        )


def _last_transition(state: SwitchState | None) -> float | None:
    return None if state is None or state.since == 0.0 else state.since


def _causes(state: SwitchState | None) -> frozenset[tuple[str, str]]:
    """Of the present kill; a switch that trades again keeps none."""
    if state is None or state.state not in (State.KILLED, State.RECOVERING):
        return frozenset()
    return frozenset((cause.code.value, cause.trigger or "") for cause in state.causes)
