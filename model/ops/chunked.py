"""Gaussian Mixture Attention over the rows of a step, in PyTorch: exact, linear, state in and out.

Source: arXiv:2606.18283; the chunked form is exact because a memory is a sum over tokens.

Shapes: R rows of C tokens, D documents, H heads, r routing_dim, K components, v value_dim, B block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 64
"""Tokens whose affinities are formed explicitly. Both costs of a token, B * (K + v) inside the
block and K * v / B for the block's own sum, are small next to the projections at this size."""

ROUTING_EPSILON = 1e-6
"""Added to the mean square that a routing vector is normalised by."""


class Rows(NamedTuple):
    """Which tokens of a step are there, and which rows belong together."""

    lengths: Tensor  # (R,) int64: tokens of each row
    valid: Tensor  # (R, C) bool: the token exists
    document: Tensor  # (R,) int64
    belongs: Tensor  # (D, R) float: 1 where the row is the document's
    earlier: Tensor  # (R, R) float: 1 where column's row is of the same document, and before
    last: Tensor  # (R,) bool: no later row of the step is of the same document
    first: Tensor  # (D,) int64: the document's first row; anything if it has none
    count: Tensor  # type: ignore[assignment]  # (D,) int64: the document's rows

    @classmethod
    def of(cls, lengths: Tensor, document_of_row: Tensor, chunk: int, dtype: torch.dtype) -> Rows:
        """Make the masks of a step of R documents from lengths (R,) and document_of_row (R,)."""
        index = torch.arange(len(lengths), device=lengths.device)
        used = lengths > 0
        belongs = (index[:, None] == document_of_row) & used
        same = (document_of_row[:, None] == document_of_row) & used[:, None] & used
        return cls(
            lengths=lengths,
            valid=torch.arange(chunk, device=lengths.device) < lengths[:, None],
            document=document_of_row.long(),
            belongs=belongs.to(dtype),
            earlier=(same & (index < index[:, None])).to(dtype),
            last=used & ~(same & (index > index[:, None])).any(1),
            first=belongs.int().argmax(1),
            count=belongs.sum(1),
        )


class Coefficients(NamedTuple):
    """A mixture with the square expanded, so that scores are two matrix products and a bias."""

    linear: Tensor  # (H, K, r): mu / var
    quadratic: Tensor  # (H, K, r): -1 / (2 var)
    bias: Tensor  # (H, K)

    @classmethod
    def of(cls, mu: Tensor, var: Tensor, log_pi: Tensor) -> Coefficients:
        """Expand the square of mu and var (H, K, r) and log_pi (H, K)."""
        bias = log_pi - 0.5 * (var.log() + mu.square() / var).sum(-1)
        return cls(mu / var, -0.5 / var, bias)


def responsibilities(x: Tensor, mixture: Coefficients, *, normalize: bool) -> Tensor:
    """Score x (R, C, H, r): (R, H, C, K) in at least float32, rows >= 0 that sum to 1.

    With `normalize`, x is RMS-normalised first. Bfloat16 squares against 1 / var would lose the
    posterior.
    """
    x = x.transpose(1, 2).to(mixture.bias.dtype)
    if normalize:
        x = functional.rms_norm(x, x.shape[-1:], eps=ROUTING_EPSILON)
    both = torch.cat([x, x.square()], dim=-1)
    weights = torch.cat([mixture.linear, mixture.quadratic], dim=-1)
    scores = both @ weights.transpose(-1, -2)
    return torch.softmax(scores + mixture.bias[:, None], dim=-1)


def usage(k: Tensor, mixture: Coefficients, rows: Rows, *, normalize: bool) -> Tensor:
    """Return how much of each row's tokens each component takes, (R, H, K).

    These are sums of responsibilities of k (R, C, H, r), whatever is written of a token or
    forgotten: over components they are the row's tokens, and over rows the document's.
    """
    gamma = responsibilities(k, mixture, normalize=normalize)
    return gamma.masked_fill(~rows.valid[:, None, :, None], 0.0).sum(2)


def with_ones(val: Tensor, dtype: torch.dtype) -> Tensor:
    """Append a one, whose memory is the mass, to each value: (R, C, H, v) -> (R, H, C, v + 1)."""
    return functional.pad(val.transpose(1, 2).to(dtype), (0, 1), value=1.0)


def write(
    k: Tensor, val: Tensor, mixture: Coefficients, rows: Rows, *, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Return what each document's rows add to its memory (D, H, K, v) and mass (D, H, K).

    k (R, C, H, r), val (R, C, H, v).
    """
    gamma = responsibilities(k, mixture, normalize=normalize)
    gamma = gamma.masked_fill(~rows.valid[:, None, :, None], 0.0)
    sums = gamma.transpose(-1, -2) @ with_ones(val, gamma.dtype)
    total = torch.einsum("dr,rhkv->dhkv", rows.belongs, sums)
    return total[..., :-1], total[..., -1]


def read(
    q: Tensor,
    memory: Tensor,
    mass: Tensor,
    mixture: Coefficients,
    rows: Rows,
    *,
    normalize: bool,
    epsilon: float,
) -> Tensor:
    """Return each token's mean over its document's memory.

    q (R, C, H, r), memory (D, H, K, v), mass (D, H, K) -> (R, C, H, v).
    """
    both = of_rows(torch.cat([memory, mass[..., None]], dim=-1), rows)
    return normalized(responsibilities(q, mixture, normalize=normalize) @ both, epsilon)


def causal(
    q: Tensor,
    k: Tensor,
    val: Tensor,
    memory: Tensor,
    mass: Tensor,
    mixture: Coefficients,
    rows: Rows,
    *,
    normalize: bool,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's mean over what it and its document's earlier tokens wrote.

    q and k (R, C, H, r), val (R, C, H, v), incoming memory (D, H, K, v) and mass (D, H, K)
    -> out (R, C, H, v) and the memory and mass after the step. Tokens that are not there write
    nothing; what is read at their places means nothing.
    """
    gamma_q = in_blocks(responsibilities(q, mixture, normalize=normalize))
    gamma_k = responsibilities(k, mixture, normalize=normalize)
    gamma_k = in_blocks(gamma_k * rows.valid[:, None, :, None])
    values = in_blocks(with_ones(val, gamma_k.dtype))

    sums = gamma_k.transpose(-1, -2) @ values  # (R, H, blocks, K, v + 1)
    # Exclusive prefixes, of blocks in a row and of rows in a document: nothing reads its own
    # write twice.
    before_block = functional.pad(sums[:, :, :-1].cumsum(2), (0, 0, 0, 0, 1, 0))
    of_row = before_block[:, :, -1] + sums[:, :, -1]
    incoming = torch.cat([memory, mass[..., None]], dim=-1)
    before_row = torch.einsum("rs,shkv->rhkv", rows.earlier, of_row)
    before_row = before_row + of_rows(incoming, rows)
    before = before_block + before_row[:, :, None]

    affinity = (gamma_q @ gamma_k.transpose(-1, -2)).tril()
    summed = (affinity @ values + gamma_q @ before).flatten(2, 3)
    out = normalized(summed[:, :, : q.shape[1]], epsilon)
    after = incoming + torch.einsum("dr,rhkv->dhkv", rows.belongs, of_row)
    return out, after[..., :-1], after[..., -1]


def in_blocks(x: Tensor) -> Tensor:
    """Cut tokens into blocks, the last filled up with zeros: (R, H, C, n) -> (R, H, blocks, B, n).

    A row that is shorter than BLOCK is one block.
    """
    chunk = x.shape[2]
    block = min(chunk, BLOCK)
    blocks = -(-chunk // block)
    if missing := blocks * block - chunk:
        x = functional.pad(x, (0, 0, 0, missing))
    return x.reshape(*x.shape[:2], blocks, block, x.shape[-1])


def of_rows(states: Tensor, rows: Rows) -> Tensor:
    """Pick the state of each row's document: (D, H, K, v + 1) -> (R, H, K, v + 1).

    A row that is not used gets zeros, not a state that was perhaps never written: what it holds
    is multiplied by zero later, and that would let a NaN out.
    """
    used = rows.valid.any(1)[:, None, None, None]
    return states.index_select(0, rows.document).masked_fill(~used, 0.0)


def normalized(summed: Tensor, epsilon: float | Tensor) -> Tensor:
    """Divide sums (R, H, C, v + 1) by their last column, the mass: (R, C, H, v)."""
    return (summed[..., :-1] / (summed[..., -1:] + epsilon)).transpose(1, 2)
