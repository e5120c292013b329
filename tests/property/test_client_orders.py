"""The client's copy of the order arithmetic against a plain statement of the rules, and against the sidecar's own."""

import struct
import tempfile
import time
import zlib
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar.client import ExecutionGate, GateDecision, TradingBlockedError
from sidecar.core.orders import Intent, Order, Side, decide
from sidecar.core.policy import GatePolicy
from sidecar.core.snapshot import ALL_CLEAR, Reason, ReasonCode, Snapshot
from sidecar.core.states import Mode, Restriction, Stage, State

FOLDER = tempfile.TemporaryDirectory()
PAGE = Path(FOLDER.name, "state.page")

amounts = st.decimals(min_value=0, max_value=1000, places=2, allow_nan=False) | st.integers(0, 12).map(Decimal)
factors = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]) | st.floats(0.001, 1.0)
restrictions = st.sampled_from(list(Restriction))
orders = st.fixed_dictionaries(
    {
        "side": st.sampled_from(["buy", "sell"]),
        "quantity": amounts.filter(bool),
        "position": st.none() | amounts | amounts.map(Decimal.copy_negate),
        "open_quantity": amounts,
        "position_limit": st.none() | amounts,
    }
)


def ask(restriction: Restriction, factor: float, order: dict[str, Any]) -> GateDecision:
    fields = (b"KSWPAGE1", 2, time.monotonic_ns(), 0, restriction.value, factor, 1, 10**12)
    raw = struct.pack("<8sQQIIdQQ", *fields)
    PAGE.write_bytes(raw + struct.pack("<II", zlib.crc32(raw), 0))
    gate = ExecutionGate(page=PAGE)
    try:
        decision = gate._decide({"intent": "new"} | order, time.monotonic() + 1)
        assert (decision.allowed) is passes(gate, order)
    finally:
        gate.close()
    return decision


def passes(gate: ExecutionGate, order: dict[str, Any]) -> bool:
    try:
        return gate.check_can_execute({"intent": "new"} | order)
    except TradingBlockedError:
        return False


def reduces(order: dict[str, Any]) -> bool:
    if order["position"] is None:
        return False
    before = Fraction(order["position"])
    filled = Fraction(order["quantity"]) + Fraction(order["open_quantity"])
    after = before + filled if order["side"] == "buy" else before - filled
    return abs(after) < abs(before) and after * before >= 0


@settings(max_examples=300, deadline=None)
@given(restrictions, factors, orders)
@example(
    Restriction.REDUCE_ONLY,
    1.0,
    {"side": "sell", "quantity": 5, "position": 5, "open_quantity": 0, "position_limit": None},
)
def test_a_page_alone_lets_pass_what_the_rules_let_pass(
    restriction: Restriction, factor: float, order: dict[str, Any]
) -> None:
    decision = ask(restriction, factor, order)
    if restriction is Restriction.HALT:
        wanted = False
    elif reduces(order):
        wanted = True
    elif restriction is Restriction.REDUCE_ONLY:
        wanted = False
    elif order["position_limit"] is None:
        wanted = factor == 1.0
    elif order["position"] is None:
        wanted = False
    else:
        filled = Fraction(order["quantity"]) + Fraction(order["open_quantity"])
        after = Fraction(order["position"]) + (filled if order["side"] == "buy" else -filled)
        wanted = abs(after) <= Fraction(repr(factor)) * Fraction(order["position_limit"])
    assert decision.allowed is wanted


@settings(max_examples=300, deadline=None)
@given(factors, orders)
def test_max_quantity_is_what_passes_and_no_more(factor: float, order: dict[str, Any]) -> None:
    decision = ask(Restriction.NONE, factor, order)
    if decision.code != "over_limit":
        return
    most = decision.max_quantity
    assert most is not None
    assert 0 <= most < order["quantity"]
    if most:
        assert ask(Restriction.NONE, factor, order | {"quantity": most}).allowed
    step = Decimal("1e-25")
    assert not ask(
        Restriction.NONE, factor, order | {"quantity": min(order["quantity"], most.quantize(step) + step)}
    ).allowed


@settings(max_examples=300, deadline=None)
@given(restrictions, st.sampled_from([0.25, 0.5, 0.75, 1.0]), orders)
def test_client_and_sidecar_agree(restriction: Restriction, factor: float, order: dict[str, Any]) -> None:
    code = {Restriction.NONE: ReasonCode.ACTIVE, Restriction.REDUCE_ONLY: ReasonCode.REDUCE_ONLY}
    reason = Reason(code=code.get(restriction, ReasonCode.HALTED), message="m") if restriction else ALL_CLEAR
    snapshot = Snapshot(
        switch="s", mode=Mode.ACTIVE, state=State.ACTIVE, stage=Stage.NONE, restriction=restriction, factor=factor,
        epoch=1, since=0.0, gate_restriction=restriction, gate_factor=factor, reason=reason,
    )  # fmt: skip
    theirs = decide(snapshot, GatePolicy(), Order(**(order | {"intent": Intent.NEW, "side": Side(order["side"])})))
    ours = ask(restriction, factor, order)
    if order["position_limit"] is None and factor < 1.0 and restriction is Restriction.NONE and not reduces(order):
        assert not ours.allowed  # a page knows no configured limit, so it wants the caller's
        return
    assert (ours.allowed, ours.code) == (theirs.allow, theirs.reason.code.value)
    if ours.code == "over_limit":
        assert (ours.max_quantity, ours.limit) == (theirs.max_quantity, theirs.limit)
