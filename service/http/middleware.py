"""What every request gets: an id, a line in the log, its metrics, its span, and errors' answers."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gma.service.errors import ServiceError
from gma.service.gateway.allowance import Key
from gma.service.gateway.contract import ErrorAnswer, Usage
from gma.service.http.body import ClientGone
from gma.service.http.media import JSON, encode, shown
from gma.service.observe import metrics, traces
from gma.service.observe.traces import Stage

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
# What a client may choose as its request's id: it goes into logs and headers.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

# What a route may have in front that is another without: both are the same to whoever counts.
_OF_MODEL = re.compile(r"(?<=^/v1)/models/\{model\}(?=/)|^/models/\{model\}(?=/)")

RECORD = "gma.record"
"""Where in ASGI's scope a request's `Record` is."""

PROBES = ("/health", "/metrics", "/v2/health/live", "/v2/health/ready")
"""Asked every few seconds by machines: their successes would drown the log."""

CLIENT_GONE = 499

INTERNAL = "the service failed; its log says why, under the x-request-id of this answer"


ErrorForm: TypeAlias = Callable[[ServiceError], tuple[int, Any]]
"""How an error is told: the answer's status, and its body, which becomes JSON."""


@dataclass
class Record:
    """One request, for its log line, its metrics and its span."""

    id: str
    began: float = field(default_factory=time.monotonic)
    status: int = CLIENT_GONE
    usage: Usage | None = None
    error: ServiceError | None = None
    key: Key | None = None
    """With which it came; None if none is asked for."""
    stages: list[Stage] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)
    """Of a batch: how many `lines` there were, and `failed_lines`."""

    def add(self, usage: Usage) -> None:
        """Note what one of several documents took."""
        so_far = self.usage or Usage(bytes=0, tokens=0, chunks=0)
        self.usage = Usage(
            bytes=so_far["bytes"] + usage["bytes"],
            tokens=so_far["tokens"] + usage["tokens"],
            chunks=so_far["chunks"] + usage["chunks"],
        )

    def fail(self, error: Exception) -> ServiceError:
        """Note what went wrong, and return what a client may see of it. Ours to mend is logged."""
        self.error = self.told(error)
        return self.error

    def told(self, error: Exception) -> ServiceError:
        """What a client may see of what went wrong with a part. Ours to mend is logged."""
        seen = error if isinstance(error, ServiceError) else ServiceError(INTERNAL)
        if seen.status == 500:
            logger.error("request failed", exc_info=error, extra={"fields": {"id": self.id}})
        return seen


class Requests:
    """The outermost layer. Whatever those within raise becomes an answer here, unless one began.

    HEAD is answered as GET without the body, a path with a slash at its end as without, and one
    behind the prefix as without.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        stamp_ids: bool,
        prefix: str = "",
        form_of: Callable[[str], ErrorForm | None] = lambda _: None,
    ) -> None:
        """`stamp_ids`: put the request's id into its answer. `prefix` begins with a slash, if there
        is one. `form_of`: how errors are told at a path, if not as ours."""
        self._app = app
        self._prefix = prefix
        self._form_of = form_of
        self._stamp_ids = stamp_ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        inner = self._within(path).removesuffix("/") or "/"
        headless = method == "HEAD"
        # The server looks at its own scope to know what it may send.
        scope = {
            **scope,
            "method": "GET" if headless else method,
            "path": self._prefix + inner,
            "root_path": self._prefix,
        }
        record = Record(request_id(Headers(scope=scope)))
        scope[RECORD] = record
        begun = False

        async def stamped(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                record.status = message["status"]
                if self._stamp_ids:
                    MutableHeaders(scope=message)[REQUEST_ID] = record.id
            elif headless:
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._app(scope, receive, stamped)
        except ClientGone as gone:
            record.status = CLIENT_GONE
            forget_frames(gone)
        except Exception as error:
            failure = record.fail(error)
            forget_frames(error)
            if not begun:
                status, told = (self._form_of(inner) or _ours)(failure)
                answer = Response(encode(told), status, failure.headers, media_type=JSON)
                await answer(scope, receive, stamped)
        except asyncio.CancelledError:
            record.status = CLIENT_GONE
            raise
        finally:
            _note(record, scope, method)

    def _within(self, path: str) -> str:
        inner = path.removeprefix(self._prefix)
        return inner if inner[:1] in ("", "/") else path


def forget_frames(error: BaseException | None) -> None:
    """Let go of a request's body now: a traceback's frames have it, and often the error itself, so
    that it would stay until the garbage collector comes."""
    while error:
        error.__traceback__ = None
        error.__context__, error = None, error.__context__


def request_id(headers: Headers) -> str:
    """The client's for its request, or a new one."""
    given = headers.get(REQUEST_ID, "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def asked(scope: Scope) -> str:
    """Method and path of a request, as far as a message may repeat them."""
    return f"{shown(scope['method'])} {shown(scope['path'])}"


def error_answer(error: ServiceError) -> ErrorAnswer:
    """The error as clients get it."""
    return ErrorAnswer(error=error.message, error_type=error.error_type)


def _ours(error: ServiceError) -> tuple[int, Any]:
    return error.status, error_answer(error)


def _note(record: Record, scope: Scope, method: str) -> None:
    """Count the request, and write its line and its span."""
    route = _OF_MODEL.sub("", getattr(scope.get("route"), "path", "other"))
    seconds = time.monotonic() - record.began
    metrics.REQUESTS.labels(route, str(record.status)).inc()
    metrics.REQUEST_SECONDS.labels(route).observe(seconds)
    fields: dict[str, Any] = {
        "id": record.id,
        "method": method,
        "route": route,
        "status": record.status,
        "ms": round(1000 * seconds, 1),
        **(record.usage or {}),
        **record.lines,
    }
    if record.key:
        fields["key"] = record.key.name
    if record.error:
        fields["error_type"] = record.error.error_type
    quiet = record.status == 200 and route in PROBES
    if not quiet and (trace := _trace(record, scope, route, method)):
        fields["trace_id"] = trace
    logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})


def _trace(record: Record, scope: Scope, route: str, method: str) -> str | None:
    """Record the request's span and its stages'; the trace's id, if it is recorded."""
    usage = {f"gma.{name}": value for name, value in (record.usage or {}).items()}
    attributes: dict[str, Any] = {
        "http.request.method": method,
        "http.route": route,
        "http.response.status_code": record.status,
        "gma.request_id": record.id,
        **usage,
    }
    if record.error:
        attributes["error.type"] = record.error.error_type
    name = f"{method} {route}"
    failed = record.error is not None and record.error.status >= 500
    span = traces.Span(name, record.began, attributes, record.stages, failed)
    return traces.record(span, Headers(scope=scope))
