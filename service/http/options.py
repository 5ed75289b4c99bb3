"""What a client may say beside its document: in the query, and how long it waits."""

from __future__ import annotations

from typing import Annotated

from fastapi import Header
from pydantic import WithJsonSchema
from starlette.requests import Request

from gma.service.errors import Validation
from gma.service.gateway.contract import Amount

DEADLINE = "x-deadline-ms"

Deadline = Annotated[
    Amount | None,
    WithJsonSchema({"type": "integer", "minimum": 1, "exclusiveMaximum": 2**31}),  # no null
    Header(
        alias=DEADLINE,
        description="How long the client waits, from the request on: 504 after that.",
    ),
]


def check_given_once(request: Request) -> None:
    """Raises Validation if the query has an option twice, or a head two deadlines: of two that
    differ, either could be meant."""
    if len(request.query_params) < len(request.query_params.multi_items()):
        raise Validation("an option is given twice in the query")
    if len(request.headers.getlist(DEADLINE)) > 1:
        raise Validation(f"{DEADLINE} is given twice")
