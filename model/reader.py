"""Reading text: a document as it comes, or many side by side."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gma.model.reading import Places, read
from gma.model.tokenizer import Tokenizer, Tokens, TokenStream
from gma.model.weights import Checkpoint

CHUNK = 256
"""Tokens of a row."""

ROWS = 8
"""Rows of a step, at most."""


@dataclass(frozen=True)
class Share:
    """What one chunk contributes: logits are `Classifier.logits` of the shares' sums."""

    tokens: int
    bytes: int
    weight: float
    evidence: NDArray[np.float32]  # (labels,)
    usage: NDArray[np.float64] | None
    """(L, H, K), if it is counted: see `Mixer.usage`. Of a bidirectional model the first share's is
    the whole document's, and the others have none."""


class Text:
    """The tokens of one text as its bytes come; a byte order mark at its beginning is no text."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int | None = None) -> None:
        """`max_tokens`: give no more than the first so many."""
        self.mark = 0
        """Bytes of the byte order mark, if there was one."""
        self.truncated = False
        """Whether `max_tokens` cut something so far."""
        self._tokenizer, self._left = tokenizer, max_tokens
        self._stream = tokenizer.stream()
        self._head: bytes | None = b""  # what may still become the mark; None once that is decided

    def feed(self, data: bytes) -> Tokens:
        """Take the next bytes, and return (n,) the tokens that are certain. Raises `NotUtf8`."""
        if self.truncated:
            return np.empty(0, np.int32)
        if self._head is not None:
            data = self._head + data
            if len(data) <= len(BOM_UTF8) and BOM_UTF8.startswith(data):
                self._head = data
                return np.empty(0, np.int32)
            self._head = None
            if data.startswith(BOM_UTF8):
                data, self.mark = data[len(BOM_UTF8) :], len(BOM_UTF8)
                self._stream = self._tokenizer.stream(offset=self.mark)
        tokens = self._first(self._stream.feed(data))
        if self._left is not None:
            self._left -= len(tokens)
        return tokens

    def rest(self) -> Tokens:
        """Return (n,) what `finish` would; nothing changes. Half a character has no token."""
        truncated = self.truncated
        tokens = self._first(self._undecided().rest())
        self.truncated = truncated
        return tokens

    def finish(self) -> Tokens:
        """End the text, and return (n,) its last tokens. Raises `NotUtf8` for half a character."""
        if self.truncated:  # what was not read may end anywhere
            return np.empty(0, np.int32)
        return self._first(self._undecided().finish())

    def rows(self, pieces: Iterable[bytes]) -> Iterator[Tensor]:
        """Yield the tokens of a whole text, its bytes cut anywhere, in rows: all full but the last.

        Raises `NotUtf8`, and whatever `pieces` raises.
        """
        held = np.empty(0, np.int32)
        for tokens in self._tokens(pieces):
            held = np.concatenate([held, tokens])
            whole = len(held) - len(held) % CHUNK
            yield from _rows(held[:whole])
            held = held[whole:]
        yield from _rows(held)

    def _tokens(self, pieces: Iterable[bytes]) -> Iterator[Tokens]:
        for piece in pieces:
            yield self.feed(piece)
            if self.truncated:
                return
        yield self.finish()

    def _undecided(self) -> TokenStream:
        """The stream, with what might have become a mark and now does not."""
        return self._tokenizer.stream(self._head) if self._head else self._stream

    def _first(self, tokens: Tokens) -> Tokens:
        if self._left is not None and len(tokens) > self._left:
            self.truncated = True
            return tokens[: self._left]
        return tokens


class Reader:
    """Reads one document as its bytes come, in memory that its length does not change if the model
    is causal. The shares tile what was read. Not for several threads at once."""

    def __init__(
        self, checkpoint: Checkpoint, *, max_tokens: int | None = None, count: bool = False
    ) -> None:
        """`max_tokens`: read no more than the first so many; by default nothing is truncated.
        `count`: tell the usage of components too."""
        self.text = Text(checkpoint.tokenizer, max_tokens)
        self._checkpoint, self._count = checkpoint, count
        self._places = Places(checkpoint.classifier, 1, CHUNK, count=count)
        self._held: list[Tokens] = []

    def feed(self, data: bytes) -> list[Share]:
        """Take the document's next bytes, and return the shares that no later ones can change.

        A bidirectional model has none before the end. Raises `NotUtf8`.
        """
        self._held.append(self.text.feed(data))
        held, step = sum(map(len, self._held)), ROWS * CHUNK
        if held < step or not self._checkpoint.config.causal:
            return []
        tokens = np.concatenate(self._held)
        whole = held - held % step
        self._held = [tokens[whole:]]
        return self._read(tokens[:whole])

    def rest(self) -> list[Share]:
        """Return the shares that the document would end with if it ended here.

        It may go on: nothing changes. An unfinished last character has no share.
        """
        before = self._places.states
        self._places.states = before.copy()
        try:
            return self._read(np.concatenate([*self._held, self.text.rest()]))
        finally:
            self._places.states = before

    def finish(self) -> list[Share]:
        """End the document, and return its last shares; an empty document has none.

        Raises `NotUtf8` if its last character is unfinished.
        """
        tokens = np.concatenate([*self._held, self.text.finish()])
        self._held = []
        return self._read(tokens)

    @torch.inference_mode()
    def _read(self, tokens: Tokens) -> list[Share]:
        rows = [*_rows(tokens)]
        if not self._checkpoint.config.causal:
            return _bidirectional(self._checkpoint, rows, count=self._count)
        found: list[Share] = []
        for start in range(0, len(rows), ROWS):
            some = rows[start : start + ROWS]
            step = self._places.step({0: some})
            usage = None if step.usage is None else step.usage.double()
            found += _shares(self._checkpoint, some, step.evidence, step.weight, usage)
        return found


def side_by_side(
    checkpoint: Checkpoint, documents: Sequence[Iterator[Tensor]], *, count: bool = False
) -> Iterator[tuple[int, Share]]:
    """Read documents, the rows (n,) of each, and yield which one each share is of.

    They are begun in this order. In a step of a causal model several have a row, so that short ones
    do not have to be read one by one; what room is left goes to those that were begun first. Memory
    does not depend on how long or how many they are. `count` is `Reader`'s. Raises what the rows
    raise.
    """
    if not checkpoint.config.causal:
        for index, document in enumerate(documents):
            found = _bidirectional(checkpoint, [*document], count=count)
            yield from ((index, share) for share in found)
        return
    places = Places(checkpoint.classifier, min(ROWS, len(documents)), CHUNK, count=count)
    waiting = iter(range(len(documents)))
    in_place = dict(enumerate(islice(waiting, ROWS)))
    while rows := _next_rows(documents, places, in_place, waiting):
        flat = [row for some in rows.values() for row in some]
        with torch.inference_mode():
            step = places.step(rows)
            usage = None if step.usage is None else step.usage.double()
            shares = _shares(checkpoint, flat, step.evidence, step.weight, usage)
        owners = [in_place[place] for place, some in rows.items() for _ in some]
        yield from zip(owners, shares, strict=True)


def _next_rows(
    documents: Sequence[Iterator[Tensor]],
    places: Places,
    in_place: dict[int, int],
    waiting: Iterator[int],
) -> dict[int, list[Tensor]]:
    """Take the rows of a step; none if all documents have ended.

    One of each document in a place, where one that has ended makes room for one that waits; then
    more of those that have more.
    """
    rows: dict[int, list[Tensor]] = {}
    for place in [*in_place]:
        while place not in rows and place in in_place:
            row = next(documents[in_place[place]], None)
            if row is not None:
                rows[place] = [row]
            elif (index := next(waiting, None)) is not None:
                places.clear(place)
                in_place[place] = index
            else:
                del in_place[place]
    for place, some in rows.items():
        left = ROWS - sum(len(each) for each in rows.values())
        some += islice(documents[in_place[place]], left)
    return rows


def _bidirectional(checkpoint: Checkpoint, rows: Sequence[Tensor], *, count: bool) -> list[Share]:
    """Read a document after its end: its first chunk reads the last token too."""
    if not rows:
        return []
    (found,) = read(checkpoint.classifier, [torch.cat([*rows])], chunk=CHUNK)
    usage = None
    if count:
        usage = torch.zeros(len(rows), *found.usage.shape, dtype=torch.float64)
        usage[0] = found.usage
    return _shares(checkpoint, rows, found.evidence, found.weight, usage)


def _shares(
    checkpoint: Checkpoint,
    rows: Sequence[Tensor],
    evidence: Tensor,
    weight: Tensor,
    usage: Tensor | None,
) -> list[Share]:
    lengths = checkpoint.tokenizer.byte_lengths
    counted = [None] * len(rows) if usage is None else [*usage.cpu().numpy()]
    return [
        Share(len(row), int(lengths[row.numpy()].sum()), size, share, taken)
        for row, share, size, taken in zip(
            rows, evidence.float().cpu().numpy(), weight.tolist(), counted, strict=True
        )
    ]


def _rows(tokens: Tokens) -> Sequence[Tensor]:
    return torch.split(torch.from_numpy(tokens), CHUNK) if len(tokens) else ()
