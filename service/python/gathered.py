"""What the shares of one document add up to."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from gma.model.reader import Share, Text
from gma.model.weights import Checkpoint
from gma.service.gateway.answers import answered, usage_of
from gma.service.gateway.contract import Finding
from gma.service.gateway.evidence import Evidence


class Gathered:
    """All shares of a document so far, in memory that their number does not change."""

    def __init__(self, checkpoint: Checkpoint, spans: int) -> None:
        """`spans`: pieces of evidence to keep apart, at most."""
        self._checkpoint = checkpoint
        self._evidence = Evidence(spans)
        self._chunks = 0
        self._usage: NDArray[np.float64] | None = None

    def add(self, share: Share) -> None:
        """Add the document's next share."""
        self._evidence.add(share.tokens, share.bytes, share.weight, share.evidence)
        self._chunks += 1
        if share.usage is not None:
            self._usage = share.usage if self._usage is None else self._usage + share.usage

    def and_(self, shares: Iterable[Share]) -> Self:
        """Make another with more shares; this one stays as it is."""
        more = copy.copy(self)
        more._evidence = copy.deepcopy(self._evidence)
        for share in shares:
            more.add(share)
        return more

    def finding(self, text: Text, *, top_k: int | None, evidence: bool) -> Finding:
        """The HTTP service's answer, less its timing, of the text that the shares are of.

        Raises ValueError if there is nothing of it.
        """
        shares = self._evidence.shares
        if not shares:
            raise ValueError("the document is empty")
        shares = [copy.copy(shares[0]), *shares[1:]]
        shares[0].bytes += text.mark
        weight = torch.tensor(sum(share.weight for share in shares))
        scores = torch.from_numpy(np.sum([share.evidence for share in shares], axis=0))
        return answered(
            self._checkpoint.config,
            self._checkpoint.classifier.logits(scores, weight).numpy(),
            usage_of(
                sum(share.bytes for share in shares),
                sum(share.tokens for share in shares),
                self._chunks,
                self._usage,
            ),
            shares,
            top_k=top_k,
            evidence=evidence,
            truncated=text.truncated,
        )
