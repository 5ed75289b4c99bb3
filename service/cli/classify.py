"""The command `gma classify`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, BinaryIO, Literal, NamedTuple, TypeAlias, TypedDict

import typer

from gma.service.cli.checkpoint import load
from gma.service.cli.finding import Range, print_finding, print_passages
from gma.service.cli.options import (
    LABELS_IN_TABLE,
    CheckpointOption,
    Device,
    DeviceOption,
    JsonOption,
    KeyFileOption,
    ModelOption,
    TextOption,
    TopKOption,
    UrlOption,
    api_key,
)
from gma.service.cli.terminal import bar, complain, print_json, watched

if TYPE_CHECKING:
    from gma.service.gateway.contract import Finding

LINES = ".jsonl", ".jsonl.gz", ".jsonl.zst"
"""Ends of the names of files of which each line is a text."""

PIECE_BYTES = 64 * 1024


class Options(TypedDict):
    """How each text is to be answered."""

    top_k: int | None
    evidence: bool
    components: bool
    max_tokens: int | None


def classify(
    context: typer.Context,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="UTF-8 texts, or .jsonl (.gz, .zst): a text a line; - reads standard input.",
        ),
    ],
    checkpoint: CheckpointOption = None,
    device: DeviceOption = Device.auto,
    top_k: TopKOption = None,
    evidence: Annotated[
        bool, typer.Option("--evidence", help="Also tell which parts of a text speak for what.")
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
    url: UrlOption = None,
    model: ModelOption = None,
    key_file: KeyFileOption = None,
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

    With --evidence a table has a strip of each label, the text from its beginning to its end, and
    the passages follow that speak most for the labels that are there.

    With --url a service reads the texts, with its own models.

    \b
    Examples:
      gma classify contract.txt
      gma classify --url http://127.0.0.1:8000 contract.txt
      gma classify --evidence --top-k 1 contract.txt
      gma classify --json *.txt | jq -r '[.file, .labels[]] | @tsv'
      gma classify --json letters.jsonl.gz > answers.jsonl
      zcat contract.txt.gz | gma classify -
    """
    if components and not as_json:
        raise typer.BadParameter("they are told with --json only", param_hint="--components")
    listed = top_k or LABELS_IN_TABLE
    quoting = evidence and not as_json
    options = Options(
        top_k=None if quoting else top_k if as_json else listed,
        evidence=evidence,
        components=components,
        max_tokens=max_tokens,
    )
    if url is None:
        for name, given in (("--key-file", key_file), ("--model", model)):
            if given:
                raise typer.BadParameter("it is for a service: needs --url", param_hint=name)
        found_in, pooling = _here(checkpoint, device, options)
    else:
        for name in ("checkpoint", "device"):
            source = context.get_parameter_source(name)
            if source and source.name == "COMMANDLINE":
                raise typer.BadParameter("the service has its own", param_hint=f"--{name}")
        found_in, pooling = _there(context, url, api_key(key_file), model, options)
    failed = False
    for document in _documents(files, text, as_text=as_text, again=quoting):
        try:
            finding = found_in(document)
        except (ConnectionError, TimeoutError):
            raise  # the service is not there for the others either
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
                print_finding(document, finding, listed)
                if quoting:
                    print_passages(finding, pooling(), listed, document.cut)
    raise typer.Exit(int(failed))


FoundIn: TypeAlias = Callable[["Document"], "Finding"]

Pooling: TypeAlias = Literal["mean", "any"]


def _here(
    checkpoint: Path | None, device: Device, options: Options
) -> tuple[FoundIn, Callable[[], Pooling]]:
    from gma.service.python.classifier import Classifier

    classifier = Classifier(load(checkpoint, device))

    def found_in(document: Document) -> Finding:
        with classifier.stream(
            components=options["components"], max_tokens=options["max_tokens"]
        ) as stream:
            for piece in document.watched():
                stream.write(piece)
                if stream.truncated:
                    break
        return stream.finding(top_k=options["top_k"], evidence=options["evidence"])

    return found_in, lambda: classifier.config.pooling


def _there(
    context: typer.Context, url: str, key: str | None, model: str | None, options: Options
) -> tuple[FoundIn, Callable[[], Pooling]]:
    from gma.service.client.blocking import Client
    from gma.service.client.error import ServiceError

    client = Client(url, key)
    context.call_on_close(client.close)

    def found_in(document: Document) -> Finding:
        try:
            if document.line is not None:
                finding = client.finding(b"".join(document.pieces()), model=model, **options)
            else:
                source = document.file if document.file.is_file() else document.pieces()
                with bar(str(document.file)) as moved:
                    finding = client.finding(source, progress=moved, model=model, **options)
        except ServiceError as error:
            where = "" if document.line is None else f"{document}: "
            raise ValueError(f"{where}{error}") from None
        del finding["timing_ms"]  # type: ignore[misc]  # what is found is the same anywhere
        return finding

    return found_in, lambda: client.info(model)["pooling"]


class Document(NamedTuple):
    """A text to classify: a file, or a line of one."""

    file: Path
    line: int | None
    pieces: Callable[[], Iterator[bytes]]
    """Its bytes, cut anywhere. Raises OSError, or ValueError that names the file and line."""

    def __str__(self) -> str:
        return str(self.file) if self.line is None else f"{self.file}, line {self.line}"

    def watched(self) -> Iterator[bytes]:
        """The same, with a progress bar if it is a file."""
        if self.line is not None:
            return self.pieces()
        size = self.file.stat().st_size if self.file.is_file() else None
        return watched(self.pieces(), str(self.file), size)

    def cut(self, ranges: Sequence[Range]) -> dict[Range, bytes]:
        """Read it again, and take ranges [start, end) of its bytes."""
        found = {each: bytearray() for each in ranges}
        last = max((end for _, end in ranges), default=0)
        at = 0
        for piece in self.pieces():
            for (start, end), taken in found.items():
                taken += piece[max(start - at, 0) : max(end - at, 0)]
            at += len(piece)
            if at >= last:
                break
        return {each: bytes(taken) for each, taken in found.items()}


def _documents(
    files: Iterable[Path], text: str, *, as_text: bool, again: bool
) -> Iterator[Document]:
    """`again`: they are read more than once."""
    for file in files:
        if file.name.endswith(LINES) and not as_text:
            yield from _lines(file, text)
        elif again and not file.is_file():
            yield Document(file, None, _kept(file))
        else:
            yield Document(file, None, partial(_pieces, file))


def _lines(file: Path, text: str) -> Iterator[Document]:
    """The lines of a file, each a document; one without any if the file can't be read."""
    from gma.model.training.formats.compressed import Line, lines
    from gma.model.training.formats.jsonl import fields_of
    from gma.model.training.labelled import text_of

    def pieces(line: Line) -> Iterator[bytes]:
        yield text_of(fields_of(line), line.where, text).encode()

    def broken(error: Exception) -> Iterator[bytes]:
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
    with sys.stdin.buffer if str(file) == "-" else file.open("rb") as opened:
        yield from iter(partial(opened.read, PIECE_BYTES), b"")


def _kept(file: Path) -> Callable[[], Iterator[bytes]]:
    """What comes through a pipe, which gives it once: any number of times."""
    kept: BinaryIO | None = None

    def pieces() -> Iterator[bytes]:
        nonlocal kept
        if kept:
            kept.seek(0)
            yield from iter(partial(kept.read, PIECE_BYTES), b"")
            return
        kept = TemporaryFile()  # noqa: SIM115 (it ends with this function)
        for piece in _pieces(file):
            kept.write(piece)
            yield piece

    return pieces
