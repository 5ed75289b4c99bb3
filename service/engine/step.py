"""A step as the engine and every backend see it: NumPy arrays in and out, states in their slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from gma.model.grid import Grid
from gma.service.engine.snapshot import Parts, Snapshot
from gma.service.observe.memory import Memory


@dataclass(frozen=True)
class Batch:
    """A step's input: R rows of C tokens, of at most R documents.

    Rows of one document stand together, in order, and all but its last are full.
    """

    tokens: NDArray[np.int32]  # (R, C) ids
    lengths: NDArray[np.int64]  # (R,) tokens of each row; 0 for an unused one
    document_of_row: NDArray[np.int64]  # (R,) index into the two below
    slot_of_document: NDArray[np.int64]  # (R,)
    fresh: NDArray[np.bool_]  # (R,) its pass begins here: in the first, whatever lies in its slot
    first_pass: NDArray[np.int64]  # (R,) of `Runner.passes`, in which the step reads a document
    last_pass: NDArray[np.int64]  # (R,) a later one only if the step has all rows of the document
    page_of_row: NDArray[np.int64]  # (R,) where the row lies between passes, if there are several
    count: bool = False  # usage of components is wanted of the step

    @classmethod
    def blank(cls, grid: Grid, scratch: int, *, count: bool = False) -> Self:
        """All rows unused: they belong to a last document, which always starts afresh in `scratch`.

        A step with an unused row has fewer documents than rows, so the last is nobody's.
        """
        rows = grid.rows
        return cls(
            tokens=np.zeros(grid, np.int32),
            lengths=np.zeros(rows, np.int64),
            document_of_row=np.full(rows, rows - 1),
            slot_of_document=np.full(rows, scratch),
            fresh=np.ones(rows, np.bool_),
            first_pass=np.zeros(rows, np.int64),
            last_pass=np.zeros(rows, np.int64),
            page_of_row=np.zeros(rows, np.int64),
            count=count,
        )

    def rows_of(self, document: int) -> NDArray[np.intp]:
        return np.flatnonzero((self.document_of_row == document) & (self.lengths > 0))

    def passes_of(self, document: int) -> range:
        return range(self.first_pass[document], self.last_pass[document] + 1)

    @property
    def tokens_read(self) -> int:
        """All rows' tokens, each as often as the step reads it."""
        times = self.last_pass - self.first_pass + 1
        return int((self.lengths * times[self.document_of_row]).sum())


@dataclass(frozen=True)
class Outcome:
    """What a step answers. Rows and documents that were not used hold anything."""

    evidence: NDArray[np.float32]  # (R, labels) sum of weight * score over the row's tokens
    weight: NDArray[np.float32]  # (R,) sum of the weights
    logits: NDArray[np.float64]  # (R, labels) of each document, over all that was read of it
    usage: NDArray[np.float32] | None = None  # (R, L, H, K) of components, if it was wanted

    @classmethod
    def blank(cls, rows: int, labels: int, counted: Sequence[int] | None = None) -> Self:
        """All zeros, the usage of `counted`, (L, H, K), components too if it is wanted."""
        return cls(
            np.zeros((rows, labels), np.float32),
            np.zeros(rows, np.float32),
            np.zeros((rows, labels)),
            None if counted is None else np.zeros((rows, *counted), np.float32),
        )

    @property
    def finite(self) -> NDArray[np.bool_]:
        """(R,) which rows' shares are numbers."""
        return np.isfinite(self.evidence).all(1) & np.isfinite(self.weight)


class Launched(Protocol):
    """A step that the device was given."""

    def outcome(self) -> Outcome:
        """Wait for the step's end; raises what made it fail. To be called once."""


@dataclass(frozen=True)
class Ended:
    """A step that ended within its launch."""

    result: Outcome

    def outcome(self) -> Outcome:
        return self.result


class Runner(Protocol):
    """One backend with one model and the states of the documents that it reads.

    `warm_up`, `launch`, `snapshot` and `restore` are only ever called from one thread, the same for
    all; outcomes are waited for in another, in the order of the launches.
    """

    @property
    def backend(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str:
        """What matrix products are computed in."""

    @property
    def kernels(self) -> str:
        """Which code computes a step, for people."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the libraries that compute a step, by name."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def grids(self) -> Sequence[Grid]:
        """The shapes that `launch` takes: ascending rows, one chunk. The last is the full grid."""

    @property
    def depth(self) -> int:
        """How many steps may be launched and not ended: 1 where a launch computes at once."""

    @property
    def counts(self) -> bool:
        """Whether it can tell the usage of components."""

    @property
    def slots(self) -> int:
        """How many documents' states it holds. One more slot, the scratch, is for unused rows."""

    @property
    def parts(self) -> Parts | None:
        """What a document's state consists of; None if it can't be taken out of its slot."""

    @property
    def passes(self) -> int:
        """How often it reads a document over: once, as it comes, or several times, whole. All
        shares are zeros before the last pass; logits then only tell whether they are numbers."""

    @property
    def pages(self) -> int:
        """Chunks of whole documents that it holds between passes; 0 if it reads them once."""

    @property
    def state_bytes(self) -> int:
        """Memory of all slots, the scratch slot's too; it does not change."""

    def warm_up(self) -> None:
        """Run every grid once; raises RuntimeError if a result is not finite."""

    def launch(self, batch: Batch) -> Launched:
        """Read the batch on top of its documents' states, and leave the new ones in their slots.

        Steps take effect in the order of their launches: a document may have rows in several that
        have not ended. One whose numbers overflow spoils its own rows only. The batch is left as
        it is until the step has ended.
        """

    def snapshot(self, slot: int) -> Callable[[], Snapshot]:
        """Copy the state in a slot, after all steps that were launched. What is returned waits for
        the copy, in any thread."""

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """Put a snapshot, of a runner with the same model, into a slot, for steps to come."""

    def memory(self) -> Memory:
        """Memory of this process and of its device; callable from any thread."""


def fitting(grids: Sequence[Grid], rows: int) -> Grid:
    """The smallest grid with so many rows."""
    return next(grid for grid in grids if grid.rows >= rows)
