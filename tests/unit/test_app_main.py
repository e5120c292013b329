import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

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
