"""The command `gma evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gma.service.cli.checkpoint import load
from gma.service.cli.options import (
    Device,
    DeviceOption,
    JsonOption,
    LabelOption,
    LabelsOption,
    TextOption,
)
from gma.service.cli.terminal import print_json


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Its folder.")],
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the splits, as `gma train` takes them.")
    ],
    split: Annotated[
        str, typer.Option(help="Its files are SPLIT.jsonl, SPLIT-0.csv, ..., or a folder SPLIT.")
    ] = "test",
    text: TextOption = "text",
    label: LabelOption = "label",
    labels: LabelsOption = "labels",
    device: DeviceOption = Device.auto,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy, macro-F1 and confidence on labelled documents.

    Of a model that gives any number of labels: micro-F1, macro-F1, average precision, calibration,
    and each label. Once on the first 1, 4, 16 and 64 KB of each document, unless any passage may
    say that a label is there, and once on the whole; and tell how many components of the mixture
    are in use.

    \b
    Example:
      gma evaluate runs/reviews/checkpoint --data reviews
    """
    from gma.model.training import evaluation
    from gma.model.training.labelled import Fields

    names = Fields(text, label, labels)
    measured = evaluation.evaluate(load(checkpoint, device), data, split, names)
    if as_json:
        print_json(measured.as_dict())
    else:
        typer.echo(measured.table())
