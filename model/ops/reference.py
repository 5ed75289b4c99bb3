"""Gaussian Mixture Attention as its definition says, for one document, in the dtype it is given.

Source: Huang & Raza, *Gaussian Mixture Attention: Linear-Time Sequence Mixing via Probabilistic
Latent Routing*, arXiv:2606.18283. Slow and plain on purpose: every other implementation is held to
this one in float64.

Shapes: N tokens, H heads, r routing_dim, K components, v value_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def responsibilities(x: Tensor, mu: Tensor, var: Tensor, log_pi: Tensor) -> Tensor:
    """Return the posterior of the components given routing vectors.

    x (N, H, r), mu and var (H, K, r), log_pi (H, K) -> (N, H, K); rows are >= 0 and sum to 1.
    """
    distance = (x[:, :, None, :] - mu).square() / var
    return torch.softmax(log_pi - 0.5 * (var.log() + distance).sum(-1), dim=-1)


def bidirectional(gamma_q: Tensor, gamma_k: Tensor, val: Tensor, *, epsilon: float) -> Tensor:
    """Let every token read what all tokens wrote: gammas (N, H, K), val (N, H, v) -> (N, H, v)."""
    memory = torch.einsum("nhk,nhv->hkv", gamma_k, val)
    mass = gamma_k.sum(0)
    read = torch.einsum("nhk,hkv->nhv", gamma_q, memory)
    return read / (torch.einsum("nhk,hk->nh", gamma_q, mass) + epsilon)[..., None]


def forgetting(
    gamma_q: Tensor,
    gamma_k: Tensor,
    val: Tensor,
    log_keep: Tensor,
    memory: Tensor,
    mass: Tensor,
    *,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Let every token read what it and the tokens before it wrote and later ones did not forget.

    gammas (N, H, K), val (N, H, v), log_keep (N, H): the memory is multiplied by exp(log_keep)
    before a token writes. Incoming memory (H, K, v) and mass (H, K) -> out (N, H, v) and the memory
    and mass after the last token.
    """
    out = []
    for reads, writes, value, kept in zip(gamma_q, gamma_k, val, log_keep.exp(), strict=True):
        memory = kept[:, None, None] * memory + writes[..., None] * value[:, None]
        mass = kept[:, None] * mass + writes
        read = torch.einsum("hk,hkv->hv", reads, memory)
        out.append(read / (torch.einsum("hk,hk->h", reads, mass) + epsilon)[:, None])
    return torch.stack(out), memory, mass


def causal(
    gamma_q: Tensor, gamma_k: Tensor, val: Tensor, memory: Tensor, mass: Tensor, *, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Let every token read what it and the tokens before it wrote.

    gammas (N, H, K), val (N, H, v), incoming memory (H, K, v) and mass (H, K)
    -> out (N, H, v) and the memory and mass after the last token.
    """
    memories = memory + torch.cumsum(gamma_k[..., None] * val[:, :, None, :], dim=0)
    masses = mass + torch.cumsum(gamma_k, dim=0)
    read = torch.einsum("nhk,nhkv->nhv", gamma_q, memories)
    out = read / (torch.einsum("nhk,nhk->nh", gamma_q, masses) + epsilon)[..., None]
    return out, memories[-1], masses[-1]
