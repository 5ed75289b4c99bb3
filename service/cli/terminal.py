"""What the commands print: tables, JSON, complaints, and how far a file has been read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

WIDE = 1 << 20
"""Characters of a line that nobody folds."""


def table(*columns: str) -> Table:
    """An empty table without lines. It has a header if a column has a name."""
    made = Table(show_header=any(columns), box=None, pad_edge=False)
    for name in columns:
        made.add_column(name, overflow="fold")
    return made


def print_table(made: Table) -> None:
    """Print a table on stdout, folded to fit if that is a terminal."""
    console = Console()
    if console.is_terminal:
        console.print(made)
        return
    console.width = Measurement.get(console, console.options.update(width=WIDE), made).maximum
    with console.capture() as printed:
        console.print(made)
    for line in printed.get().splitlines():
        typer.echo(line.rstrip())


def print_json(value: object) -> None:
    """Print a value on stdout as one line of JSON."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def printable(text: str) -> str:
    """A text with a sign in place of each character that a terminal would act on: names of files
    and what others wrote may have any."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def complain(error: Exception) -> None:
    """Print on stderr, in one line, what is wrong and with which file."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    print("gma:", printable(" ".join(text.split())), file=sys.stderr)


def watched(pieces: Iterable[bytes], title: str, size: int | None) -> Iterator[bytes]:
    """The same pieces, with a progress bar on stderr if that is a terminal.

    `size` is the bytes of all, if that is known.
    """
    with bar(title) as moved:
        done = 0
        moved(done, size)
        for piece in pieces:
            yield piece
            done += len(piece)
            moved(done, size)


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on stderr, if that is a terminal: a function that is told how many bytes are
    done, and how many there are if that is known."""
    console = Console(stderr=True)
    described = TextColumn("{task.description}", markup=False)
    columns = described, BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(printable(title), total=None)
        yield lambda done, size: progress.update(task, completed=done, total=size)
