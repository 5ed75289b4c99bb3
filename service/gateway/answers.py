"""The answer to a document: what its logits and its evidence look like in the contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from gma.model.config import ModelConfig
from gma.service.gateway.contract import (
    Answer,
    EvidenceSpan,
    Finding,
    LabelScore,
    Timing,
    Usage,
)
from gma.service.gateway.evidence import Share


@overload
def answered(
    config: ModelConfig,
    logits: NDArray[np.float64],
    usage: Usage,
    shares: Sequence[Share],
    *,
    timing: Timing,
    top_k: int | None = None,
    evidence: bool = False,
    truncated: bool = False,
) -> Answer: ...


@overload
def answered(
    config: ModelConfig,
    logits: NDArray[np.float64],
    usage: Usage,
    shares: Sequence[Share],
    *,
    timing: None = None,
    top_k: int | None = None,
    evidence: bool = False,
    truncated: bool = False,
) -> Finding: ...


def answered(
    config: ModelConfig,
    logits: NDArray[np.float64],
    usage: Usage,
    shares: Sequence[Share],
    *,
    timing: Timing | None = None,
    top_k: int | None = None,
    evidence: bool = False,
    truncated: bool = False,
) -> Finding:
    """What a model of this `config` finds in a document that has been read.

    `logits`, (labels,), are the whole document's. `shares` tile what was read, and are needed only
    if `evidence` is asked for. The best `top_k` labels are listed, all of them by default.
    """
    labels = config.labels
    listed = _best_first(logits)[:top_k]
    finding = Finding(
        model=config.name,
        label=labels[listed[0]],
        scores=_scores(labels, logits, listed),
        usage=usage,
    )
    # A client should not have to pass thousands of spans to see these two.
    if timing:
        finding = Answer(**finding, timing_ms=timing)
    if truncated:
        finding["truncated"] = True
    if evidence:
        finding["evidence"] = _spans(labels, shares, listed, prior_tokens=config.prior_tokens)
    return finding


def usage_of(size: int, tokens: int, chunks: int, components: NDArray[np.float64] | None) -> Usage:
    """What was read, `size` bytes, and what (L, H, K) components took of it if that was counted."""
    usage = Usage(bytes=size, tokens=tokens, chunks=chunks)
    if components is not None:
        usage["components"] = components.tolist()
    return usage


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logits, (labels,), to probabilities, (labels,)."""
    exponentials = np.exp(logits - logits.max())
    scores: NDArray[np.float64] = exponentials / exponentials.sum()
    return scores


def _best_first(logits: NDArray[np.float64]) -> NDArray[np.intp]:
    """The indices of all labels; those that are equally good stay in the labels' order."""
    return np.argsort(-logits, kind="stable")


def _scores(
    labels: Sequence[str], logits: NDArray[np.float64], listed: NDArray[np.intp]
) -> list[LabelScore]:
    """The labels at `listed`, with their scores among all labels."""
    scores = softmax(logits)
    return [
        LabelScore(label=labels[i], score=score, logit=logit)
        for i, score, logit in zip(
            listed.tolist(), scores[listed].tolist(), logits[listed].tolist(), strict=True
        )
    ]


def _spans(
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
        spans.append(
            EvidenceSpan(
                start=start,
                end=start + share.bytes,
                tokens=share.tokens,
                weight=share.weight / total,
                label=labels[int(logits.argmax())],
                scores=_scores(labels, logits, listed[_best_first(logits[listed])]),
            )
        )
        start += share.bytes
    return spans
