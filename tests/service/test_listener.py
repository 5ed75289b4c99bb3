"""HTTP servers that share a port."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from gma.service.http.listener import Listener
from gma.service.http.port import bound, claimed
from tests.service.asgi import PATIENCE_S
from tests.service.running import free_port, needs_ipv6


class Application:
    """Answers with its name, once it may."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.go = asyncio.Event()
        self.go.set()
        self.asked = asyncio.Event()
        self.life: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for stage in ("startup", "shutdown"):
                await receive()
                self.life.append(stage)
                await send({"type": f"lifespan.{stage}.complete"})
            return
        self.asked.set()
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self._name.encode()})


def run(test: Callable[[int], Awaitable[None]]) -> None:
    async def within() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await test(free_port())

    asyncio.run(within())


async def ask(port: int, host: str = "127.0.0.1") -> str:
    """On a connection of its own."""
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        return (await client.get(f"http://{host}:{port}/")).text


def test_two_share_the_connections() -> None:
    async def test(port: int) -> None:
        listeners = [await Listener.open(Application(x), "127.0.0.1", port) for x in "ab"]
        while {await ask(port) for _ in range(10)} != {"a", "b"}:
            pass
        await listeners[0].close()
        assert {await ask(port) for _ in range(20)} == {"b"}
        await listeners[1].close()
        with pytest.raises(httpx.ConnectError):
            await ask(port)

    run(test)


@needs_ipv6
@pytest.mark.parametrize(("host", "reached"), [("::1", ["[::1]"]), ("::", ["[::1]", "127.0.0.1"])])
def test_of_ipv6(host: str, reached: list[str]) -> None:
    async def test(port: int) -> None:
        with claimed(host, port):
            listener = await Listener.open(Application("six"), host, port)
            for each in reached:
                assert await ask(port, each) == "six"
            await listener.close()

    run(test)


def test_closes_once_the_answer_has_been_sent() -> None:
    async def test(port: int) -> None:
        application = Application("late")
        application.go.clear()
        listener = await Listener.open(application, "127.0.0.1", port)
        asking = asyncio.create_task(ask(port))
        await application.asked.wait()
        closing = asyncio.create_task(listener.close())
        done, _ = await asyncio.wait((asking, closing), timeout=0.3)
        assert not done
        application.go.set()
        assert await asking == "late"
        await closing
        assert application.life == ["startup", "shutdown"]

    run(test)


def test_a_port_of_somebody_who_does_not_share() -> None:
    async def test(port: int) -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", port))
            other.listen()
            with pytest.raises(OSError, match="in use"):
                await Listener.open(Application("x"), "127.0.0.1", port)

    run(test)


def test_a_shared_port_is_taken_for_who_does_not_share() -> None:
    async def test(port: int) -> None:
        listener = await Listener.open(Application("x"), "127.0.0.1", port)
        with pytest.raises(OSError, match="in use"):
            bound("127.0.0.1", port, shared=False)
        await listener.close()
        bound("127.0.0.1", port, shared=False).close()

    run(test)


def test_an_application_that_does_not_start() -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no"})

    async def test(port: int) -> None:
        with pytest.raises(RuntimeError, match="did not start"):
            await Listener.open(failing, "127.0.0.1", port)

    run(test)
