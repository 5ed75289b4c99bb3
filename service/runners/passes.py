"""Runs steps of a bidirectional model in PyTorch: rows of any documents, each in its own pass."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gma.model.classifier import Classifier
from gma.model.state import State
from gma.service.engine.step import Batch, Ended, Launched, Outcome
from gma.service.observe.memory import Memory
from gma.service.runners.grids import grids_up_to, warm_up
from gma.service.runners.pool import StatePool
from gma.service.runners.torch import TorchRunner, device_memory


class PassRunner:
    """A bidirectional classifier, on the device where its weights are.

    Between passes a chunk's hidden tokens lie in its page. Pages are allocated once, and hold what
    another document left until they are written.
    """

    backend = "torch"
    depth = 1
    counts = True
    versions: Mapping[str, str] = TorchRunner.versions

    def __init__(
        self,
        classifier: Classifier,
        *,
        slots: int,
        page_memory: int,
        rows: int = 8,
        chunk: int = 256,
    ) -> None:
        """`slots` documents at a time, with pages of `page_memory` bytes; `rows` x `chunk` tokens a
        step. Raises ValueError if the memory does not hold a page, or is not to be had."""
        config = classifier.config
        weights = classifier.embedding.weight
        page_bytes = chunk * config.width * weights.element_size()
        self.grids = grids_up_to(rows, chunk, config)
        self.passes = config.passes
        self.pages = page_memory // page_bytes
        if not self.pages:
            raise ValueError(
                f"GMA_PAGE_MEMORY is {page_memory} bytes, less than a page of {page_bytes}"
            )
        self.device = str(weights.device)
        self.dtype = str(weights.dtype).removeprefix("torch.")
        self.kernels = f"eager PyTorch in {self.passes} passes, {classifier.mixers} mixer"
        self.vocab_size = config.vocab_size
        self.slots = slots
        self.pool = StatePool(config, slots, device=weights.device, dtype=classifier.dtype)
        try:
            # On a CPU untouched pages take no memory.
            self.hidden = weights.new_empty(self.pages, chunk, config.width)
        except RuntimeError as error:
            raise ValueError(
                f"GMA_PAGE_MEMORY is {page_memory} bytes, more than {self.device} has"
            ) from error
        self._classifier = classifier.eval()
        self._labels = len(config.labels)
        self._counted = config.layers, config.heads, config.num_components

    def warm_up(self) -> None:
        for grid in self.grids:
            warm_up(self, grid)

    def launch(self, batch: Batch) -> Launched:
        return Ended(self.step(batch))

    @torch.inference_mode()
    def step(self, batch: Batch) -> Outcome:
        """A step from its launch to its end: one pass of the rows after the other."""
        counted = self._counted if batch.count else None
        outcome = Outcome.blank(len(batch.lengths), self._labels, counted)
        pass_of_row = batch.pass_of_document[batch.document_of_row]
        for number in np.unique(pass_of_row[batch.lengths > 0]):
            rows = np.flatnonzero((pass_of_row == number) & (batch.lengths > 0))
            self._read(int(number), batch, rows, outcome)
        return outcome

    def _read(self, number: int, batch: Batch, rows: NDArray[np.intp], outcome: Outcome) -> None:
        """Read `rows`, (n,), all of some documents', in pass `number`, and note what they say."""
        documents, own = np.unique(batch.document_of_row[rows], return_inverse=True)
        # A step takes as many states as rows: the others are of no document.
        slots, begins = np.full(len(rows), self.slots), np.ones(len(rows), np.bool_)
        slots[: len(documents)] = batch.slot_of_document[documents]
        begins[: len(documents)] = batch.fresh[documents]
        tokens, pages = self._there(batch.tokens[rows]), self._there(batch.page_of_row[rows])
        step = self._classifier.step_in_pass(
            number,
            tokens,
            self.hidden[pages] if number else self._classifier.embedding(tokens),
            self._there(batch.lengths[rows]),
            self._there(own),
            self._there(begins),
            self.pool.states.gather(self._there(slots)),
            count=batch.count,
        )
        finite = _finite(step.states)[: len(documents)].cpu().numpy()
        if len(documents) > 1 and not finite.all():
            # The products that combine rows spread one document's NaN to all (0 * NaN is NaN), so
            # each is read again, from its state and pages before the step.
            for document in documents:
                self._read(number, batch, rows[batch.document_of_row[rows] == document], outcome)
            return
        self.pool.scatter(self._there(slots), step.states)
        if outcome.usage is not None and step.usage is not None:
            outcome.usage[rows, number] = step.usage.float().cpu().numpy()
        if number < self.passes - 1:
            self.hidden[pages] = step.hidden
            outcome.logits[documents] = np.where(finite, 0.0, np.nan)[:, None]
            return
        outcome.evidence[rows] = step.evidence.float().cpu().numpy()
        outcome.weight[rows] = step.weight.float().cpu().numpy()
        logits = self._classifier.logits(step.states.evidence, step.states.weight)
        outcome.logits[documents] = logits[: len(documents)].cpu().numpy()

    def _there(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    @property
    def state_bytes(self) -> int:
        """See `Runner.state_bytes`."""
        return self.pool.state_bytes

    def memory(self) -> Memory:
        return device_memory(self.device)


def _finite(states: State) -> Tensor:
    """Which documents' numbers, (D,) bool, are such: what they wrote, and what they say."""
    parts = states.memory[:, 1], states.mass[:, 1], states.evidence
    return torch.stack([part.flatten(1).isfinite().all(1) for part in parts]).all(0)
