"""The documents of valid that the model is most wrong about, with what misled it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gma.model.reading import Findings, read
from gma.model.training.corpus import Corpus
from gma.model.training.figures import Labels, Scores
from gma.model.weights import Checkpoint

MOST = 10
"""Documents."""

MOST_TOKENS = 1 << 14
"""Of a document: passages are looked for in the first so many."""

CHUNK = 64
"""Tokens of a passage."""

PASSAGES = 2
"""Passages that are shown for a label."""


@dataclass(frozen=True)
class Passage:
    """A piece of a document that speaks for a label."""

    label: int
    score: float  # mean over its tokens: what the document's logit is the mean of
    text: str


@dataclass(frozen=True)
class Hard:
    """A document of valid."""

    index: int
    size: int  # tokens
    passages: tuple[Passage, ...]


def hardest(
    checkpoint: Checkpoint, valid: Corpus, scores: Scores, said: Labels, actual: Labels
) -> list[Hard]:
    """Find the documents whose labels have the worst scores, (D, L), the worst first.

    Passages are those that speak most for what was wrongly said and for what was missed; for the
    best label and the next one where nothing was wrong.
    """
    order = np.argsort(-loss(scores, actual, checkpoint.config.multi_label), kind="stable")
    chosen = order[:MOST].tolist()
    tokens = [torch.from_numpy(valid[i][:MOST_TOKENS].astype(np.int32)) for i in chosen]
    found = read(checkpoint.classifier, tokens, chunk=CHUNK)
    hard = []
    for index, document, findings in zip(chosen, tokens, found, strict=True):
        labels = _telling(scores[index], said[index], actual[index])
        passages = tuple(_passages(checkpoint, document.numpy(), findings, labels))
        hard.append(Hard(index, len(valid[index]), passages))
    return hard


def loss(scores: Scores, actual: Labels, multi_label: bool) -> NDArray[np.float64]:
    """Return the cross-entropy of each document, (D,), of scores and truth (D, L)."""
    safe = np.clip(scores, 1e-12, 1 - 1e-12)
    each = -np.log(np.where(actual, safe, 1 - safe))
    if not multi_label:
        each = np.where(actual, each, 0)
    total: NDArray[np.float64] = each.sum(1)
    return total


def _telling(
    scores: NDArray[np.float64], said: NDArray[np.bool_], actual: NDArray[np.bool_]
) -> list[int]:
    """Choose the labels that one would ask about, two at most."""
    best = np.argsort(-scores, kind="stable")
    wrong = [int(i) for i in best if said[i] and not actual[i]][:1]
    missed = [int(i) for i in best if actual[i] and not said[i]][:1]
    return wrong + missed or best[:2].tolist()


def _passages(
    checkpoint: Checkpoint,
    tokens: NDArray[np.int32],
    findings: Findings,
    labels: Sequence[int],
) -> list[Passage]:
    means = (findings.evidence / findings.weight[:, None]).double().cpu().numpy()
    return [
        Passage(
            label,
            float(means[i, label]),
            checkpoint.tokenizer.decode(tokens[i * CHUNK : (i + 1) * CHUNK]),
        )
        for label in labels
        for i in np.argsort(-means[:, label], kind="stable")[:PASSAGES].tolist()
    ]
