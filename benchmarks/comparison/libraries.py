"""The recurrences as the kernels of fla and mamba-ssm compute them, in bfloat16 on a GPU."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison.recurrences import Recurrences

SCANNED = 256
"""Tokens of a chunk of Mamba-2's scan, as its layer has it."""


def _of_fla(package: str, function: str) -> Any:
    return getattr(import_module(f"fla.ops.{package}"), function)


def _narrow(*parts: Tensor) -> list[Tensor]:
    return [x.to(torch.bfloat16).contiguous() for x in parts]


def linear(q: Tensor, k: Tensor, val: Tensor) -> Tensor:
    """See `benchmarks.comparison.recurrences.linear`; so too below."""
    function = _of_fla("linear_attn", "chunk_linear_attn")
    out: Tensor = function(*_narrow(q, k, val), scale=1.0, normalize=False)[0]
    return out


def scan(x: Tensor, step: Tensor, rate: Tensor, key: Tensor, query: Tensor) -> Tensor:
    module = import_module("mamba_ssm.ops.triton.ssd_combined")
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
    function = _of_fla("gated_delta_rule", "chunk_gated_delta_rule")
    q, k, val, share = _narrow(q, k, val, share)
    out: Tensor = function(q, k, val, decay.float().contiguous(), share, scale=1.0)[0]
    return out


LIBRARIES = Recurrences("fla and mamba-ssm", linear, scan, gated, slots, delta)
