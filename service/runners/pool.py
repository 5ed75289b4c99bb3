"""Slots: where the states of resident documents lie."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gma.model.config import ModelConfig
from gma.model.state import State
from gma.service.engine.snapshot import Part, Parts, Snapshot


class StatePool:
    """The states of a fixed number of slots and of one more, for unused rows, allocated once.

    Only the thread that computes touches the tensors.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.count = slots
        self.states = State.zeros(config, slots + 1, device=device, dtype=dtype)

    @property
    def state_bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.states.tensors())

    @property
    def parts(self) -> Parts:
        """See `Runner.parts`."""
        return {
            name: Part(x.shape[1:], np.dtype(str(x.dtype).removeprefix("torch.")))
            for name, x in self.states.tensors()
        }

    def gather(self, slots: Tensor, fresh: Tensor) -> State:
        """Copies of the states in `slots`, (D,) int64; zeros where `fresh`, (D,) bool."""
        states = self.states.gather(slots)
        for _, tensor in states.tensors():
            # Filled, not multiplied by zero: a state left behind may hold NaN.
            tensor.masked_fill_(fresh.view(-1, *[1] * (tensor.dim() - 1)), 0)
        return states

    def scatter(self, slots: Tensor, states: State) -> None:
        """Put `states` into `slots`, (D,) int64, distinct but for the scratch slot."""
        self.states.scatter_(slots, states)

    def snapshot(self, slot: int) -> Callable[[], Snapshot]:
        """See `Runner.snapshot`: the copy is made behind what the current stream does."""
        own, on_gpu = self._own(slot), self.states.weight.is_cuda
        copies = {name: torch.empty_like(x, device="cpu", pin_memory=on_gpu) for name, x in own}
        for name, x in own:
            copies[name].copy_(x, non_blocking=True)
        copied = None
        if on_gpu:
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied.record()

        def snapshot() -> Snapshot:
            if copied:
                copied.synchronize()
            return {name: x.numpy() for name, x in copies.items()}

        return snapshot

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """Put a snapshot, of this pool or of another's with the same model, into a taken slot,
        behind what the current stream does."""
        for name, x in self._own(slot):
            given = torch.from_numpy(np.array(snapshot[name]))
            # From pinned memory, or it would wait for the stream.
            x.copy_(given.pin_memory() if x.is_cuda else given, non_blocking=True)

    def _own(self, slot: int) -> list[tuple[str, Tensor]]:
        """The parts of one document's state, (1, ...) each, where they lie."""
        if not 0 <= slot < self.count:
            raise ValueError(f"slot {slot} is not one of {self.count}")
        return [(name, x[slot : slot + 1]) for name, x in self.states.tensors()]
