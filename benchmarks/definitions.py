"""What each mixer computes by its definition, in float64: contenders are held to it.

Shapes: one document of N tokens, H heads, r width of a query and a key, v of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gma.model.ops import reference
from gma.model.ops.chunked import ROUTING_EPSILON


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, by the norm of what is expected, which is in float64."""
    difference = torch.linalg.vector_norm(found.double().reshape(expected.shape) - expected)
    return float(difference / torch.linalg.vector_norm(expected))


def responsibilities(x: Tensor, distribution: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """x (N, H, r), which is RMS-normalised first -> responsibilities (N, H, K)."""
    x = x.double()
    x = x / (x.square().mean(-1, keepdim=True) + ROUTING_EPSILON).sqrt()
    mu, var, log_pi = (part.double() for part in distribution)
    return reference.responsibilities(x, mu, var, log_pi)


def mixture_attention(
    gamma_q: Tensor, gamma_k: Tensor, val: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """gammas (N, H, K), val (N, H, v) -> out (N, H, v), memory (H, K, v), mass (H, K)."""
    heads, components = gamma_k.shape[1:]
    memory = torch.zeros(heads, components, val.shape[-1], device=val.device, dtype=torch.float64)
    return reference.causal(
        gamma_q.double(), gamma_k.double(), val.double(), memory, memory[..., 0], epsilon=epsilon
    )


def softmax_attention(q: Tensor, k: Tensor, val: Tensor, *, causal: bool) -> Tensor:
    """q, k (N, H, r), val (N, H, v) -> out (N, H, v)."""
    scale = q.shape[-1] ** -0.5
    out = torch.empty_like(val, dtype=torch.float64)
    for head in range(q.shape[1]):
        scores = q[:, head].double() @ k[:, head].double().T * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        out[:, head] = torch.softmax(scores, -1) @ val[:, head].double()
    return out


def linear_attention(q: Tensor, k: Tensor, val: Tensor, decay: Tensor | None = None) -> Tensor:
    """q, k (N, H, r), val (N, H, v) -> each query's reading (N, H, v) of a decayed sum of k x val.

    decay (N, H): how much of the sum each token keeps, as a logarithm; or (N, H, r), of each of a
    key's directions, which must not sum up to more than float64 can hold the exponential of.
    """
    out = torch.empty_like(val, dtype=torch.float64)
    for head in range(q.shape[1]):
        query, key = q[:, head].double(), k[:, head].double()
        kept = None
        if decay is not None:
            total = decay[:, head].double().cumsum(0)
            if total.dim() == 2:
                query, key = query * total.exp(), key * (-total).exp()
            else:
                kept = (total[:, None] - total).clamp(max=0).exp()
        scores = query @ key.T
        scores = (scores if kept is None else scores * kept).tril()
        out[:, head] = scores @ val[:, head].double()
    return out


def gated_delta(q: Tensor, k: Tensor, val: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """q, k (N, H, r), val (N, H, v), decay and beta (N, H) -> each query's reading (N, H, v).

    Of a memory that keeps exp(decay) of what it holds, and then replaces so much, beta, of what it
    holds for a key by the value.
    """
    state = torch.zeros(*k.shape[1:], val.shape[-1], device=k.device, dtype=torch.float64)
    out = torch.empty_like(val, dtype=torch.float64)
    for place, (query, key, value, kept, share) in enumerate(
        zip(*(x.double() for x in (q, k, val, decay.exp(), beta)), strict=True)
    ):
        state = kept[:, None, None] * state
        new = share[:, None] * (value - (key[:, None] @ state)[:, 0])
        state = state + key[..., None] * new[:, None]
        out[place] = (query[:, None] @ state)[:, 0]
    return out


def gated_slots(q: Tensor, k: Tensor, val: Tensor, strength: Tensor, decay: Tensor) -> Tensor:
    """q, k (N, H, r), val (N, H, v), strength and decay (N, H, slots) -> readings (N, H, v).

    A slot's key and value are sums of those written to it, of which it keeps exp(decay); slots are
    read by the softmax of their keys' products with the query, which is scaled.
    """
    heads, slots = strength.shape[1:]
    keys, values = (
        torch.zeros(heads, slots, x.shape[-1], device=x.device, dtype=torch.float64)
        for x in (k, val)
    )
    out = torch.empty_like(val, dtype=torch.float64)
    scale = q.shape[-1] ** -0.5
    for place, (query, key, value, times, kept) in enumerate(
        zip(*(x.double() for x in (q, k, val, strength, decay.exp())), strict=True)
    ):
        keys = kept[..., None] * keys + times[..., None] * key[:, None]
        values = kept[..., None] * values + times[..., None] * value[:, None]
        shares = torch.softmax((keys @ query[..., None])[..., 0] * scale, -1)
        out[place] = (shares[:, None] @ values)[:, 0]
    return out


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    """Turn pairs of neighbours in x (N, H, r), the first ones by angle (N, H, at most r / 2)."""
    x = x.double()
    turned = torch.zeros(*x.shape[:-1], x.shape[-1] // 2, device=x.device, dtype=x.dtype)
    turned[..., : angle.shape[-1]] = angle
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(turned), turned)).flatten(-2)
