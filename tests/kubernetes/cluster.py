"""From the application chart to running pods: renders it with Helm, and hands the guarded pod to the node."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from tests.cast import APPROVER, CODE, ROOT
from tests.kubernetes.charts import Rendering, render
from tests.kubernetes.pod import Pod

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.kubernetes.node import Node

SECOND_APPROVER = "carol"
SECOND_CODE = "and-so-do-i-2264"

# Short times, but for a scrape: this machine may be a slow one.
_SETTINGS = {
    "recovery": {"cooldown": "1s", "steps": [{"factor": 0.5}, {"factor": 1.0, "after": "1h"}]},
    "scrape": [{"name": "bot", "url": "http://127.0.0.1:8000/metrics", "interval": "1s", "timeout": "1s"}],
}
_APPROVERS = {"secretName": "trading-approvers"}


def code_hash(code: str) -> str:
    """What `killswitch hash-code` makes of a code."""
    done = subprocess.run(
        [sys.executable, "-m", "sidecar", "hash-code"],
        input=f"{code}\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT,
    )
    return done.stdout.splitlines()[-1]


class Cluster:
    """What a test makes pods with.

    Args:
        node: where they run.
        image: the sidecar's image.
    """

    def __init__(self, node: Node, image: str) -> None:
        self.node = node
        self._image = image
        approvers = [{"name": APPROVER, "code_hash": code_hash(CODE)}]
        approvers += [{"name": SECOND_APPROVER, "code_hash": code_hash(SECOND_CODE)}]
        self._secrets = {"trading-approvers": {"approvers.yaml": json.dumps(approvers)}}
        self._pods: list[Pod] = []

    def render(self, *, config: dict[str, Any] | None = None, **killswitch: Any) -> Rendering:
        """The chart with these values under `killswitch`, and these sections of the sidecar's configuration."""
        repository, _, tag = self._image.rpartition(":")
        values = {
            "image": {"repository": repository, "tag": tag},
            "approvers": _APPROVERS,
            "config": {**_SETTINGS, **(config or {})},
            **killswitch,
        }
        return render(sets=tuple(f"killswitch.{key}={json.dumps(value)}" for key, value in values.items()))

    def run(self, rendering: Rendering, *, change: Callable[[dict[str, Any]], None] | None = None) -> Pod:
        """Start the guarded pod; `change` may alter its manifest first."""
        manifest = json.loads(json.dumps(rendering.guarded))
        if change is not None:
            change(manifest)
        config_maps = {one["metadata"]["name"]: one["data"] for one in rendering.of("ConfigMap")}
        pod = Pod(self.node, manifest, config_maps=config_maps, secrets=self._secrets)
        self._pods.append(pod)
        return pod.start()

    def close(self) -> None:
        for pod in self._pods:
            pod.close()
        self.node.close()
