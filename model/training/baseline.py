"""The obvious rival of every run: a linear model of the words of whole documents.

TF-IDF of words and pairs of words, and a linear support vector machine for each label. It takes
seconds, and a deep model that is no better is not worth its time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import islice

import numpy as np
from rich.progress import Progress

from gma.model.training.evaluation import macro_f1
from gma.model.training.labelled import LabelledText
from gma.model.training.splits import TEST, TRAIN, VALID, Splits
from gma.model.training.survey import Survey

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
    ``documents``, ``accuracy`` and ``macro_f1``; or ``missing``: what it needs and has not.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_pipeline
        from sklearn.svm import LinearSVC
    except ModuleNotFoundError:
        return {"missing": "scikit-learn"}
    others = [split for split in (VALID, TEST) if split in survey.surveyed]
    bar = progress.add_task("linear baseline", total=1 + len(others))
    features = min(FEATURES, WEIGHTS // len(survey.labels))
    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), max_features=features),
        LinearSVC(max_iter=200),
    )
    texts, labels = _some(splits, survey, TRAIN, min(MOST_BYTES, WORK // len(survey.labels)))
    if len(set(labels)) < 2:
        return {"missing": "two labels in the part of train that it reads"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            model.fit(texts, labels)
        except ValueError:  # no text has a word
            return {"missing": "words"}
    found: Figures = {"documents": len(texts), "of": survey.surveyed[TRAIN].documents}
    for split in others:
        progress.update(bar, advance=1)
        texts, labels = _some(splits, survey, split, MOST_BYTES)
        if texts:
            index = {label: i for i, label in enumerate(sorted(survey.labels))}
            predicted = np.array([index[label] for label in model.predict(texts)])
            actual = np.array([index[label] for label in labels])
            found[split] = {
                "documents": len(texts),
                "accuracy": round(float(np.mean(predicted == actual)), 4),
                "macro_f1": round(macro_f1(predicted, actual), 4),
            }
    progress.update(bar, advance=1)
    return found


def _some(splits: Splits, survey: Survey, split: str, most: int) -> tuple[list[str], list[str]]:
    """Return texts and labels, from all over the split: ``most`` bytes of text, or about so."""
    every = -(-survey.surveyed[split].bytes // most)
    chosen = list(islice(_measured(splits, survey, split), 0, None, max(every, 1)))
    return [document.text for document in chosen], [document.label for document in chosen]


def _measured(splits: Splits, survey: Survey, split: str) -> Iterator[LabelledText]:
    """The documents of a split that the model, too, is trained or measured on."""
    return (d for d in splits.read(split) if split != VALID or not survey.in_train(d))
