# noqa: INP001 - a script, not a module
"""Writes docs/LICENSES.md: the licence of every package that the image holds, from the packages' own metadata.

`python .ci/licenses.py` writes, `python .ci/licenses.py --check` compares and ends with 1 where it is out of date. A
package without a licence, or with one that nobody has looked at, is an error: this file goes with the image.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageMetadata, metadata
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
LOCK: Final = ROOT / ".ci" / "requirements.txt"
TARGET: Final = ROOT / "docs" / "LICENSES.md"

LOOKED_AT: Final = {
    "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "MPL-2.0", "PSF-2.0", "0BSD",
    # CPython's regular expression engine, from which regex descends.
    "CNRI-Python",
}  # fmt: skip
"""All permit use in closed software; MPL-2.0 asks that changes to its own files be published, and we make none."""

# What older metadata calls them.
SPDX: Final = {
    "Apache": "Apache-2.0",
    "Apache 2": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "Dual License": "Apache-2.0 OR BSD-3-Clause",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}

READ_IN_ITS_FILE: Final = {
    "promql-parser": "MIT",  # its metadata says nothing
    "uvloop": "Apache-2.0 OR MIT",  # its metadata names but one of its two
}
"""What the licence file in the package says."""

HEAD: Final = """\
# Licences

This project is under the [Apache License 2.0](../LICENSE). Beside it, the image holds the packages below, each with its
licence file in its `*.dist-info` folder, and the base image's Python and Debian packages, whose licences are in
`/usr/share/doc`. Those of the table may be used in closed software. Versions are those of `.ci/requirements.txt`.

Written by `.venv/bin/python .ci/licenses.py` after `make lock`; a test keeps it true. [RELEASING](RELEASING.md) tells
of the bill of materials.

| package | licence (SPDX) |
|---|---|
"""


def locked() -> list[str]:
    """Names of the packages that the image holds."""
    lines = (line for line in LOCK.read_text().splitlines() if re.match(r"[a-z0-9]", line))
    # A marker names another system: the image is Linux.
    return [line.partition("==")[0] for line in lines if "sys_platform" not in line]


def licence(package: PackageMetadata) -> str:
    """The SPDX expression of a package; empty where its metadata has none."""
    said = [package["License-Expression"] or "", package["License"] or ""]
    said += [
        line.rpartition(" :: ")[2] for line in package.get_all("Classifier") or () if line.startswith("License ::")
    ]
    for one in said:
        name = SPDX.get(one.strip(), one.strip())
        if name and all(word in LOOKED_AT for word in re.split(r" (?:AND|OR) ", name.strip("()"))):
            return name
    return ""


def rows() -> Iterator[str]:
    """One line for each package.

    Raises:
        SystemExit: a licence is missing or unknown.
    """
    for name in locked():
        package = metadata(name)
        spdx = READ_IN_ITS_FILE.get(name) or licence(package)
        if not spdx:
            said = package["License-Expression"] or package["License"] or package.get_all("Classifier")
            raise SystemExit(f"licenses: {name}: read its licence and add it to the tables above: {said!r}")
        yield f"| {name} | {spdx} |"


def main() -> int:
    """Write or compare; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    text = HEAD + "\n".join(rows()) + "\n"
    if check and (not TARGET.exists() or TARGET.read_text() != text):
        raise SystemExit(f"licenses: {TARGET} is out of date: run .venv/bin/python .ci/licenses.py")
    if not check:
        TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
