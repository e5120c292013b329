from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidecar.adapters.audit_log import AuditLog
from sidecar.adapters.state_file import ForeignSwitch, FutureVersion, Lost, Nothing, Restored
from sidecar.app.application import Application
from sidecar.app.audit_trail import CHANGES
from sidecar.app.clock import utc
from sidecar.app.restore import CannotRestore, Start, choose_start
from sidecar.core.document import lockouts_document, state_document
from sidecar.core.errors import StorageError
from sidecar.core.events import Cause, CauseCode, Kill
from sidecar.core.policy import GatePolicy
from sidecar.core.recovery import Lockouts
from sidecar.core.states import Instant, Restriction, State
from sidecar.core.transitions import Policies, SwitchState, transition
from sidecar.rules.document import trigger_document
from sidecar.rules.triggers import Level, Trigger

NOW = Instant(mono=50.0, wall=1_700_000_000.0)
POLICIES = Policies()
REDUCE = Policies(gate=GatePolicy(killed_policy=Restriction.REDUCE_ONLY))
ACTIVE = SwitchState(epoch=7, since=NOW.wall)


def killed(state: SwitchState = ACTIVE, restriction: Restriction | None = None) -> SwitchState:
    cause = Cause(code=CauseCode.OPERATOR, reason="enough", time=NOW.wall, by="ann")
    return transition(state, Kill(cause=cause, restriction=restriction), NOW, POLICIES)


def document(state: SwitchState, **extra: Any) -> dict[str, Any]:
    return {"switch": "s", "mode": "active", **state_document(state, NOW), "timers": {}, "lockouts": {}, **extra}


def restored(first: dict[str, Any], other: dict[str, Any] | None = None, *, behind: bool = False) -> Restored:
    return Restored(document=first, source="state.json", note=None, alternative=other, behind_audit=behind)


def changed(to: str, epoch: int, factor: float = 0.0) -> dict[str, Any]:
    return {
        "type": "switch.killed",
        "to": to,
        "time": "2026-01-01T00:00:00Z",
        "data": {"epoch": epoch, "factor": factor},
    }


def start(loaded: Any, *events: dict[str, Any], policies: Policies = POLICIES) -> Start:
    return choose_start(loaded, events, NOW, policies)


# Nothing stored


def test_the_first_start_is_active() -> None:
    begun = start(Nothing(audit_epoch=None))
    assert begun.fresh
    assert (begun.state.state, begun.state.factor, begun.state.epoch) == (State.ACTIVE, 1.0, 0)


def test_an_audit_of_a_switch_that_never_changed_is_a_first_start_too() -> None:
    assert start(Nothing(audit_epoch=0)).state.state is State.ACTIVE


def test_lost_files_after_a_full_return_to_trading_start_active_with_the_epoch_going_on() -> None:
    begun = start(Nothing(audit_epoch=12), changed("ACTIVE", 12, factor=1.0))
    assert (begun.state.state, begun.state.epoch) == (State.ACTIVE, 12)


@pytest.mark.parametrize(
    "last", [changed("KILLED", 12), changed("RECOVERING", 12), changed("ACTIVE", 12, factor=0.5), {"to": "ACTIVE"}]
)
def test_lost_files_after_anything_else_start_killed(last: dict[str, Any]) -> None:
    begun = start(Nothing(audit_epoch=12), last)
    assert begun.state.state is State.KILLED
    assert begun.state.epoch > 12
    assert begun.state.causes[0].code is CauseCode.STATE_LOST


HELD = {**changed("ACTIVE", 12, factor=1.0), "type": "rule.held"}
CONCLUDED = {**changed("ACTIVE", 13, factor=1.0), "type": "recovery.concluded"}
BEGUN = {**changed("RECOVERING", 13), "type": "recovery.started"}


@pytest.mark.parametrize("later", [(), (CONCLUDED,)])
def test_lost_files_start_killed_where_they_held_what_a_rule_asked_for_that_was_taken_out(
    later: tuple[dict[str, Any], ...],
) -> None:
    begun = start(Nothing(audit_epoch=13), BEGUN, HELD, *later)
    assert begun.state.state is State.KILLED
    assert begun.state.epoch > 13
    assert begun.state.causes[0].code is CauseCode.STATE_LOST
    assert "was taken out at 2026-01-01T00:00:00Z" in begun.note


def test_lost_files_start_active_where_an_approved_recovery_has_lifted_what_was_held() -> None:
    assert start(Nothing(audit_epoch=13), HELD, BEGUN, CONCLUDED).state.state is State.ACTIVE


def test_lost_files_start_killed_where_the_audit_knows_an_epoch_but_no_state() -> None:
    begun = start(Nothing(audit_epoch=12))
    assert begun.state.state is State.KILLED
    assert begun.state.epoch > 12


def test_a_flood_of_other_events_does_not_hide_from_a_restore_that_the_switch_was_killed(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path / "audit", max_bytes=2**20, retention_seconds=86_400.0, now=utc(NOW.wall))
    data = {"epoch": 12, "factor": 0.0}
    log.append([{"type": "switch.killed", "from": "ACTIVE", "to": "KILLED", "data": data}], utc(NOW.wall))
    log.append([{"type": "trigger.firing", "data": {}} for _ in range(300)], utc(NOW.wall))
    log.close()
    events = Application._last_audited(_application_with(tmp_path))
    assert [event["to"] for event in events] == ["KILLED"]


def _application_with(directory: Path) -> Any:
    class Storage:
        dir = str(directory)

    class Settings:
        storage = Storage()

    class App:
        settings = Settings()

    return App()


def test_every_change_of_the_switch_is_among_the_types_a_restore_looks_for() -> None:
    assert {"switch.killed", "switch.cause_added", "switch.reopened", "restart.step"} <= CHANGES


# A state stored


@pytest.mark.parametrize(
    "state",
    [ACTIVE, replace(ACTIVE, factor=0.5), killed(), replace(killed(), state=State.RECOVERING)],
    ids=["active", "restarting", "killed", "recovering"],
)
def test_a_stored_state_goes_on_as_it_was(state: SwitchState) -> None:
    assert start(restored(document(state))).state == state


def test_timers_and_lockouts_go_on_too() -> None:
    trigger = Trigger(main=Level(pending_since=NOW.mono - 5.0))
    lockouts = Lockouts()
    for _ in range(6):
        lockouts = lockouts.failed("bob", NOW)
    stored = document(ACTIVE, timers={"dd": trigger_document(trigger, NOW)}, lockouts=lockouts_document(lockouts, NOW))
    begun = start(restored(stored))
    assert begun.triggers["dd"].main.pending_since == NOW.mono - 5.0
    assert begun.lockouts == lockouts
    assert begun.mode == "active"


@pytest.mark.parametrize("swapped", [False, True])
def test_of_two_copies_that_differ_the_stricter_counts_with_the_higher_epoch(swapped: bool) -> None:
    mild, strict = document(replace(ACTIVE, epoch=90)), document(killed())
    first, other = (strict, mild) if swapped else (mild, strict)
    begun = start(restored(first, other))
    assert begun.state.state is State.KILLED
    assert begun.state.epoch == 90


def test_of_two_active_copies_the_smaller_factor_counts() -> None:
    begun = start(restored(document(ACTIVE), document(replace(ACTIVE, factor=0.5))))
    assert begun.state.factor == 0.5


def test_of_two_copies_each_approver_keeps_the_longer_lockout() -> None:
    once, often = Lockouts().failed("bob", NOW), Lockouts()
    for _ in range(7):
        often = often.failed("bob", NOW)
    mild = document(ACTIVE, lockouts=lockouts_document(often, NOW))
    strict = document(killed(), lockouts=lockouts_document(once, NOW))
    assert start(restored(mild, strict)).lockouts == often


def test_a_document_that_says_nothing_readable_starts_killed_above_every_known_epoch() -> None:
    stored = {**document(ACTIVE), "factor": 7}
    begun = start(restored(stored), changed("ACTIVE", 44))
    assert begun.state.state is State.KILLED
    assert begun.state.causes[0].code is CauseCode.STATE_LOST
    assert begun.state.epoch > 44


def test_an_unreadable_other_copy_starts_killed() -> None:
    begun = start(restored(document(ACTIVE), {**document(ACTIVE), "causes": "?"}))
    assert begun.state.state is State.KILLED


def test_a_stored_disabled_state_starts_killed() -> None:
    assert start(restored({**document(ACTIVE), "state": "DISABLED"})).state.state is State.KILLED


def test_a_state_put_back_to_an_earlier_day_starts_killed() -> None:
    begun = start(restored(document(ACTIVE), behind=True), changed("KILLED", 30))
    assert begun.state.state is State.KILLED
    assert begun.state.causes[-1].code is CauseCode.STATE_ROLLED_BACK
    assert begun.state.epoch > 30
    assert begun.note


def test_a_killed_state_put_back_keeps_its_causes_and_its_stricter_restriction() -> None:
    stored = killed(restriction=Restriction.HALT)
    begun = start(restored(document(stored), behind=True), changed("KILLED", 30), policies=REDUCE)
    assert begun.state.kill_restriction is Restriction.HALT
    assert [cause.code for cause in begun.state.causes] == [CauseCode.OPERATOR, CauseCode.STATE_ROLLED_BACK]


def test_unreadable_copies_start_killed_with_the_reason() -> None:
    begun = start(Lost(reason="both are torn"), changed("ACTIVE", 9, factor=1.0))
    assert begun.state.state is State.KILLED
    assert begun.state.causes[0].reason == "both are torn"
    assert begun.state.epoch > 9


# What must not be touched


def test_a_newer_format_is_refused_naming_both_versions() -> None:
    with pytest.raises(CannotRestore, match=r"version 9.*version 1"):
        start(FutureVersion(found=9, supported=1, path=Path("state.json")))


def test_another_switchs_state_is_refused_naming_both() -> None:
    with pytest.raises(CannotRestore, match=r"'them'.*'us'") as refused:
        start(ForeignSwitch(found="them", expected="us", path=Path("state.json")))
    assert isinstance(refused.value, StorageError)
