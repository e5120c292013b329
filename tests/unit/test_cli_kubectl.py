"""`kubectl killswitch` with a stand-in for kubectl that lists pods and answers for them."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Logs how it was called and what it was given, and answers as the pod's file says.
pytestmark = pytest.mark.slow

KUBECTL = """#!{python}
import json, pathlib, sys, time

here = pathlib.Path(__file__).parent
arguments = sys.argv[1:]
if "get" in arguments:
    (here / "list.log").write_text(json.dumps(arguments))
    answer = here / "pods.json"
    if not answer.exists():
        sys.exit("Error from server (Forbidden): pods is forbidden")
    print(answer.read_text())
    sys.exit(0)
pod = arguments[arguments.index("--namespace") + 2]
stdin = sys.stdin.read()
(here / (pod + ".log")).write_text(json.dumps([arguments, stdin]))
answer = json.loads((here / (pod + ".answer")).read_text())
sys.stdout.write(answer["out"])
sys.stderr.write(answer["err"])
if answer["code"]:
    sys.stderr.write("command terminated with exit code %d\\n" % answer["code"])
sys.exit(answer["code"])
"""


class Cluster:
    def __init__(self, folder):
        self.folder = folder
        self.items = []
        self.kubectl = folder / "kubectl"
        self.kubectl.write_text(KUBECTL.format(python=sys.executable))
        self.kubectl.chmod(0o755)
        self.save()

    def save(self):
        (self.folder / "pods.json").write_text(json.dumps({"items": self.items}))

    def pod(self, name, *, code=0, out="ok\n", err="", phase="Running", container="killswitch", kind="initContainers"):
        spec = {"containers": [{"name": "bot"}]}
        spec.setdefault(kind, []).append({"name": container})
        metadata = {"name": name, "namespace": "trading"}
        self.items.append({"metadata": metadata, "spec": spec, "status": {"phase": phase}})
        (self.folder / f"{name}.answer").write_text(json.dumps({"code": code, "out": out, "err": err}))
        self.save()

    def called(self, pod):
        path = self.folder / f"{pod}.log"
        return json.loads(path.read_text()) if path.exists() else None

    def listed(self):
        return json.loads((self.folder / "list.log").read_text())

    def command(self, *arguments):
        return [sys.executable, "-m", "sidecar.cli.kubectl", "--kubectl", str(self.kubectl), *arguments]

    def run(self, *arguments, stdin=""):
        return subprocess.run(
            self.command(*arguments), cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=60, check=False
        )


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def test_each_pod_gets_one_line_and_all_ok_ends_with_0(cluster):
    cluster.pod("bot-0", out="TRADING ALLOWED\nmore\n")
    cluster.pod("bot-1", out="TRADING ALLOWED\n", kind="containers")
    done = cluster.run("status")
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()[:-1]) == [
        "trading/bot-0: ok: TRADING ALLOWED",
        "trading/bot-1: ok: TRADING ALLOWED",
    ]
    assert done.stdout.splitlines()[-1] == "2 of 2 pods ok."
    assert cluster.called("bot-0") == [
        ["exec", "--namespace", "trading", "bot-0", "--container", "killswitch", "--", "killswitch", "status"], ""
    ]  # fmt: skip
    assert cluster.listed() == ["get", "pods", "--selector", "killswitch.io/guarded=true", "--output", "json"]


def test_any_pod_that_is_not_ok_ends_with_1_and_says_why(cluster):
    cluster.pod("bot-0")
    cluster.pod("bot-1", code=3, out="BLOCKED – KILLED\n", err="note\n")
    cluster.pod("bot-2", code=4, err="Defaulted container x\nRefused (403): wrong code\n", out="")
    cluster.pod("bot-3", code=1, err="error: unable to upgrade connection\n", out="")
    cluster.pod("bot-4", container="other")
    done = cluster.run("status")
    assert done.returncode == 1
    assert set(done.stdout.splitlines()) >= {
        "trading/bot-1: BLOCKED: BLOCKED – KILLED",
        "trading/bot-2: REFUSED: Refused (403): wrong code",
        "trading/bot-3: ERROR: error: unable to upgrade connection",
        "trading/bot-4: FAILED: has no container 'killswitch'; name it with -c",
        "1 of 5 pods ok, 4 not.",
    }


def test_scope_selector_container_and_context_are_handed_on(cluster):
    cluster.pod("bot-0", container="ks")
    done = cluster.run("-A", "-l", "app=maker", "-c", "ks", "--context", "prod", "--kubeconfig", "/k", "version")
    assert done.returncode == 0
    assert cluster.listed() == [
        "--context=prod", "--kubeconfig=/k", "get", "pods", "--all-namespaces", "--selector", "app=maker", "--output",
        "json",
    ]  # fmt: skip
    assert cluster.called("bot-0")[0][:3] == ["--context=prod", "--kubeconfig=/k", "exec"]
    cluster.run("-n", "other", "status")
    assert cluster.listed()[:4] == ["get", "pods", "--namespace", "other"]
    assert cluster.run("-n", "other", "-A", "status").returncode == 2


def test_pods_that_are_over_are_left_out_and_none_at_all_is_an_error(cluster):
    cluster.pod("job-0", phase="Succeeded")
    done = cluster.run("status")
    assert done.returncode == 1
    assert "No pod found" in done.stderr
    assert cluster.called("job-0") is None


def test_a_kubectl_that_refuses_or_is_missing_is_an_error(cluster):
    (cluster.folder / "pods.json").unlink()
    done = cluster.run("status")
    assert (done.returncode, "pods is forbidden" in done.stderr) == (1, True)
    (cluster.folder / "pods.json").write_text("[]")
    assert cluster.run("status").returncode == 1
    cluster.kubectl.unlink()
    done = cluster.run("status")
    assert (done.returncode, "cannot be started" in done.stderr) == (1, True)


def test_trigger_without_terminal_needs_a_yes_and_does_nothing_without(cluster):
    cluster.pod("bot-0")
    cluster.pod("bot-1")
    done = cluster.run("trigger", "--reason", "x", stdin="y\n")
    assert done.returncode == 2
    assert "trigger on 2 pods" in done.stderr
    assert cluster.called("bot-0") is None
    for arguments in (["--yes", "trigger", "--reason", "x y"], ["trigger", "--reason", "x y", "--confirm"]):
        assert cluster.run(*arguments).returncode == 0
        assert cluster.called("bot-1")[0][-5:] == ["killswitch", "trigger", "--reason", "x y", "--confirm"]


def test_trigger_on_a_terminal_asks_with_the_number_of_pods(cluster):
    cluster.pod("bot-0")
    cluster.pod("bot-1")
    for answer, code in (("n\n", 1), ("y\n", 0)):
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(ROOT)
            command = cluster.command("trigger", "--reason", "x")
            os.execv(command[0], command)
        seen, deadline, typed = b"", time.monotonic() + 60, False
        while time.monotonic() < deadline:
            if not select.select([terminal], [], [], 0.1)[0]:
                continue
            try:
                seen += os.read(terminal, 4096)
            except OSError:
                break
            if not typed and b"Run trigger on 2 pods?" in seen:
                os.write(terminal, answer.encode())
                typed = True
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code, seen
        assert (cluster.called("bot-0") is not None) == (code == 0)


def test_a_code_is_read_once_and_given_to_every_pod_but_never_as_an_argument(cluster):
    cluster.pod("bot-0")
    cluster.pod("bot-1")
    done = cluster.run("--yes", "recover", "--reason", "ok", "--by", "bob", stdin="s3cret\nmore\n")
    assert done.returncode == 0, done.stderr
    for pod in ("bot-0", "bot-1"):
        arguments, stdin = cluster.called(pod)
        assert stdin == "s3cret\n"
        assert arguments[:2] == ["exec", "--stdin"]
        assert "s3cret" not in " ".join(arguments)
    assert cluster.run("--yes", "approve", "--by", "bob", stdin="").returncode == 2


def test_recover_on_many_pods_needs_a_yes_and_on_one_pod_the_code_is_enough(cluster):
    cluster.pod("bot-0")
    assert cluster.run("recover", "--reason", "ok", "--by", "bob", stdin="s3cret\n").returncode == 0
    cluster.pod("bot-1")
    assert cluster.run("recover", "--reason", "ok", "--by", "bob", stdin="s3cret\n").returncode == 2
    assert cluster.called("bot-1") is None


@pytest.mark.parametrize("command", [["serve"], ["demo"], ["hash-code"], ["audit", "--follow"], ["nonsense"], ["-x"]])
def test_commands_that_make_no_sense_in_many_pods_are_refused(cluster, command):
    cluster.pod("bot-0")
    done = cluster.run(*command)
    assert done.returncode == 2
    assert cluster.called("bot-0") is None


def test_common_options_may_stand_before_the_command(cluster):
    cluster.pod("bot-0")
    assert cluster.run("--", "--socket", "/s", "trigger", "--reason", "x").returncode == 2
    assert cluster.run("--yes", "--", "--socket", "/s", "trigger", "--reason", "x").returncode == 0
    assert cluster.called("bot-0")[0][-1] == "--confirm"


def test_json_is_one_document_a_pod(cluster):
    cluster.pod("bot-0", code=3, out='{"state": "KILLED"}\n', err="")
    done = cluster.run("status", "--output", "json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert (document["pod"], document["exit_code"], document["output"]) == ("bot-0", 3, {"state": "KILLED"})


def test_a_pod_cannot_play_with_the_terminal(cluster):
    cluster.pod("bot-0", out="\x1b[2Jok\n")
    assert "\x1b" not in cluster.run("status").stdout
