from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.export.conftest import library as library
from tests.service.asgi import Service, save_checkpoint


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's, with random weights."""
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's export, for chunks of 16 tokens."""
    pytest.importorskip("onnxruntime")
    from gma.export.artifact import export

    return export(checkpoint, tmp_path_factory.mktemp("exported") / "tiny", chunk=16).folder


@pytest.fixture
async def service(checkpoint: Path) -> AsyncIterator[Service]:
    async with Service(checkpoint) as service:
        yield service


@pytest.fixture(scope="module")
async def begun(checkpoint: Path) -> AsyncIterator[Service]:
    async with Service(checkpoint) as service:
        yield service


@pytest.fixture
async def lasting(begun: Service) -> AsyncIterator[Service]:
    """One for all tests of a module that leave nothing behind, for most is the start."""
    yield begun
    begun.runner.release()
    await begun.until("gma_documents_in_flight", 0)
    await begun.until("gma_slots_in_use", 0)
    begun.runner.forget_steps()
