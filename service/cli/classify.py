"""The command `gma classify`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Literal, NamedTuple

import typer

from gma.service.cli.checkpoint import load
from gma.service.cli.options import CheckpointOption, Device, DeviceOption, JsonOption, TextOption
from gma.service.cli.terminal import complain, print_json, print_table, table, watched

if TYPE_CHECKING:
    from gma.service.gateway.contract import EvidenceSpan, Finding, LabelScore

LINES = ".jsonl", ".jsonl.gz", ".jsonl.zst"
"""Ends of the names of files of which each line is a text."""

PIECE_BYTES = 64 * 1024
LABELS_IN_TABLE = 3
SPANS_IN_TABLE = 24
SPANS_IN_JSON = 1024


def classify(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="UTF-8 texts, or .jsonl (.gz, .zst): a text a line; - reads standard input.",
        ),
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
    text: TextOption = "text",
    as_text: Annotated[
        bool, typer.Option("--as-text", help="Read .jsonl files as one text each, too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Tell what each text is. Texts of any length are read in constant memory, but
    for a bidirectional model, which keeps a text whole.

    Where the model has a threshold for each label, a text may get none of them, and with a
    multi-label model several.

    Of a .jsonl file each line is a text: {"text": "..."}, other fields being ignored. With --json
    each text is one line, an answer as the HTTP service gives it. A text that can't be read is one
    line on stderr; the others are answered all the same, and the status is 1.

    \b
    Examples:
      gma classify contract.txt
      gma classify --evidence --top-k 1 contract.txt
      gma classify --json *.txt | jq -r '[.file, .labels[]] | @tsv'
      gma classify --json letters.jsonl.gz > answers.jsonl
      zcat contract.txt.gz | gma classify -
    """
    if components and not as_json:
        raise typer.BadParameter("they are told with --json only", param_hint="--components")
    from gma.service.python.classifier import Classifier

    classifier = Classifier(load(checkpoint, device))
    spans = SPANS_IN_JSON if as_json else SPANS_IN_TABLE
    top_k = top_k if as_json else top_k or LABELS_IN_TABLE
    failed = False
    for document in _documents(files, text, as_text=as_text):
        try:
            with classifier.stream(
                components=components, max_tokens=max_tokens, spans=spans
            ) as stream:
                for piece in document.pieces():
                    stream.write(piece)
                    if stream.truncated:
                        break
            finding = stream.finding(top_k=top_k, evidence=evidence)
        except (OSError, ValueError) as error:
            # Of a line it says where that is.
            named = isinstance(error, OSError) or document.line is not None
            complain(error if named else ValueError(f"{document.file}: {error}"))
            failed = True
        else:
            if as_json:
                line = {} if document.line is None else {"line": document.line}
                print_json({"file": str(document.file), **line, **finding})
            else:
                _print_finding(document, finding)
    raise typer.Exit(int(failed))


class Document(NamedTuple):
    """A text to classify: a file, or a line of one."""

    file: Path
    line: int | None
    pieces: Callable[[], Iterable[bytes]]
    """Its bytes, cut anywhere. Raises OSError, or ValueError that names the file and line."""

    def __str__(self) -> str:
        return str(self.file) if self.line is None else f"{self.file}, line {self.line}"


def _documents(files: Iterable[Path], text: str, *, as_text: bool) -> Iterator[Document]:
    for file in files:
        if file.name.endswith(LINES) and not as_text:
            yield from _lines(file, text)
        else:
            yield Document(file, None, partial(_pieces, file))


def _lines(file: Path, text: str) -> Iterator[Document]:
    """The lines of a file, each a document; one without any if the file can't be read."""
    from gma.model.training.formats.compressed import Line, lines
    from gma.model.training.formats.jsonl import fields_of
    from gma.model.training.labelled import text_of

    def pieces(line: Line) -> Iterator[bytes]:
        yield text_of(fields_of(line), line.where, text).encode()

    def broken(error: Exception) -> Iterable[bytes]:
        raise error

    number = 0
    try:
        for line in lines(file):
            number = line.number
            if line.data.strip():
                yield Document(file, number, partial(pieces, line))
    except (OSError, ValueError) as error:
        yield Document(file, number + 1, partial(broken, error))


def _pieces(file: Path) -> Iterator[bytes]:
    """A file's bytes, with a progress bar."""
    with _open(file) as opened:
        size = file.stat().st_size if file.is_file() else None
        yield from watched(iter(lambda: opened.read(PIECE_BYTES), b""), str(file), size)


def _open(file: Path) -> BinaryIO:
    return sys.stdin.buffer if str(file) == "-" else file.open("rb")


def _print_finding(document: Document, finding: Finding) -> None:
    usage = finding["usage"]
    read = "the first " if "truncated" in finding else ""
    typer.echo(f"{document}: {read}{usage['bytes']:,} bytes, {usage['tokens']:,} tokens")
    numbers: tuple[Literal["score", "threshold"], ...] = ("score",)
    if "threshold" in finding["scores"][0]:
        numbers = "score", "threshold"
        typer.echo(f"there: {_there(finding) or 'none of the labels'}")
    scores = table("label", *numbers)
    for each in finding["scores"]:
        scores.add_row(each["label"], *(f"{each[number]:.3f}" for number in numbers))
    print_table(scores)
    if "evidence" in finding:
        _print_evidence(finding["evidence"], finding["scores"])


def _there(said: Finding | EvidenceSpan) -> str:
    """The labels that are there, if any."""
    return ", ".join(said["labels"]) if "labels" in said else said["label"] or ""


def _print_evidence(spans: list[EvidenceSpan], listed: list[LabelScore]) -> None:
    labels = [each["label"] for each in listed]
    rows = table("bytes", "weight", "label", *labels)
    for span in spans:
        scores = {each["label"]: f"{each['score']:.3f}" for each in span["scores"]}
        rows.add_row(
            f"{span['start']:,} - {span['end']:,}",
            f"{span['weight']:.1%}",
            _there(span),
            *(scores[label] for label in labels),
        )
    print_table(rows)
