"""Replicas that answer at once, for what lies between them and whoever asks.

`Echo` gives back what it gets, by Serve's calls and by gRPC. `Caller`, in another process, calls it
and takes the time. `Web` answers HTTP through Serve's proxy and on a port of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc.aio
from ray import serve
from ray.serve.schema import LoggingConfig
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gma.service.http.listener import Listener

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

HOST = "127.0.0.1"
MESSAGE = bytes(2048)
"""It is as long as the tokens of a short document."""

SERVICE, UNARY, STREAM = "benchmarks.Echo", "unary", "stream"
HANDLE_CALL, HANDLE_STREAM = "Serve handle, call", "Serve handle, stream"
GRPC_CALL, GRPC_STREAM = "gRPC, call", "gRPC, stream"

Call = Callable[[], Awaitable[None]]


async def timed(call: Call, at_once: int, seconds: float) -> list[float]:
    """Seconds of each call. So many are in flight for so long: when one ends, the next begins."""
    taken: list[float] = []
    until = time.perf_counter() + seconds

    async def one_after_the_other() -> None:
        while (began := time.perf_counter()) < until:
            await call()
            taken.append(time.perf_counter() - began)

    await asyncio.gather(*(one_after_the_other() for _ in range(at_once)))
    return taken


def check(answer: object) -> None:
    """Raises ValueError if the answer is not the message."""
    if answer != MESSAGE:
        raise ValueError(f"the answer was {answer!r}")


async def grpc_server() -> tuple[grpc.aio.Server, str]:
    """Start a server that answers both kinds of call; return it and its address."""

    async def unary(message: bytes, _: Any) -> bytes:
        return message

    async def stream(messages: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
        async for message in messages:
            yield message

    handlers = {
        UNARY: grpc.unary_unary_rpc_method_handler(unary),
        STREAM: grpc.stream_stream_rpc_method_handler(stream),
    }
    server = grpc.aio.server()
    handler = grpc.method_handlers_generic_handler(SERVICE, handlers)
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    return server, f"{HOST}:{port}"


def grpc_calls(channel: grpc.aio.Channel) -> dict[str, Call]:
    """A unary call, and a stream that is opened, takes one message each way, and is closed."""
    unary = channel.unary_unary(f"/{SERVICE}/{UNARY}")
    stream = channel.stream_stream(f"/{SERVICE}/{STREAM}")

    async def call() -> None:
        check(await unary(MESSAGE))

    async def exchange() -> None:
        opened = stream()
        await opened.write(MESSAGE)
        check(await opened.read())
        await opened.done_writing()
        if await opened.read() is not grpc.aio.EOF:
            raise ValueError("the stream did not end")

    return {GRPC_CALL: call, GRPC_STREAM: exchange}


class Echo:
    """Gives back what it gets."""

    async def __init__(self) -> None:  # type: ignore[misc]  # Serve awaits it
        self._server, self._address = await grpc_server()

    async def address(self) -> str:
        """Where it answers by gRPC."""
        return self._address

    async def call(self, message: bytes) -> bytes:
        return message

    async def stream(self, message: bytes) -> AsyncIterator[bytes]:
        yield message


class Caller:
    """Calls `Echo`, which is in another process, in each way that there is."""

    async def __init__(self, echo: DeploymentHandle[Any]) -> None:  # type: ignore[misc]  # as above
        streaming = echo.options(stream=True)

        async def call() -> None:
            check(await echo.call.remote(MESSAGE))

        async def stream() -> None:
            async for message in streaming.stream.remote(MESSAGE):
                check(message)

        self._channel = grpc.aio.insecure_channel(await echo.address.remote())
        self._calls = {HANDLE_CALL: call, HANDLE_STREAM: stream, **grpc_calls(self._channel)}

    async def time(self, way: str, at_once: int, seconds: float) -> list[float]:
        """Time one of the calls: see `timed`."""
        return await timed(self._calls[way], at_once, seconds)


async def _answer(request: Request) -> Response:
    return Response(await request.body())


WEB = Starlette(routes=[Route("/", _answer, methods=["POST"])])


class Web:
    """An application that Serve's proxy calls, and that listens itself."""

    async def __init__(self, port: int) -> None:  # type: ignore[misc]  # as above
        self._listener = await Listener.open(WEB, HOST, port)


def callers() -> Application:
    """An application of `Caller` and the `Echo` that it calls."""
    echo = serve.deployment()(Echo).options(**_options())
    return serve.deployment()(Caller).options(**_options()).bind(echo.bind())


def web(port: int) -> Application:
    """An application of `Web`, which itself listens on this port."""
    return serve.deployment()(serve.ingress(WEB)(Web)).options(**_options()).bind(port)


def _options() -> dict[str, Any]:
    """Options by which a replica takes any number of calls at once and logs none of them."""
    return {
        "max_ongoing_requests": 10_000,
        "ray_actor_options": {"num_cpus": 0},
        "logging_config": LoggingConfig(log_level="WARNING", enable_access_log=False),
    }
