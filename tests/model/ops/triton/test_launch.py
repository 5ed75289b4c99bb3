"""What a kernel is given beside what its caller names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gma.model.fused import products, tokens
from gma.model.ops.triton import backward, forward, scans, scores
from gma.model.ops.triton.launch import STRIDES, launch

KERNELS = [
    forward.sum_segments,
    forward.read_segments,
    forward.read_states,
    scans.prefix,
    scans.suffix,
    backward.query_gradients,
    backward.key_gradients,
    scores.score_gradients,
    tokens.embed,
    tokens.normalize,
    tokens.convolve,
    tokens.remember,
    tokens.score,
    tokens.add_shares,
    tokens.pool,
    products.product,
]


class Kernel:
    """Takes these parameters, and notes what it is launched with."""

    def __init__(self, *parameters: str) -> None:
        self.arg_names = parameters

    def __getitem__(self, grid: tuple[int, ...]) -> Kernel:
        self.grid = grid
        return self

    def __call__(self, **arguments: Any) -> None:
        self.arguments = arguments


def test_strides_are_those_of_the_tensors() -> None:
    kernel = Kernel("q", "k", "q_row", "q_token", "q_head", "k_row", "C")
    q = torch.zeros(2, 3, 4, 5).transpose(1, 2)
    launch(kernel, (6, 7), q=q, k=None, C=3, num_warps=8)
    strides = {"q_row": 60, "q_token": 5, "q_head": 20, "k_row": 0}
    assert kernel.arguments == {"q": q, "k": None, "C": 3, "num_warps": 8, **strides}
    assert kernel.grid == (6, 7)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: str(kernel.fn.__name__))
def test_a_kernel_that_takes_a_stride_takes_its_tensor(kernel: Any) -> None:
    for name in STRIDES.keys() & set(kernel.arg_names):
        assert STRIDES[name][0] in kernel.arg_names
