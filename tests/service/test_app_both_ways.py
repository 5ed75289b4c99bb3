"""The whole service with a bidirectional model, over a socket."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from gma.model import weights
from gma.model.reading import read
from gma.service.app import local
from gma.service.settings import Settings
from tests.service.answers import logits
from tests.service.asgi import LABELS, PATIENCE_S, TEXT, save_checkpoint
from tests.service.running import PLAIN, Connection, Running, free_port

BODY = (TEXT * 4).encode()


async def upload(port: int) -> dict[str, Any]:
    """The last event of a document that comes in pieces."""
    async with Connection.open(port, "application/x-ndjson") as connection:
        for start in range(0, len(BODY), 100):
            await connection.send(BODY[start : start + 100])
        await connection.send(b"", last=True)
        while (event := await connection.event())["event"] == "progress":
            assert "label" not in event
        return event


@pytest.mark.slow
def test_reads_whole_documents_and_refuses_longer_ones(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path, causal=False, form="forgetting")
    loaded = weights.load(checkpoint)
    tokens = torch.from_numpy(loaded.tokenizer.encode(BODY))
    (whole,) = read(loaded.classifier, [tokens])
    settings = Settings.load(
        checkpoint=checkpoint,
        port=free_port(),
        gateways=2,
        rows=4,
        chunk_tokens=8,
        threads=1,
        page_memory=4 * 16 * (len(tokens) + 8),
    )
    with local.running(settings):
        service = Running(settings)
        found = asyncio.run(upload(settings.port))
        assert found["event"] == "result"
        expected = dict(zip(LABELS, whole.logits.tolist(), strict=True))
        assert logits(found) == pytest.approx(expected, abs=1e-5)
        refused = httpx.post(
            f"{service.url}/v1/documents", content=2 * BODY, headers=PLAIN, timeout=PATIENCE_S
        )
        assert (refused.status_code, refused.json()["error_type"]) == (413, "TooLong")
        assert httpx.get(f"{service.url}/info", timeout=PATIENCE_S).json()["causal"] is False
        service.settle(gma_slots_in_use=0, gma_pages_in_use=0, gma_documents_in_flight=0)
