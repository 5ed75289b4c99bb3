"""Training: labelled documents in, a checkpoint out."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gma.model import weights
from gma.model.config import ModelConfig
from gma.model.training import baseline
from gma.model.training.config import TrainingConfig, read_config
from gma.model.training.errors import TrainingError
from gma.model.training.evaluation import evaluate
from gma.model.training.labelled import TEXT_AND_LABEL, Fields
from gma.model.training.outcome import Outcome
from gma.model.training.prepared import Prepared
from gma.model.training.run import LOG, RESUME, Run
from gma.model.training.splits import TEST, TRAIN, VALID, Splits
from gma.model.training.survey import Survey

PREPARED = "prepared"
"""Folder of a run: the tokenizer, the labels and the token ids of both splits."""


def train(
    data: Path,
    out: Path,
    config: Path,
    *,
    resume: bool = False,
    names: Fields = TEXT_AND_LABEL,
) -> Path:
    """Train a classifier and return the folder of its best checkpoint.

    ``data`` holds splits (``Splits``) whose fields are called ``names``; ``config`` is a TOML file
    (``read_config``). ``out`` gets the prepared tokens, a log and the checkpoint that was best on
    valid; with ``resume`` an interrupted run in ``out`` goes on, and of ``data`` only the test
    split is read, if it is still there. What a user should know goes to stderr: what is odd about
    the data, how far training is, and in the end how good the model is, beside a linear baseline.
    Seeds torch's global generator.

    Raises TrainingError or CorpusError before anything is trained, TrainingError if it diverges.
    """
    splits = Splits(data, names) if data.exists() or not resume else None
    if not resume and splits:
        for split in TRAIN, VALID:  # the likeliest mistake, and named at once
            splits.sources(split)
    model, training = read_config(config)
    if resumable(out) != resume:
        problem = (
            "holds no run to resume" if resume else "holds a run: resume it, or choose another"
        )
        raise TrainingError(f"{out} {problem}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        if resume or not splits:
            run = _run(Prepared.load(out / PREPARED), out, model, training)
            run.resume()
        else:
            run = _started(splits, out, model, training, progress)
        run.train(progress)
        checkpoint = out / "checkpoint"
        if splits and splits.has(TEST):
            bar = progress.add_task("measuring test", total=1)
            loaded = weights.load(checkpoint, device=run.device)
            run.log(test=evaluate(loaded, data, TEST, names).as_dict())
            progress.update(bar, advance=1)
    lines = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    for line in Outcome.of(lines, run.crops.guess).told():
        console.print(line)
    return checkpoint


def resumable(out: Path) -> bool:
    """Say whether a folder holds a run that got as far as its first evaluation."""
    return (out / RESUME).exists()


def _started(
    splits: Splits, out: Path, model: ModelConfig, training: TrainingConfig, progress: Progress
) -> Run:
    """Begin a run: look at the data, prepare it, and fit what is linear."""
    survey = Survey(splits, progress)
    training.check(multi_label=survey.multi_label, pooling=model.pooling)
    for warning in survey.warnings():
        progress.console.print("warning:", warning)
    prepared = Prepared.make(splits, survey, out / PREPARED, model.vocab_size, progress)
    (out / LOG).unlink(missing_ok=True)  # of a run that ended before its first evaluation
    run = _run(prepared, out, model, training)
    run.log(baseline=baseline.fit(splits, survey, progress))
    if model.pooling == "mean":
        run.fit_token_scores(progress)
    return run


def _run(prepared: Prepared, out: Path, model: ModelConfig, training: TrainingConfig) -> Run:
    fitting = {
        "labels": prepared.labels,
        "multi_label": prepared.train.multi_label,
        "vocab_size": prepared.tokenizer.vocab_size,
    }
    return Run(prepared, out, model.model_copy(update=fitting), training)
