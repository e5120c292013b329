"""The switch inside a process of its own: for backtests, for tests of trading code, and for bots without a sidecar.

The same core as the sidecar's, with a clock, a lock and callbacks around it. It keeps nothing on disk and reads no
metric: a switch that must survive its process is the sidecar.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from decimal import Decimal
from itertools import count
from typing import Any

from sidecar.adapters.approvers import Approvers
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
from sidecar.core.orders import Decision, Intent, Order, decide, decide_blind
from sidecar.core.policy import GatePolicy, RecoveryPolicy
from sidecar.core.recovery import Due, Lockouts, due
from sidecar.core.snapshot import Reason, ReasonCode, Snapshot
from sidecar.core.states import Instant, Mode, Restriction, Stage, State
from sidecar.core.switch import Change, Proposal, Switch
from sidecar.core.transitions import Policies, SwitchState

log = logging.getLogger("sidecar.embedded")

CALLBACK_QUEUE = 1_000
"""Callbacks that may wait for their thread; more are dropped and logged, for a kill waits for nobody."""

Callback = Callable[[dict[str, Any]], None]
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
        now = clock()
        self._clock = clock
        self._lock = threading.RLock()
        self._approvers = Approvers.from_environment(approval_code)
        self._lockouts = Lockouts()
        self._policies = Policies(recovery=recovery or RecoveryPolicy(), gate=gate or GatePolicy())
        self._switch = Switch(name=name, mode=Mode(mode), state=SwitchState(since=now.wall), policies=self._policies)
        self._switch.cover(Overlay())
        self._snapshot: Snapshot = self._switch.snapshot()
        self._callbacks = _Callbacks()
        self._numbers = count(1)

    # Stopping

    def trigger(self, reason: str, *, by: str = "operator", restriction: str | None = None) -> bool:
        """Stop. When this returns, no check in any thread allows an order any more.

        Returns:
            True if this call stopped trading, False if it was stopped already (the reason is added to the causes).

        Raises:
            InvalidTransition: the switch is disabled.
            ValueError: `restriction` is neither `halt` nor `reduce_only`.
        """
        asked = None if restriction is None else Restriction.from_label(restriction)
        if asked is Restriction.NONE:
            raise ValueError("a kill restricts: choose halt or reduce_only")
        with self._lock:
            now = self._clock()
            stopped = self._switch.state.state is State.ACTIVE
            cause = Cause(code=CauseCode.OPERATOR, reason=reason, time=now.wall, by=by)
            self._apply(Kill(cause=cause, restriction=asked), now)
        if stopped:
            self._callbacks.tell("kill", self.get_status())
        return stopped

    def check_and_block(self) -> bool:
        """Whether a new order of unknown size is blocked."""
        return not self._decide(None).allow

    def decide(self, order: Mapping[str, Any] | Order | None = None) -> dict[str, Any]:
        """Decide on one order, in the gate's own words; None asks about a new order of unknown size.

        Args:
            order: with the keys of `POST /v1/orders/check`; numbers are int, Decimal or decimal strings.
        """
        snapshot = self._current()
        decision = self._decide(order, snapshot)
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

    def _decide(self, order: Mapping[str, Any] | Order | None, snapshot: Snapshot | None = None) -> Decision:
        current = snapshot or self._current()
        if order is None:
            return decide_blind(current, self._policies.gate, Intent.NEW)
        try:
            asked = order if isinstance(order, Order) else parse_order(_exact(order), "")
        except OrderError as error:
            return Decision(allow=False, reason=Reason(code=ReasonCode.BAD_ORDER, message=str(error)))
        return decide(current, self._policies.gate, asked)

    # Recovering

    def request_recovery(self, *, by: str, reason: str = "", approval_code: str | None = None) -> bool:
        """Ask to trade again; starts the cooldown. Returns True when the recovery has begun.

        Raises:
            InvalidTransition: not possible in this state.
            ApprovalError: the code is wrong, or missing where one is needed.
        """
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
        self._lockouts.check(by, now)
        try:
            verified = self._approvers.verify(by, code or "")
        except ApprovalError:
            self._lockouts = self._lockouts.failed(by, now)
            raise
        self._lockouts = self._lockouts.succeeded(by)
        return Approval(by=by, by_verified=verified.by_verified, granted=now.wall, granted_mono=now.mono)

    def complete_recovery(self) -> bool:
        """End the cooldown if it is over; True when trading is open, at the first restart step or beyond.

        Nothing has to call this: every check looks at the clock too.
        """
        return self._current().state is State.ACTIVE

    def cancel_recovery(self, *, by: str = "operator") -> None:
        """Take a recovery back; raise InvalidTransition where there is none."""
        with self._lock:
            self._apply(CancelRecovery(by=by), self._clock())

    # Reading

    @property
    def position_limit_factor(self) -> float:
        """What position limits are multiplied by at this moment."""
        return self._current().gate_factor

    def get_status(self) -> dict[str, Any]:
        """The whole switch, with the keys of `/api/v1/status` that mean something without a sidecar."""
        with self._lock:
            snapshot = self._current()
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
        """Have `callback(status)` called, in a thread of its own, after each kill from ACTIVE."""
        self._callbacks.register("kill", callback)

    def register_on_recover(self, callback: Callback) -> None:
        """Have `callback(status)` called, in a thread of its own, each time trading reopens."""
        self._callbacks.register("recover", callback)

    # Time

    def _current(self) -> Snapshot:
        snapshot = self._snapshot
        # Only a recovery moves with time; everything else is answered without the lock.
        if snapshot.stage is Stage.NONE:
            return snapshot
        with self._lock:
            self._advance()
            return self._snapshot

    def _advance(self) -> None:
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
                return
            self._apply(event, now)
            if isinstance(event, Reopen):
                self._callbacks.tell("recover", self.get_status())

    def _apply(self, event: Event, now: Instant) -> Change | None:
        outcome = self._switch.apply(event, now)
        if isinstance(outcome, Proposal):
            self._switch.commit(outcome)  # nothing to write: what is decided is in force
            outcome = outcome.change
        self._snapshot = self._switch.snapshot()
        return outcome


class _Callbacks:
    """Calls callbacks in one daemon thread, so that a slow or failing one delays nobody."""

    def __init__(self) -> None:
        self._registered: dict[str, list[Callback]] = {"kill": [], "recover": []}
        self._waiting: queue.Queue[tuple[Callback, dict[str, Any]]] = queue.Queue(CALLBACK_QUEUE)
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def register(self, what: str, callback: Callback) -> None:
        self._registered[what].append(callback)
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="killswitch callbacks", daemon=True)
                self._thread.start()

    def tell(self, what: str, status: dict[str, Any]) -> None:
        for callback in tuple(self._registered[what]):
            try:
                self._waiting.put_nowait((callback, status))
            except queue.Full:
                log.error("callback.dropped", extra={"fields": {"on": what}})  # noqa: TRY400 - the queue says it all

    def _run(self) -> None:
        while True:
            callback, status = self._waiting.get()
            try:
                callback(status)
            except Exception:
                log.exception("callback.failed")


def _exact(order: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as the parser wants them: exact decimals, never binary floats."""
    return {
        key: Decimal(repr(value) if isinstance(value, float) else value) if _is_number(value) else value
        for key, value in order.items()
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
