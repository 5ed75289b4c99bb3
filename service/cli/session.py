"""The command `gma session`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gma.service.cli.finding import print_finding
from gma.service.cli.options import (
    LABELS_IN_TABLE,
    JsonOption,
    KeyFileOption,
    ModelOption,
    ServiceOption,
    TopKOption,
    api_key,
)
from gma.service.cli.terminal import print_json

if TYPE_CHECKING:
    from gma.service.client.blocking import Client

PIECE_BYTES = 1024 * 1024


IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Of the session, as create told it.")]
SnapshotArgument = Annotated[Path, typer.Argument(metavar="FILE", help="Of the snapshot.")]

session = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Documents that a service keeps open: they are appended to, and have an answer at any "
    "time.",
)


@session.command()
def create(url: ServiceOption, model: ModelOption = None, key_file: KeyFileOption = None) -> None:
    """Begin an empty document, and print its id.

    \b
    Examples:
      id=$(gma session create --url http://127.0.0.1:8000)
      tail -f log | gma session append --url http://127.0.0.1:8000 $id
      gma session answer --url http://127.0.0.1:8000 $id
    """
    with _client(url, key_file) as client:
        typer.echo(client.session(model=model).id)


@session.command()
def append(
    name: IdArgument,
    url: ServiceOption,
    file: Annotated[
        Path, typer.Argument(metavar="[FILE]", help="UTF-8. [default: standard input]")
    ] = Path("-"),
    key_file: KeyFileOption = None,
) -> None:
    """Add a file, or standard input line by line, and print what the document looks like then."""
    with _client(url, key_file) as client:
        document = client.session(name)
        for piece in _pieces(file):
            answer = document.append(piece, top_k=1)
            there = ", ".join(answer.labels) or "none of the labels"
            typer.echo(f"{answer.bytes:,} bytes, {answer.tokens:,} tokens: {there}")


@session.command()
def answer(
    name: IdArgument,
    url: ServiceOption,
    top_k: TopKOption = None,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what the document looks like so far."""
    top_k = top_k if as_json else top_k or LABELS_IN_TABLE
    with _client(url, key_file) as client:
        finding = client.session(name).finding(top_k=top_k)
    if as_json:
        print_json(finding)
    else:
        print_finding(name, finding)


@session.command()
def fork(name: IdArgument, url: ServiceOption, key_file: KeyFileOption = None) -> None:
    """Begin another document with the same past, and print its id."""
    with _client(url, key_file) as client:
        typer.echo(client.session(name).fork().id)


@session.command()
def snapshot(
    name: IdArgument, file: SnapshotArgument, url: ServiceOption, key_file: KeyFileOption = None
) -> None:
    """Write the document's state to a file."""
    with _client(url, key_file) as client:
        file.write_bytes(client.session(name).snapshot())


@session.command()
def resume(file: SnapshotArgument, url: ServiceOption, key_file: KeyFileOption = None) -> None:
    """Begin a document where another was when its snapshot was made, and print its id."""
    with _client(url, key_file) as client:
        typer.echo(client.resume(file.read_bytes()).id)


@session.command()
def delete(name: IdArgument, url: ServiceOption, key_file: KeyFileOption = None) -> None:
    """End the document: nothing is kept of it."""
    with _client(url, key_file) as client:
        client.session(name).delete()


@contextmanager
def _client(url: str, key_file: Path | None) -> Iterator[Client]:
    """A client, whose errors are told in a line. Raises ValueError for what the service says."""
    from gma.service.client.blocking import Client
    from gma.service.client.error import ServiceError

    try:
        with Client(url, api_key(key_file)) as client:
            yield client
    except ServiceError as error:
        raise ValueError(str(error)) from None


def _pieces(file: Path) -> Iterator[bytes]:
    if str(file) == "-":
        yield from sys.stdin.buffer
        return
    with file.open("rb") as opened:
        yield from iter(lambda: opened.read(PIECE_BYTES), b"")
