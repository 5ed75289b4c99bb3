"""A document on its way through a gateway: text, tokens, what a worker finds in them, an answer."""

from __future__ import annotations

import asyncio
import random
import time
from codecs import BOM_UTF8
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, closing
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gma.model import tokenizer
from gma.model.tokenizer import TokenStream
from gma.service.engine.opening import Opening, Tokens
from gma.service.engine.progress import Progress
from gma.service.errors import Empty, NotUtf8, Overloaded, UnknownDocument
from gma.service.gateway.answers import answered, usage_of, verdict
from gma.service.gateway.contract import Answer, Options, ProgressEvent, Timing
from gma.service.gateway.evidence import Evidence, Ruler
from gma.service.gateway.gateway import Gateway
from gma.service.gateway.model import Model
from gma.service.gateway.scores import scores
from gma.service.link.client import OpenDocument
from gma.service.observe.traces import Stage
from gma.service.tasks import guarded

Pieces: TypeAlias = AsyncIterator[tuple[bytes, bool]]
"""A document's text in pieces, cut anywhere, each with whether it is the last."""

Listener: TypeAlias = Callable[[ProgressEvent], Awaitable[None]]

# A token is at least a byte, and a message to a worker takes 2**18 tokens. What a stream holds back
# comes on top.
PIECE_BYTES = 2**18 - TokenStream.MAX_PENDING

# A piece that is tokenized in a few milliseconds. It does not wait for larger ones: whenever the
# worker has read on in many long documents, there are as many of those.
SMALL_BYTES = 2**14

# A piece that is tokenized in about the time that a thread would take to begin.
TINY_BYTES = 2**12

AGAIN_S = 1.0
"""After how long, at most, a patient document asks again for a worker that has room."""


class Document:
    """One document: it is classified once."""

    def __init__(
        self,
        gateway: Gateway,
        model: Model,
        name: str,
        options: Options,
        *,
        patient: bool = False,
    ) -> None:
        """`model` reads it, whatever `options` say of that. `name` is unique among all gateways.
        One that is `patient` waits for a worker that has room."""
        self._gateway = gateway
        self._model = model
        self._name = name
        self._options = options
        self._patient = patient
        self._stream = model.tokenizer.stream()
        self._ruler, self._row_ruler = Ruler(), Ruler()  # rows are told later than read
        self._evidence = Evidence(gateway.settings.max_evidence_spans)
        self._progress = Progress(0, 0, np.zeros(0), None, 0.0, 0.0, 0.0, done=False)
        self._empty = True
        self._mark = 0  # bytes of a byte order mark, which is no text
        self._truncated = False
        self._tokens = 0  # handed to the worker
        self._bytes_read = 0  # by the worker
        self._tokenize_s = 0.0
        self._tokenized: tuple[float, float] | None = None  # from and until when
        self._handed_at: float | None = None
        self._told_at: float | None = None  # when the last progress came

    @property
    def logits(self) -> NDArray[np.float64]:
        """(labels,): of what was read."""
        return self._progress.logits

    async def classify(
        self,
        pieces: Pieces,
        *,
        began: float,
        stages: list[Stage],
        on_progress: Listener | None = None,
    ) -> Answer:
        """Read `pieces` to their end, or to `max_tokens`, and answer.

        `began` is when the request did, on the monotonic clock. The stages that the document goes
        through are added to `stages`, however it ends. Raises ServiceError, and whatever `pieces`
        and `on_progress` raise.
        """
        try:
            await self._read(pieces, on_progress)
        finally:
            stages += self._stages()
        self._measure()
        answer = partial(self._answer, began)
        return await self._gateway.in_thread(answer) if self._options.long else answer()

    async def _read(self, pieces: Pieces, on_progress: Listener | None) -> None:
        async with aclosing(self._tokenize(pieces)) as tokens:
            first, last = await anext(tokens)
            running = on_progress is not None
            opening = Opening(
                self._name,
                first,
                last,
                self._options.evidence,
                running,
                self._options.components,
            )
            with closing(await self._open(opening)) as opened:
                following = self._follow(opened, on_progress)
                if last:
                    await following
                else:
                    await guarded(following, by=feed(opened, tokens))

    async def _open(self, opening: Opening) -> OpenDocument:
        while True:
            try:
                return await self._model.workers.open(opening)
            except Overloaded:
                if not self._patient:
                    raise
            # Others are refused meanwhile, and come again when they are: by chance, as this does.
            await asyncio.sleep(random.uniform(AGAIN_S / 2, AGAIN_S))  # noqa: S311

    def _stages(self) -> list[Stage]:
        """What it went through: it waits from when tokens are handed over to the first step with
        some of them, and is computed from then to the last that was heard of."""
        found: list[Stage] = []
        progress = self._progress
        if self._tokenized:
            found.append(Stage("tokenize", *self._tokenized, self._tokenize_s))
        if self._handed_at and self._told_at:
            first_step = self._handed_at + progress.wait_s
            found.append(Stage("queue", self._handed_at, first_step, progress.wait_s))
            found.append(Stage("compute", first_step, self._told_at, progress.compute_s))
        elif self._handed_at:
            now = time.monotonic()
            found.append(Stage("queue", self._handed_at, now, now - self._handed_at))
        return found

    async def _tokenize(self, pieces: Pieces) -> AsyncGenerator[tuple[Tokens, bool]]:
        """The tokens as they become certain, `max_tokens` at most, and whether they end."""
        most = self._options.max_tokens
        begun = b""  # perhaps a byte order mark
        async for piece, last in pieces:
            if self._empty:
                piece = begun = begun + piece
                if len(piece) <= len(BOM_UTF8) and not last:
                    continue
            if len(piece) <= TINY_BYTES:
                tokens = self._certain(piece, last)
            else:
                certain = partial(self._certain, piece, last)
                large = len(piece) > SMALL_BYTES
                tokens = await self._gateway.in_thread(certain, large=large)
            if most is not None and self._tokens + len(tokens) > most:
                tokens = tokens[: most - self._tokens]
                self._truncated = last = True
            if len(tokens) or last:
                self._handed_at = self._handed_at or time.monotonic()
                self._tokens += len(tokens)
                sizes = self._model.token_bytes[tokens]
                self._ruler.extend(sizes)
                if self._options.evidence:
                    self._row_ruler.extend(sizes)
                yield tokens, last
            if last:
                return

    def _certain(self, piece: bytes, last: bool) -> Tokens:
        """The tokens that are certain once `piece` has come. Raises NotUtf8, Empty."""
        began = time.monotonic()
        if self._empty and piece.startswith(BOM_UTF8) and len(piece) > len(BOM_UTF8):
            piece = piece[len(BOM_UTF8) :]
            self._mark = len(BOM_UTF8)
            self._ruler.skip(self._mark)
            self._row_ruler.skip(self._mark)
        self._empty = self._empty and not piece
        if last and self._empty:
            raise Empty
        try:
            tokens = self._stream.feed(piece)
            if last:
                tokens = np.concatenate([tokens, self._stream.finish()])
        except tokenizer.NotUtf8 as error:
            raise NotUtf8(self._mark + error.offset) from None
        ended = time.monotonic()
        self._tokenized = self._tokenized[0] if self._tokenized else began, ended
        self._tokenize_s += ended - began
        self._model.tokenized(len(piece), ended - began)
        return tokens

    async def _follow(self, opened: OpenDocument, on_progress: Listener | None) -> None:
        """Take progress up to the end of the document."""
        async for progress in opened:
            self._add(progress)
            if progress.done:
                return
            if on_progress:
                await on_progress(self._event())
        raise UnknownDocument("the document was dropped before its end: send it again")

    def _add(self, progress: Progress) -> None:
        self._told_at = time.monotonic()
        self._bytes_read += self._ruler.advance(progress.tokens - self._progress.tokens)
        self._progress = progress
        if progress.shares:
            counts, weights, evidence = progress.shares
            rows = zip(counts.tolist(), weights.tolist(), evidence, strict=True)
            for tokens, weight, share in rows:
                self._evidence.add(tokens, self._row_ruler.advance(tokens), weight, share)

    def _event(self) -> ProgressEvent:
        config, progress = self._model.config, self._progress
        event = ProgressEvent(event="progress", bytes=self._bytes_read, tokens=progress.tokens)
        if config.causal:
            found = scores(progress.logits, config.multi_label)
            event = ProgressEvent(**event, **verdict(config, progress.logits, found))
            if not config.multi_label:
                event["score"] = float(found.max())
        return event

    def _answer(self, began: float) -> Answer:
        progress = self._progress
        return answered(
            self._model.config,
            progress.logits,
            usage_of(self._bytes_read, progress.tokens, progress.chunks, progress.usage),
            self._evidence.shares,
            timing=Timing(
                queue=milliseconds(progress.queue_s),
                tokenize=milliseconds(self._tokenize_s),
                compute=milliseconds(progress.compute_s),
                total=milliseconds(time.monotonic() - began),
            ),
            top_k=self._options.top_k,
            evidence=self._options.evidence,
            truncated=self._truncated,
        )

    def _measure(self) -> None:
        """Count the document, now that it is done."""
        progress = self._progress
        self._model.answered(
            self._bytes_read, self._tokenize_s, progress.queue_s, progress.compute_s
        )
        self._gateway.admission.read(progress.tokens, progress.queue_s + progress.compute_s)
        self._model.predictions.count(progress.logits)


async def feed(opened: OpenDocument, tokens: AsyncGenerator[tuple[Tokens, bool]]) -> None:
    """Hand the rest of a document to the worker that reads it."""
    async for piece, last in tokens:
        try:
            await opened.feed(piece, last)
        except UnknownDocument:
            return  # whoever follows the document hears why


def milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 1)
