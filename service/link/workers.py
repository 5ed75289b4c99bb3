"""The workers in other processes: which there are, and which of them is to read a document."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeAlias, TypeVar

from gma.service.engine.opening import Opening
from gma.service.errors import (
    NotReady,
    Overloaded,
    ServiceError,
    ShuttingDown,
    UnknownDocument,
    VersionMismatch,
)
from gma.service.link.client import WorkerInfo
from gma.service.link.remote import Address, RemoteDocument, RemoteWorker

logger = logging.getLogger(__name__)

T = TypeVar("T")

Look: TypeAlias = Callable[[], Awaitable[list[Address | None]]]
"""Tells where workers are now; None for one that does not say."""

LOOK_S = 1.0
"""How often a gateway looks who is there."""

FORGOTTEN_S = 3 * LOOK_S
"""After so long no gateway gives new documents to a worker that is to go."""

ATTEMPT_S = 1.0
"""How long a worker has to take a document before another is asked, which may be known only then.
Twice as long once all have been asked, and so on: they may be slow, and not dead."""


class RemoteWorkers:
    """Gives each document to the idlest worker that takes it: a `WorkerClient`.

    A worker that is to go gets no new documents; those that it has go on.
    """

    def __init__(self, look: Look, *, timeout_s: float) -> None:
        """`timeout_s`: how long to wait for a worker, in all."""
        self._look = look
        self._timeout_s = timeout_s
        self._workers: dict[Address, RemoteWorker] = {}
        self._some = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._retired = False

    @property
    def count(self) -> int:
        """See `WorkerClient.count`."""
        return len(self._workers)

    async def open(self, opening: Opening) -> RemoteDocument:
        """See `WorkerClient.open`."""
        return await self._asked(lambda worker: worker.open(opening))

    async def info(self) -> WorkerInfo:
        """See `WorkerClient.info`."""
        return await self._asked(RemoteWorker.info)

    def retire(self) -> None:
        """Look for them no longer than until they are gone: no new documents will come."""
        self._retired = True

    async def _asked(self, question: Callable[[RemoteWorker], Awaitable[T]]) -> T:
        """What the idlest worker answers that does not refuse.

        Those that are lost may be there again: they are asked once more when they are. Raises
        NotReady if there is no answer in time.
        """
        attempt_s = ATTEMPT_S
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    refusal: ServiceError | None = None
                    for address, worker in await self._idlest_first():
                        try:
                            return await _attempt(worker, question, attempt_s)
                        except (Overloaded, ShuttingDown, VersionMismatch) as error:
                            refusal = error
                        except UnknownDocument:
                            self._forget(address)
                        except TimeoutError:
                            logger.warning("%s did not answer for %g s", address.target, attempt_s)
                    if refusal:
                        raise refusal
                    attempt_s *= 2
        except TimeoutError:
            raise NotReady("no worker is ready: try again when one has started") from None

    async def _idlest_first(self) -> list[tuple[Address, RemoteWorker]]:
        """By the documents that this gateway has there; whoever is silent last. Waits until there
        is one."""
        if self._looking is None:
            self._looking = asyncio.create_task(self._keep_looking(), name="look")
        await self._some.wait()
        workers = list(self._workers.items())
        random.shuffle(workers)
        return sorted(workers, key=lambda each: (each[1].silent, each[1].documents))

    async def _keep_looking(self) -> None:
        while self._workers or not self._retired:
            try:
                self._know(await self._look())
            except Exception:
                logger.warning("looking for workers failed", exc_info=True)
            await asyncio.sleep(LOOK_S)

    def _know(self, told: list[Address | None]) -> None:
        there = set(filter(None, told))
        # One that does not say where it is may be any of those that are known, and only be busy.
        for address in self._workers.keys() - there if None not in told else ():
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


async def _attempt(
    worker: RemoteWorker, question: Callable[[RemoteWorker], Awaitable[T]], limit_s: float
) -> T:
    """What the worker answers. Raises TimeoutError if it says nothing within `limit_s`."""
    try:
        async with asyncio.timeout(limit_s):
            answer = await question(worker)
    except TimeoutError:
        worker.silent = True
        raise
    worker.silent = False
    return answer
