"""The command `gma train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gma.service.cli.options import LabelOption, LabelsOption, TextOption


def train(
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder of train and valid: .jsonl, .csv, .tsv, .parquet, a folder for each "
            "label, or a data set that `datasets` saved. A file is train alone.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run, made if need be.")],
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TOML: [model] architecture, [training] schedule. Without it they are chosen by "
            "the data.",
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="CHECKPOINT",
            help="Begin from this checkpoint's backbone and tokenizer: one of `gma pretrain`, or "
            "any other. Labels are new. [default: without --config, the base that comes with gma]",
        ),
    ] = None,
    text: TextOption = "text",
    label: LabelOption = "label",
    labels: LabelsOption = "labels",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")
    ] = False,
) -> None:
    """Train a classifier of your own documents.

    A line of the data is one document: {"text": "...", "label": "..."}; or, where it may have
    any number of labels, {"text": "...", "labels": ["...", "..."]}. The run's folder gets a log and
    the checkpoint that was best on the valid split, which every other command takes. What is odd
    about the data, progress and final figures go to stderr, the checkpoint's name to stdout.

    \b
    Examples:
      gma train --data reviews --out runs/reviews
      gma train --data reviews --out runs/reviews --resume
      gma train --data reviews --out runs/reviews --config small.toml
      gma train --data reviews --out runs/reviews --from runs/base/checkpoint
      gma train --data r.csv --text review --label stars --out runs/r
      gma classify --checkpoint runs/reviews/checkpoint review.txt
    """
    from gma.model.training import train as training
    from gma.model.training.folder import resumable
    from gma.model.training.labelled import Fields
    from gma.model.training.together import first

    names = Fields(text, label, labels)
    try:
        made = training.train(data, out, config, base=base, resume=resume, names=names)
        if first():
            typer.echo(made)
    except KeyboardInterrupt:
        again = f"gma train --data {data} --out {out}"
        again += f" --config {config}" if config else ""
        again += f" --from {base}" if base else ""
        again += "".join(
            f" --{name} {given}" for name, given in names._asdict().items() if given != name
        )
        if resumable(out):
            typer.echo(f"gma: interrupted; to go on: {again} --resume", err=True)
        else:
            typer.echo(f"gma: interrupted before the first evaluation; again: {again}", err=True)
        raise
