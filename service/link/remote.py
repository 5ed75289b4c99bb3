"""A worker in another process, by gRPC: `WorkerServer` beside the worker, `RemoteWorker` at a
gateway.

A document's life is one call, a conversation: the gateway sends what opens the document, then more
tokens; the worker sends that it took the document, then its progress. The document is open as long
as the call is: whichever side is lost, the other hears of it. Where the worker does not take
tokens, the call's flow control lets the gateway wait.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import grpc
import grpc.aio

from gma.service.engine.document import Document
from gma.service.engine.engine import Engine
from gma.service.engine.opening import Opening, Tokens
from gma.service.engine.progress import Progress
from gma.service.errors import ServiceError, UnknownDocument, VersionMismatch
from gma.service.link.client import NO_FILES, ModelFiles, WorkerInfo
from gma.service.link.messages import (
    FEED,
    FILES,
    HELLO,
    INFO,
    OPENING,
    PROGRESS,
    Feed,
    check_version,
    decode_error,
    encode_error,
)

logger = logging.getLogger(__name__)

GONE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    # gRPC's own, for a message that a connection which just ended did not take. What fails in a
    # worker is UNKNOWN.
    grpc.StatusCode.INTERNAL,
)
LOST = "the worker that was reading this document is gone: send the document again"

SERVICE = "gma.Worker"
READ, TELL, SEND = "read", "info", "files"
TOKEN, ERROR = "authorization", "gma-error-bin"

GREETING_S = 0.05
"""After so long a worker says that it took a document, if it has nothing else to say yet."""

MOST_BYTES = 2**26
"""Of a message from a gateway: a state may be larger than gRPC's own bound of 4 MiB."""

ENDING_S = 1.0
"""What a call whose document is read may still take to end."""

# A machine that is gone says nothing: its connections are asked now and then, whether documents say
# something or not. gRPC's own threads answer, however busy the worker's interpreter is.
ASK_MS = 5_000


def _client_options() -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.keepalive_time_ms", ASK_MS),
        ("grpc.keepalive_timeout_ms", ASK_MS),  # for what was sent
        ("grpc.http2.ping_timeout_ms", ASK_MS),  # where nothing was
        ("grpc.http2.max_pings_without_data", 0),
        # Workers are reached directly, whatever proxy the environment names.
        ("grpc.enable_http_proxy", 0),
        # Evidence of many rows; the engine bounds it.
        ("grpc.max_receive_message_length", -1),
    )


def _server_options() -> tuple[tuple[str, int], ...]:
    return (
        # Who asks more often than that is sent away, with all that he has open.
        ("grpc.http2.min_ping_interval_without_data_ms", ASK_MS // 2),
        ("grpc.max_receive_message_length", MOST_BYTES),
    )


class Address(NamedTuple):
    """Where a worker answers, and what one has to show there."""

    target: str  # host:port
    token: str
    model: str = ""
    """Fingerprint of what it runs, as far as it says so."""


Inform: TypeAlias = Callable[[], Awaitable[WorkerInfo]]
"""Tells what a worker runs. Raises NotReady before it is warm."""


class WorkerServer:
    """Lets gateways in other processes use a worker's engine."""

    def __init__(self, engine: Engine, inform: Inform, files: ModelFiles = NO_FILES) -> None:
        """`files` are for gateways that do not know the model."""
        self._engine = engine
        self._inform = inform
        self._files = files
        self.documents = 0
        """Open now."""
        self._token = secrets.token_hex(16)
        self._empty = asyncio.Event()
        self._empty.set()
        self._server = grpc.aio.server(options=_server_options())
        handlers = {
            READ: grpc.stream_stream_rpc_method_handler(self._read),
            TELL: grpc.unary_unary_rpc_method_handler(self._info),
            SEND: grpc.unary_unary_rpc_method_handler(self._send),
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
        while self.documents:
            await self._empty.wait()
        await self._server.stop(ENDING_S)

    async def stop(self) -> None:
        """Answer nobody any more; documents that are open are lost."""
        await self._server.stop(None)

    async def _read(self, messages: AsyncIterator[bytes], context: Any) -> AsyncGenerator[bytes]:
        await self._check(context)
        self.documents += 1
        self._empty.clear()
        try:
            opening = OPENING.decode(await anext(messages))
            document = self._engine.open(opening)
            feeding = None if opening.last else asyncio.create_task(_feed(document, messages))
            progress = aiter(document)
            first = asyncio.ensure_future(anext(progress))
            try:
                # A whole document may be read before a greeting would have come.
                if not (opening.last and await _ends_within(first, GREETING_S)):
                    yield HELLO
                yield PROGRESS.encode(await first)
                async for following in progress:
                    yield PROGRESS.encode(following)
            finally:
                first.cancel()
                document.close()
                if feeding:
                    feeding.cancel()
        except ServiceError as error:
            await _abort(context, error)
        finally:
            self.documents -= 1
            if not self.documents:
                self._empty.set()

    async def _info(self, message: bytes, context: Any) -> bytes:
        await self._check(context)
        try:
            check_version(message)
            return INFO.encode(await self._inform())
        except ServiceError as error:
            await _abort(context, error)
            raise

    async def _send(self, message: bytes, context: Any) -> bytes:
        await self._check(context)
        return FILES.encode(self._files)

    async def _check(self, context: Any) -> None:
        shown = dict(context.invocation_metadata()).get(TOKEN, "")
        if not hmac.compare_digest(shown.encode(), self._token.encode()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a wrong token, or none")


async def _ends_within(future: asyncio.Future[Any], seconds: float) -> bool:
    done, _ = await asyncio.wait({future}, timeout=seconds)
    return bool(done)


async def _feed(document: Document, messages: AsyncIterator[bytes]) -> None:
    """Hand the rest of a document to the engine, which says what it thinks of it as progress."""
    try:
        async for message in messages:
            await document.feed(*FEED.decode(message))
    except ServiceError:
        pass  # it closed the document, whose progress tells it
    except Exception:
        logger.exception("a message for %s can't be read", document.name)
    else:
        return
    document.close()


async def _abort(context: Any, error: ServiceError) -> None:
    """End the call with an error of the service."""
    if isinstance(error, VersionMismatch):
        # In words alone, which any version can read.
        logger.error("%s", error)
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    await context.abort(grpc.StatusCode.ABORTED, str(error), ((ERROR, encode_error(error)),))


class RemoteWorker:
    """One worker in another process, at a gateway."""

    def __init__(self, address: Address) -> None:
        self.documents = 0
        """Open here."""
        self.silent = False
        """It did not answer in time when it was last asked."""
        self._metadata = ((TOKEN, address.token),)
        self._channel = grpc.aio.insecure_channel(address.target, options=_client_options())
        self._read = self._channel.stream_stream(f"/{SERVICE}/{READ}")
        self._info = self._channel.unary_unary(f"/{SERVICE}/{TELL}")
        self._send = self._channel.unary_unary(f"/{SERVICE}/{SEND}")
        self._retired = False
        self._closing: asyncio.Task[None] | None = None
        self._channel.get_state(try_to_connect=True)

    async def open(self, opening: Opening) -> RemoteDocument:
        """See `WorkerClient.open`. Raises UnknownDocument if the worker is gone."""
        self._check_open()
        self.documents += 1
        call = self._read(metadata=self._metadata)
        document = RemoteDocument(call, self._closed)
        try:
            with _translated():
                await call.write(OPENING.encode(opening))
                document.told = await call.read()
                check_version(document.told)
        except BaseException:
            document.close()
            raise
        return document

    async def info(self) -> WorkerInfo:
        """See `WorkerClient.info`. Raises UnknownDocument if the worker is gone."""
        self._check_open()
        with _translated():
            return INFO.decode(await self._info(HELLO, metadata=self._metadata))

    async def files(self) -> ModelFiles:
        """Of the model that it runs. Raises UnknownDocument if the worker is gone."""
        self._check_open()
        with _translated():
            return FILES.decode(await self._send(HELLO, metadata=self._metadata))

    def retire(self) -> None:
        """Close the connection once no document is open here."""
        self._retired = True
        self._close_if_unused()

    def _check_open(self) -> None:
        if self._closing:
            raise UnknownDocument(LOST)

    def _closed(self) -> None:
        self.documents -= 1
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._retired and not self.documents:
            self._closing = asyncio.create_task(self._channel.close())


class RemoteDocument:
    """A document on a worker in another process: an `OpenDocument`."""

    def __init__(self, call: Any, on_close: Callable[[], None]) -> None:
        self.told = HELLO
        """The worker's first message: that it took the document, or already progress."""
        self._call = call
        self._on_close: Callable[[], None] | None = on_close

    async def feed(self, tokens: Tokens, last: bool) -> None:
        """See `OpenDocument.feed`."""
        with _translated():
            await self._call.write(FEED.encode(Feed(tokens, last)))

    async def __aiter__(self) -> AsyncIterator[Progress]:
        """See `OpenDocument.__aiter__`."""
        if self.told != HELLO:
            yield PROGRESS.decode(self.told)
        with _translated():
            while (message := await self._call.read()) is not grpc.aio.EOF:
                yield PROGRESS.decode(message)

    def close(self) -> None:
        """See `OpenDocument.close`."""
        # Reaches the worker, which closes the document; does nothing once that is done.
        self._call.cancel()
        if self._on_close:
            self._on_close()
            self._on_close = None


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
    except asyncio.InvalidStateError:
        raise UnknownDocument(LOST) from None  # the call has ended
    except grpc.aio.AioRpcError as error:
        told = dict(error.trailing_metadata() or ()).get(ERROR)
        if told:
            raise decode_error(told) from None
        if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
            raise VersionMismatch(str(error.details())) from None
        if error.code() in GONE:
            raise UnknownDocument(LOST) from None
        raise
