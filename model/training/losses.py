"""What a training step makes small."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gma.model.classifier import Classifier
from gma.model.ops.chunked import Rows
from gma.model.training.config import TrainingConfig
from gma.model.training.crops import Drawn
from gma.model.training.cross_entropy import cross_entropy
from gma.model.training.next_token import next_token_loss
from gma.model.training.passages import Passages


class Losses(nn.Module):
    """The losses of a batch of crops: the label's at every prefix, the next token's, the spans'."""

    def __init__(
        self, classifier: Classifier, config: TrainingConfig, rates: Tensor | None = None
    ) -> None:
        """``rates`` (labels,): how many crops have each label, if they may have any number."""
        super().__init__()
        self.classifier = classifier
        self.config = config
        self.rates = rates

    def forward(self, drawn: Drawn, keep: Tensor) -> Tensor:
        """Return label, next-token and span loss (3,) of crops; keep (B, N) is 0 for a token that
        is hidden."""
        tokens, lengths, labels, _ = drawn
        # Each crop is a document of one row, with nothing before it.
        which = torch.arange(len(tokens), device=tokens.device)
        rows = Rows.of(lengths, which, tokens.shape[1], torch.float32)
        embedded = self.classifier.embedding(tokens) * keep[..., None]
        hidden = self.classifier.hidden_alone(embedded, rows)
        with torch.autocast(tokens.device.type, enabled=False):
            read = functional.dropout(hidden.float(), self.config.dropout, self.training)
            if self.classifier.config.pooling == "any":
                label, of_spans = self.passages(read, drawn, rows)
            else:
                label = self.label_loss(read, labels, rows)
                of_spans = torch.zeros_like(label)
        return torch.stack([label, self.language_loss(hidden, tokens, rows), of_spans])

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # inductor 2.11 fails on its sums
    def passages(self, hidden: Tensor, drawn: Drawn, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return label and span loss of hidden (B, N, W), for pooling "any"."""
        rates = self.classifier.pooling(hidden, drawn.tokens) * rows.valid[..., None]
        passages = Passages.of(rates, drawn)
        label = passages.label_loss(self.config.prefix, self.smoothing, self.rates)
        return label.float(), passages.span_loss().float()

    @property
    def smoothing(self) -> float:
        """How much labels are smoothed now."""
        return self.config.label_smoothing if self.training else 0.0

    def label_loss(self, hidden: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        """Return the mean cross-entropy over the prefixes of hidden (B, N, W).

        It takes the deep scores alone: beside the tokens' own they had little left to learn.
        """
        there = rows.valid[..., None].float()
        pooling = self.classifier.pooling
        # Summed before they are scored: a score for each token and label would be far more.
        gated = self._up_to(pooling.gated(hidden) * there) / self._up_to(there).clamp_min(1.0)
        prefixes = pooling.scores_of(gated)
        return cross_entropy(
            prefixes.flatten(0, 1),
            labels.repeat_interleave(prefixes.shape[1], 0),
            smoothing=self.smoothing,
            rates=self.rates,
        ).mean()

    def _up_to(self, x: Tensor) -> Tensor:
        """Sum over the first tokens: (B, N, ...) -> (B, prefixes, ...)."""
        return x.reshape(len(x), -1, self.config.prefix, x.shape[-1]).sum(2).cumsum(1)

    def language_loss(self, hidden: Tensor, tokens: Tensor, rows: Rows) -> Tensor:
        """Return the mean cross-entropy of next tokens, hidden (B, N, W) scored by the embedding.

        It is 0 for a bidirectional model, which has seen what it would have to guess.
        """
        if not self.classifier.config.causal or not any(self.config.language_weight):
            return hidden.new_zeros((), dtype=torch.float32)
        return next_token_loss(hidden, tokens, rows, self.classifier.embedding.weight)
