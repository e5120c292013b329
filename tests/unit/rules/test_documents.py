import json
from dataclasses import replace
from typing import Any

import pytest

from sidecar.core.document import (
    lockouts_document,
    lockouts_from_document,
    state_document,
    state_from_document,
)
from sidecar.core.errors import StorageError
from sidecar.core.events import Approval, Cause, CauseCode, Demand, Waiver
from sidecar.core.recovery import Lockouts
from sidecar.core.states import Action, Instant, Restriction, Stage, State
from sidecar.core.transitions import Recovery, SwitchState
from sidecar.rules.document import trigger_document, trigger_from_document
from sidecar.rules.triggers import Blindness, Health, Level, Trigger

BEFORE = Instant(mono=1000.0, wall=1_700_000_000.0)
# The next process: its running clock starts anew, an hour went by while nothing ran.
AFTER = Instant(mono=20.0, wall=1_700_003_600.0)

WAIVER = Waiver(trigger="dd", threshold=-0.2, until=BEFORE.wall + 600.0, until_mono=BEFORE.mono + 600.0, by="bob")
FULL = SwitchState(
    state=State.KILLED,
    since=BEFORE.wall - 100.0,
    epoch=17,
    factor=0.0,
    kill_restriction=Restriction.REDUCE_ONLY,
    causes=(
        Cause(code=CauseCode.OPERATOR, reason="Öl läuft aus", time=BEFORE.wall, by="ann", by_verified=True),
        Cause(code=CauseCode.BREACH, reason="dd", time=BEFORE.wall, trigger="dd", value=-0.2, limit=-0.15, count=3),
    ),
    recovery=Recovery(
        stage=Stage.PENDING,
        by="bob",
        reason="fixed",
        requested=BEFORE.wall - 50.0,
        approvals=(Approval(by="bob", by_verified=True, granted=BEFORE.wall - 50.0, granted_mono=BEFORE.mono - 50.0),),
        waivers=(WAIVER,),
        cooldown=300.0,
        stage_since=BEFORE.mono - 50.0,
        step_since=BEFORE.mono - 40.0,
    ),
    waivers=(replace(WAIVER, trigger="other", threshold=None),),
    held=(
        Demand(
            trigger="gone", action=Action.THROTTLE, factor=0.5, code=CauseCode.BREACH, message="m", since=BEFORE.wall
        ),
    ),
    acknowledged=(("dd", "breach", BEFORE.wall),),
    kills_in_a_row=2,
    last_kill_mono=BEFORE.mono - 500.0,
)


def through_json(document: Any) -> Any:
    return json.loads(json.dumps(document, allow_nan=False))


def test_a_state_comes_back_as_it_was_at_the_same_moment() -> None:
    assert state_from_document(through_json(state_document(FULL, BEFORE)), BEFORE) == FULL


def test_a_fresh_state_comes_back_as_it_was() -> None:
    assert state_from_document(through_json(state_document(SwitchState(), BEFORE)), BEFORE) == SwitchState()


def test_running_time_goes_on_in_the_next_process_and_time_spent_down_does_not_count() -> None:
    state = state_from_document(through_json(state_document(FULL, BEFORE)), AFTER)
    assert state.recovery is not None
    assert AFTER.mono - state.recovery.stage_since == 50.0
    assert AFTER.mono - state.recovery.step_since == 40.0
    assert AFTER.mono - state.recovery.approvals[0].granted_mono == 50.0
    assert state.last_kill_mono == AFTER.mono - 500.0


def test_a_waiver_ends_by_the_wall_clock_although_time_down_does_not_count_on_the_running_one() -> None:
    state = state_from_document(through_json(state_document(FULL, BEFORE)), AFTER)
    assert state.waivers[0].until_mono == AFTER.mono + 600.0
    assert state.waivers[0].ended(AFTER)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("state", "DISABLED"),
        ("state", "OPEN"),
        ("factor", 1.5),
        ("factor", -0.1),
        ("factor", None),
        ("restriction", "some"),
        ("epoch", "many"),
        ("causes", [{"code": "operator"}]),
        ("causes", [{**state_document(FULL, BEFORE)["causes"][0], "code": "whim"}]),
        ("causes", [{**state_document(FULL, BEFORE)["causes"][0], "count": "three"}]),
        ("causes", [{**state_document(FULL, BEFORE)["causes"][0], "time": "noon"}]),
        ("causes", 3),
        ("recovery", {}),
        ("recovery", []),
        ("waivers", [{"trigger": "dd"}]),
        ("held", [{**state_document(FULL, BEFORE)["held"][0], "action": "wave"}]),
        ("held", [{**state_document(FULL, BEFORE)["held"][0], "factor": "half"}]),
        ("held", [{**state_document(FULL, BEFORE)["held"][0], "factor": 3.0}]),
        ("acknowledged", [["dd"]]),
        ("last_kill_elapsed", "long"),
    ],
)
def test_a_document_with_a_part_that_is_wrong_is_refused(key: str, value: Any) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        state_from_document({**state_document(FULL, BEFORE), key: value}, AFTER)


@pytest.mark.parametrize("key", sorted(state_document(FULL, BEFORE)))
def test_a_document_with_a_part_missing_is_refused(key: str) -> None:
    document = state_document(FULL, BEFORE)
    del document[key]
    with pytest.raises(StorageError, match=key):
        state_from_document(document, AFTER)


# Lock-outs


def test_a_lockout_goes_on_for_what_was_left_of_it() -> None:
    lockouts = Lockouts()
    for _ in range(5):
        lockouts = lockouts.failed("bob", BEFORE)
    later = Instant(mono=BEFORE.mono + 10.0, wall=BEFORE.wall + 10.0)
    back = lockouts_from_document(through_json(lockouts_document(lockouts, later)), AFTER)
    assert back.by_name["bob"].failures == 5
    assert back.by_name["bob"].until == AFTER.mono + 20.0


@pytest.mark.parametrize("document", [{"bob": {}}, {"bob": 3}, {"bob": {"failures": "x", "left": 0}}])
def test_lockouts_that_cannot_be_read_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(StorageError):
        lockouts_from_document(document, AFTER)


# Triggers


@pytest.mark.parametrize(
    "trigger",
    [
        Trigger(main=Level(pending_since=990.0), value=-0.2),
        Trigger(main=Level(pending_since=900.0, firing_since=950.0, firing_wall=BEFORE.wall - 50.0), value=1.0),
        Trigger(main=Level(firing_since=950.0, firing_wall=BEFORE.wall - 50.0, clear_since=999.0)),
        Trigger(steps=(Level(), Level(firing_since=950.0, firing_wall=1.0))),
        Trigger(failures=2),
    ],
)
def test_a_trigger_comes_back_with_its_timers(trigger: Trigger) -> None:
    assert trigger_from_document(through_json(trigger_document(trigger, BEFORE)), BEFORE) == trigger


def test_a_quiet_trigger_is_not_stored() -> None:
    assert trigger_document(Trigger(value=3.0, ready=True, health=Health.OK), BEFORE) is None


def test_what_a_trigger_could_see_is_not_stored() -> None:
    blind = Blindness(
        since=1.0, since_wall=1.0, answering_since=1.0, unreachable_since=None, unreachable_seen=False, message="m"
    )
    trigger = Trigger(main=Level(pending_since=990.0), health=Health.OK, ready=True, graced=True, blindness=blind)
    back = trigger_from_document(through_json(trigger_document(trigger, BEFORE)), AFTER)
    assert back == Trigger(main=Level(pending_since=10.0))


@pytest.mark.parametrize(
    "document",
    [{}, {"main": {}, "steps": [], "value": None, "failures": 0}, {"main": 1, "steps": [], "value": 1, "failures": 0}],
)
def test_a_trigger_that_cannot_be_read_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(StorageError):
        trigger_from_document(document, AFTER)
