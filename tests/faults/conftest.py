"""The cast (tests/cast.py), for the fault tests; a saboteur; and for how long a fault lasts."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.cast import (  # noqa: F401 - fixtures are used by their names
    _programs,
    case,
    drawdown,
    exporter,
    heartbeat,
    killswitch,
    make_sidecar,
    own_prometheus,
    patient,
    shared_prometheus,
    sidecar,
    wait,
)
from tests.faults.tracer import Tracer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="session")
def times() -> int:
    """How many times as much as in `make test`: 1, or what `make faults` says in FAULTS."""
    return max(1, int(os.environ.get("FAULTS", "1")))


@pytest.fixture(scope="session")
def strace() -> str:
    found = shutil.which("strace")
    if found is None:
        pytest.skip("strace is not installed")
    return found


@pytest.fixture
def tracer(strace: str) -> Iterator[Callable[..., Tracer]]:
    """Attaches strace to a sidecar, until the end of the test at the latest."""
    tracers: list[Tracer] = []

    def attach(*arguments: Any, **more: Any) -> Tracer:
        tracers.append(Tracer(*arguments, **more))
        return tracers[-1]

    yield attach
    for one in tracers:
        one.release()
