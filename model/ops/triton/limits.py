"""What Triton's kernels can compute. To ask takes no Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gma.model.config import BackboneConfig

SIZES = frozenset({16, 32, 64, 128})
"""What routing_dim, num_components and value_dim may be."""

MIXTURE = 64 * 128
"""Entries of a head's means, at most, in float32: more leave a block's memory no room."""


def misfit(config: BackboneConfig, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why the kernels can't compute this model with tokens in `dtype`, or None."""
    sizes = config.routing_dim, config.num_components, config.value_dim
    if not set(sizes) <= SIZES:
        return f"routing_dim, num_components and value_dim must be of {sorted(SIZES)}, not {sizes}"
    if dtype == torch.float32 and config.routing_dim * config.num_components > MIXTURE:
        return f"in float32 routing_dim * num_components must be at most {MIXTURE}"
    return None
