"""Which implementation of the operation a model uses. It is chosen once, and said."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gma.model.config import ModelConfig
from gma.model.ops import chunked

if TYPE_CHECKING:
    from gma.model.classifier import Classifier

SIZES = frozenset({16, 32, 64, 128})
"""What routing_dim, num_components and value_dim may be for Triton's kernels."""

MIXTURE = 64 * 128
"""Entries of a head's means, at most, in float32: more leave a block's memory no room."""

Precision: TypeAlias = Literal["bfloat16", "fp8"]
"""What the fused step multiplies matrices in."""

TAPS = 4
"""Of the short convolution in the fused step, at most."""

ALIGNMENT = 16
"""Bytes that rows of its matrices must be multiples of."""

CAPABILITY = 9, 0
"""Of a GPU, at least: the first that has tensor descriptors."""

SHARED_MEMORY = 227 * 1024
"""Bytes of a block, at least: what tiles of products were cut for."""

LARGEST: dict[Precision, float] = {
    "bfloat16": torch.finfo(torch.float16).max,  # which GELU is computed in
    "fp8": torch.finfo(torch.float8_e4m3fn).max,
}
"""What a hidden activation may reach in the fused step."""


class Operation(NamedTuple):
    """An implementation; for what its functions take and give see `gma.model.ops.chunked`."""

    name: str
    causal: Callable[..., tuple[Tensor, Tensor, Tensor]]
    write: Callable[..., tuple[Tensor, Tensor]]
    read: Callable[..., Tensor]

    @classmethod
    def of(cls, module: Any) -> Operation:
        name = module.__name__.rpartition(".")[2]
        return cls(name, module.causal, module.write, module.read)


CHUNKED = Operation.of(chunked)


def misfit(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why Triton's kernels can't compute this model with tokens in `dtype`, or None."""
    sizes = config.routing_dim, config.num_components, config.value_dim
    if not set(sizes) <= SIZES:
        return f"routing_dim, num_components and value_dim must be of {sorted(SIZES)}, not {sizes}"
    if dtype == torch.float32 and config.routing_dim * config.num_components > MIXTURE:
        return f"in float32 routing_dim * num_components must be at most {MIXTURE}"
    return None


def choose(config: ModelConfig, weight: Tensor) -> Operation:
    """Triton's kernels on a CUDA device if they fit the model, else PyTorch's chunked form.

    weight: any of the model's.
    """
    exact = weight.dtype == torch.float64
    if weight.is_cuda and not exact and misfit(config, weight.dtype) is None:
        from gma.model.ops import triton  # is not installed where there is no GPU

        return Operation.of(triton)
    return CHUNKED


def obstacle(classifier: Classifier, precision: Precision = "bfloat16") -> str | None:
    """Why there is no fused step of this model where its weights are, or None."""
    return (
        _shape_obstacle(classifier.config, precision)
        or _device_obstacle(classifier.embedding.weight.device)
        or _weight_obstacle(classifier, precision)
    )


def _shape_obstacle(config: ModelConfig, precision: Precision) -> str | None:
    each = ALIGNMENT // (1 if precision == "fp8" else 2)
    sizes = config.width, config.mlp_width, config.heads * config.value_dim
    if not config.causal:
        return "it is bidirectional"
    if config.conv_kernel > TAPS:
        return f"conv_kernel must be at most {TAPS}, not {config.conv_kernel}"
    if any(size % each for size in sizes):
        return f"width, mlp_width and heads * value_dim must be multiples of {each}, not {sizes}"
    return misfit(config)


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


def _weight_obstacle(classifier: Classifier, precision: Precision) -> str | None:
    reach, largest = classifier.hidden_reach(), LARGEST[precision]
    if reach > largest:
        return f"hidden activations may reach {reach:.0f}, more than {largest:.0f}"
    return None
