"""What published layers are made of, beside projections and the recurrence.

Shapes: B documents of N tokens, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

TAPS = 4
"""Tokens that a short convolution sees, as published layers have it."""


class Norm(nn.RMSNorm):
    """Normalises in the dtype that it is given, which one kernel does."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Taps(nn.Module):
    """A causal depthwise convolution over a few tokens."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(TAPS, channels).uniform_(-0.5, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, channels) -> the same."""
        tokens = x.shape[1]
        seen = functional.pad(x, (0, 0, TAPS - 1, 0))
        weight = self.weight.to(x.dtype)
        out = seen[:, :tokens] * weight[0]
        for tap in range(1, TAPS):
            out = torch.addcmul(out, seen[:, tap : tap + tokens], weight[tap])
        return out


class Rates(nn.Module):
    """Steps and rates of forgetting by head, begun as Mamba's are."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        steps = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.bias = nn.Parameter(steps.expm1().log())  # softplus of it is the step
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())

    def forward(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """raw (B, N, H) -> steps (B, N, H) and rates (H,), below 0, in at least float32."""
        raw = raw.to(self.bias.dtype)
        return functional.softplus(raw + self.bias), -self.log_rate.exp()
