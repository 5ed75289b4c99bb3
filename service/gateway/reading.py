"""What is appended to a session: read on top of its past, and answered as if it ended here."""

from __future__ import annotations

import time
from codecs import BOM_UTF8
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing, closing
from functools import partial

import numpy as np

from gma.model import tokenizer
from gma.service.engine.opening import NO_TOKENS, Opening, Past, Tokens
from gma.service.engine.progress import Kept, Progress
from gma.service.errors import NotUtf8, UnknownDocument
from gma.service.gateway.document import SMALL_BYTES, TINY_BYTES, Pieces, feed
from gma.service.gateway.evidence import Evidence, Ruler, Share
from gma.service.gateway.gateway import Gateway
from gma.service.gateway.model import Model
from gma.service.link.client import OpenDocument
from gma.service.sessions.session import Session, sums_of
from gma.service.tasks import guarded

LONGEST_CHARACTER = 4
"""Bytes, in UTF-8."""


class Reading:
    """One append: it is read once."""

    def __init__(
        self, gateway: Gateway, model: Model, name: str, before: Session, *, evidence: bool
    ) -> None:
        """`name` is unique among all gateways."""
        self._gateway = gateway
        self._model = model
        self._name = name
        self._before = before
        self._offset = before.offset
        self._consumed = before.offset - len(before.pending)  # bytes, of tokens and of a mark
        self._stream = model.tokenizer.stream(before.pending, self._consumed)
        self._tail: deque[Tokens] = deque([before.tail])
        self._certain = len(before.tail)
        """Tokens of `before.tail`, and of all that came since, as far as they are certain."""
        self._progress: Progress | None = None
        self._wants_evidence = evidence
        self._ruler = Ruler()
        self._kept_bytes = self._consumed - self._bytes_of(before.tail)
        if not before.kept_tokens:
            self._ruler.skip(self._kept_bytes)  # a byte order mark, of no token
        self._evidence = Evidence(gateway.settings.max_evidence_spans - 1)
        self.tokenize_s = 0.0

    async def read(self, pieces: Pieces) -> Session:
        """The session with all that `pieces` append. Raises ServiceError, and whatever `pieces`
        raises."""
        async with aclosing(self._tokenize(pieces)) as tokens:
            first, last = await anext(tokens)
            if not last or len(first):
                await self._read(first, last, tokens)
        return self._after()

    @property
    def queue_s(self) -> float:
        return self._progress.queue_s if self._progress else 0.0

    @property
    def compute_s(self) -> float:
        return self._progress.compute_s if self._progress else 0.0

    def shares(self) -> list[Share]:
        """What all earlier appends say, as far as it is not read again, and what this one says, in
        shares that tile the document."""
        before = self._before
        if not before.kept_tokens:
            return [*self._evidence.shares]
        evidence, weight = sums_of(before.state)
        past = Share(before.kept_chunks, before.kept_tokens, self._kept_bytes, weight, evidence)
        return [past, *self._evidence.shares]

    async def _tokenize(self, pieces: Pieces) -> AsyncGenerator[tuple[Tokens, bool]]:
        """The tokens as they become certain, behind the session's tail; and at last those that the
        document has if it ends here."""
        ahead = self._before.tail
        async for piece, _ in pieces:
            tokenize = partial(self._take, piece)
            if len(piece) <= TINY_BYTES:
                certain = tokenize()
            else:
                certain = await self._gateway.in_thread(tokenize, large=len(piece) > SMALL_BYTES)
            self._remember(certain)
            tokens, ahead = np.concatenate([ahead, certain]), NO_TOKENS
            if len(tokens):
                yield self._measured(tokens), False
        self._rest = self._stream.rest()
        yield self._measured(self._rest), True

    def _take(self, piece: bytes) -> Tokens:
        """The tokens that are certain once `piece` has come. Raises NotUtf8."""
        began = time.monotonic()
        self._offset += len(piece)
        begin = self._stream.pending + piece
        try:
            if not self._consumed and _marked(begin):
                self._stream = self._model.tokenizer.stream(offset=len(BOM_UTF8))
                self._ruler.skip(len(BOM_UTF8))
                certain = self._stream.feed(begin[len(BOM_UTF8) :])
            else:
                certain = self._stream.feed(piece)
        except tokenizer.NotUtf8 as error:
            raise NotUtf8(error.offset) from None
        self._consumed = self._offset - len(self._stream.pending)
        spent = time.monotonic() - began
        self.tokenize_s += spent
        self._model.tokenized(len(piece), spent)
        return certain

    def _remember(self, certain: Tokens) -> None:
        """Hold what may not be in the state at the end: less than a chunk, and so than an inbox."""
        self._certain += len(certain)
        self._tail.append(certain)
        held = sum(map(len, self._tail))
        while held - len(self._tail[0]) > self._gateway.settings.inbox_tokens:
            held -= len(self._tail.popleft())

    def _measured(self, tokens: Tokens) -> Tokens:
        if self._wants_evidence:
            self._ruler.extend(self._model.token_bytes[tokens])
        return tokens

    async def _read(
        self, first: Tokens, last: bool, tokens: AsyncGenerator[tuple[Tokens, bool]]
    ) -> None:
        before = self._before
        opening = Opening(
            self._name,
            NO_TOKENS if last else first,
            last=False,
            evidence=self._wants_evidence,
            running=False,
            past=Past(before.model, before.state),
            keep_tokens=1,
            steady=True,
        )
        with closing(await self._model.workers.open(opening)) as opened:
            feeding = opened.feed(first, last=True) if last else feed(opened, tokens)
            await guarded(self._follow(opened), by=feeding)

    async def _follow(self, opened: OpenDocument) -> None:
        async for progress in opened:
            self._progress = progress
            if progress.shares:
                counts, weights, evidence = progress.shares
                for count, weight, share in zip(
                    counts.tolist(), weights.tolist(), evidence, strict=True
                ):
                    self._evidence.add(count, self._ruler.advance(count), weight, share)
            if progress.done:
                return
        raise UnknownDocument("the append was dropped before its end: send it again")

    def _after(self) -> Session:
        before, progress = self._before, self._progress
        past = Past(before.model, before.state)
        kept = progress.kept if progress and progress.kept else Kept(0, 0, past)
        after = before._replace(
            offset=self._offset,
            pending=self._stream.pending,
            tail=self._last(self._certain - kept.tokens),
            kept_tokens=before.kept_tokens + kept.tokens,
            kept_chunks=before.kept_chunks + kept.chunks,
            state=kept.past.snapshot,
        )
        if progress is None:  # no token came, or is read again: the answer is the same
            return after
        return after._replace(
            logits=progress.logits,
            read_bytes=self._consumed + self._bytes_of(self._rest),
            tokens=before.kept_tokens + progress.tokens,
            chunks=before.kept_chunks + progress.chunks,
        )

    def _last(self, count: int) -> Tokens:
        """The last so many of the tokens that are certain."""
        tokens = np.concatenate([NO_TOKENS, *self._tail])
        return tokens[len(tokens) - count :]

    def _bytes_of(self, tokens: Tokens) -> int:
        return int(self._model.token_bytes[tokens].sum(dtype=np.int64))


def _marked(begin: bytes) -> bool:
    """Whether a text begins with a byte order mark: if nothing follows, that is a character."""
    following = begin[len(BOM_UTF8) :][:LONGEST_CHARACTER]
    # An unfinished character is not read yet, so it does not follow either.
    return begin.startswith(BOM_UTF8) and bool(following.decode(errors="ignore"))
