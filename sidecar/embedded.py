"""The switch inside a process of its own: for backtests, for tests of trading code, and for bots without a sidecar.

The same core as the sidecar's, with a clock, a lock and callbacks around it. It keeps nothing on disk and reads no
metric: a switch that must survive its process is the sidecar.
"""

import logging
import operator
import threading
import time
from collections.abc import Callable, Mapping
from decimal import Decimal
from itertools import count
from typing import Any

from sidecar.adapters.approvers import Approvers, checked_code
from sidecar.adapters.gate_http.orders_json import OrderError, parse_order
from sidecar.app.status import reason_document, status_document
from sidecar.core.compose import Overlay
from sidecar.core.errors import ApprovalError, InvalidTransition
from sidecar.core.events import (
    Approval,
    BeginRecovery,
    CancelRecovery,
    Cause,
    CauseCode,
    Conclude,
    Event,
    ExpireApprovals,
    Kill,
    Reopen,
    RequestRecovery,
    StepUp,
)
from sidecar.core.orders import CANCEL_PASSES, Decision, Intent, Order, decide, decide_blind
from sidecar.core.policy import GatePolicy, RecoveryPolicy
from sidecar.core.recovery import Due, Lockouts, due
from sidecar.core.snapshot import Reason, ReasonCode, Snapshot
from sidecar.core.states import Instant, Mode, Restriction, Stage, State
from sidecar.core.switch import Change, Proposal, Switch
from sidecar.core.transitions import Policies, SwitchState

log = logging.getLogger("sidecar.embedded")

NO_REASON = "no reason given"
"""The reason of a kill that came without one: stopping does not wait for words."""

Callback = Callable[[dict[str, Any]], object]
Clock = Callable[[], Instant]


def system_clock() -> Instant:
    """The machine's own clocks."""
    return Instant(mono=time.monotonic(), wall=time.time())


class KillSwitch:
    """One switch in this process; every method may be called from any thread.

    Args:
        name: its identity, as in answers.
        recovery: cooldown and restart ladder; the sidecar's defaults where not given.
        gate: position limits and what a kill means for exits; the sidecar's defaults where not given.
        approval_code: what `request_recovery` must be given; None needs none, fit for backtests only.
        mode: `active`, `shadow` or `disabled`, as in the sidecar's configuration.
        clock: where `now` comes from; a backtest brings its own.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: `name` or `approval_code` is empty, the code cannot be used, or there is no such mode.
    """

    def __init__(
        self,
        name: str = "in-process",
        *,
        recovery: RecoveryPolicy | None = None,
        gate: GatePolicy | None = None,
        approval_code: str | None = None,
        mode: str = "active",
        clock: Clock = system_clock,
    ) -> None:
        now = _first_instant(clock)
        self._clock = clock
        self._lock = threading.RLock()
        self._approvers = _approvers(approval_code)
        self._lockouts = Lockouts()
        self._policies = _policies(recovery, gate)
        self._switch = Switch(
            name=_named(name, "name"), mode=_mode(mode), state=SwitchState(since=now.wall), policies=self._policies
        )
        self._switch.cover(Overlay())
        self._snapshot: Snapshot = self._switch.snapshot()
        self._on_kill: list[Callback] = []
        self._on_recover: list[Callback] = []
        self._numbers = count(1)

    # Stopping

    def trigger(self, reason: object = None, *, by: object = "operator", restriction: str | None = None) -> bool:
        """Stop. No check in any thread allows an order any more when this returns, or when the first callback begins.

        Args:
            reason: why, for people; whatever is given counts as its text, and nothing as `NO_REASON`.
            by: who stops, taken in the same way.
            restriction: `halt` or `reduce_only`; None for what the gate's policy says.

        Returns:
            True if this call stopped trading, False if it was stopped already (the reason is added to the causes).

        Raises:
            InvalidTransition: the switch is disabled.
            ValueError: `restriction` is neither `halt` nor `reduce_only`.
        """
        asked = None if restriction is None else _restriction(restriction)
        why, who = _said(reason, NO_REASON), _said(by, "operator")
        with self._lock:
            now = self._clock()
            stopped = self._switch.state.state is State.ACTIVE
            cause = Cause(code=CauseCode.OPERATOR, reason=why, time=now.wall, by=who)
            self._apply(Kill(cause=cause, restriction=asked), now)
            status = self._document() if stopped else {}
        if stopped:
            _tell(self._on_kill, status)
        return stopped

    def check_and_block(self) -> bool:
        """Whether a new order of unknown size is blocked."""
        _, decision = self._decide(None)
        return not decision.allow

    def decide(self, order: Mapping[str, Any] | Order | None = None) -> dict[str, Any]:
        """Decide on one order, in the gate's own words; None asks about a new order of unknown size.

        Raises nothing: what the gate would refuse to read is denied as `bad_order`, whatever fails as `internal_error`.

        Args:
            order: with the keys of `POST /v1/orders/check`; numbers are int, Decimal, decimal strings, or float, which
                counts as its shortest text. The gate's bounds hold: 40 digits, exponents within 30.
        """
        snapshot, decision = self._decide(order)
        most = decision.max_quantity
        return {
            "decision": "allow" if decision.allow else "deny",
            "decision_id": f"in-process-{next(self._numbers)}",
            "switch": snapshot.switch,
            "state": snapshot.state.value,
            "restriction": snapshot.gate_restriction.label,
            "position_limit_factor": snapshot.gate_factor,
            "max_quantity": most,
            "reason": reason_document(decision.reason),
            "epoch": snapshot.epoch,
            "valid_for_ms": 0,
        }

    def _decide(self, order: object) -> tuple[Snapshot, Decision]:
        cancels = False
        try:
            cancels = _is_cancel(order)
            snapshot = self._current()
            return snapshot, self._decide_on(snapshot, order)
        except Exception as error:
            log.exception("decision.failed")
            return self._snapshot, CANCEL_PASSES if cancels else _failed(error)

    def _decide_on(self, snapshot: Snapshot, order: object) -> Decision:
        if order is None:
            return decide_blind(snapshot, self._policies.gate, Intent.NEW)
        try:
            asked = parse_order(_document(order), "")
        except OrderError as error:
            return Decision(allow=False, reason=Reason(code=ReasonCode.BAD_ORDER, message=str(error)))
        return decide(snapshot, self._policies.gate, asked)

    # Recovering

    def request_recovery(self, *, by: str, reason: str = "", approval_code: str | None = None) -> bool:
        """Ask to trade again; starts the cooldown. Returns True when the recovery has begun.

        Raises:
            InvalidTransition: not possible in this state.
            ApprovalError: the code is wrong, or missing where one is needed; LockedOut where it was not even read.
            TypeError: an argument is no text.
            ValueError: `by` is empty.
        """
        _named(by, "by")
        _text(reason, "reason")
        if approval_code is not None:
            _text(approval_code, "approval_code")
        with self._lock:
            approval = self._approve(by, approval_code)
            now = self._clock()
            self._apply(RequestRecovery(by=by, reason=reason, approval=approval), now)
            if self._switch.state.stage is Stage.VALIDATING:
                self._apply(BeginRecovery(), now)
        return self._switch.state.state is State.RECOVERING

    def _approve(self, by: str, code: str | None) -> Approval | None:
        now = self._clock()
        if self._switch.state.state is not State.KILLED:
            raise InvalidTransition(f"request recovery is not possible while the switch is {self._switch.state.state}")
        if self._approvers.count == 0:
            return Approval(by=by, by_verified=False, granted=now.wall, granted_mono=now.mono)
        account = self._approvers.lockout_name(by)  # one for all, or each made-up name would bring new attempts
        self._lockouts.check(account, now)
        try:
            verified = self._approvers.verify(by, code or "")
        except ApprovalError:
            self._lockouts = self._lockouts.failed(account, now)
            raise
        self._lockouts = self._lockouts.succeeded(account)
        return Approval(by=by, by_verified=verified.by_verified, granted=now.wall, granted_mono=now.mono)

    def complete_recovery(self) -> bool:
        """End the cooldown if it is over; True when trading is open, at the first restart step or beyond.

        Nothing has to call this: every check looks at the clock too.
        """
        return self._current().state is State.ACTIVE

    def cancel_recovery(self, *, by: str = "operator") -> None:
        """Take a recovery back; raise InvalidTransition where there is none, ValueError where `by` is empty."""
        _named(by, "by")
        with self._lock:
            self._apply(CancelRecovery(by=by), self._clock())

    # Reading

    @property
    def position_limit_factor(self) -> float:
        """What position limits are multiplied by at this moment."""
        return self._current().gate_factor

    def get_status(self) -> dict[str, Any]:
        """The whole switch, with the keys of `/api/v1/status` that mean something without a sidecar."""
        self._current()
        with self._lock:
            return self._document()

    def _document(self) -> dict[str, Any]:
        snapshot = self._snapshot
        return status_document(
            snapshot=snapshot,
            state=self._switch.state,
            decision=decide_blind(snapshot, self._policies.gate, Intent.NEW),
            demands=(),
            now=self._clock(),
            policies=self._policies,
            step_waits_for=None,
            extra={"ready": True, "durable": False},
        )

    def register_on_kill(self, callback: Callback) -> None:
        """Have `callback(status)` called after each kill from ACTIVE, before `trigger` returns and in its thread.

        The kill is in force by then and no lock is held, so a callback may take its time and may call the switch. What
        it raises is logged, and the others are called all the same.

        Raises:
            TypeError: it cannot be called.
        """
        self._on_kill.append(_callable(callback, "callback"))

    def register_on_recover(self, callback: Callback) -> None:
        """Have `callback(status)` called each time trading reopens, by the first call that finds the cooldown over.

        In that call's thread and before it answers; otherwise as with `register_on_kill`.

        Raises:
            TypeError: it cannot be called.
        """
        self._on_recover.append(_callable(callback, "callback"))

    # Time

    def _current(self) -> Snapshot:
        snapshot = self._snapshot
        # Only a recovery moves with time; everything else is answered without the lock.
        if snapshot.stage is Stage.NONE:
            return snapshot
        with self._lock:
            reopened = self._advance()
            snapshot = self._snapshot
        for status in reopened:
            _tell(self._on_recover, status)
        return self._snapshot if reopened else snapshot  # a callback may have stopped again

    def _advance(self) -> list[dict[str, Any]]:
        """Do all that is due; return the status at each reopening, to be told when the lock is free again."""
        reopened: list[dict[str, Any]] = []
        moves: dict[Due, Event] = {
            Due.EXPIRE: ExpireApprovals(),
            Due.REOPEN: Reopen(),
            Due.STEP: StepUp(),
            Due.CONCLUDE: Conclude(),
        }
        while True:
            now = self._clock()
            event = moves.get(due(self._switch.state, now, self._policies) or Due.VALIDATE)
            if event is None:
                return reopened
            self._apply(event, now)
            if isinstance(event, Reopen):
                reopened.append(self._document())

    def _apply(self, event: Event, now: Instant) -> Change | None:
        outcome = self._switch.apply(event, now)
        if isinstance(outcome, Proposal):
            self._switch.commit(outcome)  # nothing to write: what is decided is in force
            outcome = outcome.change
        self._snapshot = self._switch.snapshot()
        return outcome


def _tell(callbacks: list[Callback], status: dict[str, Any]) -> None:
    for callback in tuple(callbacks):  # one may register another
        try:
            callback(status)
        except Exception:
            log.exception("callback.failed")


# Orders


_NUMBERS = ("quantity", "position", "open_quantity", "position_limit")
_LONGEST_WHOLE_BITS = 256  # far more than the gate reads; Python refuses to write whole numbers of many thousands


def _is_cancel(order: object) -> bool:
    if isinstance(order, Order):
        return order.intent is Intent.CANCEL
    return isinstance(order, Mapping) and order.get("intent") == Intent.CANCEL.value


def _document(order: object) -> object:
    """An order as the gate finds it in JSON, with its numbers as text, so that the gate's reader bounds them."""
    if isinstance(order, Order):
        order = {name: getattr(order, name) for name in Order.__dataclass_fields__} | {"intent": order.intent.value}
    if not isinstance(order, Mapping):
        return order  # the reader says what is wrong with it
    return {key: _literal(value) if key in _NUMBERS else value for key, value in order.items()}


def _literal(value: object) -> object:
    """A number as text, a float as its shortest; anything else as it is, for the reader to take or refuse."""
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, Decimal):
        return str(value)
    try:
        whole = operator.index(value)  # type: ignore[arg-type]  # that is the question; numpy's integers answer it
    except TypeError:
        return value
    return str(whole) if whole.bit_length() <= _LONGEST_WHOLE_BITS else hex(whole)


def _failed(error: Exception) -> Decision:
    message = f"the switch failed to decide: {error!r:.200}"
    return Decision(allow=False, reason=Reason(code=ReasonCode.INTERNAL_ERROR, message=message))


# Arguments


def _first_instant(clock: object) -> Instant:
    now = _callable(clock, "clock")()
    if not isinstance(now, Instant):
        raise TypeError(f"clock gives {now!r:.80}; wanted Instant(mono=…, wall=…) of sidecar.core.states")
    return now


def _approvers(code: str | None) -> Approvers:
    if code is None:
        return Approvers.from_environment(None)
    line = _text(code, "approval_code").removesuffix("\n").removesuffix("\r")  # as the sidecar reads its own
    if not line:
        raise ValueError("approval_code is empty; give the code to ask for, or None where none is needed")
    checked_code(line)
    return Approvers.from_environment(line)


def _policies(recovery: RecoveryPolicy | None, gate: GatePolicy | None) -> Policies:
    recovery = RecoveryPolicy() if recovery is None else recovery
    gate = GatePolicy() if gate is None else gate
    for name, given, wanted in (("recovery", recovery, RecoveryPolicy), ("gate", gate, GatePolicy)):
        if not isinstance(given, wanted):
            raise TypeError(f"{name} is {given!r:.80}; wanted a {wanted.__name__} of sidecar.core.policy, or None")
    return Policies(recovery=recovery, gate=gate)


def _mode(mode: str) -> Mode:
    try:
        return Mode(mode)
    except ValueError:
        raise ValueError(f"mode is {mode!r:.80}; choose {', '.join(Mode)}") from None


def _restriction(label: object) -> Restriction:
    asked = Restriction.from_label(label) if isinstance(label, str) else Restriction.NONE
    if asked is Restriction.NONE:
        raise ValueError(f"restriction is {label!r:.80}, and a kill restricts: choose halt or reduce_only")
    return asked


def _callable(given: Any, name: str) -> Any:
    if not callable(given):
        raise TypeError(f"{name} is {given!r:.80}; wanted a function")
    return given


def _named(text: str, name: str) -> str:
    if not _text(text, name).strip():
        raise ValueError(f"{name} is {text!r:.80}; wanted a name")
    return text


def _text(text: str, name: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{name} is a {type(text).__name__}; wanted a text")  # its value may be a code
    return text


def _said(words: object, otherwise: str) -> str:
    """What somebody gave as words; never raises, for a kill must not fail for its words."""
    try:
        return ("" if words is None else str(words)).strip() or otherwise
    except Exception:  # noqa: BLE001 - a foreign object's text may raise anything
        return otherwise
