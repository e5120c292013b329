"""Passwords of basic auth: proven against bcrypt hashes away from the event loop, one at a time, and remembered.

A bcrypt hash is dear on purpose, and a scraper sends its password every few seconds. So what was proven once is
remembered by a keyed digest; what was not costs its sender a wait, and everybody else nothing: one thread, which stands
back behind the loop, and a short queue before it.
"""

import asyncio
import contextlib
import hashlib
import hmac
import os
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from string import ascii_letters, digits
from typing import Final

import bcrypt

from sidecar.adapters.operations_http.problems import Problem

MOST_PROVEN: Final = 128
MOST_WAITING: Final = 16
PATIENCE_SECONDS: Final = 10.0
_LONGEST: Final = 72  # bytes; bcrypt looks at no more, so a longer password would match by its beginning
_BACKGROUND_NICENESS: Final = 10
_CHEAPEST: Final = 4
_ALPHABET: Final = "./" + ascii_letters + digits


class Passwords:
    """Checks passwords against the users of the moment."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._waiting = 0
        self._proven: OrderedDict[bytes, None] = OrderedDict()
        self._key = secrets.token_bytes(32)
        self._nobody: dict[int, str] = {}

    async def are_right(self, users: Mapping[str, str], name: str, password: str) -> bool:
        """Whether this is the user's password; an unknown user costs the same time as a wrong password.

        Args:
            users: bcrypt hashes by user.
            name: the user.
            password: as sent.

        Raises:
            Problem: 503, there are too many unproven passwords in the queue.
        """
        hashed = users.get(name)
        digest = self._digest(name, hashed or "", password)
        if digest in self._proven:
            self._proven.move_to_end(digest)
            return True
        right = await self._check(password, hashed or self._hash_of_nobody(users)) and hashed is not None
        if right:
            self._proven[digest] = None
            while len(self._proven) > MOST_PROVEN:
                self._proven.popitem(last=False)
        return right

    def stop(self) -> None:
        """End the thread; what waits is dropped."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None

    async def _check(self, password: str, hashed: str) -> bool:
        if self._waiting >= MOST_WAITING:
            raise _busy()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "passwords", initializer=_stand_back)
        self._waiting += 1
        checking = self._thread.submit(_is_right, password, hashed)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                return await asyncio.wrap_future(checking)
        except TimeoutError:
            raise _busy() from None
        finally:
            self._waiting -= 1

    def _digest(self, name: str, hashed: str, password: str) -> bytes:
        # The hash is part of it: with a new password, or without the user, nothing old is remembered.
        mac = hmac.new(self._key, digestmod=hashlib.sha256)
        for part in (name, hashed, password):
            raw = part.encode("utf-8", "surrogateescape")
            mac.update(len(raw).to_bytes(8, "big") + raw)
        return mac.digest()

    def _hash_of_nobody(self, users: Mapping[str, str]) -> str:
        cost = max((int(hashed[4:6]) for hashed in users.values()), default=_CHEAPEST)
        if cost not in self._nobody:
            salt = bcrypt.gensalt(cost).decode()
            self._nobody[cost] = salt + "".join(secrets.choice(_ALPHABET) for _ in range(31))
        return self._nobody[cost]


def _is_right(password: str, hashed: str) -> bool:
    raw = password.encode("utf-8", "surrogateescape")
    if len(raw) > _LONGEST or b"\0" in raw:
        bcrypt.checkpw(b"", hashed.encode())  # takes its time like any other
        return False
    return bcrypt.checkpw(raw, hashed.encode())


def _busy() -> Problem:
    return Problem(503, "too many passwords wait to be checked; try again", headers={"Retry-After": "1"})


def _stand_back() -> None:
    # On Linux this is the thread's own niceness: where there is one core, the gate goes first.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _BACKGROUND_NICENESS)
