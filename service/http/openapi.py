"""What the OpenAPI page says of routes that FastAPI can't read off their functions."""

from __future__ import annotations

from typing import Any

from fastapi.security import HTTPBearer

from gma.service.gateway.contract import DocumentRequest, ErrorAnswer
from gma.service.http.media import JSON, NDJSON, SSE, TEXT

BEARER = HTTPBearer(auto_error=False, description="Asked for where API keys are configured.")
"""A key, for the page alone: `gma.service.http.auth` has decided before."""

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

DOCUMENT_BODY = {
    "required": True,
    "content": {
        TEXT: {"schema": {"type": "string", "description": "The document, in UTF-8."}},
        JSON: {"schema": DocumentRequest.model_json_schema()},
    },
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

UNREADY_RESPONSES: dict[int | str, dict[str, Any]] = {
    503: {"model": ErrorAnswer, "description": "Starting, draining, or no worker."}
}
