"""`kubectl killswitch`: one command, run in the sidecar of every pod that a selector finds, and one line for each.

Only starts `kubectl`, with the user's own rights and context; knows nothing of what a command does but whether it
changes something, which is asked about before, and whether it wants a code, which is read once.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import click

from sidecar.cli.codes import read_code, stdin_is_terminal
from sidecar.cli.context import examples
from sidecar.cli.outcomes import Exit, Failure
from sidecar.cli.words import one_line

SELECTOR: Final = "killswitch.io/guarded=true"
AT_ONCE: Final = 16
"""Processes of kubectl at a time: each takes some 40 MiB on the caller's machine."""

POD_SECONDS: Final = 60.0
"""A pod that does not answer in this time counts as failed; the others are not kept waiting."""

LIST_SECONDS: Final = 30.0

_CHANGES: Final = frozenset({"trigger", "recover", "approve", "cancel-recovery"})
_WANTS_CODE: Final = frozenset({"recover", "approve"})
_COMMANDS: Final = _CHANGES | {"status", "audit", "health", "check", "rules", "version"}
_VALUE_OPTIONS: Final = frozenset({"--output", "-o", "--socket", "--config"})
_MEANINGS: Final = {0: "ok", 1: "ERROR", 2: "USAGE", 3: "BLOCKED", 4: "REFUSED"}
_OVER: Final = frozenset({"Succeeded", "Failed"})
_KUBECTL_NOISE: Final = re.compile(r"command terminated with exit code \d+|Defaulted container .*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pod:
    """One pod; `problem` says why its sidecar cannot be asked, empty where it can."""

    namespace: str
    name: str
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one pod's sidecar answered; `code` is the command's exit code, None where it never ran to its end."""

    pod: Pod
    code: int | None
    out: str = ""
    err: str = ""

    @property
    def meaning(self) -> str:
        """The exit code in a word."""
        return "FAILED" if self.code is None else _MEANINGS.get(self.code, f"EXIT {self.code}")

    @property
    def first_line(self) -> str:
        """What tells most: the first line of the answer, or of the complaint where the command did not succeed."""
        # 3 is an answer too; of the others the complaint tells more than what was printed before it.
        texts = (self.out, self.err) if self.code in (0, 3) else (self.err, self.out)
        lines = (one_line(line) for text in texts for line in text.splitlines())
        return next((line for line in lines if line and not _KUBECTL_NOISE.fullmatch(line)), "")


class Kubectl:
    """The program that does the work: where it is, and what stands before every subcommand of it."""

    def __init__(self, program: str, options: Sequence[str]) -> None:
        self._base = [program, *options]

    def pods(self, *, scope: Sequence[str], selector: str, container: str) -> list[Pod]:
        """List the pods that are not over.

        Raises:
            Failure: kubectl cannot be started, or refuses.
        """
        command = [*self._base, "get", "pods", *scope, "--selector", selector, "--output", "json"]
        try:
            done = subprocess.run(  # noqa: S603 - the caller's own kubectl
                command, capture_output=True, timeout=LIST_SECONDS, check=False, stdin=subprocess.DEVNULL
            )
        except OSError as error:
            raise Failure(f"kubectl cannot be started: {self._base[0]}: {error.strerror or error}") from None
        except subprocess.TimeoutExpired:
            raise Failure(f"kubectl did not list the pods within {LIST_SECONDS:g} s.") from None
        if done.returncode != 0:
            raise Failure(f"kubectl could not list the pods:\n{done.stderr.decode('utf-8', 'replace').strip()}")
        try:
            items = json.loads(done.stdout)["items"]
            return [_pod(item, container) for item in items if item.get("status", {}).get("phase") not in _OVER]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Failure("kubectl listed the pods in a form that is not known here.") from None

    def run(self, pod: Pod, container: str, arguments: Sequence[str], code: str | None) -> Result:
        """Run the command in one pod; whatever goes wrong is in the result."""
        if pod.problem:
            return Result(pod=pod, code=None, err=pod.problem)
        stdin = [] if code is None else ["--stdin"]
        target = ["exec", *stdin, "--namespace", pod.namespace, pod.name, "--container", container]
        try:
            done = subprocess.run(  # noqa: S603 - the caller's own kubectl
                [*self._base, *target, "--", "killswitch", *arguments],
                capture_output=True,
                timeout=POD_SECONDS,
                check=False,
                input=b"" if code is None else f"{code}\n".encode(),
            )
        except subprocess.TimeoutExpired:
            return Result(pod=pod, code=None, err=f"no answer within {POD_SECONDS:g} s; what it did is not known")
        except OSError as error:
            return Result(pod=pod, code=None, err=f"kubectl cannot be started: {error.strerror or error}")
        out, err = (raw.decode("utf-8", "replace") for raw in (done.stdout, done.stderr))
        return Result(pod=pod, code=done.returncode if done.returncode >= 0 else None, out=out, err=err)


def _pod(item: dict[str, Any], container: str) -> Pod:
    metadata, spec = item["metadata"], item.get("spec", {})
    # A native sidecar stands among the init containers.
    names = {one["name"] for kind in ("containers", "initContainers") for one in spec.get(kind) or ()}
    problem = "" if container in names else f"has no container {container!r}; name it with -c"
    return Pod(namespace=str(metadata["namespace"]), name=str(metadata["name"]), problem=problem)


@click.command(
    "kubectl-killswitch",
    context_settings={
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
    epilog=examples(
        "kubectl killswitch status",
        "kubectl killswitch -n trading -l app=maker status",
        'kubectl killswitch -A trigger --reason "venue is down" --by alice',
        'kubectl killswitch -n trading -l app=maker recover --reason "venue is back" --by bob',
    ),
)
@click.option("-n", "--namespace", metavar="NS", help="Namespace of the pods.  [default: that of the kubectl context]")
@click.option("-A", "--all-namespaces", "everywhere", is_flag=True, help="Pods of all namespaces.")
@click.option("-l", "--selector", default=SELECTOR, show_default=True, help="Which pods.")
@click.option("-c", "--container", default="killswitch", show_default=True, help="The sidecar in them.")
@click.option("--context", metavar="NAME", help="Context of kubectl.")
@click.option("--kubeconfig", metavar="FILE", help="Configuration of kubectl.")
@click.option("--kubectl", "program", metavar="PATH", default="kubectl", show_default=True, help="The program itself.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before a command that changes something.")
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND [OPTIONS]...")
def kubectl_killswitch(
    namespace: str | None,
    selector: str,
    container: str,
    context: str | None,
    kubeconfig: str | None,
    program: str,
    arguments: tuple[str, ...],
    *,
    everywhere: bool,
    yes: bool,
) -> None:
    """Run a killswitch command in the sidecar of every guarded pod, at the same time, and print one line a pod.

    Commands: status, trigger, recover, approve, cancel-recovery, audit, health, check, rules, version. An approval code
    is read once and given to each. Ends with 0 if every pod answered 0, else with 1; finding no pod is an error.
    """
    if namespace and everywhere:
        raise click.UsageError("-n and -A exclude each other.")
    command = _command_in(arguments)
    options = [f"--{name}={value}" for name, value in (("context", context), ("kubeconfig", kubeconfig)) if value]
    kubectl = Kubectl(program, options)
    scope = ["--all-namespaces"] if everywhere else ["--namespace", namespace] if namespace else []
    pods = kubectl.pods(scope=scope, selector=selector, container=container)
    if not pods:
        raise Failure(f"No pod found with the selector {selector!r}; nothing was done. Look with -n, -A or -l.")
    if not {"--help", "-h"} & set(arguments):
        arguments = _confirmed(command, arguments, pods, yes=yes)
    code = _code_for(command, arguments, pods)
    results = _run_all(kubectl, pods, container, arguments, code)
    raise SystemExit(_print_all(results, len(pods), as_json=_wants_json(arguments)))


def _command_in(arguments: Sequence[str]) -> str:
    """The killswitch command among its arguments; options that every command takes may stand before it."""
    left = iter(arguments)
    for argument in left:
        if argument in _VALUE_OPTIONS:
            next(left, None)
        elif not argument.startswith("-"):
            if argument not in _COMMANDS or "--follow" in arguments:
                break
            return argument
    said = " ".join(arguments)
    raise click.UsageError(f"{said!r} cannot run in many pods; commands are {', '.join(sorted(_COMMANDS))}.")


def _confirmed(command: str, arguments: tuple[str, ...], pods: list[Pod], *, yes: bool) -> tuple[str, ...]:
    """Ask where something is going to change; returns the arguments with which no sidecar asks again."""
    passed = "--confirm" in arguments
    # For one pod a code is confirmation enough, as it is without this plugin; a trigger is always asked about.
    needed = command in _CHANGES and (len(pods) > 1 or command == "trigger")
    if needed and not (yes or passed):
        _ask(command, pods)
    return (*arguments, "--confirm") if command == "trigger" and not passed else arguments


def _ask(command: str, pods: list[Pod]) -> None:
    many = f"{len(pods)} pod{'' if len(pods) == 1 else 's'}"
    if not stdin_is_terminal():
        raise click.UsageError(f"{command} on {many}, and no terminal to ask on: add --yes. Nothing was done.")
    for pod in pods:
        click.echo(f"  {pod}", err=True)
    if not click.confirm(f"Run {command} on {many}?", err=True):
        raise Failure("Nothing was done.")


def _code_for(command: str, arguments: Sequence[str], pods: list[Pod]) -> str | None:
    if command not in _WANTS_CODE or {"--help", "-h"} & set(arguments):
        return None
    return read_code(f"Approval code, for {command} on {len(pods)} pod{'' if len(pods) == 1 else 's'}")


def _run_all(
    kubectl: Kubectl, pods: list[Pod], container: str, arguments: Sequence[str], code: str | None
) -> Iterator[Result]:
    """Yield the results as they come, so that one slow pod hides no other."""
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        running = [pool.submit(kubectl.run, pod, container, arguments, code) for pod in pods]
        for one in as_completed(running):
            yield one.result()


def _print_all(results: Iterator[Result], total: int, *, as_json: bool) -> Exit:
    good = 0
    for result in results:
        good += result.code == 0
        click.echo(_json_line(result) if as_json else f"{result.pod}: {result.meaning}: {result.first_line}")
        sys.stdout.flush()
    if not as_json:
        others = f", {total - good} not" if good < total else ""
        click.echo(f"{good} of {total} pods ok{others}.")
    return Exit.DONE if good == total else Exit.ERROR


def _json_line(result: Result) -> str:
    try:
        output: Any = json.loads(result.out)
    except ValueError:
        output = result.out
    return json.dumps(
        {
            "namespace": result.pod.namespace,
            "pod": result.pod.name,
            "exit_code": result.code,
            "output": output,
            "error": result.err.strip(),
        }
    )


def _wants_json(arguments: Sequence[str]) -> bool:
    pairs = pairwise(arguments)
    return bool({"--output=json", "-ojson"} & set(arguments)) or any(
        name in ("--output", "-o") and value == "json" for name, value in pairs
    )


def main(argv: list[str] | None = None) -> Any:
    """Run the plugin and end the process with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    return kubectl_killswitch.main(args=argv, prog_name="kubectl killswitch")


if __name__ == "__main__":
    main()
