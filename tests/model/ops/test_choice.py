"""Which implementation of the operation a model gets where it is."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gma.model.ops.choice import choose
from tests.model.small import FITTING


@pytest.mark.parametrize(
    ("device", "dtype", "changes", "name"),
    [
        ("cuda", torch.float32, {}, "triton"),
        ("cuda", torch.bfloat16, {}, "triton"),
        ("cuda", torch.float32, {"causal": False, "width": 52, "conv_kernel": 7}, "triton"),
        ("cuda", torch.float32, {"routing_dim": 24}, "chunked"),
        ("cuda", torch.float32, {"routing_dim": 128, "num_components": 128}, "chunked"),
        ("cuda", torch.bfloat16, {"routing_dim": 128, "num_components": 128}, "triton"),
        ("cuda", torch.float64, {}, "chunked"),
        ("cpu", torch.float32, {}, "chunked"),
    ],
)
def test_the_mixer(device: str, dtype: torch.dtype, changes: dict[str, object], name: str) -> None:
    """Nothing is computed: a tensor that says it is on a GPU is enough."""
    pytest.importorskip("triton")
    with FakeTensorMode():
        weight = torch.empty(1, device=device, dtype=dtype)
    assert choose(FITTING.model_copy(update=changes), weight).name == name
