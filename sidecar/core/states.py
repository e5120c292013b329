"""The words of the switch, ordered by severity so that the worst of several reasons is a plain `max` or `min`.

Knows nothing of rules, files or HTTP; everything else in the project speaks in these types.
"""

from dataclasses import dataclass
from enum import IntEnum, StrEnum


class State(StrEnum):
    """Where the switch stands. The order of definition is the number on the state page."""

    ACTIVE = "ACTIVE"
    KILLED = "KILLED"
    RECOVERING = "RECOVERING"
    DISABLED = "DISABLED"

    @property
    def number(self) -> int:
        """The number that stands for this state on the state page: 0 ACTIVE, 1 KILLED, 2 RECOVERING, 3 DISABLED."""
        return _STATE_NUMBERS[self]


_STATE_NUMBERS = {state: number for number, state in enumerate(State)}


class Restriction(IntEnum):
    """What orders may do; a larger number is stricter, so the worst of several is their `max`."""

    NONE = 0
    REDUCE_ONLY = 1
    HALT = 2

    @property
    def label(self) -> str:
        """The name in configuration, metrics and answers: `none`, `reduce_only` or `halt`."""
        return self.name.lower()

    @classmethod
    def from_label(cls, label: str) -> "Restriction":
        """Read a name as written in configuration; raise ValueError naming the choices for any other text."""
        try:
            return cls[label.upper()]
        except KeyError:
            raise ValueError(f"{label!r} is not a restriction; choose none, reduce_only or halt") from None


class Stage(StrEnum):
    """How far a recovery has come; NONE before the first request and some time after the last step."""

    NONE = "NONE"
    PENDING = "PENDING"
    VALIDATING = "VALIDATING"
    COOLDOWN = "COOLDOWN"
    GRADUAL_RESTART = "GRADUAL_RESTART"
    COMPLETE = "COMPLETE"


class Mode(StrEnum):
    """How much of the switch is in force; fixed for the life of the process."""

    ACTIVE = "active"
    SHADOW = "shadow"
    DISABLED = "disabled"


class Action(IntEnum):
    """What a rule asks for; a larger number is stricter."""

    WARN = 0
    THROTTLE = 1
    REDUCE_ONLY = 2
    HALT = 3
    KILL = 4

    @property
    def label(self) -> str:
        """The name in rule files and answers: `warn`, `throttle`, `reduce_only`, `halt` or `kill`."""
        return self.name.lower()

    @property
    def restriction(self) -> Restriction:
        """The restriction that this action holds while its rule fires; a kill's own depends on the policy."""
        return _ACTION_RESTRICTIONS[self]


_ACTION_RESTRICTIONS = {
    Action.WARN: Restriction.NONE,
    Action.THROTTLE: Restriction.NONE,
    Action.REDUCE_ONLY: Restriction.REDUCE_ONLY,
    Action.HALT: Restriction.HALT,
    Action.KILL: Restriction.HALT,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Instant:
    """One moment, on both clocks.

    Attributes:
        mono: seconds on a clock that only runs forward; every duration is measured on it.
        wall: seconds since the Unix epoch; only for what people read and for what is stored.
    """

    mono: float
    wall: float
