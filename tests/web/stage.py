"""What the tests of the web page and its pictures share: a sidecar with rules as a desk has them, and a browser.

The sidecar scrapes the exporter itself, so a rule fires within a fraction of a second and no Prometheus is needed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.cast import APPROVER, CODE, Exporter, Sidecar, wait_for
from tests.cast import _config as short_config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from playwright.sync_api import Browser, Playwright

CHROMIUM = "/usr/bin/chromium"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SECOND_APPROVER, SECOND_CODE = "carol", "markets-are-calm-2206"
TOKENS = {role: f"{role}-token-5b1e0d" for role in ("viewer", "operator", "risk")}


def launch(playwright: Playwright) -> Browser:
    """Start Debian's Chromium; skips, and with CI set fails, where there is none."""
    if shutil.which(CHROMIUM) is None:
        pytest.skip("chromium is not installed")
    return playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))


def drawdown_rule(**changes: Any) -> dict[str, Any]:
    """A rule on the drawdown that the exporter shows."""
    return {
        "trigger": "portfolio_drawdown",
        "type": "threshold",
        "source": "scrape:trader",
        "query": "min(portfolio_drawdown_ratio)",
        "operator": "lt",
        "threshold": -0.15,
        "clear": -0.10,
        "action": "kill",
        "max_age": "10s",
        "annotations": {"summary": "Drawdown {{ value }} is beyond {{ threshold }}"},
        **changes,
    }


def approvers(folder: Path, *names_and_codes: tuple[str, str]) -> Path:
    """A file of approvers with their codes' hashes."""
    from sidecar.adapters.approvers import hash_code

    file = folder / "approvers.yaml"
    file.write_text(yaml.safe_dump([{"name": name, "code_hash": hash_code(code)} for name, code in names_and_codes]))
    return file


def tokens(folder: Path) -> Path:
    """A file with one token for each role, named after a person."""
    names = {"viewer": "vera", "operator": "oscar", "risk": "rita"}
    entries = [
        {"name": names[role], "roles": [role], "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for role, text in TOKENS.items()
    ]
    file = folder / "tokens.yaml"
    file.write_text(yaml.safe_dump(entries))
    return file


def make_switch(
    folder: Path,
    exporter: Exporter,
    rules: Sequence[Mapping[str, Any]],
    *,
    name: str = "trading/bot-0",
    with_tokens: bool = True,
    **sections: Mapping[str, Any],
) -> Sidecar:
    """A sidecar that is not started yet: two approvers, one approval, and unless told otherwise a tokens file."""
    for part in ("run", "control", "rules"):
        (folder / part).mkdir()
    switch = Sidecar(
        folder=folder,
        name=name,
        config=short_config(folder, name, []),
        environ=dict(os.environ),
    )
    switch.environ.pop("KILL_SWITCH_APPROVAL_CODE", None)
    switch.environ.pop("KILLSWITCH_SOCKET", None)
    switch.config["scrape"] = [
        {"name": "trader", "url": f"http://{exporter.address}/metrics", "interval": "500ms", "timeout": "500ms"}
    ]
    switch.config["recovery"]["approvers_file"] = str(
        approvers(folder, (APPROVER, CODE), (SECOND_APPROVER, SECOND_CODE))
    )
    if with_tokens:
        switch.config["operations"]["tokens_file"] = str(tokens(folder))
    switch.write_config(**sections)
    switch.write_rules(*rules)
    return switch


def ready(switch: Sidecar) -> Sidecar:
    """Start it and wait for its gate to open."""
    switch.start()
    switch.wait_status("the switch to be ready", lambda status: status["ready"])
    return switch


__all__ = [
    "APPROVER",
    "CODE",
    "SECOND_APPROVER",
    "SECOND_CODE",
    "TOKENS",
    "Exporter",
    "Sidecar",
    "drawdown_rule",
    "launch",
    "make_switch",
    "ready",
    "wait_for",
]
