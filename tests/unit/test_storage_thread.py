"""The storage thread: in order, bounded, never in the loop's way, and never in the way of the process's end."""

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from sidecar.adapters import storage_thread
from sidecar.adapters.storage_thread import StorageBusy, StorageStopped, StorageThread
from sidecar.core.errors import StorageError

PATIENCE = 10.0


class Hang:
    """A write that hangs until the test lets it go."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.release = threading.Event()

    def __call__(self) -> str:
        self.began.set()
        assert self.release.wait(PATIENCE)
        return "written"


@pytest.fixture
async def hang() -> AsyncIterator[Hang]:
    hang = Hang()
    yield hang
    hang.release.set()


async def began(hang: Hang) -> None:
    assert await asyncio.to_thread(hang.began.wait, PATIENCE)


async def test_calls_run_in_the_order_submitted_in_one_other_thread() -> None:
    storage = StorageThread()
    seen: list[tuple[int, int]] = []

    def note(number: int) -> Callable[[], int]:
        def call() -> int:
            seen.append((number, threading.get_ident()))
            return number

        return call

    results = await asyncio.gather(*(storage.submit(note(number)) for number in range(200)))
    assert results == list(range(200))
    assert [number for number, _ in seen] == list(range(200))
    assert len({thread for _, thread in seen}) == 1
    assert seen[0][1] != threading.get_ident()
    assert storage.depth == 0
    assert await storage.stop(PATIENCE)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(OSError(28, "No space left on device"), OSError), (SystemExit(3), SystemExit), (StopIteration(), RuntimeError)],
)
async def test_a_failing_call_fails_its_own_future_and_the_next_still_runs(
    raised: BaseException, expected: type[BaseException]
) -> None:
    storage = StorageThread()

    def fail() -> None:
        raise raised

    failing, fine = storage.submit(fail), storage.submit(lambda: "written")
    assert await fine == "written"
    assert isinstance(failing.exception(), expected)
    assert await storage.stop(PATIENCE)


async def test_a_full_queue_is_told_at_once_and_has_room_again_afterwards(hang: Hang) -> None:
    storage = StorageThread(limit=3)
    waiting = [storage.submit(hang) for _ in range(3)]
    refused = storage.submit(lambda: "never")
    assert refused.done()
    with pytest.raises(StorageBusy, match="3 writes wait"):
        await refused
    assert storage.depth == 3
    hang.release.set()
    assert await asyncio.gather(*waiting) == ["written"] * 3
    assert await storage.submit(lambda: "again") == "again"
    assert await storage.stop(PATIENCE)


async def test_a_hung_call_does_not_delay_the_loop(hang: Hang) -> None:
    storage = StorageThread()
    future = storage.submit(hang)
    await began(hang)
    for _ in range(100):
        await asyncio.sleep(0)
    assert not future.done()
    hang.release.set()
    assert await future == "written"
    assert await storage.stop(PATIENCE)


async def test_a_cancelled_future_drops_the_result_but_not_the_write(hang: Hang) -> None:
    storage = StorageThread()
    written: list[str] = []
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    storage.submit(hang)
    cancelled = storage.submit(lambda: written.append("kill"))
    cancelled.cancel()
    hang.release.set()
    await storage.submit(lambda: None)
    assert written == ["kill"]
    assert complaints == []
    assert cancelled.cancelled()
    assert await storage.stop(PATIENCE)


async def test_stop_finishes_what_is_queued_and_takes_nothing_new(hang: Hang) -> None:
    storage = StorageThread()
    first, second = storage.submit(hang), storage.submit(lambda: "second")
    stopping = asyncio.create_task(storage.stop(PATIENCE))
    await asyncio.sleep(0)
    with pytest.raises(StorageStopped):
        await storage.submit(lambda: "late")
    hang.release.set()
    assert await stopping
    assert (await first, await second) == ("written", "second")
    assert await storage.stop(PATIENCE)


async def test_stop_does_not_wait_longer_than_told_for_a_hung_call(hang: Hang) -> None:
    storage = StorageThread()
    future = storage.submit(hang)
    await began(hang)
    assert not await storage.stop(0.01)
    assert not await storage.stop(0)
    hang.release.set()
    assert await future == "written"
    assert await storage.stop(PATIENCE)


async def test_a_full_queue_can_still_be_stopped(hang: Hang) -> None:
    storage = StorageThread(limit=1)
    storage.submit(hang)
    assert not await storage.stop(0)
    hang.release.set()
    assert await storage.stop(PATIENCE)


def test_a_loop_closed_while_a_call_is_in_flight_does_not_end_the_thread() -> None:
    hang, storages = Hang(), []

    async def leave() -> None:
        storages.append(StorageThread())
        storages[0].submit(hang)
        await began(hang)

    async def come_back() -> tuple[str, bool]:
        return await storages[0].submit(lambda: "next loop"), await storages[0].stop(PATIENCE)

    asyncio.run(leave())
    hang.release.set()
    assert asyncio.run(come_back()) == ("next loop", True)
    gc.collect()


HUNG = """
import asyncio, threading
from sidecar.adapters.storage_thread import StorageThread
async def main():
    storage = StorageThread()
    storage.submit(threading.Event().wait)
    await storage.stop(0.05)
asyncio.run(main())
print("ended")
"""


def test_the_process_ends_although_a_write_hangs() -> None:
    root = Path(storage_thread.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", HUNG], cwd=root, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "ended\n"


def test_its_errors_are_storage_errors() -> None:
    assert issubclass(StorageBusy, StorageError)
    assert issubclass(StorageStopped, StorageError)
