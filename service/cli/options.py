"""Options that several commands share, and the words that options may be."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gma.service.settings import Settings


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


def settings_of_one(checkpoint: Path | None, **given: Any) -> Settings:
    """The service's settings, and those given, for a command that runs the model of --checkpoint.

    Raises ValueError if GMA_MODELS names models and nothing says which of them.
    """
    from gma.service.settings import Settings

    if checkpoint is not None:
        given |= {"checkpoint": checkpoint, "models": None}
    settings = Settings.load(**given)
    if settings.models:
        raise ValueError("GMA_MODELS is for gma serve: --checkpoint says which model this runs")
    return settings


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
UrlOption = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="Ask a service: http://HOST:PORT"),
]
ServiceOption = Annotated[
    str, typer.Option("--url", metavar="URL", help="Of the service: http://HOST:PORT")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="NAME", help="Which of the service's models. [default: its only one]"
    ),
]
KeyFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The service's API key, alone in a file. [default: what GMA_API_KEY says, if it is "
        "set]",
    ),
]


def api_key(file: Path | None) -> str | None:
    """The API key to send, if there is one. Raises ValueError for a file that is none."""
    if file is None:
        return os.environ.get("GMA_API_KEY") or None
    words = file.read_text(encoding="utf-8").split()
    if len(words) != 1:
        raise ValueError(f"{file}: a file of one API key and nothing else is expected")
    return words[0]


LABELS_IN_TABLE = 3
"""How many a table lists of each text, if nothing is said."""

TopKOption = Annotated[
    int | None,
    typer.Option(min=1, help=f"Labels to list. [default: {LABELS_IN_TABLE}, or all with --json]"),
]
