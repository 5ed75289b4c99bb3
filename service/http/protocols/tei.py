"""POST /predict and /invocations, as text-embeddings-inference has them."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import FastAPI
from pydantic import BeforeValidator, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from gma.service.errors import ServiceError
from gma.service.gateway.contract import ErrorAnswer, ModelName
from gma.service.gateway.document import Pieces
from gma.service.gateway.gateway import Gateway
from gma.service.http.media import encode
from gma.service.http.openapi import error_responses
from gma.service.http.options import Deadline
from gma.service.http.protocols.fields import TEXT_SCHEMA, TEXTS_SCHEMA, Fields, Texts, body_of
from gma.service.http.texts import Finding, Question, Rendered, TextsResponse

PATHS = "/predict", "/invocations"

MODEL = "/models/{model}"
"""What may stand in front of them: their clients know a server by its URL, and name no model."""

STATUSES = {500: 424}
"""Theirs for ours, where it is another."""

ERROR_TYPES = {413: "Validation", 429: "Overloaded", 500: "Backend", 503: "Unhealthy"}
"""How they call what has such a status of ours; other errors have our names."""


def _unnested(given: object) -> object:
    """The texts of a list in which each has a list of its own, as a batch was first written."""
    if not isinstance(given, list):
        return given
    for n, each in enumerate(given):
        if isinstance(each, list) and len(each) != 1:
            raise ValueError(
                f"input {n} of the list is a list of {len(each)}: this model reads texts by "
                "themselves, not in pairs"
            )
    return [each[0] if isinstance(each, list) else each for each in given]


class PredictRequest(Fields):
    """Texts to classify."""

    inputs: Annotated[
        Texts,
        BeforeValidator(_unnested),
        WithJsonSchema(
            {
                "anyOf": [
                    TEXT_SCHEMA,
                    TEXTS_SCHEMA,
                    TEXTS_SCHEMA | {"items": TEXTS_SCHEMA | {"maxItems": 1}},
                ]
            }
        ),
    ]
    """A text, or a list of them, each of which may be in a list of its own. No pairs."""

    raw_scores: bool = False
    """Answer logits in place of scores."""

    truncate: bool | None = None
    """Nothing is cut that the model can read: of a bidirectional model, what is beyond the tokens
    that it keeps of a document is left out, and else refused."""


class Prediction(TypedDict):
    """What is said about one label."""

    label: str
    score: float


def failure(error: ServiceError) -> tuple[int, ErrorAnswer]:
    """The error as their clients know it."""
    error_type = ERROR_TYPES.get(error.status, error.error_type)
    status = STATUSES.get(error.status, error.status)
    return status, ErrorAnswer(error=error.message, error_type=error_type)


def add(app: FastAPI, gateway: Gateway) -> None:
    """Give `app` the routes that `gateway` answers."""

    async def parse(name: str | None, body: Pieces) -> Question:
        asked = await PredictRequest.read(body)

        def render(found: Finding) -> Rendered:
            ranked = [*found.ranked(found.logits if asked.raw_scores else found.scores)]
            return Rendered(encode(ranked if asked.inputs.listed else ranked[0]))

        model = gateway.models.choose(name)
        most = (await model.workers.info())["max_document_tokens"] if asked.truncate else None
        place = "inputs" if asked.inputs.listed else None
        return Question(asked.inputs.texts, place, render, model, most)

    async def predict(
        request: Request, model: ModelName | None = None, x_deadline_ms: Deadline = None
    ) -> Response:
        """Scores of all labels, best first; of a list of texts, a list of them. A multi-label
        model's scores are each label's own, and do not sum to one."""
        return TextsResponse(gateway, request, partial(parse, model), deadline_ms=x_deadline_ms)

    for path in (*PATHS, *(MODEL + path for path in PATHS)):
        app.post(
            path,
            summary="Classify texts, as text-embeddings-inference does",
            operation_id=path[1:].replace(MODEL[1:], "model"),
            response_model=list[Prediction] | list[list[Prediction]],
            responses=error_responses(ErrorAnswer, STATUSES),
            openapi_extra={"requestBody": body_of(PredictRequest)},
            tags=["other servers' clients"],
        )(predict)
