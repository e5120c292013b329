"""The operations side over HTTP: metrics, health, and the API by which people and programs watch, stop and release.

One set of answers behind two doors: a TCP listener that asks for credentials, and the control socket whose file
permissions are the credential. Decides nothing about the switch; all of that is asked of a `Desk`.
"""

from sidecar.adapters.operations_http.desk import Desk, ReceivedAlert, Waive
from sidecar.adapters.operations_http.server import OperationsLimits, OperationsServer
from sidecar.adapters.operations_http.tokens import Role, Token, TokensFile
from sidecar.adapters.operations_http.web_access import WebAccess
from sidecar.adapters.operations_http.webhook import WebhookAccess

__all__ = [
    "Desk",
    "OperationsLimits",
    "OperationsServer",
    "ReceivedAlert",
    "Role",
    "Token",
    "TokensFile",
    "Waive",
    "WebAccess",
    "WebhookAccess",
]
