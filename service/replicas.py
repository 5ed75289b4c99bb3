"""Workers that are replicas of a Ray Serve deployment: Serve says where they are, and documents go
to them directly, for each of Serve's calls takes longer than a short document's step."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from service.client import Reading, Tokens
from service.errors import NotReady, Overloaded, ServiceError, ShuttingDown, UnknownDocument
from service.remote import Address, RemoteWorker
from service.schemas import WorkerInfo

logger = logging.getLogger(__name__)

NONE = "no worker is ready: try again when one has started"

LOOK_S = 1.0
"""How often a gateway looks who is there."""

FORGOTTEN_S = 3 * LOOK_S
"""After so long no gateway gives new documents to a replica that is to go."""


class RayWorkers:
    """Workers that are replicas of a Serve deployment, each with a method `address`.

    A replica that is to go, because there are too many or a new version comes, gets no new
    documents; those that it has go on.
    """

    def __init__(self, handle: DeploymentHandle[Any], *, timeout_s: float) -> None:
        """`timeout_s`: how long to wait for a worker."""
        self._handle = handle
        self._timeout_s = timeout_s
        self._workers: dict[Address, RemoteWorker] = {}
        self._some = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def open(
        self, document: str, tokens: Tokens, last: bool, *, evidence: bool, running: bool
    ) -> AsyncIterator[Reading]:
        """See `WorkerClient.open`."""
        refusal: ServiceError = NotReady(NONE)
        async with AsyncExitStack() as stack:
            for address, worker in await self._idlest_first():
                opening = worker.open(document, tokens, last, evidence=evidence, running=running)
                try:
                    async with asyncio.timeout(self._timeout_s):
                        reading = await stack.enter_async_context(opening)
                except (Overloaded, ShuttingDown) as error:
                    refusal = error
                except (UnknownDocument, TimeoutError):
                    self._forget(address)
                else:
                    break
            else:
                raise refusal
            yield reading

    async def info(self) -> WorkerInfo:
        """See `WorkerClient.info`."""
        for address, worker in await self._idlest_first():
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await worker.info()
            except (UnknownDocument, TimeoutError):
                self._forget(address)
        raise NotReady(NONE)

    async def _idlest_first(self) -> list[tuple[Address, RemoteWorker]]:
        """By the documents that this gateway has there. Raises NotReady if none comes in time."""
        if self._looking is None:
            self._looking = asyncio.create_task(self._look(), name="look")
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._some.wait()
        except TimeoutError:
            raise NotReady(NONE) from None
        workers = list(self._workers.items())
        random.shuffle(workers)
        return sorted(workers, key=lambda each: each[1].documents)

    async def _look(self) -> None:
        """See who is there, again and again."""
        while True:
            try:
                self._know(await self._addresses())
            except Exception:
                logger.warning("looking for workers failed", exc_info=True)
            await asyncio.sleep(LOOK_S)

    async def _addresses(self) -> list[Address]:
        try:
            told = await self._handle.broadcast("address").results_async(
                timeout_s=self._timeout_s, return_exceptions=True
            )
        except DeploymentUnavailableError:
            return []
        return [Address(*each) for each in told if not isinstance(each, BaseException)]

    def _know(self, addresses: Iterable[Address]) -> None:
        there = set(addresses)
        for address in self._workers.keys() - there:
            self._forget(address)
        for address in there - self._workers.keys():
            self._workers[address] = RemoteWorker(address)
            self._some.set()

    def _forget(self, address: Address) -> None:
        """Give it no new documents."""
        worker = self._workers.pop(address, None)
        if worker:
            worker.retire()
        if not self._workers:
            self._some.clear()
