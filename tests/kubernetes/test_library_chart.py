"""The library chart in charts of a reader: the one of docs/examples word for word, and others that it must refuse."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.settings.config import load_settings
from tests.kubernetes.charts import (
    LIBRARY,
    ROOT,
    Manifest,
    Rendering,
    containers,
    helm,
    mounts,
    render,
    sidecar_of,
    template,
)

EXAMPLE = ROOT / "docs" / "examples" / "chart"
ENVIRON = {"POD_NAME": "desk-0", "POD_NAMESPACE": "trading"}


# The example of the documentation


@pytest.fixture(scope="module", params=[3, 4], ids=["helm3", "helm4"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The example after the change, copied out of the clone, its dependency built by Helm as the documentation says."""
    chart = tmp_path_factory.mktemp("reader") / "trader"
    shutil.copytree(EXAMPLE / "after", chart)
    declared = chart / "Chart.yaml"
    relative = "file://../../../../helm/killswitch-lib"
    assert relative in declared.read_text()
    assert (EXAMPLE / "after" / relative.removeprefix("file://")).resolve() == LIBRARY
    declared.write_text(declared.read_text().replace(relative, f"file://{LIBRARY}"))
    done = helm("dependency", "build", chart, version=request.param)
    assert done.returncode == 0, done.stderr
    return chart, request.param


def test_the_example_gets_a_guarded_pod(built: tuple[Path, int]) -> None:
    chart, version = built
    rendering = render(chart, version=version)
    pod = rendering.guarded
    assert [one["name"] for one in pod["spec"]["initContainers"]] == ["killswitch", "fetch-instruments"]
    assert pod["spec"]["initContainers"][0]["restartPolicy"] == "Always"
    trader = pod["spec"]["containers"][0]
    assert mounts(trader)["killswitch-run"] == {
        "name": "killswitch-run",
        "mountPath": "/run/killswitch",
        "readOnly": True,
    }
    assert {"config", "cache"} <= mounts(trader).keys()
    assert pod["metadata"]["annotations"].keys() == {"checksum/config", "kubectl.kubernetes.io/default-container"}
    assert {one["kind"] for one in rendering.manifests} == {"ConfigMap", "Deployment", "PodMonitor"}


def test_the_example_has_a_configuration_that_loads(built: tuple[Path, int], tmp_path: Path) -> None:
    chart, version = built
    config = tmp_path / "config.yaml"
    config.write_text(render(chart, version=version).data("-config")["config.yaml"])
    settings = load_settings(config, ENVIRON)
    assert settings.switch.name == "trading/desk-trader"
    assert settings.recovery.approvers_file == "/etc/killswitch/approvers/approvers.yaml"
    assert "portfolio_drawdown" in render(chart, version=version).data("-rules")["default.yaml"]


def test_switched_off_the_example_is_what_it_was_before(built: tuple[Path, int]) -> None:
    chart, version = built
    off = render(chart, version=version, sets=("killswitch.enabled=false",))
    assert off == render(EXAMPLE / "before", version=version)


def test_the_change_to_the_example_is_as_small_as_the_documentation_says() -> None:
    before, after = ((EXAMPLE / side / "templates/deployment.yaml").read_text() for side in ("before", "after"))
    assert before.strip() in after
    added = after.replace(before.strip(), "").split("\n")
    assert len([line for line in added if line.strip()]) == 3
    assert sum(1 for one in (EXAMPLE / "after/templates").iterdir()) == 4


@pytest.mark.parametrize("version", [3, 4], ids=["helm3", "helm4"])
def test_the_steps_of_the_documentation_guard_a_chart_of_helm_create(version: int, tmp_path: Path) -> None:
    steps = _yaml_blocks(ROOT / "docs" / "KUBERNETES.md")
    dependency, around, beside, chosen = steps[:4]
    assert helm("create", tmp_path / "trader", version=version).returncode == 0
    chart = tmp_path / "trader"
    with (chart / "Chart.yaml").open("a") as declared:
        declared.write(dependency.replace("file://../killswitch-sidecar/helm/killswitch-lib", f"file://{LIBRARY}"))
    workload = chart / "templates" / "deployment.yaml"
    workload.write_text(around.replace("# … the Deployment that was there …\n", workload.read_text()))
    (chart / "templates" / "killswitch.yaml").write_text(beside)
    with (chart / "values.yaml").open("a") as values:
        values.write(chosen)
    assert helm("dependency", "build", chart, version=version).returncode == 0
    rendering = render(chart, version=version)
    assert mounts(rendering.guarded["spec"]["containers"][0])["killswitch-run"]["readOnly"] is True
    config = tmp_path / "config.yaml"
    config.write_text(rendering.data("-config")["config.yaml"])
    assert load_settings(config, ENVIRON).switch.name == "trading/desk-0"
    assert helm("lint", "--strict", chart, version=version).returncode == 0


def _yaml_blocks(document: Path) -> list[str]:
    parts = document.read_text().split("```yaml\n")[1:]
    return [part.partition("```")[0] for part in parts]


# Other charts


Reader = Callable[..., Path]


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    """Makes a chart that depends on the library; its workload is given as a change of an ordinary Deployment."""

    def make(change: Callable[[Manifest], object] = lambda _: None, *, alias: str = "killswitch") -> Path:
        chart = tmp_path / "reader"
        (chart / "templates").mkdir(parents=True)
        (chart / "charts").mkdir()
        (chart / "charts" / "killswitch-lib").symlink_to(LIBRARY)
        (chart / "Chart.yaml").write_text(
            "{apiVersion: v2, name: reader, version: 0.1.0, dependencies: "
            f"[{{name: killswitch-lib, version: 0.1.0{f', alias: {alias}' if alias else ''}}}]}}\n"
        )
        workload = deployment()
        change(workload)
        (chart / "templates" / "workload.yaml").write_text(
            '{{- define "reader.workload" }}\n'
            + yaml.safe_dump(workload)
            + '{{ end -}}\n{{- include "killswitch.guard" (list . "reader.workload") }}\n'
        )
        (chart / "templates" / "killswitch.yaml").write_text('{{- include "killswitch.manifests" . }}\n')
        return chart

    return make


def deployment() -> Manifest:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "trader"},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": {"app": "trader"}},
            "template": {
                "metadata": {"labels": {"app": "trader"}},
                "spec": {"containers": [{"name": "trader", "image": "trader:1.0"}]},
            },
        },
    }


def pod_of(workload: Manifest) -> Manifest:
    return dict(workload["spec"]["template"]["spec"])


def on_pod(**changes: Any) -> Callable[[Manifest], object]:
    return lambda workload: workload["spec"]["template"]["spec"].update(changes)


def on_spec(**changes: Any) -> Callable[[Manifest], object]:
    return lambda workload: workload["spec"].update(changes)


def stateful(workload: Manifest) -> None:
    workload["kind"] = "StatefulSet"
    workload["spec"] |= {"serviceName": "trader", "replicas": 3}


FIXED = 'killswitch.config.switch.name="${POD_NAMESPACE}/maker"'
CLAIM = 'killswitch.state.volume="persistentVolumeClaim"'


@pytest.mark.parametrize(
    ("change", "sets", "said"),
    [
        (on_spec(replicas=2), (FIXED,), "replicas are 2: two switches would take each other for themselves"),
        (lambda workload: workload["spec"].pop("replicas"), (FIXED,), "not written, so an autoscaler may choose them"),
        (on_spec(replicas=2), (CLAIM, FIXED), "replicas are 2"),
        (stateful, (CLAIM,), "only one sidecar may hold a state folder"),
        (on_spec(replicas=1), (CLAIM,), "its pods change their names"),
        (on_spec(), ('killswitch.state.volume="volumeClaimTemplate"',), "is for a StatefulSet"),
        (on_pod(hostNetwork=True), (), "Set killswitch.config.gate.listen: off"),
        (on_pod(shareProcessNamespace=True), (), "whoever reaches the control socket owns the switch"),
        (on_pod(hostPID=True), (), "whoever reaches the control socket owns the switch"),
        (
            on_pod(containers=[{"name": "killswitch", "image": "trader:1.0"}]),
            (),
            "has a container named killswitch already",
        ),
        (
            on_pod(
                containers=[
                    {
                        "name": "trader",
                        "image": "trader:1.0",
                        "volumeMounts": [{"name": "killswitch-control", "mountPath": "/x"}],
                    }
                ]
            ),
            (),
            'mounts the volume "killswitch-control"',
        ),
        (on_spec(), ('killswitch.trading.containers=["tarder"]',), 'names "tarder", and its containers are trader'),
        (on_spec(), ("killswitch.defaultRules=false",), "there is no rule, so the gate would deny every order"),
        (on_spec(), ("killswitch.guaranteed=true",), "needs killswitch.resources.limits.cpu"),
        (lambda workload: workload.update(kind="CronJob"), (), "renders a CronJob"),
        (on_spec(), ('killswitch.rules={"default.yaml": {"groups": []}}',), "set killswitch.defaultRules: false"),
    ],
)
@pytest.mark.parametrize("version", [3, 4])
def test_what_would_not_be_guarded_is_refused(
    reader: Reader, change: Callable[[Manifest], object], sets: tuple[str, ...], said: str, version: int
) -> None:
    done = template(reader(change), sets=sets, version=version)
    assert done.returncode != 0
    assert said in " ".join(done.stderr.split())


@pytest.mark.parametrize("version", [3, 4])
def test_two_workloads_of_a_chart_do_not_share_a_switch_name(reader: Reader, version: int) -> None:
    chart = reader()
    first = (chart / "templates" / "workload.yaml").read_text()
    second = first.replace("reader.workload", "reader.other").replace("name: trader\nspec", "name: other\nspec")
    (chart / "templates" / "zz-other.yaml").write_text(second)
    done = template(chart, sets=(FIXED,), version=version)
    assert done.returncode != 0
    assert "of this chart has the same switch name already" in done.stderr
    assert len(render(chart, version=version).of("Deployment")) == 2


def test_a_dependency_without_its_alias_is_refused(reader: Reader) -> None:
    done = template(reader(alias=""))
    assert done.returncode != 0
    assert "give that dependency `alias: killswitch`" in done.stderr


def test_a_template_with_two_documents_is_refused(reader: Reader) -> None:
    chart = reader()
    file = chart / "templates" / "workload.yaml"
    file.write_text(file.read_text().replace("{{ end -}}", "---\nkind: Secret\n{{ end -}}"))
    assert "more than one document" in template(chart).stderr


def test_hostnetwork_is_taken_where_the_gate_is_on_its_socket_alone(reader: Reader) -> None:
    rendering = render(reader(on_pod(hostNetwork=True)), sets=('killswitch.config.gate.listen="off"',))
    assert sidecar_of(rendering.guarded)


def test_shared_processes_are_taken_where_somebody_says_so(reader: Reader) -> None:
    sets = ("killswitch.trading.allowSharedProcesses=true", "killswitch.runAsUser=4711")
    sidecar = sidecar_of(render(reader(on_pod(shareProcessNamespace=True)), sets=sets).guarded)
    assert sidecar is not None
    assert sidecar["securityContext"]["runAsUser"] == 4711


def test_a_fixed_name_and_no_pods_at_all_is_no_reason_to_refuse(reader: Reader) -> None:
    assert render(reader(on_spec(replicas=0)), sets=(FIXED,)).guarded


def test_a_claim_makes_a_rolling_update_a_recreation(reader: Reader) -> None:
    rolling = on_spec(strategy={"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}})
    rendering = render(reader(rolling), sets=(FIXED, CLAIM))
    assert rendering.one("Deployment")["spec"]["strategy"] == {"type": "Recreate"}


def test_each_pod_of_a_statefulset_gets_a_volume_of_its_own(reader: Reader) -> None:
    rendering = render(reader(stateful), sets=('killswitch.state.volume="volumeClaimTemplate"',))
    workload = rendering.one("StatefulSet")
    assert [one["metadata"]["name"] for one in workload["spec"]["volumeClaimTemplates"]] == ["killswitch-state"]
    assert "killswitch-state" not in [one["name"] for one in rendering.guarded["spec"]["volumes"]]
    assert rendering.config["switch"]["name"] == "${POD_NAMESPACE}/${POD_NAME}"
    assert not rendering.of("PersistentVolumeClaim")


def test_two_guarded_charts_of_a_namespace_are_not_scraped_by_each_other(reader: Reader) -> None:
    chart = reader()
    desk, other = render(chart), render(chart, sets=('killswitch.fullnameOverride="other"',))
    for own, stranger in ((desk, other), (other, desk)):
        wanted = own.one("PodMonitor")["spec"]["selector"]["matchLabels"].items()
        assert wanted <= own.guarded["metadata"]["labels"].items()
        assert not wanted <= stranger.guarded["metadata"]["labels"].items()
        assert own.one("Deployment")["spec"]["selector"] == {"matchLabels": {"app": "trader"}}


def test_only_the_named_containers_see_the_run_folder(reader: Reader) -> None:
    both = [{"name": name, "image": "trader:1.0"} for name in ("trader", "shipper")]
    rendering = render(reader(on_pod(containers=both)), sets=('killswitch.trading.containers=["trader"]',))
    trader, shipper = rendering.guarded["spec"]["containers"]
    assert "killswitch-run" in mounts(trader)
    assert not mounts(shipper)


def test_what_the_chart_says_itself_stays(reader: Reader) -> None:
    def change(workload: Manifest) -> None:
        on_pod(securityContext={"runAsUser": 1000650000, "fsGroup": 7})(workload)
        workload["spec"]["template"]["metadata"]["annotations"] = {
            "kubectl.kubernetes.io/default-container": "other",
            "traffic.sidecar.istio.io/excludeInboundPorts": "8000",
        }

    pod = render(reader(change), sets=(FIXED, CLAIM, "killswitch.istio.excludePorts=true")).guarded
    assert pod["spec"]["securityContext"] == {"runAsUser": 1000650000, "fsGroup": 7}
    assert pod["metadata"]["annotations"] == {
        "kubectl.kubernetes.io/default-container": "other",
        "traffic.sidecar.istio.io/excludeInboundPorts": "8000,9781",
    }


PIECES = """
    apiVersion: apps/v1
    kind: StatefulSet
    metadata: {name: trader}
    spec:
      serviceName: trader
      replicas: 2
      selector: {matchLabels: {app: trader}}
      template:
        metadata:
          labels:
            app: trader
            {{- include "killswitch.podLabels" . | nindent 8 }}
          annotations:
            {{- include "killswitch.podAnnotations" . | nindent 8 }}
        spec:
          initContainers:
            {{- include "killswitch.initContainer" . | nindent 8 }}
          containers:
            {{- include "killswitch.container" . | nindent 8 }}
            - name: trader
              image: trader:1.0
              volumeMounts:
                {{- include "killswitch.volumeMount" . | nindent 12 }}
          volumes:
            {{- include "killswitch.volumes" . | nindent 8 }}
      volumeClaimTemplates:
        {{- include "killswitch.volumeClaimTemplate" . | nindent 4 }}
"""


@pytest.mark.parametrize("kubernetes", ["1.25.0", "1.33.0"])
def test_the_pieces_make_the_same_pod_as_the_whole(reader: Reader, kubernetes: str, tmp_path: Path) -> None:
    sets = ('killswitch.state.volume="volumeClaimTemplate"', "killswitch.istio.excludePorts=true")
    chart = reader(lambda workload: (stateful(workload), on_spec(replicas=2)(workload)))
    whole = render(chart, sets=sets, kubernetes=kubernetes)
    pieces = tmp_path / "pieces"
    shutil.copytree(chart, pieces, symlinks=True)
    (pieces / "templates" / "workload.yaml").write_text(textwrap.dedent(PIECES))
    assert _essence(render(pieces, sets=sets, kubernetes=kubernetes)) == _essence(whole)


def _essence(rendering: Rendering) -> Manifest:
    """The parts of a guarded StatefulSet that the pieces are for."""
    pod = rendering.guarded
    return {
        "labels": pod["metadata"]["labels"],
        "istio": pod["metadata"]["annotations"]["traffic.sidecar.istio.io/excludeInboundPorts"],
        "containers": containers(pod),
        "volumes": pod["spec"]["volumes"],
        "claims": rendering.one("StatefulSet")["spec"]["volumeClaimTemplates"],
    }
