"""On a CUDA device: the benchmarks' CUDA graphs, of calls that can be captured and that can't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.mixtures import Problem

pytestmark = pytest.mark.gpu


def problem() -> Problem:
    x, y = torch.randn(2, 1, 300, 2, 16, device="cuda")
    return Problem(lambda x, y: ((x * y).softmax(-1),), (x, y), tuple)


@pytest.mark.parametrize("backward", [False, True])
def test_a_call_is_captured_with_its_gradients(backward: bool) -> None:
    call = problem().with_gradients() if backward else problem()
    replay = timing.captured(call)
    assert isinstance(replay, timing.Replay)
    replay()
    torch.cuda.synchronize()


def waits() -> Tensor:
    x = torch.ones(3, device="cuda")
    return x * float(x.sum())


def raises() -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        raise ValueError("not in a graph")
    return torch.ones(3, device="cuda")


def differs() -> Tensor:
    x = torch.ones(3, device="cuda")
    return x * 2 if torch.cuda.is_current_stream_capturing() else x


@pytest.mark.parametrize("call", [waits, raises, differs])
def test_nothing_is_left_of_a_failed_capture(call: timing.Call) -> None:
    stream = torch.cuda.current_stream()
    assert timing.captured(call) is None
    assert torch.cuda.current_stream() == stream
    torch.randn(9, device="cuda")
    torch.cuda.empty_cache()
    assert timing.captured(problem().with_gradients())


def test_a_stream_that_is_not_the_default_one_is_captured_itself() -> None:
    cuda: Any = torch.cuda  # whose classes say no types
    found = []

    def call() -> Tensor:
        found.append(torch.cuda.current_stream())
        return torch.ones(3, device="cuda")

    with torch.cuda.stream(cuda.Stream()):
        own = torch.cuda.current_stream()
        assert timing.captured(call)
    assert found == [own, own]
