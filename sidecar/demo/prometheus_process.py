"""The Prometheus of the demo: found on the path, configured to look every second, and asked whether it has looked.

Knows nothing of the story; the sidecar reads this Prometheus as it would any other.
"""

import http.client
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import quote

SCRAPE_INTERVAL: Final = "1s"
_ASK_SECONDS: Final = 2.0


def find(environ: Mapping[str, str]) -> str | None:
    """Path of the installed program; None where there is none."""
    return shutil.which("prometheus", path=environ.get("PATH", ""))


def version(program: str, environ: Mapping[str, str]) -> str:
    """Its version, as 2.42.0; `unknown` where it does not say."""
    try:
        done = subprocess.run(  # noqa: S603 - the program that is about to be started anyway
            [program, "--version"], capture_output=True, text=True, env=dict(environ), timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    words = (done.stdout or done.stderr).split()
    return words[2].partition("+")[0] if words[:2] == ["prometheus,", "version"] else "unknown"


def config(targets: Mapping[str, str]) -> str:
    """A configuration that scrapes each `host:port` as the job of its name."""
    jobs = [
        f"  - job_name: {name}\n    static_configs: [{{targets: ['{target}']}}]\n" for name, target in targets.items()
    ]
    head = f"global: {{scrape_interval: {SCRAPE_INTERVAL}, scrape_timeout: {SCRAPE_INTERVAL}}}\nscrape_configs:\n"
    return head + "".join(jobs)


def command(program: str, *, config_file: Path, data: Path, port: int) -> list[str]:
    """How it is started on loopback."""
    return [
        program,
        f"--config.file={config_file}",
        f"--storage.tsdb.path={data}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]


def has_seen(port: int, metric: str) -> bool:
    """Whether it answers, and has a sample of this metric."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ASK_SECONDS)
    try:
        connection.request("GET", f"/api/v1/query?query={quote(metric)}")
        answer = json.loads(connection.getresponse().read())
        return bool(answer["data"]["result"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return False
    finally:
        connection.close()
