"""Runs steps on a GPU through CUDA graphs: the host only fills a buffer and starts a replay."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gma.model.classifier import Classifier
from gma.model.fused.buffers import Inputs, Outputs
from gma.model.fused.obstacles import FusedPrecision
from gma.model.fused.step import FusedStep
from gma.model.grid import Grid
from gma.service.engine.snapshot import Parts, Snapshot
from gma.service.engine.step import Batch, Launched, Outcome
from gma.service.observe.memory import Memory
from gma.service.runners.grids import grids_up_to, warm_up
from gma.service.runners.kernel_cache import FUSED
from gma.service.runners.pool import StatePool
from gma.service.runners.torch import TorchRunner, device_memory

logger = logging.getLogger(__name__)


class FusedRunner:
    """`FusedStep` on the device where the classifier's weights are, two graphs a grid: the other
    counts the usage of components too, and is replayed in steps of which that is wanted.

    States are read and written in their slots, documents meet nowhere in a step, and nothing is
    allocated or compiled once it is warm. While a step runs, the next can be launched.
    """

    backend = "torch"
    depth = 2
    counts = True
    passes, pages = 1, 0
    versions: Mapping[str, str] = TorchRunner.versions

    def __init__(
        self,
        classifier: Classifier,
        *,
        slots: int,
        rows: int,
        chunk: int,
        precision: FusedPrecision,
    ) -> None:
        """`slots` documents at a time, up to `rows` x `chunk` tokens a step.

        Raises ValueError if the model has no fused step in this precision.
        """
        self.grids = grids_up_to(rows, chunk, classifier.config)
        self.device = str(classifier.embedding.weight.device)
        self.dtype: str = precision
        self.kernels = f"{FUSED}, CUDA graphs"
        self._labels = len(classifier.config.labels)
        self.vocab_size = classifier.config.vocab_size
        self.slots = slots
        self.pool = StatePool(classifier.config, slots, device=self.device)
        self.parts: Parts | None = self.pool.parts
        self._step = FusedStep(classifier, rows=rows, chunk=chunk, precision=precision)
        self._on_gpu = self._step.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if self._on_gpu else None  # type: ignore[no-untyped-call]
        self._places: dict[Grid, _Place] = {}

    def warm_up(self) -> None:
        for index, grid in enumerate(self.grids, 1):
            began = time.perf_counter()
            logger.info(
                "grid %d of %d, %d x %d tokens: compiling what the cache does not have",
                index, len(self.grids), *grid,
            )  # fmt: skip
            with self._current():
                inputs = Inputs.empty(grid, self.device)
                outputs = Outputs.empty(grid.rows, self._labels, self.device)
                usage = torch.zeros(self._usage_shape(grid), device=self.device)
                self._places[grid] = _Place(
                    inputs,
                    outputs,
                    usage,
                    self._captured(inputs, outputs),
                    self._captured(inputs, outputs, usage),
                    self._staged(grid),
                )
            warm_up(self, grid)
            logger.info(
                "grid %d of %d, %d x %d tokens: ready in %.1f s",
                index, len(self.grids), *grid, time.perf_counter() - began,
            )  # fmt: skip

    def _usage_shape(self, grid: Grid) -> tuple[int, ...]:
        return grid.rows, *self.pool.states.mass.shape[1:]

    def _captured(
        self, inputs: Inputs, outputs: Outputs, usage: Tensor | None = None
    ) -> Callable[[], object]:
        """Something that runs the step on what lies in these buffers."""

        def run() -> None:
            self._step(inputs, self.pool.states, outputs, usage)

        if not self._on_gpu:
            return run
        # No document has rows yet. What a first run compiles and allocates can't be captured.
        run()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            run()
        return graph.replay

    def _staged(self, grid: Grid) -> deque[_Staged]:
        """Buffers on the host for each of the steps in flight, the next step's first."""
        usage = self._usage_shape(grid)
        return deque(
            _Staged.empty(grid, self._labels, usage, pinned=self._on_gpu) for _ in range(self.depth)
        )

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        grid = Grid(*batch.tokens.shape)
        place = self._places[grid]
        staged = place.staged[0]
        staged.fill(batch)
        # Only now: if that raised, the next launch must not take those of the step in flight.
        place.staged.rotate(-1)
        with self._current():
            place.inputs.whole.copy_(staged.inputs.whole, non_blocking=True)
            if batch.count:
                place.replay_and_count()
                staged.usage.copy_(place.usage, non_blocking=True)
            else:
                place.replay()
            staged.outputs.whole.copy_(place.outputs.whole, non_blocking=True)
            ended = None
            if self._on_gpu:
                ended = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                ended.record(self._stream)
        return _Running(staged, ended, batch.count)

    def step(self, batch: Batch) -> Outcome:
        """A step from its launch to its end."""
        return self.launch(batch).outcome()

    @torch.inference_mode()
    def snapshot(self, slot: int) -> Callable[[], Snapshot]:
        with self._current():
            return self.pool.snapshot(slot)

    @torch.inference_mode()
    def restore(self, slot: int, snapshot: Snapshot) -> None:
        with self._current():
            self.pool.restore(slot, snapshot)

    def _current(self) -> ExitStack:
        """The device and the stream, for the thread that this is called from."""
        stack = ExitStack()
        if self._on_gpu:
            stack.enter_context(torch.cuda.device(self.device))
            stack.enter_context(torch.cuda.stream(self._stream))
        return stack

    @property
    def state_bytes(self) -> int:
        """See `Runner.state_bytes`."""
        return self.pool.state_bytes

    def memory(self) -> Memory:
        return device_memory(self.device)


@dataclass(frozen=True)
class _Place:
    """A grid's memory on the device, and how a step over it is started."""

    inputs: Inputs
    outputs: Outputs
    usage: Tensor  # (R, L, H, K)
    replay: Callable[[], object]
    replay_and_count: Callable[[], object]
    staged: deque[_Staged]


@dataclass(frozen=True)
class _Staged:
    """A step's input and answer on the host."""

    inputs: Inputs
    outputs: Outputs
    usage: Tensor  # (R, L, H, K)

    @classmethod
    def empty(cls, grid: Grid, labels: int, usage: tuple[int, ...], *, pinned: bool) -> _Staged:
        return cls(
            Inputs.empty(grid, "cpu", pinned=pinned),
            Outputs.empty(grid.rows, labels, "cpu", pinned=pinned),
            torch.zeros(usage, pin_memory=pinned),
        )

    def fill(self, batch: Batch) -> None:
        used = batch.lengths > 0
        rows = len(used)
        first = np.zeros(rows, np.int32)
        # Backwards, so that each document's first row is the last that is written.
        first[batch.document_of_row[used][::-1]] = np.flatnonzero(used)[::-1]
        for mine, given in (
            (self.inputs.tokens, batch.tokens),
            (self.inputs.lengths, batch.lengths),
            (self.inputs.document, batch.document_of_row),
            (self.inputs.slots, batch.slot_of_document),
            (self.inputs.fresh, batch.fresh),
            (self.inputs.first_row, first),
            (self.inputs.row_count, np.bincount(batch.document_of_row[used], minlength=rows)),
        ):
            mine.numpy()[:] = given


@dataclass(frozen=True)
class _Running:
    """A step on its way."""

    staged: _Staged
    ended: torch.cuda.Event | None
    count: bool

    def outcome(self) -> Outcome:
        if self.ended is not None:
            self.ended.synchronize()
        # Copies: the buffers are those of the step after next.
        return Outcome(
            self.staged.outputs.evidence.numpy().copy(),
            self.staged.inputs.lengths.numpy().astype(np.float32),
            self.staged.outputs.logits.numpy().copy(),
            self.staged.usage.numpy().copy() if self.count else None,
        )
