"""The gateway: text becomes tokens for a worker, and what the worker finds becomes an answer.

It knows nothing of HTTP and nothing of Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import TypeVar

import numpy as np

from gma.model import tokenizer
from gma.model.config import ModelConfig
from gma.model.tokenizer import Tokenizer, TokenStream
from gma.service.cores import cores
from gma.service.engine.document import Progress
from gma.service.errors import EmptyDocument, NotUtf8, UnknownDocument
from gma.service.gateway.admission import Admission
from gma.service.gateway.answers import evidence_spans, label_scores, ranked, softmax
from gma.service.gateway.contract import (
    Answer,
    Info,
    Limits,
    Options,
    ProgressEvent,
    Timing,
    Usage,
)
from gma.service.gateway.evidence import Evidence, Ruler
from gma.service.http.body import guarded
from gma.service.link.client import Reading, Tokens, WorkerClient
from gma.service.observe import metrics
from gma.service.observe.memory import Memory, resident_memory
from gma.service.observe.traces import Stage
from gma.service.settings import Settings

T = TypeVar("T")

Pieces = AsyncIterator[tuple[bytes, bool]]
"""A document's text in pieces, cut anywhere, each with whether it is the last."""

Listener = Callable[[ProgressEvent], Awaitable[None]]

# A token is at least a byte, and a call to a worker takes 2**18 tokens. What a stream holds back
# comes on top.
PIECE_BYTES = 2**18 - TokenStream.MAX_PENDING

# A piece that is tokenized in a few milliseconds. It does not wait for larger ones: whenever the
# worker has read on in many long documents, there are as many of those.
SMALL_BYTES = 2**14

# A piece that is tokenized in about the time that a thread would take to begin.
TINY_BYTES = 2**12


class Gateway:
    """Classifies documents with a checkpoint's tokenizer and somebody else's forward passes."""

    def __init__(
        self,
        settings: Settings,
        config: ModelConfig,
        tokenizer: Tokenizer,
        worker: WorkerClient,
        *,
        threads: int | None = None,
    ) -> None:
        """`threads` tokenize what is large, by default one a core."""
        self.settings = settings
        self.admission = Admission(
            max_documents=settings.max_documents_in_flight,
            max_bytes=settings.max_bytes_in_flight,
            max_document_bytes=settings.max_document_bytes,
        )
        self._config = config
        self._tokenizer = tokenizer
        self._worker = worker
        self._threads = ThreadPoolExecutor(cores(), thread_name_prefix="small")
        self._large = ThreadPoolExecutor(threads or cores(), thread_name_prefix="tokenize")

    async def classify(
        self,
        name: str,
        pieces: Pieces,
        options: Options,
        *,
        began: float,
        on_progress: Listener | None,
        stages: list[Stage],
    ) -> Answer:
        """Read a document to its end, or to `max_tokens`, and answer.

        `name` is unique among all gateways; `began` is when the request did, on the monotonic
        clock; `stages` gets those that the document went through, however it ends. Raises
        ServiceError, and whatever `pieces` and `on_progress` raise.
        """
        document = _Document(self._tokenizer, self.settings.max_evidence_spans)
        try:
            async with aclosing(self._tokens(document, pieces, options.max_tokens)) as tokens:
                first, last = await anext(tokens)
                async with self._worker.open(
                    name, first, last, evidence=options.evidence, running=on_progress is not None
                ) as reading:
                    await guarded(
                        self._follow(document, reading, on_progress),
                        by=_feed(reading, len(first), tokens),
                    )
        finally:
            stages += document.stages()
        document.measure()
        answer = partial(self._answer, document, options, began)
        return await self.in_thread(answer) if options.evidence else answer()

    async def info(self) -> Info:
        """What runs here. Raises NotReady without a worker."""
        settings = self.settings
        worker = await self._worker.info()
        return Info(
            model=self._config.name,
            labels=list(self._config.labels),
            workers=settings.workers,
            limits=Limits(
                max_document_bytes=settings.max_document_bytes,
                max_bytes_in_flight=settings.max_bytes_in_flight,
                max_documents_in_flight=settings.max_documents_in_flight,
                max_evidence_spans=settings.max_evidence_spans,
                idle_timeout_s=settings.idle_timeout_s,
            ),
            **worker,
        )

    async def in_thread(self, function: Callable[[], T], *, large: bool = False) -> T:
        """Run what would hold up other requests; what is large holds up only what is large too."""
        threads = self._large if large else self._threads
        return await asyncio.get_running_loop().run_in_executor(threads, function)

    async def watch_memory(self) -> None:
        """Report this process's memory for as long as this runs."""
        await metrics.watch(lambda: metrics.report_memory("gateway", Memory(*resident_memory())))

    async def _tokens(
        self, document: _Document, pieces: Pieces, most: int | None
    ) -> AsyncGenerator[tuple[Tokens, bool]]:
        """The document's tokens as they become certain, `most` at most, and whether they end."""
        async for piece, last in pieces:
            if len(piece) <= TINY_BYTES:
                tokens = document.tokenize(piece, last)
            else:
                tokenize = partial(document.tokenize, piece, last)
                tokens = await self.in_thread(tokenize, large=len(piece) > SMALL_BYTES)
            if most is not None and document.tokens + len(tokens) > most:
                tokens = tokens[: most - document.tokens]
                document.truncated = last = True
            if len(tokens) or last:
                document.append(tokens)
                yield tokens, last
            if last:
                return

    async def _follow(
        self, document: _Document, reading: Reading, on_progress: Listener | None
    ) -> None:
        """Take progress up to the end of the document."""
        async for progress in reading:
            document.add(progress)
            if progress.done:
                return
            if on_progress:
                await on_progress(self._progress_event(document))
        raise UnknownDocument("the document was dropped before its end: send it again")

    def _progress_event(self, document: _Document) -> ProgressEvent:
        scores = softmax(document.progress.logits)
        best = int(scores.argmax())
        return ProgressEvent(
            event="progress",
            bytes=document.bytes_read,
            tokens=document.progress.tokens,
            label=self._config.labels[best],
            score=float(scores[best]),
        )

    def _answer(self, document: _Document, options: Options, began: float) -> Answer:
        logits = document.progress.logits
        best = ranked(logits, options.top_k)
        answer = Answer(
            model=self._config.name,
            label=self._config.labels[best[0]],
            scores=label_scores(self._config.labels, logits, best),
            usage=document.usage,
            timing_ms=document.timing(began),
        )
        if document.truncated:
            answer["truncated"] = True
        if options.evidence:
            shares = document.evidence.shares
            answer["evidence"] = evidence_spans(
                self._config.labels, shares, best, prior_tokens=self._config.prior_tokens
            )
        return answer


class _Document:
    """What the gateway knows of one document."""

    def __init__(self, tokenizer: Tokenizer, max_spans: int) -> None:
        self.tokens = 0  # handed to the worker
        self.truncated = False
        self.bytes_read = 0  # by the worker
        self.progress = Progress(0, 0, np.zeros(0), [], 0.0, 0.0, 0.0, done=False)
        self.evidence = Evidence(max_spans)
        self._stream = tokenizer.stream()
        self._ruler = Ruler(tokenizer.byte_lengths)
        self._empty = True
        self._tokenize_s = 0.0
        self._tokenized: tuple[float, float] | None = None  # from and until when
        self._handed_at: float | None = None
        self._told_at: float | None = None  # when the last progress came

    def tokenize(self, piece: bytes, last: bool) -> Tokens:
        """The tokens that are certain once `piece` has come. Raises NotUtf8, EmptyDocument."""
        began = time.monotonic()
        self._empty = self._empty and not piece
        if last and self._empty:
            raise EmptyDocument
        try:
            tokens = self._stream.feed(piece)
            if last:
                tokens = np.concatenate([tokens, self._stream.finish()])
        except tokenizer.NotUtf8 as error:
            raise NotUtf8(error.offset) from None
        ended = time.monotonic()
        seconds = ended - began
        self._tokenized = self._tokenized[0] if self._tokenized else began, ended
        self._tokenize_s += seconds
        metrics.TOKENIZED_BYTES.inc(len(piece))
        metrics.TOKENIZER_SECONDS.inc(seconds)
        return tokens

    def append(self, tokens: Tokens) -> None:
        """These are handed to the worker."""
        self._handed_at = self._handed_at or time.monotonic()
        self.tokens += len(tokens)
        self._ruler.extend(tokens)

    def add(self, progress: Progress) -> None:
        """The worker has read on."""
        self._told_at = time.monotonic()
        ahead = progress.tokens - self.progress.tokens
        self.progress = progress
        for span in progress.spans:
            size = self._ruler.advance(span.tokens)
            self.evidence.add(span, size)
            self.bytes_read += size
            ahead -= span.tokens
        self.bytes_read += self._ruler.advance(ahead)

    def measure(self) -> None:
        """Count the document, now that it is done."""
        metrics.DOCUMENT_BYTES.inc(self.bytes_read)
        metrics.TOKENIZE_SECONDS.observe(self._tokenize_s)
        metrics.QUEUE_SECONDS.observe(self.progress.queue_s)
        metrics.COMPUTE_SECONDS.observe(self.progress.compute_s)

    def stages(self) -> list[Stage]:
        """Those that it went through: it waits from when tokens are handed over to the first step
        with some of them, and is computed from then to the last that was heard of."""
        found: list[Stage] = []
        progress = self.progress
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

    @property
    def usage(self) -> Usage:
        progress = self.progress
        return Usage(bytes=self.bytes_read, tokens=progress.tokens, chunks=progress.chunks)

    def timing(self, began: float) -> Timing:
        """Milliseconds; `began` on the monotonic clock."""
        return Timing(
            queue=_milliseconds(self.progress.queue_s),
            tokenize=_milliseconds(self._tokenize_s),
            compute=_milliseconds(self.progress.compute_s),
            total=_milliseconds(time.monotonic() - began),
        )


async def _feed(reading: Reading, offset: int, tokens: AsyncGenerator[tuple[Tokens, bool]]) -> None:
    """Hand the rest of a document to the worker that reads it."""
    async for piece, last in tokens:
        try:
            await reading.feed(offset, piece, last)
        except UnknownDocument:
            return  # whoever follows the reading hears why
        offset += len(piece)


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 1)
