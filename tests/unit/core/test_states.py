"""The words of the switch and their order; every error has its place in the tree."""

import pytest

from sidecar.core import errors
from sidecar.core.states import Action, Restriction, State


def test_states_have_the_numbers_of_the_state_page() -> None:
    assert [(state.value, state.number) for state in State] == [
        ("ACTIVE", 0),
        ("KILLED", 1),
        ("RECOVERING", 2),
        ("DISABLED", 3),
    ]


def test_the_worst_restriction_is_the_largest() -> None:
    assert Restriction.NONE < Restriction.REDUCE_ONLY < Restriction.HALT


@pytest.mark.parametrize("restriction", Restriction)
def test_a_restriction_is_read_back_from_its_label(restriction: Restriction) -> None:
    assert Restriction.from_label(restriction.label) is restriction


@pytest.mark.parametrize("label", ["", "stop", "halted", "HALT ", "0"])
def test_an_unknown_restriction_is_refused_with_the_choices(label: str) -> None:
    with pytest.raises(ValueError, match="choose none, reduce_only or halt") as caught:
        Restriction.from_label(label)
    assert repr(label) in str(caught.value)


def test_actions_are_ordered_by_severity_and_name_their_restriction() -> None:
    assert [(action.label, action.restriction) for action in sorted(Action)] == [
        ("warn", Restriction.NONE),
        ("throttle", Restriction.NONE),
        ("reduce_only", Restriction.REDUCE_ONLY),
        ("halt", Restriction.HALT),
        ("kill", Restriction.HALT),
    ]


def test_every_error_of_ours_is_a_killswitch_error() -> None:
    ours = [thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, Exception)]
    assert len(ours) >= 9
    assert all(issubclass(error, errors.KillswitchError) for error in ours)


def test_a_lock_out_says_how_long_and_is_an_approval_error() -> None:
    error = errors.LockedOut("wait", retry_after=30.0)
    assert isinstance(error, errors.ApprovalError)
    assert (str(error), error.retry_after) == ("wait", 30.0)


def test_errors_carry_what_their_callers_need() -> None:
    blocked = errors.RecoveryBlocked(["dd fires", "memory is short"])
    assert blocked.blockers == ("dd fires", "memory is short")
    assert str(blocked) == "the recovery is refused: dd fires; memory is short"
    assert errors.NotDurable("not on disk", status={"durable": False}).status == {"durable": False}
