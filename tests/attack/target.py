"""A service that is attacked: a real gateway and a tiny model behind a real socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from gma.service.http.connection import Limits
from gma.service.http.keys import hash_of
from gma.service.http.listener import Listener
from tests.attack.client import Raw
from tests.attack.honest import HONEST, KEY
from tests.service.answers import same
from tests.service.asgi import PATIENCE_S, Service, save_checkpoint
from tests.service.running import free_port

T = TypeVar("T")


class Target:
    """A service, and whether it still does what it should."""

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop) -> None:
        self._service = service
        self._loop = loop
        self._listeners: dict[Limits, tuple[int, Listener]] = {}
        self.right = self.honest(self.port())

    def port(self, limits: Limits | None = None, connections: int | None = None) -> int:
        """Where it listens with these limits."""
        limits = limits or Limits()
        if limits not in self._listeners:
            port = free_port()
            opening = Listener.open(
                self._service.app, "127.0.0.1", port, limits=limits, connections=connections
            )
            self._listeners[limits] = port, self.do(opening)
        return self._listeners[limits][0]

    def honest(self, port: int) -> dict[str, Any]:
        """The answer to an honest document, on a connection of its own."""
        with Raw(port) as client:
            client.send(HONEST)
            reply = client.reply()
        assert reply, "the connection was closed"
        assert reply.status == 200, reply.body
        answer: dict[str, Any] = reply.json()
        return answer

    def check(self, port: int) -> None:
        """Whether honest documents are answered rightly, and nothing is held for others."""
        self.check_answer(port)
        self.holds(0)

    def check_answer(self, port: int) -> None:
        """Whether an honest document is answered rightly."""
        assert same(self.honest(port), self.right)

    def holds(self, number: int) -> None:
        """Return once so many documents are admitted."""
        self.do(self._holds(number))

    @contextmanager
    def held(self) -> Iterator[None]:
        """No document is read meanwhile."""
        self._service.runner.go.clear()
        try:
            yield
        finally:
            self._service.runner.go.set()

    def settle(self) -> None:
        """Return when the service has taken note of all that has arrived."""
        for _ in range(3):
            self.do(asyncio.sleep(0))

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of something that runs where the service does."""
        doing: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return doing.result(PATIENCE_S)

    async def close(self) -> None:
        await asyncio.gather(*(listener.close() for _, listener in self._listeners.values()))

    async def _holds(self, number: int) -> None:
        admission = self._service.gateway.admission
        async with asyncio.timeout(PATIENCE_S):
            while admission.documents != number:  # noqa: ASYNC110  # nothing tells of it
                await asyncio.sleep(0)
        assert number or not admission.bytes


@contextmanager
def target(folder: Path) -> Iterator[Target]:
    """A target in a thread of its own, with the event loop that the service's processes have.

    Its checkpoint and the file of its keys go into `folder`.
    """
    checkpoint, keys = save_checkpoint(folder / "checkpoint"), folder / "keys"
    keys.write_text(hash_of(KEY))
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def do(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result(PATIENCE_S)

    try:
        service = Service(checkpoint, api_keys_file=keys, rows=4, chunk_tokens=64)
        do(service.__aenter__())
        found = Target(service, loop)
        yield found
        do(found.close())
        do(service.__aexit__())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
