"""Starts and stops the sidecar as a process: configuration, signals, and exit codes."""

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Mapping

import uvloop

from sidecar.adapters.probes import ConnectivityProbes
from sidecar.adapters.process import Watchdog
from sidecar.app.application import AnotherSidecar, Application
from sidecar.app.clock import SystemClock
from sidecar.app.descriptors import raise_limit
from sidecar.app.logs import Logs
from sidecar.core.errors import KillswitchError, RuleFileError, SettingsError
from sidecar.settings.config import CONFIG_VARIABLE, DEFAULT_CONFIG, Settings, load_settings
from sidecar.settings.everything import with_rules

log = logging.getLogger("sidecar.main")

_SWITCH_SECONDS = 0.0005
"""How long a thread may keep the interpreter from the loop; Python's own 5 ms would show in one order of a hundred."""


def serve(config_path: str | None, environ: Mapping[str, str], *, linger: float = 0.0) -> int:
    """Run the sidecar until SIGTERM or SIGINT; return 0 after an orderly stop, 1 where it could not start.

    Args:
        config_path: None looks where `load_settings` says.
        environ: the environment to take variables from.
        linger: seconds that everything goes on after the first SIGTERM. Containers of a pod get it all at once, and a
            bot that flattens then still has to ask. A second signal, or SIGINT, ends it at once.
    """
    try:
        settings = load_settings(config_path, environ)
    except SettingsError as error:
        error = with_rules(error, config_path or environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG, environ)
        print(f"killswitch: the configuration cannot be used:\n{error}", file=sys.stderr)  # noqa: T201 - no logs yet
        return 1
    raise_limit()
    logs = Logs(level=settings.logging.level, form=settings.logging.format)
    try:
        # Threads write metrics and files: let the loop, which answers the gate, have the interpreter back soon.
        sys.setswitchinterval(_SWITCH_SECONDS)
        return uvloop.run(_serve(settings, environ, logs, linger))
    finally:
        logs.stop()


async def _serve(settings: Settings, environ: Mapping[str, str], logs: Logs, linger: float) -> int:
    watchdog, connectivity = Watchdog(), ConnectivityProbes()
    try:
        app = Application(
            settings=settings,
            environ=environ,
            clock=SystemClock(),
            probes={"watchdog": watchdog.probe, "connectivity": connectivity.probe},
            dropped_log_lines=lambda: logs.dropped,
        )
        _handle_signals(app, linger)
        # What was imported stays: to look for garbage among it would hold up the gate for some 50 ms each time.
        gc.freeze()
        await app.run()
    except (AnotherSidecar, KillswitchError) as error:
        log.critical("sidecar.cannot_start", extra={"fields": {"error": str(error)}})
        return 1
    except OSError as error:
        log.critical("sidecar.cannot_listen", extra={"fields": {"error": str(error)}})
        return 1
    finally:
        await connectivity.close()
    return 0


def _handle_signals(app: Application, linger: float) -> None:
    loop = asyncio.get_running_loop()
    background: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        try:
            await app.reloader.reload(by="SIGHUP")
        except (SettingsError, RuleFileError):
            log.debug("config.reload_refused")  # logged with its reasons where it was raised

    def on_hangup() -> None:
        task = asyncio.create_task(reload(), name="reload on SIGHUP")
        background.add(task)
        task.add_done_callback(background.discard)

    def on_terminate() -> None:
        loop.add_signal_handler(signal.SIGTERM, app.stop)
        log.info("sidecar.lingering", extra={"fields": {"seconds": linger}})
        loop.call_later(linger, app.stop)

    loop.add_signal_handler(signal.SIGTERM, on_terminate if linger > 0 else app.stop)
    loop.add_signal_handler(signal.SIGINT, app.stop)
    loop.add_signal_handler(signal.SIGHUP, on_hangup)
