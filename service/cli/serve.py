"""The command `gma serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gma.service.cli.options import CheckpointOption, Device
from gma.service.cli.terminal import complain, print_table, table


def serve(
    checkpoint: CheckpointOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port to listen on.")] = None,
    device: Annotated[Device | None, typer.Option(help="Where the model runs.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that run the model.")] = None,
    list_settings: Annotated[
        bool, typer.Option("--list-settings", help="Print every setting and its default, and exit.")
    ] = False,
) -> None:
    """Start the HTTP service, until Ctrl-C or SIGTERM.

    Every setting is an environment variable GMA_*; an option given here goes before its variable.

    \b
    Examples:
      gma serve
      gma serve --port 9000 --checkpoint runs/mine/checkpoint
      GMA_MAX_DOCUMENT_BYTES=1GiB gma serve
      curl -s --data-binary @contract.txt -H 'Content-Type: text/plain' 127.0.0.1:8000/v1/documents
    """
    from gma.service.settings import Settings

    if list_settings:
        _print_settings()
        return
    options: dict[str, Path | str | int | None] = {
        "checkpoint": checkpoint,
        "host": host,
        "port": port,
        "device": device and device.value,
        "workers": workers,
    }
    settings = Settings.load(**{name: x for name, x in options.items() if x is not None})

    from gma.service.app.local import serve_forever
    from gma.service.app.start import StartError

    try:
        serve_forever(settings)
    except StartError as error:
        complain(error)
        raise typer.Exit(1) from error


def _print_settings() -> None:
    from gma.service.settings import Settings, variable

    settings = table("variable", "default", "")
    for name, field in Settings.model_fields.items():
        settings.add_row(variable(name), str(field.default), field.description)
    print_table(settings)
