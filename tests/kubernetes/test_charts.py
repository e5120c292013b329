"""Every values file of the application chart, rendered by Helm 3 and 4 for four Kubernetes versions, and what must hold
for each of them."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from sidecar.cli.main import main as killswitch
from sidecar.settings.config import load_settings
from tests.kubernetes.charts import (
    CHART,
    KUBERNETES,
    ROOT,
    VALUES,
    Rendering,
    complaints,
    containers,
    helm,
    mounts,
    render,
    sidecar_of,
)

IDS = [file.name.removesuffix("-values.yaml") for file in VALUES]
every_values_file = pytest.mark.parametrize("file", VALUES, ids=IDS)
every_kubernetes = pytest.mark.parametrize("kubernetes", KUBERNETES)
OPERATOR_KINDS = {"PodMonitor", "ServiceMonitor", "PrometheusRule"}
ENVIRON = {"POD_NAME": "desk-0", "POD_NAMESPACE": "trading", "KILLSWITCH_SELECTOR": 'pod="desk-0"'}


def versions_for(file: Path) -> tuple[str, ...]:
    """Versions of Kubernetes that a values file is for."""
    return KUBERNETES[1:] if file.name.startswith("native") else KUBERNETES


def all_renderings(file: Path) -> list[Rendering]:
    return [render(values=(file,), kubernetes=version) for version in versions_for(file)]


# Helm


@every_values_file
@pytest.mark.parametrize("version", [3, 4])
def test_helm_lints_it_without_a_complaint(file: Path, version: int) -> None:
    done = helm("lint", "--strict", CHART, "--values", file, version=version)
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout, done.stdout


@every_values_file
def test_helm_3_and_4_render_the_same(file: Path) -> None:
    assert render(values=(file,), version=3) == render(values=(file,), version=4)


# Kubernetes


@pytest.mark.parametrize(
    ("file", "kubernetes"),
    [(file, version) for file in VALUES for version in versions_for(file)],
    ids=lambda one: one.name.removesuffix("-values.yaml") if isinstance(one, Path) else one,
)
def test_kubernetes_takes_every_manifest(file: Path, kubernetes: str) -> None:
    for manifest in render(values=(file,), kubernetes=kubernetes).manifests:
        if manifest["kind"] not in OPERATOR_KINDS:
            where = f"{manifest['kind']} {manifest['metadata']['name']}"
            assert not complaints(manifest, kubernetes), f"{where} on {kubernetes}: {complaints(manifest, kubernetes)}"


@every_kubernetes
def test_the_schemas_would_notice_a_misspelt_key(kubernetes: str) -> None:
    manifest = render(kubernetes=kubernetes).one("Deployment")
    broken = json.loads(json.dumps(manifest))
    broken["spec"]["template"]["spec"]["contaners"] = []
    assert complaints(broken, kubernetes)


# The sidecar


@every_values_file
def test_configuration_and_rules_load(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rendering = render(values=(file,))
    names = {one["metadata"]["name"].rpartition("-")[2] for one in rendering.of("ConfigMap")}
    if "config" not in names:
        return  # the existing ones, or none at all
    config = tmp_path / "config.yaml"
    config.write_text(rendering.data("-config")["config.yaml"].replace("/etc/killswitch/rules", f"{tmp_path}/rules"))
    (tmp_path / "rules").mkdir()
    for name, text in rendering.data("-rules").items():
        (tmp_path / "rules" / name).write_text(text)
    settings = load_settings(config, ENVIRON)
    assert settings.switch.name.startswith("trading/desk-")
    for name, value in ENVIRON.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        killswitch(["rules", "check", "--config", str(config)])
    said = capsys.readouterr()
    assert ended.value.code == 0, said
    assert "warning" not in said.out.lower(), said.out


# Invariants


@every_values_file
def test_only_the_sidecar_sees_its_own_folders_and_the_trading_container_reads_the_run_folder(file: Path) -> None:
    private = {f"killswitch-{name}" for name in ("control", "state", "approvers", "tokens", "webhook", "web")}
    for rendering in all_renderings(file):
        for pod in rendering.pods:
            for container in containers(pod):
                mounted = mounts(container)
                if container["name"] == "killswitch":
                    assert {"killswitch-run", "killswitch-control", "killswitch-state"} <= mounted.keys()
                    continue
                assert not private & mounted.keys(), container["name"]
                if container["name"] == "killswitch-proxy":
                    assert "killswitch-run" not in mounted
                elif sidecar_of(pod):
                    assert mounted["killswitch-run"]["readOnly"] is True


@every_values_file
def test_run_and_control_folders_are_two_volumes_in_memory(file: Path) -> None:
    for rendering in all_renderings(file):
        for pod in rendering.pods:
            volumes = {one["name"]: one for one in pod["spec"].get("volumes", [])}
            for name in ("killswitch-run", "killswitch-control"):
                assert not sidecar_of(pod) or volumes[name]["emptyDir"]["medium"] == "Memory"


@every_values_file
def test_no_pod_asks_for_more_than_the_restricted_level_gives(file: Path) -> None:
    allowed_volumes = {
        "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"
    }  # fmt: skip
    for rendering in all_renderings(file):
        for pod in rendering.pods:
            spec = pod["spec"]
            assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & spec.keys()
            for volume in spec.get("volumes", []):
                assert volume.keys() - {"name"} <= allowed_volumes, volume
            for container in containers(pod):
                context = container["securityContext"]
                assert context["allowPrivilegeEscalation"] is False
                assert context["capabilities"] == {"drop": ["ALL"]}
                assert context["runAsNonRoot"] is True
                assert context.get("runAsUser") != 0
                assert context["readOnlyRootFilesystem"] is True
                assert context["seccompProfile"] == {"type": "RuntimeDefault"}
                assert all("hostPort" not in port for port in container.get("ports", []))


@every_values_file
def test_no_latest_image_no_subpath_and_no_checksum(file: Path) -> None:
    for rendering in all_renderings(file):
        for pod in rendering.pods:
            assert not any("checksum" in key for key in pod["metadata"].get("annotations", {}))
            for container in containers(pod):
                assert re.search(r"(:[^:/]*\d|@sha256:[0-9a-f]{64})$", container["image"]), container["image"]
                assert all("subPath" not in key for one in mounts(container).values() for key in one)


@every_values_file
def test_a_guarded_pod_carries_the_names_of_the_contract(file: Path) -> None:
    wanted = {"POD_NAME", "POD_NAMESPACE", "NODE_NAME", "POD_UID", "POD_IP"}
    for rendering in all_renderings(file):
        for pod in rendering.pods:
            sidecar = sidecar_of(pod)
            assert (pod["metadata"]["labels"].get("killswitch.io/guarded") == "true") == bool(sidecar)
            if sidecar:
                fields = {one["name"] for one in sidecar["env"] if "fieldRef" in one.get("valueFrom", {})}
                assert wanted <= fields
                assert sidecar["ports"][0]["name"] == "killswitch-ops"
                assert "cpu" not in sidecar["resources"]["limits"] or file.name.startswith("guaranteed")


@pytest.mark.parametrize("name", ["default", "container", "prometheus", "claim"])
def test_a_change_of_the_rules_leaves_the_pods_as_they_are(name: str) -> None:
    file = CHART / "ci" / f"{name}-values.yaml"
    changed = 'killswitch.rules={"more.yaml": {"groups": []}}'
    before, after = (list(render(values=(file,), sets=sets).pods) for sets in ((), (changed,)))
    assert before == after


# Placement


@pytest.mark.parametrize(
    ("file", "kubernetes", "native"),
    [
        ("default", "1.25.0", False),
        ("default", "1.28.15", False),
        ("default", "1.29.0", True),
        ("default", "1.37.0", True),
        ("default", "1.29.3-gke.1282001", True),
        ("native", "1.33.0", True),
        ("container", "1.33.0", False),
    ],
)
def test_the_sidecar_is_native_from_1_29_on_unless_said_otherwise(file: str, kubernetes: str, native: bool) -> None:
    pod = render(values=(CHART / "ci" / f"{file}-values.yaml",), kubernetes=kubernetes).guarded
    init = [one["name"] for one in pod["spec"].get("initContainers", [])]
    plain = [one["name"] for one in pod["spec"]["containers"]]
    assert (init, plain) == ((["killswitch"], ["bot"]) if native else ([], ["killswitch", "bot"]))
    sidecar = sidecar_of(pod)
    assert sidecar is not None
    assert sidecar.get("restartPolicy") == ("Always" if native else None)
    assert ("--linger" in sidecar["command"]) is not native
    # kubectl logs, exec and attach mean the bot, wherever the sidecar stands.
    assert pod["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"] == "bot"


def test_a_plain_sidecar_outlives_the_bot_and_the_pod_waits_for_it() -> None:
    spec = render(sets=('killswitch.placement="container"', "killswitch.lingerSeconds=90")).guarded["spec"]
    assert spec["containers"][0]["command"] == ["killswitch", "serve", "--linger", "90s"]
    assert spec["terminationGracePeriodSeconds"] == 100


def test_a_pod_that_waits_longer_keeps_its_own_grace_period() -> None:
    spec = render(sets=('killswitch.placement="container"', "killswitch.lingerSeconds=5")).guarded["spec"]
    assert spec["terminationGracePeriodSeconds"] == 45


# Options


def values(name: str) -> tuple[Path, ...]:
    return (CHART / "ci" / f"{name}-values.yaml",)


def test_a_claim_means_one_pod_at_a_time() -> None:
    rendering = render(values=values("claim"))
    deployment = rendering.one("Deployment")
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    claim = rendering.one("PersistentVolumeClaim")
    assert claim["spec"]["storageClassName"] == "fast"
    volumes = {one["name"]: one for one in rendering.guarded["spec"]["volumes"]}
    assert volumes["killswitch-state"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert rendering.guarded["spec"]["securityContext"]["fsGroup"] == 65532


def test_requests_are_limits_in_a_guaranteed_pod() -> None:
    for container in containers(render(values=values("guaranteed")).guarded):
        resources = container["resources"]
        assert resources["limits"] == resources["requests"]
        assert resources["limits"].keys() == {"cpu", "memory"}


def test_secrets_are_mounted_for_the_sidecar_and_named_in_its_configuration() -> None:
    rendering = render(values=values("tokens"))
    assert rendering.config["operations"]["tokens_file"] == "/etc/killswitch/tokens/tokens.yaml"
    assert rendering.config["alertmanager"]["webhook"]["token_file"] == "/etc/killswitch/webhook/token"
    sidecar = sidecar_of(rendering.guarded)
    assert sidecar is not None
    assert mounts(sidecar)["killswitch-tokens"]["mountPath"] == "/etc/killswitch/tokens"
    volumes = {one["name"]: one for one in rendering.guarded["spec"]["volumes"]}
    assert volumes["killswitch-tokens"]["secret"]["secretName"] == "trading-tokens"
    approvers = render(values=values("approvers")).config["recovery"]["approvers_file"]
    assert approvers == "/etc/killswitch/approvers/approvers.yaml"


@pytest.mark.parametrize(
    ("file", "probe"),
    [
        ("default", {"port": "killswitch-ops"}),
        ("tls", {"port": "killswitch-ops", "scheme": "HTTPS"}),
        ("client-certificates", {"port": "killswitch-live"}),
    ],
)
def test_the_kubelet_can_ask_for_health_whatever_the_operations_port_wants(file: str, probe: dict[str, str]) -> None:
    rendering = render(values=values(file))
    sidecar = sidecar_of(rendering.guarded)
    assert sidecar is not None
    asked = {kind: sidecar[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert asked == {
        "startup": {"path": "/-/healthy", **probe},
        "liveness": {"path": "/-/healthy", **probe},
        "readiness": {"path": "/-/ready", **probe},
    }
    ports = {port["name"]: port["containerPort"] for port in sidecar["ports"]}
    health = rendering.config["operations"].get("health_listen")
    assert health == (f"0.0.0.0:{ports['killswitch-live']}" if file == "client-certificates" else None)


def test_a_certificate_and_its_web_configuration_share_a_folder_that_no_other_container_sees() -> None:
    rendering = render(values=values("tls"))
    assert rendering.config["operations"]["web_config"] == "/etc/killswitch/web/web.yaml"
    volumes = {one["name"]: one for one in rendering.guarded["spec"]["volumes"]}
    sources = volumes["killswitch-web"]["projected"]["sources"]
    assert [one["secret"]["name"] for one in sources] == ["killswitch-web", "killswitch-tls"]
    monitor = rendering.of("PodMonitor")[0]["spec"]["podMetricsEndpoints"][0]
    assert (monitor["scheme"], monitor["tlsConfig"]["serverName"]) == ("https", "killswitch")


def test_the_names_of_the_service_are_hosts_of_the_listener() -> None:
    rendering = render(values=values("tokens"))
    service = next(one for one in rendering.of("Service") if one["metadata"]["name"].endswith("-operations"))
    name = service["metadata"]["name"]
    hosts = rendering.config["operations"]["hosts"]
    assert {"killswitch.example.com", name, f"{name}.trading", f"{name}.trading.svc"} == set(hosts)
    assert service["spec"]["selector"] == {"killswitch.io/guarded": "true", "killswitch.io/instance": name[:-11]}


@pytest.mark.parametrize(("operator", "kinds"), [(True, {"PodMonitor", "PrometheusRule"}), (False, set())])
def test_monitors_are_on_where_the_cluster_knows_them(operator: bool, kinds: set[str]) -> None:
    rendering = render(operator=operator)
    assert {one["kind"] for one in rendering.manifests} & OPERATOR_KINDS == kinds


def test_monitors_scrape_the_port_of_the_guarded_pods() -> None:
    monitor = next(
        one for one in render(values=values("prometheus")).of("PodMonitor") if "example" not in one["metadata"]["name"]
    )
    labels = {"killswitch.io/guarded": "true", "killswitch.io/instance": monitor["metadata"]["name"]}
    assert monitor["spec"]["selector"] == {"matchLabels": labels}
    assert monitor["spec"]["podMetricsEndpoints"] == [
        {"port": "killswitch-ops", "path": "/metrics", "interval": "5s", "scrapeTimeout": "4s"}
    ]
    assert monitor["metadata"]["labels"]["release"] == "kube-prometheus-stack"


def test_the_alerts_are_those_of_the_rules_folder_and_promtool_takes_them(tmp_path: Path) -> None:
    original = yaml.safe_load((ROOT / "rules" / "prometheus" / "killswitch.rules.yaml").read_text())
    rule = render().one("PrometheusRule")
    assert rule["spec"] == original
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(rule["spec"]))
    done = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count = sum(len(group["rules"]) for group in original["groups"])
    assert f"SUCCESS: {count} rules found" in done.stdout


def test_alerts_lead_to_the_runbook_that_the_values_name() -> None:
    rule = render(values=values("prometheus")).one("PrometheusRule")
    assert rule["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    links = [
        one["annotations"]["runbook_url"]
        for group in rule["spec"]["groups"]
        for one in group["rules"]
        if "alert" in one
    ]
    assert links
    assert all(link.startswith("https://wiki.example.com/killswitch") for link in links)


def test_every_dashboard_is_in_a_configmap_that_grafanas_sidecar_finds() -> None:
    found: dict[str, str] = {}
    for one in render(values=values("dashboards")).of("ConfigMap"):
        if "grafana_dashboard" in one["metadata"]["labels"]:
            assert one["metadata"]["labels"]["grafana_dashboard"] == "1"
            assert one["metadata"]["annotations"] == {"grafana_folder": "Trading"}
            found |= one["data"]
    originals = sorted((ROOT / "grafana" / "dashboards").glob("*.json"))
    assert originals
    assert {name: json.loads(text) for name, text in found.items()} == {
        file.name: json.loads(file.read_text()) for file in originals
    }


def test_dashboards_lead_to_the_runbook_that_the_values_name() -> None:
    address = "https://wiki.example.com/killswitch"
    shown = render(sets=("dashboards.enabled=true", f'dashboards.runbook="{address}"'))
    texts = [text for one in shown.of("ConfigMap") for name, text in one["data"].items() if name.endswith(".json")]
    assert texts
    assert all(f'"query": "{address}"' in text and "docs/RUNBOOK.md" not in text for text in texts)


def test_operators_may_exec_and_nothing_else() -> None:
    role = render(values=values("operators")).one("Role")
    rights = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert rights == {("pods", "get"), ("pods", "list"), ("pods/exec", "get"), ("pods/exec", "create")}
    assert role["rules"][1]["resourceNames"] == ["trader-0", "trader-1"]


SELECTING = ("killswitch.service.enabled=true", "networkPolicy.enabled=true")


@pytest.mark.parametrize("version", [3, 4])
def test_what_selects_pods_selects_those_of_its_own_release(version: int) -> None:
    own = render(sets=SELECTING, version=version)
    other = render(sets=(*SELECTING, 'killswitch.fullnameOverride="other"'), version=version)
    for rendering, stranger in ((own, other), (other, own)):
        found = selectors(rendering)
        assert found.keys() == {"PodMonitor", "Service", "NetworkPolicy"}
        for kind, selector in found.items():
            assert selector.items() <= rendering.guarded["metadata"]["labels"].items(), kind
            assert not selector.items() <= stranger.guarded["metadata"]["labels"].items(), kind
        # It cannot be changed later.
        assert "killswitch.io/instance" not in rendering.one("Deployment")["spec"]["selector"]["matchLabels"]


@pytest.mark.parametrize("version", [3, 4])
def test_without_the_example_all_guarded_pods_of_the_namespace_are_selected(version: int) -> None:
    found = selectors(render(sets=(*SELECTING, "example.enabled=false"), version=version))
    assert found == {key: {"killswitch.io/guarded": "true"} for key in ("PodMonitor", "Service", "NetworkPolicy")}


def selectors(rendering: Rendering) -> dict[str, dict[str, str]]:
    """The labels by which each kind finds guarded pods."""
    monitors = [one["spec"]["selector"]["matchLabels"] for one in rendering.of("PodMonitor")]
    services = [one["spec"]["selector"] for one in rendering.of("Service")]
    policies = [one["spec"]["podSelector"]["matchLabels"] for one in rendering.of("NetworkPolicy")]
    found = {"PodMonitor": monitors, "Service": services, "NetworkPolicy": policies}
    return {kind: labels for kind, several in found.items() for labels in several if "killswitch.io/guarded" in labels}


def test_a_network_policy_lets_prometheus_in_and_leaves_names_reachable() -> None:
    spec = render(values=values("network-policy")).one("NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    ports = [port["port"] for rule in spec["egress"] for port in rule["ports"]]
    assert ports == [53, 53, 9090, 9093, 443]
    assert "egress" not in render(sets=("networkPolicy.enabled=true",)).one("NetworkPolicy")["spec"]


def test_istio_leaves_the_operations_port_alone() -> None:
    annotations = render(values=values("istio")).guarded["metadata"]["annotations"]
    assert annotations["traffic.sidecar.istio.io/excludeInboundPorts"] == "9781"


def test_without_a_tcp_gate_there_is_only_the_socket() -> None:
    assert render(values=values("socket-only")).config["gate"]["listen"] is False  # YAML's off


def test_a_large_uid_is_written_as_a_number() -> None:
    sidecar = sidecar_of(render(values=values("own-uid")).guarded)
    assert sidecar is not None
    assert sidecar["securityContext"]["runAsUser"] == 1000650000


def test_switched_off_nothing_of_it_is_left() -> None:
    rendering = render(values=values("disabled"))
    assert not any(sidecar_of(pod) for pod in rendering.pods)
    assert "killswitch.io/guarded" not in yaml.safe_dump(rendering.one("Deployment"))


def test_names_are_unique_and_short_enough() -> None:
    for rendering in itertools.chain.from_iterable(map(all_renderings, VALUES)):
        names = [(one["kind"], one["metadata"]["name"]) for one in rendering.manifests]
        assert len(names) == len(set(names))
        assert all(len(name) <= 63 for _, name in names)


# helm test


def test_helm_test_checks_what_is_there_and_nothing_where_nothing_is() -> None:
    def hooks(*sets: str) -> set[str]:
        found = (one for one in render(sets=sets).manifests if "helm.sh/hook" in one["metadata"].get("annotations", {}))
        return {f"{one['kind']} {one['metadata']['name'].rpartition('-')[2]}" for one in found}

    both = {"Pod config", "Pod ready", "Service ready"}
    assert hooks() == both
    assert hooks("example.enabled=false") == hooks("networkPolicy.enabled=true") == {"Pod config"}
    assert hooks("killswitch.enabled=false") == hooks("tests.enabled=false") == set()


@pytest.mark.parametrize(("answer", "code"), [(200, 0), (503, 1)])
def test_the_ready_test_ends_as_the_sidecar_answers(answer: int, code: int) -> None:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer if self.path == "/-/ready" else 404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        port = server.server_address[1]
        rendering = render(sets=(f"killswitch.operations.port={port}",))
        pod = next(one for one in rendering.of("Pod") if one["metadata"]["name"].endswith("ready"))
        script = pod["spec"]["containers"][0]["args"][0]
        # The Service's name is this machine; two tries are enough to see it fail.
        script = script.replace(pod["metadata"]["name"], "localhost").replace("range(60)", "range(2)")
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
        server.shutdown()
    assert done.returncode == code, done.stderr
    assert ("is ready" in done.stdout) is (code == 0)


# The proxy


@pytest.mark.parametrize(("kind", "file"), [("envoy", "envoy.yaml"), ("nginx", "nginx.conf")])
@pytest.mark.parametrize("placement", ["native", "container"])
def test_a_proxy_stands_beside_the_bot_with_nothing_of_the_sidecar(kind: str, file: str, placement: str) -> None:
    given = (
        f'killswitch.placement="{placement}"',
        f'killswitch.proxy.kind="{kind}"',
        'killswitch.proxy.image="registry.example/proxy:1"',
        'killswitch.proxy.configMap="venue"',
    )
    pod = render(sets=given).guarded
    found = pod["spec"].get("initContainers", []) if placement == "native" else pod["spec"]["containers"]
    assert [one["name"] for one in found][:2] == ["killswitch", "killswitch-proxy"]
    proxy = found[1]
    assert f"/etc/killswitch-proxy/{file}" in proxy["command"]
    assert {one["name"]: one["mountPath"] for one in proxy["volumeMounts"]} == {
        "killswitch-proxy-config": "/etc/killswitch-proxy",
        "killswitch-proxy-tmp": "/tmp",
    }
    assert ("restartPolicy" in proxy) is (placement == "native")
    assert ("lifecycle" in proxy) is (placement == "container")
    config = next(one for one in pod["spec"]["volumes"] if one["name"] == "killswitch-proxy-config")
    assert config["configMap"] == {"name": "venue"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["killswitch.proxy.configMap=venue"], "killswitch.proxy.image is empty"),
        (["killswitch.proxy.image=registry.example/envoy:1"], "killswitch.proxy.configMap is empty"),
        (
            [
                "killswitch.proxy.image=registry.example/envoy:1",
                "killswitch.proxy.configMap=venue",
                "killswitch.config.gate.listen=off",
            ],
            "leave killswitch.config.gate.listen as it is",
        ),
    ],
)
def test_a_proxy_that_could_not_run_is_refused(given: list[str], said: str) -> None:
    settings = [word for setting in ["killswitch.proxy.kind=envoy", *given] for word in ("--set", setting)]
    done = helm("template", "desk", CHART, *settings)
    assert done.returncode != 0
    assert said in done.stderr
