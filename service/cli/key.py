"""The command `gma key`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def key(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Add the hash to it, for GMA_API_KEYS_FILE."),
    ] = None,
    name: Annotated[str, typer.Option(help="Whose key it is: a comment beside the hash.")] = "",
) -> None:
    """Make an API key: print it, and its hash, which is all that the service needs to know.

    With FILE only the key is printed, and the hash goes there. A key can't be read back from it.

    \b
    Examples:
      gma key
      gma key api-keys --name search-team
      GMA_API_KEYS_FILE=api-keys gma serve
    """
    from gma.service.http.keys import hash_of, new_key

    if not name.isprintable():
        raise ValueError("--name is one line of text")
    made = new_key()
    line = f"{hash_of(made)}  # {name}" if name else hash_of(made)
    typer.echo(made)
    if file is None:
        typer.echo(line)
        return
    with open(file, "a", encoding="utf-8", opener=_private) as opened:
        opened.write(line + "\n")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
