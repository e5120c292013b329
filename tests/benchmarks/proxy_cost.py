"""What an order costs more through Envoy, nginx and Caddy: run by hand, `python -m tests.benchmarks.proxy_cost`.

One client, one kept connection each, in turn: straight to the venue's TLS, through the proxy on a read (no question
asked), and through the proxy as an order (the gate is asked). Medians and 99th percentiles of `CALLS` requests each.
"""

import http.client
import ssl
import statistics
import tempfile
import time
from pathlib import Path

from tests.kubernetes.proxies import NAMES
from tests.kubernetes.test_proxies import ORDER, Stage

CALLS = 3000


class _Folders:
    """Gives the stage a folder as pytest would."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def mktemp(self, name: str) -> Path:
        made = self._folder / name
        made.mkdir()
        return made


def main() -> None:
    """Measure and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(_Folders(folder))  # type: ignore[arg-type]
        try:
            stage.sidecar.wait_gate(200, "active")
            _measure(stage)
        finally:
            stage.close()


def _measure(stage: Stage) -> None:
    # Host name and certificate are the proxies' to check; here only the cost of TLS counts.
    unchecked = ssl._create_unverified_context()
    straight = http.client.HTTPSConnection("127.0.0.1", stage.venue.port, context=unchecked)
    ways = {"straight to the venue": (straight, "POST", "/api/v1/orders")}
    for name in NAMES:
        port = stage.straight[name].port
        ways[f"{name}, ungated read"] = (http.client.HTTPConnection("127.0.0.1", port), "GET", "/api/v1/market/AAPL")
        ways[f"{name}, order"] = (http.client.HTTPConnection("127.0.0.1", port), "POST", "/api/v1/orders")
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(CALLS):
        for way, (connection, method, target) in ways.items():
            begun = time.perf_counter()
            connection.request(method, target, ORDER if method == "POST" else None)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, (way, answer.status)
            times[way].append((time.perf_counter() - begun) * 1e3)
        if len(stage.venue.arrivals) > 10_000:
            stage.venue.arrivals.clear()
    for way, taken in times.items():
        cuts = statistics.quantiles(taken, n=100)
        print(f"| {way} | {cuts[49]:.2f} | {cuts[98]:.2f} |")


if __name__ == "__main__":
    main()
