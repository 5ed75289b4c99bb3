"""The command `gma batch`."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from gma.service.cli.options import CheckpointOption, Device, TextOption, settings_of_one
from gma.service.cli.terminal import bar

if TYPE_CHECKING:
    from gma.service.batch.batch import Report


class Format(StrEnum):
    """What answers are written as."""

    parquet = "parquet"
    jsonl = "jsonl"


def batch(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Files, folders or patterns, or URLs of them (s3://..., memory://...): .jsonl, "
            ".csv, .tsv (.gz, .zst) and .parquet; any other file is a text.",
        ),
    ],
    out: Annotated[
        str, typer.Option(metavar="FOLDER", help="Where answers go: a folder, or its URL.")
    ],
    checkpoint: CheckpointOption = None,
    device: Annotated[
        Device | None, typer.Option(help="Where the model runs. [default: a GPU if there is one]")
    ] = None,
    text: TextOption = "text",
    id_: Annotated[
        str | None,
        typer.Option(
            "--id",
            metavar="NAME",
            help="Field or column of a record's id. [default: FILE:LINE, or FILE of a text]",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Field or column to answer as it is; may be repeated."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Scores to list, of the best labels. [default: all]")
    ] = None,
    evidence: Annotated[
        bool, typer.Option("--evidence", help="Also tell which part of a text speaks for what.")
    ] = False,
    format_: Annotated[
        Format, typer.Option("--format", help="What answers are written as.")
    ] = Format.parquet,
    part_bytes: Annotated[
        int, typer.Option(min=1, help="About so many bytes of input are done as a whole.")
    ] = 16 * 2**20,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Of a Ray cluster that is to do it: auto, or ray://HOST:PORT."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes of the cluster that read. [default: one a GPU, or one a machine]"
        ),
    ] = None,
) -> None:
    """Classify an archive: any number of texts of any length, nothing of which is truncated.

    A text that can't be read has an `error` in its row, and fails alone. Answers are written part
    by part; the same command goes on where it was cut short, reads no part twice and loses none.
    With --address the machines of a Ray cluster do it: all of them need this package, the model and
    the files in the same places.

    \b
    Examples:
      gma batch letters.jsonl --out answers
      gma batch archive/ --out answers --evidence --top-k 3
      gma batch s3://bucket/mails-*.parquet --text body --id mail_id --keep sent --out s3://bucket/answers
      gma batch s3://bucket/mails --out s3://bucket/answers --address auto
    """
    from gma.service.batch.batch import Batch
    from gma.service.batch.manifest import Options

    if workers is not None and address is None:
        raise typer.BadParameter("they are a cluster's: needs --address", param_hint="--workers")
    given = {} if device is None else {"device": device.value}
    settings = settings_of_one(checkpoint, sessions=None, **given)
    options = Options(text, id_, tuple(keep or ()), top_k, evidence, format_.value, part_bytes)
    made = Batch(inputs, out, settings, options)
    if made.complete:
        typer.echo(f"{out} is complete: there is nothing left to do")
        return
    began = time.monotonic()
    with bar(out) as moved:
        if address is None:
            report = made.run(moved)
        else:
            from gma.service.batch.cluster import run

            report = run(made, address, workers, moved)
    _tell(report, out, time.monotonic() - began)


def _tell(report: Report, out: str, seconds: float) -> None:
    done = report.done
    before = f", beside {report.before} that were there" if report.before else ""
    failed = f", {done.errors:,} of them with an error" if done.errors else ""
    typer.echo(
        f"{out}: {done.documents:,} texts{failed}; {done.bytes:,} bytes, {done.tokens:,} tokens in "
        f"{seconds:.1f} s ({report.parts} parts{before})"
    )
