"""What somebody else remembers of the switch, and which state follows from it when our own memory is gone.

A record is weaker than a stored state: it is a sample every few seconds, perhaps from several scrapes of the same
switch. Of several looks that are about equally new the strictest counts, and what was not seen is taken as the worst.
Pure: who was asked, and how, is not known here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from sidecar.core.events import Cause, CauseCode, Kill
from sidecar.core.states import Instant, Restriction, Stage, State
from sidecar.core.transitions import Policies, Recovery, SwitchState, transition

EQUALLY_NEW_SECONDS: Final = 300.0
"""Newest looks this near to each other count alike: clocks differ, and a pod that goes overlaps with one that comes."""

WITNESS: Final = "Prometheus' record"

_SEVERITY: Final = {State.ACTIVE: 0, State.RECOVERING: 1, State.KILLED: 2}

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sighting:
    """The newest look that one scrape target gave at the switch; None stands for what it did not show.

    Attributes:
        time: Unix seconds, by the clock of who looked.
        state: ACTIVE, RECOVERING or KILLED; DISABLED says nothing about what was in force and is never a sighting.
        restriction: the worst of all, the kill's included.
        factor: position limit factor, 0 to 1; the worst of all, a throttling rule's included.
    """

    time: float
    state: State
    restriction: Restriction | None = None
    factor: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """All that is remembered of one switch from before this process started.

    Attributes:
        sightings: the newest of each scrape target, in any order.
        highest_epoch: of all samples; None where there is none.
    """

    sightings: tuple[Sighting, ...] = ()
    highest_epoch: int | None = None

    @property
    def epoch(self) -> int:
        """The highest epoch, 0 where none was seen."""
        return self.highest_epoch or 0


def joined(records: Iterable[Record]) -> Record:
    """What several servers remember, as one record."""
    every = list(records)
    epochs = [record.highest_epoch for record in every if record.highest_epoch is not None]
    return Record(
        sightings=tuple(sighting for record in every for sighting in record.sightings),
        highest_epoch=max(epochs, default=None),
    )


def last_word(record: Record) -> Sighting | None:
    """The newest sighting, made stricter by all that are equally new; None where there is none."""
    if not record.sightings:
        return None
    newest = max(sighting.time for sighting in record.sightings)
    near = [sighting for sighting in record.sightings if newest - sighting.time <= EQUALLY_NEW_SECONDS]
    state = max((sighting.state for sighting in near), key=lambda state: _SEVERITY.get(state, 2))
    agreeing = [sighting for sighting in near if (sighting.state is State.ACTIVE) is (state is State.ACTIVE)]
    return Sighting(
        time=newest,
        state=state,
        restriction=_worst((sighting.restriction for sighting in agreeing), max),
        factor=_worst((sighting.factor for sighting in agreeing), min),
    )


def _worst(values: Iterable[T | None], choose: Callable[[list[T]], T]) -> T | None:
    """The worst of the values, or None where one is not known: it might be worse still."""
    every = list(values)
    known = [value for value in every if value is not None]
    return choose(known) if len(known) == len(every) else None


def state_from_sighting(
    seen: Sighting, now: Instant, policies: Policies, *, epoch: int, when: str, asked: Restriction | None = None
) -> SwitchState:
    """The state to start in when nothing but this sighting is known.

    KILLED and RECOVERING become KILLED. ACTIVE stays ACTIVE; below factor 1.0 it goes on up the restart ladder from
    there, with the time of the steps anew, and a factor that is not known is that of the first step. Whether a factor
    was the ladder's or a throttling rule's does not matter: the rule is asked before the gate opens, and the ladder is
    the slower of the two ways up.

    Args:
        seen: the last word of the record.
        now: the present moment.
        policies: for the restart ladder.
        epoch: the highest that is known.
        when: the sighting's time, as people read it.
        asked: a restriction that is known from elsewhere; the stricter holds.
    """
    fresh = SwitchState(since=now.wall, epoch=epoch)
    if seen.state is not State.ACTIVE:
        return transition(fresh, kill_from_sighting(seen, now, when, asked), now, policies)
    factor = _restart_factor(seen, policies)
    return fresh if factor >= 1.0 else replace(fresh, factor=factor, recovery=_ladder(now, when))


def kill_from_sighting(seen: Sighting, now: Instant, when: str, asked: Restriction | None = None) -> Kill:
    """The kill that brings back what was seen; halted where its restriction is not known."""
    reason = f"no state was stored; {WITNESS} shows the switch {seen.state}, last seen at {when}"
    cause = Cause(code=CauseCode.RESTORED, reason=reason, time=now.wall, by=WITNESS)
    # NONE beside a kill cannot be true; it is as good as unknown.
    return Kill(cause=cause, restriction=max(seen.restriction or Restriction.HALT, asked or Restriction.NONE))


def _restart_factor(seen: Sighting, policies: Policies) -> float:
    first = policies.recovery.steps[0].factor
    # A switch that is ACTIVE has a factor above 0 of its own; 0 comes from a rule, which will ask for it again.
    return seen.factor if seen.factor is not None and 0.0 < seen.factor <= 1.0 else first


def _ladder(now: Instant, when: str) -> Recovery:
    return Recovery(
        stage=Stage.GRADUAL_RESTART,
        by=WITNESS,
        reason=f"the restart ladder that was seen at {when} goes on",
        requested=now.wall,
        stage_since=now.mono,
        step_since=now.mono,
    )


def rollback_kill(record_epoch: int, stored_epoch: int, now: Instant) -> Kill:
    """The kill for a stored state that is older than what was seen of it: what it has forgotten may be anything."""
    reason = (
        f"the stored state is of epoch {stored_epoch}, but {WITNESS} shows epoch {record_epoch} from before this "
        "start: it was put back to an earlier day"
    )
    cause = Cause(code=CauseCode.STATE_ROLLED_BACK, reason=reason, time=now.wall, by=WITNESS)
    return Kill(cause=cause, restriction=Restriction.HALT)
