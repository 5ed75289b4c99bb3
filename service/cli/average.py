"""The command `gma average`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gma.service.cli.options import LabelOption, LabelsOption, TextOption


def average(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CHECKPOINT...", help="Two folders or more.")
    ],
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the splits that they were trained on.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the new checkpoint.")],
    text: TextOption = "text",
    label: LabelOption = "label",
    labels: LabelsOption = "labels",
) -> None:
    """Make one classifier of several: the mean of their weights.

    They have begun from the same base, and were trained apart: by other seeds, on other data, on
    another schedule. The mean is as large and as fast as any of them, and often better. What is
    fitted to the valid split, thresholds for one, is fitted anew; how good it is there is told.

    \b
    Example:
      gma train --data reviews --out runs/1 --config one.toml --from base
      gma train --data reviews --out runs/2 --config other-seed.toml --from base
      gma average runs/1/checkpoint runs/2/checkpoint --data reviews --out reviews-model
    """
    from gma.model.training import average as training
    from gma.model.training.labelled import Fields
    from gma.model.training.progress import on_stderr

    with on_stderr() as progress:
        training.average(checkpoints, data, out, progress, Fields(text, label, labels))
    typer.echo(out)
