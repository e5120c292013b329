"""Watches the memory and CPU of a container, the host or a process, and hands them on as shares of a rule's limits.

Reads cgroup files and asks psutil, always in a thread with a deadline, for either may hang. Knows no evaluation: what a
share means, and for how long, is for `sidecar.rules` to judge. What cannot be read is a failure, never a healthy value.
"""

from sidecar.adapters.process.machine import Machine, PsutilMachine
from sidecar.adapters.process.watchdog import Watchdog

__all__ = ["Machine", "PsutilMachine", "Watchdog"]
