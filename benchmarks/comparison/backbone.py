"""The one backbone: in each layer a short convolution, a mixer and an MLP, each added to what it
reads.

Shapes: B documents of N tokens, W width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from benchmarks.comparison.gaussian import Forgetting
from benchmarks.comparison.mixers import Mixer
from benchmarks.comparison.parts import Taps
from benchmarks.comparison.sizes import Size
from gma.model.layers import MLP
from gma.model.ops.chunked import Rows

LOGITS = 1 << 14
"""Tokens whose logits, as many as the vocabulary, are in memory at a time."""

STEP = 8
"""MLPs are this, or a multiple of it, wide."""


class Batch(NamedTuple):
    """Documents, and what is asked of them."""

    tokens: Tensor  # (B, N) int64
    lengths: Tensor  # (B,) int64: tokens of each; what follows is nobody's
    targets: Tensor  # (B, N), -100 where nothing is asked; or labels of documents, (B,)


class Layer(nn.Module):
    def __init__(self, size: Size, mixer: Mixer, mlp: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(size.width, eps=1e-6)
        self.convolution = Taps(size.width)
        nn.init.normal_(self.convolution.weight, std=0.1)
        self.mixer = mixer
        self.mlp = MLP(size.config(form="forgetting", mlp=mlp))

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """x (B, N, W) -> x after the layer."""
        x = x + self.convolution(self.norm(x))
        x = x + self.mixer(x, rows)
        return x + self.mlp(x)  # type: ignore[no-any-return]


class Backbone(nn.Module):
    """Tokens in; next tokens, or a document's label, out."""

    def __init__(self, size: Size, mixer: type[Mixer]) -> None:
        super().__init__()
        self.size = size
        # One token more, that stands for those hidden from a model which reads both ways.
        self.embedding = nn.Embedding(size.vocabulary + 1, size.width)
        nn.init.normal_(self.embedding.weight, std=0.5)
        mixers = [mixer(size) for _ in range(size.layers)]
        mlp = matched(size, mixers[0])
        self.layers = nn.ModuleList(Layer(size, each, mlp) for each in mixers)
        self.norm = nn.RMSNorm(size.width, eps=1e-6)
        self.head = nn.Linear(size.width, size.labels + 1) if size.labels else None
        for name, parameter in self.named_parameters():
            if name.endswith((".out.weight", ".down.weight")):
                nn.init.normal_(parameter, std=0.5 * (parameter.shape[1] * size.layers) ** -0.5)

    @property
    def mixers(self) -> list[Mixer]:
        return [module for module in self.modules() if isinstance(module, Mixer)]

    @property
    def causal(self) -> bool:
        return self.mixers[0].causal

    def choose(self, fast: bool) -> None:
        """Use kernels for a GPU, or the plain definitions, in all layers."""
        for mixer in self.mixers:
            mixer.choose(fast)

    def hidden(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (B, N), of which documents have lengths (B,) -> (B, N, W)."""
        which = torch.arange(len(tokens), device=tokens.device)
        wide = torch.promote_types(self.embedding.weight.dtype, torch.float32)
        rows = Rows.of(lengths, which, tokens.shape[1], wide)
        x: Tensor = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, rows)
        return x

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Score hidden (..., W) by the embedding, (..., vocabulary), in at least float32."""
        # Their norm is 4: the embedding's entries begin near 0.5, so the logits near 2.
        normal = self.norm(hidden) * (4.0 * self.size.width**-0.5)
        logits = functional.linear(normal, self.embedding.weight[: self.size.vocabulary])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def token_losses(self, batch: Batch) -> Tensor:
        """Sum the cross-entropies, in nats, of the tokens that are asked for."""
        hidden = self.hidden(batch.tokens, batch.lengths).flatten(0, 1)
        pieces = zip(hidden.split(LOGITS), batch.targets.flatten().split(LOGITS), strict=True)
        # Recomputed backward: the logits of all tokens would fill the memory.
        parts = [
            checkpoint(self._cross_entropy, *each, use_reentrant=False, preserve_rng_state=False)
            for each in pieces
        ]
        return torch.stack(parts).sum()

    def _cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self.token_logits(hidden), targets, reduction="sum")

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of what is asked for: tokens or labels."""
        if batch.targets.dim() == 1:
            return functional.cross_entropy(self.label_logits(batch), batch.targets)
        return self.token_losses(batch) / (batch.targets >= 0).sum().clamp_min(1)

    def label_logits(self, batch: Batch) -> Tensor:
        """Score documents for each label, (B, labels): a mean of their tokens' scores, of which
        each weighs what it says itself, from e^-8 to e^8."""
        assert self.head is not None, "this model was made for tokens"
        hidden = self.hidden(batch.tokens, batch.lengths)
        scores: Tensor = self.head(self.norm(hidden))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        there = torch.arange(hidden.shape[1], device=hidden.device) < batch.lengths[:, None]
        weight = (8.0 * torch.tanh(scores[..., -1] / 8.0)).masked_fill(~there, -math.inf)
        return torch.einsum("bn,bnl->bl", weight.softmax(-1), scores[..., :-1])


def matched(size: Size, mixer: Mixer) -> int:
    """How wide MLPs are beside this mixer, so that a layer has as many parameters as one of GMA
    that forgets.

    Raises ValueError if the mixer alone has more.
    """
    own = size.config(form="forgetting").mlp_width
    wanted = parameters(Forgetting(size)) + 2 * size.width * own
    width = round((wanted - parameters(mixer)) / (2 * size.width) / STEP) * STEP
    if width < STEP:
        raise ValueError(f"{type(mixer).__name__} leaves no parameters for an MLP of {size}")
    return width


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
