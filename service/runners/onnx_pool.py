"""Pools of an exported model's states: on the host, or where the model runs.

The model takes the states of D documents, under the names of its inputs, and gives those after the
step. `HostPool` gives it copies of a step's documents, `ResidentPool` all there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession, OrtValue

from gma.service.engine.snapshot import Part, Parts
from gma.service.engine.step import Batch

StateType: TypeAlias = type[np.float32] | type[np.float64]

Device = Literal["cpu", "cuda"]

AFTER = "_after"
"""An output of this ending is the state of the input without it."""

DTYPES: dict[str, StateType] = {"tensor(float)": np.float32, "tensor(double)": np.float64}

Arrays = Mapping[str, NDArray[Any]]
Values = Mapping[str, OrtValue]


@dataclass(frozen=True)
class Documents:
    """A step's documents as the model sees them: D of them, whether or not they have rows."""

    slots: NDArray[np.int64]  # (R,) of the batch's documents
    place: NDArray[np.int64]  # (R,) where those are among the D
    of_row: NDArray[np.int64]  # (R,) which of the D each row belongs to
    fresh: NDArray[np.bool_]  # (D,)
    states: Values  # (D, ...) each
    after: Values  # the same, where those after the step are to go


def zeros_of(part: Part, documents: int) -> NDArray[Any]:
    """The states of so many documents of which nothing was read yet."""
    return np.zeros((documents, *part.shape), part.dtype)


class HostPool:
    """The states of a number of slots and of one more, for unused rows, on the host.

    A step gets copies of its documents' alone.
    """

    def __init__(self, parts: Parts, slots: int) -> None:
        self.count = slots
        self.parts = parts
        self.states = {name: zeros_of(part, slots + 1) for name, part in parts.items()}
        # Of so many documents: where states are copied to, the same memory again, and those after.
        self._copies: dict[int, tuple[Arrays, Values, Values]] = {}

    @property
    def state_bytes(self) -> int:
        return sum(x.nbytes for x in self.states.values())

    def documents(self, batch: Batch) -> Documents:
        """The documents of a batch, with copies of their states."""
        slots = batch.slot_of_document
        count = len(slots)
        if count not in self._copies:
            zeros = {name: zeros_of(part, count) for name, part in self.parts.items()}
            shared = {name: OrtValue.ortvalue_from_numpy(x) for name, x in zeros.items()}
            self._copies[count] = zeros, shared, values_of(zeros, "cpu")
        copies, states, after = self._copies[count]
        for name, x in self.states.items():
            np.take(x, slots, axis=0, out=copies[name], mode="clip")  # "raise" copies twice
        return Documents(
            slots=slots,
            place=np.arange(count),
            of_row=batch.document_of_row,
            fresh=batch.fresh,
            states=states,
            after=after,
        )

    def keep(self, documents: Documents) -> None:
        """Let the states after a step be those of its documents."""
        for name, states in self.states.items():
            states[documents.slots] = documents.after[name].numpy()

    def snapshot(self, slot: int) -> dict[str, NDArray[Any]]:
        """A copy of one document's state, (1, ...) each."""
        at = _checked(slot, self)
        return {name: x[at : at + 1].copy() for name, x in self.states.items()}

    def restore(self, slot: int, state: Arrays) -> None:
        """Put a snapshot, of any pool with the same model, into a taken slot."""
        at = _checked(slot, self)
        for name, x in self.states.items():
            x[at] = state[name][0]

    def fill(self, value: float) -> None:
        """Let every slot hold this, the scratch slot too."""
        for x in self.states.values():
            x.fill(value)


class ResidentPool:
    """The same states on the device, twice: a step reads all of one buffer and writes all of
    the other, so that no state crosses to the host and none is lost if the step fails."""

    def __init__(self, parts: Parts, slots: int, device: Device) -> None:
        self.count = slots
        self.states, self._after = (
            {
                name: OrtValue.ortvalue_from_numpy(zeros_of(part, slots + 1), device)
                for name, part in parts.items()
            }
            for _ in range(2)
        )
        self._bytes = 2 * sum(zeros_of(part, slots + 1).nbytes for part in parts.values())

    @property
    def state_bytes(self) -> int:
        return self._bytes

    def documents(self, batch: Batch) -> Documents:
        """All slots as documents, of which some are the batch's."""
        slots = batch.slot_of_document
        fresh = np.zeros(self.count + 1, np.bool_)
        fresh[slots] = batch.fresh
        return Documents(
            slots=slots,
            place=slots,
            of_row=slots[batch.document_of_row],
            fresh=fresh,
            states=self.states,
            after=self._after,
        )

    def keep(self, documents: Documents) -> None:
        """Let the states after a step be those of its documents."""
        self.states, self._after = self._after, self.states

    def snapshot(self, slot: int) -> dict[str, NDArray[Any]]:
        """A copy of one document's state, (1, ...) each; all are copied on the way."""
        at = _checked(slot, self)
        return {name: x.numpy()[at : at + 1].copy() for name, x in self.states.items()}

    def restore(self, slot: int, state: Arrays) -> None:
        """Put a snapshot, of any pool with the same model, into a taken slot; all are copied."""
        at = _checked(slot, self)
        for name, value in self.states.items():
            states = value.numpy().copy()
            states[at] = state[name][0]
            value.update_inplace(states)

    def fill(self, value: float) -> None:
        """Let every slot hold this, the scratch slot too, in both buffers."""
        for x in (*self.states.values(), *self._after.values()):
            x.update_inplace(np.full_like(x.numpy(), value))


def _checked(slot: int, pool: HostPool | ResidentPool) -> int:
    if not 0 <= slot < pool.count:
        raise ValueError(f"slot {slot} is not one of {pool.count}")
    return slot


def values_of(arrays: Arrays, device: str) -> dict[str, OrtValue]:
    """Copies of the arrays on a device."""
    return {name: OrtValue.ortvalue_from_numpy(x.copy(), device) for name, x in arrays.items()}


def parts_of(session: InferenceSession) -> Parts:
    """The parts of a document's state: the model's inputs that come out again."""
    outputs = {output.name for output in session.get_outputs()}
    return {
        given.name: Part(tuple(given.shape[1:]), np.dtype(DTYPES[given.type]))
        for given in session.get_inputs()
        if given.name + AFTER in outputs
    }
