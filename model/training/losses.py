"""What a training step makes small."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gma.model.classifier import Classifier
from gma.model.ops.chunked import Rows
from gma.model.training.config import TrainingConfig
from gma.model.training.cross_entropy import cross_entropy
from gma.model.training.next_token import next_token_loss


class Losses(nn.Module):
    """The losses of a batch of crops: the label's at every prefix, and the next token's."""

    def __init__(
        self, classifier: Classifier, config: TrainingConfig, rates: Tensor | None = None
    ) -> None:
        """``rates`` (labels,): how many crops have each label, if they may have any number."""
        super().__init__()
        self.classifier = classifier
        self.config = config
        self.rates = rates

    def forward(self, tokens: Tensor, lengths: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
        """Return label and next-token loss (2,): tokens and keep (B, N), lengths (B,).

        labels (B,), or (B, labels) bool if there are ``rates``.
        """
        # Each crop is a document of one row, with nothing before it.
        which = torch.arange(len(tokens), device=tokens.device)
        rows = Rows.of(lengths, which, tokens.shape[1], torch.float32)
        embedded = self.classifier.embedding(tokens) * keep[..., None]
        hidden = self.classifier.hidden_alone(embedded, rows)
        with torch.autocast(tokens.device.type, enabled=False):
            label = self.label_loss(hidden.float(), labels, rows)
        return torch.stack([label, self.language_loss(hidden, tokens, rows)])

    def label_loss(self, hidden: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        """Return the mean cross-entropy over the prefixes of hidden (B, N, W).

        It takes the deep scores alone: beside the tokens' own they had little left to learn.
        """
        hidden = functional.dropout(hidden, self.config.dropout, training=self.training)
        there = rows.valid[..., None].float()
        scores = self.classifier.pooling.deep_scores(hidden) * there
        prefixes = self._up_to(scores) / self._up_to(there).clamp_min(1.0)
        return cross_entropy(
            prefixes.flatten(0, 1),
            labels.repeat_interleave(prefixes.shape[1], 0),
            smoothing=self.config.label_smoothing if self.training else 0.0,
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
