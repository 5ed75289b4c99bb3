"""POST /classify and /v1/classify, as vLLM and SGLang have them."""

from __future__ import annotations

import time
from typing import Annotated, Literal

from fastapi import FastAPI
from pydantic import AfterValidator, Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from gma.service.errors import ServiceError
from gma.service.gateway.document import Pieces
from gma.service.gateway.gateway import Gateway
from gma.service.http.media import encode
from gma.service.http.openapi import error_responses
from gma.service.http.options import Deadline
from gma.service.http.protocols.fields import Fields, Name, Short, Texts, Whole, body_of
from gma.service.http.texts import Finding, Question, Rendered, TextsResponse

PATHS = "/classify", "/v1/classify"

STATUSES = {422: 400}
"""Theirs for ours, where it is another."""

ERROR_TYPES = {
    401: "AuthenticationError",
    404: "NotFoundError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}
"""By status; all others are errors of the request."""


def _some(tokens: int) -> int:
    if not tokens:
        raise ValueError("of no token there is nothing to say")
    return tokens


class ClassifyRequest(Fields):
    """Texts to classify."""

    model: Name | None = None
    """As `GET /v1/models` names it; one alone need not be named."""

    input: Texts
    """A text, or a list of them. No tokens."""

    truncate_prompt_tokens: (
        Annotated[
            int,
            Field(ge=-1, lt=2**31),
            AfterValidator(_some),
            Whole,
            WithJsonSchema(
                {
                    "anyOf": [
                        {"const": -1},
                        {"type": "integer", "minimum": 1, "exclusiveMaximum": 2**31},
                    ]
                }
            ),
        ]
        | None
    ) = None
    """Read no more than the first so many tokens of each text. Nothing is cut by default, nor by
    -1."""

    truncation_side: Annotated[Literal["right"], Short] | None = None
    """The end at which to cut: a text is read from its beginning."""

    use_activation: bool | None = None
    """Whether `probs` are scores, as by default, or logits."""

    activation: bool | None = None
    """What `use_activation` was called before."""


class Classified(TypedDict):
    """What is said about one text."""

    index: int
    label: Annotated[
        str | None,
        Field(
            description="the best label that is there, null if there is none: a multi-label model "
            "may say several, or none, and one that abstains none"
        ),
    ]
    probs: Annotated[list[float], Field(description="of each label, as GET /info lists them")]
    num_classes: int


class TokenUsage(TypedDict):
    """How much was read."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


class ClassifyAnswer(TypedDict):
    """Classified texts."""

    id: str
    object: Literal["list"]
    created: Annotated[int, Field(description="in seconds, as Unix has them")]
    model: str
    data: list[Classified]
    usage: TokenUsage


class ErrorInfo(TypedDict):
    """What is wrong, as OpenAI tells it."""

    message: str
    type: str
    param: str | None
    code: int


class OpenAIError(TypedDict):
    """Any answer whose status is not 2xx."""

    error: ErrorInfo


def failure(error: ServiceError) -> tuple[int, OpenAIError]:
    """The error as their clients know it."""
    status = STATUSES.get(error.status, error.status)
    told = ErrorInfo(
        message=error.message,
        type=ERROR_TYPES.get(status, "BadRequestError"),
        param=error.place,
        code=status,
    )
    return status, OpenAIError(error=told)


def add(app: FastAPI, gateway: Gateway) -> None:
    """Give `app` the routes that `gateway` answers."""

    async def parse(body: Pieces) -> Question:
        asked = await ClassifyRequest.read(body)
        model = gateway.models.choose(asked.model)
        most = asked.truncate_prompt_tokens
        logits = False in (asked.use_activation, asked.activation)

        def render(found: Finding) -> Rendered:
            probs = found.logits if logits else found.scores
            answer = ClassifyAnswer(
                id=f"classify-{found.id}",
                object="list",
                created=int(time.time()),
                model=found.config.name,
                data=[
                    Classified(index=n, label=label, probs=row, num_classes=len(row))
                    for n, (label, row) in enumerate(zip(found.labels, probs.tolist(), strict=True))
                ],
                usage=TokenUsage(
                    prompt_tokens=found.usage["tokens"],
                    total_tokens=found.usage["tokens"],
                    completion_tokens=0,
                ),
            )
            return Rendered(encode(answer))

        place = "input" if asked.input.listed else None
        return Question(asked.input.texts, place, render, model, None if most == -1 else most)

    async def classify(request: Request, x_deadline_ms: Deadline = None) -> Response:
        """For each text the best label, and the scores of all."""
        return TextsResponse(gateway, request, parse, deadline_ms=x_deadline_ms)

    for path in PATHS:
        app.post(
            path,
            summary="Classify texts, as vLLM and SGLang do",
            operation_id=path[1:].replace("/", "_"),
            response_model=ClassifyAnswer,
            responses=error_responses(OpenAIError, STATUSES),
            openapi_extra={"requestBody": body_of(ClassifyRequest)},
            tags=["other servers' clients"],
        )(classify)
