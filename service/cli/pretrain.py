"""The command `gma pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gma.service.cli.options import TextOption


def pretrain(
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder of texts, as `gma train` takes it; labels do not count, and .txt files "
            "will do. Or the prepared/ folder of another run.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run, made if need be.")],
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="TOML: [model] architecture, [training] schedule."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A tokenizer.json, in place of one learned from DIR."),
    ] = None,
    text: TextOption = "text",
    prepare: Annotated[
        bool,
        typer.Option(
            "--prepare", help="Make prepared/ and stop: what another machine needs for --data."
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")
    ] = False,
) -> None:
    """Train a base: a model without labels that learns to tell the next token of texts.

    `gma train --from` makes a classifier of it. The run's folder gets a log and the checkpoint that
    was best on the valid split, which is drawn from the texts if there is none. Progress goes to
    stderr, the checkpoint's name to stdout.

    \b
    Examples:
      gma pretrain --data texts --out runs/base
      gma train --data reviews --out runs/reviews --from runs/base/checkpoint
    """
    from gma.model.training.folder import resumable
    from gma.model.training.pretrain import pretrain as pretraining
    from gma.model.training.together import first

    try:
        made = pretraining(
            data,
            out,
            config,
            tokenizer=tokenizer,
            text=text,
            resume=resume,
            prepare_only=prepare,
        )
        if first():
            typer.echo(made)
    except KeyboardInterrupt:
        if resumable(out):
            typer.echo("gma: interrupted; the same command with --resume goes on", err=True)
        else:
            typer.echo("gma: interrupted before the first evaluation", err=True)
        raise
