"""What is due when, and how long wrong codes lock out."""

from dataclasses import replace

import pytest

from sidecar.core.errors import LockedOut
from sidecar.core.events import Approval, Waiver
from sidecar.core.policy import RecoveryPolicy, RestartStep
from sidecar.core.recovery import (
    COMPLETE_SHOWN_SECONDS,
    Due,
    Lockouts,
    cooldown_remaining,
    due,
    ended_waivers,
    needs_checkpoint,
    next_step_in,
)
from sidecar.core.states import Instant, Stage, State
from sidecar.core.transitions import Policies, Recovery, SwitchState

NOW = Instant(mono=10_000.0, wall=1_700_000_000.0)
POLICIES = Policies()
APPROVAL = Approval(by="ann", by_verified=True, granted=NOW.wall, granted_mono=NOW.mono)


def at(seconds: float) -> Instant:
    return Instant(mono=NOW.mono + seconds, wall=NOW.wall + seconds)


def in_stage(stage: Stage, *, state: State = State.KILLED, factor: float = 0.0) -> SwitchState:
    recovery = Recovery(
        stage=stage,
        by="ann",
        reason="fixed",
        requested=NOW.wall,
        approvals=(APPROVAL,),
        cooldown=300.0,
        stage_since=NOW.mono,
        step_since=NOW.mono,
    )
    return SwitchState(state=state, factor=factor, recovery=recovery)


LADDER = in_stage(Stage.GRADUAL_RESTART, state=State.ACTIVE, factor=0.5)


@pytest.mark.parametrize(
    ("state", "seconds", "expected"),
    [
        (SwitchState(), 0.0, None),
        (in_stage(Stage.PENDING), 900.0, None),
        (in_stage(Stage.PENDING), 900.1, Due.EXPIRE),
        (in_stage(Stage.VALIDATING), 900.0, Due.VALIDATE),
        (in_stage(Stage.VALIDATING), 900.1, Due.EXPIRE),
        (in_stage(Stage.COOLDOWN, state=State.RECOVERING), 299.9, None),
        (in_stage(Stage.COOLDOWN, state=State.RECOVERING), 300.0, Due.REOPEN),
        (LADDER, 3599.9, None),
        (LADDER, 3600.0, Due.STEP),
        (in_stage(Stage.COMPLETE, state=State.ACTIVE, factor=1.0), COMPLETE_SHOWN_SECONDS - 1, None),
        (in_stage(Stage.COMPLETE, state=State.ACTIVE, factor=1.0), COMPLETE_SHOWN_SECONDS, Due.CONCLUDE),
    ],
)
def test_what_is_due_follows_stage_and_running_time(state: SwitchState, seconds: float, expected: Due | None) -> None:
    assert due(state, at(seconds), POLICIES) is expected


@pytest.mark.parametrize("wall", [-1e6, 1e6])
def test_a_wall_clock_step_moves_neither_cooldown_nor_ladder(wall: float) -> None:
    stepped = Instant(mono=NOW.mono + 299, wall=NOW.wall + wall)
    cooling = in_stage(Stage.COOLDOWN, state=State.RECOVERING)
    assert due(cooling, stepped, POLICIES) is None
    assert cooldown_remaining(cooling, stepped) == 1.0
    assert next_step_in(LADDER, stepped, POLICIES) == 3301.0


def test_a_request_without_approvals_does_not_expire() -> None:
    state = in_stage(Stage.PENDING)
    assert state.recovery is not None
    assert due(replace(state, recovery=replace(state.recovery, approvals=())), at(1e6), POLICIES) is None


def test_nothing_is_due_where_the_policy_has_no_step_left() -> None:
    short = Policies(recovery=RecoveryPolicy(steps=(RestartStep(factor=0.5),)))
    assert due(LADDER, at(1e6), short) is None
    assert next_step_in(LADDER, at(1e6), short) is None


def test_there_is_no_cooldown_outside_the_cooldown() -> None:
    assert cooldown_remaining(SwitchState(), NOW) == 0.0
    assert cooldown_remaining(LADDER, NOW) == 0.0
    assert next_step_in(SwitchState(), NOW, POLICIES) is None


@pytest.mark.parametrize(
    ("mono", "wall", "ended"), [(9.9, 9.9, []), (10.0, 0.0, ["dd"]), (0.0, 10.0, ["dd"]), (-5.0, 11.0, ["dd"])]
)
def test_a_waiver_ends_by_whichever_clock_comes_first(mono: float, wall: float, ended: list[str]) -> None:
    waiver = Waiver(trigger="dd", threshold=None, until=NOW.wall + 10, until_mono=NOW.mono + 10, by="ann")
    now = Instant(mono=NOW.mono + mono, wall=NOW.wall + wall)
    assert list(ended_waivers(SwitchState(waivers=(waiver,)), now)) == ended


def test_running_time_is_saved_while_any_is_counted() -> None:
    waiver = Waiver(trigger="dd", threshold=None, until=0.0, until_mono=0.0, by="ann")
    assert not needs_checkpoint(SwitchState())
    assert needs_checkpoint(LADDER)
    assert needs_checkpoint(SwitchState(waivers=(waiver,)))
    assert needs_checkpoint(SwitchState(last_kill_mono=5.0))
    assert not needs_checkpoint(SwitchState(state=State.DISABLED, last_kill_mono=5.0))


# Lock-outs


def locked(failures: int) -> Lockouts:
    lockouts = Lockouts()
    for _ in range(failures):
        lockouts = lockouts.failed("ann", NOW)
    return lockouts


@pytest.mark.parametrize(
    ("failures", "seconds"), [(5, 30.0), (6, 60.0), (7, 120.0), (8, 240.0), (9, 480.0), (10, 900.0), (5000, 900.0)]
)
def test_wrong_codes_lock_out_for_ever_longer_up_to_15_minutes(failures: int, seconds: float) -> None:
    with pytest.raises(LockedOut, match=f"{failures} wrong approval codes") as caught:
        locked(failures).check("ann", NOW)
    assert caught.value.retry_after == seconds
    locked(failures).check("ann", at(seconds))


@pytest.mark.parametrize("failures", range(5))
def test_fewer_than_five_wrong_codes_lock_nobody_out(failures: int) -> None:
    locked(failures).check("ann", NOW)


def test_a_lock_out_is_one_persons_and_a_right_code_ends_the_count() -> None:
    lockouts = locked(6)
    lockouts.check("bob", NOW)
    lockouts.succeeded("bob").succeeded("ann").failed("ann", NOW).check("ann", NOW)


def test_a_right_code_ends_nobody_elses_lock_out() -> None:
    with pytest.raises(LockedOut):
        locked(6).succeeded("bob").check("ann", NOW)


def test_a_wall_clock_step_does_not_end_a_lock_out() -> None:
    with pytest.raises(LockedOut):
        locked(5).check("ann", Instant(mono=NOW.mono + 29, wall=NOW.wall + 1e6))
