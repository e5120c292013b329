"""Every `kubectl exec` of the runbook, word for word, in the chart's pod, named `POD`; podman plays kubectl."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from tests.cast import APPROVER, CODE, ROOT, wait_for
from tests.kubernetes.cluster import SECOND_APPROVER, SECOND_CODE, Cluster
from tests.kubernetes.node import Node

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.kubernetes.images import Podman
    from tests.kubernetes.pod import Pod

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]  # the first one builds the image

RUNBOOK = (ROOT / "docs" / "RUNBOOK.md").read_text()
PATIENCE_SECONDS = 90.0

KUBECTL = """#!{python}
import os, sys
words = sys.argv[1:]
flags = [word for word in words[1:2] if word.startswith("-")]
target, command = words[1 + len(flags) : 5 + len(flags)], words[5 + len(flags) :]
assert [words[0], *target] == ["exec", "POD", "-c", "killswitch", "--"], words
argv = [*{podman!r}, "exec", *flags, {container!r}, *command]
os.execvpe(argv[0], argv, {{**os.environ, **{environ!r}}})
"""
KILLSWITCH = '#!/bin/sh\nexec kubectl exec -i POD -c killswitch -- killswitch "$@"\n'


class Terminal:
    """A shell in which the commands of the runbook mean the pod."""

    def __init__(self, pod: Pod, podman: Podman, folder: Path) -> None:
        kubectl = KUBECTL.format(
            python=sys.executable,
            podman=podman.command(),
            container=pod.sidecar.id,
            environ={"CONTAINERS_CONF": podman.environ()["CONTAINERS_CONF"]},
        )
        for name, text in {"kubectl": kubectl, "killswitch": KILLSWITCH}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self._environ = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}

    def run(self, line: str, *, stdin: str = "") -> tuple[int, str]:
        """Run a line without a terminal; returns exit code and output."""
        done = subprocess.run(
            ["bash", "-c", line],
            env=self._environ,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        return done.returncode, done.stdout

    def type(self, line: str, *, prompt: str, answer: str) -> tuple[int, str]:
        """Run a line on a terminal and type the answer to its question; returns exit code and what was seen."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
        process = subprocess.Popen(
            ["bash", "-c", line], env=self._environ, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        seen, answered, deadline = "", False, time.monotonic() + PATIENCE_SECONDS
        try:
            while True:
                assert time.monotonic() < deadline, f"{line}: {seen}"
                if not select.select([ours], [], [], 1)[0]:
                    continue
                try:
                    seen += os.read(ours, 4096).decode(errors="replace")
                except OSError:  # the other end is closed
                    break
                if prompt in seen and not answered:
                    answered = True
                    os.write(ours, f"{answer}\n".encode())
            code = process.wait(PATIENCE_SECONDS)
        finally:
            process.kill()
            process.wait()
            os.close(ours)
        assert answered, f"{line} did not ask {prompt!r}: {seen}"
        return code, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)


@pytest.fixture(scope="module")
def cluster(podman: Podman, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(Node(podman, tmp_path_factory.mktemp("node")), image)
    yield made
    made.close()


@pytest.fixture
def open_terminal(cluster: Cluster, podman: Podman, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Starts a pod that trades, with these settings for its recovery, and opens a terminal on it."""
    pods = []

    def start(**recovery: object) -> Terminal:
        pods.append(cluster.run(cluster.render(config={"recovery": recovery})))
        pods[-1].wait_trading()
        return Terminal(pods[-1], podman, tmp_path)

    yield start
    for pod in pods:
        pod.close()


def written_commands(start: str) -> list[str]:
    """The runbook's command lines that begin so, without their comments; those in running text too."""
    fenced = re.findall(r"^```sh\n(.*?)^```", RUNBOOK, re.MULTILINE | re.DOTALL)
    lines = [line.partition("   #")[0].strip() for block in fenced for line in block.splitlines()]
    inline = [" ".join(found.split()) for found in re.findall(rf"`({re.escape(start)} [^`]+)`", RUNBOOK)]
    return [line for line in [*lines, *inline] if line.startswith(start)]


# line of the runbook, what it asks and what is typed, its exit code, and words of its answer
Step = tuple[str, tuple[str, str] | None, int, Sequence[str]]

INCIDENT: list[Step] = [
    ("killswitch status", None, 0, ["TRADING ALLOWED"]),
    ("killswitch check", None, 0, ["allow (active)"]),
    (
        'killswitch trigger --reason "fat finger in AAPL" --by alice',
        ("[y/N]", "y"),
        0,
        ["BLOCKED – KILLED", "alice (unverified): fat finger in AAPL", "0 % of position limits, restriction halt"],
    ),
    ("killswitch status", None, 3, ["BLOCKED – KILLED", "fat finger in AAPL"]),
    ("killswitch check", None, 3, ["deny (killed): killed by alice: fat finger in AAPL"]),
    ("killswitch health", None, 0, ["HEALTHY"]),
    ("killswitch rules list", None, 0, ["portfolio_drawdown", "trading_heartbeat"]),
    (
        f'killswitch recover --reason "positions reconciled" --by {APPROVER}',
        ("code", CODE),
        0,
        ["BLOCKED – KILLED", "PENDING", "approvals: 1 of 2 (bob)"],
    ),
    (
        f"killswitch approve --by {SECOND_APPROVER}",
        ("code", SECOND_CODE),
        0,
        ["BLOCKED – RECOVERING", "COOLDOWN", "approvals: 2 of 2 (bob, carol)", "the end of the cooldown"],
    ),
    (
        'killswitch cancel-recovery --by alice --reason "the feed dropped again"',
        None,
        0,
        ["BLOCKED – KILLED", "fat finger in AAPL"],
    ),
    (
        "python -c 'import shutil; print(shutil.disk_usage(\"/var/lib/killswitch\"))'",
        None,
        0,
        ["usage(total="],
    ),
]


def test_every_kubectl_exec_of_the_runbook_does_what_it_says(open_terminal: Callable[..., Terminal]) -> None:
    terminal = open_terminal(approvals=2, cooldown="5m")
    by_command = {line.partition(" -- ")[2]: line for line in written_commands("kubectl exec")}
    assert by_command.keys() == {command for command, *_ in INCIDENT}
    for command, question, code, words in INCIDENT:
        line = by_command[command]
        if question:
            assert " -it " in line
            ended, seen = terminal.type(line, prompt=question[0], answer=question[1])
        else:
            ended, seen = terminal.run(line)
        assert ended == code, f"{line} ended with {ended}:\n{seen}"
        assert all(word in seen for word in words), f"{line}:\n{seen}"


def test_the_drill_of_the_runbook_goes_as_written(open_terminal: Callable[..., Terminal]) -> None:
    terminal = open_terminal(cooldown="2s", steps=[{"factor": 0.5}, {"factor": 1.0, "after": "2s"}])
    drill = RUNBOOK.partition("\n## Drill\n")[2].partition("```sh\n")[2].partition("```")[0].splitlines()
    for comment in drill:
        line = comment.partition("   #")[0].strip()
        if line.startswith("killswitch recover"):
            assert terminal.run(line, stdin="wrong-code-0000\n")[0] == 4
            code, seen = terminal.run(line, stdin=f"{CODE}\n")
            assert "COOLDOWN" in seen
        elif "COOLDOWN, then" in comment:
            code, seen = watch_it_come_back(terminal, line)
        else:
            code, seen = terminal.run(line)
        wanted = re.search(r"# .*exit (\d)", comment)
        expected = int(wanted[1]) if wanted and "wrong code" not in comment else 0
        assert code == expected, f"{line} ended with {code}:\n{seen}"
    assert "WHOLE" in seen


def watch_it_come_back(terminal: Terminal, line: str) -> tuple[int, str]:
    """`status` until trading is allowed in full; on a slow machine the restart step before it passes unseen."""
    return wait_for(
        lambda: ended if "TRADING ALLOWED" in (ended := terminal.run(line))[1] else None,
        "trading to come back",
        patience=PATIENCE_SECONDS,
    )
