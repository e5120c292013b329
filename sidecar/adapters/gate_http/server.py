"""Listen for the gate's questions on TCP and on a Unix socket, with the same answers on both.

Owns listeners, connections and their time limits. What the answers are is the desk's; when the snapshot changes is
the application's.
"""

import asyncio
import errno
import socket
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from time import monotonic

from sidecar.adapters.gate_http.connection import GateConnection, GateLimits, Roster
from sidecar.adapters.gate_http.desk import Admit, Desk, GateStatistics
from sidecar.core.policy import GatePolicy
from sidecar.core.snapshot import Snapshot

_SOCKET_MODE = 0o666
_FOLDER_MODE = 0o755
_SWEEP_STEP = 500
_LIVENESS_PROBE_SECONDS = 1.0


class GateServer:
    """The gate: `update` it with each new snapshot, `start_tcp` and `start_unix` it, `stop` it.

    Everything runs on one event loop. Before the first `update`, all but cancels are denied as `not_ready`.
    """

    def __init__(self, *, switch: str, admit: Admit | None = None, limits: GateLimits | None = None) -> None:
        """Make a gate that does not listen yet.

        Args:
            switch: the switch's name, shown until the first snapshot brings it.
            admit: asked about every `new` and `replace` question before it is decided; a reason denies this question.
                It may call `update`. None costs nothing. An exception in it denies as `internal_error`.
            limits: what a peer may use.
        """
        self._desk = Desk(switch, admit)
        self._limits = limits or GateLimits()
        self._roster = Roster(limit=self._limits.connections)
        self._servers: list[asyncio.Server] = []
        self._bound_path: tuple[Path, int] | None = None
        self._sweep_timer: asyncio.Handle | None = None

    def update(self, snapshot: Snapshot, policy: GatePolicy) -> None:
        """Answer from this snapshot from now on, in this very turn of the loop. Never raises."""
        self._desk.update(snapshot, policy)

    def renew(self, now: float) -> None:
        """Rely on the snapshot for another lease from `now` (monotonic seconds) on; without it, answers go `stale`."""
        self._desk.renew(now)

    def set_admit(self, admit: Admit | None) -> None:
        """Change or remove the hook that is asked about every `new` and `replace` question."""
        self._desk.admit = admit

    def statistics(self) -> GateStatistics:
        """What was answered since the start; a copy."""
        return self._desk.statistics(len(self._roster.open), self._roster.refused)

    async def start_tcp(self, host: str, port: int) -> tuple[str, int]:
        """Listen on a TCP address; return the address bound, of use where port was 0. Raise OSError."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self._connection, host, port, backlog=self._limits.backlog)
        self._servers.append(server)
        self._start_sweeping()
        bound: tuple[str, int] = server.sockets[0].getsockname()[:2]
        return bound

    async def start_unix(self, path: str | Path) -> None:
        """Listen on a Unix socket that every user may connect to.

        A socket file left by a dead process is replaced; one that something listens on, or a file that is no socket,
        raises OSError and is left alone. A missing folder is made.
        """
        path = Path(path)
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
            path.parent.chmod(_FOLDER_MODE)  # mkdir's own mode is cut by the umask
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.settimeout(0.0)
            listener.bind(str(path))
            path.chmod(_SOCKET_MODE)  # before listen, so that nobody is ever turned away for the mode
            loop = asyncio.get_running_loop()
            server = await loop.create_unix_server(self._connection, sock=listener, backlog=self._limits.backlog)
        except BaseException:
            listener.close()
            raise
        self._servers.append(server)
        self._bound_path = (path, path.stat().st_ino)
        self._start_sweeping()

    async def stop(self, grace: float) -> None:
        """Stop listening, let answers that are owed go out for up to `grace` seconds, then cut what remains."""
        for server in self._servers:
            server.close()
        self._roster.stopping = True
        self._remove_bound()
        for connection in tuple(self._roster.open):
            connection.retire()
        if not await self._emptied(grace):
            for connection in tuple(self._roster.open):
                connection.expire()
            await self._emptied(1.0)
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        for server in self._servers:
            await server.wait_closed()
        self._servers.clear()

    async def _emptied(self, seconds: float) -> bool:
        empty = asyncio.Event()
        self._roster.on_empty = empty.set
        if not self._roster.open:
            return True
        try:
            async with asyncio.timeout(seconds):
                await empty.wait()
        except TimeoutError:
            return False
        return True

    def _connection(self) -> GateConnection:
        return GateConnection(self._desk, self._limits, self._roster, asyncio.get_running_loop())

    def _start_sweeping(self) -> None:
        if self._sweep_timer is None:
            self._sweep_later()

    def _sweep_later(self) -> None:
        # One timer for all connections: arming and disarming one for every question would cost more than answering it.
        shortest = min(self._limits.head_seconds, self._limits.body_seconds, self._limits.idle_seconds)
        interval = min(1.0, shortest / 5)
        self._sweep_timer = asyncio.get_running_loop().call_later(interval, self._sweep, None)

    def _sweep(self, rest: Iterator[GateConnection] | None) -> None:
        """Close connections past their deadline, some hundred at a time."""
        remaining = iter(tuple(self._roster.open)) if rest is None else rest
        now = monotonic()
        step = list(islice(remaining, _SWEEP_STEP))
        for connection in step:
            if connection.deadline < now:
                connection.expire()
        if len(step) == _SWEEP_STEP:
            self._sweep_timer = asyncio.get_running_loop().call_soon(self._sweep, remaining)
        else:
            self._sweep_later()

    def _remove_bound(self) -> None:
        """Remove our socket file, unless another process has put its own in its place."""
        if self._bound_path is None:
            return
        path, inode = self._bound_path
        self._bound_path = None
        try:
            if path.lstat().st_ino == inode:
                path.unlink()
        except FileNotFoundError:
            return


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "stands where the gate's socket should be and is no socket; remove it", str(path))
    if _is_served(path):
        raise OSError(errno.EADDRINUSE, "something listens on the gate's socket already; stop it first", str(path))
    path.unlink()


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_LIVENESS_PROBE_SECONDS)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            # No answer, no permission: whatever it is, nothing says that nobody listens.
            return True
    return True
