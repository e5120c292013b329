"""A kill switch that stands next to a trading process, reads Prometheus, and fails closed.

The public names are `KillSwitch` (the switch inside one process), `ExecutionGate` and `TradingBlockedError` (for
trading code). They are imported on first use, so that `sidecar.client` needs nothing but the standard library.
"""

from typing import TYPE_CHECKING

from sidecar.version import __version__

if TYPE_CHECKING:
    from sidecar.client import ExecutionGate, TradingBlockedError
    from sidecar.embedded import KillSwitch

__all__ = ["ExecutionGate", "KillSwitch", "TradingBlockedError", "__version__"]

_HOMES = {
    "ExecutionGate": "sidecar.client",
    "KillSwitch": "sidecar.embedded",
    "TradingBlockedError": "sidecar.client",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'sidecar' has no attribute {name!r}")
    return getattr(import_module(home), name)
