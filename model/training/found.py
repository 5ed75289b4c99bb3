"""Passages that speak for labels, found in documents of which only the labels are known.

A window of a document that has a label is taken for the label's passage if it looks least like
anything in documents without the label. How much it does is told by a linear model of windows that
learns from those taken so far. It takes the next ones in documents that it did not learn from: in
those that it did it would take the same for ever. What takes the first ones is a linear model of
whole documents.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from gma.model.training.errors import TrainingError
from gma.model.training.labelled import LabelledText, Span
from gma.model.training.placing import windows

if TYPE_CHECKING:
    from scipy.sparse import csr_array

FOLDS = 3
"""Parts of the documents, each of which is searched by what the others teach."""

LEAST = 10
"""Documents that a word, or a pair of neighbours, must be in to say something: names are not."""

Bools = NDArray[np.bool_]
Indices = NDArray[np.int64]
Scores = NDArray[np.float64]


def find(documents: Sequence[LabelledText], rounds: int, progress: Progress) -> list[LabelledText]:
    """Give each label of each document a span, found by labels alone, in place of its spans.

    A span is a window of up to 1,000 bytes. In each of ``rounds`` they are taken anew. The same
    documents get the same spans. Raises TrainingError if scikit-learn is missing.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
    except ModuleNotFoundError as error:
        raise TrainingError(
            "find_spans needs scikit-learn: pip install gma-service[train]"
        ) from error
    labels = sorted({label for document in documents for label in document.labels})
    bar = progress.add_task("finding spans", total=1 + len(labels))
    search = _Search(documents)
    progress.update(bar, advance=1)
    spans: list[list[Span]] = [[] for _ in documents]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for label in labels:
            has = np.array([label in document.labels for document in documents])
            for window in search.passages(has, rounds):
                start, end = search.bytes[window]
                spans[search.document[window]].append(Span(label, int(start), int(end)))
            progress.update(bar, advance=1)
    return [replace(x, spans=tuple(own)) for x, own in zip(documents, spans, strict=True)]


class _Search:
    """The windows of D documents, W in all, and what linear models say of them."""

    def __init__(self, documents: Sequence[LabelledText]) -> None:
        texts = [document.text.encode() for document in documents]
        cut = [np.array(windows(text)) for text in texts]
        self.document = np.repeat(np.arange(len(texts)), [len(ends) for ends in cut])  # (W,)
        self.bytes = np.concatenate([np.column_stack([[0, *x[:-1]], x]) for x in cut])  # (W, 2)
        self.fold = np.arange(len(texts)) % FOLDS  # (D,)
        pieces = (
            texts[document][start:end].decode()
            for document, (start, end) in zip(self.document, self.bytes, strict=True)
        )
        self.windows, self.whole = _features(pieces, self.document)

    def passages(self, has: Bools, rounds: int) -> Indices:
        """Take a window in each of the documents that have a label, (D,): (documents,)."""
        everywhere = np.ones_like(has)
        scores = self._scores(self.whole, has, everywhere, self.fold, balanced=True)
        taken = self._best(has, scores)
        for _ in range(rounds):
            is_taken = np.zeros(len(self.document), dtype=np.bool_)
            is_taken[taken] = True
            learned = is_taken | ~has[self.document]
            fold = self.fold[self.document]
            taken = self._best(has, self._scores(self.windows, is_taken, learned, fold))
        return taken

    def _scores(
        self, features: csr_array, yes: Bools, learned: Bools, fold: Indices, balanced: bool = False
    ) -> Scores:
        """Score windows (W,) by machines that tell rows of features that are ``yes`` from others.

        The windows of a fold are scored by a machine of the ``learned`` rows of the other folds.
        """
        from sklearn.svm import LinearSVC

        scores = np.zeros(len(self.document))
        for left_out in range(FOLDS):
            rows = np.flatnonzero(learned & (fold != left_out))
            if len(np.unique(yes[rows])) == 2:
                machine = LinearSVC(class_weight="balanced" if balanced else None, random_state=0)
                machine.fit(features[rows], yes[rows])
                own = self.fold[self.document] == left_out
                scores[own] = machine.decision_function(self.windows[own])
        return scores

    def _best(self, has: Bools, scores: Scores) -> Indices:
        """Take the best window, the first of equals, in each of the documents that have a label."""
        order = np.lexsort([-scores, self.document])
        _, first = np.unique(self.document[order], return_index=True)
        best: Indices = order[first][has]
        return best


def _features(pieces: Iterable[str], document: Indices) -> tuple[csr_array, csr_array]:
    """Return TF-IDF of words and pairs of words: of windows (W, F), and of documents (D, F).

    Rows are of length 1. A document's are of which words it has, however often.
    """
    from scipy.sparse import csr_array, diags_array
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.preprocessing import normalize

    counter = CountVectorizer(ngram_range=(1, 2), dtype=np.float32)
    counts = csr_array(counter.fit_transform(pieces))
    one = np.arange(len(document), dtype=np.int32)
    belongs = csr_array((np.ones_like(one), (document.astype(np.int32), one)))
    has = (belongs @ counts > 0).astype(np.float32)
    frequency = has.sum(0)
    known = np.flatnonzero(frequency >= min(LEAST, frequency.max()))
    inverse = diags_array(np.log1p(len(has.indptr) / frequency[known]).astype(np.float32))
    counts = counts[:, known]
    counts.data = 1 + np.log(counts.data)
    return normalize(counts @ inverse), normalize(has[:, known] @ inverse)
