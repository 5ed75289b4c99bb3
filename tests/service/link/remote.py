"""A worker behind a socket of this machine, and a gateway's end of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, Self

import numpy as np

from gma.service.engine.opening import Opening
from gma.service.engine.progress import Progress, RowShares
from gma.service.link.client import OpenDocument, WorkerClient
from gma.service.link.remote import RemoteWorker, WorkerServer
from tests.service.asgi import PATIENCE_S, LocalWorkers, Service

IDS = np.arange(40, dtype=np.int32)


class Remote(Service):
    """A worker and its server, and a connection to it."""

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self.local = LocalWorkers(self.worker)
        self.server = WorkerServer(self.worker.engine, self.worker.info)
        self.address = await self.server.start("127.0.0.1")
        self.remote = RemoteWorker(self.address)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.runner.go.set()
        self.remote.retire()
        await self.server.stop()
        await super().__aexit__()

    @asynccontextmanager
    async def open(
        self, *, last: bool = True, at: WorkerClient | RemoteWorker | None = None, **changes: Any
    ) -> AsyncIterator[OpenDocument]:
        """A document of 40 tokens, by default over the connection."""
        opening = Opening("name", IDS, last, evidence=True, running=True)
        with closing(await (at or self.remote).open(opening._replace(**changes))) as document:
            yield document


async def to_end(document: OpenDocument) -> Progress:
    """The last progress of a document, with the shares of all."""
    shares: list[RowShares] = []
    async for progress in document:
        if progress.shares:
            shares.append(progress.shares)
        if progress.done:
            joined = RowShares.joined(shares)
            assert progress.tokens == joined.tokens.sum()
            return progress._replace(shares=joined)
    raise AssertionError("no end")


def run(checkpoint: Path, test: Callable[[Remote], Awaitable[None]], **settings: Any) -> None:
    """Run a test that needs one worker."""

    async def within() -> None:
        async with asyncio.timeout(PATIENCE_S), Remote(checkpoint, **settings) as service:
            await test(service)

    asyncio.run(within())
