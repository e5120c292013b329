"""File descriptors: how many this process may have, and how many of them the gate's connections may take.

A peer of the gate that opens connections and forgets them must not take the descriptor that the state file, the control
socket or a probe needs.
"""

import resource
from typing import Final

from sidecar.adapters.gate_http import GateLimits

WANTED: Final = 16_384
RESERVED: Final = 1_024
"""For all but the gate: three ways in with 256 connections each, handshakes, sources and files."""


def raise_limit() -> None:
    """Take as many descriptors as this process may and can use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def gate_limits() -> GateLimits:
    """The gate's limits within what this process has: half of it, where there is too little to keep a reserve."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    usual = GateLimits()
    if soft == resource.RLIM_INFINITY:
        return usual
    return GateLimits(connections=min(usual.connections, max(soft - RESERVED, soft // 2)))
