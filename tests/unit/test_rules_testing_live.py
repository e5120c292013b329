"""A rehearsal and the live evaluator, given the same answers, come to the same triggers, demands and state."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.app.evaluation import Evaluator
from sidecar.app.keeper import Keeper
from sidecar.core.states import Action, Instant, Mode
from sidecar.core.switch import Switch
from sidecar.core.transitions import Policies, SwitchState
from sidecar.rules.model import (
    Connectivity,
    Expression,
    Group,
    Heartbeat,
    OnNoData,
    Operator,
    Rule,
    RuleSet,
    Step,
    Threshold,
    Watchdog,
)
from sidecar.rules.readings import Answer, Failure, Series
from sidecar.rules.testing import Rehearsal

HELD = OnNoData(hold_for=3.0, then=Action.HALT, unreachable=Action.REDUCE_ONLY)
LADDER = Threshold(
    query="x",
    operator=Operator.GT,
    threshold=3,
    clear=1,
    steps=(Step(at=1, action=Action.WARN), Step(at=2, action=Action.THROTTLE, factor=0.5)),
)
RULES = RuleSet(
    groups=(
        Group(
            name="quick",
            interval=1.0,
            rules=(
                Rule(trigger="ladder", group="quick", condition=LADDER, on_no_data=HELD, for_=1.0),
                Rule(trigger="shadow", group="quick", condition=LADDER, shadow=True),
                Rule(trigger="off", group="quick", condition=LADDER, enabled=False),
                Rule(
                    trigger="expression",
                    group="quick",
                    condition=Expression(expr="x > 2"),
                    action=Action.HALT,
                    keep_firing_for=2.0,
                    series=1,
                ),
            ),
        ),
        Group(
            name="slow",
            interval=2.0,
            rules=(
                Rule(trigger="beat", group="slow", condition=Heartbeat(query="x", interval=1.0), action=Action.HALT),
                Rule(
                    trigger="venue",
                    group="slow",
                    condition=Connectivity(query="x", interval=4.0, max_consecutive_failures=2),
                    on_no_data=HELD,
                ),
                Rule(trigger="watchdog", group="slow", condition=Watchdog(), action=Action.WARN),
            ),
        ),
    )
)


class VirtualClock:
    def __init__(self):
        self.seconds = 0.0

    def now(self):
        return Instant(mono=self.seconds, wall=self.seconds)


class ScriptedSources:
    timeout = 2.0

    def __init__(self, clock, answering):
        self._clock = clock
        self._answering = answering

    async def ask(self, rules, receive):
        for rule in rules:
            receive(rule, self._answering(rule, self._clock.now()))


def answering_from(said):
    """What a rule hears at a moment: drawn values, used again from the start when they are used up."""

    def answering(rule, now):
        value = said[(int(now.mono) * 7 + len(rule.trigger)) % len(said)]
        if isinstance(value, bool):
            return Failure(reason="unreachable" if value else "query_error", message="", unreachable=value)
        series = () if value is None else (Series(value=value),)
        return Answer(series=series, evaluated_at=now.wall, oldest_sample=now.wall - (99 if value == 4 else 0))

    return answering


async def live(answering, until):
    clock = VirtualClock()
    switch = Switch(name="x", mode=Mode.ACTIVE, state=SwitchState(), policies=Policies())
    keeper = Keeper(switch=switch, clock=clock, document=lambda *_: {})
    evaluator = Evaluator(
        keeper=keeper, clock=clock, sources=ScriptedSources(clock, answering), pod="x", warnings_count=True
    )
    evaluator.load(RULES, opened=False)
    seen = []
    for second in range(until + 1):
        clock.seconds = float(second)
        for group in RULES.groups:
            if second % group.interval == 0:
                await evaluator.evaluate_group(group)
        seen.append((dict(evaluator.triggers), switch.state, switch.demands, evaluator.unready()))
    return seen


@given(st.lists(st.sampled_from([0.0, 1.0, 2.5, 4.0, 5.0, float("nan"), None, True, False]), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_a_rehearsal_decides_as_the_live_evaluator_does(said):
    answering, until = answering_from(said), 30
    rehearsal = Rehearsal(rules=RULES, policies=Policies(), answering=answering)
    for second, (triggers, state, demands, unready) in enumerate(asyncio.run(live(answering, until))):
        rehearsal.run_until(second)
        # NaN is no equal of itself, and it is never kept as a value: comparing as text loses nothing.
        assert repr(rehearsal.triggers) == repr(triggers)
        assert rehearsal.switch.state == state
        assert rehearsal.switch.demands == demands
        ready = rehearsal.switch.overlay.not_ready is None
        assert ready or unready
