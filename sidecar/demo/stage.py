"""The stage of the demo: a temporary folder with configuration, rules, approver and ports that nobody else uses.

Writes what a user would write. The rules are the shipped ones, word for word, unless there is no Prometheus to ask.
"""

import contextlib
import importlib.resources
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

APPROVER: Final = "rita"
SWITCH: Final = "demo/bot-1"
SCRAPE_NAME: Final = "trader"
POSITION_LIMIT: Final = 1000
COOLDOWN: Final = "5s"
STEPS: Final = ((0.5, "0s"), (0.75, "3s"), (1.0, "6s"))

_OURS: Final = ("KILLSWITCH_", "KILL_SWITCH_")
"""Variables of somebody's real sidecar, which the demo must neither use nor reach."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Where everything stands.

    Attributes:
        root: the temporary folder.
        gate, operations, prometheus: ports on 127.0.0.1.
    """

    root: Path
    gate: int
    operations: int
    prometheus: int

    @classmethod
    def build(cls, root: Path) -> "Stage":
        """Make the folders and choose the ports."""
        for name in ("run", "control", "state", "rules", "prometheus"):
            (root / name).mkdir(mode=0o700)
        gate, operations, prometheus = _free_ports(3)
        return cls(root=root, gate=gate, operations=operations, prometheus=prometheus)

    @property
    def config(self) -> Path:
        """The sidecar's configuration file."""
        return self.root / "config.yaml"

    @property
    def gate_socket(self) -> Path:
        """The gate's Unix socket, which the bot asks."""
        return self.root / "run" / "gate.sock"

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The environment of all children: ours, without what belongs to another sidecar."""
        kept = {name: value for name, value in environ.items() if not name.startswith(_OURS)}
        return {**kept, "KILLSWITCH_CONFIG": str(self.config)}

    def write(self, *, metrics_port: int, with_prometheus: bool, code_hash: str) -> None:
        """Write configuration, rules and approvers file."""
        shipped = (importlib.resources.files("sidecar") / "default_rules.yaml").read_text(encoding="utf-8")
        rules = shipped if with_prometheus else scraped(shipped)
        (self.root / "rules" / "rules.yaml").write_text(rules, encoding="utf-8")
        approvers = self.root / "approvers.yaml"
        approvers.touch(mode=0o600)
        approvers.write_text(yaml.safe_dump([{"name": APPROVER, "code_hash": code_hash}]), encoding="utf-8")
        document = self._document(metrics_port=metrics_port, with_prometheus=with_prometheus)
        self.config.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")

    def _document(self, *, metrics_port: int, with_prometheus: bool) -> dict[str, Any]:
        sources: dict[str, Any] = {"prometheus": {"urls": []}}
        if with_prometheus:
            sources["prometheus"]["urls"].append(f"http://127.0.0.1:{self.prometheus}")
        else:
            sources["scrape"] = [{"name": SCRAPE_NAME, "url": f"http://127.0.0.1:{metrics_port}/metrics"}]
        return {
            "switch": {"name": SWITCH},
            **sources,
            "rules": {"files": [str(self.root / "rules" / "*.yaml")], "interval": "1s"},
            "gate": {
                "listen": f"127.0.0.1:{self.gate}",
                "socket": str(self.gate_socket),
                "page": str(self.root / "run" / "state.page"),
                "position_limits": {"*": POSITION_LIMIT},
            },
            "operations": {"listen": f"127.0.0.1:{self.operations}"},
            "control": {"socket": str(self.root / "control" / "control.sock")},
            "alertmanager": {"notify": {"urls": []}},
            "recovery": {
                "cooldown": COOLDOWN,
                "steps": [{"factor": factor, "after": after} for factor, after in STEPS],
                "approvers_file": str(self.root / "approvers.yaml"),
            },
            "storage": {"dir": str(self.root / "state")},
        }


def scraped(rules: str) -> str:
    """The same rules, asking the bot's own metrics page instead of Prometheus."""
    document = yaml.safe_load(rules)
    for group in document["groups"]:
        for rule in group["rules"]:
            if "query" in rule:
                rule["source"] = f"scrape:{SCRAPE_NAME}"
    return yaml.safe_dump(document, sort_keys=False)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]  # held together, so that all differ
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in held]
