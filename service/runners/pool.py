"""Slots: where the states of resident documents lie."""

from __future__ import annotations

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
        snapshot = arrays_of(self.snapshot(0))
        return {name: Part(x.shape[1:], x.dtype) for name, x in snapshot.items()}

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

    def snapshot(self, slot: int) -> State:
        """A copy of one document's state, on the CPU."""
        return self.states.gather(self._index(slot)).to("cpu")

    def restore(self, slot: int, state: State) -> None:
        """Put a snapshot, of this pool or of another's with the same model, into a taken slot."""
        device = self.states.weight.device
        self.states.scatter_(self._index(slot), state.to(device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the next step may run on another stream

    def _index(self, slot: int) -> Tensor:
        if not 0 <= slot < self.count:
            raise ValueError(f"slot {slot} is not one of {self.count}")
        return torch.tensor([slot], device=self.states.weight.device)


def arrays_of(state: State) -> Snapshot:
    """One document's state on the CPU, as the engine takes it."""
    return {name: x.numpy() for name, x in state.tensors()}


def state_of(snapshot: Snapshot) -> State:
    """What `arrays_of` made arrays of."""
    return State(**{name: torch.from_numpy(np.array(x)) for name, x in snapshot.items()})
