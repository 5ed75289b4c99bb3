"""How far training is, on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gma.model.training.together import first


def on_stderr() -> Progress:
    """Make bars that are shown if stderr is a terminal; its console prints there in any case.

    Of several processes only the first has anything to say.
    """
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True, quiet=not first())
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        console=console,
        disable=not (first() and console.is_terminal),
    )
