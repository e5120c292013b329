"""Every error that the project raises on purpose; the type says whose fault it was.

KillswitchError
├── SettingsError           the configuration file: all problems at once
├── RuleFileError           a rule file: all problems at once
├── InvalidTransition       a command that is not possible in this state
├── RecoveryBlocked         an approved recovery that triggers or health do not allow
├── NotDurable              decided, but not on disk in time
├── ApprovalError           who asked may not: wrong code, locked out, not the second person
│   └── LockedOut           too many wrong codes; says how long
├── SourceError             a source of readings did not answer as it should
├── StorageError            the state folder or a file in it
└── InvariantViolation      our own mistake: stop rather than be wrong
"""

from collections.abc import Mapping, Sequence


class KillswitchError(Exception):
    """Base of all errors that this project raises on purpose."""


class SettingsError(KillswitchError):
    """The configuration cannot be used; the message lists every problem as `file:line: key: reason`."""


class RuleFileError(KillswitchError):
    """A rule file cannot be used; the message lists every problem as `file:line: key: reason`."""


class InvalidTransition(KillswitchError):  # noqa: N818 - named for what happened, as in the documentation
    """A command that the switch refuses in its present state; nothing was changed."""


class RecoveryBlocked(KillswitchError):  # noqa: N818
    """A recovery that all approvers want, but triggers or health do not allow.

    Attributes:
        blockers: one sentence for each.
    """

    def __init__(self, blockers: Sequence[str]) -> None:
        super().__init__("the recovery is refused: " + "; ".join(blockers))
        self.blockers = tuple(blockers)


class NotDurable(KillswitchError):  # noqa: N818
    """What was asked for is decided, but not on disk in time.

    Attributes:
        status: the switch as it stands, with `state` and `durable`.
    """

    def __init__(self, message: str, *, status: Mapping[str, object]) -> None:
        super().__init__(message)
        self.status = status


class ApprovalError(KillswitchError):
    """An approval that does not count; nothing was changed but the record of the attempt."""


class LockedOut(ApprovalError):  # noqa: N818
    """Too many wrong codes.

    Attributes:
        retry_after: seconds until the next attempt is read.
    """

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SourceError(KillswitchError):
    """A source of readings did not answer as it should."""


class StorageError(KillswitchError):
    """The state folder, or a file in it, cannot be used as asked."""


class InvariantViolation(KillswitchError):  # noqa: N818
    """Something that this code promises did not hold; the caller must fail closed."""
