"""Memory grows with the tokens that are read at once, and with nothing else."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gma.model.ops import chunked
from gma.model.reading import read
from tests.model.ops.inputs import Input, bidirectional, causal, make
from tests.model.small import small


class Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes of tensors that were there at one time, and the largest tensor's elements."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.largest = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        self.largest = max(self.largest, size // tensor.element_size())
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def memory_of(run: Callable[[], object]) -> Memory:
    memory = Memory()
    with torch.inference_mode(), memory:
        run()
    return memory


def test_memory_is_measured() -> None:
    def run() -> None:
        for _ in range(10):
            x = torch.zeros(1000)
            x = x + 1
            del x

    assert memory_of(run).peak == 8000
    assert memory_of(lambda: torch.zeros(10, 1) @ torch.zeros(1, 10)).largest == 100


@pytest.mark.parametrize("form", [causal, bidirectional])
def test_memory_grows_with_the_tokens_alone(form: Callable[[Input], object]) -> None:
    small_, large = (
        memory_of(partial(form, make(n, r=8, components=32, v=16).to(torch.float32)))
        for n in (2048, 8192)
    )
    assert large.peak <= 4.1 * small_.peak
    # Neither N * N nor N * K * v: a block's affinities are the largest.
    assert large.largest <= 8192 * 2 * chunked.BLOCK


def test_step_memory_does_not_grow_with_what_was_read() -> None:
    classifier = small()
    document = torch.randint(0, 50, (8192,))
    short, long = (
        memory_of(partial(read, classifier, [document[:n]], chunk=256)) for n in (2048, 8192)
    )
    assert long.peak <= 1.02 * short.peak


def test_bidirectional_memory_grows_with_the_tokens() -> None:
    classifier = small(causal=False)
    document = torch.randint(0, 50, (16384,))
    short, long = (
        memory_of(partial(read, classifier, [document[:n]], chunk=256)) for n in (4096, 16384)
    )
    kept = 4 * classifier.config.width + 8  # between two layers: the stream in float32, and the id
    assert long.peak - short.peak == pytest.approx((16384 - 4096) * kept, rel=0.01)
    assert long.largest == short.largest
