"""Finds the run folders: as configured, or under `$XDG_RUNTIME_DIR` where the default ones cannot be made."""

import os
from collections.abc import Mapping
from pathlib import Path

DEFAULT_ROOT = Path("/run")
SHARED, PRIVATE = 0o755, 0o700
"""Modes of the run folders: whoever reaches the private one owns the switch."""


def run_path(wanted: str, environ: Mapping[str, str]) -> Path:
    """Where a socket or page of the run folders goes.

    Only the defaults under /run move, and only to the same names under `$XDG_RUNTIME_DIR`; any other path is taken as
    written.
    """
    path = Path(wanted)
    runtime = environ.get("XDG_RUNTIME_DIR")
    if not runtime or path.parent.parent != DEFAULT_ROOT or not path.parent.name.startswith("killswitch"):
        return path
    try:
        path.parent.mkdir(mode=PRIVATE if path.parent.name.endswith("-control") else SHARED, exist_ok=True)
    except OSError:
        return Path(runtime) / path.parent.name / path.name
    return path if os.access(path.parent, os.W_OK | os.X_OK) else Path(runtime) / path.parent.name / path.name
