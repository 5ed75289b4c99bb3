"""A worker in another process, as far as one process can show it: sockets, messages, errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.exceptions import DeploymentUnavailableError

from gma.service import errors
from gma.service.engine.document import Progress, Span
from gma.service.errors import (
    NotReady,
    Overloaded,
    ServiceError,
    UnknownDocument,
    WrongOffset,
)
from gma.service.link import messages, replicas
from gma.service.link.client import Reading, WorkerClient
from gma.service.link.remote import Address, RemoteWorker, WorkerServer
from gma.service.link.replicas import RayWorkers
from tests.service.asgi import PATIENCE_S, Service

IDS = np.arange(40, dtype=np.int32)


class Remote(Service):
    """A worker behind a socket of this machine, and a gateway's end of it."""

    async def __aenter__(self) -> Remote:
        await super().__aenter__()
        self.server = WorkerServer(self.worker)
        self.address = await self.server.start("127.0.0.1")
        self.remote = RemoteWorker(self.address)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.runner.go.set()
        self.remote.retire()
        await self.server.stop()
        await super().__aexit__()

    def open(self, name: str, last: bool = True, worker: WorkerClient | None = None) -> Any:
        opening = (worker or self.remote).open
        return opening(name, IDS, last, evidence=True, running=True)


async def to_end(reading: Reading) -> Progress:
    """All that is said of a document, put together."""
    spans: list[Span] = []
    async for progress in reading:
        spans += progress.spans
        if progress.done:
            assert progress.tokens == sum(span.tokens for span in spans)
            return progress
    raise AssertionError("no end")


def run(checkpoint: Path, test: Any, **settings: Any) -> None:
    async def within() -> None:
        async with asyncio.timeout(PATIENCE_S), Remote(checkpoint, **settings) as service:
            await test(service)

    asyncio.run(within())


class TestOneWorker:
    def test_says_what_the_worker_says(self, checkpoint: Path) -> None:
        async def test(service: Remote) -> None:
            async with service.open("far") as reading:
                there = await to_end(reading)
            async with service.open("near", worker=service.worker) as reading:
                here = await to_end(reading)
            assert (there.tokens, there.chunks) == (here.tokens, here.chunks) == (len(IDS), 5)
            np.testing.assert_array_equal(there.logits, here.logits)
            for mine, given_ in zip(there.spans, here.spans, strict=True):
                np.testing.assert_array_equal(mine.evidence, given_.evidence)
            assert await service.remote.info() == await service.worker.info()

        run(checkpoint, test)

    def test_takes_a_document_in_pieces_at_their_offsets(self, checkpoint: Path) -> None:
        async def test(service: Remote) -> None:
            async with service.open("whole") as reading:
                whole = await to_end(reading)
            async with service.remote.open(
                "cut", IDS[:7], False, evidence=True, running=False
            ) as reading:
                with pytest.raises(WrongOffset) as raised:
                    await reading.feed(6, IDS[6:], False)
                assert (raised.value.expected, raised.value.received) == (7, 6)
                await reading.feed(7, IDS[7:30], False)
                await reading.feed(30, IDS[30:], True)
                np.testing.assert_allclose((await to_end(reading)).logits, whole.logits, rtol=1e-5)

        run(checkpoint, test)

    def test_tells_that_it_is_full(self, checkpoint: Path) -> None:
        async def test(service: Remote) -> None:
            service.runner.go.clear()
            async with service.open("first"):
                with pytest.raises(Overloaded, match="documents are waiting"):
                    async with service.open("second"):
                        pass

        run(checkpoint, test, slots=1, max_waiting_documents=0)

    def test_a_document_that_is_left_is_closed(self, checkpoint: Path) -> None:
        async def test(service: Remote) -> None:
            async with service.open("left", last=False):
                assert await service.metric("gma_slots_in_use") == 1
            await service.until("gma_slots_in_use", 0)
            await service.server.drain()

        run(checkpoint, test)

    @pytest.mark.parametrize("token", ["", "wrong"])
    def test_reads_nothing_for_who_has_not_its_token(self, checkpoint: Path, token: str) -> None:
        async def test(service: Remote) -> None:
            stranger = RemoteWorker(Address(service.address.target, token))
            opening = service.open("x", worker=stranger)
            for asked in (stranger.info(), opening.__aenter__()):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await asked
                assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert await service.metric("gma_slots_in_use") == 0
            stranger.retire()

        run(checkpoint, test)

    def test_is_told_to_be_lost_in_mid_document(self, checkpoint: Path) -> None:
        async def test(service: Remote) -> None:
            async with service.open("lost", last=False) as reading:
                await service.server.stop()
                with pytest.raises(UnknownDocument, match="is gone: send the document again"):
                    await to_end(reading)
                with pytest.raises(UnknownDocument, match="is gone"):
                    await reading.feed(len(IDS), IDS, True)

        run(checkpoint, test)

    def test_is_drained_once_its_documents_are_read(self, checkpoint: Path) -> None:
        async def test(service: Remote) -> None:
            async with service.open("going", last=False) as reading:
                draining = asyncio.create_task(service.server.drain())
                async with service.open("later") as other:
                    await to_end(other)
                assert not draining.done()
                await reading.feed(len(IDS), IDS, True)
                assert (await to_end(reading)).tokens == 2 * len(IDS)
            await draining

        run(checkpoint, test)


class Handle:
    """A Serve deployment's handle whose replicas a test chooses."""

    def __init__(self, *there: Address | Exception) -> None:
        self.there: Iterable[Address | Exception] = there
        self._looks = asyncio.Condition()

    async def looked_at(self) -> None:
        """Wait until what is there now has been heard of: a look after the next begins."""
        async with self._looks:
            for _ in range(2):
                await self._looks.wait()

    def broadcast(self, method: str) -> Handle:
        assert method == "address"
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        async with self._looks:
            self._looks.notify_all()
        if not self.there:
            raise DeploymentUnavailableError(None)  # type: ignore[arg-type]
        return list(self.there)


@pytest.fixture(autouse=True)
def _looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "LOOK_S", 0.001)


@asynccontextmanager
async def workers(checkpoint: Path, count: int, **settings: Any) -> AsyncIterator[Any]:
    """So many, what a gateway sees of them, and the handle that tells of them."""
    async with asyncio.timeout(PATIENCE_S), AsyncExitStack() as stack:
        found = [
            await stack.enter_async_context(Remote(checkpoint, **settings)) for _ in range(count)
        ]
        handle: Any = Handle(*(each.address for each in found))
        yield found, RayWorkers(handle, timeout_s=1), handle


class TestMany:
    def test_each_document_goes_to_the_idlest(self, checkpoint: Path) -> None:
        async def test() -> None:
            async with workers(checkpoint, 3) as (found, seen, _), AsyncExitStack() as stack:
                for index in range(6):
                    await stack.enter_async_context(found[0].open(f"{index}", False, seen))
                    at = [sum(each.server._documents for each in found)]
                    assert at == [index + 1]
                assert [each.server._documents for each in found] == [2, 2, 2]

        asyncio.run(test())

    def test_full_ones_are_passed_over(self, checkpoint: Path) -> None:
        async def test() -> None:
            full = {"slots": 1, "max_waiting_documents": 0}
            async with (
                workers(checkpoint, 2, **full) as (found, seen, _),
                AsyncExitStack() as stack,
            ):
                # Another gateway's, of which this one does not know.
                await stack.enter_async_context(found[0].open("another's", False))
                await stack.enter_async_context(found[1].open("mine", False, seen))
                assert [each.server._documents for each in found] == [1, 1]
                with pytest.raises(Overloaded):
                    await stack.enter_async_context(found[1].open("too many", False, seen))

        asyncio.run(test())

    def test_lost_ones_are_passed_over(self, checkpoint: Path) -> None:
        async def test() -> None:
            async with workers(checkpoint, 2) as (found, seen, handle):
                await seen.info()
                await found[0].server.stop()
                for index in range(4):
                    async with found[1].open(f"{index}", True, seen) as reading:
                        await to_end(reading)
                assert await seen.info() == await found[1].worker.info()
                await found[1].server.stop()
                with pytest.raises(NotReady):
                    await seen.info()
                assert handle.there

        asyncio.run(test())

    def test_one_that_is_to_go_keeps_what_it_has(self, checkpoint: Path) -> None:
        async def test() -> None:
            async with workers(checkpoint, 2) as (found, seen, handle), AsyncExitStack() as stack:
                readings = [
                    await stack.enter_async_context(found[0].open(f"{index}", False, seen))
                    for index in range(2)
                ]
                handle.there = [found[1].address]
                await handle.looked_at()
                for index in range(3):
                    await stack.enter_async_context(found[0].open(f"new {index}", False, seen))
                assert [each.server._documents for each in found] == [1, 4]
                for reading in readings:
                    await reading.feed(len(IDS), IDS, True)
                    assert (await to_end(reading)).done

        asyncio.run(test())

    def test_one_that_does_not_answer_is_not_forgotten(self, checkpoint: Path) -> None:
        async def test() -> None:
            async with workers(checkpoint, 2) as (found, seen, handle), AsyncExitStack() as stack:
                await seen.info()
                handle.there = [found[1].address, TimeoutError("busy")]
                await handle.looked_at()
                for index in range(4):
                    await stack.enter_async_context(found[0].open(f"{index}", False, seen))
                assert [each.server._documents for each in found] == [2, 2]

        asyncio.run(test())

    def test_one_that_is_lost_for_a_moment_is_asked_again(self, checkpoint: Path) -> None:
        async def test() -> None:
            async with workers(checkpoint, 1) as (found, seen, _):
                await seen.info()
                seen._workers[found[0].address].retire()
                async with found[0].open("again", True, seen) as reading:
                    await to_end(reading)

        asyncio.run(test())

    def test_one_is_waited_for(self, checkpoint: Path) -> None:
        async def test() -> None:
            async with workers(checkpoint, 1) as (found, seen, handle):
                there, handle.there = handle.there, ()
                with pytest.raises(NotReady, match="try again"):
                    async with found[0].open("early", True, seen):
                        pass
                waiting = asyncio.create_task(seen.info())
                await asyncio.sleep(0)
                handle.there = there
                assert await waiting == await found[0].worker.info()

        asyncio.run(test())


def every_error() -> Iterator[ServiceError]:
    arguments = {
        "NotUtf8": (7,),
        "MethodNotAllowed": ("no", "GET"),
        "WrongOffset": (3, 4),
        "TooLarge": (5,),
    }
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, ServiceError):
            yield kind(*arguments.get(name, ("what is wrong: ü",)))


class TestMessages:
    @pytest.mark.parametrize("error", [*every_error()], ids=lambda error: type(error).__name__)
    def test_errors_arrive_as_they_were(self, error: ServiceError) -> None:
        arrived = messages.unpack_error(messages.pack_error(error))
        assert (type(arrived), arrived.args, str(arrived)) == (type(error), error.args, str(error))

    @pytest.mark.parametrize("name", ["SystemExit", "ClassVar", "__builtins__", "ServiceErr"])
    def test_nothing_else_is_an_error(self, name: str) -> None:
        with pytest.raises(ValueError, match="is not an error of the service"):
            messages.unpack_error(msgpack.packb((name, ["x"])))

    @given(
        labels=st.integers(1, 5),
        lengths=st.lists(st.integers(0, 2**31 - 1), max_size=4),
        seconds=st.floats(0, 1e6),
        tokens=st.integers(0, 2**62),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_progress_arrives_as_it_was(
        self, labels: int, lengths: list[int], seconds: float, tokens: int, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        spans = [
            Span(length, rng.normal(), rng.normal(size=labels).astype(np.float32))
            for length in lengths
        ]
        sent = Progress(tokens, 3, rng.normal(size=labels), spans, seconds, 0.5, 1.5, done=True)
        come = messages.unpack_progress(messages.pack_progress(sent))
        np.testing.assert_array_equal(come.logits, sent.logits)
        assert come.logits.dtype == np.float64
        for mine, given_ in zip(come.spans, spans, strict=True):
            assert (mine.tokens, mine.weight) == (given_.tokens, given_.weight)
            np.testing.assert_array_equal(mine.evidence, given_.evidence)
        rest = (tokens, 3, seconds, 0.5, 1.5, True)
        assert rest == (
            *(come.tokens, come.chunks, come.wait_s, come.queue_s, come.compute_s, come.done),
        )
