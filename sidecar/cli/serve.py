"""Commands about the program itself: run the sidecar, show it at work, say its version."""

import json
import os
from typing import Final

import click

from sidecar.cli.context import Command, Context, examples, pass_context
from sidecar.version import __version__

LONGEST_LINGER: Final = 3600.0
"""Seconds; longer than any pod's termination grace period makes sense."""


def _linger(_context: click.Context, _parameter: click.Parameter, value: str) -> float:
    from sidecar.settings.quantities import parse_duration  # pulls in pydantic, which other commands do without

    try:
        seconds = parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if seconds > LONGEST_LINGER:
        raise click.BadParameter(f"{value!r} is longer than an hour; a pod is killed long before")
    return seconds


@click.command(
    cls=Command,
    epilog=examples("killswitch serve", "killswitch serve --config ./config.yaml", "killswitch serve --linger 20s"),
)
@click.option(
    "--linger",
    metavar="DURATION",
    default="0s",
    show_default=True,
    callback=_linger,
    help="Go on for so long after the first SIGTERM: a bot that flattens still asks the gate.",
)
@pass_context
def serve(context: Context, *, linger: float) -> None:
    """Run the sidecar until it is told to stop."""
    from sidecar.app.main import serve as run  # the server's libraries take a quarter of a second

    if context.socket:
        os.environ["KILLSWITCH_SOCKET"] = context.socket
    raise SystemExit(run(context.config_path, os.environ, linger=linger))


@click.command(cls=Command, epilog=examples("killswitch demo --keep-running"))
@click.option("--keep-running", is_flag=True, help="Leave the sidecar of the demo running at the end, until Ctrl-C.")
@pass_context
def demo(_context: Context, *, keep_running: bool) -> None:
    """See a switch fire, block and recover, on this machine alone."""
    from sidecar.demo.story import run  # starts a sidecar of its own

    raise SystemExit(run(keep_running=keep_running))


@click.command(cls=Command)
@pass_context
def version(context: Context) -> None:
    """Print the version."""
    click.echo(json.dumps({"version": __version__}) if context.as_json else f"killswitch-sidecar {__version__}")
