"""What passages of crops say about labels, and the losses of a model whose pooling is "any".

Such a model's rates are those at which a label's passages are found. A part of a document has a
label if one of its spans is in that part, whatever the rest of the document says.

Shapes: B crops of N tokens, M spans a document, P prefixes, L labels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gma.model.scores import LEAST, log_odds
from gma.model.training.crops import Drawn
from gma.model.training.cross_entropy import binary_cross_entropies

THOUSAND = 1024
"""Tokens that the spans' loss is told of, so that long crops weigh no more than short ones."""


class Passages(NamedTuple):
    """The rates of crops' tokens, and what is known of where their labels stand."""

    rates: Tensor  # (B, N, L): 0 where no token is
    sums: Tensor  # (B, N + 1, L) float64: of the tokens before each, so differences are exact
    lengths: Tensor  # (B,)
    has: Tensor  # (B, L) bool: the document has the label
    label: Tensor  # (B, M): of each span, -1 where there is none
    start: Tensor  # (B, M): its first token, which may stand before the crop
    end: Tensor  # (B, M): the first token after it, which may stand behind the crop

    @classmethod
    def of(cls, rates: Tensor, drawn: Drawn) -> Passages:
        """Take rates (B, N, L) of what was drawn."""
        sums = functional.pad(rates.double().cumsum(1), (0, 0, 1, 0))
        return cls(rates, sums, drawn.lengths, drawn.labels, *drawn.spans.unbind(-1))

    @property
    def of_label(self) -> Tensor:
        """(B, M, L) float: 1 where the span is the label's."""
        labels = torch.arange(self.has.shape[1], device=self.label.device)
        return (self.label[..., None] == labels).float()

    def label_loss(self, prefix: int, smoothing: float, towards: Tensor | None) -> Tensor:
        """Return the mean over prefixes of the labels' binary cross-entropies, summed.

        A prefix has a label that its document has not: no. A label that has spans: yes if one ends
        in the prefix, no if none begins there, and between them nobody knows. A label whose spans
        nobody told: yes, of the whole crop alone.
        """
        count = self.rates.shape[1] // prefix
        ends = torch.arange(1, count + 1, device=self.rates.device) * prefix
        ends = ends.minimum(self.lengths[:, None])  # (B, P)
        ended = (self.start >= 0)[:, None] & (self.end[:, None] <= ends[..., None])  # (B, P, M)
        begun = (self.end > 0)[:, None] & (self.start[:, None] < ends[..., None])
        of_label = self.of_label
        there, near = (x.float() @ of_label > 0 for x in (ended, begun))
        traced, has = of_label.any(1)[:, None], self.has[:, None]
        whole = (ends == self.lengths[:, None])[..., None]
        targets = torch.where(traced, there, has)
        known = torch.where(traced, there | ~near, ~has | whole)
        sums = self.sums.gather(1, ends[..., None].expand(-1, -1, has.shape[-1]))
        each = binary_cross_entropies(log_odds(sums), targets, smoothing=smoothing, rates=towards)
        return (each * known).sum() / known.sum().clamp_min(1) * has.shape[-1]

    def span_loss(self) -> Tensor:
        """Return how unlikely the spans are: -log of a Poisson process's likelihood, per
        1,024 tokens.

        Each span that is wholly in its crop should be found, at any of its tokens: -log(1 -
        exp(-its sum)). Nothing should be found elsewhere: the sum of all rates there. Labels whose
        spans nobody told are left out, and so are documents without any span.
        """
        batch, tokens, labels = self.rates.shape
        is_one = self.label >= 0
        takes_part = is_one.any(1)[:, None] & (self.of_label.any(1) | ~self.has)  # (B, L)
        row = torch.arange(batch, device=self.rates.device)[:, None]
        label = self.label.clamp_min(0)

        def at(token: Tensor) -> Tensor:
            return (row * (tokens + 1) + token.clamp(0, tokens)) * labels + label

        # How many spans begin minus how many end at a token, so their running sum is how many
        # there are.
        edges = torch.zeros_like(self.sums).flatten()
        for place, step in (self.start, 1.0), (self.end, -1.0):
            edges = edges.scatter_add(0, at(place).flatten(), (is_one * step).double().flatten())
        covered = edges.view_as(self.sums).cumsum(1)[:, :-1] > 0
        outside = self.rates.masked_fill(covered, 0.0).sum(1) * takes_part
        flat = self.sums.flatten()
        found = (flat[at(self.end)] - flat[at(self.start)]).clamp_min(LEAST)
        whole = is_one & (self.start >= 0) & (self.end <= self.lengths[:, None])
        missed = -torch.log(-torch.expm1(-found)) * whole
        read = (self.lengths * is_one.any(1)).sum().clamp_min(1)
        return (outside.sum() + missed.sum()) / (read / THOUSAND)
