"""What every command may be told and where it finds the sidecar: the options common to all, and the places they name.

Reads the configuration only for the few paths it needs, without judging the rest of it: a file that somebody broke
must not keep anybody from stopping the running sidecar.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from sidecar.cli.control import Reply, Server, Unreachable
from sidecar.cli.outcomes import Failure, unreachable

DEFAULT_CONFIG: Final = "/etc/killswitch/config.yaml"
DEFAULT_CONTROL: Final = "/run/killswitch-control/control.sock"
DEFAULT_GATE: Final = "/run/killswitch/gate.sock"
DEFAULT_STORAGE: Final = "/var/lib/killswitch"


@dataclass(kw_only=True)
class Context:
    """The common options, as far as given; the innermost place wins."""

    output: str = "table"
    socket: str | None = None
    config: str | None = None
    _read: dict[str, Any] = field(default_factory=dict)
    _told: str | None = None

    @property
    def as_json(self) -> bool:
        """Whether answers are printed as JSON."""
        return self.output == "json"

    @property
    def config_path(self) -> str:
        """The configuration file: `--config`, `KILLSWITCH_CONFIG`, or the default."""
        return self.config or os.environ.get("KILLSWITCH_CONFIG") or DEFAULT_CONFIG

    @property
    def command(self) -> str:
        """How this very sidecar is called again, for the commands that answers suggest."""
        given = [f"--{name} {value}" for name in ("socket", "config") if (value := getattr(self, name))]
        return " ".join(["killswitch", *given])

    def control(self) -> Server:
        """The control socket of the sidecar.

        Raises:
            Failure: `--config` names a file that cannot be read, so that another sidecar might be meant.
        """
        path = self.socket or os.environ.get("KILLSWITCH_SOCKET")
        return Server(socket=path or self._socket(("control", "socket"), DEFAULT_CONTROL))

    def gate(self) -> Server:
        """The gate's Unix socket; raises as `control` does."""
        return Server(socket=self._socket(("gate", "socket"), DEFAULT_GATE))

    def storage_dir(self) -> Path:
        """The state folder; raises as `control` does."""
        return Path(self._configured(("storage", "dir")) or DEFAULT_STORAGE)

    def ask(
        self, method: str, path: str, body: object = None, *, effect: str = "", timeout: float | None = None
    ) -> Reply:
        """Ask the running sidecar.

        Raises:
            Failure: nobody answered; `effect` is what the message says first.
        """
        more: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        try:
            return self.control().ask(method, path, body, **more)
        except Unreachable as error:
            raise unreachable(error, effect=effect) from None

    def _socket(self, key: tuple[str, str], default: str) -> str:
        configured = self._configured(key)
        if configured:
            return configured
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        if runtime and not os.path.lexists(default):
            fallback = Path(runtime, *Path(default).parts[-2:])
            if fallback.exists():
                return str(fallback)
        return default

    def _configured(self, key: tuple[str, str]) -> str | None:
        """One path of the configuration, relative ones from its folder; None where it is not written there."""
        path = Path(self._config_in_force())
        if _is_without(path, key[0]):
            return None
        section = self._document(path).get(key[0])
        value = section.get(key[1]) if isinstance(section, dict) else None
        return str(path.absolute().parent / value) if isinstance(value, str) and value else None

    def _config_in_force(self) -> str:
        """The file that says where things are; of a sidecar named by its control socket alone, its own.

        Without this, `--socket` would choose one sidecar and `check` ask the gate of another, at the default path.
        """
        named = self.config or os.environ.get("KILLSWITCH_CONFIG")
        if named or not (self.socket or os.environ.get("KILLSWITCH_SOCKET")) or os.path.lexists(DEFAULT_CONFIG):
            return self.config_path
        if self._told is None:
            self._told = self._running_config() or DEFAULT_CONFIG
        return self._told

    def _running_config(self) -> str | None:
        try:
            document = self.control().ask("GET", "/api/v1/status").document()
        except Unreachable:
            return None
        config = document.get("config")
        path = config.get("path") if isinstance(config, dict) else None
        return path if isinstance(path, str) and Path(path).is_absolute() else None

    def _document(self, path: Path) -> dict[str, Any]:
        if str(path) not in self._read:
            self._read[str(path)] = self._parsed(path)
        document: dict[str, Any] = self._read[str(path)]
        return document

    def _parsed(self, path: Path) -> dict[str, Any]:
        if not path.exists() and self.config is None and "KILLSWITCH_CONFIG" not in os.environ:
            return {}
        from sidecar.settings.yaml_source import read_file

        document = read_file(path, os.environ)
        if isinstance(document.data, dict):
            return document.data
        problem = str(document.problems[0]) if document.problems else f"{path} is no mapping"
        if self.config is not None:
            raise Failure(f"Nothing was done: which sidecar is meant cannot be read from --config.\n{problem}")
        click.echo(f"Warning: {problem}; going on with the default paths.", err=True)
        return {}


def _is_without(path: Path, section: str) -> bool:
    """Whether the file can be read and nowhere holds the word; saves most calls the parser, a fifth of their time."""
    try:
        return section.encode() not in path.read_bytes()
    except OSError:
        return False


Decorated = Callable[..., Any]


def pass_context(function: Decorated) -> Decorated:
    """Hand the common options to a command as its first argument."""
    return click.make_pass_decorator(Context, ensure=True)(function)


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value is not None:
        setattr(context.ensure_object(Context), str(parameter.name), value)


def _common_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["-o", "--output"],
            type=click.Choice(["table", "json"]),
            expose_value=False,
            callback=_keep,
            help="How to print answers.  [default: table]",
        ),
        click.Option(
            ["--socket"],
            metavar="PATH",
            expose_value=False,
            callback=_keep,
            help="Control socket of the sidecar.  [env: KILLSWITCH_SOCKET; default: the configuration's]",
        ),
        click.Option(
            ["--config"],
            metavar="FILE",
            expose_value=False,
            callback=_keep,
            help=f"Configuration file.  [env: KILLSWITCH_CONFIG; default: {DEFAULT_CONFIG}]",
        ),
    ]


def examples(*commands: str) -> str:
    """Make the end of a command's help: the commands as they are typed, one a line."""
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])


class Command(click.Command):
    """A command that takes the common options, wherever they stand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(_common_options())


class Group(click.Group):
    """A group whose commands, and itself, take the common options."""

    command_class = Command
    group_class = type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(_common_options())
