"""One thread that does what may block: the writes of state and audit, one after the other, in the order submitted.

A `ThreadPoolExecutor(max_workers=1)` keeps the order too, but the interpreter joins its worker at exit, so one hung
fsync would keep a dead sidecar from ending and being restarted; and its queue has no end. This one is a daemon and
bounded. It knows nothing of what it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from sidecar.core.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable

# Far more than any real incident brings in a second; with so many waiting the volume hangs; more would hide it.
DEFAULT_LIMIT = 1024

T = TypeVar("T")


class StorageThreadError(StorageError):
    """The storage thread did not take the call; it was not and will not be run."""


class StorageBusy(StorageThreadError):  # noqa: N818 - reads as the condition
    """The queue is full: the volume is hung or far too slow."""


class StorageStopped(StorageThreadError):  # noqa: N818 - reads as the condition
    """The thread was told to stop before the call was submitted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    call: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


class StorageThread:
    """Runs callables in order in one daemon thread; `submit` and `stop` belong to the event loop's thread."""

    def __init__(self, *, limit: int = DEFAULT_LIMIT, name: str = "storage") -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._limit = limit
        self._places = threading.BoundedSemaphore(limit)
        self._depth = 0
        self._depth_lock = threading.Lock()
        self._stopping = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """How many calls wait or run; one that stays above 0 means a hung volume."""
        return self._depth

    def submit(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Queue `call` and return a future of the running loop for its result or exception.

        Never blocks. Where the call cannot be taken, the future fails at once with StorageBusy or StorageStopped.
        Cancelling the future drops the result, never the call: what was ordered to be written is written, in its turn.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        if self._stopping:
            future.set_exception(StorageStopped("the storage thread is stopped; nothing was written"))
        elif not self._places.acquire(blocking=False):
            future.set_exception(
                StorageBusy(f"{self._limit} writes wait already, nothing was written: the volume of storage.dir hangs")
            )
        else:
            self._count(1)
            self._jobs.put(_Job(call=call, loop=loop, future=future))
        return future

    async def stop(self, timeout: float) -> bool:  # noqa: ASYNC109 - it bounds a thread, which cancellation cannot
        """Take nothing new, finish what is queued, and return whether that was done within `timeout` seconds.

        False leaves the daemon thread to its hung call; the process can still exit. Idempotent.
        """
        if not self._stopping:
            self._stopping = True
            self._jobs.put(None)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        # Polled: an asyncio.Event needs a loop that still runs when the thread ends, and ours may be closed by then.
        while not self._ended.is_set() and loop.time() < deadline:  # noqa: ASYNC110 - see above
            await asyncio.sleep(min(0.005, max(0.0, deadline - loop.time())))
        return self._ended.is_set()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._run_one(job)
            # The last job's result must not live on until the next job comes.
            del job
        self._ended.set()

    def _run_one(self, job: _Job) -> None:
        result: Any = None
        failure: BaseException | None = None
        try:
            result = job.call()
        except StopIteration as error:
            # A future refuses StopIteration, which would leave its caller waiting for ever.
            failure = RuntimeError(f"the storage call raised {error!r}")
        except BaseException as error:  # noqa: BLE001 - any failure is the submitter's to see, and the next write must still run
            failure = error
        self._count(-1)
        self._places.release()
        # RuntimeError: the loop is closed, so nobody is left to tell.
        with contextlib.suppress(RuntimeError):
            job.loop.call_soon_threadsafe(_settle, job.future, result, failure)

    def _count(self, change: int) -> None:
        with self._depth_lock:
            self._depth += change


def _settle(future: asyncio.Future[Any], result: object, failure: BaseException | None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(result)
    else:
        future.set_exception(failure)
