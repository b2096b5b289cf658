"""Tables, lines and progress for people.

With rich on a terminal; aligned plain text elsewhere (a pipe, a file, an environment without rich), which is never cut
to a width; Markdown on a page.  rich is imported when the first table is shown on a terminal, and not before.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

#: What an entry can be, and how rich shows it.
_STYLES = {"": "", "best": "bold", "good": "green", "bad": "red", "warning": "yellow", "quiet": "dim"}


@dataclass(frozen=True)
class Entry:
    """Text of one place in a table, and what it is: a key of ``_STYLES``."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Table:
    """A title (or none), the heads of the columns, rows, and the rows before which a new group begins.

    ``labels`` columns at the left are text, the others numbers.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    labels: int
    groups: tuple[int, ...] = ()


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str | Entry]], labels: int | None = None) -> Table:
    """A table of strings and entries; all columns are text if ``labels`` isn't given."""
    entries = tuple(tuple(e if isinstance(e, Entry) else Entry(e) for e in row) for row in rows)
    return Table(title, tuple(heads), entries, len(heads) if labels is None else labels)


def as_plain(shown: Table) -> list[str]:
    """Aligned lines, the title first."""
    rows = [shown.heads, *([e.text for e in row] for row in shown.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [shown.title] if shown.title else []
    for number, row in enumerate(rows, start=-1):
        if number in shown.groups:
            lines.append("")
        places = (
            text.ljust(width) if column < shown.labels else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(places).rstrip())
    return lines


def as_markdown(shown: Table) -> list[str]:
    """Lines of the table without its title; what is best of a row is bold."""
    rule = ["---" if number < shown.labels else "---:" for number in range(len(shown.heads))]
    rows = [[f"**{e.text}**" if e.style == "best" else e.text for e in row] for row in shown.rows]
    return ["| " + " | ".join(cells) + " |" for cells in (shown.heads, rule, *rows)]


class Screen:
    """Where a command shows what it found: standard output, or another stream.

    ``fancy`` is whether that is a terminal and rich is there; ``width`` is its columns, None where nothing limits them.
    """

    def __init__(self, stream: TextIO | None = None):
        stream = stream or sys.stdout
        self.fancy = stream.isatty() and importlib.util.find_spec("rich") is not None
        self._stream = stream
        if self.fancy:
            from rich.console import Console

            self.console = Console(file=stream, highlight=False)

    @property
    def width(self) -> int | None:
        return self.console.width if self.fancy else None

    def line(self, text: str = "", style: str = "", whole: bool = False) -> None:
        """A line, which a terminal wraps between words; a ``whole`` one, with a command or a path, can be copied."""
        if self.fancy:
            self.console.print(text, style=_STYLES[style], markup=False, soft_wrap=whole)
        else:
            print(text, file=self._stream, flush=True)

    def table(self, shown: Table) -> None:
        """A table with a blank line after it."""
        if not self.fancy:
            self.line("\n".join(as_plain(shown)) + "\n")
            return
        from rich import box
        from rich.table import Table as Rich
        from rich.text import Text

        if shown.title:
            self.line(shown.title, "best")
        drawn = Rich(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for number, head in enumerate(shown.heads):
            drawn.add_column(
                Text(head, no_wrap=True), justify="left" if number < shown.labels else "right", overflow="fold"
            )
        for number, row in enumerate(shown.rows):
            if number in shown.groups:
                drawn.add_section()
            drawn.add_row(*(Text(e.text, _STYLES[e.style]) for e in row))
        self.console.print(drawn)
        self.line()


def interruptible(command: Callable[[], int]) -> int:
    """The exit status of a command; also where a user stops it, or a pipe (``… | head``) isn't read to its end."""
    try:
        return command()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is written at exit
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT


@contextmanager
def progress(total: int) -> Iterator[Progress]:
    """Progress of long work on standard error: a bar on a terminal, elsewhere a line for each step."""
    screen = Screen(sys.stderr)
    if not screen.fancy:
        yield Progress(screen)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=screen.console, transient=True) as bar:
        yield Progress(None, bar, bar.add_task("", total=total))


@dataclass(frozen=True)
class Progress:
    """What long work tells of itself, made by :func:`progress`; nothing, if made without arguments."""

    _screen: Screen | None = None
    _bar: object = None
    _task: int = 0

    def begins(self, what: str) -> None:
        """A step begins."""
        if self._bar is not None:
            self._bar.update(self._task, description=what)
        elif self._screen is not None:
            self._screen.line(what)

    def ends(self) -> None:
        """A step has ended."""
        if self._bar is not None:
            self._bar.advance(self._task)
