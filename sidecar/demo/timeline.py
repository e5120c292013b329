"""What the demo prints: one line a moment, with the seconds since the start, fit for 80 columns.

Colours where the output is a terminal, plain lines where it is not; the words are the same.
"""

import textwrap
import time
from collections.abc import Sequence
from typing import Final, TextIO

from rich.console import Console
from rich.text import Text

WIDTH: Final = 80
_BAR: Final = "| "
COMMAND_WIDTH: Final = WIDTH - len(_BAR)
"""What a command's own output may take."""
_MARGIN: Final = 20
_STYLES: Final = {
    "KILL": "bold red",
    "refused": "red",
    "ACTIVE": "bold green",
    "FAILED": "bold red",
    "breach": "yellow",
}


class Timeline:
    """Prints moments as they come.

    Args:
        out: where to; standard output by default.
    """

    def __init__(self, out: TextIO | None = None) -> None:
        self._console = Console(file=out, highlight=False, markup=False, soft_wrap=True)
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def title(self, text: str) -> None:
        """Print a heading."""
        self._print("")
        self._print(text, "bold")

    def moment(self, what: str, text: str) -> None:
        """Print that something happened now: a word of at most 9 letters, and a sentence."""
        first, *more = textwrap.wrap(text, WIDTH - _MARGIN) or [""]
        line = Text(f"{self.elapsed:6.1f}s  {what:<9}  ", style=_STYLES.get(what, "cyan"))
        self._console.print(line.append(first, style="default"))
        for rest in more:
            self._print(" " * _MARGIN + rest)

    def command_line(self, command: str) -> None:
        """Print a command as it is typed."""
        first, *more = textwrap.wrap(f"$ {command}", WIDTH - 2, break_on_hyphens=False, break_long_words=False)
        self._print(first, "bold")
        for rest in more:
            self._print(f"  {rest}", "bold")

    def command(self, command: str, output: str, exit_code: int, *, most_lines: int = 12) -> None:
        """Print a command that was run, what it answered (the first lines of it), and how it ended."""
        self.command_line(command)
        lines = [line.rstrip() for line in output.strip().splitlines()]
        shown = lines[:most_lines]
        for line in shown:
            self._wrapped(line)
        left_out = f"not all of its {len(lines)} lines, " if len(lines) > len(shown) else ""
        self._print(f"{_BAR}({left_out}exit code {exit_code})", "dim")

    def pause(self, seconds: float) -> None:
        """Give a person time to read; nobody waits where the output is no terminal."""
        if self._console.is_terminal:
            time.sleep(seconds)

    def lines(self, lines: Sequence[str]) -> None:
        """Print lines as they are."""
        for line in lines:
            self._print(line)

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Print a table of two columns."""
        width = max(len(name) for name, _ in facts)
        for name, value in facts:
            first, *more = textwrap.wrap(value, WIDTH - width - 4) or [""]
            self._print(f"  {name:<{width}}  {first}")
            for rest in more:
                self._print(f"  {'':<{width}}  {rest}")

    def _wrapped(self, line: str) -> None:
        indent = " " * (len(line) - len(line.lstrip()))
        for part in textwrap.wrap(line, COMMAND_WIDTH, subsequent_indent=f"{indent}  ") or [""]:
            self._print(_BAR + part)

    def _print(self, line: str, style: str = "default") -> None:
        self._console.print(Text(line, style=style))
