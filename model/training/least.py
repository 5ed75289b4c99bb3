"""Where a smooth loss of few numbers is least."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def least(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Find it from ``start``, of any shape, by L-BFGS."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        value = loss(x)
        torch.autograd.backward(value)
        return value.item()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return x.detach()
