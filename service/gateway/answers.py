"""What a document's logits and evidence look like in an answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gma.service.gateway.contract import EvidenceSpan, LabelScore
from gma.service.gateway.evidence import Share


def ranked(logits: NDArray[np.float64], top_k: int | None = None) -> NDArray[np.intp]:
    """Indices of the best `top_k` labels, all by default, best first; ties in the labels' order."""
    return np.argsort(-logits, kind="stable")[:top_k]


def label_scores(
    labels: Sequence[str], logits: NDArray[np.float64], order: NDArray[np.intp]
) -> list[LabelScore]:
    """The labels at `order`, with their scores among all labels."""
    scores = softmax(logits)
    return [
        LabelScore(label=labels[i], score=score, logit=logit)
        for i, score, logit in zip(
            order.tolist(), scores[order].tolist(), logits[order].tolist(), strict=True
        )
    ]


def evidence_spans(
    labels: Sequence[str],
    shares: Sequence[Share],
    listed: NDArray[np.intp],
    *,
    prior_tokens: float,
) -> list[EvidenceSpan]:
    """The shares as spans that tile the document, with the scores of the labels at `listed`.

    What the prior takes off the document's logits is taken off each span's alike, so the spans'
    weighted mean is the document's logits.
    """
    total = sum(share.weight for share in shares)
    seen = total / (total + prior_tokens)
    spans = []
    start = 0
    for share in shares:
        logits = share.evidence / share.weight * seen
        order = listed[np.argsort(-logits[listed], kind="stable")]
        spans.append(
            EvidenceSpan(
                start=start,
                end=start + share.bytes,
                tokens=share.tokens,
                weight=share.weight / total,
                label=labels[int(logits.argmax())],
                scores=label_scores(labels, logits, order),
            )
        )
        start += share.bytes
    return spans


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """(labels,) -> (labels,)"""
    exponentials = np.exp(logits - logits.max())
    scores: NDArray[np.float64] = exponentials / exponentials.sum()
    return scores
