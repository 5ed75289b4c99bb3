"""Runs steps in PyTorch, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from gma.model.classifier import Classifier, Step
from gma.service.engine.snapshot import Parts, Snapshot
from gma.service.engine.step import Batch, Ended, Launched, Outcome, fitting
from gma.service.observe.memory import Memory, driver_memory, resident_memory
from gma.service.runners.grids import grids_up_to, warm_up
from gma.service.runners.pool import StatePool


class TorchRunner:
    """The classifier in PyTorch, eager or compiled, on the device where its weights are."""

    backend = "torch"
    depth = 1
    counts = True
    passes, pages = 1, 0
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
        if not config.causal:
            raise ValueError(f"{config.name} is bidirectional: it is read in passes")
        self.grids = grids_up_to(rows, chunk, config)
        weights = classifier.embedding.weight
        self.device = str(weights.device)
        self.dtype = classifier.precision
        how = "compiled" if compile else "eager"
        self.kernels = (
            classifier.kernels.name
            if classifier.kernels
            else f"{how} PyTorch, {classifier.mixers} mixer"
        )
        self._labels = len(config.labels)
        self.vocab_size = config.vocab_size
        self.slots = slots
        self.pool = StatePool(config, slots, device=weights.device, dtype=classifier.dtype)
        self.parts: Parts | None = self.pool.parts
        self._logits = classifier.logits
        self._eager = self._forward = cast("Callable[..., Step]", classifier.eval())
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
        # Usage is counted without a graph: it is rare, and would be another compilation a grid.
        forward = partial(self._eager, count=True) if batch.count else self._forward
        step = forward(
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
            None if step.usage is None else step.usage.float().cpu().numpy(),
        )

    def _step_apart(self, batch: Batch, documents: NDArray[np.int64]) -> Outcome:
        """The same step, one document at a time.

        The products that combine rows spread one document's NaN to all (0 * NaN is NaN), so each
        runs again from its state before the step, which was not overwritten yet.
        """
        counted = self.pool.states.mass.shape[1:] if batch.count else None
        together = Outcome.blank(len(batch.lengths), self._labels, counted)
        for document in documents:
            own = batch.rows_of(document)
            grid = fitting(self.grids, len(own))
            alone = Batch.blank(grid, self.slots, count=batch.count)
            alone.tokens[: len(own)] = batch.tokens[own]
            alone.lengths[: len(own)] = batch.lengths[own]
            alone.document_of_row[: len(own)] = 0
            alone.slot_of_document[0] = batch.slot_of_document[document]
            alone.fresh[0] = batch.fresh[document]
            outcome = self.step(alone)
            together.evidence[own] = outcome.evidence[: len(own)]
            together.weight[own] = outcome.weight[: len(own)]
            together.logits[document] = outcome.logits[0]
            if together.usage is not None and outcome.usage is not None:
                together.usage[own] = outcome.usage[: len(own)]
        return together

    @torch.inference_mode()
    def snapshot(self, slot: int) -> Callable[[], Snapshot]:
        return self.pool.snapshot(slot)

    @torch.inference_mode()
    def restore(self, slot: int, snapshot: Snapshot) -> None:
        self.pool.restore(slot, snapshot)

    @property
    def state_bytes(self) -> int:
        """See `Runner.state_bytes`."""
        return self.pool.state_bytes

    def memory(self) -> Memory:
        return device_memory(self.device)


def device_memory(device: str) -> Memory:
    """The memory of this process, and what it has of a device: of none if that is the CPU."""
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
