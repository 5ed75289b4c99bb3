"""Training: labelled documents in, a checkpoint out."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gma.model.training import corpus
from gma.model.training.config import read_config
from gma.model.training.errors import TrainingError
from gma.model.training.prepared import SPLITS, Prepared
from gma.model.training.run import LOG, RESUME, Run

PREPARED = "prepared"
"""Folder of a run: the tokenizer, the labels and the token ids of both splits."""


def train(data: Path, out: Path, config: Path, *, resume: bool = False) -> Path:
    """Train a classifier and return the folder of its best checkpoint.

    ``data`` holds ``train*.jsonl(.zst)`` and ``valid*.jsonl(.zst)``, lines of ``{"text", "label"}``
    each; ``config`` is a TOML file (``read_config``). ``out`` gets the prepared tokens, a log and
    the checkpoint that was best on valid; with ``resume`` an interrupted run in ``out`` goes on,
    and ``data`` is not read. Seeds torch's global generator.

    Raises TrainingError or CorpusError before anything is trained, TrainingError if it diverges.
    """
    if not resume:
        for split in SPLITS:  # the likeliest mistake, and named at once
            corpus.files_of(data, split)
    model, training = read_config(config)
    if (out / RESUME).exists() != resume:
        problem = (
            "holds no run to resume" if resume else "holds a run: resume it, or choose another"
        )
        raise TrainingError(f"{out} {problem}")
    if resume:
        prepared = Prepared.load(out / PREPARED)
    else:
        prepared = Prepared.make(data, out / PREPARED, model.vocab_size)
        (out / LOG).unlink(missing_ok=True)  # of a run that ended before its first evaluation
    vocab_size = prepared.tokenizer.vocab_size
    model = model.model_copy(update={"labels": prepared.labels, "vocab_size": vocab_size})
    run = Run(prepared, out, model, training)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        if resume:
            run.resume()
        else:
            run.fit_token_scores(progress)
        run.train(progress)
    return out / "checkpoint"
