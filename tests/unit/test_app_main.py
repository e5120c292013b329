import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidecar.adapters.operations_http import OperationsServer
from sidecar.app.main import serve
from sidecar.app.places import run_path

CONFIG = """
switch: {name: test}
prometheus: {urls: []}
rules: {files: [rules.yaml]}
gate: {listen: "127.0.0.1:PORT", socket: gate.sock, page: page}
operations: {listen: "127.0.0.1:0"}
control: {socket: control.sock}
storage: {dir: state}
logging: {level: error, format: console}
"""


def write(folder: Path, text: str = CONFIG, port: int = 0) -> str:
    path = folder / "config.yaml"
    path.write_text(text.replace("PORT", str(port)))
    return str(path)


def test_a_configuration_that_cannot_be_used_ends_with_1_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve(write(tmp_path, "nonsense: 1"), {}) == 1
    assert "nonsense" in capsys.readouterr().err


def test_a_file_that_is_not_there_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve(str(tmp_path / "none.yaml"), {}) == 1
    assert "none.yaml" in capsys.readouterr().err


def test_a_gate_port_that_is_taken_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert serve(write(tmp_path, port=taken.getsockname()[1]), {}) == 1
    assert "sidecar.cannot_listen" in capsys.readouterr().err


def test_an_approvers_file_that_cannot_be_used_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve(write(tmp_path, CONFIG + "recovery: {approvers_file: none.yaml}\n"), {}) == 1
    assert "sidecar.cannot_start" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_an_orderly_stop_and_ends_with_0(tmp_path: Path, number: signal.Signals) -> None:
    gate = tmp_path / "gate.sock"

    def end() -> None:
        deadline = time.monotonic() + 8.0
        while not gate.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGHUP)  # a reload under way must not hold up the end
        os.kill(os.getpid(), number)

    ending = threading.Thread(target=end)
    path = write(tmp_path)
    ending.start()
    assert serve(path, {}) == 0
    ending.join()
    assert not gate.exists()
    assert (tmp_path / "state" / "state.json").exists()


def test_a_gate_without_an_address_answers_on_its_socket_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = tmp_path / "gate.sock"
    port_line = 'listen: "127.0.0.1:PORT"'
    path = write(tmp_path, CONFIG.replace(port_line, "listen: off", 1).replace("level: error", "level: info"))
    ending = threading.Thread(target=lambda: (until(gate.exists), os.kill(os.getpid(), signal.SIGTERM)))
    ending.start()
    assert serve(path, {}) == 0
    ending.join()
    assert "sidecar.listening gate=off" in capsys.readouterr().err


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 8.0
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_the_gate_denies_before_the_listeners_that_probes_ask_are_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A startup probe asks for health and takes the answer for a gate that listens and denies.
    denied: dict[str, bool] = {}

    def watched(name: str) -> None:
        original = getattr(OperationsServer, name)

        async def start(server: OperationsServer, *arguments: Any) -> object:
            denied[name] = await asyncio.to_thread(answers, tmp_path / "gate.sock")
            return await original(server, *arguments)

        monkeypatch.setattr(OperationsServer, name, start)

    watched("start_tcp")
    watched("start_health")
    listen = 'operations: {listen: "127.0.0.1:0"'
    path = write(tmp_path, CONFIG.replace(listen, f'{listen}, health_listen: "127.0.0.1:0"'))
    ending = threading.Thread(target=lambda: (until(lambda: len(denied) == 2), os.kill(os.getpid(), signal.SIGTERM)))
    ending.start()
    assert serve(path, {}) == 0
    ending.join()
    assert denied == {"start_tcp": True, "start_health": True}


def answers(gate: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(5)
        asking.connect(str(gate))
        asking.sendall(b"GET /gate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return asking.recv(4096).startswith(b"HTTP/1.1 403")


def test_after_sigterm_the_gate_lingers_for_the_bot_and_then_ends(tmp_path: Path) -> None:
    gate = tmp_path / "gate.sock"
    seen: dict[str, float | bool] = {}

    def end() -> None:
        until(gate.exists)
        seen["told"] = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # an orderly stop takes a tenth of it
        seen["answered"] = answers(gate)

    ending = threading.Thread(target=end)
    path = write(tmp_path)
    ending.start()
    assert serve(path, {}, linger=1.5) == 0
    ended = time.monotonic()
    ending.join()
    assert seen["answered"]
    assert ended - seen["told"] >= 1.5
    assert not gate.exists()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_lingering(tmp_path: Path, second: signal.Signals) -> None:
    gate = tmp_path / "gate.sock"

    def end() -> None:
        until(gate.exists)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)  # two signals at once would be one
        os.kill(os.getpid(), second)

    ending = threading.Thread(target=end)
    path = write(tmp_path)
    ending.start()
    started = time.monotonic()
    assert serve(path, {}, linger=60.0) == 0
    ending.join()
    assert time.monotonic() - started < 30.0


# Places of sockets and page


@pytest.mark.parametrize("wanted", ["/var/tmp/x/gate.sock", "/run/other/gate.sock", "/run/killswitch/deep/gate.sock"])
def test_only_the_default_folders_ever_move(wanted: str, tmp_path: Path) -> None:
    assert run_path(wanted, {"XDG_RUNTIME_DIR": str(tmp_path)}) == Path(wanted)


def test_without_a_runtime_folder_nothing_moves() -> None:
    assert run_path("/run/killswitch/gate.sock", {}) == Path("/run/killswitch/gate.sock")


def test_a_default_folder_that_cannot_be_made_moves_to_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert run_path("/run/killswitch/gate.sock", environ) == tmp_path / "killswitch" / "gate.sock"
    assert run_path("/run/killswitch-control/control.sock", environ) == tmp_path / "killswitch-control" / "control.sock"


@pytest.mark.parametrize(("name", "mode"), [("killswitch", 0o755), ("killswitch-control", 0o700)])
def test_the_private_folder_is_made_for_this_user_alone(
    name: str, mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.app.places.DEFAULT_ROOT", tmp_path)
    environ = {"XDG_RUNTIME_DIR": "/nowhere"}
    assert run_path(str(tmp_path / name / "x.sock"), environ) == tmp_path / name / "x.sock"
    assert (tmp_path / name).stat().st_mode & 0o777 == mode
