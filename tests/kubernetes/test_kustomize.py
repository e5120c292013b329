"""The Kustomize components, through the real kubectl: the example of the documentation, one source with the chart."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
import yaml

from sidecar.settings.config import load_settings
from sidecar.version import __version__
from tests.kubernetes.charts import ROOT, Manifest, Rendering, complaints, mounts, program, render, sidecar_of

if TYPE_CHECKING:
    from pathlib import Path

COMPONENTS = ROOT / "helm" / "kustomize"
EXAMPLE = ROOT / "docs" / "examples" / "kustomize"
NAMES = (
    'killswitch.existingConfigMap="killswitch-config"',
    'killswitch.existingRulesConfigMap="killswitch-rules"',
    'killswitch.approvers.secretName="killswitch-approvers"',
)


def kustomize(folder: Path) -> Rendering:
    done = subprocess.run(
        [program("kubectl"), "kustomize", folder], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return Rendering(manifests=tuple(yaml.safe_load_all(done.stdout)))


def test_the_component_puts_in_what_the_chart_puts_in() -> None:
    patch = yaml.safe_load((COMPONENTS / "guard" / "patch.yaml").read_text())["spec"]["template"]
    pod = render(sets=NAMES).guarded
    assert patch["spec"]["initContainers"] == [sidecar_of(pod)]
    assert patch["spec"]["volumes"] == pod["spec"]["volumes"]
    assert patch["metadata"]["labels"] == {"killswitch.io/guarded": "true"}
    monitor = render(sets=("example.enabled=false",)).one("PodMonitor")
    assert monitor["spec"]["selector"]["matchLabels"] == patch["metadata"]["labels"], "the chart without its example"


def test_its_rules_are_the_default_ones() -> None:
    ours, original = COMPONENTS / "default-rules" / "default.yaml", ROOT / "rules" / "default.yaml"
    assert ours.read_bytes() == original.read_bytes(), f"copy {original} to {ours}: Kustomize follows no link out of it"


def test_the_example_of_the_documentation_is_guarded(tmp_path: Path) -> None:
    rendering = kustomize(EXAMPLE)
    pod = rendering.guarded
    sidecar = sidecar_of(pod)
    assert sidecar is not None
    assert sidecar["image"] == f"registry.example.com/desk/killswitch-sidecar:{__version__}"
    assert sidecar["restartPolicy"] == "Always"
    assert mounts(pod["spec"]["containers"][0])["killswitch-run"]["readOnly"] is True
    assert "killswitch-control" not in mounts(pod["spec"]["containers"][0])
    names = {one["metadata"]["name"] for one in rendering.of("ConfigMap")}
    volumes = {one["name"]: one for one in pod["spec"]["volumes"]}
    assert names == {volumes[f"killswitch-{kind}"]["configMap"]["name"] for kind in ("config", "rules")}
    assert "cache" in volumes
    for version in ("1.29.0", "1.33.0", "1.37.0"):
        assert [line for one in rendering.manifests for line in complaints(one, version)] == []
    config = tmp_path / "config.yaml"
    config.write_text(rendering.data("-config")["config.yaml"])
    assert load_settings(config, {"POD_NAME": "trader-5f", "POD_NAMESPACE": "trading"}).switch.name == "trading/trader"


@pytest.mark.parametrize(("kind", "label", "guarded"), [
    ("Deployment", "true", True),
    ("StatefulSet", "true", True),
    ("Deployment", "false", False),
    ("DaemonSet", "true", False),
])  # fmt: skip
def test_the_label_decides(kind: str, label: str, guarded: bool, tmp_path: Path) -> None:
    overlay = ROOT / "docs" / "examples" / "kustomize"
    workload: Manifest = yaml.safe_load((overlay / "deployment.yaml").read_text())
    workload["kind"] = kind
    workload["metadata"]["labels"]["killswitch.io/guarded"] = label
    (tmp_path / "workload.yaml").write_text(yaml.safe_dump(workload))
    (tmp_path / "guard").mkdir()
    for file in (COMPONENTS / "guard").iterdir():
        (tmp_path / "guard" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "kustomization.yaml").write_text("{resources: [workload.yaml], components: [guard]}\n")
    rendering = kustomize(tmp_path)
    assert rendering.one(kind)["metadata"]["name"] == "trader"
    assert bool(sidecar_of(rendering.one(kind)["spec"]["template"])) is guarded
