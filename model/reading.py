"""Reading whole documents of tokens, for programs that have no service around them.

Shapes: D documents, R rows, L layers, H heads, K components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gma.model.classifier import Classifier, Step


@dataclass(frozen=True)
class Findings:
    """What a whole document says."""

    logits: Tensor  # (labels,) float64
    evidence: Tensor  # (chunks, labels)
    weight: Tensor  # (chunks,)
    usage: Tensor  # (L, H, K) float64: see `Mixer.usage`


class Places:
    """Causal documents that are read side by side, each with its state in a place."""

    def __init__(self, classifier: Classifier, places: int, chunk: int, *, count: bool) -> None:
        """`chunk`: tokens of a row at most. `count`: steps tell the usage of components too."""
        self._classifier, self._chunk, self._count = classifier, chunk, count
        self.states = classifier.new_states(places)

    def step(self, rows: Mapping[int, Sequence[Tensor]]) -> Step:
        """Read the next tokens, (n,) ids in each row, of the documents in some places.

        All rows of a document but its last are full. What is told is row by row, in this order;
        the states stay here.
        """
        device = self._classifier.embedding.weight.device
        own = torch.tensor([*rows], device=device)
        tokens = [row for of_document in rows.values() for row in of_document]
        document = torch.tensor(
            [index for index, of_document in enumerate(rows.values()) for _ in of_document],
            device=device,
        )
        # A step takes as many states as rows: copies of a document's are no row's, and ignored.
        copies = own[:1].expand(len(tokens) - len(own))
        # Where all are short the grid is narrow, of one of a few widths.
        longest = max(map(len, tokens))
        step = self._classifier.step(
            *_grid(self._classifier, tokens, min(self._chunk, 1 << (longest - 1).bit_length())),
            document,
            self.states.gather(torch.cat([own, copies])),
            count=self._count,
        )
        self.states.scatter_(own, step.states.gather(torch.arange(len(own), device=device)))
        return step

    def clear(self, place: int) -> None:
        """Let another document begin in a place."""
        at = torch.tensor([place], device=self.states.weight.device)
        self.states.scatter_(at, self._classifier.new_states(1))


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
    # Made once: a small tensor kept of each step would scatter over the heap.
    shape, device = (len(documents), max(counts)), classifier.embedding.weight.device
    labels = len(classifier.config.labels)
    evidence = torch.empty(*shape, labels, dtype=classifier.dtype, device=device)
    weight = torch.empty(shape, dtype=classifier.dtype, device=device)
    usage = torch.zeros_like(classifier.new_states(len(documents)).mass, dtype=torch.float64)
    places = Places(classifier, len(documents), chunk, count=True)
    for index in range(max(counts)):
        own = [i for i, count in enumerate(counts) if index < count]
        step = places.step({i: [documents[i][index]] for i in own})
        evidence[own, index] = step.evidence
        weight[own, index] = step.weight
        assert step.usage is not None
        usage[own] += step.usage
    logits = classifier.logits(places.states.evidence, places.states.weight)
    return [
        Findings(logits[row], evidence[row, :count], weight[row, :count], usage[row])
        for row, count in enumerate(counts)
    ]


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
