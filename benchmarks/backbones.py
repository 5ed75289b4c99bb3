"""What the whole model is compared with: the same layers around another mixer, or none, and their
matrix products alone.

Shapes: N tokens of one document, W width, H heads, T tail of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from gma.model.config import ModelConfig
from gma.model.layers import MLP, Pooling


class Attention(nn.Module):
    """Causal softmax attention with heads of W / H, over all tokens that it is given."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.project = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, W) -> update (N, W)."""
        parts = self.project(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, val = parts.permute(1, 2, 0, 3)[:, None]  # (1, H, N, W / H) each
        out = functional.scaled_dot_product_attention(q, k, val, is_causal=True)
        update: Tensor = self.out(out[0].transpose(0, 1).flatten(1))
        return update


class BackboneLayer(nn.Module):
    def __init__(self, config: ModelConfig, *, attention: bool) -> None:
        super().__init__()
        self.tail = config.tail
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.taps = nn.Parameter(torch.randn(config.conv_kernel, config.width) * 0.1)
        self.attention = Attention(config) if attention else None
        self.mlp = MLP(config)

    def forward(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, W), tail (T, W) -> x and the tail after the layer."""
        seen = torch.cat([tail, self.norm(x)])
        for tap, weight in enumerate(self.taps):
            x = x + seen[tap : tap + len(x)] * weight
        if self.attention is not None:
            x = x + self.attention(x)
        x = x + self.mlp(x)
        return x, seen[len(seen) - self.tail :]


class Backbone(nn.Module):
    """The classifier with softmax attention in the place of its mixers, or with nothing there."""

    def __init__(self, config: ModelConfig, *, attention: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(
            BackboneLayer(config, attention=attention) for _ in range(config.layers)
        )
        self.pooling = Pooling(config)

    def forward(self, tokens: Tensor, tails: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (N,), tails (L, T, W) -> the sum of the scores (labels,), and the tails after."""
        x = self.embedding(tokens)
        after = []
        for layer, tail in zip(self.layers, tails, strict=True):
            x, tail = layer(x, tail)
            after.append(tail)
        scores = self.pooling(x[None], tokens[None])
        return scores.float().sum((0, 1)), torch.stack(after)


def products(
    config: ModelConfig, tokens: int, device: torch.device, *, fp8: bool
) -> Callable[[], Tensor]:
    """The four matrix products of every layer, on so many tokens, and nothing else.

    They are in bfloat16, or in float8 e4m3 with a scale a row and bfloat16 results.
    """
    inner = config.heads * config.value_dim
    projected = 2 * config.heads * config.routing_dim + inner
    if config.form == "forgetting":
        projected += inner + -(-config.heads // 16) * 16  # the decays, filled up
    shapes = (
        (config.width, projected),
        (inner, config.width),
        (config.width, config.mlp_width),
        (config.mlp_width, config.width),
    )
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16).to(dtype)

    inputs = [random(tokens, wide) for wide, _ in shapes]
    weights = [[random(narrow, wide).T for wide, narrow in shapes] for _ in range(config.layers)]
    of_row = torch.full((tokens, 1), 0.5, device=device)
    of_column = [torch.full((1, narrow), 0.5, device=device) for _, narrow in shapes]
    outputs = [
        torch.empty(tokens, narrow, device=device, dtype=torch.bfloat16) for _, narrow in shapes
    ]

    def run() -> Tensor:
        for layer in weights:
            for x, weight, scale, out in zip(inputs, layer, of_column, outputs, strict=True):
                if fp8:
                    torch._scaled_mm(
                        x, weight, of_row, scale, out_dtype=out.dtype, use_fast_accum=True, out=out
                    )
                else:
                    torch.mm(x, weight, out=out)
        return outputs[-1]

    return run
