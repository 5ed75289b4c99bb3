"""The worker: a model on one device, and the engine that reads documents with it."""

from __future__ import annotations

import asyncio
import logging
import sys
from functools import partial
from importlib.metadata import version
from typing import Self

import numpy as np
import torch

from gma.service.engine.engine import Engine
from gma.service.engine.step import Runner
from gma.service.errors import NotReady
from gma.service.link.client import WorkerInfo
from gma.service.meter import Meter
from gma.service.model_folder import ModelFolder
from gma.service.observe import metrics
from gma.service.runners.compilations import Compilations
from gma.service.runners.kernel_cache import KernelCache
from gma.service.runners.loading import load
from gma.service.settings import Settings

logger = logging.getLogger(__name__)

LOST_AFTER = 8
"""Steps that fail in a row: the device is lost, and a new process is needed."""


class Worker:
    """A runner, the engine that reads documents with it, and what is told of both."""

    def __init__(self, runner: Runner, settings: Settings, *, fingerprint: str, name: str) -> None:
        """`name`: the model's, under which it is counted."""
        self._runner = runner
        self._name = name
        self._settings = settings
        self.fingerprint = fingerprint
        """Of the model."""
        self._kernels = KernelCache(settings.compile_cache, runner, fingerprint=fingerprint)
        self._meter = Meter(name)
        self.engine = Engine(
            runner,
            max_waiting=settings.max_waiting_documents,
            inbox_tokens=settings.inbox_tokens,
            idle_timeout_s=2 * settings.idle_timeout_s,  # the gateway's comes first, and says more
            interval_s=settings.progress_interval_s,
            model=fingerprint,
            observer=self._meter,
        )
        self._watching: asyncio.Task[None] | None = None

    @classmethod
    def load(cls, settings: Settings, name: str | None = None) -> Self:
        """A worker with the model of `settings`, which is called `name`, or else as its checkpoint
        says. Raises ValueError or RuntimeError."""
        name = name or ModelFolder.of(settings).config.name
        loaded = load(settings)
        runner = loaded.runner
        logger.info(
            "%s on %s in %s: %s",
            name,
            runner.device,
            runner.dtype,
            runner.kernels,
        )
        return cls(runner, settings, fingerprint=loaded.fingerprint, name=name)

    async def start(self) -> None:
        """Warm up. Raises what the warm-up raises; there is no reading then."""
        self._kernels.tell()
        compilations = Compilations()
        await self.engine.start()
        metrics.COMPILATIONS.labels("warm-up").inc(compilations.new())
        self._kernels.record()
        runner = self._runner
        name = self._name
        metrics.SLOTS.labels(name).set(runner.slots)
        metrics.PAGES.labels(name).set(runner.pages)
        metrics.STATE_BYTES.labels(name).set(runner.state_bytes)
        metrics.WORKERS.labels(name, runner.backend, runner.device, runner.dtype).set(1)
        self._watching = asyncio.create_task(
            metrics.watch(partial(self._report, compilations)), name="watch"
        )

    def _report(self, compilations: Compilations) -> None:
        """Tell what has no event of its own."""
        metrics.COMPILATIONS.labels("serving").inc(compilations.new())
        queue = self.engine.queue()
        metrics.TOKENS_WAITING.labels(self._name).set(queue.tokens)
        metrics.QUEUE_HEAD_SECONDS.labels(self._name).set(queue.head_s)
        self._meter.memory = self._runner.memory()
        metrics.report_memory("worker", self._meter.memory)

    def compile(self) -> None:
        """Compile and run every kernel once, for the cache of the settings, and do no more.

        Raises ValueError if what runs has no kernels that can be kept.
        """
        if not self._kernels.kept:
            raise ValueError(f"there is nothing to compile ahead for {self._runner.kernels}")
        self._kernels.tell()
        self._runner.warm_up()
        self._kernels.record()

    async def stop(self) -> None:
        """End the steps in flight; what is not done by then fails with ShuttingDown."""
        if self._watching:
            self._watching.cancel()
        await self.engine.stop()

    @property
    def ready(self) -> bool:
        """Warm, and reading."""
        return self.engine.ready

    def check_health(self) -> None:
        """Raises RuntimeError if nothing can be read any more: after some errors a GPU fails all
        that its process asks of it."""
        if not self.ready:
            raise RuntimeError("the engine has stopped")
        if self.engine.failed_steps >= LOST_AFTER:
            raise RuntimeError(f"the last {self.engine.failed_steps} steps failed")

    def _check_ready(self) -> None:
        if not self.ready:
            raise NotReady("the worker is not ready: try again when it has warmed up")

    @property
    def queued_tokens(self) -> int:
        """Tokens that have come, and are in no step yet."""
        return self.engine.queue().tokens

    async def info(self) -> WorkerInfo:
        """See `WorkerClient.info`."""
        self._check_ready()
        grid = self._runner.grids[-1]
        return WorkerInfo(
            backend=self._runner.backend,
            device=self._runner.device,
            dtype=self._runner.dtype,
            kernels=self._runner.kernels,
            fingerprint=self.fingerprint,
            rows=grid.rows,
            chunk_tokens=grid.chunk,
            slots=self._runner.slots,
            components=self._runner.counts,
            sessions=self._runner.parts is not None,
            max_document_tokens=self.engine.most_tokens,
            versions={
                "service": version("gma-service"),
                "python": ".".join(map(str, sys.version_info[:3])),
                # A plain text: torch's own class would make who reads it import torch.
                "torch": str(torch.__version__),
                "numpy": np.__version__,
                **self._runner.versions,
            },
        )
