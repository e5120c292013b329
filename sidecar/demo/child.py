"""One child process of the demo: started, watched, and ended by its own id, whatever happens.

It gets a session of its own, so that a Ctrl-C reaches the demo alone, which then ends its children in order.
"""

import json
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

STOP_SECONDS: Final = 8.0
"""Longer than the sidecar gives itself to write its last state."""

_EVENTS_KEPT: Final = 1000


class Child:
    """A running program; what it writes goes into a log file.

    Args:
        name: for messages.
        argv: the command.
        env: its whole environment.
        log: where its output goes.
        talks: whether it reads lines and writes JSON events: then its standard output is read here instead.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self, name: str, argv: Sequence[str], *, env: Mapping[str, str], log: Path, talks: bool = False
    ) -> None:
        self.name = name
        self.log = log
        self.events: deque[dict[str, Any]] = deque(maxlen=_EVENTS_KEPT)
        pipe = subprocess.PIPE if talks else None
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own commands
                list(argv),
                env=dict(env),
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or output,
                stderr=output,
                start_new_session=True,
                text=True,
                bufsize=1,
            )
        self._reader = threading.Thread(target=self._read, name=f"events of {name}", daemon=True)
        if talks:
            self._reader.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def tell(self, line: str) -> None:
        """Write it a line; a child that is gone hears nothing."""
        if self._process.stdin is None or self._process.stdin.closed:
            return
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return

    def tail(self, lines: int) -> list[str]:
        """The last lines of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]

    def stop(self) -> None:
        """End it: politely, and after `STOP_SECONDS` by force. Returns when it is gone."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._reader.is_alive():
            self._reader.join(STOP_SECONDS)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                _close(stream)

    def _read(self) -> None:
        for line in self._process.stdout or ():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                self.events.append(event)


def _close(stream: Any) -> None:
    try:
        stream.close()
    except BrokenPipeError:  # a line that a child which is gone never read
        return
