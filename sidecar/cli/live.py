"""`killswitch live`: liveness for what starts a program and looks at its exit code, as a container engine does."""

import click

from sidecar.cli.context import Command, Context, examples, pass_context
from sidecar.cli.outcomes import Exit
from sidecar.cli.words import one_line


@click.command(cls=Command, epilog=examples("killswitch live"))
@pass_context
def live(context: Context) -> None:
    """Say whether the sidecar's process lives: for HEALTHCHECK and exec probes, not for whether trading is allowed.

    A kill or a dead Prometheus changes nothing here. Ends with 0 while it lives, 1 once it should be restarted or does
    not answer.
    """
    reply = context.ask("GET", "/livez")
    click.echo("alive" if reply.ok else one_line(reply.document().get("detail") or reply.text[:200]))
    raise SystemExit(Exit.DONE if reply.ok else Exit.ERROR)
