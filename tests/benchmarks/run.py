"""How fast the sidecar is, and what it costs: every figure with its method, and with its ratio where it has one.

    python tests/benchmarks/run.py [--full | --brief] [--only cost,page] [--json FILE] [--against FILE]

Runs real sidecars against a real Prometheus on loopback, in about eight minutes. `--full` takes longer; `--brief`
measures everything once and in short, to see that it can be measured. Figures are shown beside their aims and never
asserted: the exit code is 0 unless one could not be measured.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout, uninstalled

from blocking import measure_breaches, measure_kills, measure_starts  # noqa: E402 - after the path is set
from chains import measure_chains  # noqa: E402
from cost import measure_cost  # noqa: E402
from figures import Section, figures_of  # noqa: E402
from gate_speed import measure_arrivals, measure_questions  # noqa: E402
from page_read import measure_page  # noqa: E402
from surroundings import exporter, prometheus  # noqa: E402

Measurement = Callable[[], Section | list[Section]]


def main() -> int:
    """Measure, print, and write JSON where asked; 1 if something could not be measured."""
    options = _options()
    began, sections, failures = time.monotonic(), [], {}
    machine = _machine()
    earlier = figures_of(json.loads(options.against.read_text())) if options.against else None
    print(" · ".join(f"{name} {value}" for name, value in machine.items()))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="killswitch-bench-")))
        try:
            measurements = _measurements(folder, stack, options)
        except Exception as error:  # noqa: BLE001 - whatever it is, the reader is told
            print(f"nothing could be measured: {error}", file=sys.stderr)
            return 1
        for name in options.only or measurements:
            for section in _taken(name, measurements[name], failures):
                print(section.text(earlier), flush=True)
                sections.append(section)
    print(f"\n{time.monotonic() - began:.0f} s in all")
    for name, reason in failures.items():
        print(f"{name} could not be measured: {reason}", file=sys.stderr)
    if options.json:
        report = {"machine": machine, "sections": [one.document() for one in sections], "failures": failures}
        options.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return 1 if failures else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--full", action="store_true", help="measure more often and longer, about twenty minutes")
    how.add_argument("--brief", action="store_true", help="measure once and in short, for no figure that one may quote")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"some of {','.join(NAMES)}", metavar="NAMES")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--against", type=Path, metavar="FILE", help="show each figure's ratio to this earlier --json")
    options = parser.parse_args()
    if strangers := set(options.only or ()) - set(NAMES):
        parser.error(f"--only {','.join(sorted(strangers))!r} is none of {','.join(NAMES)}")
    return options


NAMES: Final = ("questions", "arrivals", "breaches", "chains", "cost", "starts", "kills", "page")


def _measurements(folder: Path, stack: ExitStack, options: argparse.Namespace) -> dict[str, Measurement]:
    source = stack.enter_context(exporter())
    url = stack.enter_context(prometheus(folder / "prometheus", source.port))

    def by(brief: int, usual: int, full: int) -> int:
        return full if options.full else brief if options.brief else usual

    rounds = by(1, 5, 15)
    return {
        "questions": lambda: measure_questions(folder / "questions", url, requests=by(200, 2000, 2000), rounds=rounds),
        "arrivals": lambda: measure_arrivals(folder, url, seconds=by(1, 5, 5), rounds=by(1, 2, 6)),
        "breaches": lambda: measure_breaches(folder / "breaches", url, source, breaches=by(2, 30, 60)),
        "chains": lambda: measure_chains(folder / "chains", source, breaches=by(3, 30, 60)),
        "cost": lambda: measure_cost(folder / "cost", url, seconds=by(4, 20, 60)),
        "starts": lambda: measure_starts(folder / "starts", url, starts=by(1, 5, 15)),
        "kills": lambda: measure_kills(folder / "kills", url, kills=by(5, 100, 300)),
        "page": lambda: measure_page(folder / "page", url, batches=by(200, 2000, 6000)),
    }


def _taken(name: str, measure: Measurement, failures: dict[str, str]) -> Iterator[Section]:
    try:
        sections = measure()
    except Exception as error:  # noqa: BLE001 - one figure that cannot be had must not hide the others
        failures[name] = f"{type(error).__name__}: {error}"
        return
    yield from sections if isinstance(sections, list) else [sections]


def _machine() -> dict[str, Any]:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": described.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }


if __name__ == "__main__":
    sys.exit(main())
