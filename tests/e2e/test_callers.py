"""The callers that the documents show, each run as it stands against a real sidecar: allowed, killed, hanging, dead."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cast import ROOT, Sidecar

pytestmark = pytest.mark.e2e

EXAMPLES = ROOT / "docs" / "examples" / "callers"
PYTHON = [sys.executable]
CALLERS = ("order_gate.py", "order_gate_async.py", "order_gate.sh", "order_check.sh", "order_gate.c")
SENT, BLOCKED = 0, 3

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """order_gate.c as a program."""
    program = tmp_path_factory.mktemp("caller") / "order_gate"
    warnings = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-Wshadow", "-Wconversion", "-O2"]
    command = ["gcc", "-std=c11", *warnings, str(EXAMPLES / "order_gate.c"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def call(compiled: Path) -> Run:
    """Runs one of the callers on a socket, with the `killswitch` of this environment on its path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    commands = {
        name: [str(compiled)]
        if name.endswith(".c")
        else [*(PYTHON if name.endswith(".py") else []), str(EXAMPLES / name)]
        for name in CALLERS
    }

    def run(name: str, gate_socket: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*commands[name], str(gate_socket), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            env={**os.environ, "PATH": path},
            check=False,
        )

    return run


def outcomes(call: Run, gate_socket: Path, *arguments: str) -> dict[str, int]:
    """What each caller ends with, all run side by side."""
    with ThreadPoolExecutor(len(CALLERS)) as pool:
        ends = pool.map(lambda name: call(name, gate_socket, *arguments).returncode, CALLERS)
        return dict(zip(CALLERS, ends, strict=True))


def sent_soon(call: Run, switch: Sidecar) -> dict[str, int]:
    """What each caller ends with where orders are allowed; asked again where this machine was too busy for that."""
    found = outcomes(call, switch.gate_socket)
    for name in CALLERS:
        for _ in range(20):
            if found[name] == SENT:
                break
            found[name] = call(name, switch.gate_socket).returncode
    return found


@pytest.mark.timeout(300)  # some fifty processes, one after another for those that a busy machine made too late
def test_every_caller_sends_when_allowed_and_only_cancels_when_killed_hanging_or_dead(
    sidecar: Callable[..., Sidecar], call: Run
) -> None:
    switch = sidecar()
    assert sent_soon(call, switch) == dict.fromkeys(CALLERS, SENT)

    switch.kill_switch()
    assert outcomes(call, switch.gate_socket) == dict.fromkeys(CALLERS, BLOCKED)
    assert "killed" in call("order_gate.py", switch.gate_socket).stdout
    assert outcomes(call, switch.gate_socket, "--cancel") == dict.fromkeys(CALLERS, SENT)

    switch.signal(signal.SIGSTOP)
    assert outcomes(call, switch.gate_socket) == dict.fromkeys(CALLERS, BLOCKED)
    assert outcomes(call, switch.gate_socket, "--cancel") == dict.fromkeys(CALLERS, SENT)
    switch.signal(signal.SIGCONT)

    switch.kill9()
    assert outcomes(call, switch.gate_socket) == dict.fromkeys(CALLERS, BLOCKED)
    assert outcomes(call, switch.gate_socket, "--cancel") == dict.fromkeys(CALLERS, SENT)


ANSWERS = {
    "another service's 200": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "an error": b"HTTP/1.1 500 Internal Server Error\r\nX-Killswitch-Switch: s\r\nContent-Length: 0\r\n\r\n",
    "a redirect": b"HTTP/1.1 302 Found\r\nX-Killswitch-Switch: s\r\nLocation: /gate\r\nContent-Length: 0\r\n\r\n",
    "no HTTP": b"200 OK\r\n\r\n",
    "half an answer": b"HTTP/1.1 200 OK\r\nX-Killswitch-Switch: s\r\nContent-Le",
    "nothing": b"",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_what_is_no_answer_of_a_kill_switch_lets_nothing_out(tmp_path: Path, call: Run, answer: bytes) -> None:
    address = tmp_path / "gate.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(8)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        assert outcomes(call, address) == dict.fromkeys(CALLERS, BLOCKED)
        listener.shutdown(socket.SHUT_RDWR)


def test_an_answer_that_drips_is_too_late_for_the_compiled_caller(tmp_path: Path, call: Run) -> None:
    address = tmp_path / "gate.sock"
    answer = b"HTTP/1.1 200 OK\r\nX-Killswitch-Switch: s\r\nContent-Length: 0\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(1)

        def serve() -> None:
            with suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    for byte in answer:
                        connection.sendall(bytes([byte]))
                        time.sleep(0.02)

        threading.Thread(target=serve, daemon=True).start()
        assert call("order_gate.c", address).returncode == BLOCKED


def test_the_programs_that_the_callers_need_are_there() -> None:
    assert shutil.which("curl")
    assert shutil.which("gcc")


@pytest.mark.parametrize("name", CALLERS)
def test_the_documents_show_the_callers_as_they_are_tested(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    assert f"\n{text}```\n" in (ROOT / "docs" / "CALLERS.md").read_text()
