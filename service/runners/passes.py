"""Runs steps of a bidirectional model in PyTorch: rows of any documents, each in its own pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gma.model.classifier import Classifier
from gma.model.grid import Grid
from gma.model.layers import Layer
from gma.model.state import State
from gma.service.engine.snapshot import Parts, Snapshot
from gma.service.engine.step import Batch, Ended, Launched, Outcome, fitting
from gma.service.observe.memory import Memory
from gma.service.runners.grids import grids_up_to, warm_up
from gma.service.runners.pool import StatePool
from gma.service.runners.torch import TorchRunner, device_memory


class PassRunner:
    """A bidirectional classifier, eager or compiled, on the device where its weights are.

    Between passes a chunk's hidden tokens lie in its page. Pages are allocated once, and hold what
    another document left until they are written.
    """

    backend = "torch"
    depth = 1
    counts = True
    parts: Parts | None = None  # there is no answer so far that a document could go on from
    versions: Mapping[str, str] = TorchRunner.versions

    def __init__(
        self,
        classifier: Classifier,
        *,
        slots: int,
        page_memory: int,
        rows: int = 8,
        chunk: int = 256,
        compile: bool = False,  # noqa: A002 (its name in torch)
    ) -> None:
        """`slots` documents at a time, with pages of `page_memory` bytes; `rows` x `chunk` tokens a
        step. Raises ValueError if the memory does not hold a page, or is not to be had.

        `compile` is for a GPU; the warm-up then compiles a grid after the other.
        """
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
        how = "compiled" if compile else "eager"
        self.kernels = f"{how} PyTorch in {self.passes} passes, {classifier.mixers} mixer"
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
        self._chunk = chunk
        self._compiled = compile
        self._step = _step
        if compile:
            # CUDA graphs: what launches cost the CPU would cost more than the kernels.
            mode = "reduce-overhead" if self.device.startswith("cuda") else "default"
            self._step = torch.compile(_step, dynamic=False, fullgraph=True, mode=mode)

    def warm_up(self) -> None:
        if self._compiled:
            # A grid has three: the first pass's, the last's, and one of those between, whose layers
            # are inputs. The limit is set here because it is each thread's own.
            torch._dynamo.config.recompile_limit = max(8, 2 * 3 * len(self.grids))
        for grid in self.grids:
            # A graph is run once, then recorded, then replayed.
            for _ in range(3 if self._compiled else 1):
                warm_up(self, grid)

    def launch(self, batch: Batch) -> Launched:
        return Ended(self.step(batch))

    def snapshot(self, slot: int) -> Callable[[], Snapshot]:
        raise NotImplementedError

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        raise NotImplementedError

    @torch.inference_mode()
    def step(self, batch: Batch) -> Outcome:
        """A step from its launch to its end: one pass of the rows after the other."""
        counted = self._counted if batch.count else None
        outcome = Outcome.blank(len(batch.lengths), self._labels, counted)
        part: Part | None = None
        for number in range(self.passes):
            rows = _rows_in(number, batch, outcome)
            if not len(rows):
                continue
            if part is None or not np.array_equal(rows, part.rows):
                part = self._part(batch, rows)
            self._read(number, batch, part, outcome)
        return outcome

    def _read(self, number: int, batch: Batch, part: Part, outcome: Outcome) -> None:
        """Read a part of the batch in pass `number`, and note what it says."""
        rows, documents, tokens, places = part
        slots, pages = places[0], places[1]
        # Usage is counted without a graph: it is rare, and would be another compilation a grid.
        step = (_step if batch.count else self._step)(
            self._classifier,
            *self._classifier.layers_of(number),
            tokens,
            self.hidden.index_select(0, pages) if number else None,
            places,
            self.pool.states.gather(slots),
            batch.count,
        )
        # A graph's answer lies where its next run writes: nothing of it is used after that.
        told = Told.of(step.told.cpu().numpy(), len(documents), len(rows))
        if len(documents) > 1 and not told.finite.all():
            # The products that combine rows spread one document's NaN to all (0 * NaN is NaN), so
            # each is read again, from its state and pages before the pass.
            for document in documents:
                own = rows[batch.document_of_row[rows] == document]
                self._read(number, batch, self._part(batch, own), outcome)
            return
        self.pool.scatter(slots, step.states)
        if outcome.usage is not None and step.usage is not None:
            outcome.usage[rows, number] = step.usage[: len(rows)].float().cpu().numpy()
        if number < self.passes - 1:
            self.hidden.index_copy_(0, pages[: len(rows)], step.hidden[: len(rows)])
            outcome.logits[documents] = np.where(told.finite, 0.0, np.nan)[:, None]
            return
        outcome.evidence[rows], outcome.weight[rows] = told.evidence, told.weight
        outcome.logits[documents] = told.logits

    def _part(self, batch: Batch, rows: NDArray[np.intp]) -> Part:
        """`rows`, (n,), all of some documents', on the device."""
        documents, own = np.unique(batch.document_of_row[rows], return_inverse=True)
        # Without graphs any number of rows will do.
        grid = fitting(self.grids, len(rows)) if self._compiled else Grid(len(rows), self._chunk)
        part = Batch.blank(grid, self.slots)
        part.tokens[: len(rows)] = batch.tokens[rows]
        part.lengths[: len(rows)] = batch.lengths[rows]
        part.document_of_row[: len(rows)] = own
        part.page_of_row[: len(rows)] = batch.page_of_row[rows]
        part.slot_of_document[: len(documents)] = batch.slot_of_document[documents]
        part.fresh[: len(documents)] = batch.fresh[documents]
        tokens, places = torch.from_numpy(part.tokens), torch.from_numpy(_places(part))
        return Part(rows, documents, tokens.to(self.device), places.to(self.device))

    @property
    def state_bytes(self) -> int:
        """See `Runner.state_bytes`."""
        return self.pool.state_bytes

    def memory(self) -> Memory:
        return device_memory(self.device)


class Part(NamedTuple):
    """Rows of a batch that are read in the same pass, without the others, in a grid of R rows."""

    rows: NDArray[np.intp]  # (n,) of the batch
    documents: NDArray[np.int64]  # (D,) of the batch: all that have these rows, and no others
    tokens: Tensor  # (R, C) ids
    places: Tensor  # (5, R): see `_places`


class Answer(NamedTuple):
    """What R rows of as many documents answer in one pass."""

    hidden: Tensor  # (R, C, W)
    states: State
    usage: Tensor | None  # (R, H, K), if asked for
    told: Tensor  # (R, 2 + 2 * labels) float64: see `Told`, in one piece to be copied at once


class Told(NamedTuple):
    """What is told of n rows of D documents."""

    finite: NDArray[np.bool_]  # (D,): what they wrote, and what they say, are numbers
    weight: NDArray[np.float64]  # (n,)
    logits: NDArray[np.float64]  # (D, labels)
    evidence: NDArray[np.float64]  # (n, labels)

    @classmethod
    def of(cls, told: NDArray[np.float64], documents: int, rows: int) -> Told:
        finite, weight = told[:documents, 0] != 0, told[:rows, 1]
        logits, evidence = np.split(told[:, 2:], 2, axis=1)
        return cls(finite, weight, logits[:documents], evidence[:rows])


def _rows_in(number: int, batch: Batch, outcome: Outcome) -> NDArray[np.intp]:
    """The rows, (n,), that are read in pass `number`: of documents that are numbers so far."""
    reads = (batch.first_pass <= number) & (number <= batch.last_pass)
    reads &= np.isfinite(outcome.logits).all(1)
    return np.flatnonzero(reads[batch.document_of_row] & (batch.lengths > 0))


def _places(batch: Batch) -> NDArray[np.int64]:
    """What `_step` takes of a batch beside tokens, (5, R), in one piece to be copied at once."""
    return np.stack(
        [
            batch.slot_of_document,
            batch.page_of_row,
            batch.lengths,
            batch.document_of_row,
            batch.fresh.astype(np.int64),
        ]
    )


def _step(
    classifier: Classifier,
    reads: Layer | None,
    writes: Layer | None,
    tokens: Tensor,
    hidden: Tensor | None,
    places: Tensor,
    states: State,
    count: bool,
) -> Answer:
    """One pass of some rows. It gets copies of states and pages, not pool and pages themselves:
    a graph copies what it reads into buffers of its own."""
    _, _, lengths, own, begins = places.unbind()
    step = classifier.step_between(
        reads,
        writes,
        tokens,
        classifier.embedding(tokens) if hidden is None else hidden,
        lengths,
        own,
        begins.bool(),
        states,
        count=count,
    )
    states = step.states
    parts = states.memory[:, 1], states.mass[:, 1], states.evidence
    finite = torch.stack([part.flatten(1).isfinite().all(1) for part in parts]).all(0)
    logits = classifier.logits(states.evidence, states.weight)
    told = [finite[:, None], step.weight[:, None], logits, step.evidence]
    return Answer(step.hidden, states, step.usage, torch.cat([x.double() for x in told], 1))
