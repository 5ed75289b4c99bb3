from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gma import Client
from gma.service.client import attempts
from gma.service.client.loop import Loop
from tests.service.asgi import Service
from tests.service.client.served import Scripted, served


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "PAUSE_S", 0)


@pytest.fixture(scope="module")
def running(checkpoint: Path) -> Iterator[tuple[Service, str]]:
    """The service, and where it listens."""
    loop = Loop()
    limits = {"max_document_bytes": 2**20, "max_bytes_in_flight": 2**22}
    service = Service(checkpoint, rows=4, chunk_tokens=256, **limits)
    loop.call(service.__aenter__())
    with served(service.app, loop) as url:
        yield service, url
    loop.call(service.__aexit__())
    loop.close()


@pytest.fixture
def url(running: tuple[Service, str]) -> str:
    return running[1]


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, retries=0) as client:
        yield client


@pytest.fixture
def scripted() -> Iterator[Callable[[Scripted], Client]]:
    """Clients of applications that do what they are told."""
    with ExitStack() as stack:

        def begin(application: Scripted) -> Client:
            url = stack.enter_context(served(application))
            return stack.enter_context(Client(url, "secret"))

        yield begin
