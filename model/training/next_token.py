"""The loss of a text's next tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gma.model.ops.chunked import Rows

LOGITS = 1 << 14
"""Tokens whose next-token logits, as many as the vocabulary, are in memory at a time."""


def next_token_loss(hidden: Tensor, tokens: Tensor, rows: Rows, embedding: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of the tokens after each of rows (B, N).

    hidden (B, N, W), what a causal model knows at each, is scored by the embedding (vocab, W).
    """
    targets = next_tokens(tokens, rows)
    # Piece by piece and recomputed backward: the logits of all tokens would fill the memory.
    pieces = zip(
        torch.split(hidden.flatten(0, 1), LOGITS),
        torch.split(targets.flatten(), LOGITS),
        strict=True,
    )
    total = [checkpoint(_next_token, x, embedding, y, use_reentrant=False) for x, y in pieces]
    return torch.stack(total).sum() / (targets >= 0).sum().clamp_min(1)


def next_tokens(tokens: Tensor, rows: Rows) -> Tensor:
    """Return the token after each of rows (B, N); -100 where there is none."""
    targets = tokens.roll(-1, 1).masked_fill(~rows.valid.roll(-1, 1), -100)
    targets[:, -1] = -100
    return targets


def _next_token(hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    """Sum cross-entropies: hidden (n, W), embedding (vocab, W), targets (n,), -100 for none."""
    # Their norm is 4: the embedding's entries begin near 0.5, so the logits near 2.
    normed = functional.rms_norm(hidden, hidden.shape[-1:], eps=1e-6) * hidden.shape[-1] ** -0.5
    logits = functional.linear(normed * 4.0, embedding)
    return functional.cross_entropy(logits.float(), targets, reduction="sum")
