"""The obvious rival of every run: a linear model of the words of whole documents.

TF-IDF of words and pairs of words, and a linear support vector machine for each label. It takes
seconds, and a deep model that is no better is not worth its time. Where documents have any number
of labels, valid chooses from which margin of its machine a label is there, as it does the model's
thresholds.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import islice

import numpy as np
from rich.progress import Progress

from gma.model.training.corpus import indices, matrix
from gma.model.training.figures import (
    Labels,
    accuracy,
    average_precisions,
    macro_f1,
    micro_f1,
    one_hot,
)
from gma.model.training.labelled import LabelledText
from gma.model.training.splits import TEST, TRAIN, VALID, Splits
from gma.model.training.survey import Survey
from gma.model.training.thresholds import Thresholds, best_f1

MOST_BYTES = 32 << 20
"""Text that it is fitted to, and of each other split that it is measured on."""

WORK = 4 << 30
"""Bytes of text that it is fitted to, times labels, at most: about a minute of one core."""

WEIGHTS = 1 << 24
"""Numbers of the model at most: features by labels."""

FEATURES = 1 << 18
"""Words and pairs of words at most."""

Figures = dict[str, object]


def fit(splits: Splits, survey: Survey, progress: Progress) -> Figures:
    """Fit it to train, and measure it on the other splits, each as far as memory and time allow.

    Returns ``documents`` that it was fitted to, ``of`` so many, and for valid and test
    ``documents``, and the figures that training ends with; or ``missing``: what it needs and has
    not.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.multiclass import OneVsRestClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.svm import LinearSVC
    except ModuleNotFoundError:
        return {"missing": "scikit-learn"}
    others = [split for split in (VALID, TEST) if split in survey.surveyed]
    bar = progress.add_task("linear baseline", total=1 + len(others))
    features = min(FEATURES, WEIGHTS // len(survey.labels))
    machines = LinearSVC(max_iter=200)
    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), max_features=features),
        OneVsRestClassifier(machines) if survey.multi_label else machines,
    )
    some = _Some(splits, survey)
    texts, has = some.read(TRAIN, min(MOST_BYTES, WORK // len(survey.labels)))
    if has.any(0).sum() < 2:
        return {"missing": "two labels in the part of train that it reads"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", UserWarning)  # a label that none or all of these have
        try:
            model.fit(texts, has if survey.multi_label else has.argmax(1))
        except ValueError:  # no text has a word
            return {"missing": "words"}
    found: Figures = {"documents": len(texts), "of": survey.surveyed[TRAIN].documents}
    thresholds: Thresholds | None = None
    for split in others:
        progress.update(bar, advance=1)
        texts, has = some.read(split, MOST_BYTES)
        if not texts:
            continue
        if survey.multi_label:
            scores = 1 / (1 + np.exp(-model.decision_function(texts)))
            thresholds = thresholds or best_f1(scores, has)  # valid comes first
            said = scores >= np.array(thresholds)
            measured = {
                "micro_f1": micro_f1(said, has),
                "macro_f1": macro_f1(said, has),
                "average_precision": float(np.nanmean(average_precisions(scores, has)))
                if has.any()
                else 0.0,
            }
        else:
            said = one_hot(model.predict(texts), has.shape[1])
            measured = {"accuracy": accuracy(said, has), "macro_f1": macro_f1(said, has)}
        rounded = {name: round(figure, 4) for name, figure in measured.items()}
        found[split] = {"documents": len(texts), **rounded}
    progress.update(bar, advance=1)
    return found


class _Some:
    """Parts of splits."""

    def __init__(self, splits: Splits, survey: Survey) -> None:
        self._splits, self._survey = splits, survey
        self._index = {label: i for i, label in enumerate(sorted(survey.labels))}

    def read(self, split: str, most: int) -> tuple[list[str], Labels]:
        """Return texts (n,) from all over the split, ``most`` bytes or about so, and which labels
        they have, (n, labels)."""
        every = -(-self._survey.surveyed[split].bytes // most)
        chosen = list(islice(self._measured(split), 0, None, max(every, 1)))
        found = [indices(document, self._index) for document in chosen]
        return [document.text for document in chosen], matrix(found, len(self._index))

    def _measured(self, split: str) -> Iterator[LabelledText]:
        """The documents of a split that the model, too, is trained or measured on."""
        documents = self._splits.read(split)
        return (d for d in documents if split != VALID or not self._survey.in_train(d))
