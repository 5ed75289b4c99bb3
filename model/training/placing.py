"""Where a model says that labels stand, against where they do.

The windows of a document are ranked by the evidence that each gives a label, for every label that
one of the document's spans speaks for. A window that overlaps such a span is a hit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gma.model.classifier import Classifier
from gma.model.reading import read_cut
from gma.model.tokenizer import Tokenizer, Tokens
from gma.model.training.corpus import Spans

WINDOW = 1000
"""Bytes of a window, at most."""


class Placing(NamedTuple):
    """How well evidence is placed; means over pairs of a document and a label that has spans."""

    pairs: int
    hit_at_1: float  # the best window is a hit
    hit_at_3: float  # one of the best three is
    average_precision: float


def windows(text: bytes) -> list[int]:
    """Cut UTF-8 into windows; return where each ends.

    A window ends after a blank or line feed if one stands in its last tenth, and never inside a
    character.
    """
    ends: list[int] = []
    start = 0
    while start < len(text):
        end = min(start + WINDOW, len(text))
        if end < len(text):
            blank = max(text.rfind(x, end - WINDOW // 10, end) for x in (b" ", b"\n"))
            end = max(blank + 1, 0) or end
            while text[end] & 0xC0 == 0x80:
                end -= 1
        ends.append(end)
        start = end
    return ends


def measure(
    classifier: Classifier, documents: Sequence[Tokens], tokenizer: Tokenizer, spans: Spans
) -> Placing | None:
    """Measure whole documents, (tokens,) ids each, by their spans; None if there are none.

    A token's evidence is that of the window in which it ends.
    """
    looked_at = np.unique(spans.document)
    if not len(looked_at):
        return None
    ends = [np.array(windows(tokenizer.decode(documents[i]).encode())) for i in looked_at]
    cut = [_cut(documents[i], tokenizer, own) for i, own in zip(looked_at, ends, strict=True)]
    order = sorted(range(len(cut)), key=lambda i: len(cut[i]))  # those of like length together
    rows = 64 if classifier.embedding.weight.is_cuda else 8
    found = read_cut(classifier, [cut[i] for i in order], rows=rows)
    ranked = []
    for position, reading in zip(order, found, strict=True):
        own = spans.document == looked_at[position]
        evidence = reading.evidence.cpu().double().numpy()
        for label in np.unique(spans.label[own]):
            its = spans.bytes[own & (spans.label == label)]
            hits = _hits(ends[position], its)
            ranked.append(hits[np.argsort(-evidence[:, label], kind="stable")])
    return placing(ranked)


def placing(ranked: Sequence[NDArray[np.bool_]]) -> Placing:
    """Measure rankings: of each pair, which windows are hits, (windows,), the best first."""
    return Placing(
        len(ranked),
        float(np.mean([hits[0] for hits in ranked])),
        float(np.mean([hits[:3].any() for hits in ranked])),
        float(np.mean([_average_precision(hits) for hits in ranked])),
    )


def _average_precision(hits: NDArray[np.bool_]) -> float:
    at = np.flatnonzero(hits) + 1
    return float((np.arange(1, len(at) + 1) / at).mean())


def _hits(ends: NDArray[np.int64], spans: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say which windows (n,) overlap one of the spans (m, 2)."""
    starts = np.concatenate([[0], ends[:-1]])
    overlaps: NDArray[np.bool_] = np.logical_and(
        starts[:, None] < spans[:, 1], spans[:, 0] < ends[:, None]
    )
    hits: NDArray[np.bool_] = np.logical_or.reduce(overlaps, axis=1)
    return hits


def _cut(tokens: Tokens, tokenizer: Tokenizer, ends: NDArray[np.int64]) -> list[Tensor]:
    token_ends = tokenizer.byte_lengths[tokens].cumsum()
    after = np.searchsorted(token_ends, ends, "right")
    return [torch.from_numpy(x.astype(np.int32)) for x in np.split(tokens, after[:-1])]
