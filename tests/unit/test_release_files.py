"""What a release needs beside the code is there and true."""

import re
import subprocess
import sys
from pathlib import Path

from sidecar.version import __version__

ROOT = Path(__file__).parents[2]


def test_the_list_of_licences_is_what_the_locked_packages_say() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "licenses.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_there_are_release_notes_for_this_version() -> None:
    changelog = (ROOT / "docs" / "CHANGELOG.md").read_text()
    notes = re.search(rf"^## \[{re.escape(__version__)}\] - (?:unreleased|\d{{4}}-\d\d-\d\d)$", changelog, re.MULTILINE)
    assert notes


def test_every_file_that_releasing_names_is_there() -> None:
    text = (ROOT / "docs" / "RELEASING.md").read_text()
    named = [name for name in re.findall(r"`([\w./-]+)`", text) if (ROOT / name.partition("/")[0]).exists()]
    assert {"Dockerfile", "sidecar/version.py"} <= set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []
