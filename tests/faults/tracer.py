"""strace as a saboteur: it attaches to a running sidecar and lets chosen system calls fail, wait or kill."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from tests.cast import Sidecar, wait_for


class Tracer:
    """Injects a fault into the threads of a sidecar until it is released.

    Args:
        switch: a sidecar that runs.
        injection: as of `strace -e inject=`, "fsync:error=EIO".
        below: only calls on this folder, what lies in it now, and what the sidecar makes of it; None for all calls.
        main_thread: only the thread of the event loop.
    """

    def __init__(
        self, switch: Sidecar, injection: str, *, below: Path | None = None, main_thread: bool = False
    ) -> None:
        assert switch.process is not None
        self._pid = switch.process.pid
        calls = injection.partition(":")[0]
        paths = [] if below is None else [part for path in _places(below) for part in ("-P", str(path))]
        self._process = subprocess.Popen(
            [
                *("strace", "-qq", "-o", "/dev/null", "-p", str(self._pid)),
                *([] if main_thread else ["-f"]),
                *("-e", f"trace={calls}", "-e", f"inject={injection}"),
                *paths,
            ],
            stderr=subprocess.PIPE,
        )
        self._main_thread = main_thread
        wait_for(self._holds, "strace to hold every thread")

    def _holds(self) -> bool:
        tasks = Path(f"/proc/{self._pid}/task")
        wanted = [tasks / str(self._pid)] if self._main_thread else list(tasks.iterdir())
        return all("TracerPid:\t0\n" not in (task / "status").read_text() for task in wanted)

    def release(self) -> None:
        """Let the calls through again. Idempotent."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def _places(folder: Path) -> list[Path]:
    """The folder, what is in it, and the names under which the sidecar writes before it renames."""
    temporary = [folder / f"{name}.tmp" for name in ("state.json", "state.json.bak")]
    return [folder, *folder.rglob("*"), *temporary]
