"""Reading one document from bytes to evidence, for programs that have no service around them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gma.model.classifier import Classifier
from gma.model.state import State
from gma.model.tokenizer import Tokenizer, Tokens
from gma.model.weights import Checkpoint

CHUNK = 256
"""Tokens of a row."""

ROWS = 8
"""Rows of a step at most."""


@dataclass(frozen=True)
class Span:
    """One chunk's share of the document: logits are `Classifier.logits` of the spans' sums."""

    tokens: int
    bytes: int
    weight: float
    evidence: NDArray[np.float32]  # (labels,)


class Reader:
    """Reads one document, in memory that its length does not change if the model is causal."""

    def __init__(self, checkpoint: Checkpoint, *, max_tokens: int | None = None) -> None:
        """`max_tokens`: read no more than the first so many; by default nothing is truncated."""
        self.truncated = False
        """Whether `max_tokens` cut something, once the document was read."""
        self._classifier = checkpoint.classifier
        self._tokenizer = checkpoint.tokenizer
        self._max_tokens = max_tokens

    def read(self, pieces: Iterable[bytes]) -> Iterator[Span]:
        """The document's spans in order, as they are read. They tile what was read.

        `pieces` are its bytes, cut anywhere. Raises `NotUtf8`. An empty document has no spans.
        """
        tokens = self._limited(_tokens(self._tokenizer, pieces))
        with torch.inference_mode():
            if self._classifier.config.causal:
                yield from self._steps(_regular(tokens, ROWS * CHUNK))
            else:
                yield from self._whole(tokens)

    def _limited(self, pieces: Iterable[Tokens]) -> Iterator[Tokens]:
        left = self._max_tokens
        for tokens in pieces:
            if left is not None and len(tokens) > left:
                self.truncated = True
                yield tokens[:left]
                return
            yield tokens
            left = None if left is None else left - len(tokens)

    def _steps(self, batches: Iterable[Tokens]) -> Iterator[Span]:
        """`batches`: (n,) ids each, all but the last filling a step."""
        state = self._classifier.new_states(1)
        for tokens in batches:
            rows = _rows(tokens)
            evidence, weight, state = _step(self._classifier, rows, state)
            yield from self._spans(rows, evidence, weight)

    def _whole(self, pieces: Iterable[Tokens]) -> Iterator[Span]:
        """A bidirectional model's answer starts with the document's last token."""
        tokens = np.concatenate([np.empty(0, np.int32), *pieces])
        if len(tokens):
            reading = self._classifier.read([torch.from_numpy(tokens)], chunk=CHUNK)[0]
            yield from self._spans(_rows(tokens), reading.evidence, reading.weight)

    def _spans(
        self, rows: list[Tokens], evidence: torch.Tensor, weight: torch.Tensor
    ) -> Iterator[Span]:
        for row, share, size in zip(
            rows, evidence.float().cpu().numpy(), weight.tolist(), strict=True
        ):
            yield Span(len(row), int(self._tokenizer.byte_lengths[row].sum()), size, share)


def _tokens(tokenizer: Tokenizer, pieces: Iterable[bytes]) -> Iterator[Tokens]:
    stream = tokenizer.stream()
    for piece in pieces:
        yield stream.feed(piece)
    yield stream.finish()


def _regular(pieces: Iterable[Tokens], size: int) -> Iterator[Tokens]:
    """The same tokens in pieces of `size`; the last may be shorter, and none is empty."""
    held = np.empty(0, np.int32)
    for piece in pieces:
        held = np.concatenate([held, piece])
        whole = len(held) - len(held) % size
        yield from np.split(held[:whole], range(size, whole, size)) if whole else ()
        held = held[whole:]
    if len(held):
        yield held


def _rows(tokens: Tokens) -> list[Tokens]:
    return np.split(tokens, range(CHUNK, len(tokens), CHUNK))


def _step(
    classifier: Classifier, rows: list[Tokens], state: State
) -> tuple[torch.Tensor, torch.Tensor, State]:
    """One step whose rows are all of one document: evidence (R, labels), weight (R,), its state."""
    device = classifier.embedding.weight.device
    grid = np.zeros((len(rows), CHUNK), np.int64)
    for place, row in zip(grid, rows, strict=True):
        place[: len(row)] = row
    lengths = torch.tensor([len(row) for row in rows], device=device)
    document = torch.zeros(len(rows), dtype=torch.long, device=device)
    # A step takes as many states as rows. The copies of the document's are no row's, and ignored.
    step = classifier.step(
        torch.from_numpy(grid).to(device), lengths, document, state.gather(document)
    )
    return step.evidence, step.weight, step.states.gather(document[:1])
