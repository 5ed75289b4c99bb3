"""POST /, as the Hugging Face Inference API has it for text classification."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from fastapi import FastAPI
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from gma.service.errors import ServiceError
from gma.service.gateway.contract import ErrorAnswer, ModelName
from gma.service.gateway.document import Pieces
from gma.service.gateway.gateway import Gateway
from gma.service.gateway.scores import scores
from gma.service.http.media import encode
from gma.service.http.openapi import error_responses
from gma.service.http.options import Deadline
from gma.service.http.protocols.fields import Fields, Short, Texts, Whole, body_of
from gma.service.http.protocols.tei import Prediction
from gma.service.http.texts import Finding, Question, Rendered, TextsResponse

PATH = "/"

PATHS = PATH, "/models/{model}"
"""The second is that of the Hugging Face hub's own API."""

STATUSES = {422: 400}
"""Theirs for ours, where it is another."""


class Parameters(Fields):
    """How to answer."""

    top_k: Annotated[int, Field(ge=1), Whole] | None = None
    """The best so many labels; all by default."""

    function_to_apply: Annotated[Literal["sigmoid", "softmax", "none"], Short] | None = None
    """What makes scores of logits; by default what the model was made for."""


class ClassificationRequest(Fields):
    """Texts to classify."""

    inputs: Texts
    """A text, or a list of them."""

    parameters: Parameters | None = None


def failure(error: ServiceError) -> tuple[int, ErrorAnswer]:
    """The error as their clients know it."""
    status = STATUSES.get(error.status, error.status)
    return status, ErrorAnswer(error=error.message, error_type=error.error_type)


def add(app: FastAPI, gateway: Gateway) -> None:
    """Give `app` the route that `gateway` answers."""

    async def parse(model: str | None, body: Pieces) -> Question:
        asked = await ClassificationRequest.read(body)
        how = asked.parameters or Parameters()

        def render(found: Finding) -> Rendered:
            values = found.scores
            if how.function_to_apply == "none":
                values = found.logits
            elif how.function_to_apply:
                values = scores(found.logits, how.function_to_apply == "sigmoid")
            return Rendered(encode([*found.ranked(values, how.top_k)]))

        place = "inputs" if asked.inputs.listed else None
        return Question(asked.inputs.texts, place, render, gateway.models.choose(model))

    async def classification(
        request: Request, model: ModelName | None = None, x_deadline_ms: Deadline = None
    ) -> Response:
        """For each text the scores of its labels, best first; in a list also if there is one text
        alone."""
        return TextsResponse(gateway, request, partial(parse, model), deadline_ms=x_deadline_ms)

    for path in PATHS:
        app.post(
            path,
            summary="Classify texts, as the Hugging Face Inference API does",
            response_model=list[list[Prediction]],
            responses=error_responses(ErrorAnswer, STATUSES),
            openapi_extra={"requestBody": body_of(ClassificationRequest)},
            tags=["other servers' clients"],
        )(classification)
