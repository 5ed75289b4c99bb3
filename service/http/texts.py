"""The texts of one request, read at the same time: how the requests of other servers' clients are
answered, whatever these look like."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gma.model.config import ModelConfig
from gma.service.errors import Empty, ServiceError
from gma.service.gateway.admission import Admitted
from gma.service.gateway.answers import verdict
from gma.service.gateway.contract import Answer, Options, Timing, Usage
from gma.service.gateway.document import PIECE_BYTES, Document, Pieces
from gma.service.gateway.gateway import Gateway
from gma.service.gateway.model import Model
from gma.service.gateway.scores import scores
from gma.service.http.auth import clients_of
from gma.service.http.body import Body
from gma.service.http.documents import TIMING_HEADERS, announced_bytes, in_time
from gma.service.http.media import JSON, document_type
from gma.service.http.middleware import RECORD, Record
from gma.service.tasks import guarded

TOGETHER = 64
"""Texts of one request that are read at the same time."""

MANY = 2000
"""Scores that are not put into an answer where other requests would wait for it."""


class Text(Protocol):
    """What is to be classified, as it came."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to read."""

    def pieces(self) -> Pieces:
        """The text in UTF-8. It is read once."""


class PlainText:
    """A text that lies in a body as it is."""

    def __init__(self, text: memoryview) -> None:
        self._text = text

    @property
    def empty(self) -> bool:
        """Whether it has no byte."""
        return not self._text

    async def pieces(self) -> Pieces:
        """The text, in pieces of at most PIECE_BYTES, each with whether it is the last."""
        for start in range(0, len(self._text), PIECE_BYTES):
            end = start + PIECE_BYTES
            yield bytes(self._text[start:end]), end >= len(self._text)


class Finding(NamedTuple):
    """What the model finds in the texts of a request."""

    config: ModelConfig
    logits: NDArray[np.float64]
    """(texts, labels)."""
    usage: Usage
    """Of all of them."""
    id: str
    """The request's."""

    @property
    def scores(self) -> NDArray[np.float64]:
        """(texts, labels): the model's own."""
        return scores(self.logits, self.config.multi_label)

    @property
    def labels(self) -> list[str | None]:
        """Of each text the best label that the model says is there; None where it says none."""
        told = [verdict(self.config, *row) for row in zip(self.logits, self.scores, strict=True)]
        return [
            next(iter(said["labels"]), None) if "labels" in said else said["label"] for said in told
        ]

    def ranked(
        self, values: NDArray[np.float64], most: int | None = None
    ) -> Iterator[list[dict[str, str | float]]]:
        """For each text its labels with what they have of `values`, (texts, labels); the `most`
        best, by their logits, of all by default."""
        labels = self.config.labels
        for row, order in zip(values, np.argsort(-self.logits, kind="stable"), strict=True):
            yield [
                {"label": labels[i], "score": value}
                for i, value in zip(order[:most].tolist(), row[order[:most]].tolist(), strict=True)
            ]


class Rendered(NamedTuple):
    """An answer as it is sent."""

    content: bytes
    headers: dict[str, str] = {}  # noqa: RUF012 (nobody changes it)
    media_type: str = JSON


class Question(NamedTuple):
    """What a request asks."""

    texts: Sequence[Text]
    place: str | None
    """What messages call the list of the texts; None if there is no list."""
    render: Callable[[Finding], Rendered]
    model: Model
    """Which is to read them."""
    max_tokens: int | None = None
    """Of each text that are read."""


Parse: TypeAlias = Callable[[Pieces], Awaitable[Question]]
"""Reads a body. Raises ServiceError."""


class TextsResponse(Response):
    """Answers a request whose body has come whole."""

    def __init__(
        self,
        gateway: Gateway,
        request: Request,
        parse: Parse,
        *,
        deadline_ms: int | None,
        kinds: Sequence[str] = (JSON,),
        default_kind: str | None = None,
    ) -> None:
        """`kinds` of content are let pass, as is none if there is a default.

        Raises UnsupportedContent. `deadline_ms`: from the request's beginning to its answer.
        """
        super().__init__()
        document_type(request.headers, kinds, default=default_kind)
        self._gateway = gateway
        self._parse = parse
        self._announced_bytes = announced_bytes(request.headers)
        self._deadline_s = None if deadline_ms is None else deadline_ms / 1000

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the texts, and send the answer. Raises ServiceError and ClientGone."""
        record: Record = scope[RECORD]
        clients = clients_of(scope, self._gateway.settings)
        with self._gateway.admission.admit(
            self._announced_bytes, clients, key=record.key
        ) as admitted:
            body = Body(receive, admitted, self._gateway.settings)
            reading = guarded(self._answer(body, admitted, record), by=body.pump())
            try:
                rendered, timing = await in_time(reading, record.began, self._deadline_s)
            finally:
                record.stages.append(body.stage())
            headers = {TIMING_HEADERS[name]: str(ms) for name, ms in timing.items()}
            admitted.leave(len(rendered.content))
            await Response(
                rendered.content, headers=headers | rendered.headers, media_type=rendered.media_type
            )(scope, receive, send)

    async def _answer(
        self, body: Body, admitted: Admitted, record: Record
    ) -> tuple[Rendered, Timing]:
        question = await self._parse(body.pieces())
        for n, text in enumerate(question.texts):
            if text.empty:
                raise _at(Empty(), question, n)
        places = admitted.widen(len(question.texts) - 1)
        documents = await self._read(question, min(places, TOGETHER), record)
        answers = [answer for _, answer in documents]
        finding = Finding(
            question.model.config,
            np.stack([logits for logits, _ in documents]),
            _sum(answer["usage"] for answer in answers),
            record.id,
        )
        record.usage = finding.usage
        render = partial(question.render, finding)
        many = finding.logits.size > MANY
        rendered = await self._gateway.in_thread(render) if many else render()
        return rendered, _timing(answers, record)

    async def _read(
        self, question: Question, together: int, record: Record
    ) -> list[tuple[NDArray[np.float64], Answer]]:
        """Logits, (labels,), and answer of each text. Raises what the first that fails raises."""
        options = Options(top_k=1, max_tokens=question.max_tokens)
        # A trace has the stages of one text; those of many would be a crowd.
        stages = record.stages if len(question.texts) == 1 else []
        found: list[tuple[NDArray[np.float64], Answer] | None] = [None] * len(question.texts)
        ahead = iter(enumerate(question.texts))

        async def one_after_the_other() -> None:
            for n, text in ahead:
                name = f"{record.id}/{uuid.uuid4().hex}"
                document = Document(self._gateway, question.model, name, options)
                try:
                    answer = await document.classify(
                        text.pieces(), began=record.began, stages=stages
                    )
                except ServiceError as error:
                    raise _at(error, question, n) from None
                found[n] = document.logits, answer

        readers = [asyncio.ensure_future(one_after_the_other()) for _ in range(together)]
        try:
            await asyncio.gather(*readers)
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
            del readers  # an error's traceback has this frame
        return [each for each in found if each]


def _at(error: ServiceError, question: Question, n: int) -> ServiceError:
    if question.place:
        error.place = f"{question.place}[{n}]"
    return error


def _sum(usages: Iterator[Usage]) -> Usage:
    total = Usage(bytes=0, tokens=0, chunks=0)
    for usage in usages:
        total["bytes"] += usage["bytes"]
        total["tokens"] += usage["tokens"]
        total["chunks"] += usage["chunks"]
    return total


def _timing(answers: Sequence[Answer], record: Record) -> Timing:
    """The mean of the texts' times, and the request's own."""
    times = [answer["timing_ms"] for answer in answers]
    return Timing(
        queue=round(sum(each["queue"] for each in times) / len(times), 1),
        tokenize=round(sum(each["tokenize"] for each in times) / len(times), 1),
        compute=round(sum(each["compute"] for each in times) / len(times), 1),
        total=round(1000 * (time.monotonic() - record.began), 1),
    )
