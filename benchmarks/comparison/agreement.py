"""Whether a mixer's kernels compute what its plain definition does, gradients too."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.comparison.mixers import Mixer
from benchmarks.comparison.sizes import Size
from benchmarks.comparison.trainer import narrow
from gma.model.ops.chunked import Rows

TOLERANCE = 5e-2
"""Of a relative error, by norms. bfloat16 costs a hundredth or two; a wrong kernel is off by far
more."""

TOKENS = 300
"""No multiple of any chunk."""


class Disagreement(Exception):
    """A kernel does not compute what it is taken for."""


def check(mixer: type[Mixer], size: Size, device: torch.device) -> dict[str, float]:
    """Return relative errors of the update and of gradients. Raises Disagreement."""
    torch.manual_seed(0)
    module = mixer(size).to(device)
    x = torch.randn(2, TOKENS, size.width, device=device)
    weight = torch.randn_like(x)
    fast = _computed(module, x, weight, fast=True)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    plain = _computed(module, x, weight, fast=False)
    torch.set_float32_matmul_precision(precision)
    errors = {name: _error(fast[name], plain[name]) for name in plain}
    if not all(error <= TOLERANCE for error in errors.values()):  # NaN neither
        raise Disagreement(f"{mixer.__name__}: relative errors {errors}")
    return errors


def _computed(module: Mixer, x: Tensor, weight: Tensor, *, fast: bool) -> dict[str, Tensor]:
    module.choose(fast)
    x = x.clone().requires_grad_()
    lengths = torch.full((len(x),), TOKENS, device=x.device)
    rows = Rows.of(lengths, torch.arange(len(x), device=x.device), TOKENS, torch.float32)
    with narrow(x.device):
        update = module(x, rows)
        with torch.no_grad():
            read = module(x, rows)
    if not update.requires_grad:  # no mixer
        return {"update": read}
    grown = [x, *(each for each in module.parameters() if each.numel())]
    d_x, *others = torch.autograd.grad((update.float() * weight).sum(), grown)
    return {
        "update": read,
        "update in training": update.detach(),
        "gradient": d_x,
        "gradients of parameters": torch.cat([each.flatten() for each in others]),
    }


def _error(found: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))
