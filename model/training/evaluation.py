"""How good a classifier is, and how sure, at prefixes; and the components in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gma.model.classifier import Classifier
from gma.model.reading import Findings, read
from gma.model.tokenizer import Tokenizer
from gma.model.training.corpus import Corpus
from gma.model.training.errors import CorpusError
from gma.model.training.labelled import TEXT_AND_LABEL, Fields
from gma.model.training.splits import Splits
from gma.model.weights import Checkpoint

Figure = Literal["accuracy", "macro_f1"]
"""What a checkpoint can be chosen by."""

PREFIXES: tuple[int | None, ...] = (1 << 10, 4 << 10, 16 << 10, 64 << 10, None)
"""Bytes of a document that are read; None: all of it."""


@dataclass(frozen=True)
class View:
    """What was measured on one prefix of every document."""

    prefix: int | None  # bytes
    accuracy: float
    macro_f1: float
    confidence: float  # mean score of the label answered; calibrated if it is the accuracy


@dataclass(frozen=True)
class Measured:
    """What was measured on every prefix of a split's documents."""

    documents: int
    views: tuple[View, ...]
    components: NDArray[np.float64]  # (layers, heads): in use for the last view's documents
    num_components: int  # that there are, in each head

    def score(self, figure: Figure) -> float:
        """Return what training keeps the best of: the mean of one figure of the views."""
        return float(np.mean([getattr(view, figure) for view in self.views]))

    def as_dict(self) -> dict[str, object]:
        """Return what JSON can hold, rounded."""
        return {
            "documents": self.documents,
            "views": [
                {
                    "prefix_bytes": view.prefix,
                    "accuracy": round(view.accuracy, 4),
                    "macro_f1": round(view.macro_f1, 4),
                    "confidence": round(view.confidence, 4),
                }
                for view in self.views
            ],
            "components_in_use": self.components.round(1).tolist(),
        }

    def table(self) -> str:
        """Write Markdown: the views, then the components in use."""
        lines = [
            f"| prefix ({self.documents} documents) | accuracy | macro-F1 | confidence |",
            "|---|---|---|---|",
        ]
        for view in self.views:
            name = "whole" if view.prefix is None else f"{view.prefix >> 10} KB"
            figures = view.accuracy, view.macro_f1, view.confidence
            lines.append(f"| {name} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |")
        used = [", ".join(f"{head:.1f}" for head in layer) for layer in self.components]
        lines += [
            "",
            f"Mixture components in use, of {self.num_components} a head (layer: head, head, ...): "
            + "; ".join(f"{layer}: {heads}" for layer, heads in enumerate(used, 1)),
        ]
        return "\n".join(lines)


def macro_f1(predicted: NDArray[np.int64], actual: NDArray[np.int64]) -> float:
    """Return the mean F1 of the labels that occur among the actual or the predicted ones."""
    scores = []
    for label in np.union1d(predicted, actual):
        hits = np.sum((predicted == label) & (actual == label))
        scores.append(2 * hits / (np.sum(predicted == label) + np.sum(actual == label)))
    return float(np.mean(scores))


def measure(
    classifier: Classifier,
    views: Sequence[tuple[int | None, Sequence[Tensor]]],
    labels: NDArray[np.int64],
) -> Measured:
    """Measure views: each a prefix in bytes, and every document's tokens up to there.

    labels (documents,): index of each document's label.
    """
    measured = []
    components = np.zeros(())
    chunk, rows = (4096, 32) if classifier.embedding.weight.is_cuda else (512, 8)
    found: dict[int, Findings] = {}
    before: Sequence[Tensor] = ()
    for prefix, documents in views:
        # Those that a view has no more of than the one before were read there.
        changed = [
            i for i, x in enumerate(documents) if not before or not torch.equal(x, before[i])
        ]
        # Documents of like length side by side: the shorter ones would wait for the longest.
        changed.sort(key=lambda i: len(documents[i]))
        read_now = read(classifier, [documents[i] for i in changed], chunk=chunk, rows=rows)
        found.update(zip(changed, read_now, strict=True))
        before = documents
        logits = torch.stack([found[i].logits for i in range(len(documents))])
        scores, best = logits.softmax(1).max(1)
        predicted = best.cpu().numpy()
        accuracy, f1 = float(np.mean(predicted == labels)), macro_f1(predicted, labels)
        measured.append(View(prefix, accuracy, f1, scores.mean().item()))
        components = components_in_use(torch.stack([found[i].usage for i in range(len(documents))]))
    return Measured(len(labels), tuple(measured), components, classifier.config.num_components)


def components_in_use(usage: Tensor) -> NDArray[np.float64]:
    """Count components of usage (documents, L, H, K): exp of their mean share's entropy, (L, H).

    It is 1 if all tokens take one component, K if all alike.
    """
    share = (usage / usage.sum(-1, keepdim=True)).double().mean(0)
    entropy = -(share * share.clamp_min(1e-12).log()).sum(-1)
    used: NDArray[np.float64] = entropy.exp().cpu().numpy()
    return used


def measure_tokens(classifier: Classifier, documents: Corpus, tokenizer: Tokenizer) -> Measured:
    """Measure prefixes that are cut between tokens: quick, for use while training."""
    lengths = tokenizer.byte_lengths

    def cut(tokens: NDArray[np.uint16] | NDArray[np.int32], prefix: int | None) -> Tensor:
        if prefix is not None:
            # No token is empty, so a prefix of n bytes has at most n tokens.
            tokens = tokens[:prefix]
            tokens = tokens[: max(1, np.searchsorted(lengths[tokens].cumsum(), prefix, "right"))]
        return torch.from_numpy(tokens.astype(np.int32))

    views = [(p, [cut(documents[i], p) for i in range(len(documents))]) for p in PREFIXES]
    return measure(classifier, views, documents.labels)


def evaluate(
    checkpoint: Checkpoint, data: Path, split: str, names: Fields = TEXT_AND_LABEL
) -> Measured:
    """Measure prefixes that are cut between bytes, as a client that sends only so much would.

    Raises CorpusError for documents that can't be read or have a label the model does not know.
    """
    index = {label: i for i, label in enumerate(checkpoint.config.labels)}
    texts, labels = [], []
    for document in Splits(data, names).read(split):
        if document.label not in index:
            raise CorpusError(f"{document.where}: the model has no label {document.label!r}")
        texts.append(document.text.encode())
        labels.append(index[document.label])

    def tokens(text: bytes, prefix: int | None) -> Tensor:
        # The rest of a character that the cut went through is dropped.
        head = text[:prefix].decode(errors="ignore")
        return torch.from_numpy(checkpoint.tokenizer.encode(head))

    views = [(prefix, [tokens(text, prefix) for text in texts]) for prefix in PREFIXES]
    return measure(checkpoint.classifier, views, np.asarray(labels))
