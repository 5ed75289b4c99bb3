"""The layers of a classifier.

Shapes: R rows of C tokens, D documents, W width, H heads, K components, v value_dim, T tail of the
convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from gma.model.config import BackboneConfig, ModelConfig
from gma.model.mixers import ForgettingMixer, Mixer
from gma.model.ops.chunked import Rows

QUIET = -11.0
"""Readings of pooling "any" begin here: 10,000 tokens that tell nothing add up to .17."""


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over a few tokens: the model's only notion of position."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.tail = config.tail
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        shape = config.conv_kernel, config.width
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(shape), std=0.1))

    def forward(self, x: Tensor, tail: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Convolve x (R, C, W) after tails (D, T, W): the update (R, C, W) and the new tails.

        A row is preceded by its document's previous row, which is full, or by its document's tail.
        """
        own = self.norm(x)
        chunk = x.shape[1]
        continues = (rows.earlier.sum(1) > 0)[:, None, None]
        previous = own.roll(1, 0)[:, chunk - self.tail :]
        incoming = tail.index_select(0, rows.document).to(own.dtype)
        # Zeros for a row that is not used, as in ops.chunked: its document's tail may be anything.
        incoming = incoming.masked_fill(~rows.valid.any(1)[:, None, None], 0.0)
        before = torch.where(continues, previous, incoming)
        seen = torch.cat([before, own], dim=1)
        update = sum(
            seen[:, tap : tap + chunk] * self.weight[tap] for tap in range(self.weight.shape[0])
        )
        assert isinstance(update, Tensor)
        # Token t of a row lies at t + T, so the last T of the first n tokens start at n.
        lengths = rows.valid.sum(1)
        at = lengths[:, None] + torch.arange(self.tail, device=x.device)
        ends = seen.gather(1, at[..., None].expand(-1, -1, x.shape[-1])).to(tail.dtype)
        final = rows.belongs * rows.last
        written = final.sum(1)[:, None, None] > 0
        owner = final.argmax(1)
        return update, torch.where(written, ends.index_select(0, owner), tail)


class MLP(nn.Module):
    """Works on each token alone: it is normalised, widened, put through GELU and narrowed."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update (..., W) of x (..., W)."""
        hidden = functional.gelu(self.up(self.norm(x)), approximate="tanh")
        down: Tensor = self.down(hidden)
        return down

    @torch.no_grad()
    def reach(self) -> float:
        """Return what no hidden activation exceeds: a normalised row is no longer than sqrt(W)."""
        weight = self.up.weight.float() * self.norm.weight.float()
        return float(weight.norm(dim=1).max()) * math.sqrt(self.up.in_features)


class Layer(nn.Module):
    """Short convolution, mixer and MLP, each added to what it reads."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.convolution = ShortConvolution(config) if config.tail else None
        self.mixer = Mixer(config) if config.form == "paper" else ForgettingMixer(config)
        self.mlp = MLP(config)

    def convolve(self, x: Tensor, tail: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Add the convolution to x (R, C, W) with tail (D, T, W); return x and the new tail."""
        if self.convolution is None:
            return x, tail
        update, tail = self.convolution(x, tail, rows)
        return x + update, tail

    def recall(self, x: Tensor, memory: Tensor, mass: Tensor, rows: Rows) -> Tensor:
        """Do a bidirectional layer's second half: convolved x (R, C, W) reads a finished memory."""
        return self._add(x, self.mixer.read(x, memory, mass, rows))

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mass: Tensor,
        tail: Tensor,
        rows: Rows,
        usage: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Do a causal layer: x (R, C, W) and the documents' states -> x and the states after.

        `usage` gets the rows' usage of its components, (R, H, K).
        """
        x, tail = self.convolve(x, tail, rows)
        if usage is not None:
            usage.append(self.mixer.usage(x, rows))
        update, memory, mass = self.mixer.causal(x, memory, mass, rows)
        return self._add(x, update), memory, mass, tail

    def _add(self, x: Tensor, update: Tensor) -> Tensor:
        x = x + update
        added: Tensor = x + self.mlp(x)
        return added


class Pooling(nn.Module):
    """Scores each token for each label: what is summed over a document and any part of it.

    Pooling "mean" adds up a token's deep score, gated, and the token's own. The document's logits
    are the mean of its tokens' scores, so any part's share of them is exact. The tokens' own scores
    are a bag of words: a linear model of the whole document, however long.

    Pooling "any" adds up rates, which are never negative: softplus of a token's reading and its own
    score, times the label's factor. See `gma.model.scores.log_odds` for what their sum says.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        labels = len(config.labels)
        self.any = config.pooling == "any"
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.deep = nn.Linear(config.width, labels if self.any else labels + 1)
        self.token = nn.Embedding(config.vocab_size, labels)
        nn.init.zeros_(self.token.weight)
        if self.any:
            nn.init.constant_(self.deep.bias, QUIET)
            self.factor = nn.Parameter(torch.ones(labels), requires_grad=False)

    def deep_scores(self, x: Tensor) -> Tensor:
        """Score x (R, C, W) deeply for a mean, (R, C, labels).

        The gate >= 0 says how much the token tells.
        """
        both = self._read(x)
        return both[..., :-1] * functional.softplus(both[..., -1:])

    def gated(self, x: Tensor) -> Tensor:
        """Return what of x (R, C, W) the deep scores are a linear function of, (R, C, 1 + W).

        That function is `scores_of`; it may be taken after any sum over tokens.
        """
        x = self.norm(x)
        gate = functional.softplus(functional.linear(x, self.deep.weight[-1:], self.deep.bias[-1:]))
        return torch.cat([gate, gate * x], -1)

    def scores_of(self, gated: Tensor) -> Tensor:
        """Turn `gated` (..., 1 + W), or sums of it, into deep scores (..., labels)."""
        weight = torch.cat([self.deep.bias[:-1, None], self.deep.weight[:-1]], 1)
        return functional.linear(gated, weight)

    def _read(self, x: Tensor) -> Tensor:
        read: Tensor = self.deep(self.norm(x))
        return read.to(torch.promote_types(read.dtype, torch.float32))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Score hidden x (R, C, W) of tokens (R, C): (R, C, labels)."""
        own: Tensor = self.token(tokens)
        if self.any:
            return functional.softplus(self._read(x) + own) * self.factor
        return self.deep_scores(x) + own

    @torch.no_grad()
    def scale_(self, deep: float, token: float, offsets: Sequence[float] | None = None) -> None:
        """Multiply the two parts of every score, in place, and add the labels' offsets (labels,).

        The tokens' own scores take the offsets: each of a document's tokens has its share of them.
        """
        self.deep.weight[:-1] *= deep
        self.deep.bias[:-1] *= deep
        self.token.weight *= token
        if offsets is not None:
            self.token.weight += self.token.weight.new_tensor(offsets)
