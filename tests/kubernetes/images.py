"""Builds the image for real, with podman, on a stand-in for the official Python image made from Debian packages.

No registry is asked for images. The stand-in holds Python and its libraries and no shell, so what needs one fails here.
Images are kept in `.cache/podman` and built anew when what they are made of changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tarfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sidecar.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "podman"
BASE = "docker.io/library/python:3.13-slim-bookworm"
"""The name that the Dockerfile's FROM has; what stands under it here is the stand-in."""

_CONTEXT = (
    ".ci/requirements.txt",
    ".ci/requirements-build.txt",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "Dockerfile",
)
_PACKAGES = "base-files,libc6,python3,python3-venv,libssl3,zlib1g,libexpat1,libffi8"
_CERTIFICATES = Path("/etc/ssl/certs")
_CONFIG = """\
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[containers]
default_ulimits = ["nofile=16384:16384", "nproc=32768:32768"]
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Podman:
    """podman with a store and a configuration of its own: the machine's other containers are not seen or touched."""

    folder: Path

    def run(
        self, *arguments: str | Path, seconds: float = 120.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a podman command to its end."""
        done = subprocess.run(
            self.command(*arguments),
            env=self.environ(),
            cwd=self.folder,  # conmon notes there that a container ran out of memory
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"podman {' '.join(map(str, arguments))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        return done

    def command(self, *arguments: str | Path) -> list[str]:
        """The words of a command line."""
        return ["podman", "--root", f"{self.folder}/root", "--runroot", f"{self.folder}/run", *map(str, arguments)]

    def environ(self) -> dict[str, str]:
        """The environment to run it in."""
        return {**os.environ, "CONTAINERS_CONF": f"{self.folder}/containers.conf"}

    def has(self, image: str) -> bool:
        """Whether there is such an image."""
        return self.run("image", "exists", image, check=False).returncode == 0

    @contextmanager
    def container(self, *arguments: str | Path) -> Iterator[str]:
        """`podman run --detach …`: yields the container's id and removes it at the end."""
        identity = self.run("run", "--detach", *arguments).stdout.strip()
        try:
            yield identity
        finally:
            self.run("rm", "--force", "--time", "1", identity, check=False)


def prepare(folder: Path = CACHE) -> Podman:
    """Make podman's store and configuration."""
    for program in ("podman", "runc", "mmdebstrap"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "containers.conf").write_text(_CONFIG)
    return Podman(folder=folder)


def build(podman: Podman) -> str:
    """Build the image unless it is there already, once for all test processes; return its name."""
    with (podman.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        base, image = _base_name(), f"localhost/killswitch-sidecar:{_digest_of_context()}"
        if not podman.has(base):
            _import_base(podman, base)
        podman.run("tag", base, BASE)
        if not podman.has(image):
            _build(podman, image)
    return image


def _base_name() -> str:
    return f"localhost/killswitch-base:{hashlib.sha256((_suite() + _PACKAGES).encode()).hexdigest()[:16]}"


def _suite() -> str:
    lines = Path("/etc/os-release").read_text().splitlines()
    return next(line.partition("=")[2] for line in lines if line.startswith("VERSION_CODENAME="))


def _import_base(podman: Podman, name: str) -> None:
    unpacked, packed = podman.folder / "base", podman.folder / "base.tar"
    shutil.rmtree(unpacked, ignore_errors=True)
    # Packages are unpacked and not set up: their scripts would want a shell.
    subprocess.run(
        [
            "mmdebstrap",
            "--variant=extract",
            f"--include={_PACKAGES}",
            "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            _suite(),
            str(packed),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=600,
        check=True,
    )
    with tarfile.open(packed) as archive:
        archive.extractall(unpacked, filter="tar")
    local = unpacked / "usr" / "local" / "bin"
    local.mkdir(parents=True, exist_ok=True)
    (local / "python3").symlink_to("../../bin/python3")  # where the official image has it
    with tarfile.open(packed, "w") as archive:
        archive.add(unpacked, arcname=".")
    podman.run("import", packed, name)
    shutil.rmtree(unpacked)
    packed.unlink()


def _build(podman: Podman, image: str) -> None:
    pip = podman.folder / "pip.conf"
    pip.write_text(f"[global]\ncert = {_CERTIFICATES}/ca-certificates.crt\ntimeout = 180\n")
    podman.run(
        "build",
        "--pull=never",
        "--format=docker",  # the OCI format has no HEALTHCHECK
        "--layers=false",
        "--network=host",
        f"--volume={_CERTIFICATES}:{_CERTIFICATES}:ro",
        f"--volume={pip}:/etc/pip.conf:ro",
        f"--build-arg=VERSION={__version__}",
        f"--tag={image}",
        ROOT,
        seconds=600.0,
    )


def _digest_of_context() -> str:
    files = [ROOT / name for name in _CONTEXT]
    files += [path for folder in ("rules", "sidecar") for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    digest = hashlib.sha256(_base_name().encode())
    for path in files:
        if "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
