"""Asks the gate all the time while something else goes on, and keeps what it was told, when, and how long it took."""

from __future__ import annotations

import http.client
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from sidecar.client import ExecutionGate, TradingBlockedError

if TYPE_CHECKING:
    from tests.cast import Sidecar


@dataclass(frozen=True, kw_only=True)
class Told:
    """One answer: `asked` and `told` are monotonic seconds, `status` 0 where no answer came."""

    asked: float
    told: float
    status: int
    reason: str

    @property
    def took(self) -> float:
        return self.told - self.asked


@dataclass(kw_only=True)
class Bystander:
    """A trader who asks the gate on a kept connection, and reads the page, every few milliseconds."""

    sidecar: Sidecar
    pause: float = 0.005
    told: list[Told] = field(default_factory=list)
    page: list[tuple[float, str]] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def _ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.sidecar.gate_port, timeout=30)
        while not self._over.wait(self.pause):
            asked = time.monotonic()
            try:
                connection.request("GET", "/gate")
                answer = connection.getresponse()
                answer.read()
                status, reason = answer.status, answer.headers["X-Killswitch-Reason"]
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                status, reason = 0, repr(error)
            self.told.append(Told(asked=asked, told=time.monotonic(), status=status, reason=reason))
        connection.close()

    def _read(self) -> None:
        gate = ExecutionGate(page=self.sidecar.page)
        while not self._over.wait(self.pause):
            before = time.monotonic()
            try:
                gate.check_can_execute()
                self.page.append((before, "active"))
            except TradingBlockedError as blocked:
                self.page.append((before, blocked.decision.code))
        gate.close()

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._ask), threading.Thread(target=self._read)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(40)
        assert not any(thread.is_alive() for thread in self._threads)

    def allowed_between(self, begin: float, end: float) -> list[object]:
        """Every order that was let through between two moments, at the gate or by the page."""
        at_gate: list[object] = [
            one for one in self.told if one.status == 200 and begin <= one.asked and one.told <= end
        ]
        return at_gate + [one for one in self.page if one[1] == "active" and begin <= one[0] <= end]

    def slowest(self, share: float = 0.99) -> float:
        """Seconds that this share of the answers did not exceed."""
        took = sorted(one.took for one in self.told)
        assert took, "nothing was asked"
        return took[min(int(len(took) * share), len(took) - 1)]
