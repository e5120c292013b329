"""The same for asyncio: several orders at once, and the event loop never waits for the gate.

Use: order_gate_async.py SOCKET [--cancel]      exit code 0 all sent, 3 any blocked
"""

import asyncio
import sys
from typing import Any

from sidecar.client import ExecutionGate, TradingBlockedError


async def send(gate: ExecutionGate, order: dict[str, Any]) -> bool:
    """Send an order if the kill switch lets it; say whether it did."""
    try:
        await gate.check_can_execute_async(order)
    except TradingBlockedError as blocked:
        print("blocked", blocked.decision.code, "-", blocked)
        return False
    print("sent", order["intent"])  # here stands the call that sends the order
    return True


async def main() -> int:
    """Send three orders, or cancel them, side by side."""
    gate = ExecutionGate(socket=sys.argv[1], timeout=0.25)
    order: dict[str, Any] = {"intent": "new", "symbol": "AAPL", "side": "buy", "quantity": 100, "position": 0}
    if "--cancel" in sys.argv:
        order = {"intent": "cancel"}
    sent = await asyncio.gather(*(send(gate, order) for _ in range(3)))
    return 0 if all(sent) else 3


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
