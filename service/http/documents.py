"""POST /v1/documents: a document is read, and may be answered, while it arrives."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gma.service.cores import cores_for
from gma.service.errors import TooLate, UnknownModel
from gma.service.gateway.contract import (
    Answer,
    ErrorEvent,
    ModelName,
    Options,
    ResultEvent,
)
from gma.service.gateway.document import Document, Listener, Pieces
from gma.service.gateway.gateway import Gateway
from gma.service.gateway.model import Model
from gma.service.http.auth import clients_of
from gma.service.http.body import Body, ClientGone
from gma.service.http.charsets import transcoded
from gma.service.http.events import Events
from gma.service.http.files import Files, check_readable
from gma.service.http.json_document import parsed
from gma.service.http.media import (
    FILES,
    JSON,
    MARKDOWN,
    TEXT,
    Content,
    content_of,
    encode,
    event_type,
    shown,
)
from gma.service.http.middleware import RECORD, Record, error_answer
from gma.service.http.openapi import DOCUMENT_BODY, DOCUMENT_RESPONSES
from gma.service.http.options import Deadline, check_given_once
from gma.service.tasks import guarded

T = TypeVar("T")

DOCUMENTS = (TEXT, JSON, MARKDOWN, *FILES)
"""What a document may be. Markdown is read as the text that it is."""

PLAIN = (Content(TEXT), Content(MARKDOWN))
"""What has as many bytes when it is read as when it comes."""

MOST_DIGITS = 18
"""Of a Content-Length that is looked at: more than of any that is taken."""

TIMING_HEADERS = {
    "queue": "x-queue-time",
    "tokenize": "x-tokenization-time",
    "compute": "x-inference-time",
    "total": "x-total-time",
}
"""A timing's name in the answer, and the header that carries it in milliseconds."""


def add_documents(app: FastAPI, gateway: Gateway) -> None:
    """Give `app` the route that `gateway` answers."""
    files = Files(at_once=cores_for(gateway.settings))
    about: dict[str, Any] = {
        "response_model": Answer,
        "responses": DOCUMENT_RESPONSES,
        "openapi_extra": {"requestBody": DOCUMENT_BODY},
        "tags": ["documents"],
    }

    @app.post("/v1/documents", summary="Classify one document", **about)
    async def documents(
        request: Request,
        options: Annotated[Options, Query()],
        x_deadline_ms: Deadline = None,
    ) -> Response:
        """Send the text itself, of any length up to the limit, with `Content-Length` or chunked: it
        is read while it arrives. Options are query parameters; those of a JSON request may lie
        beside its text, and count before those of the query.

        With `Accept: application/x-ndjson` or `text/event-stream`, events tell the progress: at
        most ten a second of `progress`, then one `result` (the answer) or `error`. With a
        bidirectional model, which reads a document once it has come whole, `progress` tells how
        much of the reading is done and no label.

        A multi-label model answers `labels`, those whose score reaches their threshold, in place
        of `label`; another that has thresholds answers null if its best label's does not.
        """
        return DocumentResponse(gateway, files, request, options, deadline_ms=x_deadline_ms)

    @app.post("/v1/models/{model}/documents", summary="The same by a model's path", **about)
    async def documents_of(
        model: ModelName,
        request: Request,
        options: Annotated[Options, Query()],
        x_deadline_ms: Deadline = None,
    ) -> Response:
        """As /v1/documents, by the model that the path names; nothing else may name another."""
        return DocumentResponse(
            gateway, files, request, options, path_model=model, deadline_ms=x_deadline_ms
        )


def chosen(gateway: Gateway, options: Options, path_model: str | None = None) -> Model:
    """The model that a path, or else the options name.

    Raises UnknownModel, also if the two differ; NotReady, and Validation if that does not tell one.
    """
    if path_model is not None and options.model not in (None, path_model):
        raise UnknownModel(
            f"model: the path says {shown(path_model)}, and the request {shown(options.model)}"
        )
    return gateway.models.choose(options.model if path_model is None else path_model)


class DocumentResponse(Response):
    """Answers a document while its body is still arriving.

    Not Starlette's StreamingResponse: that one listens for a disconnect by taking, and dropping,
    the body's messages.
    """

    def __init__(
        self,
        gateway: Gateway,
        files: Files,
        request: Request,
        options: Options,
        *,
        path_model: str | None = None,
        deadline_ms: int | None,
    ) -> None:
        """Raises UnsupportedContent or Validation for what can't be read, and what `chosen` raises.

        `deadline_ms`: from the request's beginning to the end of its reading.
        """
        super().__init__()
        self._path_model = path_model
        self._deadline_s = None if deadline_ms is None else deadline_ms / 1000
        self._gateway = gateway
        self._files = files
        self._options = options
        self._content = content_of(request.headers, DOCUMENTS)
        check_readable(self._content.kind)
        self._event_type = event_type(request.headers)
        self._announced_bytes = announced_bytes(request.headers)
        check_given_once(request)
        if self._content.kind != JSON:
            self._model()  # which later may be another: nothing is read before

    def _model(self) -> Model:
        return chosen(self._gateway, self._options, self._path_model)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the document, and send its answer. Raises ServiceError before the first event, and
        ClientGone; what goes wrong after is the last event."""
        record: Record = scope[RECORD]
        clients = clients_of(scope, self._gateway.settings)
        admission = self._gateway.admission
        with admission.admit(
            self._announced_bytes, clients, self._deadline_at_door, record.key
        ) as admitted:
            body = Body(receive, admitted, self._gateway.settings, self._content.coding)
            if self._event_type:
                events = Events(send, self._event_type)
                try:
                    event = await self._last_event(body, events, record)
                    admitted.leave(len(event))
                    await events.end(event)
                finally:
                    events.stop()
            else:
                answer = await self._read(body, record)
                timing = {TIMING_HEADERS[name]: str(ms) for name, ms in answer["timing_ms"].items()}
                content = await self._encoded(partial(encode, answer))
                del answer  # which may be large, and whoever does not read has us wait
                admitted.leave(len(content))
                await Response(content, headers=timing, media_type=JSON)(scope, receive, send)

    @property
    def _deadline_at_door(self) -> float | None:
        """The deadline, in seconds, where all of the body is known to be read."""
        plain = self._content in PLAIN and self._options.max_tokens is None
        return self._deadline_s if plain else None

    async def _last_event(self, body: Body, events: Events, record: Record) -> bytes:
        """How the document ended, encoded. Raises what goes wrong before the first event."""
        try:
            answer = await self._read(body, record, events.progress)
        except Exception as error:
            if not events.begun or isinstance(error, ClientGone):
                raise
            return events.encoded(ErrorEvent(event="error", **error_answer(record.fail(error))))
        return await self._encoded(partial(events.encoded, ResultEvent(event="result", **answer)))

    async def _encoded(self, encoded: Callable[[], bytes]) -> bytes:
        """What `encoded` makes of an answer."""
        return await self._gateway.in_thread(encoded) if self._options.long else encoded()

    async def _read(
        self, body: Body, record: Record, on_progress: Listener | None = None
    ) -> Answer:
        """The answer to the document that `body` brings."""
        reading = guarded(self._classify(body, record, on_progress), by=body.pump())
        try:
            answer = await in_time(reading, record.began, self._deadline_s)
        finally:
            record.stages.append(body.stage())
        record.usage = answer["usage"].copy()
        record.usage.pop("components", None)  # thousands of numbers, for the client alone
        return answer

    async def _classify(self, body: Body, record: Record, on_progress: Listener | None) -> Answer:
        async with aclosing(self._decoded(body)) as decoded:
            pieces: Pieces = decoded
            if self._content.kind == JSON:
                self._options, text = await parsed(pieces, self._options)
                pieces = text.pieces()
            else:
                await body.chunk()
            # Clients may give two requests one id.
            name = f"{record.id}/{uuid.uuid4().hex}"
            document = Document(self._gateway, self._model(), name, self._options)
            return await document.classify(
                pieces, began=record.began, stages=record.stages, on_progress=on_progress
            )

    def _decoded(self, body: Body) -> AsyncGenerator[tuple[bytes, bool]]:
        """What `body` brings: a text in UTF-8, or JSON."""
        pieces, charset = body.pieces(), self._content.charset
        if self._content.kind in FILES:
            return body.counted(self._files.text(pieces, self._content.kind, charset))
        return body.counted(transcoded(pieces, charset)) if charset else pieces


def announced_bytes(headers: Headers) -> int:
    """Of a request's body, as far as they are told beforehand."""
    # No more digits than any length has: int() refuses thousands of them.
    return int(headers.get("content-length", "0")[:MOST_DIGITS])


async def in_time(reading: Coroutine[Any, Any, T], began: float, deadline_s: float | None) -> T:
    """What `reading` returns. Raises TooLate, having ended it, when the deadline, counted from when
    it `began`, passes."""
    left_s = deadline_s and deadline_s - (time.monotonic() - began)
    try:
        async with asyncio.timeout(left_s) as limit:
            return await reading
    except TimeoutError:
        if not limit.expired():
            raise
        raise TooLate("the deadline of x-deadline-ms has passed: allow more time") from None
