"""The command `gma compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gma.service.cli.options import CheckpointOption, settings_of_one


def compile_kernels(
    cache: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the kernels, for GMA_COMPILE_CACHE.")
    ],
    checkpoint: CheckpointOption = None,
) -> None:
    """Compile the GPU kernels of a model ahead, on a GPU of the kind that will serve it.

    A service with GMA_COMPILE_CACHE=DIR then starts without compiling. The folder can be copied,
    for example into an image. Settings (GMA_DTYPE, GMA_ROWS, ...) are to be those of the service.

    \b
    Example:
      gma compile --cache kernels && GMA_COMPILE_CACHE=kernels gma serve
    """
    from gma.service.observe import logs
    from gma.service.runners import kernel_cache

    settings = settings_of_one(checkpoint, compile_cache=cache, device="cuda")
    kernel_cache.use(cache)
    logs.configure(settings.log_level)

    import torch

    if not torch.cuda.is_available():
        raise ValueError("there is no GPU here: kernels are compiled on the kind they will run on")
    from gma.service.worker import Worker

    Worker.load(settings).compile()
    typer.echo(f"{cache} has the kernels. Serve with GMA_COMPILE_CACHE={cache}")
