"""The cast (tests/cast.py), for the end-to-end tests."""

from tests.cast import (  # noqa: F401 - fixtures are used by their names
    _programs,
    case,
    drawdown,
    exporter,
    heartbeat,
    killswitch,
    make_sidecar,
    own_prometheus,
    shared_prometheus,
    sidecar,
    wait,
)
from tests.e2e.messengers import alertmanager, guarded, people  # noqa: F401 - as above
