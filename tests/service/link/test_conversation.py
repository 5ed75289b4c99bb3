"""A document's life across processes is one call."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import numpy as np
import pytest

from gma.service.engine.progress import RowShares
from gma.service.errors import Overloaded, UnknownDocument, VersionMismatch
from gma.service.link import messages, remote
from gma.service.link.remote import Address, RemoteWorker
from tests.service.link.remote import IDS, Remote, run, to_end


def test_says_what_the_worker_says(checkpoint: Path) -> None:
    async def test(service: Remote) -> None:
        async with service.open() as document:
            there = await to_end(document)
        async with service.open(at=service.local) as document:
            here = await to_end(document)
        assert (there.tokens, there.chunks) == (here.tokens, here.chunks) == (len(IDS), 5)
        np.testing.assert_array_equal(there.logits, here.logits)
        assert isinstance(there.shares, RowShares)
        assert isinstance(here.shares, RowShares)
        for mine, given in zip(there.shares, here.shares, strict=True):
            np.testing.assert_array_equal(mine, given)
        assert await service.remote.info() == await service.worker.info()

    run(checkpoint, test)


def test_a_whole_document_that_waits_is_taken_all_the_same(checkpoint: Path) -> None:
    """Its worker says so, though there is no progress yet."""

    async def test(service: Remote) -> None:
        service.runner.go.clear()
        async with service.open() as document:
            await service.runner.step_begun()
            service.runner.go.set()
            assert (await to_end(document)).tokens == len(IDS)

    run(checkpoint, test)


def test_without_evidence_no_shares_are_sent(checkpoint: Path) -> None:
    async def test(service: Remote) -> None:
        async with service.open(evidence=False) as document:
            assert [progress.shares async for progress in document][-1] is None

    run(checkpoint, test)


def test_takes_a_document_in_pieces_in_their_order(checkpoint: Path) -> None:
    async def test(service: Remote) -> None:
        async with service.open() as document:
            whole = await to_end(document)
        async with service.open(tokens=IDS[:7], last=False, running=False) as document:
            for token in range(7, 30):
                await document.feed(IDS[token : token + 1], False)
            await document.feed(IDS[30:], True)
            np.testing.assert_allclose((await to_end(document)).logits, whole.logits, rtol=1e-5)

    run(checkpoint, test)


def test_who_sends_more_than_is_read_waits(checkpoint: Path) -> None:
    """Until the worker reads on, however much there is: nothing is kept without a bound."""

    async def test(service: Remote) -> None:
        service.runner.go.clear()
        async with service.open(last=False) as document:
            piece = np.zeros(2**18, np.int32)
            sent = 0

            async def send() -> None:
                nonlocal sent
                for _ in range(64):
                    await document.feed(piece, False)
                    sent += 1

            sending = asyncio.create_task(send())
            await service.runner.step_begun()
            before = -1
            while before != sent:  # as much as sockets and the call's window take
                before = sent
                await asyncio.wait({sending}, timeout=0.5)
            assert not sending.done()
            assert sent < 32
            sending.cancel()

    run(checkpoint, test, inbox_tokens=64)


def test_tells_that_it_is_full(checkpoint: Path) -> None:
    async def test(service: Remote) -> None:
        service.runner.go.clear()
        async with service.open():
            with pytest.raises(Overloaded, match="documents are waiting"):
                async with service.open():
                    pass

    run(checkpoint, test, slots=1, max_waiting_documents=0)


def test_a_document_that_is_left_is_closed(checkpoint: Path) -> None:
    async def test(service: Remote) -> None:
        async with service.open(last=False):
            assert await service.metric("gma_slots_in_use") == 1
        await service.until("gma_slots_in_use", 0)
        await service.server.drain()

    run(checkpoint, test)


def test_tokens_that_are_none_end_the_document(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(service: Remote) -> None:
        async with service.open(last=False) as document:
            await document.feed(np.array([10_000], np.int32), False)
            with pytest.raises(UnknownDocument):
                await to_end(document)
        await service.until("gma_slots_in_use", 0)

    run(checkpoint, test)
    assert "a message for name can't be read" in caplog.text


@pytest.mark.parametrize("token", ["", "wrong"])
def test_reads_nothing_for_who_has_not_its_token(checkpoint: Path, token: str) -> None:
    async def test(service: Remote) -> None:
        stranger = RemoteWorker(Address(service.address.target, token))
        for asked in (stranger.info(), service.open(at=stranger).__aenter__()):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await asked
            assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert await service.metric("gma_slots_in_use") == 0
        stranger.retire()

    run(checkpoint, test)


def test_is_told_to_be_lost_in_mid_document(checkpoint: Path) -> None:
    async def test(service: Remote) -> None:
        async with service.open(last=False) as document:
            await service.server.stop()
            with pytest.raises(UnknownDocument, match="is gone: send the document again"):
                await to_end(document)
            with pytest.raises(UnknownDocument, match="is gone"):
                await document.feed(IDS, True)

    run(checkpoint, test)


class Cable:
    """Between a gateway and a worker: it can be cut, and then nothing is heard of either side."""

    def __init__(self, address: Address) -> None:
        self._to = address
        self._whole = asyncio.Event()
        self._whole.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> RemoteWorker:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1")
        port = self._server.sockets[0].getsockname()[1]
        self._worker = RemoteWorker(Address(f"127.0.0.1:{port}", self._to.token))
        return self._worker

    async def __aexit__(self, *_: object) -> None:
        self._worker.retire()
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        self._whole.clear()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._to.target.partition(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        for a, b in ((reader, far_writer), (far_reader, writer)):
            self._tasks.add(asyncio.create_task(self._carry(a, b)))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(2**16):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


@pytest.mark.parametrize("feeding", [False, True])
def test_a_machine_that_is_gone_without_a_word_is_noticed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, feeding: bool
) -> None:
    """Whether tokens wait to be sent, or the document only waits for more."""
    monkeypatch.setattr(remote, "ASK_MS", 200)

    async def test(service: Remote) -> None:
        cable = Cable(service.address)
        async with cable as worker, service.open(last=False, at=worker) as document:

            async def feed() -> None:
                while True:
                    await document.feed(np.zeros(2**18, np.int32), False)

            cable.cut()
            sending = asyncio.create_task(feed()) if feeding else None
            with pytest.raises(UnknownDocument, match="is gone: send the document again"):
                await to_end(document)
            if sending:
                with pytest.raises(UnknownDocument, match="is gone"):
                    await sending

    run(checkpoint, test)


def test_one_that_has_nothing_to_say_is_not_taken_for_gone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is asked; gRPC does so once a second at most."""
    monkeypatch.setattr(remote, "ASK_MS", 200)

    async def test(service: Remote) -> None:
        async with service.open(last=False) as document:
            ending = asyncio.create_task(to_end(document))
            done, _ = await asyncio.wait({ending}, timeout=4)
            assert not done
            await document.feed(IDS, True)
            assert (await ending).tokens == 2 * len(IDS)

    run(checkpoint, test)


def test_is_drained_once_its_documents_are_read(checkpoint: Path) -> None:
    async def test(service: Remote) -> None:
        async with service.open(last=False) as document:
            draining = asyncio.create_task(service.server.drain())
            async with service.open() as other:
                await to_end(other)
            assert not draining.done()
            await document.feed(IDS, True)
            assert (await to_end(document)).tokens == 2 * len(IDS)
        await draining

    run(checkpoint, test)


class TestReleasesThatDiffer:
    """Each side says so, and nothing is read."""

    def test_a_gateway_of_another(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def test(service: Remote) -> None:
            for codec in (messages.OPENING, messages.INFO):
                encode = codec.encode
                monkeypatch.setattr(codec, "encode", lambda x, e=encode: b"\x63" + e(x)[1:])
            with pytest.raises(VersionMismatch, match="of version 99, this one reads"):
                async with service.open():
                    pass
            with pytest.raises(VersionMismatch, match="of version 99, this one reads"):
                await service.remote.info()
            assert await service.metric("gma_slots_in_use") == 0

        run(checkpoint, test)
        assert "gateway and worker are of different releases" in caplog.text

    def test_a_worker_of_another(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        async def test(service: Remote) -> None:
            monkeypatch.setattr("gma.service.link.remote.HELLO", b"\x07")
            with pytest.raises(VersionMismatch, match="of version 7, this one reads"):
                async with service.open(last=False):
                    pass
            await service.until("gma_slots_in_use", 0)

        run(checkpoint, test)


def test_no_proxy_stands_between(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.delenv("no_proxy", raising=False)

    async def test(service: Remote) -> None:
        assert (await service.remote.info())["device"] == "cpu"

    run(checkpoint, test)
