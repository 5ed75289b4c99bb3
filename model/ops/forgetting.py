"""Gaussian Mixture Attention that forgets, over the rows of a step, in PyTorch: exact, linear.

A token multiplies what was written before it by a number of its head's, then writes. Numerator and
mass decay alike, so an output is still a weighted mean of values, and what a row does to a state is
still a pair, its decay and its sums, that composes associatively.

Shapes: as in `gma.model.ops.chunked`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gma.model.ops.chunked import (
    Coefficients,
    Rows,
    in_blocks,
    normalized,
    of_rows,
    responsibilities,
    with_ones,
)

MOST_FORGOTTEN = 0.25
"""The largest rate at which a token forgets, a half-life of 2.8 tokens: decays from the beginning
of a block stay above 1e-7, so that writes may be divided by them."""


def causal(
    q: Tensor,
    k: Tensor,
    val: Tensor,
    memory: Tensor,
    mass: Tensor,
    mixture: Coefficients,
    log_keep: Tensor,
    rows: Rows,
    *,
    normalize: bool,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's mean over what it and its document's earlier tokens wrote.

    log_keep (R, C, H), from -MOST_FORGOTTEN to 0: exp of it is kept of the past. For the other
    shapes see `gma.model.ops.chunked.causal`.
    """
    there = rows.valid[:, None, :, None]
    gamma_q = in_blocks(responsibilities(q, mixture, normalize=normalize))
    gamma_k = responsibilities(k, mixture, normalize=normalize)
    gamma_k = in_blocks(gamma_k.masked_fill(~there, 0.0))
    log_keep = log_keep.transpose(1, 2)[..., None].to(gamma_k.dtype)
    within = in_blocks(log_keep.masked_fill(~there, 0.0)).cumsum(-2)  # (R, H, blocks, B, 1)
    values = in_blocks(with_ones(val, gamma_k.dtype))

    # All in units of what the block's first token finds: what is read cancels them, but for
    # epsilon.
    gamma_k = gamma_k * (-within).exp()
    decays = Decays.of(within[..., -1, 0], rows)
    of_block = within[..., -1:, :].exp() * (gamma_k.transpose(-1, -2) @ values)
    before, after = decays.states(of_block, torch.cat([memory, mass[..., None]], dim=-1), rows)
    affinity = (gamma_q @ gamma_k.transpose(-1, -2)).tril()
    chunk = q.shape[1]
    summed = (affinity @ values + gamma_q @ before).flatten(2, 3)[:, :, :chunk]
    out = normalized(summed, epsilon * (-within).exp().flatten(2, 3)[:, :, :chunk])
    return out, after[..., :-1], after[..., -1]


class Decays(NamedTuple):
    """How much is left, at one place of a step, of what another found or wrote.

    A row's places are its blocks and its end.
    """

    in_row: Tensor  # (R, H, blocks + 1, blocks): at a place, of what an earlier block wrote
    of_row: Tensor  # (R, H, blocks + 1): at a place, of what the row found
    between: Tensor  # (H, R, R): at a row, of what an earlier one of its document wrote
    before: Tensor  # (R, H): at a row, of what its document found
    after: Tensor  # (H, D, R): at a document's end, of what one of its rows wrote
    whole: Tensor  # (D, H): at a document's end, of what it found

    @classmethod
    def of(cls, log_keep: Tensor, rows: Rows) -> Decays:
        """Compute them from the blocks' own, (R, H, blocks).

        Sums are float64: how exact a difference of two is must not depend on what was forgotten
        before both.
        """
        found, dtype = functional.pad(log_keep.double().cumsum(2), (1, 0)), log_keep.dtype
        earlier = torch.ones_like(found[0, 0]).expand(found.shape[2], -1).tril(-1)[:, :-1] > 0
        own = found[:, :, -1]
        before = rows.earlier.double() @ own
        whole = rows.belongs.double() @ own
        upto = (before + own).T[:, None]
        logarithms = (
            (found[..., None] - found[:, :, None, 1:]).masked_fill(~earlier, -torch.inf),
            found,
            (before.T[:, :, None] - upto).masked_fill(rows.earlier == 0, -torch.inf),
            before,
            (whole.T[:, :, None] - upto).masked_fill(rows.belongs == 0, -torch.inf),
            whole,
        )
        return cls(*(x.exp().to(dtype) for x in logarithms))

    def states(self, of_block: Tensor, incoming: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the states before the blocks, (R, H, blocks, K, v + 1), and after the step.

        of_block: what each block wrote and has not forgotten at its end. incoming and after it
        (D, H, K, v + 1).
        """
        in_row = torch.einsum("rhbc,rhckv->rhbkv", self.in_row, of_block)
        of_row = in_row[:, :, -1]
        found = torch.einsum("hrs,shkv->rhkv", self.between, of_row)
        found = found + self.before[..., None, None] * of_rows(incoming, rows)
        before = in_row[:, :, :-1] + self.of_row[:, :, :-1, None, None] * found[:, :, None]
        after = torch.einsum("hdr,rhkv->dhkv", self.after, of_row)
        return before, after + self.whole[..., None, None] * incoming
