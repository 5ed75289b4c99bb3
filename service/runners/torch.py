"""Runs a step on one backend: numpy in, numpy out, states left in their slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from gma.model.classifier import Classifier, Grid, Step
from gma.model.config import ModelConfig
from gma.service.observe.memory import Memory, driver_memory, resident_memory
from gma.service.runners.pool import Slots, StatePool


@dataclass(frozen=True)
class Batch:
    """A step's input: R rows of C tokens, of at most R documents.

    Rows of one document stand together, in order, and all but its last are full.
    """

    tokens: NDArray[np.int32]  # (R, C) ids
    lengths: NDArray[np.int64]  # (R,) tokens of each row; 0 for an unused one
    document_of_row: NDArray[np.int64]  # (R,) index into the two below
    slot_of_document: NDArray[np.int64]  # (R,)
    fresh: NDArray[np.bool_]  # (R,) the document begins here, whatever lies in its slot

    @classmethod
    def blank(cls, grid: Grid, scratch: int) -> Self:
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
        )

    def rows_of(self, document: int) -> NDArray[np.intp]:
        return np.flatnonzero((self.document_of_row == document) & (self.lengths > 0))


@dataclass(frozen=True)
class Outcome:
    """What a step answers. Rows and documents that were not used hold anything."""

    evidence: NDArray[np.float32]  # (R, labels) sum of weight * score over the row's tokens
    weight: NDArray[np.float32]  # (R,) sum of the weights
    logits: NDArray[np.float64]  # (R, labels) of each document, over all that was read of it

    @property
    def finite(self) -> NDArray[np.bool_]:
        """(R,) which rows' shares are numbers."""
        return np.isfinite(self.evidence).all(1) & np.isfinite(self.weight)


class Launched(Protocol):
    """A step that the device was given."""

    def outcome(self) -> Outcome:
        """Wait for the step's end; raises what made it fail. To be called once."""


class Runner(Protocol):
    """One backend with one model and the states of the documents that it reads.

    `warm_up` and `launch` are only ever called from one thread, the same for both; outcomes are
    waited for in another, in the order of the launches.
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
        """Of the libraries that compute a step, by name."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def grids(self) -> Sequence[Grid]:
        """The shapes that `launch` takes: ascending rows, one chunk. The last is the full grid."""

    @property
    def depth(self) -> int:
        """How many steps may be launched and not ended: 1 where a launch computes at once."""

    @property
    def pool(self) -> Slots: ...

    def warm_up(self) -> None:
        """Run every grid once; raises RuntimeError if a result is not finite."""

    def launch(self, batch: Batch) -> Launched:
        """Read the batch on top of its documents' states, and leave the new ones in their slots.

        Steps take effect in the order of their launches: a document may have rows in several that
        have not ended. One whose numbers overflow spoils its own rows only. The batch is left as
        it is until the step has ended.
        """

    def memory(self) -> Memory:
        """Memory of this process and of its device; callable from any thread."""


@dataclass(frozen=True)
class Ended:
    """A step that ended within its launch."""

    result: Outcome

    def outcome(self) -> Outcome:
        return self.result


class TorchRunner:
    """The classifier in PyTorch, eager or compiled, on the device where its weights are."""

    backend = "torch"
    depth = 1
    versions: Mapping[str, str] = {}  # a worker tells torch's own

    def __init__(
        self,
        classifier: Classifier,
        *,
        slots: int,
        rows: int = 8,
        chunk: int = 256,
        compile: bool = False,  # noqa: A002 (its name in torch)
    ) -> None:
        """`slots` documents at a time, `rows` x `chunk` tokens a step.

        `compile` is for a GPU; the warm-up then compiles a grid after the other.
        """
        config = classifier.config
        self.grids = grids_up_to(rows, chunk, config)
        weights = classifier.embedding.weight
        self.device = str(weights.device)
        self.dtype = str(weights.dtype).removeprefix("torch.")
        self.kernels = f"{'compiled' if compile else 'eager'} PyTorch, {classifier.mixers} mixer"
        self.labels = config.labels
        self.vocab_size = config.vocab_size
        self.pool = StatePool(config, slots, device=weights.device, dtype=classifier.dtype)
        self._logits = classifier.logits
        self._forward: Callable[..., Step] = classifier.eval()
        self._warm_ups = 1
        if compile:
            self._compile(classifier)

    def _compile(self, classifier: Classifier) -> None:
        # CUDA graphs: what launches cost the CPU would cost more than the kernels.
        mode = "reduce-overhead" if self.device.startswith("cuda") else "default"
        # Shapes are fixed, so there is one compilation a grid, and none once warm.
        torch._dynamo.config.recompile_limit = max(8, 2 * len(self.grids))
        self._forward = torch.compile(classifier, dynamic=False, mode=mode)
        # A graph is run once, then recorded, then replayed.
        self._warm_ups = 3

    def warm_up(self) -> None:
        for grid in self.grids:
            for _ in range(self._warm_ups):
                warm_up(self, grid)

    def launch(self, batch: Batch) -> Launched:
        return Ended(self.step(batch))

    @torch.inference_mode()
    def step(self, batch: Batch) -> Outcome:
        """A step from its launch to its end."""
        slots = torch.from_numpy(batch.slot_of_document).to(self.device)
        fresh = torch.from_numpy(batch.fresh).to(self.device)
        step = self._forward(
            torch.from_numpy(batch.tokens).to(self.device),
            torch.from_numpy(batch.lengths).to(self.device),
            torch.from_numpy(batch.document_of_row).to(self.device),
            self.pool.gather(slots, fresh),
        )
        outcome = self._outcome(step)
        documents = np.unique(batch.document_of_row[batch.lengths > 0])
        if len(documents) > 1 and not outcome.finite[batch.lengths > 0].all():
            return self._step_apart(batch, documents)
        self.pool.scatter(slots, step.states)
        return outcome

    def _outcome(self, step: Step) -> Outcome:
        logits = self._logits(step.states.evidence, step.states.weight)
        return Outcome(
            step.evidence.float().cpu().numpy(),
            step.weight.float().cpu().numpy(),
            logits.cpu().numpy(),
        )

    def _step_apart(self, batch: Batch, documents: NDArray[np.int64]) -> Outcome:
        """The same step, one document at a time.

        The products that combine rows spread one document's NaN to all (0 * NaN is NaN), so each
        runs again from its state before the step, which was not overwritten yet.
        """
        rows, labels = len(batch.lengths), len(self.labels)
        together = Outcome(
            np.zeros((rows, labels), np.float32),
            np.zeros(rows, np.float32),
            np.zeros((rows, labels)),
        )
        for document in documents:
            own = batch.rows_of(document)
            grid = fitting(self.grids, len(own))
            alone = Batch.blank(grid, self.pool.scratch)
            alone.tokens[: len(own)] = batch.tokens[own]
            alone.lengths[: len(own)] = batch.lengths[own]
            alone.document_of_row[: len(own)] = 0
            alone.slot_of_document[0] = batch.slot_of_document[document]
            alone.fresh[0] = batch.fresh[document]
            outcome = self.step(alone)
            together.evidence[own] = outcome.evidence[: len(own)]
            together.weight[own] = outcome.weight[: len(own)]
            together.logits[document] = outcome.logits[0]
        return together

    def memory(self) -> Memory:
        return device_memory(self.device)


def grids_up_to(rows: int, chunk: int, config: ModelConfig) -> tuple[Grid, ...]:
    """Every power of two of rows below `rows`, and `rows`: a lone short document does not pay for
    all. Raises ValueError for a model that can't be streamed, and for rows that are too short."""
    if not config.causal:
        raise ValueError(f"{config.name} is bidirectional: only a causal model can be streamed")
    if rows < 1 or chunk < max(1, config.tail):
        raise ValueError(f"a grid of {rows} x {chunk}: rows >= 1, chunk >= {max(1, config.tail)}")
    powers = [1 << i for i in range((rows - 1).bit_length())]
    return tuple(Grid(r, chunk) for r in [*powers, rows])


def fitting(grids: Sequence[Grid], rows: int) -> Grid:
    """The smallest grid with so many rows."""
    return next(grid for grid in grids if grid.rows >= rows)


def warm_up(runner: Runner, grid: Grid) -> None:
    """Run a full step in the scratch slot; raises RuntimeError if its result is not finite."""
    batch = Batch.blank(grid, runner.pool.scratch)
    ids = np.arange(batch.tokens.size) % runner.vocab_size
    batch.tokens[:] = ids.reshape(grid)
    batch.lengths[:] = grid.chunk
    outcome = runner.launch(batch).outcome()
    if not (outcome.finite.all() and np.isfinite(outcome.logits[-1]).all()):
        raise RuntimeError(
            f"a step of {grid.rows} x {grid.chunk} tokens gives what is not finite: "
            "the weights are damaged, or too large for this device's precision"
        )


def device_memory(device: str) -> Memory:
    """Of this process and of a device."""
    resident, resident_peak = resident_memory()
    if not device.startswith("cuda"):
        return Memory(resident, resident_peak, 0, 0)
    return Memory(
        resident,
        resident_peak,
        torch.cuda.memory_allocated(device),
        torch.cuda.max_memory_allocated(device),
        torch.cuda.memory_reserved(device),
        *driver_memory(),
    )
