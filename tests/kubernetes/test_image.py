"""The image: what is in it, what is not, and that it runs as restricted as a cluster can make it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import yaml

from sidecar.version import __version__
from tests.cast import wait_for
from tests.kubernetes.images import BASE, ROOT, Podman

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.e2e

MOST_BEYOND_THE_BASE = 120 * 2**20
FOLDER = "opt/killswitch"
RESTRICTED = ("--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", "--network=none")
ARBITRARY_USER = "1000730000:0"
"""As OpenShift gives them: a number that nobody has heard of, in group 0."""


@pytest.fixture(scope="module")
def inspected(podman: Podman, image: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(podman.run("image", "inspect", image).stdout)
    return found[0]


@pytest.fixture(scope="module")
def members(podman: Podman, image: str, tmp_path_factory: pytest.TempPathFactory) -> list[tarfile.TarInfo]:
    """Every file of the image."""
    packed = tmp_path_factory.mktemp("image") / "files.tar"
    identity = podman.run("create", image).stdout.strip()
    try:
        podman.run("export", "--output", packed, identity)
    finally:
        podman.run("rm", identity)
    with tarfile.open(packed) as archive:
        return archive.getmembers()


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Configuration, and folders to write to, as a pod has them."""
    folder = tmp_path_factory.mktemp("etc")
    rule = {"trigger": "external", "type": "alertmanager", "match": ['severity="kill"'], "action": "kill"}
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "one", "rules": [rule]}]}))
    config = {
        "switch": {"name": "test/image"},
        "prometheus": {"urls": []},
        "rules": {"files": ["/etc/killswitch/rules.yaml"]},
        "alertmanager": {"webhook": {"allow_unauthenticated": True}, "notify": {"urls": []}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    folder.chmod(0o755)
    written = ("/run/killswitch", "/run/killswitch-control", "/var/lib/killswitch")
    return [f"--volume={folder}:/etc/killswitch:ro", *(f"--tmpfs={path}:rw,mode=0777" for path in written)]


@pytest.fixture
def running(podman: Podman, image: str, volumes: list[str]) -> Iterator[str]:
    """A sidecar in its container, as an arbitrary user, ready."""
    with podman.container(*RESTRICTED, f"--user={ARBITRARY_USER}", *volumes, image) as identity:
        wait_for(
            lambda: podman.run("exec", identity, "killswitch", "check", check=False).returncode == 0,
            "the gate to allow",
            patience=60,
        )
        yield identity


def test_the_dockerfile_has_nothing_to_mend() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    # DL3059 wants steps joined in one shell line; each is a program of its own here, and the stand-in has no shell.
    command = [hadolint, "--ignore=DL3059", ROOT / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_base_is_the_one_that_the_stand_in_stands_for() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert f"ARG PYTHON_IMAGE={BASE}\n" in text
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["${PYTHON_IMAGE}", "${PYTHON_IMAGE}"]
    assert f"ARG VERSION={__version__}\n" in text


def test_it_is_small(podman: Podman, inspected: dict[str, Any], record_property: Any) -> None:
    base = int(podman.run("image", "inspect", "--format={{.Size}}", BASE).stdout)
    beyond = int(inspected["Size"]) - base
    record_property("told", f"image: {beyond / 2**20:.0f} MiB beyond its base")
    assert 0 < beyond <= MOST_BEYOND_THE_BASE


def test_it_says_what_it_is_and_how_it_is_run(inspected: dict[str, Any]) -> None:
    config = inspected["Config"]
    assert config["Entrypoint"] == ["killswitch"]
    assert config["Cmd"] == ["serve"]
    user, _, group = config["User"].partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert set(config["ExposedPorts"]) == {"9780/tcp", "9781/tcp"}
    assert config["StopSignal"] in ("SIGTERM", "15")
    assert inspected["Healthcheck"]["Test"] == ["CMD", "killswitch", "live"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.title"] == "killswitch-sidecar"


def test_no_file_raises_privileges_and_nothing_can_be_written_to(members: list[tarfile.TarInfo]) -> None:
    ours = [one for one in members if one.name.startswith(FOLDER)]
    assert ours
    assert [one.name for one in members if one.mode & 0o6000 and one.isfile()] == []
    assert [one.name for one in ours if one.mode & 0o022 and not one.issym()] == []
    assert {one.uid for one in ours} == {0}


def test_no_secret_history_test_or_installer_is_in_it(members: list[tarfile.TarInfo]) -> None:
    ours = [one.name for one in members if one.name.startswith(FOLDER)]
    strange = re.compile(
        r"(/\.git|/tests?/|id_rsa|id_ed25519|\.key$|\.env$|pip\.conf|approvers|tokens\.ya?ml|/pip/|/setuptools/|/src/)"
    )
    # Two libraries that ship their own tests are none of ours to cut.
    assert [name for name in ours if strange.search(name) and "site-packages/" not in name] == []
    assert [name for name in ours if re.search(r"site-packages/(pip|setuptools|hatchling|tests)(/|-)", name)] == []
    assert [name for name in ours if re.search(r"(id_rsa|id_ed25519|\.key|\.env)$", name)] == []
    assert [one.name for one in members if one.name.startswith("src")] == []


def test_what_is_installed_is_what_is_locked(podman: Podman, image: str) -> None:
    listing = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    run = podman.run("run", "--rm", *RESTRICTED, "--entrypoint=python", image, "-I", "-c", listing)
    installed = json.loads(run.stdout)
    assert installed.pop("killswitch-sidecar") == __version__
    lock = (ROOT / ".ci" / "requirements.txt").read_text()
    locked = dict(re.findall(r"^([a-z0-9_.-]+)==([^ ;\\]+) \\$", lock, re.MULTILINE))
    assert {name.lower().replace("_", "-"): version for name, version in installed.items()} == locked


def test_it_needs_no_shell_and_finds_none_here(podman: Podman, image: str) -> None:
    assert podman.run("run", "--rm", "--entrypoint=/bin/sh", image, "-c", "true", check=False).returncode == 127
    assert __version__ in podman.run("run", "--rm", *RESTRICTED, image, "version").stdout


def test_it_runs_as_anybody_on_a_read_only_root_and_ends_at_once_when_told(podman: Podman, running: str) -> None:
    assert podman.run("exec", running, "killswitch", "status").stdout.startswith("TRADING ALLOWED")
    killed = podman.run("exec", running, "killswitch", "trigger", "--reason=drill", "--by=alice", "--confirm")
    assert killed.stdout.startswith("BLOCKED – KILLED")
    assert podman.run("exec", running, "killswitch", "check", check=False).returncode == 3
    assert podman.run("healthcheck", "run", running, check=False).returncode == 0  # a kill is no illness
    user = "import os; print(os.getuid(), os.getgid())"
    assert podman.run("exec", running, "python", "-I", "-c", user).stdout.split() == ARBITRARY_USER.split(":")
    began = time.monotonic()
    podman.run("stop", "--time", "20", running)
    assert time.monotonic() - began < 10.0  # well before the SIGKILL that would follow
    assert podman.run("inspect", "--format={{.State.ExitCode}}", running).stdout.strip() == "0"


def test_a_stopped_process_is_found_ill(podman: Podman, running: str) -> None:
    assert podman.run("exec", running, "killswitch", "live").stdout == "alive\n"
    podman.run("kill", "--signal=STOP", running)
    ill = podman.run("exec", running, "killswitch", "live", check=False)
    podman.run("kill", "--signal=CONT", running)
    assert ill.returncode == 1


def test_start_to_ready(podman: Podman, image: str, volumes: list[str], record_property: Any) -> None:
    with podman.container(*RESTRICTED, *volumes, image) as identity:
        ready = wait_for(lambda: _said(podman, identity).get("sidecar.ready"), "the sidecar to be ready", patience=60)
        process = psutil.Process(int(podman.run("inspect", "--format={{.State.Pid}}", identity).stdout))
        took = datetime.fromisoformat(ready["time"]).timestamp() - _start_of(process.pid)
        resident = process.memory_info().rss / 2**20
    assert took > 0.0
    record_property("told", f"image: {took:.2f} s from start to ready, {resident:.1f} MiB resident then")


def _start_of(pid: int) -> float:
    """Unix seconds at which a process started, to a tick of 10 ms; psutil's may be off by a whole second."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted + ticks / os.sysconf("SC_CLK_TCK")


def _said(podman: Podman, identity: str) -> dict[str, dict[str, Any]]:
    """Log lines of a container by event, the newest of each."""
    logs = podman.run("logs", identity)
    lines = [json.loads(line) for line in (logs.stdout + logs.stderr).splitlines() if line.startswith("{")]
    return {line["event"]: line for line in lines if "event" in line}
