"""How far the audit of a switch had come, as Prometheus saw it: whoever cuts the files cannot cut that.

No answer is not taken for "all is well": who asks for this comparison gets it, or an error.
"""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from sidecar.adapters.history import HistoryError
from sidecar.cli.outcomes import Failure
from sidecar.cli.rules_live import history_of
from sidecar.core.errors import SettingsError
from sidecar.settings.config import load_settings
from sidecar.settings.promql import quote

if TYPE_CHECKING:
    from sidecar.settings.config import Settings

_INFO_LABELS: Final = "version, switch, mode, config_hash"

_QUERY: Final = (
    # The series has no switch label: killswitch_info of the same target says whose it is. Where a target was this
    # switch's alone, each of its samples counts; where another switch had the same address within the day, only
    # moments at which it was this one's, looked at every 5 s.
    "max("
    "(max_over_time(killswitch_audit_head_sequence[24h])"
    f" and ignoring({_INFO_LABELS}) max_over_time(killswitch_info{{{{switch={{switch}}}}}}[24h])"
    f" unless ignoring({_INFO_LABELS}) max_over_time(killswitch_info{{{{switch!={{switch}}}}}}[24h]))"
    " or max_over_time((killswitch_audit_head_sequence"
    f" and ignoring({_INFO_LABELS}) killswitch_info{{{{switch={{switch}}}}}})[24h:5s])"
    ")"
)


def seen_head(url: str, *, switch: str | None, config: Path, is_named: bool) -> int:
    """The highest sequence number of the last 24 h.

    Args:
        url: of the server.
        switch: whose audit; None takes the configuration's.
        config: the configuration file; its credentials are used if it names this server.
        is_named: whether the file was asked for, so that it has to be usable.

    Raises:
        Failure: it cannot be told.
    """
    settings = _settings(config, needed=is_named or switch is None)
    name = switch or (settings.switch.name if settings else "")
    try:
        history = history_of(url, settings.prometheus if settings else None)
        try:
            samples = history.instant(_QUERY.format(switch=quote(name)))
        finally:
            history.close()
    except HistoryError as error:
        raise Failure(f"The end of the audit was not compared: {error.message}") from None
    if not samples or not 0 <= samples[0].value < math.inf:
        raise Failure(
            f"The end of the audit was not compared: in the last 24 h this server has seen no "
            f"killswitch_audit_head_sequence of switch {name!r}; name another with --switch, or leave --prometheus out."
        )
    return int(samples[0].value)


def _settings(config: Path, *, needed: bool) -> "Settings | None":
    if not needed and not config.exists():
        return None
    try:
        return load_settings(config, os.environ)
    except SettingsError as error:
        if needed:
            raise Failure(
                f"Which switch is meant, or how to reach Prometheus, cannot be read; name it with --switch.\n{error}"
            ) from None
        click.echo(f"Warning: the configuration cannot be used, going on without it:\n{error}", err=True)
        return None
