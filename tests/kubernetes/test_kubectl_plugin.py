"""`kubectl killswitch` through the real kubectl, its plugin dispatch and its exec, against a small API server.

What is not real is the cluster: the server lists pods and answers exec over WebSockets in Kubernetes' own protocol
(v5.channel.k8s.io) with what each pod's sidecar is told to say.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import WSMsgType, web

from tests.kubernetes.charts import ROOT, program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STDIN, STDOUT, STDERR, ERROR, CLOSE = 0, 1, 2, 3, 255
SELECTOR = "killswitch.io/guarded=true"


@dataclass(kw_only=True)
class Pod:
    """A pod, and what its sidecar says; `code` None: the API server answers exec with 500."""

    name: str
    namespace: str = "trading"
    out: str = "TRADING ALLOWED\n"
    err: str = ""
    code: int | None = 0
    container: str = "killswitch"
    native: bool = False
    phase: str = "Running"

    @property
    def document(self) -> dict[str, Any]:
        both = {"containers": [{"name": "trader"}], "initContainers": []}
        both["initContainers" if self.native else "containers"].append({"name": self.container})
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": self.name, "namespace": self.namespace},
            "spec": both,
            "status": {"phase": self.phase},
        }


@dataclass(kw_only=True)
class Exec:
    """One exec that a pod got."""

    pod: str
    command: list[str]
    container: str
    stdin: str = ""


@dataclass
class Cluster:
    """The API server on loopback."""

    pods: list[Pod] = field(default_factory=list)
    lists: list[tuple[str, str]] = field(default_factory=list)
    execs: list[Exec] = field(default_factory=list)
    url: str = ""

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/api", _answer({"kind": "APIVersions", "versions": ["v1"]}))
        app.router.add_get("/apis", _answer({"kind": "APIGroupList", "apiVersion": "v1", "groups": []}))
        resource = {"name": "pods", "singularName": "pod", "namespaced": True, "kind": "Pod", "verbs": ["get", "list"]}
        app.router.add_get(
            "/api/v1", _answer({"kind": "APIResourceList", "groupVersion": "v1", "resources": [resource]})
        )
        app.router.add_get("/api/v1/pods", self.list_pods)
        app.router.add_get("/api/v1/namespaces/{namespace}/pods", self.list_pods)
        app.router.add_get("/api/v1/namespaces/{namespace}/pods/{pod}", self.get_pod)
        app.router.add_route("*", "/api/v1/namespaces/{namespace}/pods/{pod}/exec", self.exec)
        return app

    async def list_pods(self, request: web.Request) -> web.Response:
        namespace = request.match_info.get("namespace", "")
        self.lists.append((namespace, request.query.get("labelSelector", "")))
        found = [pod.document for pod in self.pods if namespace in ("", pod.namespace)]
        return web.json_response({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": found})

    async def get_pod(self, request: web.Request) -> web.Response:
        return web.json_response(self._pod(request).document)

    def _pod(self, request: web.Request) -> Pod:
        named = request.match_info["namespace"], request.match_info["pod"]
        return next(pod for pod in self.pods if (pod.namespace, pod.name) == named)

    async def exec(self, request: web.Request) -> web.StreamResponse:
        pod = self._pod(request)
        if pod.code is None:
            refused = {"kind": "Status", "status": "Failure", "message": "the kubelet does not answer", "code": 500}
            return web.json_response(refused, status=500)
        query = request.query
        got = Exec(pod=f"{pod.namespace}/{pod.name}", command=query.getall("command"), container=query["container"])
        self.execs.append(got)
        channel = web.WebSocketResponse(protocols=["v5.channel.k8s.io"])
        await channel.prepare(request)
        if query.get("stdin") == "true":
            got.stdin = await _typed(channel)
        await channel.send_bytes(bytes([STDOUT]) + pod.out.encode())
        await channel.send_bytes(bytes([STDERR]) + pod.err.encode())
        await channel.send_bytes(bytes([ERROR]) + json.dumps(_status(pod.code)).encode())
        await channel.close()
        return channel


async def _typed(channel: web.WebSocketResponse) -> str:
    text = b""
    async for message in channel:
        if message.type is WSMsgType.BINARY and message.data[0] == STDIN:
            text += message.data[1:]
        elif message.type is WSMsgType.BINARY and message.data[0] == CLOSE:
            break
    return text.decode()


def _status(code: int) -> dict[str, Any]:
    if code == 0:
        return {"status": "Success", "metadata": {}}
    cause = {"reason": "ExitCode", "message": str(code)}
    return {
        "status": "Failure",
        "reason": "NonZeroExitCode",
        "message": f"command terminated with non-zero exit code: {code}",
        "details": {"causes": [cause]},
        "metadata": {},
    }


def _answer(document: dict[str, Any]) -> Any:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response(document)

    return answer


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A running API server without pods."""
    made = Cluster()
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(made.application(), access_log=None)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield made
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(20)
    loop.close()


class Terminal:
    """A shell of an operator: kubectl and the plugin on the path, a kubeconfig of its own."""

    def __init__(self, folder: Path, url: str) -> None:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "desk", "cluster": {"server": url}}],
            "users": [{"name": "alice", "user": {}}],
            "contexts": [
                {"name": "desk", "context": {"cluster": "desk", "user": "alice", "namespace": "trading"}},
                {"name": "other", "context": {"cluster": "desk", "user": "alice", "namespace": "research"}},
            ],
            "current-context": "desk",
        }
        (folder / "config").write_text(json.dumps(config))
        (folder / "bin").mkdir()
        (folder / "bin" / "kubectl").symlink_to(program("kubectl"))
        (folder / "bin" / "kubectl-killswitch").symlink_to(ROOT / ".venv" / "bin" / "kubectl-killswitch")
        self.environ = {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "HOME": str(folder),
            "KUBECONFIG": str(folder / "config"),
        }

    def kubectl(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["kubectl", *arguments],
            env=self.environ,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )


@pytest.fixture
def terminal(cluster: Cluster, tmp_path: Path) -> Terminal:
    return Terminal(tmp_path, cluster.url)


def test_kubectl_finds_the_plugin(terminal: Terminal) -> None:
    done = terminal.kubectl("plugin", "list")
    assert done.returncode == 0, done.stderr
    assert "kubectl-killswitch" in done.stdout
    assert "warning" not in done.stderr.lower()


def test_every_guarded_pod_of_the_contexts_namespace_is_asked(terminal: Terminal, cluster: Cluster) -> None:
    cluster.pods = [Pod(name="maker-0"), Pod(name="maker-1", native=True), Pod(name="old", phase="Succeeded")]
    done = terminal.kubectl("killswitch", "status")
    assert done.returncode == 0, done.stderr
    assert cluster.lists == [("trading", SELECTOR)]
    assert sorted(done.stdout.splitlines()) == [
        "2 of 2 pods ok.",
        "trading/maker-0: ok: TRADING ALLOWED",
        "trading/maker-1: ok: TRADING ALLOWED",
    ]
    assert {one.pod for one in cluster.execs} == {"trading/maker-0", "trading/maker-1"}
    assert all(one.command == ["killswitch", "status"] and one.container == "killswitch" for one in cluster.execs)


@pytest.mark.parametrize(
    ("options", "listed"),
    [
        (["-n", "research"], ("research", SELECTOR)),
        (["--context", "other"], ("research", SELECTOR)),
        (["-A"], ("", SELECTOR)),
        (["-l", "app=maker"], ("trading", "app=maker")),
    ],
)
def test_namespace_context_and_selector_reach_the_api(
    terminal: Terminal, cluster: Cluster, options: list[str], listed: tuple[str, str]
) -> None:
    cluster.pods = [Pod(name="maker-0"), Pod(name="lab-0", namespace="research")]
    done = terminal.kubectl("killswitch", *options, "status")
    assert done.returncode == 0, done.stderr
    assert cluster.lists == [listed]
    namespaces = {one.pod.partition("/")[0] for one in cluster.execs}
    assert namespaces == ({listed[0]} if listed[0] else {"trading", "research"})


def test_what_fails_in_one_pod_is_shown_beside_the_others_and_fails_the_whole(
    terminal: Terminal, cluster: Cluster
) -> None:
    cluster.pods = [
        Pod(name="good", out="BLOCKED – KILLED\n"),
        Pod(name="refused", out="", err="Refused (409): mode is disabled\n", code=4),
        Pod(name="not-durable", out="", err="blocked, NOT durable\n", code=1),
        Pod(name="unreachable", code=None),
        Pod(name="unguarded", container="proxy"),
    ]
    done = terminal.kubectl("killswitch", "--yes", "trigger", "--reason", "venue is down", "--by", "alice")
    assert done.returncode == 1
    lines = {line.partition(": ")[0]: line.partition(": ")[2] for line in done.stdout.splitlines()}
    assert lines["trading/good"] == "ok: BLOCKED – KILLED"
    assert lines["trading/refused"] == "REFUSED: Refused (409): mode is disabled"
    assert lines["trading/not-durable"] == "ERROR: blocked, NOT durable"
    assert "the kubelet does not answer" in lines["trading/unreachable"]
    assert lines["trading/unguarded"] == "FAILED: has no container 'killswitch'; name it with -c"
    assert "1 of 5 pods ok, 4 not." in done.stdout
    wanted = ["killswitch", "trigger", "--reason", "venue is down", "--by", "alice", "--confirm"]
    assert all(one.command == wanted for one in cluster.execs)
    assert len(cluster.execs) == 3


def test_blocked_pods_fail_a_status_of_all(terminal: Terminal, cluster: Cluster) -> None:
    cluster.pods = [Pod(name="a"), Pod(name="b", out="BLOCKED – KILLED\n", code=3)]
    done = terminal.kubectl("killswitch", "status")
    assert done.returncode == 1
    assert "trading/b: BLOCKED: BLOCKED – KILLED" in done.stdout
    assert "command terminated" not in done.stdout


def test_the_approval_code_reaches_every_sidecar_on_its_standard_input_alone(
    terminal: Terminal, cluster: Cluster
) -> None:
    cluster.pods = [Pod(name="a"), Pod(name="b", native=True)]
    done = terminal.kubectl(
        "killswitch", "--yes", "recover", "--reason", "venue is back", "--by", "bob", stdin="let-me-trade\n"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [one.stdin for one in cluster.execs] == ["let-me-trade\n"] * 2
    assert not any("let-me-trade" in word for one in cluster.execs for word in one.command)


def test_a_change_without_a_terminal_and_without_yes_reaches_no_pod(terminal: Terminal, cluster: Cluster) -> None:
    cluster.pods = [Pod(name="a")]
    done = terminal.kubectl("killswitch", "trigger", "--reason", "x")
    assert done.returncode == 2
    assert "add --yes" in done.stderr
    assert not cluster.execs


def test_no_pod_is_an_error(terminal: Terminal, cluster: Cluster) -> None:
    done = terminal.kubectl("killswitch", "-l", "app=nobody", "status")
    assert done.returncode == 1
    assert "No pod found with the selector 'app=nobody'; nothing was done" in done.stderr


def test_a_cluster_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    done = Terminal(tmp_path, "http://127.0.0.1:9").kubectl("killswitch", "status")
    assert done.returncode == 1
    assert "kubectl could not list the pods" in done.stderr


def test_json_is_one_document_a_pod(terminal: Terminal, cluster: Cluster) -> None:
    cluster.pods = [Pod(name="a", out='{"state": "ACTIVE"}\n'), Pod(name="b", out='{"state": "KILLED"}\n', code=3)]
    done = terminal.kubectl("killswitch", "status", "--output", "json")
    assert done.returncode == 1
    found = {one["pod"]: (one["exit_code"], one["output"]) for one in map(json.loads, done.stdout.splitlines())}
    assert found == {"a": (0, {"state": "ACTIVE"}), "b": (3, {"state": "KILLED"})}
