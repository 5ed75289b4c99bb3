"""What forgetting costs within a block: one number a token.

Everything in a block of tokens is in units of what its first token finds: a write is divided by
what was kept from there up to it, so that a read multiplies by nothing, and only what leaves the
block is multiplied by all that it keeps.

Shapes: R rows of C tokens, H heads, B tokens of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_units(
    rate, grown, left, row, block, C, H: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    """Store what a block is computed with, see `convert`, of the rates (B, HEADS) at which its
    tokens' heads forget, 0 where no token is."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    head = tl.arange(0, HEADS)
    inside = (token < C)[:, None] & (head < H)[None, :]
    at = (row * H + head)[None, :] * C + token[:, None]
    tl.store(grown + at, tl.exp(tl.cumsum(rate, 0)), mask=inside)
    at_block = (row * H + head) * tl.cdiv(C, BLOCK) + block
    tl.store(left + at_block, tl.exp(-tl.sum(rate, 0)), mask=head < H)


@triton.jit
def convert(
    log_keep, lengths, grown, left, C, H: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    """Store what blocks are computed with, of log_keep (R, C, H), contiguous.

    grown (R, H, C): what a token's write is multiplied by, one over what is kept from the block's
    beginning up to it, the token included; left (R, H, blocks): what is kept of what a block finds.
    HEADS is the power of two from H.
    """
    blocks = tl.cdiv(C, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    token = block * BLOCK + tl.arange(0, BLOCK)
    head = tl.arange(0, HEADS)
    there = (token < tl.load(lengths + row))[:, None] & (head < H)[None, :]
    at = (row * C + token)[:, None] * H + head[None, :]
    rate = -tl.load(log_keep + at, mask=there, other=0.0)
    store_units(rate, grown, left, row, block, C, H, HEADS, BLOCK)
