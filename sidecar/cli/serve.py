"""Commands about the program itself: run the sidecar, show it at work, say its version."""

import json
import os

import click

from sidecar.cli.context import Command, Context, examples, pass_context
from sidecar.version import __version__


@click.command(cls=Command, epilog=examples("killswitch serve", "killswitch serve --config ./config.yaml"))
@pass_context
def serve(context: Context) -> None:
    """Run the sidecar until it is told to stop."""
    from sidecar.app.main import serve as run  # the server's libraries take a quarter of a second

    if context.socket:
        os.environ["KILLSWITCH_SOCKET"] = context.socket
    raise SystemExit(run(context.config_path, os.environ))


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
