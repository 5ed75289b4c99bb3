"""What the OpenAPI page says of routes that FastAPI can't read off their functions."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI

from gma.service.gateway.contract import DocumentRequest, ErrorAnswer
from gma.service.http.auth import OPEN, ROOT_POST
from gma.service.http.media import BINARY, JSON, NDJSON, SSE, TEXT

NO_MODEL = "There is no model of that name."

ERRORS = {
    400: "Not UTF-8, not JSON, or empty.",
    404: NO_MODEL,
    408: "The body came too slowly, or stopped.",
    413: "Larger than the limit, or longer than a bidirectional model keeps of a document.",
    415: "A Content-Type that is not read here.",
    422: "A field or parameter is unknown or out of range.",
    429: "Too much in flight, or the key's allowance is spent: nothing of the request was "
    "processed. See Retry-After.",
    500: "The service failed; its log says why, under the request's id.",
    503: "Starting, draining, or the worker was lost. See Retry-After.",
    504: "The deadline of x-deadline-ms has passed, or is too soon for so much text.",
}


def _error(text: str, model: Any = ErrorAnswer) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"description": text, "content": {JSON: {"schema": schema}}}


def _errors(texts: Mapping[int, str], model: Any = ErrorAnswer) -> dict[int | str, dict[str, Any]]:
    """What is said of errors with a body of `model`: the first one brings it along, for FastAPI
    makes it anew for each that does, which would be most of the time that a start takes."""
    first, *_ = texts
    return {
        **{status: _error(text, model) for status, text in texts.items()},
        first: {"model": model, "description": texts[first]},
    }


DOCUMENT_BODY = {
    "required": True,
    "content": {
        TEXT: {
            "schema": {"type": "string", "description": "The document, in UTF-8.", "minLength": 1}
        },
        JSON: {"schema": DocumentRequest.model_json_schema()},
    },
}

DOCUMENT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; as events if asked for.",
        "content": {
            NDJSON: {
                "example": '{"event":"progress","bytes":900,"tokens":256,"labels":["a"]}\n'
                '{"event":"result","model":"contracts","labels":["a"],"scores":[...],...}\n'
            },
            SSE: {"example": 'event: progress\ndata: {"event":"progress",...}\n\n'},
        },
    },
    **_errors(ERRORS),
}


BATCH_BODY = {
    "required": True,
    "content": {
        NDJSON: {
            "schema": {"type": "string", "description": "A JSON object a line."},
            "example": '{"id": "a", "text": "Call me Ishmael.", "top_k": 5}\n{"text": "Hello."}\n',
        }
    },
}

BATCH_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A line for each that was sent: the document's answer, or an error.",
        "content": {
            NDJSON: {
                "schema": {"type": "string"},
                "example": '{"id":"a","line":1,"model":"contracts","labels":["a"],...}\n'
                '{"id":2,"line":2,"error":"...","error_type":"Empty","status":400}\n',
            }
        },
    },
    **{
        status: {"model": ErrorAnswer, "description": ERRORS[status]}
        for status in (404, 408, 415, 422, 429, 500, 503)
    },
}


def error_responses(
    model: Any, statuses: Mapping[int, int] = MappingProxyType({})
) -> dict[int | str, dict[str, Any]]:
    """What is said of errors that are told as another server does: with a body of `model`, and
    with those of `statuses` in place of ours."""
    texts = {**ERRORS, 404: "No such route, or model.", 405: "No such method of this route."}
    found: dict[int, str] = {}
    for status, text in texts.items():
        before = found.setdefault(statuses.get(status, status), text)
        found[statuses.get(status, status)] = " ".join(dict.fromkeys([before, text]))
    return _errors(found, model)


APPEND_BODY = {
    "required": True,
    "content": {TEXT: {"schema": {"type": "string", "description": "Text, cut anywhere."}}},
}

SNAPSHOT_BODY = {
    "required": False,
    "content": {
        BINARY: {"schema": {"type": "string", "format": "binary", "description": "A snapshot."}}
    },
}

SNAPSHOT_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The snapshot, as safetensors.",
        "content": {BINARY: {"schema": {"type": "string", "format": "binary"}}},
    }
}

SESSION_ERRORS = {
    400: "Not UTF-8.",
    404: "No such session, or another key's; or no such model.",
    408: ERRORS[408],
    409: "The session ends elsewhere, at Upload-Offset; also for one of two writers at once.",
    410: "The session has expired, or was read by another model than runs now.",
    413: "Larger than the limit.",
    415: "The body is of another kind.",
    422: "A field or parameter is unknown or out of range, or the snapshot can't be taken.",
    429: ERRORS[429],
    500: ERRORS[500],
    501: "No sessions are kept here, or not of such a model.",
    503: "Starting, draining, the worker was lost, or the store can't be used. See Retry-After.",
    507: "The store is full.",
}

SESSION_RESPONSES = _errors(SESSION_ERRORS)

ANY_RESPONSES = {
    400: "The request can't be read.",
    404: "No such route.",
    405: "No such method of this route. See Allow.",
    414: "The request's target is too long.",
    431: "The request's headers are too large.",
    500: "The service failed; its log says why, under the request's id.",
}
"""What a request can get whatever it asks for."""

UNREADY_RESPONSES = _errors({503: "Starting, draining, or no worker."})

MODEL_RESPONSES = _errors({404: NO_MODEL, 422: ERRORS[422], 503: "It has yet to start."})

INFO_RESPONSES = _errors({404: NO_MODEL, 422: ERRORS[422], 503: "No worker."})


class Described(FastAPI):
    """An application whose description has what is true of every route."""

    asks_for_keys = False

    def openapi(self) -> dict[str, Any]:
        """The description; made once."""
        if self.openapi_schema:
            return self.openapi_schema
        schema = super().openapi()
        if self.asks_for_keys:
            schema["components"]["securitySchemes"] = {
                "Bearer": {"type": "http", "scheme": "bearer"}
            }
        for path, methods in schema["paths"].items():
            for name, method in methods.items():
                for status, text in ANY_RESPONSES.items():
                    method["responses"].setdefault(str(status), _error(text))
                asks = path not in OPEN or (name.upper(), path) == ROOT_POST
                if self.asks_for_keys and asks:
                    method["security"] = [{"Bearer": []}]
                    method["responses"].setdefault("401", _error("No API key, or a wrong one."))
        return schema
