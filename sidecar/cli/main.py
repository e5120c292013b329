"""The `killswitch` command: finds the module of each subcommand and imports only that one."""

import importlib
import sys
from typing import Any, Final

import click

from sidecar.cli.context import Group
from sidecar.version import __version__

_COMMANDS: Final = {
    "serve": "sidecar.cli.serve:serve",
    "demo": "sidecar.cli.serve:demo",
    "status": "sidecar.cli.status:status",
    "trigger": "sidecar.cli.switching:trigger",
    "recover": "sidecar.cli.switching:recover",
    "approve": "sidecar.cli.switching:approve",
    "cancel-recovery": "sidecar.cli.switching:cancel_recovery",
    "audit": "sidecar.cli.audit:audit",
    "health": "sidecar.cli.status:health",
    "live": "sidecar.cli.live:live",
    "check": "sidecar.cli.check:check",
    "rules": "sidecar.cli.rules:rules",
    "hash-code": "sidecar.cli.codes:hash_code",
    "version": "sidecar.cli.serve:version",
}
"""In the order of help: name of the command to where it is defined."""


class _LazyGroup(Group):
    """Commands that are imported when they are named, so that `status` does not wait for the others."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click calls it with the context
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - as above
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


_EPILOG: Final = """\b
Exit codes:
  0  done, allowed, ACTIVE or DISABLED
  1  error: nobody answers, a bad file, a check failed
  2  wrong usage
  3  blocked: check denied, status KILLED, RECOVERING or not ready, health unhealthy
  4  refused: not allowed, wrong code, locked out, not possible in this state

\b
Examples:
  killswitch status
  killswitch trigger --reason "fat finger in AAPL" --by alice
  killswitch recover --reason "feed is back, positions reconciled" --by bob
  killswitch audit --since 24h --output json
"""


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EPILOG,
)
@click.version_option(__version__, message="killswitch-sidecar %(version)s")
def killswitch() -> None:
    """Stop trading, see why it is stopped, and let it start again.

    Commands act on the running sidecar through its control socket, print what it then reports, and fail if they cannot.
    """


def main(argv: list[str] | None = None) -> Any:
    """Run the command line and end the process with its exit code."""
    # A terminal that cannot show a character must not keep anybody from seeing the rest.
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    return killswitch.main(args=argv, prog_name="killswitch")


if __name__ == "__main__":
    main()
