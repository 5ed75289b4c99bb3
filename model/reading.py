"""Reading whole documents, for programs that have no service around them.

Shapes: D documents, R rows, L layers, H heads, K components.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gma.model.classifier import Classifier, Step
from gma.model.tokenizer import Tokenizer, Tokens
from gma.model.weights import Checkpoint

CHUNK = 256
"""Tokens of a row of a `Reader`."""

ROWS = 8
"""Rows of a step of a `Reader`, at most."""


class Chunk(NamedTuple):
    """The next tokens of one document; none if it has ended."""

    document: int
    tokens: Tensor  # (n,) ids


@dataclass(frozen=True)
class Findings:
    """What a whole document says."""

    logits: Tensor  # (labels,) float64
    evidence: Tensor  # (chunks, labels)
    weight: Tensor  # (chunks,)
    usage: Tensor  # (L, H, K) float64: see `Mixer.usage`


@dataclass(frozen=True)
class Share:
    """What one chunk contributes: logits are `Classifier.logits` of the shares' sums."""

    tokens: int
    bytes: int
    weight: float
    evidence: NDArray[np.float32]  # (labels,)


class Reader:
    """Reads one document, in memory that its length does not change if the model is causal."""

    def __init__(
        self, checkpoint: Checkpoint, *, max_tokens: int | None = None, count: bool = False
    ) -> None:
        """`max_tokens`: read no more than the first so many; by default nothing is truncated.
        `count`: tell the usage of components too."""
        self.truncated = False
        """Whether `max_tokens` cut something, once the document was read."""
        self.usage: NDArray[np.float64] | None = None
        """(L, H, K), of what was read so far, if it is counted: see `Mixer.usage`."""
        self._count = count
        self._classifier = checkpoint.classifier
        self._tokenizer = checkpoint.tokenizer
        self._max_tokens = max_tokens

    def read(self, pieces: Iterable[bytes]) -> Iterator[Share]:
        """Yield the document's shares in order, as they are read. They tile what was read.

        `pieces` are its bytes, cut anywhere. Raises `NotUtf8`. An empty document has no shares.
        """
        tokens = self._limited(_tokens(self._tokenizer, pieces))
        causal = self._classifier.config.causal
        with torch.inference_mode():
            yield from self._causal(tokens) if causal else self._bidirectional(tokens)

    def _limited(self, pieces: Iterable[Tokens]) -> Iterator[Tokens]:
        left = self._max_tokens
        for tokens in pieces:
            if left is not None and len(tokens) > left:
                self.truncated = True
                yield tokens[:left]
                return
            yield tokens
            left = None if left is None else left - len(tokens)

    def _causal(self, pieces: Iterable[Tokens]) -> Iterator[Share]:
        steps = ([Chunk(0, row) for row in _rows(whole)] for whole in _full(pieces, ROWS * CHUNK))
        for chunks, step in _read_in_steps(self._classifier, 1, steps, CHUNK, count=self._count):
            rows = [chunk.tokens for chunk in chunks]
            if step.usage is not None:
                self._add(step.usage.double().sum(0))
            yield from self._shares(rows, step.evidence, step.weight)

    def _bidirectional(self, pieces: Iterable[Tokens]) -> Iterator[Share]:
        """Read all before the first answer: its first chunk reads the last token too."""
        tokens = np.concatenate([np.empty(0, np.int32), *pieces])
        if len(tokens):
            (found,) = read(self._classifier, [torch.from_numpy(tokens)], chunk=CHUNK)
            if self._count:
                self._add(found.usage)
            yield from self._shares(_rows(tokens), found.evidence, found.weight)

    def _add(self, usage: Tensor) -> None:
        added = usage.cpu().numpy()
        self.usage = added if self.usage is None else self.usage + added

    def _shares(self, rows: Sequence[Tensor], evidence: Tensor, weight: Tensor) -> Iterator[Share]:
        lengths = self._tokenizer.byte_lengths
        for row, share, size in zip(
            rows, evidence.float().cpu().numpy(), weight.tolist(), strict=True
        ):
            yield Share(len(row), int(lengths[row.numpy()].sum()), size, share)


def _tokens(tokenizer: Tokenizer, pieces: Iterable[bytes]) -> Iterator[Tokens]:
    stream = tokenizer.stream()
    for piece in pieces:
        yield stream.feed(piece)
    yield stream.finish()


def _full(pieces: Iterable[Tokens], size: int) -> Iterator[Tokens]:
    """Cut the same tokens into pieces of `size`; the last may be shorter, and none is empty."""
    held = np.empty(0, np.int32)
    for piece in pieces:
        held = np.concatenate([held, piece])
        whole = len(held) - len(held) % size
        yield from np.split(held[:whole], range(size, whole, size)) if whole else ()
        held = held[whole:]
    if len(held):
        yield held


def _rows(tokens: Tokens) -> Sequence[Tensor]:
    return torch.split(torch.from_numpy(tokens), CHUNK)


@torch.inference_mode()
def read(
    classifier: Classifier, documents: Sequence[Tensor], *, chunk: int = 512, rows: int = 8
) -> list[Findings]:
    """Read whole documents, (N,) ids each, in either direction; not differentiable.

    Causal: `rows` documents side by side, chunk by chunk, in memory that no length changes.
    Bidirectional: one document after the other, layer by layer, in memory linear in N.
    Raises ValueError for an empty document.
    """
    if any(len(document) == 0 for document in documents):
        raise ValueError("an empty document has no answer")
    if not classifier.config.causal:
        # Rows wider than the chunks are not full, and so only one can be in a step.
        rows = rows if chunk >= classifier.config.tail else 1
        return [
            _read_bidirectional(
                classifier,
                [
                    _grid(classifier, torch.split(several, chunk), chunk)
                    for several in torch.split(document, rows * chunk)
                ],
            )
            for document in documents
        ]
    return read_cut(classifier, [torch.split(document, chunk) for document in documents], rows=rows)


@torch.inference_mode()
def read_cut(
    classifier: Classifier, documents: Sequence[Sequence[Tensor]], *, rows: int = 8
) -> list[Findings]:
    """Read whole documents as `read` does, each cut at will into pieces, (n,) ids each.

    Where it is cut changes no answer: evidence and weight are those of the pieces, not of chunks.
    """
    if not classifier.config.causal:
        return [
            _read_bidirectional(
                classifier, [_grid(classifier, [piece], len(piece)) for piece in pieces]
            )
            for pieces in documents
        ]
    found: list[Findings] = []
    for first in range(0, len(documents), rows):
        found += _read_causal(classifier, documents[first : first + rows])
    return found


def _read_causal(classifier: Classifier, documents: Sequence[Sequence[Tensor]]) -> list[Findings]:
    counts = [len(pieces) for pieces in documents]
    chunk = max(len(piece) for pieces in documents for piece in pieces)
    nothing = torch.empty(0, dtype=torch.long)
    steps = (
        [
            Chunk(i, pieces[index] if index < len(pieces) else nothing)
            for i, pieces in enumerate(documents)
        ]
        for index in range(max(counts))
    )
    # Made once: a small tensor kept of each step would scatter over the heap.
    shape, device = (len(documents), max(counts)), classifier.embedding.weight.device
    labels = len(classifier.config.labels)
    evidence = torch.empty(*shape, labels, dtype=classifier.dtype, device=device)
    weight = torch.empty(shape, dtype=classifier.dtype, device=device)
    usage = torch.zeros_like(classifier.new_states(len(documents)).mass, dtype=torch.float64)
    read_in_steps = _read_in_steps(classifier, len(documents), steps, chunk, count=True)
    for index, (_, step) in enumerate(read_in_steps):
        evidence[:, index] = step.evidence
        weight[:, index] = step.weight
        assert step.usage is not None
        usage += step.usage
    logits = classifier.logits(step.states.evidence, step.states.weight)
    return [
        Findings(logits[row], evidence[row, :count], weight[row, :count], usage[row])
        for row, count in enumerate(counts)
    ]


def _read_in_steps(
    classifier: Classifier,
    documents: int,
    steps: Iterable[Sequence[Chunk]],
    chunk: int,
    *,
    count: bool,
) -> Iterator[tuple[Sequence[Chunk], Step]]:
    """Read new documents, in each step a row for each of its chunks, of up to `chunk` tokens.

    Every document has at least one row in every step, and its rows stand together and in order.
    Yields what was read, and what the step answers, with the states (D) of the documents alone.
    """
    device = classifier.embedding.weight.device
    states = classifier.new_states(documents)
    own = torch.arange(documents, device=device)
    for chunks in steps:
        document = torch.tensor([each.document for each in chunks], device=device)
        # A step takes as many states as rows: copies of a document's are no row's, and ignored.
        copies = own.new_zeros(len(chunks) - documents)
        step = classifier.step(
            *_grid(classifier, [each.tokens for each in chunks], chunk),
            document,
            states.gather(torch.cat([own, copies])),
            count=count,
        )
        states = step.states.gather(own)
        yield chunks, step._replace(states=states)


def _grid(classifier: Classifier, rows: Sequence[Tensor], chunk: int) -> tuple[Tensor, Tensor]:
    """Put rows of up to `chunk` tokens into a grid: tokens (R, C) padded with 0, lengths (R,)."""
    # Rows are no narrower than the convolution needs, however small the chunks.
    tokens = torch.zeros(len(rows), max(chunk, classifier.config.tail), dtype=torch.long)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    lengths = torch.tensor([len(row) for row in rows])
    device = classifier.embedding.weight.device
    return tokens.to(device), lengths.to(device)


def _read_bidirectional(classifier: Classifier, steps: Sequence[tuple[Tensor, Tensor]]) -> Findings:
    """Read a document over and over, each time in the same steps: tokens (R, C), lengths (R,)."""
    config = classifier.config
    hidden = [classifier.embedding(tokens) for tokens, _ in steps]
    states = classifier.new_states(1)
    usage = states.mass.new_zeros(config.layers, *states.mass.shape[2:], dtype=torch.float64)
    shares: list[tuple[Tensor, Tensor]] = []
    for number in range(config.passes):
        for index, (tokens, lengths) in enumerate(steps):
            own = lengths.new_zeros(len(lengths))  # a step takes as many states as rows
            begins = torch.full_like(own, index == 0).bool()
            step = classifier.step_in_pass(
                number, tokens, hidden[index], lengths, own, begins, states.gather(own), count=True
            )
            hidden[index], states = step.hidden, step.states.gather(own[:1])
            if step.usage is not None:
                usage[number] += step.usage.double().sum(0)
            if number == config.layers:
                shares.append((step.evidence, step.weight))
    evidence, weight = (torch.cat(parts) for parts in zip(*shares, strict=True))
    logits = classifier.logits(states.evidence, states.weight)[0]
    return Findings(logits, evidence, weight, usage)
