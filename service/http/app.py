"""The HTTP side: routes, what they read and send, and the one place where errors become answers."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import FastAPI, Query, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from pydantic import ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gma.service.errors import (
    Invalid,
    MethodNotAllowed,
    NotFound,
    NotJson,
    NotReady,
    NotUtf8,
    ServiceError,
    ShuttingDown,
    Unauthorized,
    UnsupportedContent,
)
from gma.service.gateway.contract import (
    Answer,
    DocumentRequest,
    ErrorAnswer,
    ErrorEvent,
    Health,
    Info,
    Options,
    ProgressEvent,
    ResultEvent,
    Usage,
)
from gma.service.gateway.gateway import PIECE_BYTES, Gateway
from gma.service.http.body import Body, ClientGone, guarded
from gma.service.http.keys import Keys
from gma.service.observe import metrics, traces
from gma.service.observe.traces import Stage

logger = logging.getLogger(__name__)

TEXT, JSON = "text/plain", "application/json"
NDJSON, SSE = "application/x-ndjson", "text/event-stream"

TIMING_HEADERS = {
    "queue": "x-queue-time",
    "tokenize": "x-tokenization-time",
    "compute": "x-inference-time",
    "total": "x-total-time",
}
"""A timing's name in the answer, and the header that carries it in milliseconds."""

REQUEST_ID = "x-request-id"
# What a client may choose as its request's id: it goes into logs and headers.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_CHARSET = re.compile(r""";\s*charset\s*=\s*["']?([^"';\s]+)""", re.IGNORECASE)

RECORD = "gma.record"
"""Where in ASGI's scope a request's `Record` is."""

INTERNAL = "the service failed; its log says why, under the x-request-id of this answer"

PROBES = ("/health", "/metrics")
"""Asked every few seconds by machines: their successes would drown the log."""

OPEN = {*PROBES, "/", "/docs", "/openapi.json"}
"""What anybody may get; every other path and method needs a key, if there are any."""

HEALTH_TIMEOUT_S = 1.0
MAX_ERRORS = 5
CLIENT_GONE = 499

ERRORS = {
    400: "Not UTF-8, not JSON, or empty.",
    401: "No API key, or a wrong one, where keys are asked for.",
    408: "Nothing more of the body came.",
    413: "Larger than the limit.",
    415: "Neither text/plain nor application/json.",
    422: "A field or parameter is unknown or out of range.",
    429: "Too much in flight: nothing of the request was processed. See Retry-After.",
    500: "The service failed; its log says why, under the request's id.",
    503: "Starting, draining, or the worker was lost. See Retry-After.",
}
DOCUMENT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; as events if asked for.",
        "content": {
            NDJSON: {
                "example": '{"event":"progress","bytes":900,"tokens":256,"label":"a","score":0.5}\n'
                '{"event":"result","model":"books","label":"a","scores":[...],...}\n'
            },
            SSE: {"example": 'event: progress\ndata: {"event":"progress",...}\n\n'},
        },
    },
    **{status: {"model": ErrorAnswer, "description": text} for status, text in ERRORS.items()},
}
DOCUMENT_BODY = {
    "required": True,
    "content": {
        TEXT: {"schema": {"type": "string", "description": "The document, in UTF-8."}},
        JSON: {"schema": DocumentRequest.model_json_schema()},
    },
}


BEARER = HTTPBearer(auto_error=False, description="Asked for where API keys are configured.")
"""For the OpenAPI page alone: `Authorized` has decided before."""


def create_app(gateway: Gateway, *, stamp_ids: bool = True) -> FastAPI:
    """The application that serves `gateway`.

    `stamp_ids`: put the request's id into answers; not under Ray Serve, whose proxy does it.
    Raises ValueError if the keys file of the gateway's settings can't be used.
    """
    keys_file = gateway.settings.api_keys_file

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(gateway.watch_memory())
        traces.start()
        yield
        watching.cancel()
        await gateway.in_thread(traces.stop)

    app = FastAPI(
        title="Long-document classification",
        description="Classifies texts of any length with Gaussian mixture attention.",
        version=version("gma-service"),
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        exception_handlers={HTTPException: _no_route, RequestValidationError: _invalid},
    )
    if keys_file:
        app.add_middleware(Authorized, keys=Keys.load(keys_file))
    app.add_middleware(Requests, stamp_ids=stamp_ids)
    _add_operations(app, gateway)
    _add_documents(app, gateway)
    return app


def _add_documents(app: FastAPI, gateway: Gateway) -> None:
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
        return DocumentResponse(gateway, request.headers, options, dict(request.query_params))


def _add_operations(app: FastAPI, gateway: Gateway) -> None:
    unready: dict[int | str, dict[str, Any]] = {
        503: {"model": ErrorAnswer, "description": "Starting, draining, or no worker."}
    }

    @app.get("/health", responses=unready, tags=["operation"])
    async def health() -> Health:
        """Whether documents are answered: 200 once a worker is warm, until the service drains."""
        if gateway.admission.draining:
            raise ShuttingDown("the service is shutting down")
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await gateway.info()
        except TimeoutError:
            raise NotReady("no worker is ready yet") from None
        return Health(status="ok")

    @app.get("/info", responses=unready, dependencies=[Security(BEARER)], tags=["operation"])
    async def info() -> Info:
        """What runs here: model, labels, limits, backend, versions."""
        return await gateway.info()

    @app.get("/metrics", response_class=Response, tags=["operation"])
    async def prometheus() -> Response:
        """Metrics of every process on this machine, as Prometheus text."""
        content = await gateway.in_thread(metrics.scrape)
        return Response(content, media_type=metrics.CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("/docs")


class DocumentResponse(Response):
    """Answers a document while its body is still arriving.

    Not Starlette's StreamingResponse: that one listens for a disconnect by taking, and dropping,
    the body's messages.
    """

    def __init__(
        self, gateway: Gateway, headers: Headers, options: Options, parameters: Mapping[str, str]
    ) -> None:
        super().__init__()
        self._gateway = gateway
        self._content_type = _content_type(headers)
        self._announced_bytes = int(headers.get("content-length", 0))
        self._event_type = _event_type(headers.get("accept", ""))
        self._options = options
        if self._content_type == JSON and parameters:
            raise Invalid("options of a JSON request go into its body, not into the query")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope[RECORD]
        events = Events(send, self._event_type) if self._event_type else None
        try:
            with self._gateway.admission.admit(self._announced_bytes) as admitted:
                timeout_s = self._gateway.settings.idle_timeout_s
                body = Body(receive, admitted, idle_timeout_s=timeout_s)
                try:
                    answer = await guarded(self._classify(body, events, record), by=body.pump())
                finally:
                    record.stages.append(body.stage())
        except Exception as error:
            if not (events and events.begun) or isinstance(error, ClientGone):
                raise
            record.error = explained(error, record.id)
            await events.end(ErrorEvent(event="error", **error_answer(record.error)))
            return
        record.usage = answer["usage"]
        if events:
            await events.end(ResultEvent(event="result", **answer))
            return
        content = await self._gateway.in_thread(partial(encode, answer))
        timing = {TIMING_HEADERS[name]: str(ms) for name, ms in answer["timing_ms"].items()}
        await Response(content, headers=timing, media_type=JSON)(scope, receive, send)

    async def _classify(self, body: Body, events: Events | None, record: Record) -> Answer:
        options, pieces = self._options, body.pieces(PIECE_BYTES)
        if self._content_type == JSON:
            request = await self._gateway.in_thread(partial(parse, await body.whole()))
            options, pieces = request, cut(request.text.encode(), PIECE_BYTES)
        return await self._gateway.classify(
            f"{record.id}/{uuid.uuid4().hex}",  # clients may give two requests one id
            pieces,
            options,
            began=record.began,
            on_progress=events.send if events else None,
            stages=record.stages,
        )


class Events:
    """An answer in events, NDJSON or SSE. Nothing is sent, no status either, before the first."""

    def __init__(self, send: Send, media_type: str) -> None:
        self.begun = False
        self._send = send
        self._media_type = media_type

    async def send(
        self, event: ProgressEvent | ResultEvent | ErrorEvent, *, more: bool = True
    ) -> None:
        if not self.begun:
            self.begun = True
            headers = [
                (b"content-type", self._media_type.encode()),
                (b"cache-control", b"no-store"),
            ]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        line = encode(event)
        if self._media_type == SSE:
            line = b"event: " + event["event"].encode() + b"\ndata: " + line + b"\n"
        await self._send({"type": "http.response.body", "body": line + b"\n", "more_body": more})

    async def end(self, event: ResultEvent | ErrorEvent) -> None:
        await self.send(event, more=False)


@dataclass
class Record:
    """One request, for its log line, its metrics and its trace."""

    id: str
    began: float = field(default_factory=time.monotonic)
    status: int = CLIENT_GONE
    usage: Usage | None = None
    error: ServiceError | None = None
    stages: list[Stage] = field(default_factory=list)


class Requests:
    """The outermost layer: a request's id, its log line, its metrics, and its errors' answers."""

    def __init__(self, app: ASGIApp, *, stamp_ids: bool) -> None:
        self._app = app
        self._stamp_ids = stamp_ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        record = Record(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        scope[RECORD] = record
        begun = False

        async def stamped(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                record.status = message["status"]
                if self._stamp_ids:
                    MutableHeaders(scope=message)[REQUEST_ID] = record.id
            await send(message)

        try:
            await self._app(scope, receive, stamped)
        except ClientGone:
            record.status = CLIENT_GONE
        except Exception as error:
            record.error = explained(error, record.id)
            if not begun:
                answer = Response(
                    encode(error_answer(record.error)),
                    record.error.status,
                    record.error.headers,
                    media_type=JSON,
                )
                await answer(scope, receive, stamped)
        except asyncio.CancelledError:
            record.status = CLIENT_GONE
            raise
        finally:
            _note(record, scope)


class Authorized:
    """Lets pass what has an API key, or needs none. The body of anything else is not read."""

    def __init__(self, app: ASGIApp, *, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._check(scope)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raises Unauthorized. By default a route is closed: a new one must not be forgotten."""
        if scope["method"] in ("GET", "HEAD") and scope["path"] in OPEN:
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthorized("this needs an API key: send Authorization: Bearer KEY")
        if not self._keys.allow(key.strip()):
            raise Unauthorized("this API key is not, or no longer, one of the service's")


def explained(error: Exception, request_id: str) -> ServiceError:
    """Any exception as one that a client may see. Ours are logged, with the request's id."""
    ours = error if isinstance(error, ServiceError) else ServiceError(INTERNAL)
    if ours.status == 500:
        logger.error("request failed", exc_info=error, extra={"fields": {"id": request_id}})
    return ours


def error_answer(error: ServiceError) -> ErrorAnswer:
    return ErrorAnswer(error=str(error), error_type=error.error_type)


def _note(record: Record, scope: Scope) -> None:
    route = getattr(scope.get("route"), "path", "other")
    seconds = time.monotonic() - record.began
    metrics.REQUESTS.labels(route, str(record.status)).inc()
    metrics.REQUEST_SECONDS.labels(route).observe(seconds)
    fields: dict[str, Any] = {
        "id": record.id,
        "method": scope["method"],
        "route": route,
        "status": record.status,
        "ms": round(1000 * seconds, 1),
        **(record.usage or {}),
    }
    if record.error:
        fields["error_type"] = record.error.error_type
    quiet = record.status == 200 and route in PROBES
    if not quiet and (trace := _trace(record, scope, route)):
        fields["trace_id"] = trace
    logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})


def _trace(record: Record, scope: Scope, route: str) -> str | None:
    """Record the request's span and its stages'; the trace's id, if it is recorded."""
    usage = {f"gma.{name}": value for name, value in (record.usage or {}).items()}
    attributes: dict[str, Any] = {
        "http.request.method": scope["method"],
        "http.route": route,
        "http.response.status_code": record.status,
        "gma.request_id": record.id,
        **usage,
    }
    if record.error:
        attributes["error.type"] = record.error.error_type
    name = f"{scope['method']} {route}"
    failed = record.error is not None and record.error.status >= 500
    span = traces.Span(name, record.began, attributes, record.stages, failed)
    return traces.record(span, Headers(scope=scope))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "")
        raise MethodNotAllowed(f"there is no {what}: this route takes {allow}", allow)
    raise NotFound(f"there is no {what}: /docs lists what there is")


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    raise Invalid(described(error.errors()))


def described(errors: Sequence[Any]) -> str:
    """The first of pydantic's errors as one sentence, with each field's name."""
    return "; ".join(
        f"{'.'.join(map(str, error['loc']))}: {error['msg'][0].lower()}{error['msg'][1:]}"
        for error in errors[:MAX_ERRORS]
    )


def parse(body: bytes) -> DocumentRequest:
    """A JSON request. Raises NotUtf8, NotJson or Invalid."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise NotUtf8(error.start) from None
    try:
        return DocumentRequest.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors()
        if errors[0]["type"] == "json_invalid":
            raise NotJson(f"the body is not JSON: {errors[0]['ctx']['error']}") from None
        raise Invalid(described(errors)) from None


async def cut(text: bytes, most: int) -> AsyncGenerator[tuple[bytes, bool]]:
    """A whole text as if it arrived."""
    for start in range(0, len(text) or 1, most):
        yield text[start : start + most], start + most >= len(text)


def encode(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()


def _content_type(headers: Headers) -> str:
    """TEXT or JSON. Raises UnsupportedContent for anything that is read as neither."""
    send = f"send {TEXT} (curl -H 'Content-Type: {TEXT}' --data-binary @FILE) or {JSON}"
    given = headers.get("content-type")
    if given is None:
        raise UnsupportedContent(f"the request has no Content-Type: {send}")
    kind = given.partition(";")[0].strip().lower()
    if kind not in (TEXT, JSON):
        raise UnsupportedContent(f"Content-Type {given} is not read here: {send}")
    charset = _CHARSET.search(given)
    if charset and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedContent(f"charset {charset[1]} is not read here: send UTF-8")
    coding = headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        raise UnsupportedContent(f"Content-Encoding {coding} is not read here: send plain bytes")
    return kind


def _event_type(accept: str) -> str | None:
    """The first kind of events that the client accepts; None if it wants a single answer."""
    kinds = [kind.partition(";")[0].strip().lower() for kind in accept.split(",")]
    return next((kind for kind in kinds if kind in (NDJSON, SSE)), None)
