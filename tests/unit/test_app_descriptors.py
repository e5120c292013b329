"""How many file descriptors the gate's connections may take."""

import resource

import pytest

from sidecar.adapters.gate_http import GateLimits
from sidecar.app import descriptors

INFINITE = resource.RLIM_INFINITY


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    held = {"now": (1024, 1024)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: held["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: held.update(now=wanted))
    return held


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1024, 4096), (4096, 4096)),
        ((1024, 1_048_576), (descriptors.WANTED, 1_048_576)),
        ((1024, INFINITE), (descriptors.WANTED, INFINITE)),
        ((65_536, 1_048_576), (65_536, 1_048_576)),
        ((INFINITE, INFINITE), (INFINITE, INFINITE)),
        ((1024, 1024), (1024, 1024)),
    ],
)
def test_as_many_are_taken_as_may_be_and_are_of_use(
    limits: dict[str, tuple[int, int]], before: tuple[int, int], after: tuple[int, int]
) -> None:
    limits["now"] = before
    descriptors.raise_limit()
    assert limits["now"] == after


@pytest.mark.parametrize(
    ("soft", "connections"),
    [(INFINITE, 12_000), (65_536, 12_000), (descriptors.WANTED, 12_000), (4096, 3072), (256, 128)],
)
def test_a_reserve_is_left_for_everything_but_the_gate(
    limits: dict[str, tuple[int, int]], soft: int, connections: int
) -> None:
    limits["now"] = (soft, soft)
    assert descriptors.gate_limits() == GateLimits(connections=connections)
