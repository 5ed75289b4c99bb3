"""The gateway: what all documents of one process share on their way to a worker and back.

It knows nothing of HTTP and nothing of Ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np

from gma.model.config import ModelConfig
from gma.model.tokenizer import Tokenizer
from gma.service import heap
from gma.service.cores import cores_for
from gma.service.errors import ServiceError
from gma.service.gateway.admission import Admission
from gma.service.gateway.contract import Info, Limits
from gma.service.gateway.predictions import Predictions
from gma.service.gateway.spending import Spending
from gma.service.link.client import WorkerClient
from gma.service.link.lasting import LastingWorkers
from gma.service.observe import metrics
from gma.service.observe.memory import Memory, resident_memory
from gma.service.sessions.choice import store_of
from gma.service.settings import Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")

LARGE_BYTES, GIVE_BACK_S = 2**24, 5.0

SWEEP_S = 60.0
"""How often a gateway removes sessions that expired long ago."""


class Gateway:
    """A model's description and tokenizer, the workers that run it, and what is in flight."""

    def __init__(
        self,
        settings: Settings,
        config: ModelConfig,
        tokenizer: Tokenizer,
        workers: WorkerClient,
        *,
        threads: int | None = None,
        gateways: int = 1,
    ) -> None:
        """`threads` tokenize what is large, by default one a core; `gateways` there are in all.

        Raises ValueError if the store of sessions can't be used.
        """
        self.settings = settings
        self.config = config
        self.tokenizer = tokenizer
        lengths = tokenizer.byte_lengths
        # As narrow as they may be: they are kept for each token of a whole document.
        self.token_bytes = lengths.astype(np.min_scalar_type(int(lengths.max())))
        """(vocab_size,): the bytes of each token."""
        self.workers = LastingWorkers(workers)
        self.admission = Admission(settings, Spending(gateways))
        self.predictions = Predictions(config)
        self.store = store_of(settings)
        self._threads = ThreadPoolExecutor(cores_for(settings), thread_name_prefix="small")
        self._large = ThreadPoolExecutor(
            threads or cores_for(settings), thread_name_prefix="tokenize"
        )

    async def info(self) -> Info:
        """What runs here. Raises NotReady without a worker."""
        settings = self.settings
        worker = await self.workers.info()
        worker["sessions"] = worker["sessions"] and self.store is not None
        least = self.config.least_scores
        return Info(
            model=self.config.name,
            labels=list(self.config.labels),
            multi_label=self.config.multi_label,
            thresholds=None if least is None else list(least),
            pooling=self.config.pooling,
            causal=self.config.causal,
            workers=self.workers.count,
            limits=Limits(
                max_document_bytes=settings.max_document_bytes,
                max_bytes_in_flight=settings.max_bytes_in_flight,
                max_documents_in_flight=settings.max_documents_in_flight,
                max_evidence_spans=settings.max_evidence_spans,
                idle_timeout_s=settings.idle_timeout_s,
                min_upload_rate=settings.min_upload_rate,
            ),
            **worker,
        )

    async def in_thread(self, function: Callable[[], T], *, large: bool = False) -> T:
        """Run what would hold up other requests; what is large holds up only what is large too."""
        threads = self._large if large else self._threads
        return await asyncio.get_running_loop().run_in_executor(threads, function)

    async def watch_memory(self) -> None:
        """Report this process's memory for as long as this runs, and give back what bodies left."""
        reporting = metrics.watch(
            lambda: metrics.report_memory("gateway", Memory(*resident_memory()))
        )
        await asyncio.gather(reporting, self._give_back())

    async def sweep(self) -> None:
        """Remove sessions that expired long ago, for as long as this runs."""
        while self.store:
            try:
                await self.in_thread(partial(self.store.sweep, time.time()))
            except ServiceError as error:
                logger.warning("%s", error)
            await asyncio.sleep(SWEEP_S)

    async def _give_back(self) -> None:
        heap.settle()
        seen = 0
        while True:
            await asyncio.sleep(GIVE_BACK_S)
            idle, received = not self.admission.documents, self.admission.received_bytes
            if received - seen >= LARGE_BYTES:
                await self.in_thread(heap.give_back)
                # Those that are still read may leave something too.
                seen = received if idle else seen
