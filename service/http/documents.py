"""POST /v1/documents: a document is read, and may be answered, while it arrives."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from functools import partial
from typing import Annotated

from fastapi import FastAPI, Query, Security
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gma.model.config import problems
from gma.service.errors import NotJson, NotUtf8, Validation
from gma.service.gateway.contract import Answer, DocumentRequest, ErrorEvent, Options, ResultEvent
from gma.service.gateway.document import PIECE_BYTES, Document
from gma.service.gateway.gateway import Gateway
from gma.service.http.body import Body, ClientGone
from gma.service.http.events import Events
from gma.service.http.media import JSON, document_type, encode, event_type
from gma.service.http.middleware import RECORD, Record, error_answer
from gma.service.http.openapi import BEARER, DOCUMENT_BODY, DOCUMENT_RESPONSES
from gma.service.tasks import guarded

MOST_PROBLEMS = 5
"""How many an answer tells of a request that is not valid."""

TIMING_HEADERS = {
    "queue": "x-queue-time",
    "tokenize": "x-tokenization-time",
    "compute": "x-inference-time",
    "total": "x-total-time",
}
"""A timing's name in the answer, and the header that carries it in milliseconds."""


def add_documents(app: FastAPI, gateway: Gateway) -> None:
    """Give `app` the route that `gateway` answers."""

    @app.post(
        "/v1/documents",
        summary="Classify one document",
        response_model=Answer,
        responses=DOCUMENT_RESPONSES,
        openapi_extra={"requestBody": DOCUMENT_BODY},
        dependencies=[Security(BEARER)],
        tags=["documents"],
    )
    async def documents(request: Request, options: Annotated[Options, Query()]) -> Response:
        """Send the text itself, of any length up to the limit, with `Content-Length` or chunked: it
        is read while it arrives. Options of a text are query parameters, those of a JSON request
        lie beside its text.

        With `Accept: application/x-ndjson` or `text/event-stream`, events tell the progress: at
        most ten a second of `progress`, then one `result` (the answer) or `error`.
        """
        return DocumentResponse(gateway, request, options)


class DocumentResponse(Response):
    """Answers a document while its body is still arriving.

    Not Starlette's StreamingResponse: that one listens for a disconnect by taking, and dropping,
    the body's messages.
    """

    def __init__(self, gateway: Gateway, request: Request, options: Options) -> None:
        """Raises UnsupportedContent or Validation for what can't be read."""
        super().__init__()
        self._gateway = gateway
        self._options = options
        self._document_type = document_type(request.headers)
        self._event_type = event_type(request.headers)
        self._announced_bytes = int(request.headers.get("content-length", 0))
        if self._document_type == JSON and request.query_params:
            raise Validation("options of a JSON request go into its body, not into the query")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the document, and send its answer. Raises ServiceError before the first event, and
        ClientGone; what goes wrong after is the last event."""
        record: Record = scope[RECORD]
        events = Events(send, self._event_type) if self._event_type else None
        try:
            answer = await self._read(receive, events, record)
        except Exception as error:
            if not (events and events.begun) or isinstance(error, ClientGone):
                raise
            await events.end(ErrorEvent(event="error", **error_answer(record.fail(error))))
            return
        record.usage = answer["usage"]
        if events:
            await events.end(ResultEvent(event="result", **answer))
            return
        content = await self._gateway.in_thread(partial(encode, answer))
        timing = {TIMING_HEADERS[name]: str(ms) for name, ms in answer["timing_ms"].items()}
        await Response(content, headers=timing, media_type=JSON)(scope, receive, send)

    async def _read(self, receive: Receive, events: Events | None, record: Record) -> Answer:
        """The answer to the document that `receive` brings, if there is room for it."""
        with self._gateway.admission.admit(self._announced_bytes) as admitted:
            timeout_s = self._gateway.settings.idle_timeout_s
            body = Body(receive, admitted, idle_timeout_s=timeout_s)
            try:
                return await guarded(self._classify(body, events, record), by=body.pump())
            finally:
                record.stages.append(body.stage())

    async def _classify(self, body: Body, events: Events | None, record: Record) -> Answer:
        options, pieces = self._options, body.pieces(PIECE_BYTES)
        if self._document_type == JSON:
            request = await self._gateway.in_thread(partial(parsed, await body.whole()))
            options, pieces = request, cut(request.text.encode(), PIECE_BYTES)
        # Clients may give two requests one id.
        document = Document(self._gateway, f"{record.id}/{uuid.uuid4().hex}", options)
        return await document.classify(
            pieces,
            began=record.began,
            stages=record.stages,
            on_progress=events.progress if events else None,
        )


def parsed(body: bytes) -> DocumentRequest:
    """A JSON request. Raises NotUtf8, NotJson or Validation."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise NotUtf8(error.start) from None
    try:
        return DocumentRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise NotJson(f"the body is not JSON: {first['ctx']['error']}") from None
        raise Validation(problems(error, most=MOST_PROBLEMS)) from None


async def cut(text: bytes, most: int) -> AsyncGenerator[tuple[bytes, bool]]:
    """A whole text in pieces of at most `most` bytes, as if it arrived: each with whether it is the
    last."""
    for start in range(0, len(text) or 1, most):
        yield text[start : start + most], start + most >= len(text)
