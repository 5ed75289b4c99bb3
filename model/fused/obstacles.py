"""What stands in the way of a model's fused step. To ask takes no Triton."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from gma.model.classifier import Classifier
from gma.model.config import ModelConfig
from gma.model.ops.triton.limits import misfit

FusedPrecision: TypeAlias = Literal["float32", "bfloat16", "fp8"]
"""What the fused step multiplies matrices in."""

SIZES: dict[FusedPrecision, int] = {"float32": 4, "bfloat16": 2, "fp8": 1}
"""Bytes of what it multiplies."""

TAPS = 4
"""Taps of the short convolution, at most."""

ALIGNMENT = 16
"""Bytes that rows of a matrix must be multiples of."""

CAPABILITY = 9, 0
"""Compute capability of a GPU, at least: the first that has tensor descriptors."""

SHARED_MEMORY = 227 * 1024
"""Bytes of a block, at least: what tiles of products were cut for."""

LARGEST: dict[FusedPrecision, float] = {
    "float32": torch.finfo(torch.float32).max,
    "bfloat16": torch.finfo(torch.float16).max,  # which GELU is computed in
    "fp8": torch.finfo(torch.float8_e4m3fn).max,
}
"""What a hidden activation may reach."""


def obstacle(classifier: Classifier, precision: FusedPrecision = "bfloat16") -> str | None:
    """Why there is no fused step of this model where its weights are, or None."""
    return (
        _shape_obstacle(classifier.config, precision)
        or _device_obstacle(classifier.embedding.weight.device)
        or _weight_obstacle(classifier, precision)
    )


def _shape_obstacle(config: ModelConfig, precision: FusedPrecision) -> str | None:
    each = ALIGNMENT // SIZES[precision]
    sizes = config.width, config.mlp_width, config.heads * config.value_dim
    if not config.causal:
        return "it is bidirectional"
    if config.conv_kernel > TAPS:
        return f"conv_kernel must be at most {TAPS}, not {config.conv_kernel}"
    if any(size % each for size in sizes):
        return f"width, mlp_width and heads * value_dim must be multiples of {each}, not {sizes}"
    return misfit(config, torch.float32 if precision == "float32" else torch.bfloat16)


def _device_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    gpu = torch.cuda.get_device_properties(device)
    if (gpu.major, gpu.minor) < CAPABILITY:
        least = ".".join(map(str, CAPABILITY))
        return f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}, less than {least}"
    shared: int = gpu.shared_memory_per_block_optin  # type: ignore[attr-defined]
    if shared < SHARED_MEMORY:
        return f"{gpu.name} has {shared} bytes of shared memory a block, less than {SHARED_MEMORY}"
    return None


def _weight_obstacle(classifier: Classifier, precision: FusedPrecision) -> str | None:
    reach, largest = classifier.hidden_reach(), LARGEST[precision]
    if reach > largest:
        return f"hidden activations may reach {reach:.0f}, more than {largest:.0f}"
    return None
