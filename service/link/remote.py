"""A worker in another process, by gRPC: `WorkerServer` beside the worker, `RemoteWorker` at a
gateway.

A document is one call, `read`, which tells first that it is open, then its progress. It is open as
long as the call is: whichever side is lost, the other hears of it. More tokens come by `feed`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple, Protocol, cast

import grpc
import grpc.aio

from gma.service.engine.document import Progress
from gma.service.errors import ServiceError, UnknownDocument
from gma.service.gateway.contract import WorkerInfo
from gma.service.link.client import Reading, Tokens, WorkerClient
from gma.service.link.messages import (
    Feed,
    Open,
    pack_error,
    pack_progress,
    unpack_error,
    unpack_progress,
)

GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
LOST = "the worker that was reading this document is gone: send the document again"

SERVICE = "gma.Worker"
READ, FEED, INFO = "read", "feed", "info"
TOKEN, ERROR = "authorization", "gma-error-bin"
OPENED = b""

ENDING_S = 1.0
"""What a call whose document is read may still take to end."""

# A machine that is gone says nothing: its connections are asked now and then, and may take as long
# to answer as Serve lets a replica, for a busy one is slow to.
ASK_MS = 30_000
CLIENT_OPTIONS = (
    ("grpc.keepalive_time_ms", ASK_MS),
    ("grpc.keepalive_timeout_ms", ASK_MS),
    # Evidence of many spans; the engine bounds it.
    ("grpc.max_receive_message_length", -1),
)
SERVER_OPTIONS = (("grpc.http2.min_recv_ping_interval_without_data_ms", ASK_MS // 2),)


class Address(NamedTuple):
    """Where a worker answers, and what one has to show there."""

    target: str  # host:port
    token: str


class Feeding(WorkerClient, Protocol):
    """A worker that can be fed by a document's name alone."""

    async def feed(self, document: str, offset: int, tokens: Tokens, last: bool) -> None:
        """See `Reading.feed`."""


class WorkerServer:
    """Lets gateways in other processes use a worker."""

    def __init__(self, worker: Feeding) -> None:
        self._worker = worker
        self._token = secrets.token_hex(16)
        self._documents = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        handlers = {
            READ: grpc.unary_stream_rpc_method_handler(self._read),
            FEED: grpc.unary_unary_rpc_method_handler(self._feed),
            INFO: grpc.unary_unary_rpc_method_handler(self._info),
        }
        handler = grpc.method_handlers_generic_handler(SERVICE, handlers)
        self._server.add_generic_rpc_handlers((handler,))

    async def start(self, host: str) -> Address:
        """Listen on a free port of `host`, one of this machine's addresses."""
        host = f"[{host}]" if ":" in host else host
        port = self._server.add_insecure_port(f"{host}:0")
        await self._server.start()
        return Address(f"{host}:{port}", self._token)

    async def drain(self) -> None:
        """Return once no document is open. New ones are taken up to then, and none after."""
        while self._documents:
            await self._empty.wait()
        await self._server.stop(ENDING_S)

    async def stop(self) -> None:
        """Answer nobody any more; documents that are open are lost."""
        await self._server.stop(None)

    async def _read(self, request: bytes, context: Any) -> AsyncGenerator[bytes]:
        await self._check(context)
        document, tokens, last, evidence, running = Open.unpack(request)
        self._documents += 1
        self._empty.clear()
        try:
            async with self._worker.open(
                document, tokens, last, evidence=evidence, running=running
            ) as reading:
                yield OPENED
                async for progress in reading:
                    yield pack_progress(progress)
        except ServiceError as error:
            await _abort(context, error)
        finally:
            self._documents -= 1
            if not self._documents:
                self._empty.set()

    async def _feed(self, request: bytes, context: Any) -> bytes:
        await self._check(context)
        try:
            await self._worker.feed(*Feed.unpack(request))
        except ServiceError as error:
            await _abort(context, error)
        return b""

    async def _info(self, request: bytes, context: Any) -> bytes:
        await self._check(context)
        try:
            return json.dumps(await self._worker.info()).encode()
        except ServiceError as error:
            await _abort(context, error)
            raise

    async def _check(self, context: Any) -> None:
        shown = dict(context.invocation_metadata()).get(TOKEN, "")
        if not hmac.compare_digest(shown.encode(), self._token.encode()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a wrong token, or none")


async def _abort(context: Any, error: ServiceError) -> None:
    """End the call with an error of the service."""
    metadata = ((ERROR, pack_error(error)),)
    await context.abort(grpc.StatusCode.ABORTED, str(error), metadata)


class RemoteWorker:
    """One worker in another process: a `WorkerClient`."""

    def __init__(self, address: Address) -> None:
        self.documents = 0
        """Open here."""
        self._metadata = ((TOKEN, address.token),)
        self._channel = grpc.aio.insecure_channel(address.target, options=CLIENT_OPTIONS)
        self._read = self._channel.unary_stream(f"/{SERVICE}/{READ}")
        self._feed = self._channel.unary_unary(f"/{SERVICE}/{FEED}")
        self._info = self._channel.unary_unary(f"/{SERVICE}/{INFO}")
        self._retired = False
        self._closing: asyncio.Task[None] | None = None
        self._channel.get_state(try_to_connect=True)

    @asynccontextmanager
    async def open(
        self, document: str, tokens: Tokens, last: bool, *, evidence: bool, running: bool
    ) -> AsyncIterator[Reading]:
        """See `WorkerClient.open`. Raises UnknownDocument if the worker is gone."""
        self._check_open()
        message = Open(document, tokens, last, evidence, running).pack()
        call = self._read(message, metadata=self._metadata)
        self.documents += 1
        reading = _Reading(document, call, self._feed, self._metadata)
        try:
            with _translated():
                await call.read()  # OPENED
            yield reading
        finally:
            # Reaches the worker, which closes the document; does nothing once that is done.
            call.cancel()
            self.documents -= 1
            self._close_if_unused()

    async def info(self) -> WorkerInfo:
        """See `WorkerClient.info`. Raises UnknownDocument if the worker is gone."""
        self._check_open()
        with _translated():
            return cast("WorkerInfo", json.loads(await self._info(b"", metadata=self._metadata)))

    def retire(self) -> None:
        """Close the connection once no document is open here."""
        self._retired = True
        self._close_if_unused()

    def _check_open(self) -> None:
        if self._closing:
            raise UnknownDocument(LOST)

    def _close_if_unused(self) -> None:
        if self._retired and not self.documents:
            self._closing = asyncio.create_task(self._channel.close())


class _Reading:
    """A document on a worker in another process."""

    def __init__(self, document: str, call: Any, feed: Any, metadata: Any) -> None:
        self._document = document
        self._call = call
        self._feed = feed
        self._metadata = metadata

    def __aiter__(self) -> AsyncIterator[Progress]:
        return self

    async def __anext__(self) -> Progress:
        with _translated():
            message = await self._call.read()
        if message is grpc.aio.EOF:
            raise StopAsyncIteration
        return unpack_progress(message)

    async def feed(self, offset: int, tokens: Tokens, last: bool) -> None:
        message = Feed(self._document, offset, tokens, last).pack()
        with _translated():
            await self._feed(message, metadata=self._metadata)


@contextmanager
def _translated() -> Iterator[None]:
    """gRPC's errors as the service's own."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task and task.cancelling():
            raise
        raise UnknownDocument(LOST) from None  # the worker's side was cancelled, not ours
    except grpc.aio.AioRpcError as error:
        told = dict(error.trailing_metadata() or ()).get(ERROR)
        if told:
            raise unpack_error(told) from None
        if error.code() in GONE:
            raise UnknownDocument(LOST) from None
        raise
