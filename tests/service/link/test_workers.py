"""Which of several workers reads a document."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gma.service.errors import NotReady, Overloaded, VersionMismatch
from gma.service.link import workers as link
from gma.service.link.remote import Address, WorkerServer
from gma.service.link.workers import RemoteWorkers
from tests.service.asgi import PATIENCE_S
from tests.service.link.remote import IDS, Remote, to_end

HUNG = "the token of a worker that hangs"


class Sight:
    """What a gateway sees when it looks for workers."""

    def __init__(self, *there: Address | None) -> None:
        self.there = list(there)
        self._looks = asyncio.Condition()

    async def looked_at(self) -> None:
        """Wait until what is there now has been heard of: a look after the next begins."""
        async with self._looks:
            for _ in range(2):
                await self._looks.wait()

    async def look(self) -> list[Address | None]:
        async with self._looks:
            self._looks.notify_all()
        return list(self.there)


@pytest.fixture(autouse=True)
def _looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "LOOK_S", 0.001)


@asynccontextmanager
async def several(
    checkpoint: Path, count: int, *, timeout_s: float = 1, **settings: Any
) -> AsyncIterator[tuple[list[Remote], RemoteWorkers, Sight]]:
    """So many workers, what a gateway makes of them, and what it sees of them."""
    async with asyncio.timeout(PATIENCE_S), AsyncExitStack() as stack:
        found = [
            await stack.enter_async_context(Remote(checkpoint, **settings)) for _ in range(count)
        ]
        sight = Sight(*(each.address for each in found))
        yield found, RemoteWorkers(sight.look, timeout_s=timeout_s), sight


def documents(found: list[Remote]) -> list[int]:
    return [each.server.documents for each in found]


@asynccontextmanager
async def hung() -> AsyncIterator[Address]:
    """A worker that takes connections and never says a word."""
    writers = []

    async def hang(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    server = await asyncio.start_server(hang, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    try:
        yield Address(f"127.0.0.1:{port}", HUNG)
    finally:
        server.close()
        for writer in writers:
            writer.close()


def test_each_document_goes_to_the_idlest(checkpoint: Path) -> None:
    async def test() -> None:
        async with several(checkpoint, 3) as (found, seen, _), AsyncExitStack() as stack:
            for index in range(6):
                await stack.enter_async_context(found[0].open(last=False, at=seen))
                assert sum(documents(found)) == index + 1
            assert documents(found) == [2, 2, 2]

    asyncio.run(test())


def test_full_ones_are_passed_over(checkpoint: Path) -> None:
    async def test() -> None:
        full = {"slots": 1, "max_waiting_documents": 0}
        async with several(checkpoint, 2, **full) as (found, seen, _), AsyncExitStack() as stack:
            # Another gateway's, of which this one does not know.
            await stack.enter_async_context(found[0].open(last=False))
            await stack.enter_async_context(found[1].open(last=False, at=seen))
            assert documents(found) == [1, 1]
            with pytest.raises(Overloaded):
                await stack.enter_async_context(found[1].open(last=False, at=seen))

    asyncio.run(test())


def test_lost_ones_are_passed_over(checkpoint: Path) -> None:
    async def test() -> None:
        async with several(checkpoint, 2) as (found, seen, sight):
            await seen.info()
            await found[0].server.stop()
            for _ in range(4):
                async with found[1].open(at=seen) as document:
                    await to_end(document)
            assert await seen.info() == await found[1].worker.info()
            await found[1].server.stop()
            with pytest.raises(NotReady):
                await seen.info()
            assert sight.there

    asyncio.run(test())


def test_hung_ones_do_not_use_up_a_documents_time(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One at most waits for it, and no longer than an attempt takes: then it is asked last."""
    monkeypatch.setattr(link, "ATTEMPT_S", 0.2)

    def hung_first(workers: list[tuple[Address, object]]) -> None:
        workers.sort(key=lambda each: each[0].token != HUNG)

    monkeypatch.setattr("random.shuffle", hung_first)

    async def test() -> None:
        async with (
            several(checkpoint, 1, timeout_s=PATIENCE_S) as (found, seen, sight),
            hung() as address,
        ):
            sight.there.append(address)
            await seen.info()
            await sight.looked_at()
            for _ in range(4):
                async with found[0].open(at=seen) as document:
                    await to_end(document)
            assert seen.count == 2
            assert caplog.text.count("did not answer") == 1

    asyncio.run(test())


def test_who_waits_for_a_hung_one_hears_of_another(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes, or comes back, while the only one that was known is asked."""
    monkeypatch.setattr(link, "ATTEMPT_S", 0.05)

    async def test() -> None:
        async with (
            several(checkpoint, 1, timeout_s=PATIENCE_S) as (found, seen, sight),
            hung() as address,
        ):
            there, sight.there = sight.there, [address]
            asked = asyncio.create_task(seen.info())
            await sight.looked_at()
            assert not asked.done()
            sight.there += there
            assert await asked == await found[0].worker.info()

    asyncio.run(test())


def test_slow_ones_are_given_longer(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If all of them are: what is slower than a first attempt answers a later one."""
    monkeypatch.setattr(link, "ATTEMPT_S", 0.05)
    attempts = 0

    async def slow(self: WorkerServer, context: Any) -> None:
        nonlocal attempts
        attempts += 1
        await asyncio.sleep(0.3)

    async def test() -> None:
        async with several(checkpoint, 2, timeout_s=PATIENCE_S) as (found, seen, _):
            await seen.info()
            monkeypatch.setattr(WorkerServer, "_check", slow)
            async with found[0].open(at=seen) as document:
                await to_end(document)
            assert attempts > 2

    asyncio.run(test())


def test_a_client_that_leaves_says_nothing_of_its_worker(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with several(checkpoint, 2) as (found, seen, _), AsyncExitStack() as stack:
            await seen.info()
            asked = asyncio.Event()

            async def hold(self: WorkerServer, context: Any) -> None:
                asked.set()
                await asyncio.Event().wait()

            with monkeypatch.context() as patch:
                patch.setattr(WorkerServer, "_check", hold)
                asking = asyncio.create_task(found[0].open(at=seen).__aenter__())
                await asked.wait()
                asking.cancel()
                await asyncio.wait({asking})
            for _ in range(2):
                await stack.enter_async_context(found[0].open(last=False, at=seen))
            assert documents(found) == [1, 1]

    asyncio.run(test())


def test_ones_of_another_release_are_passed_over(checkpoint: Path) -> None:
    async def test() -> None:
        async with several(checkpoint, 2) as (found, seen, _):

            def other(*_: object) -> Any:
                raise VersionMismatch("of another release")

            found[0].worker.engine.open = other  # type: ignore[assignment, method-assign]
            for _ in range(3):
                async with found[1].open(at=seen) as document:
                    await to_end(document)
            found[1].worker.engine.open = other  # type: ignore[assignment, method-assign]
            with pytest.raises(VersionMismatch, match="of another release"):
                async with found[1].open(at=seen):
                    pass

    asyncio.run(test())


def test_one_that_is_to_go_keeps_what_it_has(checkpoint: Path) -> None:
    async def test() -> None:
        async with several(checkpoint, 2) as (found, seen, sight), AsyncExitStack() as stack:
            kept = [
                await stack.enter_async_context(found[0].open(last=False, at=seen))
                for _ in range(2)
            ]
            sight.there = [found[1].address]
            await sight.looked_at()
            assert seen.count == 1
            for _ in range(3):
                await stack.enter_async_context(found[0].open(last=False, at=seen))
            assert documents(found) == [1, 4]
            for document in kept:
                await document.feed(IDS, True)
                assert (await to_end(document)).done

    asyncio.run(test())


def test_one_that_does_not_answer_is_not_forgotten(checkpoint: Path) -> None:
    async def test() -> None:
        async with several(checkpoint, 2) as (found, seen, sight), AsyncExitStack() as stack:
            await seen.info()
            sight.there = [found[1].address, None]
            await sight.looked_at()
            for _ in range(4):
                await stack.enter_async_context(found[0].open(last=False, at=seen))
            assert documents(found) == [2, 2]

    asyncio.run(test())


def test_one_that_is_lost_for_a_moment_is_asked_again(checkpoint: Path) -> None:
    async def test() -> None:
        async with several(checkpoint, 1) as (found, seen, _):
            await seen.info()
            seen._workers[found[0].address].retire()
            async with found[0].open(at=seen) as document:
                await to_end(document)

    asyncio.run(test())


def test_one_is_waited_for(checkpoint: Path) -> None:
    async def test() -> None:
        async with several(checkpoint, 1) as (found, seen, sight):
            there, sight.there = sight.there, []
            with pytest.raises(NotReady, match="try again"):
                async with found[0].open(at=seen):
                    pass
            assert seen.count == 0
            waiting = asyncio.create_task(seen.info())
            await asyncio.sleep(0)
            sight.there = there
            assert await waiting == await found[0].worker.info()
            assert seen.count == 1

    asyncio.run(test())
