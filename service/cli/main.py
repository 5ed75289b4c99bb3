"""The command `gma`. torch and Ray are imported where they are used, so that `--help` is quick."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from gma.loadtest.command import loadtest

if TYPE_CHECKING:
    from gma.model.weights import Checkpoint

PIECE_BYTES = 64 * 1024
LABELS_IN_TABLE = 3
SPANS_IN_TABLE = 24
SPANS_IN_JSON = 1024

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text, in which brackets and line breaks stay as written
)


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    int8 = "int8"


Folder = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of config.json, model.safetensors and tokenizer.json. "
        "[default: the one that comes with gma]",
    ),
]
DeviceOption = Annotated[
    Device, typer.Option(help="Where the model runs; auto takes a GPU if there is one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command. What a user can mend is one line on stderr and status 1, or 2 for usage."""
    # OpenMP reads it when torch is imported. Threads that spin while they wait take the cores from
    # whatever else runs: two texts read side by side then take twice as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except (OSError, ValueError) as error:
        _complain(error)
        sys.exit(1)


def _complain(error: Exception) -> None:
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    print("gma:", " ".join(text.split()), file=sys.stderr)


@app.callback(invoke_without_command=True)
def _gma(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Classify documents of any length with Gaussian Mixture Attention.

    `gma classify book.txt` answers here and now. `gma serve` answers over HTTP. `gma train` makes a
    classifier of your own labelled documents, `gma evaluate` measures it, `gma info` describes it,
    `gma export` writes it as an ONNX model. `gma loadtest` puts a running service under load.
    """
    if show_version:
        typer.echo(version("gma-service"))
        raise typer.Exit


@app.command()
def serve(
    checkpoint: Folder = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port to listen on.")] = None,
    device: Annotated[Device | None, typer.Option(help="Where the model runs.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that run the model.")] = None,
    list_settings: Annotated[
        bool, typer.Option("--list-settings", help="Print every setting and its default, and exit.")
    ] = False,
) -> None:
    """Start the HTTP service, until Ctrl-C or SIGTERM.

    Every setting is an environment variable GMA_*; the options here go before it.

    \b
    Examples:
      gma serve
      gma serve --port 9000 --checkpoint runs/mine/checkpoint
      GMA_MAX_DOCUMENT_BYTES=1GiB gma serve
      curl -s --data-binary @book.txt -H 'Content-Type: text/plain' 127.0.0.1:8000/v1/documents
    """
    from gma.service.settings import Settings

    if list_settings:
        _print_settings()
        return
    options = {
        "checkpoint": checkpoint,
        "host": host,
        "port": port,
        "device": device and device.value,
        "workers": workers,
    }
    settings = Settings.load(**{name: x for name, x in options.items() if x is not None})

    from gma.service.app.deployments import StartError, serve_forever

    try:
        serve_forever(settings)
    except StartError as error:
        _complain(error)
        raise typer.Exit(1) from error


@app.command()
def key(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Add the hash to it, for GMA_API_KEYS_FILE."),
    ] = None,
    name: Annotated[str, typer.Option(help="Whose key it is: a comment beside the hash.")] = "",
) -> None:
    """Make an API key: print it, and its hash, which is all that the service needs to know.

    With FILE only the key is printed, and the hash goes there. A key can't be read back from it.

    \b
    Examples:
      gma key
      gma key api-keys --name search-team
      GMA_API_KEYS_FILE=api-keys gma serve
    """
    from gma.service.http.keys import hash_of, new_key

    if not name.isprintable():
        raise ValueError("--name is one line of text")
    made = new_key()
    line = f"{hash_of(made)}  # {name}" if name else hash_of(made)
    typer.echo(made)
    if file is None:
        typer.echo(line)
        return
    with open(file, "a", encoding="utf-8", opener=_private) as opened:
        opened.write(line + "\n")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@app.command()
def metrics(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The service's GMA_METRICS_DIR.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port to listen on.")] = 9464,
) -> None:
    """Answer GET /metrics for the service's processes on this machine, until SIGTERM.

    For clusters: a gateway knows the metrics of its own machine, and may be on another.

    \b
    Example:
      gma metrics /tmp/gma-metrics
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    from gma.service.observe.exporter import Exporter

    with Exporter(host, port) as exporter:
        exporter.serve_forever()


@app.command("compile")
def compile_(
    cache: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the kernels, for GMA_COMPILE_CACHE.")
    ],
    checkpoint: Folder = None,
) -> None:
    """Compile the GPU kernels of a model ahead, on a GPU of the kind that will serve it.

    A service with GMA_COMPILE_CACHE=DIR then starts without compiling. The folder can be copied,
    for example into an image. Settings (GMA_DTYPE, GMA_ROWS, ...) are to be those of the service.

    \b
    Example:
      gma compile --cache kernels && GMA_COMPILE_CACHE=kernels gma serve
    """
    from gma.service.observe import logs
    from gma.service.runners import kernel_cache
    from gma.service.settings import Settings

    chosen = {} if checkpoint is None else {"checkpoint": checkpoint}
    settings = Settings.load(compile_cache=cache, device="cuda", **chosen)
    kernel_cache.use(cache)
    logs.configure(settings.log_level)

    import torch

    if not torch.cuda.is_available():
        raise ValueError("there is no GPU here: kernels are compiled on the kind they will run on")
    from gma.service.worker import Worker

    Worker.load(settings).compile()
    typer.echo(f"{cache} has the kernels. Serve with GMA_COMPILE_CACHE={cache}")


@app.command()
def classify(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="UTF-8 texts; - reads standard input.")
    ],
    checkpoint: Folder = None,
    device: DeviceOption = Device.auto,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help=f"List so many labels. [default: {LABELS_IN_TABLE}; --json: all]"),
    ] = None,
    evidence: Annotated[
        bool, typer.Option("--evidence", help="Also tell which part of a text speaks for what.")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Read no more than the first so many tokens.")
    ] = None,
    as_json: AsJson = False,
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
    read = _load(checkpoint, device)
    failed = False
    for file in files:
        try:
            answer = _answer(read, file, top_k, evidence, max_tokens, as_json=as_json)
        except (OSError, ValueError) as error:
            _complain(error if isinstance(error, OSError) else ValueError(f"{file}: {error}"))
            failed = True
        else:
            _print_json(answer) if as_json else _print_answer(answer)
    raise typer.Exit(int(failed))


@app.command()
def train(
    data: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder of train*.jsonl and valid*.jsonl, or .jsonl.zst."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run, made if need be.")],
    config: Annotated[
        Path, typer.Option(metavar="FILE", help="TOML: [model] architecture, [training] schedule.")
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")
    ] = False,
) -> None:
    """Train a classifier of your own documents.

    A line of the data is one document: {"text": "...", "label": "..."}. The run's folder gets a
    log and the checkpoint that was best on the valid split, which every other command takes.

    \b
    Examples:
      gma train --data reviews --out runs/reviews --config small.toml
      gma train --data reviews --out runs/reviews --config small.toml --resume
      gma classify --checkpoint runs/reviews/checkpoint review.txt
    """
    from gma.model.train import train

    typer.echo(train(data, out, config, resume=resume))


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Its folder.")],
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the splits, as `gma train` takes them.")
    ],
    split: Annotated[str, typer.Option(help="Files whose names begin with it are read.")] = "test",
    device: DeviceOption = Device.auto,
    as_json: AsJson = False,
) -> None:
    """Measure accuracy, macro-F1 and confidence on labelled documents.

    Once on the first 1, 4, 16 and 64 KB of each document, and once on the whole; and tell how many
    components of the mixture are in use.

    \b
    Example:
      gma evaluate runs/reviews/checkpoint --data reviews
    """
    from gma.model.evaluate import evaluate

    measured = evaluate(_load(checkpoint, device), data, split)
    _print_json(measured.as_dict()) if as_json else typer.echo(measured.table())


@app.command()
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="Folder of a causal checkpoint."),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder to make; it must not be there yet.")
    ],
    precision: Annotated[
        Precision, typer.Option(help="Of the matrices and activations; int8 is for the CPU.")
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
    table = _table("operators", "documents", "read", "logits", "states", "at most", "")
    off = 0
    for check in verification.verify(exported, source, library):
        errors = (f"{error:.1e}" for error in (check.logits, check.states))
        most = " ".join(f"{each:.0e}" for each in check.tolerance)
        mark = "" if check.holds else "OFF"
        table.add_row(check.operators, check.documents, check.reading, *errors, most, mark)
        off += not check.holds
    Console().print(table)
    if off:
        raise ValueError(f"{out} is not the checkpoint's model: {off} checks are off")
    typer.echo(f"verified, {f'with {library} too' if library else 'without a library of kernels'}")


app.command()(loadtest)


@app.command()
def info(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="CHECKPOINT", help="Its folder. [default: the one that comes with gma]"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Describe a checkpoint: its labels, its architecture, its size.

    \b
    Examples:
      gma info
      gma info runs/reviews/checkpoint --json
    """
    loaded = _load(checkpoint, Device.cpu)
    description = {
        **loaded.config.model_dump(mode="json"),
        "parameters": sum(x.numel() for x in loaded.classifier.parameters()),
        "state_bytes": loaded.classifier.new_states(1).nbytes,
        "fingerprint": loaded.fingerprint,
    }
    if as_json:
        _print_json(description)
        return
    table = _table("", "")
    for name, value in description.items():
        table.add_row(name, ", ".join(value) if isinstance(value, list) else _text(value))
    Console().print(table)


def _load(checkpoint: Path | None, device: Device) -> Checkpoint:
    import torch

    from gma.model import weights
    from gma.model.config import DEFAULT_CHECKPOINT

    if device is Device.auto:
        device = Device.cuda if torch.cuda.is_available() else Device.cpu
    return weights.load(checkpoint or DEFAULT_CHECKPOINT, device=device.value)


def _answer(
    checkpoint: Checkpoint,
    file: Path,
    top_k: int | None,
    evidence: bool,
    max_tokens: int | None,
    *,
    as_json: bool,
) -> dict[str, Any]:
    """The answer of the HTTP service, less its timing. Raises ValueError or OSError."""
    import numpy as np
    import torch

    from gma.model.reading import Reader
    from gma.service.engine.document import Span
    from gma.service.gateway.answers import evidence_spans, label_scores, ranked
    from gma.service.gateway.evidence import Evidence

    reader = Reader(checkpoint, max_tokens=max_tokens)
    shares = Evidence(SPANS_IN_JSON if as_json else SPANS_IN_TABLE)
    chunks = 0
    for span in reader.read(_pieces(file)):
        shares.add(Span(span.tokens, span.weight, span.evidence), span.bytes)
        chunks += 1
    if not chunks:
        raise ValueError("the document is empty")
    evidence_sum = np.sum([share.evidence for share in shares.shares], axis=0)
    weight = torch.tensor(sum(share.weight for share in shares.shares))
    logits = checkpoint.classifier.logits(torch.from_numpy(evidence_sum), weight).numpy()
    labels = checkpoint.config.labels
    order = ranked(logits, top_k if as_json else top_k or LABELS_IN_TABLE)
    answer: dict[str, Any] = {
        "file": str(file),
        "model": checkpoint.config.name,
        "label": labels[int(order[0])],
        "scores": label_scores(labels, logits, order),
        "usage": {
            "bytes": sum(share.bytes for share in shares.shares),
            "tokens": sum(share.tokens for share in shares.shares),
            "chunks": chunks,
        },
    }
    if reader.truncated:
        answer["truncated"] = True
    if evidence:
        prior = checkpoint.config.prior_tokens
        answer["evidence"] = evidence_spans(labels, shares.shares, order, prior_tokens=prior)
    return answer


def _pieces(file: Path) -> Iterator[bytes]:
    """A file's bytes, with a progress bar on stderr if that is a terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with (
        _open(file) as opened,
        Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as progress,
    ):
        size = file.stat().st_size if file.is_file() else None
        bar = progress.add_task(str(file), total=size)
        while piece := opened.read(PIECE_BYTES):
            yield piece
            progress.advance(bar, len(piece))


def _open(file: Path) -> BinaryIO:
    return sys.stdin.buffer if str(file) == "-" else file.open("rb")


def _print_answer(answer: dict[str, Any]) -> None:
    usage = answer["usage"]
    read = "the first " if "truncated" in answer else ""
    typer.echo(f"{answer['file']}: {read}{usage['bytes']:,} bytes, {usage['tokens']:,} tokens")
    table = _table("label", "score")
    for each in answer["scores"]:
        table.add_row(each["label"], f"{each['score']:.3f}")
    Console().print(table)
    if "evidence" not in answer:
        return
    table = _table("bytes", "weight", "label", *(each["label"] for each in answer["scores"]))
    for span in answer["evidence"]:
        scores = {each["label"]: f"{each['score']:.3f}" for each in span["scores"]}
        table.add_row(
            f"{span['start']:,} - {span['end']:,}",
            f"{span['weight']:.1%}",
            span["label"],
            *(scores[each["label"]] for each in answer["scores"]),
        )
    Console().print(table)


def _print_settings() -> None:
    from gma.service.settings import Settings, variable

    table = _table("variable", "default", "")
    for name, field in Settings.model_fields.items():
        table.add_row(variable(name), str(field.default), field.description)
    Console().print(table)


def _table(*columns: str) -> Table:
    table = Table(show_header=any(columns), box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _text(value: object) -> str:
    return f"{value:,}" if type(value) is int else str(value)


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))
