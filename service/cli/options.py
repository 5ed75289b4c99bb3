"""Options that several commands share, and the words that options may be."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Device(StrEnum):
    """Where a model runs; auto takes a GPU if there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    """What an exported model computes in. A test compares it with the export's own, which takes
    long to import."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    int8 = "int8"


CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        envvar="GMA_CHECKPOINT",
        help="Folder of config.json, model.safetensors and tokenizer.json, or contracts or books, "
        "which come with gma. [default: contracts]",
    ),
]
DeviceOption = Annotated[
    Device, typer.Option(help="Where the model runs; auto takes a GPU if there is one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TextOption = Annotated[
    str, typer.Option("--text", metavar="NAME", help="Field or column that holds the text.")
]
LabelOption = Annotated[
    str, typer.Option("--label", metavar="NAME", help="Field or column that holds the label.")
]
LabelsOption = Annotated[
    str,
    typer.Option(
        "--labels", metavar="NAME", help="Field or column of a list of labels, in place of --label."
    ),
]
