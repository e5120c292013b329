"""What follows from a record of the switch, and how raw samples become one."""

from typing import Any

import pytest

from sidecar.adapters.prometheus.record import sightings
from sidecar.core.events import CauseCode
from sidecar.core.policy import GatePolicy, RecoveryPolicy, RestartStep
from sidecar.core.record import Record, Sighting, joined, last_word, rollback_kill, state_from_sighting
from sidecar.core.recovery import next_step_in
from sidecar.core.states import Instant, Restriction, Stage, State
from sidecar.core.transitions import Policies

NOW = Instant(mono=1000.0, wall=1_700_000_000.0)
POLICIES = Policies(
    recovery=RecoveryPolicy(
        steps=(
            RestartStep(factor=0.5),
            RestartStep(factor=0.75, after=3600.0),
            RestartStep(factor=1.0, after=7200.0),
        )
    ),
    gate=GatePolicy(killed_policy=Restriction.REDUCE_ONLY),
)
ACTIVE, KILLED, RECOVERING = State.ACTIVE, State.KILLED, State.RECOVERING
NONE, REDUCE, HALT = Restriction.NONE, Restriction.REDUCE_ONLY, Restriction.HALT


def seen(state: State, age: float = 0.0, restriction: Restriction | None = None, factor: float | None = None):
    return Sighting(time=NOW.wall - age, state=state, restriction=restriction, factor=factor)


def word(*every: Sighting) -> Sighting:
    found = last_word(Record(sightings=every))
    assert found is not None
    return found


def test_without_a_sighting_there_is_no_word():
    assert last_word(Record()) is None


@pytest.mark.parametrize(
    ("every", "state"),
    [
        ([seen(KILLED, 301), seen(ACTIVE, 0)], ACTIVE),
        ([seen(KILLED, 0), seen(ACTIVE, 301)], KILLED),
        ([seen(KILLED, 300), seen(ACTIVE, 0)], KILLED),
        ([seen(ACTIVE, 300), seen(KILLED, 0)], KILLED),
        ([seen(RECOVERING, 100), seen(ACTIVE, 0)], RECOVERING),
        ([seen(RECOVERING, 0), seen(KILLED, 100), seen(ACTIVE, 200)], KILLED),
        # The five minutes count from the newest of all, not from one look to the next.
        ([seen(ACTIVE, 0), seen(ACTIVE, 200), seen(KILLED, 400)], ACTIVE),
    ],
)
def test_the_newest_wins_and_of_equally_new_ones_the_strictest(every: list[Sighting], state: State):
    assert word(*every).state is state
    assert word(*reversed(every)).state is state
    assert word(*every).time == NOW.wall


@pytest.mark.parametrize(
    ("every", "restriction", "factor"),
    [
        ([seen(KILLED, 0, REDUCE, 0.0), seen(KILLED, 9, HALT, 0.0)], HALT, 0.0),
        ([seen(KILLED, 0, REDUCE, 0.0), seen(KILLED, 9, None, 0.0)], None, 0.0),
        ([seen(KILLED, 0, REDUCE, 0.0), seen(RECOVERING, 9, HALT, 0.0)], HALT, 0.0),
        ([seen(KILLED, 0, REDUCE, 0.0), seen(ACTIVE, 9, NONE, 1.0)], REDUCE, 0.0),
        ([seen(ACTIVE, 0, NONE, 0.75), seen(ACTIVE, 9, NONE, 0.5)], NONE, 0.5),
        ([seen(ACTIVE, 0, NONE, 1.0), seen(ACTIVE, 9, NONE, None)], NONE, None),
    ],
)
def test_restriction_and_factor_are_the_worst_and_unknown_if_one_is(
    every: list[Sighting], restriction: Restriction | None, factor: float | None
):
    found = word(*every)
    assert (found.restriction, found.factor) == (restriction, factor)


def test_records_of_several_servers_are_put_together():
    one, other = Record(sightings=(seen(ACTIVE),), highest_epoch=4), Record(sightings=(seen(KILLED, 10),))
    assert joined([one, other]) == Record(sightings=(seen(ACTIVE), seen(KILLED, 10)), highest_epoch=4)
    assert joined([Record(), Record()]).highest_epoch is None
    assert joined([one, Record(highest_epoch=9)]).epoch == 9
    assert Record().epoch == 0


@pytest.mark.parametrize("state", [KILLED, RECOVERING])
@pytest.mark.parametrize(
    ("restriction", "restored"), [(REDUCE, REDUCE), (HALT, HALT), (None, HALT), (NONE, HALT)], ids=str
)
def test_killed_and_recovering_are_restored_as_killed_and_halted_if_unknown(
    state: State, restriction: Restriction | None, restored: Restriction
):
    start = state_from_sighting(seen(state, 5, restriction), NOW, POLICIES, epoch=17, when="noon")
    assert (start.state, start.factor, start.kill_restriction, start.recovery) == (KILLED, 0.0, restored, None)
    assert start.epoch == 18
    (cause,) = start.causes
    assert (cause.code, cause.by, cause.time) == (CauseCode.RESTORED, "Prometheus' record", NOW.wall)
    assert start.since == NOW.wall
    assert "Prometheus' record" in cause.reason
    assert "noon" in cause.reason


@pytest.mark.parametrize(
    ("factor", "restored", "stage"),
    [
        (1.0, 1.0, Stage.NONE),
        (0.75, 0.75, Stage.GRADUAL_RESTART),
        (0.6, 0.6, Stage.GRADUAL_RESTART),
        (None, 0.5, Stage.GRADUAL_RESTART),
        (0.0, 0.5, Stage.GRADUAL_RESTART),
        (1.5, 0.5, Stage.GRADUAL_RESTART),  # no factor is above 1: nobody knows what this was
    ],
)
def test_active_goes_on_up_the_ladder_from_its_factor(factor: float | None, restored: float, stage: Stage):
    start = state_from_sighting(seen(ACTIVE, 5, NONE, factor), NOW, POLICIES, epoch=17, when="noon")
    assert (start.state, start.factor, start.stage, start.epoch) == (ACTIVE, restored, stage, 17)
    assert start.causes == ()


def test_the_time_of_a_restored_ladder_starts_anew():
    start = state_from_sighting(seen(ACTIVE, 5, NONE, 0.75), NOW, POLICIES, epoch=1, when="noon")
    assert next_step_in(start, NOW, POLICIES) == 7200.0
    assert start.since == NOW.wall
    assert start.recovery is not None
    assert (start.recovery.by, start.recovery.requested) == ("Prometheus' record", NOW.wall)
    assert (start.recovery.stage_since, start.recovery.step_since) == (NOW.mono, NOW.mono)
    assert start.recovery.reason == "the restart ladder that was seen at noon goes on"


def test_an_unknown_factor_is_the_first_step_even_if_that_is_all():
    whole = Policies(recovery=RecoveryPolicy(steps=(RestartStep(factor=1.0),)))
    start = state_from_sighting(seen(ACTIVE), NOW, whole, epoch=1, when="noon")
    assert (start.factor, start.recovery) == (1.0, None)


def test_a_rollback_halts_and_names_both_epochs():
    kill = rollback_kill(17, 9, NOW)
    assert (kill.cause.code, kill.restriction) == (CauseCode.STATE_ROLLED_BACK, HALT)
    assert "17" in kill.cause.reason
    assert "9" in kill.cause.reason
    assert (kill.cause.time, kill.cause.by) == (NOW.wall, "Prometheus' record")


# Samples


def row(metric: str, *values: tuple[float, object], instance: str = "a", **labels: str) -> dict[str, Any]:
    name = {"__name__": f"killswitch_{metric}", "switch": "s", "instance": instance}
    return {"metric": {**name, **labels}, "values": [[moment, str(value)] for moment, value in values]}


def states(*values: tuple[float, State | None], instance: str = "a") -> list[dict[str, Any]]:
    return [
        row("state", *((moment, int(state is one)) for moment, state in values), instance=instance, state=one)
        for one in State
    ]


def read(*rows: dict[str, Any], since: float = 0.0) -> list[Sighting]:
    return list(sightings(rows, since=since))


def test_the_newest_look_of_a_target_counts_and_all_of_it_is_of_the_same_scrape():
    found = read(
        *states((10, KILLED), (20, ACTIVE)),
        row("restriction", (10, 1), (20, 0), restriction="halt"),
        row("restriction", (10, 0), (20, 1), restriction="none"),
        row("position_limit_factor", (10, 0), (20, 0.75)),
    )
    assert found == [Sighting(time=20, state=ACTIVE, restriction=NONE, factor=0.75)]


def test_what_was_not_scraped_together_with_the_state_is_not_known():
    found = read(*states((20, ACTIVE)), row("position_limit_factor", (10, 1.0)))
    assert found == [Sighting(time=20, state=ACTIVE)]


@pytest.mark.parametrize("later", [None, State.DISABLED])
def test_a_sidecar_that_knows_nothing_or_is_disabled_does_not_hide_what_was_seen_before(later: State | None):
    assert [(one.time, one.state) for one in read(*states((10, KILLED), (20, later), (30, later)))] == [(10, KILLED)]


def test_every_target_gives_one_look():
    found = read(*states((10, KILLED)), *states((12, ACTIVE), instance="b"))
    assert {(one.time, one.state) for one in found} == {(10, KILLED), (12, ACTIVE)}


def test_two_states_at_once_are_the_stricter():
    assert read(row("state", (10, 1), state="ACTIVE"), row("state", (10, 1), state="RECOVERING"))[0].state is RECOVERING


def test_looks_from_before_the_horizon_do_not_count():
    assert read(*states((10, KILLED)), since=10.5) == []
    assert len(read(*states((10, KILLED)), since=10)) == 1


@pytest.mark.parametrize("factor", ["NaN", "-0.5", "1.5", "+Inf"])
def test_a_factor_that_cannot_be_is_not_known(factor: str):
    assert read(*states((10, ACTIVE)), row("position_limit_factor", (10, factor)))[0].factor is None


def test_a_state_that_is_not_a_number_is_none():
    assert read(row("state", (10, "NaN"), state="KILLED")) == []


@pytest.mark.parametrize("rows", [[{}], [{"metric": {"switch": "s"}}], [{"metric": {}, "values": [[1]]}], [7]])
def test_another_shape_is_an_error(rows: list[Any]):
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        list(sightings(rows, since=0.0))


def test_of_a_kill_in_the_record_and_a_restriction_known_from_elsewhere_the_stricter_holds():
    start = state_from_sighting(
        seen(KILLED, 5, Restriction.REDUCE_ONLY), NOW, POLICIES, epoch=17, when="noon", asked=Restriction.HALT
    )
    assert (start.kill_restriction, start.since, start.causes[0].time) == (Restriction.HALT, NOW.wall, NOW.wall)
