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
    Verdict,
)
from gma.service.gateway.evidence import Share
from gma.service.gateway.scores import logits_of, scores


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
    if `evidence` is asked for. The scores of the best `top_k` labels are listed, of all of them by
    default.
    """
    listed = _best_first(logits)[:top_k]
    found = scores(logits, config.multi_label)
    finding = Finding(
        model=config.name,
        **verdict(config, logits, found),  # type: ignore[typeddict-item]  # has no other keys
        scores=_scores(config, logits, found, listed),
        usage=usage,
    )
    # A client should not have to pass thousands of spans to see these two.
    if timing:
        finding = Answer(**finding, timing_ms=timing)
    if truncated:
        finding["truncated"] = True
    if evidence:
        finding["evidence"] = _spans(config, shares, listed)
    return finding


def usage_of(size: int, tokens: int, chunks: int, components: NDArray[np.float64] | None) -> Usage:
    """What was read, `size` bytes, and what (L, H, K) components took of it if that was counted."""
    usage = Usage(bytes=size, tokens=tokens, chunks=chunks)
    if components is not None:
        usage["components"] = components.tolist()
    return usage


def verdict(
    config: ModelConfig, logits: NDArray[np.float64], found: NDArray[np.float64]
) -> Verdict:
    """What the model says is there, from the logits and the scores, (labels,), of all labels."""
    labels, least = config.labels, config.least_scores
    ranked = _best_first(logits).tolist()
    if least is None:
        return Verdict(label=labels[ranked[0]])
    if config.multi_label:
        return Verdict(labels=[labels[i] for i in ranked if found[i] >= least[i]])
    best = ranked[0]
    return Verdict(label=labels[best] if found[best] >= least[best] else None)


def _best_first(logits: NDArray[np.float64]) -> NDArray[np.intp]:
    """The indices of all labels; those that are equally good stay in the labels' order."""
    return np.argsort(-logits, kind="stable")


def _scores(
    config: ModelConfig,
    logits: NDArray[np.float64],
    found: NDArray[np.float64],
    listed: NDArray[np.intp],
) -> list[LabelScore]:
    """The labels at `listed`, with what there is of `logits` and of scores, `found`, for them."""
    least = config.least_scores
    told = [
        LabelScore(label=config.labels[i], score=score, logit=logit)
        for i, score, logit in zip(
            listed.tolist(), found[listed].tolist(), logits[listed].tolist(), strict=True
        )
    ]
    if least is not None:
        for i, each in zip(listed.tolist(), told, strict=True):
            each["threshold"] = least[i]
    return told


def _spans(
    config: ModelConfig, shares: Sequence[Share], listed: NDArray[np.intp]
) -> list[EvidenceSpan]:
    """The shares as spans that tile the document, with the scores of the labels at `listed`.

    What the prior takes off the document's logits is taken off each span's alike, so the spans'
    weighted mean is the document's logits. With pooling "any" the document's evidence is their sum,
    so what 1 - score is of the spans multiplies to what it is of the document.
    """
    total = sum(share.weight for share in shares)
    seen = total / (total + config.prior_tokens)
    spans = []
    start = 0
    for share in shares:
        logits = logits_of(config, share.evidence, share.weight) * seen
        found = scores(logits, config.multi_label)
        spans.append(
            EvidenceSpan(
                start=start,
                end=start + share.bytes,
                tokens=share.tokens,
                weight=share.weight / total,
                **verdict(config, logits, found),
                scores=_scores(config, logits, found, listed[_best_first(logits[listed])]),
            )
        )
        start += share.bytes
    return spans
