"""The command `gma tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gma.service.cli.options import TextOption


def tokenizer(
    data: Annotated[
        list[str],
        typer.Option(
            metavar="DIR=MB",
            help="Folder of texts, as `gma pretrain` takes it, and how much of it to learn from; "
            "several times for a mix.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The tokenizer.json to write.")],
    vocab_size: Annotated[int, typer.Option(min=256, help="Tokens, at most.")] = 16384,
    text: TextOption = "text",
) -> None:
    """Learn a tokenizer from a mix of texts, for `gma pretrain --tokenizer`.

    Data that have less than their MB are read several times, so that what is rare can count for
    more. Runs of one character have tokens whatever the texts.

    \b
    Example:
      gma tokenizer --data books=30 --data code=5 --data messages=10 --out tokenizer.json
    """
    from gma.model.training.mix import learn

    shares = [_share(each) for each in data]
    typer.echo(learn(shares, out, vocab_size, text))


def _share(given: str) -> tuple[Path, float]:
    folder, _, size = given.rpartition("=")
    try:
        megabytes = float(size)
    except ValueError:
        megabytes = 0.0
    if not folder or not 0 < megabytes < 1e6:
        raise typer.BadParameter(f"{given} is not DIR=MB, such as books=30")
    return Path(folder), megabytes
