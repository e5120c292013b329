"""Renders the charts with the real Helm 3 and Helm 4, and gives what came out by kind, container and volume."""

from __future__ import annotations

import functools
import json
import subprocess
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import yaml
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "helm" / "killswitch-lib"
CHART = ROOT / "helm" / "killswitch-sidecar"
PROGRAMS = ROOT / ".cache" / "kubernetes"
VALUES = tuple(sorted((CHART / "ci").glob("*-values.yaml")))
KUBERNETES = ("1.25.0", "1.29.0", "1.33.0", "1.37.0")
OPERATOR = "monitoring.coreos.com/v1"
RELEASE = "desk"

Manifest = dict[str, Any]


def program(name: str) -> str:
    """The path of helm3, helm4 or kubectl, as `.ci/helm` puts them there."""
    path = PROGRAMS / name
    if not path.exists():
        pytest.fail(f"{path} is missing: run `make setup`")
    return str(path)


def helm(*arguments: str | Path, version: int = 4) -> subprocess.CompletedProcess[str]:
    """Run Helm to its end, without the lines about symbolic links."""
    done = subprocess.run(
        [program(f"helm{version}"), *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    kept = [line for line in done.stderr.splitlines() if "found symbolic link" not in line]
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout, "\n".join(kept))


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """What `helm template` printed."""

    manifests: tuple[Manifest, ...]

    def of(self, kind: str) -> list[Manifest]:
        return [one for one in self.manifests if one["kind"] == kind]

    def one(self, kind: str) -> Manifest:
        found = self.of(kind)
        assert len(found) == 1, f"{len(found)} of kind {kind}"
        return found[0]

    @property
    def pods(self) -> Iterator[Manifest]:
        """Everything with a pod's `metadata` and `spec`."""
        for manifest in self.manifests:
            if manifest["kind"] == "Pod":
                yield manifest
            elif "template" in manifest.get("spec", {}):
                yield manifest["spec"]["template"]

    @property
    def guarded(self) -> Manifest:
        """The one pod with a sidecar."""
        found = [pod for pod in self.pods if sidecar_of(pod)]
        assert len(found) == 1, found
        return found[0]

    @property
    def config(self) -> Manifest:
        """The sidecar's configuration, as YAML reads it."""
        return dict(yaml.safe_load(self.data("-config")["config.yaml"]))

    def data(self, suffix: str) -> dict[str, str]:
        """The data of the ConfigMap whose name ends so."""
        found = [one for one in self.of("ConfigMap") if one["metadata"]["name"].endswith(suffix)]
        assert len(found) == 1, [one["metadata"]["name"] for one in self.of("ConfigMap")]
        return dict(found[0]["data"])


def containers(pod: Manifest) -> list[Manifest]:
    """All containers, sidecar and init containers too."""
    return [*(pod["spec"].get("initContainers") or ()), *pod["spec"]["containers"]]


def sidecar_of(pod: Manifest) -> Manifest | None:
    return next((one for one in containers(pod) if one["name"] == "killswitch"), None)


def mounts(container: Manifest) -> dict[str, Manifest]:
    """The container's mounts by volume."""
    return {one["name"]: one for one in container.get("volumeMounts", [])}


@functools.cache
def render(
    chart: Path = CHART,
    *,
    values: tuple[Path, ...] = (),
    sets: tuple[str, ...] = (),
    version: int = 4,
    kubernetes: str = "1.33.0",
    operator: bool = True,
) -> Rendering:
    """Render a chart; `operator` says whether the cluster knows the kinds of the Prometheus operator."""
    done = template(chart, values=values, sets=sets, version=version, kubernetes=kubernetes, operator=operator)
    assert done.returncode == 0, done.stderr
    documents = [one for one in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if one]
    return Rendering(manifests=tuple(documents))


def template(
    chart: Path = CHART,
    *,
    values: tuple[Path, ...] = (),
    sets: tuple[str, ...] = (),
    version: int = 4,
    kubernetes: str = "1.33.0",
    operator: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run `helm template`."""
    options: list[str | Path] = ["--namespace", "trading", "--kube-version", kubernetes]
    options += ["--api-versions", OPERATOR] if operator else []
    for file in values:
        options += ["--values", file]
    for one in sets:
        options += ["--set-json", one]
    return helm("template", RELEASE, chart, *options, version=version)


# Schemas of Kubernetes

FOLDER = files("kubernetes_validate") / "kubernetes-json-schema"
DEFINITIONS = "_definitions.json"


@functools.cache
def definitions(kubernetes: str) -> Registry[Any]:
    """What the schemas of a Kubernetes version refer to: megabytes, so read and indexed once."""
    text = (FOLDER / f"v{kubernetes}-local-strict" / DEFINITIONS).read_text()
    resource = Resource.from_contents(json.loads(text), default_specification=DRAFT7)
    return Registry().with_resource(DEFINITIONS, resource).crawl()


def schema_file(manifest: Manifest) -> str:
    group, _, version = manifest["apiVersion"].rpartition("/")
    name = [manifest["kind"], *([group.partition(".")[0]] if group else []), version]
    return "-".join(name).lower() + ".json"


def complaints(manifest: Manifest, kubernetes: str) -> list[str]:
    """What the strict schema of this Kubernetes version has against a manifest."""
    schema = json.loads((FOLDER / f"v{kubernetes}-local-strict" / schema_file(manifest)).read_text())
    validator = jsonschema.Draft7Validator(schema, registry=definitions(kubernetes))
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(manifest)]
