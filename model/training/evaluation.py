"""How good a classifier is, and how sure, at prefixes; and the components in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gma.model.classifier import Classifier
from gma.model.config import ModelConfig
from gma.model.reading import Findings, read
from gma.model.scores import labels_of, scores
from gma.model.tokenizer import Tokenizer, Tokens
from gma.model.training import figures, placing
from gma.model.training.corpus import Corpus, Spans, indices, matrix
from gma.model.training.errors import CorpusError
from gma.model.training.figures import Labels, Scores
from gma.model.training.labelled import TEXT_AND_LABEL, Fields
from gma.model.training.measured import LabelView, Measured, View
from gma.model.training.placing import Placing
from gma.model.training.splits import Splits
from gma.model.training.thresholds import Thresholds
from gma.model.weights import Checkpoint

Figure = Literal["accuracy", "macro_f1", "micro_f1", "average_precision"]
"""What a checkpoint can be chosen by."""

ONE_LABEL: tuple[Figure, ...] = "accuracy", "macro_f1"
"""Those of models that give a document one label."""

MULTI_LABEL: tuple[Figure, ...] = "micro_f1", "macro_f1", "average_precision"
"""Those of models that give a document any number."""

PREFIXES: tuple[int | None, ...] = (1 << 10, 4 << 10, 16 << 10, 64 << 10, None)
"""Bytes of a document that are read; None: all of it."""

Fit = Callable[[Scores, Labels], Thresholds]
"""Chooses thresholds by scores and labels of whole documents, (documents, labels)."""


def measure(
    classifier: Classifier,
    views: Sequence[tuple[int | None, Sequence[Tensor]]],
    labels: NDArray[np.int64] | NDArray[np.bool_],
    fit: Fit | None = None,
    placed: Placing | None = None,
) -> Measured:
    """Measure views: each a prefix in bytes, and every document's tokens up to there.

    labels (documents,): index of each document's label; or (documents, labels) bool: which it has.
    ``fit`` chooses thresholds by the last view; without it they are the model's. ``placed`` is told
    with the rest.
    """
    config = classifier.config
    if labels.ndim == 1:
        labels = figures.one_hot(labels.astype(np.int64), len(config.labels))
    actual = labels.astype(np.bool_)
    logits = []
    found: dict[int, Findings] = {}
    before: Sequence[Tensor] = ()
    for _, documents in views:
        # Those that a view has no more of than the one before were read there.
        changed = [
            i for i, x in enumerate(documents) if not before or not torch.equal(x, before[i])
        ]
        read_now = read_all(classifier, [documents[i] for i in changed])
        found.update(zip(changed, read_now, strict=True))
        before = documents
        logits.append(torch.stack([found[i].logits for i in range(len(documents))]).cpu())
    usage = torch.stack([found[i].usage for i in range(len(actual))])
    if fit is not None:
        thresholds = fit(scores(config, logits[-1]).numpy(), actual)
        config = config.model_copy(update={"thresholds": thresholds})
    return Measured(
        len(actual),
        tuple(
            View(prefix, figures_of(config, scores(config, each), actual))
            for (prefix, _), each in zip(views, logits, strict=True)
        ),
        components_in_use(usage),
        config.num_components,
        config.thresholds,
        scores(config, logits[-1]).double().numpy(),
        label_views(config, scores(config, logits[-1]), actual) if config.multi_label else (),
        placed,
    )


def read_all(classifier: Classifier, documents: Sequence[Tensor]) -> list[Findings]:
    """Read whole documents, (N,) ids each, in steps that suit where the weights are."""
    chunk, rows = (4096, 32) if classifier.embedding.weight.is_cuda else (512, 8)
    # Documents of like length side by side: the shorter ones would wait for the longest.
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    found = read(classifier, [documents[i] for i in order], chunk=chunk, rows=rows)
    in_place = dict(zip(order, found, strict=True))
    return [in_place[i] for i in range(len(documents))]


def figures_of(config: ModelConfig, scores: Tensor, actual: Labels) -> dict[str, float]:
    """Measure scores (documents, labels) by which labels are there, (documents, labels).

    ``confidence`` is the mean score of the label answered, which is the accuracy if it can be
    trusted; ``answered``, where a label needs a threshold, how many get an answer.
    """
    said, given = labels_of(config, scores).numpy(), scores.double().numpy()
    if not config.multi_label:
        answered = {} if config.thresholds is None else {"answered": float(said.any(1).mean())}
        return {
            "accuracy": figures.accuracy(said, actual),
            "macro_f1": figures.macro_f1(said, actual),
            "confidence": float(given.max(1).mean()),
            **answered,
        }
    each = figures.average_precisions(given, actual)
    return {
        "micro_f1": figures.micro_f1(said, actual),
        "macro_f1": figures.macro_f1(said, actual),
        "average_precision": float(np.nanmean(each)) if actual.any() else 0.0,
        "micro_average_precision": (
            figures.average_precision(given.ravel(), actual.ravel()) if actual.any() else 0.0
        ),
        "calibration_error": figures.calibration_error(given, actual),
    }


def label_views(config: ModelConfig, scores: Tensor, actual: Labels) -> tuple[LabelView, ...]:
    """Measure each label of a multi-label model by scores and truth, (documents, labels)."""
    said, given = labels_of(config, scores).numpy(), scores.double().numpy()
    f1, precision = figures.f1(said, actual), figures.average_precisions(given, actual)
    return tuple(
        LabelView(
            label,
            int(actual[:, i].sum()),
            int(said[:, i].sum()),
            None if np.isnan(f1[i]) else float(f1[i]),
            None if np.isnan(precision[i]) else float(precision[i]),
            float(given[:, i].mean()),
            0.5 if config.thresholds is None else config.thresholds[i],
        )
        for i, label in enumerate(config.labels)
    )


def components_in_use(usage: Tensor) -> NDArray[np.float64]:
    """Count components of usage (documents, L, H, K): exp of their mean share's entropy, (L, H).

    It is 1 if all tokens take one component, K if all alike.
    """
    share = (usage / usage.sum(-1, keepdim=True)).double().mean(0)
    entropy = -(share * share.clamp_min(1e-12).log()).sum(-1)
    used: NDArray[np.float64] = entropy.exp().cpu().numpy()
    return used


def prefixes(config: ModelConfig) -> tuple[int | None, ...]:
    """Return the views of a document: pooling "any" has but the whole.

    What a document has is not what its beginning has if any passage decides, wherever it stands.
    """
    return PREFIXES if config.pooling == "mean" else PREFIXES[-1:]


def measure_tokens(
    classifier: Classifier, documents: Corpus, tokenizer: Tokenizer, fit: Fit | None = None
) -> Measured:
    """Measure prefixes that are cut between tokens: quick, for use while training."""
    lengths = tokenizer.byte_lengths

    def cut(tokens: Tokens, prefix: int | None) -> Tensor:
        if prefix is not None:
            # No token is empty, so a prefix of n bytes has at most n tokens.
            tokens = tokens[:prefix]
            tokens = tokens[: max(1, np.searchsorted(lengths[tokens].cumsum(), prefix, "right"))]
        return torch.from_numpy(tokens)

    whole = [documents[i].astype(np.int32) for i in range(len(documents))]
    views = [(p, [cut(document, p) for document in whole]) for p in prefixes(classifier.config)]
    placed = placing.measure(classifier, whole, tokenizer, documents.spans)
    return measure(classifier, views, documents.labels, fit, placed)


def evaluate(
    checkpoint: Checkpoint, data: Path, split: str, names: Fields = TEXT_AND_LABEL
) -> Measured:
    """Measure prefixes that are cut between bytes, as a client that sends only so much would.

    Raises CorpusError for documents that can't be read, have a label the model does not know, or
    one label where the model gives any number, or the other way round.
    """
    config = checkpoint.config
    index = {label: i for i, label in enumerate(config.labels)}
    texts: list[bytes] = []
    found: list[NDArray[np.int64]] = []
    spans: list[tuple[int, ...]] = []
    for document in Splits(data, names).read(split):
        if document.multi_label != config.multi_label:
            has, gives = ("one label", "any number")[:: -1 if document.multi_label else 1]
            raise CorpusError(f"{document.where}: has {has}, where the model gives {gives}")
        spans += ((len(found), index[x.label], 0, 0, x.start, x.end) for x in document.spans)
        found.append(indices(document, index))
        texts.append(document.text.encode())

    def tokens(text: bytes, prefix: int | None) -> Tensor:
        # The rest of a character that the cut went through is dropped.
        head = text[:prefix].decode(errors="ignore")
        return torch.from_numpy(checkpoint.tokenizer.encode(head))

    views = [(prefix, [tokens(text, prefix) for text in texts]) for prefix in prefixes(config)]
    whole = [document.numpy() for document in views[-1][1]]
    placed = placing.measure(checkpoint.classifier, whole, checkpoint.tokenizer, Spans.of(spans))
    return measure(checkpoint.classifier, views, matrix(found, len(config.labels)), placed=placed)
