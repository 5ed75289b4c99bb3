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
    documents_per_minute: Annotated[
        float | None,
        typer.Option(help="What it may send, 0 for any number; else GMA_KEY_DOCUMENTS_PER_MINUTE."),
    ] = None,
    bytes_per_day: Annotated[
        str | None,
        typer.Option(help="What it may send, as 1GiB, 0 for any; else GMA_KEY_BYTES_PER_DAY."),
    ] = None,
) -> None:
    """Make an API key: print it, and its hash, which is all that the service needs to know.

    With FILE only the key is printed, and the hash goes there. A key can't be read back from it.

    \b
    Examples:
      gma key
      gma key api-keys --name search-team
      gma key api-keys --name trial --documents-per-minute 60 --bytes-per-day 1GiB
      GMA_API_KEYS_FILE=api-keys gma serve
    """
    from pydantic import ValidationError

    from gma.model.config import problems
    from gma.service.gateway.allowance import Allowance
    from gma.service.http.keys import hash_of, new_key

    if not name.isprintable():
        raise ValueError("--name is one line of text")
    given = {"documents_per_minute": documents_per_minute, "bytes_per_day": bytes_per_day}
    allowed = {limit: value for limit, value in given.items() if value is not None}
    try:
        allowance = Allowance.model_validate(allowed)
    except ValidationError as error:
        raise ValueError(problems(error)) from None
    made = new_key()
    words = [hash_of(made), *(_written(limit, getattr(allowance, limit)) for limit in allowed)]
    line = " ".join(words) + (f"  # {name}" if name else "")
    if file is None:
        typer.echo(made)
        typer.echo(line)
        return
    with open(file, "a+b", opener=_private) as opened:
        if opened.seekable() and opened.tell():
            opened.seek(-1, os.SEEK_END)
            if opened.read() != b"\n":
                opened.write(b"\n")
        opened.write(line.encode() + b"\n")
    typer.echo(made)


def _written(limit: str, value: float) -> str:
    return f"{limit}={value:d}" if isinstance(value, int) else f"{limit}={value:.15g}"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
