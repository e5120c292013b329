"""The gate on HTTP: one question, one answer, over TCP and a Unix socket, fast enough to stand before every order.

`orders_json` reads what is asked, `answers_json` writes what is answered, `desk` decides from the newest snapshot and
counts, `connection` speaks HTTP/1 on one connection, `server` listens. None of them knows rules, files, metrics
libraries or where a snapshot comes from. The listener has no credentials and changes nothing: it stays on loopback
and on a Unix socket, and sends no CORS headers, so that a web page may not read its answers.
"""

from sidecar.adapters.gate_http.connection import GateLimits
from sidecar.adapters.gate_http.desk import Admit, GateStatistics
from sidecar.adapters.gate_http.server import GateServer

__all__ = ["Admit", "GateLimits", "GateServer", "GateStatistics"]
