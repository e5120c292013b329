"""A trading loop that asks the kill switch before each order.

Use: order_gate.py SOCKET [--cancel]      exit code 0 sent, 3 blocked
"""

import sys
from typing import Any

from sidecar.client import ExecutionGate, TradingBlockedError


def send_to_venue(order: dict[str, Any]) -> None:
    """Stand for the call that sends an order."""
    print("sent", order["intent"])


def main() -> int:
    """Send one order, or cancel one, if the kill switch lets it."""
    gate = ExecutionGate(socket=sys.argv[1], timeout=0.25)  # one for the whole process, shared by its threads
    order: dict[str, Any] = {"intent": "new", "symbol": "AAPL", "side": "buy", "quantity": 100, "position": 0}
    if "--cancel" in sys.argv:
        order = {"intent": "cancel"}
    try:
        gate.check_can_execute(order)
    except TradingBlockedError as blocked:
        print("blocked", blocked.decision.code, "-", blocked)
        return 3
    send_to_venue(order)
    return 0


if __name__ == "__main__":
    sys.exit(main())
