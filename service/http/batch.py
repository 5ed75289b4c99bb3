"""POST /v1/documents:batch: any number of documents, a line each, answered while they come."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any, NoReturn

from fastapi import FastAPI, Query
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gma.service.errors import ServiceError, ShuttingDown
from gma.service.gateway.admission import Admitted
from gma.service.gateway.batch import Batch, Line
from gma.service.gateway.contract import (
    Answered,
    BatchOptions,
    Failure,
    LineAnswer,
    ModelName,
)
from gma.service.gateway.document import Document
from gma.service.gateway.gateway import Gateway
from gma.service.http.auth import clients_of
from gma.service.http.body import ClientGone, Pace, Stream
from gma.service.http.codings import ZSTD_WINDOW_BYTES, unpacked
from gma.service.http.documents import chosen, in_time
from gma.service.http.events import HEADERS
from gma.service.http.json_document import parsed_line
from gma.service.http.lines import Lines
from gma.service.http.media import NDJSON, content_of, encode
from gma.service.http.middleware import RECORD, Record, forget_frames
from gma.service.http.openapi import BATCH_BODY, BATCH_RESPONSES
from gma.service.http.options import Deadline, check_given_once
from gma.service.observe import metrics
from gma.service.tasks import guarded

TOGETHER = 64
"""Lines of one batch that have begun to be read, and whose answers have not been taken."""


def add_batch(app: FastAPI, gateway: Gateway) -> None:
    """Give `app` the route that `gateway` answers."""

    about: dict[str, Any] = {
        "response_class": Response,
        "responses": BATCH_RESPONSES,
        "openapi_extra": {"requestBody": BATCH_BODY},
        "tags": ["documents"],
    }

    @app.post(
        "/v1/documents:batch", summary="Classify any number of documents, one a line", **about
    )
    async def batch(
        request: Request,
        options: Annotated[BatchOptions, Query()],
        x_deadline_ms: Deadline = None,
    ) -> Response:
        """Each line is a document as JSON, with its options and perhaps an `id`; options of the
        query are of all lines that do not say otherwise. Each is answered with a line that has its
        `id`, or else its number, and its number as `line`: the document's answer, or an error, and
        others go on. Answers come while lines are still being sent, for which the client has to
        read while it sends. A line waits where a document by itself would be refused for want of a
        place. If the batch ends early, its last answer is an error without `line`. The deadline is
        each line's, from its first byte on."""
        return BatchResponse(gateway, request, options, deadline_ms=x_deadline_ms)

    @app.post("/v1/models/{model}/documents:batch", summary="The same by a model's path", **about)
    async def batch_of(
        model: ModelName,
        request: Request,
        options: Annotated[BatchOptions, Query()],
        x_deadline_ms: Deadline = None,
    ) -> Response:
        """As /v1/documents:batch, by the model that the path names; no line may name another."""
        return BatchResponse(gateway, request, options, path_model=model, deadline_ms=x_deadline_ms)


class BatchResponse(Response):
    """Answers lines while others are still arriving."""

    def __init__(
        self,
        gateway: Gateway,
        request: Request,
        options: BatchOptions,
        *,
        path_model: str | None = None,
        deadline_ms: int | None,
    ) -> None:
        """Raises UnsupportedContent or Validation for what can't be read, and what `chosen` raises
        for a model that is named for all lines. `deadline_ms`: of each line, from its beginning."""
        super().__init__()
        self._coding = content_of(request.headers, (NDJSON,)).coding
        check_given_once(request)
        if (options.model or path_model) is not None:
            chosen(gateway, options, path_model)
        self._gateway = gateway
        self._options = options
        self._path_model = path_model
        self._deadline_s = None if deadline_ms is None else deadline_ms / 1000

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the lines, and send their answers. Raises ServiceError before the first answer, and
        ClientGone; what ends the batch after that is its last answer."""
        record: Record = scope[RECORD]
        settings = self._gateway.settings
        clients = clients_of(scope, settings)
        batch = Batch(self._gateway.admission, clients, record.key, wait_s=settings.idle_timeout_s)
        answers = Answers(send)
        with batch.open() as own:
            if self._coding == "zstd":
                own.reserve(min(ZSTD_WINDOW_BYTES, settings.max_document_bytes))
            reading = Reading(
                self._gateway, batch, own, Stream(receive, own), answers, record, self._options,
                self._path_model, self._coding, self._deadline_s,
            )  # fmt: skip
            try:
                await reading.run()
            except Exception as error:
                if not answers.begun or isinstance(error, ClientGone):
                    raise
                failure = encode(failure_of(record.fail(error))) + b"\n"
                forget_frames(error)
            else:
                failure = b""
            await answers.end(failure)


class Answers:
    """The answers of a batch. Nothing is sent, no status either, before the first."""

    def __init__(self, send: Send) -> None:
        self.begun = False
        self._send = send
        self._lock = asyncio.Lock()

    async def tell(self, line: bytes) -> None:
        """Send an answer, once those before it are sent: waits for a client that does not read."""
        async with self._lock:
            await self._write(line, more=True)

    async def end(self, line: bytes) -> None:
        """Send the last, which may be nothing."""
        await self._write(line, more=False)

    async def _write(self, line: bytes, *, more: bool) -> None:
        if not self.begun:
            self.begun = True
            headers = [(b"content-type", NDJSON.encode()), *HEADERS]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": line, "more_body": more})


class Reading:
    """A batch while it is read: one line after the other, and any number of them together."""

    def __init__(
        self,
        gateway: Gateway,
        batch: Batch,
        own: Admitted,
        stream: Stream,
        answers: Answers,
        record: Record,
        options: BatchOptions,
        path_model: str | None,
        coding: str | None,
        deadline_s: float | None,
    ) -> None:
        self._gateway = gateway
        self._batch = batch
        self._stream = stream
        pieces = stream.pieces()
        self._lines = Lines(unpacked(pieces, coding) if coding else pieces)
        self._answers = answers
        self._record = record
        self._options = options
        self._path_model = path_model
        self._deadline_s = deadline_s
        self._pace = Pace(own, gateway.settings)
        self._room = asyncio.Semaphore(TOGETHER)
        self._owed = 0  # answers to lines that were read
        record.lines = {"lines": 0, "failed_lines": 0}

    async def run(self) -> None:
        """Return when all lines are answered. Raises ClientGone; Stalled if they come too slowly
        while no answer is owed; and ShuttingDown, those that were read being answered."""
        await guarded(self._read(), by=self._pump())

    async def _pump(self) -> NoReturn:
        async with self._pace.kept():
            self._watch()
            await self._stream.pump()

    async def _read(self) -> None:
        failure: ServiceError | None = None
        before: asyncio.Task[None] | None = None
        async with asyncio.TaskGroup() as tasks:
            ending = tasks.create_task(self._end_when_draining())
            try:
                while await self._lines.next():
                    await self._room.acquire()
                    read = asyncio.Event()
                    before = tasks.create_task(self._line(read, before))
                    await read.wait()
            except ServiceError as error:
                failure = error
            finally:
                self._lines.close()
                self._pace.rest()
                ending.cancel()
        if failure:
            raise failure

    async def _end_when_draining(self) -> None:
        await self._gateway.admission.drains.wait()
        self._stream.end(
            ShuttingDown("the service is shutting down: send the lines without an answer again")
        )

    async def _line(self, read: asyncio.Event, before: asyncio.Task[None] | None) -> None:
        """Read a line, set `read`, and tell its answer, behind that of `before` if there is one."""
        began = time.monotonic()
        name = Answered(id=self._lines.number, line=self._lines.number)
        status = 200
        try:
            async with self._batch.line() as place:
                reading = self._answer(place, name, read, began)
                answer = await in_time(reading, began, self._deadline_s)
                place.leave(len(answer))
                await self._tell(answer, before)
        except Exception as error:
            seen = self._record.told(error)
            forget_frames(error)
            status = seen.status
            self._record.lines["failed_lines"] += 1
            self._has_read(read)
            await self._tell(encode({**name, **failure_of(seen)}) + b"\n", before)
        finally:
            self._record.lines["lines"] += 1
            metrics.BATCH_LINES.labels(str(status)).inc()
            self._room.release()
            self._owed -= 1
            self._watch()

    async def _answer(
        self, place: Line, name: Answered, read: asyncio.Event, began: float
    ) -> bytes:
        """The line's answer, encoded. Its id is put into `name` as soon as it has come."""

        def named(found: str | int) -> None:
            name["id"] = found

        async with aclosing(self._pieces(place)) as pieces:
            options, text = await parsed_line(pieces, self._options, named)
        self._has_read(read)
        unique = f"{self._record.id}/{uuid.uuid4().hex}"
        model = chosen(self._gateway, options, self._path_model)
        document = Document(self._gateway, model, unique, options, patient=True)
        answer = await document.classify(text.pieces(), began=began, stages=[])
        self._record.add(answer["usage"])
        encoded = partial(encode, LineAnswer(**name, **answer))
        return (await self._gateway.in_thread(encoded) if options.long else encoded()) + b"\n"

    async def _pieces(self, place: Line) -> AsyncGenerator[tuple[bytes, bool]]:
        """The line, of which no more is taken than there is room for."""
        async with aclosing(self._lines.pieces()) as pieces:
            async for piece, last in pieces:
                if place.lacks_room(len(piece)):
                    self._pace.rest()
                    await place.room(len(piece))
                    self._watch()
                place.hold(place.counted_bytes + len(piece))
                yield piece, last

    def _has_read(self, read: asyncio.Event) -> None:
        """The next line may be read. This one's answer is owed."""
        if not read.is_set():
            read.set()
            self._owed += 1
            self._watch()

    async def _tell(self, answer: bytes, before: asyncio.Task[None] | None) -> None:
        if before and self._options.order == "input":
            await asyncio.wait({before})
        await self._answers.tell(answer)

    def _watch(self) -> None:
        """A client that is owed an answer may wait for it before it goes on."""
        if self._owed > 0:
            self._pace.rest()
        else:
            self._pace.wait()


def failure_of(error: ServiceError) -> Failure:
    """The error as an answer of a batch tells it."""
    failure = Failure(error=error.message, error_type=error.error_type, status=error.status)
    if error.retry_after_s is not None:
        failure["retry_after_s"] = error.retry_after_s
    return failure
