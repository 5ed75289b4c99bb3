"""The command `gma classify`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from gma.service.cli.checkpoint import load
from gma.service.cli.options import CheckpointOption, Device, DeviceOption, JsonOption
from gma.service.cli.terminal import complain, print_json, print_table, table, watched

if TYPE_CHECKING:
    from gma.model.weights import Checkpoint
    from gma.service.gateway.contract import EvidenceSpan, Finding, LabelScore

PIECE_BYTES = 64 * 1024
LABELS_IN_TABLE = 3
SPANS_IN_TABLE = 24
SPANS_IN_JSON = 1024


def classify(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="UTF-8 texts; - reads standard input.")
    ],
    checkpoint: CheckpointOption = None,
    device: DeviceOption = Device.auto,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Labels to list. [default: {LABELS_IN_TABLE}, or all with --json]"
        ),
    ] = None,
    evidence: Annotated[
        bool, typer.Option("--evidence", help="Also tell which part of a text speaks for what.")
    ] = False,
    components: Annotated[
        bool,
        typer.Option(
            "--components",
            help="Also tell how much of a text each mixture component takes; needs --json.",
        ),
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a text to read at most. [default: all]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell what each text is. Texts of any length are read in constant memory.

    With --json each text is one line, an answer as the HTTP service gives it. A text that can't be
    read is one line on stderr; the others are answered all the same, and the status is 1.

    \b
    Examples:
      gma classify book.txt
      gma classify --evidence --top-k 1 book.txt
      gma classify --json *.txt | jq -r '[.file, .label] | @tsv'
      zcat book.txt.gz | gma classify -
    """
    if components and not as_json:
        raise typer.BadParameter("they are told with --json only", param_hint="--components")
    loaded = load(checkpoint, device)
    spans = SPANS_IN_JSON if as_json else SPANS_IN_TABLE
    top_k = top_k if as_json else top_k or LABELS_IN_TABLE
    failed = False
    for file in files:
        try:
            finding = _read(
                loaded,
                file,
                max_tokens=max_tokens,
                spans=spans,
                top_k=top_k,
                evidence=evidence,
                components=components,
            )
        except (OSError, ValueError) as error:
            complain(error if isinstance(error, OSError) else ValueError(f"{file}: {error}"))
            failed = True
        else:
            if as_json:
                print_json({"file": str(file), **finding})
            else:
                _print_finding(file, finding)
    raise typer.Exit(int(failed))


def _read(
    checkpoint: Checkpoint,
    file: Path,
    *,
    max_tokens: int | None,
    spans: int,
    top_k: int | None,
    evidence: bool,
    components: bool,
) -> Finding:
    """The HTTP service's answer, less its timing. Raises OSError, or ValueError."""
    import numpy as np
    import torch

    from gma.model.reading import Reader
    from gma.service.gateway.answers import answered, usage_of
    from gma.service.gateway.evidence import Evidence

    reader = Reader(checkpoint, max_tokens=max_tokens, count=components)
    gathered = Evidence(spans)
    chunks = 0
    for chunk in reader.read(_pieces(file)):
        gathered.add(chunk.tokens, chunk.bytes, chunk.weight, chunk.evidence)
        chunks += 1
    if not chunks:
        raise ValueError("the document is empty")
    shares = gathered.shares
    weight = torch.tensor(sum(share.weight for share in shares))
    scores = torch.from_numpy(np.sum([share.evidence for share in shares], axis=0))
    return answered(
        checkpoint.config,
        checkpoint.classifier.logits(scores, weight).numpy(),
        usage_of(
            sum(share.bytes for share in shares),
            sum(share.tokens for share in shares),
            chunks,
            reader.usage,
        ),
        shares,
        top_k=top_k,
        evidence=evidence,
        truncated=reader.truncated,
    )


def _pieces(file: Path) -> Iterator[bytes]:
    """A file's bytes, with a progress bar."""
    with _open(file) as opened:
        size = file.stat().st_size if file.is_file() else None
        yield from watched(iter(lambda: opened.read(PIECE_BYTES), b""), str(file), size)


def _open(file: Path) -> BinaryIO:
    return sys.stdin.buffer if str(file) == "-" else file.open("rb")


def _print_finding(file: Path, finding: Finding) -> None:
    usage = finding["usage"]
    read = "the first " if "truncated" in finding else ""
    typer.echo(f"{file}: {read}{usage['bytes']:,} bytes, {usage['tokens']:,} tokens")
    scores = table("label", "score")
    for each in finding["scores"]:
        scores.add_row(each["label"], f"{each['score']:.3f}")
    print_table(scores)
    if "evidence" in finding:
        _print_evidence(finding["evidence"], finding["scores"])


def _print_evidence(spans: list[EvidenceSpan], listed: list[LabelScore]) -> None:
    labels = [each["label"] for each in listed]
    rows = table("bytes", "weight", "label", *labels)
    for span in spans:
        scores = {each["label"]: f"{each['score']:.3f}" for each in span["scores"]}
        rows.add_row(
            f"{span['start']:,} - {span['end']:,}",
            f"{span['weight']:.1%}",
            span["label"],
            *(scores[label] for label in labels),
        )
    print_table(rows)
