"""The shapes of the HTTP contract: strict models for what comes in, typed dicts for what goes out.

Answers are plain dicts because evidence can hold fifty thousand of them. OpenAPI is generated from
both.
"""

import re
from typing import Annotated, Literal, NotRequired

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticKnownError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from gma.service.link.client import WorkerInfo

_DIGITS = re.compile(r"-?(?:0|[1-9][0-9]*)")


def _digits(given: object) -> object:
    """Of the query: pydantic alone takes whatever Python reads as an integer."""
    if isinstance(given, str) and not _DIGITS.fullmatch(given):
        raise PydanticKnownError("int_parsing")
    return given


Amount = Annotated[int, Field(ge=1, lt=2**31), BeforeValidator(_digits)]

Offset = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_digits)]


ModelName = Annotated[str, Field(max_length=256, description="as GET /v1/models tells it")]


class Options(BaseModel):
    """How a document is to be answered."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: ModelName | None = None
    """Which model is to read it, as GET /v1/models names them; one alone need not be named."""

    top_k: Amount | None = None
    """List the scores of the best so many labels; of all by default."""

    evidence: bool = False
    """Also tell which part of the document speaks for what."""

    components: bool = False
    """Also tell how much of the document each component of the model's mixtures takes."""

    max_tokens: Amount | None = None
    """Read no more than the first so many tokens. By default nothing is truncated."""

    @property
    def long(self) -> bool:
        """Whether an answer with these may be long."""
        return self.evidence or self.components


class SessionOptions(BaseModel):
    """How a session is to be answered."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    top_k: Amount | None = None
    """List the scores of the best so many labels; of all by default."""


class AppendOptions(SessionOptions):
    """How what is appended is to be answered."""

    evidence: bool = False
    """Also tell which part of what was read now speaks for what, beside all that was before."""


class DocumentRequest(Options):
    """A document as JSON, with its options."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    text: Annotated[str, Field(min_length=1)]
    """The document."""


LineId = Annotated[str, Field(max_length=256)] | Annotated[int, Field(ge=-(2**63), lt=2**63)]


class LineRequest(DocumentRequest):
    """A line of a batch: a document as JSON, with its options and its name."""

    id: LineId | None = None
    """Given back with the answer; of a line without one, its number."""


class BatchOptions(Options):
    """How the documents of a batch are to be answered, where their lines do not say otherwise."""

    order: Literal["done", "input"] = "done"
    """Which answer comes first: that of the line that is done first, or that of the first line."""


class LabelScore(TypedDict):
    """What is said about one label."""

    label: str
    score: Annotated[
        float,
        Field(
            description="softmax over all labels, also those not listed; with a multi-label model "
            "the sigmoid of the logit"
        ),
    ]
    logit: float
    threshold: NotRequired[
        Annotated[
            float,
            Field(
                description="the least score at which the label is there; absent with a model that "
                "says the best label whatever its score"
            ),
        ]
    ]


BestLabel = Annotated[
    str | None,
    Field(
        description="the best label, null if its score is below its threshold; absent with a "
        "multi-label model"
    ),
]

LabelsThere = Annotated[
    list[str],
    Field(
        description="of a multi-label model: all labels whose score is at least their threshold, "
        "best first, whether scores list them or not"
    ),
]


class Verdict(TypedDict):
    """What the model says is there: `labels` if it is multi-label, else `label`."""

    label: NotRequired[BestLabel]
    labels: NotRequired[LabelsThere]


class Usage(TypedDict):
    """How much was read."""

    bytes: Annotated[int, Field(description="of UTF-8 text")]
    tokens: int
    chunks: Annotated[int, Field(description="pieces in which the model read the document")]
    components: NotRequired[
        Annotated[
            list[list[list[float]]],
            Field(
                description="tokens that each mixture component took, by layer and head, if asked "
                "for: over components they sum to all that were read"
            ),
        ]
    ]


class Timing(TypedDict):
    """Milliseconds. Tokenizing and computing overlap with the upload and with each other."""

    queue: Annotated[float, Field(description="ready to be read, and waiting for the model")]
    tokenize: float
    compute: Annotated[float, Field(description="in steps that read this document, beside others")]
    total: Annotated[float, Field(description="from the first byte of the request")]


class EvidenceSpan(TypedDict):
    """Bytes [start, end) of the document, and their share in its answer. Labels and scores are of
    this span alone."""

    start: int
    end: int
    tokens: int
    weight: Annotated[
        float,
        Field(
            description="share of the whole document's: weights sum to 1, and the sum of "
            "weight * logit over the spans is the document's logit; with pooling any it is that of "
            "tokens alone, and the product of 1 - score over the spans is that of the document"
        ),
    ]
    label: NotRequired[BestLabel]
    labels: NotRequired[LabelsThere]
    scores: Annotated[
        list[LabelScore],
        Field(description="best first; the labels that the document's scores list"),
    ]


class Finding(TypedDict):
    """What the model finds in a document."""

    model: str
    label: NotRequired[BestLabel]
    labels: NotRequired[LabelsThere]
    scores: Annotated[list[LabelScore], Field(description="best first")]
    usage: Usage
    truncated: NotRequired[
        Annotated[bool, Field(description="true if max_tokens cut something; else absent")]
    ]
    evidence: NotRequired[
        Annotated[
            list[EvidenceSpan], Field(description="spans that tile the document, if asked for")
        ]
    ]


class Answer(Finding):
    """A classified document."""

    timing_ms: Timing


class SessionState(TypedDict):
    """A session."""

    id: str
    offset: Annotated[int, Field(description="bytes that have come: where to go on")]
    expires_at: Annotated[str, Field(description="as RFC 3339 has it; an append moves it on")]


class SessionAnswer(SessionState):
    """A session, and the answer to all of its text. While there is no whole character there is no
    label, and there are no scores."""

    model: str
    label: NotRequired[BestLabel]
    labels: NotRequired[LabelsThere]
    scores: Annotated[list[LabelScore], Field(description="best first")]
    usage: Usage
    evidence: NotRequired[
        Annotated[
            list[EvidenceSpan],
            Field(
                description="if asked for: a span of all that was read before, if there is one, "
                "then spans that tile the rest"
            ),
        ]
    ]
    timing_ms: NotRequired[Annotated[Timing, Field(description="of this append")]]


class ProgressEvent(TypedDict):
    """How far the document has been read, and what it looks like so far.

    A bidirectional model reads a whole document several times: the numbers are what the passes so
    far amount to, and nothing is said of labels.
    """

    event: Literal["progress"]
    bytes: int
    tokens: int
    label: NotRequired[BestLabel]
    labels: NotRequired[LabelsThere]
    score: NotRequired[
        Annotated[float, Field(description="of the best label; absent with a multi-label model")]
    ]


class ResultEvent(Answer):
    """The last event: the answer."""

    event: Literal["result"]


class ErrorAnswer(TypedDict):
    """Any answer whose status is not 2xx."""

    error: Annotated[str, Field(description="what is wrong and what to do, for people")]
    error_type: Annotated[str, Field(description="the same for programs")]


class ErrorEvent(ErrorAnswer):
    """The last event, in place of the result."""

    event: Literal["error"]


class Answered(TypedDict):
    """Which line of a batch it is about."""

    id: LineId
    line: Annotated[int, Field(description="its number, from 1 on")]


class LineAnswer(Answered, Answer):
    """A line of a batch, classified."""


class Failure(ErrorAnswer):
    """What ended a batch before its last line: the last of its answers."""

    status: Annotated[int, Field(description="that of the same error of a document by itself")]
    retry_after_s: NotRequired[
        Annotated[int, Field(description="seconds until it is worth trying again")]
    ]


class LineFailure(Answered, Failure):
    """A line of a batch that could not be classified. Others go on."""


class Health(TypedDict):
    """The service answers documents."""

    status: Literal["ok"]


class Limits(TypedDict):
    """What the service takes."""

    max_document_bytes: int
    max_bytes_in_flight: int
    max_documents_in_flight: int
    max_evidence_spans: int
    idle_timeout_s: float
    min_upload_rate: Annotated[int, Field(description="bytes a second, over the idle timeout")]


class ModelInfo(TypedDict):
    """What a model is."""

    model: Annotated[str, Field(description="its name")]
    labels: list[str]
    multi_label: Annotated[
        bool, Field(description="a document has any number of the labels, each scored by itself")
    ]
    thresholds: Annotated[
        list[float] | None,
        Field(
            description="the least score, label by label, at which it is there; null if the best "
            "label is said whatever its score"
        ),
    ]
    pooling: Annotated[
        Literal["mean", "any"],
        Field(
            description="what a document's answer is of its parts': their mean, or whether any of "
            "them says so"
        ),
    ]
    causal: Annotated[
        bool,
        Field(
            description="documents are read as they come; if false the model is bidirectional: "
            "they are kept whole, and there is no running answer"
        ),
    ]
    workers: Annotated[int, Field(description="that this gateway knows of now")]


ModelNames = Annotated[list[str], Field(description="of all that this service has")]


class Info(ModelInfo, WorkerInfo):
    """What runs here."""

    models: ModelNames
    limits: Limits


class SeveralInfo(TypedDict):
    """What runs here, where there are several models and none was named."""

    models: ModelNames
    limits: Limits


class ListedModel(ModelInfo):
    """A model of a list."""

    id: Annotated[str, Field(description="its name too, as OpenAI's clients look for it")]
    object: Literal["model"]
    owned_by: str
    limits: Limits


class ModelList(TypedDict):
    """The models that this service has."""

    object: Literal["list"]
    data: list[ListedModel]
