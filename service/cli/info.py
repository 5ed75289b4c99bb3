"""The command `gma info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gma.service.cli.checkpoint import load
from gma.service.cli.options import Device, JsonOption
from gma.service.cli.terminal import print_json, print_table, table


def info(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Its folder, or contracts, books or base, which come with gma. "
            "[default: contracts]",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Describe a checkpoint: its labels, unless it is a base; its architecture, its size.

    \b
    Examples:
      gma info
      gma info runs/reviews/checkpoint --json
    """
    from gma.model import weights
    from gma.model.backbone import Backbone

    model: Backbone
    if checkpoint and weights.is_base(checkpoint):
        base = weights.load_base(checkpoint)
        model, fingerprint = base.backbone, base.fingerprint
    else:
        loaded = load(checkpoint, Device.cpu)
        model, fingerprint = loaded.classifier, loaded.fingerprint
    description = {
        **model.config.model_dump(mode="json"),
        "parameters": sum(x.numel() for x in model.parameters()),
        "state_bytes": model.new_states(1).nbytes,
        "fingerprint": fingerprint,
    }
    if as_json:
        print_json(description)
        return
    rows = table("", "")
    for name, value in description.items():
        rows.add_row(name, _cell(value))
    print_table(rows)


def _cell(value: object) -> str:
    match value:
        case list():
            return ", ".join(map(str, value))
        case bool():
            return str(value)
        case int():
            return f"{value:,}"
        case _:
            return str(value)
