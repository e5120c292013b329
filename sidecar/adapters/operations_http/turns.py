"""Turns: one question of the operations side is worked on in each turn of the event loop, and no more.

The gate lives on the same loop. Without this, a hundred readers who ask at the same moment would all be answered before
the next order is, and that order would wait for all of them.
"""

import asyncio
from collections import deque


class Turns:
    """Hands out turns in the order in which they were asked for."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._handing_out = False

    async def take(self) -> None:
        """Wait for a turn."""
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._waiting.append(turn)
        if not self._handing_out:
            self._handing_out = True
            loop.call_soon(self._hand_out, loop)
        await turn

    def _hand_out(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # its caller may have gone
                turn.set_result(None)
                break
        self._handing_out = bool(self._waiting)
        if self._handing_out:
            loop.call_soon(self._hand_out, loop)
