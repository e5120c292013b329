"""The machine that pods run on: a network of its own, a container engine, volumes, and Prometheus.

Nothing of its network can be reached from elsewhere, so addresses and ports in it are always the same. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import itertools
import json
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml

from tests.cast import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.kubernetes.images import Podman

NODE_ADDRESS = "10.77.0.1"
POD_ADDRESS = "10.77.0.2"
PROMETHEUS_URL = "http://prometheus:9090"

_CLONE_NEWNET = 0x40000000
_node_numbers = itertools.count(1)


def command(*argv: str | Path, timeout: float = 60.0) -> str:
    """Run a program to its end and return what it wrote; a failure says why."""
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{argv} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


# Network


class Network:
    """A network namespace by its file; sockets made within `entered` belong to it for good."""

    def __init__(self, file: Path) -> None:
        self.file = file

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Move the calling thread there, and back at the end."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/proc/thread-self/ns/net").open("rb") as here, self.file.open("rb") as there:
            if libc.setns(there.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
            try:
                yield
            finally:
                assert libc.setns(here.fileno(), _CLONE_NEWNET) == 0

    def get(self, address: str, path: str, *, timeout: float = 5.0, headers: Mapping[str, str] | None = None) -> Answer:
        """GET http://ADDRESS/PATH from within."""
        connection = _Connection(self, address, timeout)
        try:
            connection.request("GET", path, headers=dict(headers or {}))
            reply = connection.getresponse()
            return Answer(status=reply.status, text=reply.read().decode(), headers=dict(reply.getheaders()))
        finally:
            connection.close()

    def connects(self, address: str, *, timeout: float) -> bool:
        """Whether something listens."""
        try:
            self._connect(address, timeout).close()
        except OSError:
            return False
        return True

    def _connect(self, address: str, timeout: float) -> socket.socket:
        host, _, port = address.rpartition(":")
        with self.entered():
            made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        made.settimeout(timeout)
        try:
            made.connect((host, int(port)))
        except OSError:
            made.close()
            raise
        return made


class _Connection(http.client.HTTPConnection):
    def __init__(self, network: Network, address: str, timeout: float) -> None:
        super().__init__(address, timeout=timeout)
        self._network = network

    def connect(self) -> None:
        self.sock = self._network._connect(f"{self.host}:{self.port}", self.timeout or 5.0)


@dataclass(frozen=True, kw_only=True)
class Answer:
    status: int
    text: str
    headers: dict[str, str]

    @property
    def document(self) -> Any:
        return json.loads(self.text)

    @property
    def reason(self) -> str:
        """The gate's code."""
        return self.headers.get("X-Killswitch-Reason", "")


# Volumes


class ConfigMapVolume:
    """A folder with a ConfigMap or a Secret, written as the kubelet writes it.

    Files are links into `..data`, and an update moves that one link: a reader sees all of the old or all of the new.
    """

    def __init__(self, folder: Path, data: Mapping[str, str]) -> None:
        self.folder = folder
        self._versions = itertools.count(1)
        folder.mkdir(parents=True)
        folder.chmod(0o755)
        self.write(data)

    def write(self, data: Mapping[str, str]) -> None:
        """Replace all files."""
        fresh = self.folder / f"..2026_01_01_00_00_00.{next(self._versions)}"
        fresh.mkdir(mode=0o755)
        for name, text in data.items():
            (fresh / name).write_text(text)
            (fresh / name).chmod(0o644)
        link, swap = self.folder / "..data", self.folder / "..data_tmp"
        old = link.resolve() if link.is_symlink() else None
        swap.symlink_to(fresh.name)
        swap.replace(link)
        for name in data:
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")
        for file in self.folder.iterdir():
            if not file.name.startswith("..") and file.name not in data:
                file.unlink()
        if old is not None:
            shutil.rmtree(old)


# Node


class Node:
    """The machine that pods run on: a network, the container engine, claims that outlive pods.

    Args:
        podman: the container engine.
        folder: for everything that is written.
    """

    def __init__(self, podman: Podman, folder: Path) -> None:
        self._podman = podman
        self.folder = folder
        self.claims: dict[str, Path] = {}
        self.name = f"ks-node-{os.getpid()}-{next(_node_numbers)}"
        self._users: dict[str, str] = {}
        self._prometheus: subprocess.Popen[bytes] | None = None
        command("ip", "netns", "add", self.name)
        self.network = Network(Path("/run/netns") / self.name)
        self.ip("link", "set", "lo", "up")

    def ip(self, *arguments: str) -> None:
        """Run `ip` on the node's network."""
        command("ip", "-netns", self.name, *arguments)

    def engine(self, *arguments: str) -> str:
        """Run podman to its end, and return what it wrote."""
        return self._podman.run(*arguments).stdout.strip()

    def user_of(self, image: str) -> str:
        """The user that the image names."""
        if image not in self._users:
            self._users[image] = self.engine("image", "inspect", "--format", "{{.Config.User}}", image)
        return self._users[image]

    def exec(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run `podman exec` to its end, whatever that is."""
        return subprocess.run(
            self._podman.command("exec", *arguments),
            env=self._podman.environ(),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def attach(self, container: str) -> subprocess.Popen[bytes]:
        """A pipe to the standard input of a container."""
        return subprocess.Popen(
            self._podman.command("attach", "--sig-proxy=false", container),
            env=self._podman.environ(),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def plug_in(self, pid: int) -> None:
        """Give the network of a process an address that the node reaches. There is one pod at a time."""
        self.ip("link", "add", "pod", "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self.ip("address", "add", f"{NODE_ADDRESS}/24", "dev", "pod")
        self.ip("link", "set", "pod", "up")
        inside = ("nsenter", "--target", str(pid), "--net", "ip")
        command(*inside, "address", "add", f"{POD_ADDRESS}/24", "dev", "eth0")
        command(*inside, "link", "set", "eth0", "up")

    def start_prometheus(self) -> None:
        """Start a Prometheus that scrapes the pod, as a PodMonitor would have it do, and outlives it."""
        folder = self.folder / "prometheus"
        folder.mkdir()
        config = {
            "global": {"scrape_interval": "250ms", "scrape_timeout": "200ms"},
            "scrape_configs": [
                {"job_name": "pods", "static_configs": [{"targets": [f"{POD_ADDRESS}:9781", f"{POD_ADDRESS}:8000"]}]}
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        with (folder / "log").open("wb") as log:
            self._prometheus = subprocess.Popen(
                [
                    *("ip", "netns", "exec", self.name, "prometheus"),
                    f"--config.file={folder}/prometheus.yml",
                    f"--storage.tsdb.path={folder}/data",
                    "--web.listen-address=0.0.0.0:9090",
                    "--log.level=warn",
                ],
                stdout=log,
                stderr=log,
            )
        wait_for(self._prometheus_is_ready, "Prometheus to be ready")

    def _prometheus_is_ready(self) -> bool:
        assert self._prometheus is not None
        assert self._prometheus.poll() is None, (self.folder / "prometheus" / "log").read_text()
        with contextlib.suppress(OSError):
            return self.network.get("127.0.0.1:9090", "/-/ready").status == 200
        return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query."""
        reply = self.network.get("127.0.0.1:9090", f"/api/v1/query?query={quote(expression)}")
        return list(reply.document["data"]["result"])

    def claim(self, name: str) -> Path:
        """The folder of a claim; made when it is first wanted."""
        if name not in self.claims:
            self.claims[name] = self.folder / "claims" / name
            self.claims[name].mkdir(parents=True)
        return self.claims[name]

    def close(self) -> None:
        if self._prometheus is not None:
            self._prometheus.terminate()
            self._prometheus.wait(10)
        command("ip", "netns", "delete", self.name)
