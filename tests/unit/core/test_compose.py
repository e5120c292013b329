"""The worst of all reasons wins, and the operator hears the right one."""

from dataclasses import replace

import pytest

from sidecar.core.compose import RELEASE_BY_RECOVERY, Overlay, compose, worst
from sidecar.core.events import Cause, CauseCode, Demand
from sidecar.core.orders import Intent, decide_blind
from sidecar.core.policy import GatePolicy
from sidecar.core.snapshot import ReasonCode, Snapshot
from sidecar.core.states import Action, Mode, Restriction, Stage, State
from sidecar.core.transitions import Recovery, SwitchState

OPERATOR = Cause(code=CauseCode.OPERATOR, reason="looks wrong", time=5.0, by="ann")
BREACH = Cause(
    code=CauseCode.BREACH, reason="dd < -0.15", time=5.0, trigger="dd", by="rule dd", value=-0.2, limit=-0.15
)
ACTIVE = SwitchState(since=1.0, epoch=3)
KILLED = SwitchState(
    state=State.KILLED, since=5.0, epoch=4, factor=0.0, kill_restriction=Restriction.HALT, causes=(BREACH,)
)
RECOVERING = replace(
    KILLED, state=State.RECOVERING, recovery=Recovery(stage=Stage.COOLDOWN, by="ann", reason="ok", requested=9.0)
)
LADDER = replace(
    ACTIVE, factor=0.5, recovery=Recovery(stage=Stage.GRADUAL_RESTART, by="ann", reason="ok", requested=9.0)
)
READY = Overlay()


def demand(action: Action, trigger: str = "vol", factor: float | None = None) -> Demand:
    return Demand(
        trigger=trigger,
        action=action,
        factor=factor,
        code=CauseCode.BREACH,
        message=f"{trigger} > 0.1",
        value=0.2,
        limit=0.1,
        since=7.0,
    )


def of(state: SwitchState = ACTIVE, *demands: Demand, overlay: Overlay = READY, mode: Mode = Mode.ACTIVE) -> Snapshot:
    return compose("fx/bot-0", mode, state, demands, overlay)


def test_nothing_restricts_nothing() -> None:
    snapshot = of()
    assert (snapshot.restriction, snapshot.factor) == (Restriction.NONE, 1.0)
    assert (snapshot.gate_restriction, snapshot.gate_factor) == (Restriction.NONE, 1.0)
    assert snapshot.reason.code is ReasonCode.ACTIVE
    assert (snapshot.switch, snapshot.epoch, snapshot.since, snapshot.stage) == ("fx/bot-0", 3, 1.0, Stage.NONE)
    assert snapshot.would_be is None
    assert worst([]).factor == 1.0


def test_a_kill_says_who_why_and_how_to_release() -> None:
    reason = of(KILLED).reason
    assert (reason.code, reason.message) == (ReasonCode.KILLED, "killed by rule dd: dd < -0.15")
    assert (reason.trigger, reason.value, reason.limit, reason.since) == ("dd", -0.2, -0.15, 5.0)
    assert reason.release == RELEASE_BY_RECOVERY


def test_a_kill_of_several_causes_says_how_many_more() -> None:
    assert of(replace(KILLED, causes=(OPERATOR, BREACH))).reason.message == "killed by ann: looks wrong (and 1 more)"


def test_a_kill_by_nobody_names_its_kind() -> None:
    lost = Cause(code=CauseCode.STATE_LOST, reason="unreadable", time=5.0)
    assert of(replace(KILLED, causes=(lost,))).reason.message == "killed by state lost: unreadable"
    assert of(replace(KILLED, causes=())).reason.message == "killed"


@pytest.mark.parametrize("state", [KILLED, RECOVERING])
def test_killed_and_recovering_restrict_as_the_kill_asked_with_factor_zero(state: SwitchState) -> None:
    for restriction in (Restriction.REDUCE_ONLY, Restriction.HALT):
        snapshot = of(replace(state, kill_restriction=restriction))
        assert (snapshot.gate_restriction, snapshot.gate_factor) == (restriction, 0.0)
        assert (snapshot.restriction, snapshot.factor) == (restriction, 0.0)


@pytest.mark.parametrize("state", [KILLED, RECOVERING])
def test_a_kill_that_was_stored_without_a_restriction_halts(state: SwitchState) -> None:
    snapshot = of(replace(state, kill_restriction=Restriction.NONE))
    assert (snapshot.gate_restriction, snapshot.gate_factor) == (Restriction.HALT, 0.0)


def test_recovering_says_so() -> None:
    reason = of(RECOVERING).reason
    assert (reason.code, reason.trigger, reason.since) == (ReasonCode.RECOVERING, "dd", 5.0)
    assert reason.message == "an approved recovery is in its cooldown; orders are blocked as before"
    assert reason.release == "the end of the cooldown, with triggers clear and checks healthy"
    assert of(replace(RECOVERING, causes=())).reason.trigger is None


def test_the_ladder_scales_and_restricts_nothing_else() -> None:
    snapshot = of(LADDER)
    assert (snapshot.gate_restriction, snapshot.gate_factor) == (Restriction.NONE, 0.5)
    assert (snapshot.reason.code, snapshot.stage) == (ReasonCode.ACTIVE, Stage.GRADUAL_RESTART)
    assert snapshot.reason.message == "gradual restart after a kill"
    told = decide_blind(snapshot, GatePolicy(blind_orders=True), Intent.NEW).reason
    assert told.message == "trading at 0.5 of the position limits: gradual restart after a kill"
    assert (snapshot.reason.since, snapshot.reason.release) == (1.0, "the next restart step")


@pytest.mark.parametrize(
    ("action", "factor", "restriction", "gate_factor", "code"),
    [
        (Action.WARN, None, Restriction.NONE, 1.0, ReasonCode.ACTIVE),
        (Action.THROTTLE, 0.5, Restriction.NONE, 0.5, ReasonCode.ACTIVE),
        (Action.THROTTLE, None, Restriction.NONE, 0.0, ReasonCode.ACTIVE),
        (Action.REDUCE_ONLY, 0.1, Restriction.REDUCE_ONLY, 1.0, ReasonCode.REDUCE_ONLY),
        (Action.HALT, None, Restriction.HALT, 1.0, ReasonCode.HALTED),
        (Action.KILL, None, Restriction.HALT, 1.0, ReasonCode.HALTED),
    ],
)
def test_a_firing_rule_weighs_what_its_action_says(
    action: Action, factor: float | None, restriction: Restriction, gate_factor: float, code: ReasonCode
) -> None:
    snapshot = of(ACTIVE, demand(action, factor=factor))
    assert (snapshot.gate_restriction, snapshot.gate_factor, snapshot.reason.code) == (restriction, gate_factor, code)
    assert (snapshot.restriction, snapshot.factor) == (restriction, gate_factor)
    if action is not Action.WARN:
        assert (snapshot.reason.trigger, snapshot.reason.value, snapshot.reason.limit) == ("vol", 0.2, 0.1)
        assert snapshot.reason.since == 7.0


def test_who_lifts_a_firing_rule_is_said() -> None:
    assert of(ACTIVE, demand(Action.HALT)).reason.release == "lifts by itself when rule vol clears"
    assert of(ACTIVE, demand(Action.KILL)).reason.release == RELEASE_BY_RECOVERY
    held = demand(Action.HALT)
    assert "approved recovery" in of(replace(ACTIVE, held=(held,)), held).reason.release


@pytest.mark.parametrize("state", [KILLED, RECOVERING])
def test_the_rule_that_killed_does_not_turn_reduce_only_into_a_halt(state: SwitchState) -> None:
    snapshot = of(replace(state, kill_restriction=Restriction.REDUCE_ONLY), demand(Action.KILL, "dd"))
    assert snapshot.gate_restriction is Restriction.REDUCE_ONLY
    assert snapshot.reason.code in (ReasonCode.KILLED, ReasonCode.RECOVERING)


def test_a_halt_beside_a_softer_kill_halts() -> None:
    snapshot = of(replace(KILLED, kill_restriction=Restriction.REDUCE_ONLY), demand(Action.HALT))
    assert (snapshot.gate_restriction, snapshot.gate_factor) == (Restriction.HALT, 0.0)
    assert snapshot.reason.code is ReasonCode.HALTED


def test_restriction_by_max_and_factor_by_min_come_from_different_reasons() -> None:
    snapshot = of(LADDER, demand(Action.THROTTLE, "a", 0.25), demand(Action.REDUCE_ONLY, "b"))
    assert (snapshot.gate_restriction, snapshot.gate_factor) == (Restriction.REDUCE_ONLY, 0.25)
    assert snapshot.reason.trigger == "b"


@pytest.mark.parametrize(
    ("overlay", "code"),
    [
        (Overlay(unrestored="asking"), ReasonCode.NOT_READY),
        (Overlay(not_ready="no reading"), ReasonCode.NOT_READY),
        (Overlay(stale="stopped"), ReasonCode.STALE),
        (Overlay(internal_error="died"), ReasonCode.INTERNAL_ERROR),
        (Overlay(internal_error="died", not_ready="x", stale="y"), ReasonCode.INTERNAL_ERROR),
    ],
)
def test_an_overlay_halts_the_gate_and_leaves_the_truth(overlay: Overlay, code: ReasonCode) -> None:
    snapshot = of(ACTIVE, overlay=overlay)
    assert (snapshot.gate_restriction, snapshot.reason.code) == (Restriction.HALT, code)
    assert (snapshot.restriction, snapshot.factor) == (Restriction.NONE, 1.0)
    assert snapshot.reason.message
    assert snapshot.reason.release == "lifts by itself when this is no longer so"


def test_a_kill_is_named_before_an_overlay() -> None:
    assert of(KILLED, overlay=Overlay(not_ready="x")).reason.code is ReasonCode.KILLED


def test_disabled_blocks_nothing_and_says_so() -> None:
    stored_kill = replace(KILLED, state=State.DISABLED)
    for mode in (Mode.DISABLED, Mode.SHADOW):
        snapshot = of(stored_kill, demand(Action.HALT), overlay=Overlay(not_ready="x"), mode=mode)
        assert (snapshot.gate_restriction, snapshot.gate_factor) == (Restriction.NONE, 1.0)
        assert snapshot.reason.code is ReasonCode.DISABLED
        assert snapshot.reason.message == "the switch is disabled: nothing is evaluated and nothing is blocked"
        assert snapshot.reason.release == "a restart with `mode: active`"


# Shadow mode


@pytest.mark.parametrize(
    ("state", "demands", "overlay"),
    [
        (KILLED, (), READY),
        (RECOVERING, (), READY),
        (LADDER, (), READY),
        (ACTIVE, (demand(Action.HALT),), READY),
        (ACTIVE, (demand(Action.THROTTLE, factor=0.5),), READY),
        (ACTIVE, (), Overlay(not_ready="x")),
        (ACTIVE, (), Overlay(stale="x")),
        (ACTIVE, (), Overlay(internal_error="x")),
    ],
)
def test_shadow_blocks_nothing_but_shows_what_would_be(
    state: SwitchState, demands: tuple[Demand, ...], overlay: Overlay
) -> None:
    enforced, shadowed = of(state, *demands, overlay=overlay), of(state, *demands, overlay=overlay, mode=Mode.SHADOW)
    assert (shadowed.gate_restriction, shadowed.gate_factor) == (Restriction.NONE, 1.0)
    assert (shadowed.restriction, shadowed.factor) == (enforced.restriction, enforced.factor)
    assert shadowed.reason.code is ReasonCode.SHADOW
    assert enforced.reason.message in shadowed.reason.message
    for number in ("trigger", "value", "limit", "since"):
        assert getattr(shadowed.reason, number) == getattr(enforced.reason, number)
    assert shadowed.reason.release == "nothing is blocked in shadow mode but by an operator's own kill"
    assert (shadowed.switch, shadowed.mode) == ("fx/bot-0", Mode.SHADOW)
    assert shadowed.would_be == replace(enforced, mode=Mode.SHADOW)


def test_shadow_watches_position_limits_too_while_nothing_restricts() -> None:
    snapshot = of(ACTIVE, mode=Mode.SHADOW)
    assert snapshot.reason.code is ReasonCode.ACTIVE
    assert snapshot.would_be == of(ACTIVE, mode=Mode.SHADOW).would_be
    assert snapshot.would_be is not None


@pytest.mark.parametrize("state", [KILLED, RECOVERING])
def test_an_operators_own_kill_blocks_in_shadow_too(state: SwitchState) -> None:
    snapshot = of(replace(state, causes=(BREACH, OPERATOR)), mode=Mode.SHADOW)
    assert (snapshot.gate_restriction, snapshot.gate_factor, snapshot.would_be) == (Restriction.HALT, 0.0, None)


def test_shadow_blocks_while_it_is_not_known_whether_an_operator_had_killed() -> None:
    snapshot = of(ACTIVE, overlay=Overlay(unrestored="asking Prometheus"), mode=Mode.SHADOW)
    assert (snapshot.gate_restriction, snapshot.reason.code) == (Restriction.HALT, ReasonCode.NOT_READY)
