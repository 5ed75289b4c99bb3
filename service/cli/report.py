"""The command `gma report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `gma train` made.")],
) -> None:
    """Write the report of a training run: how it learned, how good it is, and where it errs.

    It is one HTML file, report.html in the run's folder, that needs nothing else. `gma train` ends
    with it; of a run that was interrupted, or that goes on, this makes it at any time.

    \b
    Example:
      gma report runs/reviews
    """
    from gma.model.training.report import page

    typer.echo(page.write(run))
