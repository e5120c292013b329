"""The charts' schemas and READMEs follow from values.yaml and the sidecar's schemas."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_schemas_and_readmes_say_what_values_yaml_says() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "charts.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
