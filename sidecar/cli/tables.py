"""Answers on a terminal: tables, wrapped text and colour, in eighty columns where nobody says how wide it is."""

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Final, Literal

import click

from sidecar.cli.control import Reply

_LABEL_WIDTH: Final = 10


def width() -> int:
    """Columns to fill: the terminal's, but 80 for a pipe, behind which a terminal often stands (`kubectl exec`)."""
    if "COLUMNS" in os.environ or sys.stdout.isatty():
        return max(40, shutil.get_terminal_size((80, 24)).columns)
    return 80


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: frozenset[str] = frozenset()) -> None:
    """Print rows under their columns; cells that are too long are folded, never cut. `right` aligns numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in right else "left"
        table.add_column(column.upper(), justify=justify, overflow="fold", no_wrap=column in right)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(width=width(), markup=False, highlight=False, emoji=False, no_color=True, soft_wrap=False)
    with console.capture() as captured:
        console.print(table)
    # Trailing blanks would wrap on a narrower terminal.
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def print_field(label: str, text: str) -> None:
    """Print `Label     text`, wrapped under itself; nothing where the text is empty."""
    if not text:
        return
    indent = " " * _LABEL_WIDTH
    lines = textwrap.wrap(text, width=width() - _LABEL_WIDTH, break_on_hyphens=False)
    head, *rest = lines
    click.echo(f"{label:<{_LABEL_WIDTH}}{head}")
    for line in rest:
        click.echo(indent + line)


def print_banner(text: str, colour: str) -> None:
    """Print the first line, that must be understood without colour too."""
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    click.echo(click.style(f" {text} ", bold=True, fg="black", bg=colour) if coloured else text)


def print_body(reply: Reply) -> None:
    """Print an answer's body exactly as it came, ending in a line break."""
    click.echo(reply.text, nl=not reply.body.endswith(b"\n"))
