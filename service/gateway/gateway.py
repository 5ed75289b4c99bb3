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

from gma.service import heap
from gma.service.cores import cores_for
from gma.service.errors import ServiceError
from gma.service.gateway.admission import Admission
from gma.service.gateway.contract import Info, Limits
from gma.service.gateway.model import Model, Models
from gma.service.gateway.spending import Spending
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
    """The models, and what documents share whichever of them reads them."""

    def __init__(
        self,
        settings: Settings,
        models: Models,
        *,
        threads: int | None = None,
        gateways: int = 1,
    ) -> None:
        """`threads` tokenize what is large, by default one a core; `gateways` there are in all.

        Raises ValueError if the store of sessions can't be used.
        """
        self.settings = settings
        self.models = models
        self.admission = Admission(settings, Spending(gateways))
        self.store = store_of(settings)
        self._threads = ThreadPoolExecutor(cores_for(settings), thread_name_prefix="small")
        self._large = ThreadPoolExecutor(
            threads or cores_for(settings), thread_name_prefix="tokenize"
        )

    async def info(self, model: Model) -> Info:
        """What a model is, and runs on. Raises NotReady without a worker."""
        worker = await model.workers.info()
        worker["sessions"] = worker["sessions"] and self.store is not None
        return Info(**model.info, models=self.models.names, limits=self.limits, **worker)

    @property
    def limits(self) -> Limits:
        """What documents may be, whichever model reads them."""
        settings = self.settings
        return Limits(
            max_document_bytes=settings.max_document_bytes,
            max_bytes_in_flight=settings.max_bytes_in_flight,
            max_documents_in_flight=settings.max_documents_in_flight,
            max_evidence_spans=settings.max_evidence_spans,
            idle_timeout_s=settings.idle_timeout_s,
            min_upload_rate=settings.min_upload_rate,
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
