"""The command `gma export`."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gma.service.cli.options import Precision
from gma.service.cli.terminal import print_table, table

if TYPE_CHECKING:
    from gma.export.verification import Check


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="Folder of a causal checkpoint."),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder to make; it must not be there yet.")
    ],
    precision: Annotated[
        Precision,
        typer.Option(help="What matrices and activations are kept in; int8 is for the CPU."),
    ] = Precision.float32,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 256,
    library: Annotated[
        Path | None,
        typer.Option(
            help="Kernels of the model's operators, to be verified too. "
            "[default: those of the package gma-ops, if it is installed]"
        ),
    ] = None,
) -> None:
    """Write a checkpoint as an ONNX model, and verify it against the checkpoint in float64.

    The status is 1 if the model's answers are further off than its precision allows.

    \b
    Examples:
      gma export runs/reviews/checkpoint --out reviews-onnx
      gma export runs/reviews/checkpoint --out reviews-onnx-half --precision float16 --chunk 512
    """
    try:
        from gma.export import artifact, verification
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: install gma-service[onnx]") from error
    import torch

    from gma.model import weights

    exported = artifact.export(checkpoint, out, precision=precision.value, chunk=chunk)
    typer.echo(f"{out}: {exported.nbytes:,} bytes, rows of {chunk} tokens, {precision}")
    library = library or verification.installed_library()
    source = weights.load(checkpoint, dtype=torch.float64)
    if off := _print_checks(verification.verify(exported, source, library)):
        shutil.rmtree(out)
        raise ValueError(
            f"{off} checks are off by more than {precision} may be: the exported model was deleted"
        )
    typer.echo(f"verified, {f'with {library} too' if library else 'without a library of kernels'}")


def _print_checks(checks: Iterable[Check]) -> int:
    """Print a table of them, and return how many do not hold."""
    rows = table("operators", "documents", "read", "logits", "states", "at most", "")
    off = 0
    for check in checks:
        errors = (f"{error:.1e}" for error in (check.logits, check.states))
        most = " ".join(f"{each:.0e}" for each in check.tolerance)
        mark = "" if check.holds else "OFF"
        rows.add_row(check.operators, check.documents, check.reading, *errors, most, mark)
        off += not check.holds
    print_table(rows)
    return off
