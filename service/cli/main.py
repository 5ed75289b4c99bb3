"""The command `gma`, one file a subcommand. Each imports torch, Ray and numpy only once it runs, so
that `--help` is quick."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from gma.loadtest.command import loadtest
from gma.service.cli.average import average
from gma.service.cli.batch import batch
from gma.service.cli.classify import classify
from gma.service.cli.compile import compile_kernels
from gma.service.cli.evaluate import evaluate
from gma.service.cli.export import export
from gma.service.cli.hub import pull, push
from gma.service.cli.info import info
from gma.service.cli.key import key
from gma.service.cli.metrics import metrics
from gma.service.cli.pretrain import pretrain
from gma.service.cli.report import report
from gma.service.cli.serve import serve
from gma.service.cli.session import session
from gma.service.cli.terminal import complain
from gma.service.cli.tokenizer import tokenizer
from gma.service.cli.train import train
from gma.service.cores import cores

INTERRUPTED = 130
"""The status of a command that Ctrl-C ended, as shells have it."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text, in which brackets and line breaks stay as written
)
app.command()(serve)
app.command()(key)
app.command()(metrics)
app.command("compile")(compile_kernels)
app.command()(classify)
app.command()(batch)
app.add_typer(session, name="session")
app.command()(train)
app.command()(pretrain)
app.command()(average)
app.command()(report)
app.command()(evaluate)
app.command()(tokenizer)
app.command()(export)
app.command()(loadtest)
app.command()(info)
app.command()(push)
app.command()(pull)


def main() -> None:
    """Run the command. What a user can mend is one line on stderr and status 1, or 2 for usage."""
    # OpenMP reads it when torch is imported. Threads that spin while they wait take the cores from
    # whatever else runs: two texts read side by side then take twice as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # By itself it knows no quota, and takes every core of the machine.
    os.environ.setdefault("OMP_NUM_THREADS", str(cores()))
    try:
        app()
    except (OSError, ValueError) as error:
        complain(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@app.callback(invoke_without_command=True)
def gma(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Classify documents of any length with Gaussian Mixture Attention.

    `gma classify FILE` answers here and now, and `gma batch` for archives of any size. `gma serve`
    answers over HTTP, and `gma session` keeps documents open there. `gma train` makes a
    classifier of your own labelled documents, `gma average` one of several, `gma pretrain` a base
    to begin from, `gma tokenizer` what either reads with. `gma evaluate` measures a classifier,
    `gma info` describes it, `gma export` writes it as an ONNX model. `gma loadtest` puts a running
    service under load.
    `gma push` and `gma pull` share checkpoints on the Hugging Face hub.
    """
    if show_version:
        typer.echo(version("gma-service"))
        raise typer.Exit
