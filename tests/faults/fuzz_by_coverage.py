"""Fuzzes what takes bytes from outside by coverage: inputs that reach new code are kept, and changed further.

    make fuzz TARGETS="gate_request state_file" SECONDS=600

Each target in a process of its own, one after the other; what makes one fail is written to .cache/fuzz. The exit code
is 1 if any failed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOUND = ROOT / ".cache" / "fuzz"
LONGEST_INPUT = 4096


def fuzz(target: str, seconds: int) -> None:
    """Fuzz one target in this process, which ends with it; from what earlier runs found, if there were any."""
    import atheris  # make fuzz installs it; no other target needs it

    with atheris.instrument_imports(include=["sidecar"]):
        from tests.faults.fuzz_targets import TARGETS, seeds

    corpus = FOUND / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()[target]):
        (corpus / f"seed-{number}").write_bytes(seed)
    limits = (f"-max_total_time={seconds}", f"-max_len={LONGEST_INPUT}", "-timeout=10", "-print_final_stats=1")
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={FOUND}/{target}-", str(corpus)], TARGETS[target])
    atheris.Fuzz()


def main() -> int:
    """Fuzz the targets named after the seconds, or all."""
    from tests.faults.fuzz_targets import TARGETS

    seconds, *names = sys.argv[1:]
    unknown = set(names) - TARGETS.keys()
    if unknown or not seconds.isdigit():
        wanted = f"SECONDS, a whole number, and then any of {', '.join(TARGETS)}"
        print(f"fuzz: wants {wanted}; not {' '.join(sys.argv[1:])}", file=sys.stderr)
        return 2
    failed = [name for name in names or TARGETS if not _passes(name, seconds)]
    print(f"fuzz: {', '.join(failed)} failed; see {FOUND}" if failed else "fuzz: nothing failed")
    return 1 if failed else 0


def _passes(target: str, seconds: str) -> bool:
    print(f"fuzz: {target}", flush=True)
    command = (sys.executable, "-m", "tests.faults.fuzz_by_coverage", "--one", target, seconds)
    run = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    shown = run.stderr if run.returncode else "\n".join(_figures(run.stderr))
    print(shown, flush=True)
    return run.returncode == 0


def _figures(said: str) -> list[str]:
    wanted = ("Done ", "stat::number_of_executed_units", "stat::new_units_added")
    return [f"  {line}" for line in said.splitlines() if line.startswith(wanted)]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        fuzz(sys.argv[2], int(sys.argv[3]))
    sys.exit(main())
