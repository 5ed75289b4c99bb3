"""The commands `gma push` and `gma pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Its folder.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="OWNER/MODEL on the hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="A model that is made now is seen by you alone.")
    ] = False,
    licence: Annotated[
        str | None, typer.Option("--license", help="Told by the card, such as apache-2.0.")
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Told by the card, such as en; may be repeated.")
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Told by the card, OWNER/DATA; may be repeated.")
    ] = None,
) -> None:
    """Upload a checkpoint to the Hugging Face hub.

    Its config.json, model.safetensors, tokenizer.json, README.md and training.toml, nothing else.
    The commit's address goes to stdout. HF_TOKEN, or `hf auth login`, says who you are.

    \b
    Example:
      gma push runs/reviews/checkpoint me/reviews --license apache-2.0 --language en
    """
    from gma.model import hub

    typer.echo(
        hub.push(
            checkpoint,
            name,
            private=private,
            license=licence,
            languages=language or (),
            datasets=dataset or (),
        )
    )


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="OWNER/MODEL on the hub.")],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder to make; it must not be there yet.")
    ],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit. [default: main]")
    ] = None,
) -> None:
    """Download a checkpoint from the Hugging Face hub.

    Only the files that `gma push` uploads are asked for: no code comes with them.

    \b
    Example:
      gma pull me/reviews --out reviews
      gma classify --checkpoint reviews review.txt
    """
    from gma.model import hub

    typer.echo(hub.pull(name, out, revision=revision))
