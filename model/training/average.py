"""One classifier of several that began alike: the mean of their weights.

Classifiers of one base that were trained apart, by other seeds, data or schedules, lie in one
valley, and what is between them often errs less than each (Wortsman et al. 2022, arXiv:2203.05482).
It is one model, as large and as fast as any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import Progress

from gma.model import weights
from gma.model.classifier import Classifier
from gma.model.training import thresholds
from gma.model.training.calibration import calibrate
from gma.model.training.card import card_of_average
from gma.model.training.corpus import Corpus
from gma.model.training.errors import TrainingError
from gma.model.training.evaluation import measure_tokens
from gma.model.training.labelled import TEXT_AND_LABEL, Fields
from gma.model.training.splits import VALID, Splits
from gma.model.training.survey import Survey
from gma.model.weights import Checkpoint

FITTED = {"thresholds": None, "prior_tokens": 0.0}
"""What of a description is fitted to valid."""

FREE = {**FITTED, "name": ""}
"""What of descriptions may differ."""


def average(
    checkpoints: Sequence[Path],
    data: Path,
    out: Path,
    progress: Progress,
    names: Fields = TEXT_AND_LABEL,
) -> None:
    """Write the mean of checkpoints' weights to the folder ``out``, as a checkpoint.

    It has the first one's name. Factors and thresholds are fitted anew, to the valid split of
    ``data``. Raises TrainingError if ``out`` holds anything, for fewer than two checkpoints and for
    such as are not alike, CheckpointError for what is none, and CorpusError for documents that
    can't be read.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"{out} is there already: give a new folder")
    if len(checkpoints) < 2:
        raise TrainingError("a mean is of two checkpoints or more")
    loaded = [weights.load(path) for path in checkpoints]
    if len({each.fingerprint for each in loaded}) < len(loaded):
        raise TrainingError("two of the checkpoints are the same")
    for path, each in zip(checkpoints, loaded, strict=True):
        if each.config.thresholds and not each.config.multi_label:
            raise TrainingError(
                f"{path} has a threshold for its one label (none_below), which is not fitted here"
            )
        _check_alike(each, loaded[0], f"{path} and {checkpoints[0]}")
    classifier = _mean([each.classifier for each in loaded])
    tokenizer = loaded[0].tokenizer
    splits = Splits(data, names)
    survey = Survey(splits, progress)
    if survey.multi_label != classifier.config.multi_label:
        has, gives = ("one label", "any number")[:: -1 if survey.multi_label else 1]
        raise TrainingError(f"{data}: documents have {has}, where the models give {gives}")
    for warning in survey.warnings():
        progress.console.print("warning:", warning)
    out.mkdir(parents=True, exist_ok=True)
    kept = (document for document in splits.read(VALID) if not survey.in_train(document))
    valid = Corpus.encode(kept, tokenizer, classifier.config.labels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier.to(device).choose_mixers()
    calibrate(classifier, valid)
    fit = thresholds.best_f1 if classifier.config.multi_label else None
    measured = measure_tokens(classifier, valid, tokenizer, fit)
    chosen = {"thresholds": measured.thresholds}
    classifier.config = classifier.config.model_copy(update=chosen)
    progress.console.print(measured.table(), soft_wrap=True)
    weights.save(
        out, classifier, tokenizer, card=card_of_average(classifier.config, measured, len(loaded))
    )


def _check_alike(one: Checkpoint, other: Checkpoint, both: str) -> None:
    """Raises TrainingError if two checkpoints, called ``both``, can't be averaged."""
    if one.tokenizer.fingerprint != other.tokenizer.fingerprint:
        raise TrainingError(f"{both} have different tokenizers")
    mine, others = (x.config.model_copy(update=FREE).model_dump() for x in (one, other))
    differing = [name for name, value in mine.items() if value != others[name]]
    if differing:
        raise TrainingError(f"{both} differ in {', '.join(differing)}")


def _mean(classifiers: Sequence[Classifier]) -> Classifier:
    """Return the first classifier with the mean of all weights, and nothing that is fitted."""
    mean = classifiers[0]
    mean.config = mean.config.model_copy(update=FITTED)
    states = [each.state_dict() for each in classifiers]
    mean.load_state_dict(
        {name: torch.stack([x[name] for x in states]).mean(0) for name in states[0]}
    )
    return mean
