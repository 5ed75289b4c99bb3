"""The command `gma train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    data: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder of train*.jsonl and valid*.jsonl, or .jsonl.zst."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run, made if need be.")],
    config: Annotated[
        Path, typer.Option(metavar="FILE", help="TOML: [model] architecture, [training] schedule.")
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")
    ] = False,
) -> None:
    """Train a classifier of your own documents.

    A line of the data is one document: {"text": "...", "label": "..."}. The run's folder gets a
    log and the checkpoint that was best on the valid split, which every other command takes.

    \b
    Examples:
      gma train --data reviews --out runs/reviews --config small.toml
      gma train --data reviews --out runs/reviews --config small.toml --resume
      gma classify --checkpoint runs/reviews/checkpoint review.txt
    """
    from gma.model.training import train as training

    typer.echo(training.train(data, out, config, resume=resume))
