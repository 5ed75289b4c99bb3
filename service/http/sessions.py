"""/v1/sessions: documents that are kept open, and read as they grow."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Annotated

from fastapi import FastAPI, Header, Path, Query
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gma.service.errors import UnsupportedContent
from gma.service.gateway.contract import (
    AppendOptions,
    ModelName,
    Offset,
    SessionAnswer,
    SessionOptions,
    SessionState,
)
from gma.service.gateway.gateway import Gateway
from gma.service.gateway.sessions import Sessions
from gma.service.http.auth import clients_of
from gma.service.http.body import Body
from gma.service.http.documents import TIMING_HEADERS, announced_bytes
from gma.service.http.media import BINARY, JSON, TEXT, document_type, encode, shown
from gma.service.http.middleware import RECORD, Record
from gma.service.http.openapi import (
    APPEND_BODY,
    SESSION_RESPONSES,
    SNAPSHOT_BODY,
    SNAPSHOT_RESPONSE,
)
from gma.service.http.options import check_given_once
from gma.service.tasks import guarded

OFFSET = "upload-offset"

Id = Annotated[str, Path(description="as POST /v1/sessions told it", min_length=1)]


def add_sessions(app: FastAPI, gateway: Gateway, sessions: Sessions) -> None:
    """Give `app` the routes of sessions."""

    @app.post(
        "/v1/sessions",
        status_code=201,
        summary="Begin a session, or resume one from a snapshot",
        response_model=SessionState,
        responses=SESSION_RESPONSES,
        openapi_extra={"requestBody": SNAPSHOT_BODY},
        tags=["sessions"],
    )
    async def create(
        request: Request,
        model: Annotated[
            ModelName | None, Query(description="which is to read it; of a snapshot its own")
        ] = None,
    ) -> Response:
        """Without a body, a document of which nothing has come. With a snapshot as body, one that
        goes on from there, in whatever state the session is that it was taken of."""
        check_given_once(request)

        async def act(body: Body, record: Record) -> Response:
            snapshot = b"".join([piece async for piece, _ in body.pieces()])
            if not snapshot:
                return _told(await sessions.create(_owner(record), gateway.models.choose(model)))
            _check_binary(request)
            chosen = None if model is None else gateway.models.choose(model)
            return _told(await sessions.resume(_owner(record), snapshot, chosen))

        sessions.check()
        return Exchange(gateway, request, act)

    @app.patch(
        "/v1/sessions/{session_id}",
        summary="Append to a session",
        response_model=SessionAnswer,
        responses=SESSION_RESPONSES,
        openapi_extra={"requestBody": APPEND_BODY},
        tags=["sessions"],
    )
    async def append(
        request: Request,
        session_id: Id,
        options: Annotated[AppendOptions, Query()],
        upload_offset: Annotated[
            Offset, Header(description="where in the document the body begins: bytes so far")
        ],
    ) -> Response:
        """The body is text, cut anywhere, inside a character too. It is kept when the answer comes,
        which is what the document would be answered if it ended here; a last character that is
        unfinished is not read yet. Whatever goes wrong, nothing has changed: send it again, from
        the offset that the session then has."""
        if document_type(request.headers) != TEXT:
            raise UnsupportedContent(f"what is appended is {TEXT}, cut anywhere")
        check_given_once(request)

        async def act(body: Body, record: Record) -> Response:
            await body.chunk()
            async with aclosing(body.pieces()) as pieces:
                answer = await sessions.append(
                    _owner(record),
                    session_id,
                    upload_offset,
                    pieces,
                    options,
                    began=record.began,
                )
            timing = answer.get("timing_ms", {})
            headers = {TIMING_HEADERS[name]: str(ms) for name, ms in timing.items()}
            return _told(answer, 200, headers)

        sessions.check()
        return Exchange(gateway, request, act)

    @app.get(
        "/v1/sessions/{session_id}",
        summary="What a session says so far",
        response_model=SessionAnswer,
        responses=SESSION_RESPONSES,
        tags=["sessions"],
    )
    async def answer(
        request: Request, session_id: Id, options: Annotated[SessionOptions, Query()]
    ) -> Response:
        """The last append's answer. It does not keep the session longer."""
        check_given_once(request)
        return _told(await sessions.answer(_asks(request), session_id, options), 200)

    @app.post(
        "/v1/sessions/{session_id}/fork",
        status_code=201,
        summary="Begin a session with the same past",
        response_model=SessionState,
        responses=SESSION_RESPONSES,
        tags=["sessions"],
    )
    async def fork(request: Request, session_id: Id) -> Response:
        """The two go on without each other."""

        async def act(body: Body, record: Record) -> Response:
            return _told(await sessions.fork(_owner(record), session_id))

        return Exchange(gateway, request, act)

    @app.get(
        "/v1/sessions/{session_id}/snapshot",
        summary="All of a session, to resume it later",
        response_class=Response,
        responses={**SESSION_RESPONSES, **SNAPSHOT_RESPONSE},
        tags=["sessions"],
    )
    async def snapshot(request: Request, session_id: Id) -> Response:
        """As safetensors, with a checksum. Some of the text's last bytes are in it."""
        content = await sessions.snapshot(_asks(request), session_id)
        return Response(content, media_type=BINARY)

    @app.delete(
        "/v1/sessions/{session_id}",
        status_code=204,
        summary="End a session",
        response_class=Response,
        responses=SESSION_RESPONSES,
        tags=["sessions"],
    )
    async def delete(request: Request, session_id: Id) -> Response:
        """It is gone at once, its forks and snapshots are not."""
        await sessions.delete(_asks(request), session_id)
        return Response(status_code=204)


class Exchange(Response):
    """Answers a request while its body is still arriving, with a place among all documents."""

    def __init__(
        self,
        gateway: Gateway,
        request: Request,
        act: Callable[[Body, Record], Awaitable[Response]],
    ) -> None:
        super().__init__()
        self._gateway = gateway
        self._act = act
        self._announced_bytes = announced_bytes(request.headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ServiceError, and ClientGone."""
        record: Record = scope[RECORD]
        clients = clients_of(scope, self._gateway.settings)
        with self._gateway.admission.admit(
            self._announced_bytes, clients, key=record.key
        ) as admitted:
            body = Body(receive, admitted, self._gateway.settings)
            answer = await guarded(self._acting(body, record), by=body.pump())
            admitted.leave(len(answer.body))
            await answer(scope, receive, send)

    async def _acting(self, body: Body, record: Record) -> Response:
        try:
            return await self._act(body, record)
        finally:
            record.stages.append(body.stage())


def _owner(record: Record) -> str:
    """Whose session it is: of a key, or anybody's."""
    return record.key.hash if record.key else ""


def _asks(request: Request) -> str:
    return _owner(request.scope[RECORD])


def _told(
    state: SessionState | SessionAnswer, status: int = 201, headers: dict[str, str] | None = None
) -> Response:
    headers = {OFFSET: str(state["offset"]), **(headers or {})}
    if status == 201:
        headers["location"] = f"/v1/sessions/{state['id']}"
    return Response(encode(state), status, headers, media_type=JSON)


def _check_binary(request: Request) -> None:
    kind = ", ".join(request.headers.getlist("content-type"))
    if kind.partition(";")[0].strip().lower() != BINARY:
        raise UnsupportedContent(
            f"a body is a snapshot of Content-Type {BINARY}, not {shown(kind) or 'none'}: without "
            "one a new session begins"
        )
