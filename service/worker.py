"""The worker: a model on one device, and the engine that reads documents with it."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Self, cast

import numpy as np
import torch

from gma.model import weights
from gma.model.classifier import Classifier
from gma.model.ops.choice import Precision, obstacle
from gma.service.cores import cores
from gma.service.engine.document import Progress
from gma.service.engine.engine import Ending, Engine, Observer
from gma.service.engine.step import Runner
from gma.service.errors import NotReady
from gma.service.gateway.contract import WorkerInfo
from gma.service.link.client import Reading, Tokens
from gma.service.model_folder import ModelFolder, needing_onnx
from gma.service.observe import metrics
from gma.service.observe.memory import Memory
from gma.service.runners import kernel_cache
from gma.service.runners.compilations import Compilations
from gma.service.runners.torch import TorchRunner
from gma.service.settings import Settings

logger = logging.getLogger(__name__)

LOST_AFTER = 8
"""Steps that fail in a row: the device is lost, and a new process is needed."""


class Worker:
    """Reads documents. A `WorkerClient` itself, for gateways in the same process."""

    def __init__(self, runner: Runner, settings: Settings, *, fingerprint: str) -> None:
        self._runner = runner
        self._settings = settings
        self._fingerprint = fingerprint
        self._meter = Meter()
        self._engine = Engine(
            runner,
            max_waiting=settings.max_waiting_documents,
            inbox_tokens=settings.inbox_tokens,
            idle_timeout_s=2 * settings.idle_timeout_s,  # the gateway's comes first, and says more
            observer=self._meter,
        )
        self._watching: asyncio.Task[None] | None = None

    @classmethod
    def load(cls, settings: Settings) -> Self:
        """A worker with the model of `settings`. Raises ValueError or RuntimeError."""
        folder = ModelFolder.of(settings)
        loaded = LOADERS[settings.backend](settings)
        runner = loaded.runner
        logger.info(
            "%s on %s in %s: %s",
            folder.config.name,
            runner.device,
            runner.dtype,
            runner.kernels,
        )
        return cls(runner, settings, fingerprint=loaded.fingerprint)

    async def start(self) -> None:
        """Warm up. Raises what the warm-up raises; there is no reading then."""
        self._check_cache()
        compilations = Compilations()
        await self._engine.start()
        metrics.COMPILATIONS.labels("warm-up").inc(compilations.new())
        self._record_cache()
        runner = self._runner
        metrics.SLOTS.set(runner.pool.count)
        metrics.STATE_BYTES.set(runner.pool.state_bytes)
        metrics.WORKERS.labels(runner.backend, runner.device, runner.dtype).set(1)
        self._watching = asyncio.create_task(
            metrics.watch(partial(self._report, compilations)), name="watch"
        )

    def _report(self, compilations: Compilations) -> None:
        """Tell what has no event of its own."""
        metrics.COMPILATIONS.labels("serving").inc(compilations.new())
        queue = self._engine.queue()
        metrics.TOKENS_WAITING.set(queue.tokens)
        metrics.QUEUE_HEAD_SECONDS.set(queue.head_s)
        self._meter.memory = self._runner.memory()
        metrics.report_memory("worker", self._meter.memory)

    def compile(self) -> None:
        """Compile and run every kernel once, for the cache of the settings, and do no more.

        Raises ValueError if what runs has no kernels that can be kept.
        """
        if not self._kept:
            raise ValueError(f"there is nothing to compile ahead for {self._runner.kernels}")
        self._check_cache()
        self._runner.warm_up()
        self._record_cache()

    @property
    def _kept(self) -> bool:
        """The runner's kernels can be kept: torch.compile has a cache of its own, and those of ONNX
        Runtime are compiled already."""
        return self._runner.backend == "torch" and self._runner.dtype != "float32"

    def _check_cache(self) -> None:
        folder = self._settings.compile_cache
        if folder and self._kept:
            logger.info("compile cache: %s", kernel_cache.verdict(folder, self._manifest()))
        elif folder:
            logger.info("compile cache: not used by %s", self._runner.kernels)

    def _record_cache(self) -> None:
        folder = self._settings.compile_cache
        if not (folder and self._kept):
            return
        try:
            kernel_cache.record(folder, self._manifest())
        except OSError as error:
            logger.info("compile cache: left as it is (%s)", error)

    def _manifest(self) -> kernel_cache.Manifest:
        runner = self._runner
        grids = [f"{grid.rows} x {grid.chunk}" for grid in runner.grids]
        gpu = torch.cuda.get_device_name(runner.device)
        return kernel_cache.manifest(self._fingerprint, gpu, runner.dtype, grids)

    async def stop(self) -> None:
        """End the steps in flight; what is not done by then fails with ShuttingDown."""
        if self._watching:
            self._watching.cancel()
        await self._engine.stop()

    @property
    def ready(self) -> bool:
        """Warm, and reading."""
        return self._engine.ready

    def check_health(self) -> None:
        """Raises RuntimeError if nothing can be read any more: after some errors a GPU fails all
        that its process asks of it."""
        if not self.ready:
            raise RuntimeError("the engine has stopped")
        if self._engine.failed_steps >= LOST_AFTER:
            raise RuntimeError(f"the last {self._engine.failed_steps} steps failed")

    def _check_ready(self) -> None:
        if not self.ready:
            raise NotReady("the worker is not ready: try again when it has warmed up")

    @asynccontextmanager
    async def open(
        self, document: str, tokens: Tokens, last: bool, *, evidence: bool, running: bool
    ) -> AsyncIterator[Reading]:
        """See `WorkerClient.open`."""
        self._check_ready()
        progress = self._engine.read(
            document,
            tokens,
            last,
            evidence=evidence,
            interval_s=self._settings.progress_interval_s if running else None,
        )
        first = asyncio.ensure_future(anext(progress))
        try:
            await asyncio.sleep(0)  # within which the engine has opened the document, or refused it
            if first.done():
                await first  # which raises: there is no progress yet
            yield _Reading(self, document, first, progress)
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            await progress.aclose()

    async def feed(self, document: str, offset: int, tokens: Tokens, last: bool) -> None:
        """Add tokens to an open document; see `Reading.feed`."""
        await self._engine.feed(document, offset, tokens, last)

    @property
    def queued_tokens(self) -> int:
        """Tokens that have come, and are in no step yet."""
        return self._engine.queue().tokens

    async def info(self) -> WorkerInfo:
        """See `WorkerClient.info`."""
        self._check_ready()
        grid = self._runner.grids[-1]
        return WorkerInfo(
            backend=self._runner.backend,
            device=self._runner.device,
            dtype=self._runner.dtype,
            kernels=self._runner.kernels,
            fingerprint=self._fingerprint,
            rows=grid.rows,
            chunk_tokens=grid.chunk,
            slots=self._runner.pool.count,
            versions={
                "service": version("gma-service"),
                "python": ".".join(map(str, sys.version_info[:3])),
                # A plain text: torch's own class would make who reads it import torch.
                "torch": str(torch.__version__),
                "numpy": np.__version__,
                **self._runner.versions,
            },
        )


class Loaded(NamedTuple):
    """A model ready to run steps."""

    runner: Runner
    fingerprint: str


def load_torch(settings: Settings) -> Loaded:
    """The checkpoint of `settings`. Raises CheckpointError, a ValueError, or RuntimeError."""
    torch.set_num_threads(settings.threads or cores())
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = weights.load(settings.checkpoint, device=device)
    return Loaded(make_runner(checkpoint.classifier, settings), checkpoint.fingerprint)


def load_onnx(settings: Settings) -> Loaded:
    """The exported model of `settings`. Raises ValueError for settings that it does not allow."""
    with needing_onnx():
        from gma.export.artifact import Artifact
        from gma.service.runners.onnx import OnnxRunner, default_device
    exported = Artifact.open(settings.checkpoint)
    manifest = exported.manifest
    device = default_device() if settings.device == "auto" else settings.device
    if settings.dtype not in ("auto", manifest.precision):
        raise ValueError(
            f"GMA_DTYPE is {settings.dtype}, but {settings.checkpoint} is in {manifest.precision}: "
            "leave it out, or export the checkpoint again"
        )
    rows, _ = settings.grid(on_gpu=device == "cuda", fixed_chunk=manifest.chunk)
    runner = OnnxRunner(
        exported,
        slots=settings.slots,
        rows=rows,
        device=device,
        library=library(settings),
        threads=settings.threads,
        memory=settings.onnx_memory,
    )
    return Loaded(runner, exported.fingerprint)


LOADERS: dict[str, Callable[[Settings], Loaded]] = {"torch": load_torch, "onnx": load_onnx}


def library(settings: Settings) -> Path | None:
    """That of the model's operators, if there is one to use."""
    if isinstance(settings.ops_library, Path):
        return settings.ops_library
    if settings.ops_library == "none" or find_spec("gma_ops") is None:
        return None
    library: Path = import_module("gma_ops").library()
    return library


def make_runner(classifier: Classifier, settings: Settings) -> Runner:
    """The fastest runner for this model where its weights are, or the one that was asked for.

    Raises ValueError for settings that the device or the model does not allow.
    """
    on_gpu = classifier.embedding.weight.is_cuda
    rows, chunk = settings.grid(on_gpu=on_gpu)
    if not on_gpu:
        if settings.dtype not in ("auto", "float32"):
            raise ValueError(f"GMA_DTYPE={settings.dtype} needs a GPU: on the CPU it is float32")
        return TorchRunner(classifier, slots=settings.slots, rows=rows, chunk=chunk)
    precision = settings.dtype
    if precision == "auto":
        reason = obstacle(classifier)
        if reason:
            logger.warning("no fused kernels: %s", reason)
        precision = "float32" if reason else "bfloat16"
    if precision == "float32":
        return TorchRunner(classifier, slots=settings.slots, rows=rows, chunk=chunk, compile=True)
    from gma.service.runners.fused import (
        FusedRunner,  # Triton is not installed where there is no GPU
    )

    return FusedRunner(
        classifier,
        slots=settings.slots,
        rows=rows,
        chunk=chunk,
        precision=cast("Precision", precision),  # settings let no other pass for torch
    )


class _Reading:
    """A document of the engine in this process."""

    def __init__(
        self,
        worker: Worker,
        document: str,
        first: asyncio.Future[Progress],
        progress: AsyncGenerator[Progress],
    ) -> None:
        self._worker = worker
        self._document = document
        self._first = first
        self._progress = progress

    async def __aiter__(self) -> AsyncGenerator[Progress]:
        yield await self._first
        async for progress in self._progress:
            yield progress

    async def feed(self, offset: int, tokens: Tokens, last: bool) -> None:
        await self._worker.feed(self._document, offset, tokens, last)


class Meter(Observer):
    """Tells Prometheus what the engine does."""

    def __init__(self) -> None:
        self.memory = Memory(0, 0)
        """As it was last looked at."""

        self._largest: dict[tuple[str, str], int] = {}

    def occupancy(self, waiting: int, slots: int) -> None:
        metrics.DOCUMENTS_WAITING.set(waiting)
        metrics.SLOTS_IN_USE.set(slots)

    def refused(self) -> None:
        metrics.REFUSALS.labels("waiting").inc()

    def admitted(self, seconds: float) -> None:
        metrics.SLOT_WAIT_SECONDS.observe(seconds)

    def stepped(self, rows: int, grid_rows: int, tokens: int, seconds: float) -> None:
        metrics.STEP_SECONDS.observe(seconds)
        metrics.STEP_ROWS.inc(rows)
        metrics.STEP_GRID_ROWS.inc(grid_rows)
        metrics.TOKENS.inc(tokens)

    def step_failed(self) -> None:
        metrics.STEP_FAILURES.inc()

    def closed(self, how: Ending, progress: Progress) -> None:
        metrics.DOCUMENTS.labels(how).inc()
        if how == "done":
            metrics.DOCUMENT_TOKENS.observe(progress.tokens)
            length = metrics.length_label(progress.tokens)
            self._enlarge(length, "resident", self.memory.resident)
            self._enlarge(length, "device", self.memory.device)

    def not_finite(self) -> None:
        metrics.NONFINITE.inc()

    def _enlarge(self, length: str, memory: str, size: int) -> None:
        """Tell the memory beside a document so long, if it is the largest so far."""
        if size > self._largest.get((length, memory), 0):
            self._largest[length, memory] = size
            metrics.LENGTH_MEMORY_BYTES.labels(length, memory).set(size)
