"""The Open Inference Protocol, version 2, over HTTP, as KServe and Triton speak it, with the
extension for binary tensors."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any, NotRequired

from fastapi import FastAPI
from pydantic import Field
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from gma.service.errors import NotJson, ServiceError, Validation
from gma.service.gateway.document import Pieces
from gma.service.gateway.gateway import Gateway
from gma.service.http.json_document import MOST_VALUES, JsonText, parsed_object, too_many
from gma.service.http.media import JSON, encode, shown
from gma.service.http.openapi import error_responses
from gma.service.http.options import Deadline
from gma.service.http.protocols.fields import Fields, Name, Whole, body_of
from gma.service.http.readiness import Readiness
from gma.service.http.texts import Finding, PlainText, Question, Rendered, Text, TextsResponse

PATH = "/v2"

STATUSES = {422: 400}
"""Theirs for ours, where it is another."""

JSON_BYTES = "inference-header-content-length"
"""The header that says how much of a body is JSON; binary tensors follow."""

BINARY = "application/octet-stream"

MOST_DIGITS = 9
"""Of that header."""

LENGTH = struct.Struct("<I")
"""In front of each text of a binary tensor."""

INPUT, LABEL, SCORES = "text", "label", "scores"


class TensorParameters(Fields):
    """How an input is sent."""

    binary_data_size: Annotated[int, Field(ge=0), Whole] | None = None
    """Its bytes behind the JSON, in place of `data`."""

    shared_memory_region: Name | None = None
    """Not taken."""


class Tensor(Fields):
    """An input."""

    name: Name
    """text; there is no other."""

    shape: Annotated[list[Annotated[int, Field(ge=0), Whole]], Field(min_length=1, max_length=2)]
    """[texts], or [texts, 1]."""

    datatype: Name
    """BYTES."""

    parameters: TensorParameters | None = None

    data: list[Any] | None = None
    """The texts, in a list of their own or not."""


class OutputParameters(Fields):
    """How an output is told."""

    binary_data: bool | None = None
    """Behind the JSON."""

    classification: Annotated[int, Whole] | None = None
    """Not answered."""

    shared_memory_region: Name | None = None
    """Not taken."""


class RequestedOutput(Fields):
    """An output that is wanted."""

    name: Name
    """label or scores."""

    parameters: OutputParameters | None = None


class InferParameters(Fields):
    """How to answer."""

    binary_data_output: bool | None = None
    """Whether outputs that do not say so themselves are binary."""


class InferRequest(Fields):
    """Texts to classify."""

    id: Name | None = None
    """Comes back with the answer."""

    parameters: InferParameters | None = None

    inputs: list[Tensor]
    """One, called text."""

    outputs: list[RequestedOutput] | None = None
    """All by default."""


class OutputTensor(TypedDict):
    """An output."""

    name: str
    datatype: str
    shape: list[int]
    parameters: NotRequired[dict[str, int]]
    data: NotRequired[list[Any]]


class InferAnswer(TypedDict):
    """Classified texts."""

    model_name: str
    id: NotRequired[str]
    outputs: list[OutputTensor]


class ServerMetadata(TypedDict):
    """What answers."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(TypedDict):
    """The process answers."""

    live: bool


class ServerReady(TypedDict):
    """Texts are classified."""

    ready: bool


class ModelReady(TypedDict):
    """Texts are classified by this model."""

    name: str
    ready: bool


class TensorMetadata(TypedDict):
    """What an input or an output is like."""

    name: str
    datatype: str
    shape: list[int]


class ModelParameters(TypedDict):
    """What the outputs mean."""

    labels: Annotated[list[str], Field(description="of the columns of scores")]
    multi_label: bool
    thresholds: list[float] | None


class ModelMetadata(TypedDict):
    """A model, and what it takes and gives."""

    name: str
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: ModelParameters


class V2Error(TypedDict):
    """Any answer whose status is not 2xx."""

    error: str


def failure(error: ServiceError) -> tuple[int, V2Error]:
    """The error as their clients know it."""
    return STATUSES.get(error.status, error.status), V2Error(error=error.message)


def add(app: FastAPI, gateway: Gateway, check_ready: Readiness) -> None:
    """Give `app` the routes that `gateway` answers."""
    responses = error_responses(V2Error, STATUSES)
    unready = {status: responses[status] for status in (404, 405, 503)}
    about: dict[str, Any] = {"responses": unready, "tags": ["other servers' clients"]}

    @app.get("/v2", summary="The server, for V2 clients", **about)
    async def server() -> ServerMetadata:
        """Name, version, and which extensions of the protocol are spoken."""
        return ServerMetadata(
            name="gma-service",
            version=version("gma-service"),
            extensions=["binary_tensor_data"],
        )

    @app.get("/v2/health/live", summary="Whether the process answers", **about)
    async def live() -> ServerLive:
        """Always, if there is an answer."""
        return ServerLive(live=True)

    @app.get("/v2/health/ready", summary="Whether texts are classified, as /health", **about)
    async def ready() -> ServerReady:
        """200 once a worker is warm, until the service drains."""
        await check_ready()
        return ServerReady(ready=True)

    @app.get("/v2/models/{model}", summary="The model, for V2 clients", **about)
    async def metadata(model: str) -> ModelMetadata:
        """What it takes and gives. `parameters` say what the columns of `scores` are."""
        config = gateway.models.choose(model).config
        least = config.least_scores
        return ModelMetadata(
            name=config.name,
            platform="gma",
            inputs=[TensorMetadata(name=INPUT, datatype="BYTES", shape=[-1])],
            outputs=[
                TensorMetadata(name=LABEL, datatype="BYTES", shape=[-1]),
                TensorMetadata(name=SCORES, datatype="FP32", shape=[-1, len(config.labels)]),
            ],
            parameters=ModelParameters(
                labels=list(config.labels),
                multi_label=config.multi_label,
                thresholds=None if least is None else list(least),
            ),
        )

    @app.get("/v2/models/{model}/ready", summary="Whether the model classifies texts", **about)
    async def model_ready(model: str) -> ModelReady:
        """200 once a worker is warm, until the service drains."""
        await check_ready(gateway.models.choose(model))
        return ModelReady(name=model, ready=True)

    @app.post(
        "/v2/models/{model}/infer",
        summary="Classify texts, as KServe and Triton do",
        response_model=InferAnswer,
        responses=responses,
        openapi_extra={"requestBody": body_of(InferRequest)},
        tags=["other servers' clients"],
    )
    async def infer(model: str, request: Request, x_deadline_ms: Deadline = None) -> Response:
        """`label` has for each text the best label that is there, or an empty string if there is
        none; `scores` those of all labels."""
        gateway.models.choose(model)

        async def parse(body: Pieces) -> Question:
            asked, behind = await _read(body, _json_bytes(request.headers))
            texts = _texts(asked, behind)
            return Question(texts, INPUT, _Renderer(asked), gateway.models.choose(model))

        return TextsResponse(
            gateway,
            request,
            parse,
            deadline_ms=x_deadline_ms,
            kinds=(JSON, BINARY),
            default_kind=JSON,  # as Triton's clients have it, which do not say
        )


def _json_bytes(headers: Headers) -> int | None:
    """How much of the body is JSON; None if all of it is. Raises Validation."""
    given = headers.get(JSON_BYTES)
    if given is None:
        return None
    if not (given.isascii() and given.isdecimal() and len(given) <= MOST_DIGITS):
        raise Validation(f"Inference-Header-Content-Length is no length: {shown(given)}")
    return int(given)


async def _read(body: Pieces, json_bytes: int | None) -> tuple[InferRequest, memoryview]:
    """The request, and the bytes behind its JSON. Raises ServiceError."""
    if json_bytes is None:
        return await InferRequest.read(body), memoryview(b"")
    whole = bytearray()
    async for piece, _ in body:
        whole += piece
    if not 0 < json_bytes <= len(whole):
        raise NotJson(
            f"the body has {len(whole)} bytes, of which Inference-Header-Content-Length says that "
            f"{json_bytes} are JSON"
        )
    view = memoryview(whole).toreadonly()
    members = await parsed_object(PlainText(view[:json_bytes]).pieces())
    return InferRequest.of(members), view[json_bytes:]


def _texts(asked: InferRequest, behind: memoryview) -> Sequence[Text]:
    """The texts of a request, of which some bytes lie `behind` the JSON. Raises ServiceError."""
    if [tensor.name for tensor in asked.inputs] != [INPUT]:
        raise Validation(f"inputs: there should be one, called {INPUT}")
    (tensor,) = asked.inputs
    how = tensor.parameters or TensorParameters()
    if how.shared_memory_region is not None:
        raise Validation("inputs: shared memory is not read here: send the tensor itself")
    if tensor.datatype != "BYTES":
        raise Validation(f"{INPUT}: the datatype is BYTES")
    if tensor.shape[1:] not in ([], [1]):
        raise Validation(f"{INPUT}: the shape is [texts], or [texts, 1]")
    if (how.binary_data_size is None) == (tensor.data is None):
        raise Validation(f"{INPUT}: send either data or binary_data_size")
    if (how.binary_data_size or 0) != len(behind):
        raise Validation(
            f"{INPUT}: binary_data_size is {how.binary_data_size or 0}, and {len(behind)} bytes "
            "follow the JSON"
        )
    texts = _listed(tensor.data) if tensor.data is not None else _unpacked(behind)
    if len(texts) != tensor.shape[0]:
        raise Validation(f"{INPUT}: the shape says {tensor.shape[0]}, and there are {len(texts)}")
    if not texts:
        raise Validation(f"{INPUT}: there is none: send at least one")
    return texts


def _listed(data: Sequence[Any]) -> Sequence[Text]:
    """The strings in `data`, each in a list of its own or not."""
    flat = [each[0] if isinstance(each, list) and len(each) == 1 else each for each in data]
    for n, each in enumerate(flat):
        if not isinstance(each, JsonText):
            raise Validation(f"{INPUT}[{n}]: input should be a string")
    return flat


def _unpacked(behind: memoryview) -> Sequence[Text]:
    """The texts of a binary tensor, each behind its length."""
    texts: list[Text] = []
    at = 0
    while at < len(behind):
        begin = at + LENGTH.size
        end = begin + LENGTH.unpack_from(behind, at)[0] if begin <= len(behind) else begin
        if end > len(behind):
            raise Validation(f"{INPUT}[{len(texts)}]: the tensor ends before the text does")
        if len(texts) == MOST_VALUES:
            raise too_many()
        texts.append(PlainText(behind[begin:end]))
        at = end
    return texts


class _Renderer:
    """Makes the answer to a request."""

    def __init__(self, asked: InferRequest) -> None:
        """Raises Validation for outputs that there are not."""
        default = bool(asked.parameters and asked.parameters.binary_data_output)
        outputs = asked.outputs or [RequestedOutput(name=LABEL), RequestedOutput(name=SCORES)]
        self._id = asked.id
        self._column = asked.inputs[0].shape[1:]
        self._binary: dict[str, bool] = {}
        for output in outputs:
            how = output.parameters or OutputParameters()
            if output.name not in (LABEL, SCORES):
                raise Validation(
                    f"there is no output {shown(output.name)}: there are {LABEL} and {SCORES}"
                )
            if how.classification or how.shared_memory_region is not None:
                raise Validation(
                    f"{output.name}: neither classification nor shared memory is answered here"
                )
            self._binary[output.name] = default if how.binary_data is None else how.binary_data

    def __call__(self, found: Finding) -> Rendered:
        outputs: list[OutputTensor] = []
        behind = b""
        for name, binary in self._binary.items():
            tensor, packed = self._label(found) if name == LABEL else self._scores(found)
            if binary:
                del tensor["data"]
                tensor["parameters"] = {"binary_data_size": len(packed)}
                behind += packed
            outputs.append(tensor)
        answer = InferAnswer(model_name=found.config.name, outputs=outputs)
        if self._id is not None:
            answer["id"] = self._id
        content = encode(answer)
        if not any(self._binary.values()):
            return Rendered(content)
        return Rendered(content + behind, {JSON_BYTES: str(len(content))}, BINARY)

    def _label(self, found: Finding) -> tuple[OutputTensor, bytes]:
        labels = [label or "" for label in found.labels]
        packed = b"".join(LENGTH.pack(len(x)) + x for x in map(str.encode, labels))
        shape = [len(labels), *self._column]
        return OutputTensor(name=LABEL, datatype="BYTES", shape=shape, data=labels), packed

    def _scores(self, found: Finding) -> tuple[OutputTensor, bytes]:
        values = found.scores.astype("<f4")
        shape = [*values.shape]
        data = values.ravel().tolist()
        return OutputTensor(name=SCORES, datatype="FP32", shape=shape, data=data), values.tobytes()
