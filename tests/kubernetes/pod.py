"""Runs a rendered pod as a kubelet would, with podman: its containers share a loopback, volumes and a life cycle.

What the manifest says is done for real: order of start, probes from the node to the pod's address, restarts, SIGTERM
and grace period, security contexts, memory limits, emptyDir, ConfigMap and Secret volumes. There is one node, no
scheduler and no API: what a cluster would fill in (names, addresses, a Secret's data) comes from the test.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.cast import PATIENCE_SECONDS, wait_for
from tests.kubernetes.node import NODE_ADDRESS, POD_ADDRESS, Answer, ConfigMapVolume, Network, Node, command

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Mapping, Sequence

Manifest = dict[str, Any]

NAMESPACE = "trading"
SIDECAR = "killswitch"
PAUSE = 'python -c __import__("signal").sigwait([15])'  # podman splits it at spaces

LOOK_SECONDS = 0.05
"""How often the kubelet looks at its containers."""

FIRST_BACK_OFF_SECONDS = 1.0
"""The first restart is at once, the second waits so long, each further one twice as long; Kubernetes has 10 s."""

_UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "k": 10**3, "M": 10**6, "G": 10**9}
_pod_numbers = itertools.count(1)


def in_bytes(quantity: str | int) -> int:
    """Bytes of a Kubernetes quantity, `192Mi`."""
    number, unit = re.fullmatch(r"(\d+)([A-Za-z]*)", str(quantity)).groups()  # type: ignore[union-attr]
    return int(number) * _UNITS[unit]


def in_cpus(quantity: str | float) -> float:
    """CPUs of a Kubernetes quantity, `50m`."""
    text = str(quantity)
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


# Probes


@dataclass(kw_only=True)
class Probe:
    """One probe of a container, and how often in a row it has failed."""

    kind: str
    spec: Manifest
    due: float = 0.0
    failed: int = 0
    passed: bool = False

    @property
    def exhausted(self) -> bool:
        return self.failed >= int(self.spec.get("failureThreshold", 3))

    def look(self, container: Container) -> None:
        """Ask once, as the kubelet does: over the network, from outside the pod."""
        period = float(self.spec.get("periodSeconds", 10))
        if self._answers(container):
            self.failed, self.passed = 0, True
        else:
            self.failed += 1
        if self.kind == "readinessProbe" and not self.passed:
            period = min(period, 0.5)  # nobody should wait 10 s for a container that took half a second to listen
        self.due = time.monotonic() + period

    def _answers(self, container: Container) -> bool:
        timeout = float(self.spec.get("timeoutSeconds", 1))
        network = container.pod.node.network
        (kind,) = {"httpGet", "tcpSocket"} & self.spec.keys()
        address = f"{POD_ADDRESS}:{container.port(self.spec[kind]['port'])}"
        if kind == "tcpSocket":
            return network.connects(address, timeout=timeout)
        try:
            return 200 <= network.get(address, self.spec[kind]["path"], timeout=timeout).status < 400
        except (OSError, ValueError):
            return False


# Containers


@dataclass(kw_only=True)
class Container:
    """A container of the manifest, over all its restarts."""

    pod: Pod
    spec: Manifest
    native: bool = False
    restarts: int = -1
    id: str = ""
    pid: int = 0
    started_at: float = 0.0
    exits: list[int] = field(default_factory=list)
    probes: dict[str, Probe] = field(default_factory=dict)
    _input: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return str(self.spec["name"])

    @property
    def ready(self) -> bool:
        probe = self.probes.get("readinessProbe")
        return self.runs and self.started and (probe is None or (probe.passed and not probe.exhausted))

    @property
    def started(self) -> bool:
        probe = self.probes.get("startupProbe")
        return probe is None or probe.passed

    @property
    def runs(self) -> bool:
        # Its end is seen when the process is gone or a zombie that its monitor has not yet reaped.
        try:
            return self.pid > 0 and "\nState:\tZ" not in Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return False

    def port(self, name: str | int) -> int:
        ports = {one["name"]: int(one["containerPort"]) for one in self.spec.get("ports", ())}
        return ports[name] if isinstance(name, str) else name

    # Life

    def start(self) -> None:
        """Make a new container of the same manifest and start it."""
        node = self.pod.node
        self.restarts += 1
        if self.id:
            self._let_go()
        self.id = node.engine("create", *self._options(), self.spec["image"], *self._argv("args"))
        self.probes = {
            kind: Probe(kind=kind, spec=self.spec[kind])
            for kind in ("startupProbe", "livenessProbe", "readinessProbe")
            if kind in self.spec
        }
        node.engine("start", self.id)
        self.pid = int(self._pid_file.read_text())
        self.started_at = time.monotonic()
        if self.spec.get("stdin"):
            self._input = node.attach(self.id)

    def signal(self, number: int) -> None:
        """From outside, as the kernel's out-of-memory killer does it."""
        os.kill(self.pid, number)

    def stop(self) -> None:
        """Ask it to end, with the image's signal."""
        with contextlib.suppress(AssertionError):  # it ended by itself just now
            self.pod.node.engine("kill", "--signal", "TERM", self.id)

    def ended(self) -> int:
        """Its exit code, once it has ended; it is written down."""
        code = int(self.pod.node.engine("wait", self.id))
        self.exits.append(code)
        return code

    def _let_go(self) -> None:
        if self._input is not None:
            self._input.kill()
            self._input.communicate()
            self._input = None
        self.pod.node.engine("rm", "--force", "--time", "0", self.id)

    def tell(self, line: str) -> None:
        """Write it a line, as `kubectl attach -i` does."""
        assert self._input is not None
        assert self._input.stdin is not None
        self._input.stdin.write(f"{line}\n".encode())
        self._input.stdin.flush()

    # What it says

    @property
    def _log(self) -> Path:
        return self.pod.folder / f"{self.name}-{self.restarts}.log"

    @property
    def _pid_file(self) -> Path:
        return self.pod.folder / f"{self.name}-{self.restarts}.pid"

    def lines(self) -> list[str]:
        """What it has written since its last start, by lines."""
        return list(_whole_lines(self._log.read_text(errors="replace"))) if self._log.exists() else []

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """The JSON objects among them, oldest first; of one `event` only, where it is named."""
        found = []
        for line in self.lines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [one for one in found if isinstance(one, dict) and name in ("", one.get("event"))]

    def exec(self, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """As `kubectl exec` does it."""
        options = ["--interactive"] if stdin else []
        return self.pod.node.exec(*options, self.id, *argv, stdin=stdin)

    def memory(self, file: str) -> int:
        """A number of its memory cgroup (version 1, or its like of version 2)."""
        for line in Path(f"/proc/{self.pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                return int((Path("/sys/fs/cgroup/memory") / path.lstrip("/") / file).read_text())
        names = {
            "memory.limit_in_bytes": "memory.max",
            "memory.max_usage_in_bytes": "memory.peak",
            "memory.usage_in_bytes": "memory.current",
        }
        path = Path(f"/proc/{self.pid}/cgroup").read_text().strip().rpartition("::")[2]
        return int((Path("/sys/fs/cgroup") / path.lstrip("/") / names[file]).read_text())

    # The manifest as options of podman

    def _options(self) -> Iterator[str]:
        yield from ("--pod", self.pod.id, "--pull", "never", "--no-healthcheck")  # Kubernetes has probes instead
        yield from ("--pidfile", str(self._pid_file))
        yield from ("--log-driver", "k8s-file", "--log-opt", f"path={self._log}")
        yield from ("--volume", f"{self.pod.folder}/hosts:/etc/hosts:ro")
        if self.spec.get("stdin"):
            yield "--interactive"
        if "command" in self.spec:
            yield from ("--entrypoint", json.dumps(self._argv("command")))
        for name, value in self.environ().items():
            yield from ("--env", f"{name}={value}")
        for mount in self.spec.get("volumeMounts", ()):
            source = self.pod.volumes[mount["name"]]
            mode = "ro" if mount.get("readOnly") else "rw"
            yield from ("--volume", f"{source}:{mount['mountPath']}:{mode}")
        yield from self._security()
        yield from self._resources()

    def _argv(self, key: str) -> list[str]:
        return [self._expanded(str(word), self.environ()) for word in self.spec.get(key, ())]

    def environ(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for one in self.spec.get("env", ()):
            found[one["name"]] = self._expanded(str(one["value"]), found) if "value" in one else self._looked_up(one)
        return found

    def _looked_up(self, variable: Manifest) -> str:
        source = variable["valueFrom"]
        if "fieldRef" in source:
            return self.pod.fields[source["fieldRef"]["fieldPath"]]
        reference = source["secretKeyRef"]
        return self.pod.secrets[reference["name"]][reference["key"]]

    @staticmethod
    def _expanded(text: str, environ: Mapping[str, str]) -> str:
        return re.sub(r"\$\(([A-Za-z_]\w*)\)", lambda found: environ.get(found[1], found[0]), text)

    def _security(self) -> Iterator[str]:
        context = {**self.pod.spec.get("securityContext", {}), **self.spec.get("securityContext", {})}
        user = str(context.get("runAsUser") or self.pod.node.user_of(self.spec["image"]))
        if context.get("runAsNonRoot"):  # the kubelet refuses a name, for it cannot know who that is
            assert re.fullmatch(r"[1-9]\d*(:\d+)?", user), f"runAsNonRoot, and the image's user is {user!r}"
        yield from ("--user", user)
        if context.get("fsGroup"):
            yield from ("--group-add", str(context["fsGroup"]))
        if context.get("readOnlyRootFilesystem"):
            yield from ("--read-only", "--read-only-tmpfs=false")
        if not context.get("allowPrivilegeEscalation", True):
            yield from ("--security-opt", "no-new-privileges")
        for capability in context.get("capabilities", {}).get("drop", ()):
            yield from ("--cap-drop", capability.lower())
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield from ("--security-opt", "seccomp=unconfined")

    def _resources(self) -> Iterator[str]:
        resources = self.spec.get("resources", {})
        limits, requests = resources.get("limits", {}), resources.get("requests", {})
        if "memory" in limits:
            limit = str(in_bytes(limits["memory"]))
            yield from ("--memory", limit, "--memory-swap", limit)
        if "cpu" in limits:
            yield from ("--cpus", str(in_cpus(limits["cpu"])))
        if "cpu" in requests:
            yield from ("--cpu-shares", str(max(2, int(in_cpus(requests["cpu"]) * 1024))))


def _whole_lines(log: str) -> Iterator[str]:
    """The lines of a container's log, `TIME STREAM TAG TEXT` each: tag P is a part that goes on in the next."""
    parts: dict[str, str] = {}
    for line in log.splitlines():
        _, stream, tag, text = (line + " ").split(" ", 3)
        parts[stream] = parts.get(stream, "") + text[:-1]
        if tag == "F":
            yield parts.pop(stream)


# The pod


class Pod:
    """A pod of the node; `start` returns when all its containers have been started.

    Args:
        manifest: with `metadata` and `spec`, as a template has them.
        config_maps: data by name.
        secrets: data by name.
    """

    def __init__(
        self,
        node: Node,
        manifest: Manifest,
        *,
        config_maps: Mapping[str, Mapping[str, str]],
        secrets: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        number = next(_pod_numbers)
        self.node = node
        self.manifest = manifest
        self.spec: Manifest = manifest["spec"]
        self.name = f"desk-{number}"
        self.folder = node.folder / self.name
        self.id = ""
        self.network = Network(Path("/dev/null"))
        self.secrets = {name: dict(data) for name, data in (secrets or {}).items()}
        self._config_maps = {name: dict(data) for name, data in config_maps.items()}
        self.fields = {
            "metadata.name": self.name,
            "metadata.namespace": NAMESPACE,
            "metadata.uid": str(uuid.uuid4()),
            "spec.nodeName": "node-1",
            "status.podIP": POD_ADDRESS,
        }
        self.volumes: dict[str, Path] = {}
        self.mapped: dict[str, ConfigMapVolume] = {}
        init = [Container(pod=self, spec=one, native=True) for one in self.spec.get("initContainers", ())]
        assert all(one.spec.get("restartPolicy") == "Always" for one in init), "other init containers: not needed yet"
        self.all = [*init, *(Container(pod=self, spec=one) for one in self.spec["containers"])]
        self.restarts = True
        self._mounted: list[Path] = []
        self._back_off: dict[str, float] = {}
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._kubelet = threading.Thread(target=self._keep, name=f"kubelet of {self.name}", daemon=True)
        self._trouble: list[BaseException] = []

    def __getitem__(self, name: str) -> Container:
        return next(one for one in self.all if one.name == name)

    @property
    def sidecar(self) -> Container:
        return self[SIDECAR]

    @property
    def bot(self) -> Container:
        return self["bot"]

    @property
    def grace(self) -> float:
        """Seconds between SIGTERM and SIGKILL."""
        return float(self.spec.get("terminationGracePeriodSeconds", 30))

    @property
    def ready(self) -> bool:
        return all(one.ready for one in self.all)

    # Life

    def start(self) -> Pod:
        self.folder.mkdir()
        hosts = f"127.0.0.1 localhost\n{POD_ADDRESS} {self.name}\n{NODE_ADDRESS} prometheus\n"
        (self.folder / "hosts").write_text(hosts)  # the kubelet's; the last name stands for the cluster's DNS
        self._make_volumes()
        infra = f"{self.node.name}-{self.name}-infra"
        self.id = self.node.engine(
            *("pod", "create", "--name", f"{self.node.name}-{self.name}", "--hostname", self.name, "--network", "none"),
            *("--infra-name", infra, "--infra-image", self.all[0].spec["image"], "--infra-command", PAUSE),
        ).splitlines()[-1]  # fmt: skip
        self.node.engine("pod", "start", self.id)
        pid = int(self.node.engine("inspect", "--format", "{{.State.Pid}}", infra))
        self.network = Network(Path(f"/proc/{pid}/ns/net"))
        self.node.plug_in(pid)
        self._kubelet.start()
        for one in self.all:
            with self._lock:
                one.start()
            if one.native:  # the next ones wait until it says that it has started
                self.wait_for(lambda one=one: one.started, f"{one.name} to start")  # type: ignore[misc]
        return self

    def wait_for(self, look: Callable[[], Any], what: str, *, patience: float = 2 * PATIENCE_SECONDS) -> Any:
        """Wait for something; a failure shows what the containers wrote."""
        try:
            return wait_for(look, what, patience=patience)
        except AssertionError as error:
            logs = "\n".join(f"--- {one.name}, {one.exits}\n" + "\n".join(one.lines()[-30:]) for one in self.all)
            raise AssertionError(f"{error}\n{self._trouble}\n{logs}") from None

    def delete(self, *, force: bool = False) -> dict[str, tuple[int, float]]:
        """End it as the kubelet does; returns exit code and seconds from the start of the deletion, by container.

        All plain containers get SIGTERM at once. Native sidecars get it when those have ended, the last one first. What
        is left at the end of the grace period is killed; `force` does that at once, as with a node that is lost.
        """
        self.restarts = False
        begun = time.monotonic()
        deadline = begun + (0 if force else self.grace)
        ends: dict[str, tuple[int, float]] = {}
        plain = [one for one in self.all if not one.native]
        for phase in (plain, *([one] for one in reversed(self.all) if one.native)):
            with self._lock:  # what the kubelet was about to restart is restarted first
                for one in phase:
                    if not force:
                        one.stop()
            ends |= self._wait_ended(phase, begun, deadline)
        self.close()
        return ends

    def _wait_ended(self, phase: Sequence[Container], begun: float, deadline: float) -> dict[str, tuple[int, float]]:
        ends: dict[str, float] = {}
        while len(ends) < len(phase):
            for one in phase:
                if one.name not in ends and not one.runs:
                    ends[one.name] = time.monotonic() - begun
                elif one.name not in ends and time.monotonic() > deadline:
                    with contextlib.suppress(ProcessLookupError):
                        one.signal(signal.SIGKILL)
            time.sleep(LOOK_SECONDS)
        return {one.name: (one.ended(), ends[one.name]) for one in phase}

    def close(self) -> None:
        """Remove all that is left of it, but for claims."""
        self.restarts = False
        self._over.set()
        if self._kubelet.is_alive():
            self._kubelet.join(30)
        for one in self.all:
            if one.id:
                one._let_go()
                one.id, one.pid = "", 0
        if self.id:
            self.node.engine("pod", "rm", "--force", "--time", "0", self.id)
            self.id = ""
        while self._mounted:
            command("umount", "--lazy", self._mounted.pop())

    # The kubelet

    def _keep(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            try:
                with self._lock:
                    for one in self.all:
                        self._look_after(one)
            except BaseException as error:  # seen by the test, not lost in a thread
                self._trouble.append(error)
                raise

    def _look_after(self, one: Container) -> None:
        if not one.id or not self.restarts:
            return
        if not one.runs:
            if len(one.exits) <= one.restarts:
                one.ended()
                wait = 0.0 if one.restarts == 0 else FIRST_BACK_OFF_SECONDS * 2 ** (one.restarts - 1)
                self._back_off[one.name] = time.monotonic() + wait
            if time.monotonic() >= self._back_off[one.name]:
                one.start()
            return
        for kind, probe in one.probes.items():
            if time.monotonic() >= probe.due and (kind == "startupProbe") != one.started:
                probe.look(one)
            if probe.exhausted and kind != "readinessProbe":
                self._restart(one, probe)
                return

    def _restart(self, one: Container, probe: Probe) -> None:
        one.stop()
        grace = float(
            probe.spec.get("terminationGracePeriodSeconds", self.spec.get("terminationGracePeriodSeconds", 30))
        )
        deadline = time.monotonic() + grace
        while one.runs and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        if one.runs:
            one.signal(signal.SIGKILL)

    # Volumes

    def _make_volumes(self) -> None:
        for volume in self.spec.get("volumes", ()):
            (kind,) = volume.keys() - {"name"}
            makers = {
                "emptyDir": self._empty_dir,
                "configMap": self._config_map,
                "secret": self._secret,
                "persistentVolumeClaim": self._claim,
            }
            self.volumes[volume["name"]] = makers[kind](self.folder / "volumes" / volume["name"], volume[kind])

    def _empty_dir(self, folder: Path, source: Manifest) -> Path:
        folder.mkdir(parents=True)
        if source.get("medium") == "Memory":
            size = f"size={in_bytes(source['sizeLimit'])}," if "sizeLimit" in source else ""
            command("mount", "-t", "tmpfs", "-o", f"{size}mode=0777", "tmpfs", folder)
            self._mounted.append(folder)
        return self._given_to_the_group(folder)

    def _config_map(self, folder: Path, source: Manifest) -> Path:
        self.mapped[source["name"]] = ConfigMapVolume(folder, self._config_maps[source["name"]])
        return folder

    def _secret(self, folder: Path, source: Manifest) -> Path:
        data = self.secrets[source["secretName"]]
        items = source.get("items") or [{"key": key, "path": key} for key in data]
        self.mapped[source["secretName"]] = ConfigMapVolume(folder, {one["path"]: data[one["key"]] for one in items})
        return folder

    def _claim(self, _folder: Path, source: Manifest) -> Path:
        # A fresh disk belongs to root: without fsGroup nobody else could write to it.
        return self._given_to_the_group(self.node.claim(source["claimName"]), mode=0o755)

    def _given_to_the_group(self, folder: Path, mode: int = 0o777) -> Path:
        group = self.spec.get("securityContext", {}).get("fsGroup")
        os.chown(folder, -1, group or 0)
        folder.chmod(mode | (0o2070 if group else 0))
        return folder

    # What the tests ask

    def gate(self, intent: str = "new") -> Answer:
        """Ask the gate on the pod's loopback."""
        return self.network.get("127.0.0.1:9780", "/gate", headers={"X-Order-Intent": intent})

    def metrics(self, container: str = SIDECAR) -> dict[str, float]:
        """Every sample of a container's metrics by its text."""
        port = 9781 if container == SIDECAR else self[container].port("metrics")
        lines = self.node.network.get(f"{POD_ADDRESS}:{port}", "/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def status(self) -> dict[str, Any]:
        return dict(self.node.network.get(f"{POD_ADDRESS}:9781", "/api/v1/status").document)

    def wait_status(self, what: str, holds: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Wait until the sidecar answers and its status satisfies a condition."""

        def look() -> dict[str, Any] | None:
            try:
                status = self.status()
            except OSError:
                return None
            return status if holds(status) else None

        return dict(self.wait_for(look, what))

    def wait_trading(self) -> None:
        """Wait until the pod is ready and the bot's orders go out."""
        self.wait_for(lambda: self.ready, "the pod to be ready")
        self.wait_status("the gate to open", lambda status: status["ready"])
        self.wait_for(lambda: self.metrics("bot")["orders_sent_total"] > 0, "an order to go out")
