"""A document's client that leaves before its answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.service.answers import JSON, NDJSON, PATH, PLAIN
from tests.service.asgi import LABELS, TEXT, Exchange, Service

pytestmark = pytest.mark.anyio


class TestClientGone:
    """With one slot and little waiting room, a document needs the slot of the one before."""

    @pytest.fixture
    async def service(self, checkpoint: Path) -> AsyncIterator[Service]:
        limits = {"slots": 1, "max_waiting_documents": 1, "inbox_tokens": 8}
        async with Service(checkpoint, **limits) as service:
            yield service

    async def check(self, service: Service) -> None:
        assert await service.metric("gma_documents_in_flight") == 0
        assert await service.metric("gma_bytes_in_flight") == 0
        assert (await service.classify(TEXT))["label"] in LABELS
        assert await service.metric("gma_slots_in_use") == 0

    @pytest.mark.parametrize("headers", [PLAIN, NDJSON, JSON])
    async def test_before_the_first_byte(self, service: Service, headers: dict[str, str]) -> None:
        async with Exchange(service.app, PATH, headers) as exchange:
            exchange.leave()
            await exchange.finished()
            assert not exchange.answered
        await self.check(service)

    @pytest.mark.parametrize("headers", [PLAIN, NDJSON])
    async def test_in_mid_upload(self, service: Service, headers: dict[str, str]) -> None:
        async with Exchange(service.app, PATH, headers) as exchange:
            exchange.send(TEXT.encode()[:200])
            await service.runner.step_begun()
            exchange.leave()
            await exchange.finished()
        await self.check(service)

    @pytest.mark.parametrize("headers", [PLAIN, NDJSON])
    async def test_in_mid_compute(self, service: Service, headers: dict[str, str]) -> None:
        async with Exchange(service.app, PATH, headers) as exchange:
            service.runner.go.clear()
            exchange.send(TEXT.encode() * 100, last=True)
            await service.runner.step_begun()
            exchange.leave()
            await exchange.finished()
            service.runner.go.set()
        await self.check(service)

    async def test_while_waiting_for_a_slot(self, service: Service) -> None:
        async with Exchange(service.app, PATH, PLAIN) as resident:
            resident.send(TEXT.encode())
            await service.runner.step_begun()
            async with Exchange(service.app, PATH, PLAIN) as exchange:
                exchange.send(TEXT.encode(), last=True)
                await service.until("gma_documents_waiting", 1)
                exchange.leave()
                await exchange.finished()
            await service.until("gma_documents_waiting", 0)
            resident.send(b"", last=True)
            assert (await resident.head())[0] == 200
            await resident.finished()
        await self.check(service)

    async def test_by_cancellation(self, service: Service) -> None:
        """How a server in front may tell it."""
        async with Exchange(service.app, PATH, PLAIN) as exchange:
            exchange.send(TEXT.encode())
            await service.runner.step_begun()
        await self.check(service)
