"""Writes the dashboards as JSON: `python -m grafana.generate [--runbook URL] [--into FOLDER]`.

The files in `grafana/dashboards` are its output as it is without options; a test keeps them so.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Final

from grafana import fleet, switch

RUNBOOK: Final = "docs/RUNBOOK.md"
FOLDER: Final = Path(__file__).parent / "dashboards"


def rendered(runbook: str = RUNBOOK) -> dict[str, str]:
    """Both dashboards as text, by the name of their file."""
    built = (module.build(runbook) for module in (switch, fleet))
    return {f"{one['uid']}.json": json.dumps(one, indent=2, ensure_ascii=False) + "\n" for one in built}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(prog="python -m grafana.generate", description="Write the dashboards as JSON.")
    parser.add_argument("--runbook", default=RUNBOOK, metavar="URL", help="where the link to the runbook leads")
    parser.add_argument("--into", default=FOLDER, type=Path, metavar="FOLDER", help="where to write the files")
    arguments = parser.parse_args()
    arguments.into.mkdir(parents=True, exist_ok=True)
    for name, text in rendered(arguments.runbook).items():
        (arguments.into / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
