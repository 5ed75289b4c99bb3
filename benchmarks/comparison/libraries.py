"""The recurrences as the kernels of fla and mamba-ssm compute them, in bfloat16 on a GPU."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison.recurrences import Recurrences

SCANNED = 256
"""Tokens of a chunk of Mamba-2's scan, as its layer has it."""


SCAN = "mamba_ssm.ops.triton.ssd_combined"

SMALL = {"fla": 0, "mamba_ssm": -1}
"""Where a library's kernels have the smallest of their configurations."""


def _of_fla(package: str, function: str) -> Any:
    return getattr(import_module(f"fla.ops.{package}"), function)


def untune() -> None:
    """Let each kernel take one configuration, a small one, instead of trying all from here on.

    To try them takes minutes in each process, which only speed is worth.
    """
    autotuner = import_module("triton.runtime").Autotuner
    for package in ("linear_attn", "gla", "gsa", "gated_delta_rule", "kda"):
        import_module(f"fla.ops.{package}")
    import_module(SCAN)
    for name, module in list(sys.modules.items()):
        for kernel in vars(module).values() if name.startswith(tuple(SMALL)) else ():
            while kernel is not None:  # one may be wrapped in heuristics
                if isinstance(kernel, autotuner):
                    kernel.configs = [kernel.configs[SMALL[name.partition(".")[0]]]]
                kernel = getattr(kernel, "fn", None)


def _narrow(*parts: Tensor) -> list[Tensor]:
    return [x.to(torch.bfloat16).contiguous() for x in parts]


def linear(q: Tensor, k: Tensor, val: Tensor) -> Tensor:
    """See `benchmarks.comparison.recurrences.linear`; so too below."""
    function = _of_fla("linear_attn", "chunk_linear_attn")
    out: Tensor = function(*_narrow(q, k, val), scale=1.0, normalize=False)[0]
    return out


def scan(x: Tensor, step: Tensor, rate: Tensor, key: Tensor, query: Tensor) -> Tensor:
    module = import_module(SCAN)
    x, key, query = _narrow(x, key, query)
    out: Tensor = module.mamba_chunk_scan_combined(
        x, step.float().contiguous(), rate.float(), key, query, chunk_size=SCANNED
    )
    return out


def gated(q: Tensor, k: Tensor, val: Tensor, decay: Tensor) -> Tensor:
    function = _of_fla("gla", "chunk_gla")
    out: Tensor = function(*_narrow(q, k, val), decay.float().contiguous(), scale=1.0)[0]
    return out


def slots(q: Tensor, k: Tensor, val: Tensor, strength: Tensor, decay: Tensor) -> Tensor:
    function = _of_fla("gsa", "chunk_gsa")
    narrow = _narrow(q, k, val, strength)
    out: Tensor = function(*narrow, decay.float().contiguous(), scale=1.0)[0]
    return out


def delta(q: Tensor, k: Tensor, val: Tensor, decay: Tensor, share: Tensor) -> Tensor:
    """With gradients it is Kimi delta attention's kernel, whose decays may differ by direction:
    that of the gated delta rule refuses to go backward on Hopper before Triton 3.7.1."""
    q, k, val, share = _narrow(q, k, val, share)
    if torch.is_grad_enabled():
        function = _of_fla("kda", "chunk_kda")
        decay = decay[..., None].expand(-1, -1, -1, k.shape[-1])
    else:
        function = _of_fla("gated_delta_rule", "chunk_gated_delta_rule")
    out: Tensor = function(q, k, val, decay.float().contiguous(), share, scale=1.0)[0]
    return out


LIBRARIES = Recurrences("fla and mamba-ssm", linear, scan, gated, slots, delta)
