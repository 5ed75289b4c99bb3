"""Workers that are replicas of a Ray Serve deployment: Serve says where they are, and documents go
to them directly, for each of Serve's calls takes longer than a short document's step."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from gma.service.errors import NotReady, Overloaded, ServiceError, ShuttingDown, UnknownDocument
from gma.service.gateway.contract import WorkerInfo
from gma.service.link.client import Reading, Tokens
from gma.service.link.remote import Address, RemoteWorker

logger = logging.getLogger(__name__)

T = TypeVar("T")

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
        async with AsyncExitStack() as stack:
            yield await self._asked(
                lambda worker: stack.enter_async_context(
                    worker.open(document, tokens, last, evidence=evidence, running=running)
                )
            )

    async def info(self) -> WorkerInfo:
        """See `WorkerClient.info`."""
        return await self._asked(RemoteWorker.info)

    async def _asked(self, question: Callable[[RemoteWorker], Awaitable[T]]) -> T:
        """What the idlest worker answers that does not refuse.

        Those that are lost may be there again: they are asked once more when they are. Raises
        NotReady if there is no answer in time.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    refusal: ServiceError | None = None
                    for address, worker in await self._idlest_first():
                        try:
                            return await question(worker)
                        except (Overloaded, ShuttingDown) as error:
                            refusal = error
                        except UnknownDocument:
                            self._forget(address)
                    if refusal:
                        raise refusal
        except TimeoutError:
            raise NotReady("no worker is ready: try again when one has started") from None

    async def _idlest_first(self) -> list[tuple[Address, RemoteWorker]]:
        """By the documents that this gateway has there. Waits until there is one."""
        if self._looking is None:
            self._looking = asyncio.create_task(self._look(), name="look")
        await self._some.wait()
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

    async def _addresses(self) -> list[Address | BaseException]:
        """What each replica answers."""
        try:
            told: list[Any] = await self._handle.broadcast("address").results_async(
                timeout_s=self._timeout_s, return_exceptions=True
            )
        except DeploymentUnavailableError:
            return []
        return [each if isinstance(each, BaseException) else Address(*each) for each in told]

    def _know(self, told: list[Address | BaseException]) -> None:
        there = {each for each in told if isinstance(each, Address)}
        # One that does not answer in time may be any of those that are known, and only be busy.
        for address in self._workers.keys() - there if len(there) == len(told) else ():
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
