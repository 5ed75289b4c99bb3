"""Training: labelled documents in, a checkpoint out."""

from __future__ import annotations

import json
from pathlib import Path

from rich.progress import Progress

from gma.model import weights
from gma.model.config import DEFAULT_BASE, ModelConfig
from gma.model.training import baseline, together
from gma.model.training.chosen import CHOSEN, CPU, GPU, Chosen
from gma.model.training.config import TrainingConfig, read_config
from gma.model.training.errors import TrainingError
from gma.model.training.evaluation import evaluate
from gma.model.training.folder import LOG, check_folder
from gma.model.training.labelled import TEXT_AND_LABEL, Fields
from gma.model.training.outcome import Outcome
from gma.model.training.prepared import Prepared
from gma.model.training.progress import on_stderr
from gma.model.training.report import page
from gma.model.training.run import CHECKPOINT, PREPARED, Run
from gma.model.training.splits import TEST, TRAIN, VALID, Splits
from gma.model.training.survey import Survey
from gma.model.weights import Base


def train(
    data: Path,
    out: Path,
    config: Path | None,
    *,
    base: Path | None = None,
    resume: bool = False,
    names: Fields = TEXT_AND_LABEL,
) -> Path:
    """Train a classifier and return the folder of its best checkpoint.

    ``data`` holds splits (``Splits``) whose fields are called ``names``; ``config`` is a TOML file
    (``read_config``). Without it sizes are chosen by the data (``Chosen``), and training begins
    from a base: that of the package if there is no ``base``, a checkpoint whose backbone and
    tokenizer are taken. ``out`` gets the prepared tokens, a log and the checkpoint that
    was best on valid; with ``resume`` an interrupted run in ``out`` goes on, and of ``data`` only
    the test split is read, if it is still there. What a user should know goes to stderr: what is
    odd about the data, how far training is, and in the end how good the model is, beside a linear
    baseline. Seeds torch's global generator.

    Raises TrainingError or CorpusError before anything is trained, TrainingError if it diverges.
    """
    splits = Splits(data, names) if data.exists() or not resume else None
    if not resume and splits:
        for split in TRAIN, VALID:  # the likeliest mistake, and named at once
            splits.sources(split)
    begun = _begun(base, config)
    check_folder(out, resume=resume)
    with together.processes(), on_stderr() as progress:
        if resume or not splits:
            config = config or out / CHOSEN
            if not config.exists():
                raise TrainingError(f"{out} began with a configuration: say --config, as it did")
            model, training = read_config(config, begun.config if begun else None)
            run = _run(Prepared.load(out / PREPARED), out, model, training, begun)
            run.resume()
        else:
            run = _started(splits, out, config, begun, progress)
        run.train(progress)
        checkpoint = out / CHECKPOINT
        if not together.first():
            return checkpoint
        if splits and splits.has(TEST):
            bar = progress.add_task("measuring test", total=1)
            loaded = weights.load(checkpoint, device=run.device)
            run.log(test=evaluate(loaded, data, TEST, names).as_dict())
            progress.update(bar, advance=1)
    lines = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    for line in Outcome.of(lines).told():
        progress.console.print(line)
    progress.console.print(f"report: {page.write(out)}")
    return checkpoint


def _begun(base: Path | None, config: Path | None) -> Base | None:
    """Load what a run begins from, if it does not begin from nothing."""
    if base or config:
        return weights.load_base(base) if base else None
    if not DEFAULT_BASE.exists():
        raise TrainingError(
            "this package has no base to begin from: say --from CHECKPOINT, or --config FILE to "
            "begin from nothing"
        )
    return weights.load_base(DEFAULT_BASE)


def _started(
    splits: Splits, out: Path, config: Path | None, base: Base | None, progress: Progress
) -> Run:
    """Begin a run: look at the data, prepare it, and fit what is linear."""
    if config:  # wrong ones are told before the data is read
        read_config(config, base.config if base else None)
    survey = Survey(splits, progress)
    if not config:
        config = out / CHOSEN
        chosen = Chosen.of(
            out.resolve().name, survey, GPU if together.device().type == "cuda" else CPU
        )
        if together.first():
            out.mkdir(parents=True, exist_ok=True)
            config.write_text(chosen.toml())
            for line in chosen.told():
                progress.console.print(line)
        together.wait()
    model, training = read_config(config, base.config if base else None)
    training.check(multi_label=survey.multi_label, pooling=model.pooling)
    warnings = [*survey.warnings()]
    for warning in warnings:
        progress.console.print("warning:", warning)
    tokenizer = base.tokenizer if base else model.vocab_size
    if together.first():
        rounds = training.find_spans
        Prepared.make(splits, survey, out / PREPARED, tokenizer, progress, rounds)
        (out / LOG).unlink(missing_ok=True)  # of a run that ended before its first evaluation
    together.wait()
    prepared = Prepared.load(out / PREPARED)
    run = _run(prepared, out, model, training, base)
    if together.first():
        run.log(warnings=warnings, guess=run.crops.guess)
        run.log(baseline=baseline.fit(splits, survey, progress))
    if model.pooling == "mean":
        run.fit_token_scores(progress)
    return run


def _run(
    prepared: Prepared, out: Path, model: ModelConfig, training: TrainingConfig, base: Base | None
) -> Run:
    fitting = {
        "labels": prepared.labels,
        "multi_label": prepared.train.multi_label,
        "vocab_size": prepared.tokenizer.vocab_size,
    }
    return Run(prepared, out, model.model_copy(update=fitting), training, base)
