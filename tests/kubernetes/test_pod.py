"""The chart's pod, run by podman as a kubelet would run it: what the sidecar promises holds over the life of a pod."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.kubernetes.cluster import Cluster
from tests.kubernetes.node import PROMETHEUS_URL, Node
from tests.kubernetes.pod import Container, Pod, in_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.kubernetes.charts import Rendering
    from tests.kubernetes.images import Podman

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]  # the first one builds the image

SIGKILL, SIGSTOP = 9, 19
ALERTS_ONLY = {"example.yaml": {"groups": [{"name": "desk", "rules": [
    {"trigger": "external", "type": "alertmanager", "match": ['severity="kill"'], "action": "kill"}
]}]}}  # fmt: skip
"""Rules that are ready at once, for bots without metrics."""


@pytest.fixture(scope="module")
def make_cluster(
    podman: Podman, image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], Cluster]]:
    """Makes clusters of one node, where one pod runs at a time."""
    made: list[Cluster] = []

    def make() -> Cluster:
        made.append(Cluster(Node(podman, tmp_path_factory.mktemp("node")), image))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def cluster(make_cluster: Callable[[], Cluster]) -> Cluster:
    return make_cluster()


@pytest.fixture(scope="module")
def example(cluster: Cluster) -> Rendering:
    """The chart's example, with a liveness probe that needs less patience."""
    return cluster.render(livenessProbe={"periodSeconds": 1, "timeoutSeconds": 2, "failureThreshold": 3})


@pytest.fixture
def desk(cluster: Cluster, example: Rendering) -> Iterator[Pod]:
    """The example, trading; for one test alone."""
    pod = cluster.run(example)
    pod.wait_trading()
    yield pod
    pod.close()


@pytest.fixture(scope="module")
def open_desk(make_cluster: Callable[[], Cluster], example: Rendering) -> Pod:
    """The example, trading; for tests that leave it so."""
    pod = make_cluster().run(example)
    pod.wait_trading()
    return pod


def verdicts(pod: Pod) -> list[str]:
    """What the gate said to the bot, each change of it, by the bot's own log."""
    return [event["verdict"] for event in pod.bot.events("gate")]


def wait_verdict(pod: Pod, verdict: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        told = pod.bot.events("gate")
        return told[-1] if told and told[-1]["verdict"] == verdict else None

    return dict(pod.wait_for(look, f"the bot to hear {verdict!r}"))


def assert_no_order_goes_out(pod: Pod, sent: int, *, seconds: float = 1.0) -> None:
    """The bot goes on asking, and has sent no more than so many."""
    refused = sum(value for name, value in pod.metrics("bot").items() if name.startswith("orders_refused_total"))
    time.sleep(seconds)
    after = pod.metrics("bot")
    assert after["orders_sent_total"] == sent
    assert sum(value for name, value in after.items() if name.startswith("orders_refused_total")) > refused


# Breach, death, restart


def test_the_sidecar_is_up_before_the_bot_and_a_breach_stops_the_bot(desk: Pod) -> None:
    assert [one.name for one in desk.all] == ["killswitch", "bot"]
    listening = datetime.fromisoformat(desk.sidecar.events("sidecar.listening")[0]["time"]).timestamp()
    assert listening < desk.bot.events("ready")[0]["time"]  # never is there nobody to ask

    desk.bot.tell("drawdown -0.18")
    desk.wait_status("the breach to kill", lambda status: status["state"] == "KILLED")
    heard = wait_verdict(desk, "killed")
    assert heard["trigger"] == "portfolio_drawdown"
    assert_no_order_goes_out(desk, heard["sent"])
    assert (desk.gate().status, desk.gate().reason) == (403, "killed")
    assert (desk.gate("cancel").status, desk.gate("cancel").reason) == (200, "cancel")

    metrics = desk.metrics()
    decisions = 'killswitch_gate_decisions_total{decision="allow",reason="%s"}'
    allowed = sum(metrics[decisions % reason] for reason in ("active", "reducing"))
    assert allowed == heard["sent"]  # orders out are orders allowed
    assert metrics["killswitch_breach_to_block_seconds_count"] == 1
    assert desk.ready  # a kill takes no pod out of its Service


def test_a_killed_sidecar_leaves_the_bot_without_a_lease_and_comes_back_killed(desk: Pod) -> None:
    desk.bot.tell("drawdown -0.18")
    sent = int(wait_verdict(desk, "killed")["sent"])
    desk.wait_status("the kill to be durable", lambda status: status["state"] == "KILLED" and status["durable"])

    desk.restarts = False  # the kubelet takes its time
    desk.sidecar.signal(SIGKILL)
    wait_verdict(desk, "stale")
    # The socket is gone at once; what the page said last holds for the rest of its lease.
    desk.wait_for(lambda: read_page(desk.bot) == "stale", "the page's lease to be over")

    desk.restarts = True
    wait_verdict(desk, "killed")
    assert read_page(desk.bot) == "killed"
    assert desk.sidecar.exits == [137]
    assert desk.sidecar.restarts == 1
    assert "allowed" not in verdicts(desk)[verdicts(desk).index("killed") :]
    assert_no_order_goes_out(desk, sent)


def test_a_sidecar_that_hangs_denies_and_is_restarted_by_its_liveness_probe(open_desk: Pod) -> None:
    restarts = open_desk.sidecar.restarts
    open_desk.sidecar.signal(SIGSTOP)
    wait_verdict(open_desk, "stale")
    wait_verdict(open_desk, "allowed")
    assert open_desk.sidecar.restarts == restarts + 1
    assert open_desk.bot.restarts == 0


def read_page(container: Container) -> str:
    """What the page says to trading code in a container, `active` where it allows."""
    code = (
        "from sidecar.client import ExecutionGate, TradingBlockedError\n"
        "try:\n"
        "    ExecutionGate(page='/run/killswitch/state.page').check_can_execute()\n"
        "    print('active')\n"
        "except TradingBlockedError as blocked:\n"
        "    print(blocked.decision.code)"
    )
    done = container.exec("python", "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ConfigMaps


def test_a_swapped_config_map_is_reloaded_and_a_broken_one_changes_nothing(open_desk: Pod, example: Rendering) -> None:
    restarts = open_desk.sidecar.restarts
    (volume,) = (one for name, one in open_desk.mapped.items() if name.endswith("-rules"))
    files = example.data("-rules")
    threshold = 'killswitch_trigger_threshold{trigger="daily_loss"}'
    before = open_desk.metrics()
    assert before[threshold] == -0.20

    volume.write({"example.yaml": files["example.yaml"].replace("threshold: -0.2\n", "threshold: -0.3\n")})
    open_desk.wait_for(lambda: open_desk.metrics()[threshold] == -0.30, "the new threshold")
    after = open_desk.metrics()
    assert after["killswitch_config_last_reload_successful"] == 1
    loaded_at = "killswitch_config_last_reload_success_timestamp_seconds"
    assert after[loaded_at] > before[loaded_at]

    volume.write({"example.yaml": "groups: ["})
    open_desk.wait_for(
        lambda: open_desk.metrics()["killswitch_config_last_reload_successful"] == 0, "the reload to fail"
    )
    assert open_desk.metrics()[threshold] == -0.30
    assert open_desk.gate().status == 200
    assert (open_desk.sidecar.restarts, open_desk.bot.restarts) == (restarts, 0)
    volume.write(files)
    open_desk.wait_for(lambda: open_desk.metrics()[threshold] == -0.20, "the mended rules")


# What the containers may


LOOK_AROUND = """
import errno, json, os
def write(folder):
    try:
        open(folder + "/probe", "w").close()
    except OSError as error:
        return errno.errorcode[error.errno]
    os.unlink(folder + "/probe")
    return "ok"
status = dict(line.split(":\\t", 1) for line in open("/proc/1/status").read().splitlines() if ":\\t" in line)
print(json.dumps({
    "user": os.getuid(),
    "capabilities": [status[key].strip() for key in ("CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "no_new_privileges": status["NoNewPrivs"].strip(),
    "seccomp": status["Seccomp"].strip(),
    "run": {name: sorted(os.listdir("/run/" + name)) for name in os.listdir("/run") if name.startswith("kill")},
    "state": os.path.exists("/var/lib/killswitch"),
    "secrets": os.path.exists("/etc/killswitch"),
    "processes": [open("/proc/%s/cmdline" % one).read() for one in os.listdir("/proc") if one.isdigit()],
    "write": {folder: write(folder) for folder in (
        "", "/tmp", "/run/killswitch", "/var/lib/killswitch", "/etc/killswitch/rules"
    )},
}))
"""


def look_around(container: Container) -> dict[str, Any]:
    done = container.exec("python", "-c", LOOK_AROUND)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_bot_reads_the_run_folder_and_reaches_nothing_else_of_the_sidecar(open_desk: Pod) -> None:
    bot, sidecar = look_around(open_desk.bot), look_around(open_desk.sidecar)
    assert sidecar["run"].keys() == {"killswitch", "killswitch-control"}
    assert sidecar["run"]["killswitch-control"] == ["control.sock"]
    assert bot["run"] == {"killswitch": ["gate.sock", "state.page"]}
    assert not bot["state"]
    assert not bot["secrets"]
    assert bot["write"]["/run/killswitch"] == "EROFS"
    assert not any("serve" in one for one in bot["processes"])  # a namespace of its own


def test_both_containers_run_with_no_more_rights_than_restricted_pods_have(open_desk: Pod) -> None:
    for container in open_desk.all:
        seen = look_around(container)
        assert seen["user"] == 65532
        assert seen["capabilities"] == ["0000000000000000"] * 4
        assert seen["no_new_privileges"] == "1"
        assert seen["seccomp"] == "2"  # a filter
        assert seen["write"][""] == seen["write"]["/tmp"] == "EROFS"
    writes = look_around(open_desk.sidecar)["write"]
    assert (writes["/run/killswitch"], writes["/var/lib/killswitch"]) == ("ok", "ok")
    assert writes["/etc/killswitch/rules"] == "EROFS"


def test_the_memory_limit_holds_with_commands_run_beside_the_sidecar(open_desk: Pod) -> None:
    restarts = open_desk.sidecar.restarts
    limit = in_bytes(open_desk.sidecar.spec["resources"]["limits"]["memory"])
    assert open_desk.sidecar.memory("memory.limit_in_bytes") == limit
    for arguments in (["status"], ["audit", "--since", "24h"], ["rules", "check"]):
        done = open_desk.sidecar.exec("killswitch", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    assert open_desk.sidecar.memory("memory.max_usage_in_bytes") < 0.9 * limit
    # What asks for more than that is killed, and not the sidecar.
    assert open_desk.sidecar.exec("python", "-c", "print(len(b'x' * (1 << 29)))").returncode == 137
    assert open_desk.gate().status == 200
    assert open_desk.sidecar.restarts == restarts


# The end of a pod


FLATTENS = """
import json, signal, sys, time
from sidecar.client import ExecutionGate, TradingBlockedError
gate = ExecutionGate(socket="/run/killswitch/gate.sock")
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(time.monotonic()))
print(json.dumps({"event": "ready"}), flush=True)
answers = []
while not told or time.monotonic() < told[0] + 2:
    time.sleep(0.05)
    if told:
        try:
            gate.check_can_execute({"intent": "new", "side": "sell", "quantity": 1, "position": 5})
            answers.append("allowed")
        except TradingBlockedError as blocked:
            answers.append(blocked.decision.code)
print(json.dumps({"event": "flat", "answers": answers}), flush=True)
"""
"""A bot that needs two seconds after SIGTERM to get out of its position, order by order."""


def let_it_flatten(manifest: dict[str, Any]) -> None:
    (bot,) = (one for one in manifest["spec"]["containers"] if one["name"] == "bot")
    bot["command"], bot["args"] = ["python", "-c", FLATTENS], []


@pytest.mark.parametrize("placement", ["native", "container"])
def test_the_gate_serves_while_the_bot_flattens_after_sigterm(cluster: Cluster, placement: str) -> None:
    rendering = cluster.render(placement=placement, lingerSeconds=6, rules=ALERTS_ONLY)
    pod = cluster.run(rendering, change=let_it_flatten)
    pod.wait_status("the gate to open", lambda status: status["ready"])
    pod.wait_for(lambda: pod.bot.events("ready"), "the bot to run")
    ends = pod.delete()
    (flat,) = pod.bot.events("flat")
    assert len(flat["answers"]) > 5
    assert set(flat["answers"]) == {"allowed"}
    assert {name: code for name, (code, _) in ends.items()} == {"bot": 0, "killswitch": 0}
    assert ends["killswitch"][1] > ends["bot"][1]
    assert ends["killswitch"][1] < pod.grace


def test_a_kill_outlives_the_pod_on_its_volume_and_without_one_in_prometheus(cluster: Cluster) -> None:
    cluster.node.start_prometheus()
    asks = {"prometheus": {"urls": [PROMETHEUS_URL]}}
    with_volume = cluster.render(config=asks, state={"volume": "persistentVolumeClaim"})
    first = cluster.run(with_volume)
    first.wait_trading()
    done = first.sidecar.exec("killswitch", "trigger", "--reason", "fat finger", "--by", "alice", "--confirm")
    assert done.returncode == 0, done.stdout + done.stderr
    first.delete()

    second = cluster.run(with_volume)
    status = second.wait_status("the second pod to remember", lambda status: status["state"] == "KILLED")
    assert [cause["reason"] for cause in status["causes"]] == ["fat finger"]  # the disk knows why
    assert second.gate().reason == "killed"
    query = 'killswitch_state{switch="trading/desk-example",state="KILLED"} == 1'
    second.wait_for(lambda: cluster.node.query(query), "Prometheus to see it")
    second.delete(force=True)  # the node is lost, and the volume with it

    third = cluster.run(cluster.render(config=asks))
    status = third.wait_status("the third pod to learn of it", lambda status: status["state"] == "KILLED")
    assert [cause["code"] for cause in status["causes"]] == ["restored"]
    assert "Prometheus" in status["causes"][0]["reason"]
    wait_verdict(third, "killed")
    assert "allowed" not in verdicts(third)
    third.delete()


def test_the_rules_of_the_example_are_what_the_tests_think(example: Rendering) -> None:
    rules = yaml.safe_load(example.data("-rules")["example.yaml"])["groups"][0]["rules"]
    assert {rule["trigger"]: rule["threshold"] for rule in rules} == {"portfolio_drawdown": -0.15, "daily_loss": -0.20}
