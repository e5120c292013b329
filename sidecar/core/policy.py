"""What the operator of a switch decided beforehand: how trading comes back, and what the gate does with orders.

Plain frozen values in seconds and absolute quantities; `sidecar.settings` reads them from YAML.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from sidecar.core.states import Restriction


@dataclass(frozen=True, kw_only=True, slots=True)
class StepGate:
    """A condition that must hold before a restart step is taken: `query operator threshold`.

    Attributes:
        query: PromQL text.
        operator: `lt`, `le`, `gt`, `ge`, `eq` or `ne`.
        threshold: what the value is compared with.
        max_age: seconds; a measurement with an older sample behind it is inconclusive.
        interval: seconds between two measurements.
        failure_limit: failed measurements that are borne; one more is a failure of the gate.
        inconclusive_limit: unusable ones that are borne; one more holds the step until the gate passes.
        consecutive_error_limit: unanswered ones in a row that are borne; one more is a failure of the gate.
        on_failure: `step_back` to the step before, or `kill`.
    """

    query: str
    operator: str
    threshold: float
    max_age: float = 60.0
    interval: float = 10.0
    failure_limit: int = 0
    inconclusive_limit: int = 0
    consecutive_error_limit: int = 4
    on_failure: str = "step_back"


@dataclass(frozen=True, kw_only=True, slots=True)
class RestartStep:
    """One rung of the restart ladder.

    Attributes:
        factor: position limit factor from this step on, above 0 and at most 1.
        after: seconds of running time since trading reopened.
        gates: conditions that must all hold before this step is taken.
    """

    factor: float
    after: float = 0.0
    gates: tuple[StepGate, ...] = ()


DEFAULT_STEPS = (
    RestartStep(factor=0.5),
    RestartStep(factor=0.75, after=3600.0),
    RestartStep(factor=1.0, after=7200.0),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryPolicy:
    """How a killed switch may come back.

    Attributes:
        cooldown: seconds of running time between the approved recovery and the first order.
        backoff_factor: each further kill from ACTIVE within 24 h multiplies the next cooldown by it; 1 switches it off.
        backoff_max: seconds; a cooldown never grows beyond this (or beyond `cooldown`, if that is longer).
        steps: the restart ladder: factors rise, the first step counts from reopening, the last is 1.0.
        require_approval: False lets a recovery start without any code.
        approvals: how many different approvers are needed.
        approval_ttl: seconds after which an approval lapses.
        require_triggers_clear: False lets a recovery start while rules still fire.
    """

    cooldown: float = 300.0
    backoff_factor: float = 2.0
    backoff_max: float = 3600.0
    steps: tuple[RestartStep, ...] = DEFAULT_STEPS
    require_approval: bool = True
    approvals: int = 1
    approval_ttl: float = 900.0
    require_triggers_clear: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class GatePolicy:
    """What the gate does with orders beside the state.

    Attributes:
        killed_policy: the restriction of a kill that asks for none itself; never NONE.
        position_limits: absolute limits by symbol; `*` stands for all others. Empty limits nothing.
        blind_orders: whether a question without a size passes while the factor is between 0 and 1.
        trust_reduce_claim: whether a caller's word that an order reduces is believed under `reduce_only`.
        lease_ms: how long an answer may be relied on, milliseconds.
    """

    killed_policy: Restriction = Restriction.HALT
    position_limits: Mapping[str, Decimal] = field(default_factory=dict)
    blind_orders: bool = True
    trust_reduce_claim: bool = False
    lease_ms: int = 500
