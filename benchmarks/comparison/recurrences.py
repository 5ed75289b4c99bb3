"""The mixers' recurrences by their definitions, in PyTorch: for batches, with gradients, anywhere.

Shapes: B documents of N tokens, H heads, r width of a query and a key, v of a value, S slots.
Decays are logarithms, at most 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 64
SHORT = 16
"""Tokens of a chunk in whose units decays of single directions are: their exponentials are formed
both ways, so few tokens must not forget more than a float32 holds."""


class Recurrences(NamedTuple):
    """An implementation of what the mixers need; for its functions see this module's."""

    name: str
    linear: Callable[[Tensor, Tensor, Tensor], Tensor]
    scan: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    gated: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    slots: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    delta: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _wide(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, which then computes in at least float32 whatever it is given."""

    @wraps(function)
    def wide(*parts: Tensor) -> Tensor:
        with torch.autocast(parts[0].device.type, enabled=False):
            return function(*(x.to(torch.promote_types(x.dtype, torch.float32)) for x in parts))

    return wide


@_wide
def linear(q: Tensor, k: Tensor, val: Tensor) -> Tensor:
    """q, k (B, N, H, r), val (B, N, H, v) -> each query's reading (B, N, H, v) of a sum."""
    return _decayed(q, k, val, torch.zeros_like(q[..., 0]))


@_wide
def scan(x: Tensor, step: Tensor, rate: Tensor, key: Tensor, query: Tensor) -> Tensor:
    """Mamba-2's scan of x (B, N, H, v), in steps (B, N, H) at rates (H,), at most 0.

    key and query (B, N, 1, r) are all heads'.
    """
    heads = x.shape[2]
    keys = key * step[..., None]
    return _decayed(query.expand(-1, -1, heads, -1), keys, x, step * rate)


def _decayed(q: Tensor, k: Tensor, val: Tensor, decay: Tensor) -> Tensor:
    """Read a sum that forgets by decay (B, N, H), through differences of sums of decays."""
    tokens = q.shape[1]
    q, k, val = (_in_chunks(x, CHUNK) for x in (q, k, val))
    total = _in_chunks(decay[..., None], CHUNK).cumsum(-2)
    last = total[..., -1:, :]
    sums = (k * (last - total).exp()).mT @ val
    before = _states_before(sums, last.exp())
    out = ((q @ k.mT) * _kept_within(total)) @ val + (q * total.exp()) @ before
    return _in_tokens(out, tokens)


@_wide
def gated(q: Tensor, k: Tensor, val: Tensor, decay: Tensor) -> Tensor:
    """Gated linear attention: q, k and decay (B, N, H, r), val (B, N, H, v) -> (B, N, H, v).

    Each of a key's directions is forgotten at a rate of its own.
    """
    tokens = q.shape[1]
    q, k, val, decay = (_in_chunks(x, SHORT) for x in (q, k, val, decay))
    total = decay.cumsum(-2)
    last = total[..., -1:, :]
    read = q * total.exp()
    before = _states_before((k * (last - total).exp()).mT @ val, last.exp().mT)
    out = (read @ (k * (-total).exp()).mT).tril() @ val + read @ before
    return _in_tokens(out, tokens)


@_wide
def slots(q: Tensor, k: Tensor, val: Tensor, strength: Tensor, decay: Tensor) -> Tensor:
    """Gated slot attention: q, k (B, N, H, r), val (B, N, H, v), strength and decay (B, N, H, S).

    A slot's key and value are sums of those written to it; slots are read by the softmax of their
    keys' products with the query, unscaled -> (B, N, H, v).
    """
    tokens = q.shape[1]
    q, k, strengths, decays = (_in_chunks(x, SHORT) for x in (q, k, strength, decay))
    total = decays.cumsum(-2)
    last = total[..., -1:, :]
    before = _states_before(k.mT @ (strengths * (last - total).exp()), last.exp())
    within = (q @ k.mT).tril() @ (strengths * (-total).exp())
    scores = _in_tokens((within + q @ before) * total.exp(), tokens)
    return gated(scores.softmax(-1), strength, val, decay)


@_wide
def delta(q: Tensor, k: Tensor, val: Tensor, decay: Tensor, share: Tensor) -> Tensor:
    """Gated delta rule: q, k (B, N, H, r), val (B, N, H, v), decay and share (B, N, H).

    A memory forgets, and then replaces so much, share, of what it holds for a key by the value
    -> (B, N, H, v). What is new in a chunk solves a triangular system (arXiv:2412.06464).
    """
    tokens = q.shape[1]
    q, k, val = (_in_chunks(x, CHUNK) for x in (q, k, val))
    total, share = (
        _in_chunks(decay[..., None], CHUNK).cumsum(-2),
        _in_chunks(share[..., None], CHUNK),
    )
    last, kept = total[..., -1:, :], _kept_within(total)
    system = (share * (k @ k.mT) * kept).tril(-1)
    wanted = torch.cat([share * val, share * total.exp() * k], -1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    own, found = solved.split([val.shape[-1], k.shape[-1]], -1)
    written, read = (k * (last - total).exp()).mT, q * total.exp()
    state, before, new = torch.zeros_like(written[:, :, 0] @ own[:, :, 0]), [], []
    for chunk in range(q.shape[2]):
        before.append(state)
        new.append(own[:, :, chunk] - found[:, :, chunk] @ state)
        state = last[:, :, chunk].exp() * state + written[:, :, chunk] @ new[-1]
    out = read @ torch.stack(before, 2) + ((q @ k.mT) * kept) @ torch.stack(new, 2)
    return _in_tokens(out, tokens)


PLAIN = Recurrences("PyTorch", linear, scan, gated, slots, delta)


def _kept_within(total: Tensor) -> Tensor:
    """What a token keeps of an earlier one's write, (..., size, size), by sums (..., size, 1)."""
    size = total.shape[-2]
    later = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
    return (total - total.mT).masked_fill(later, -torch.inf).exp()


def _in_chunks(x: Tensor, size: int) -> Tensor:
    """(B, N, H, n) -> (B, H, chunks, size, n), the last chunk filled up with zeros."""
    x = functional.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % size))
    return x.unflatten(2, (-1, size))


def _in_tokens(x: Tensor, tokens: int) -> Tensor:
    """(B, H, chunks, size, n) -> (B, N, H, n)."""
    return x.flatten(2, 3)[:, :, :tokens].transpose(1, 2)


def _states_before(sums: Tensor, kept: Tensor) -> Tensor:
    """States (B, H, chunks, r, v) before chunks that keep of them, and then add sums."""
    state, before = torch.zeros_like(sums[:, :, 0]), []
    for chunk in range(sums.shape[2]):
        before.append(state)
        state = kept[:, :, chunk] * state + sums[:, :, chunk]
    return torch.stack(before, 2)
