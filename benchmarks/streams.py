"""Documents read step by step, as the whole models' comparison does it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.definitions import relative_error
from gma.model.classifier import Classifier, Step
from gma.model.config import ModelConfig
from gma.model.state import State

TakeStep = Callable[[Tensor, Tensor, Tensor, State], Step]

CAPTURED = 1 << 16
"""Tokens of the longest step that is captured: a longer one hides its launches."""


class Grid(NamedTuple):
    rows: int = 64
    chunk: int = 1024

    @property
    def tokens(self) -> int:
        return self.rows * self.chunk

    def within(self, tokens: int) -> Grid:
        """The grid with as many of its rows as so many tokens fill."""
        return Grid(min(self.rows, max(1, tokens // self.chunk)), min(self.chunk, tokens))


def our_step(classifier: Classifier, precision: Literal["bfloat16", "fp8"], grid: Grid) -> TakeStep:
    """The fused step for grids up to this one; on the CPU the classifier's own step."""
    if classifier.embedding.weight.device.type != "cuda":
        return classifier.step
    fused, buffers = map(import_module, ("gma.model.fused.step", "gma.model.fused.buffers"))
    step = fused.FusedStep(classifier, rows=grid.rows, chunk=grid.chunk, precision=precision)
    device, labels = step.device, len(classifier.config.labels)

    def take(tokens: Tensor, lengths: Tensor, document_of_row: Tensor, states: State) -> Step:
        """See `Classifier.step`. The states that are given are overwritten."""
        rows = len(lengths)
        inputs = buffers.Inputs.empty(tokens.shape, device)
        outputs = buffers.Outputs.empty(rows, labels, device)
        every = torch.arange(rows, device=device)
        belongs = (every[:, None] == document_of_row) & (lengths > 0)
        for mine, given in (
            (inputs.tokens, tokens),
            (inputs.lengths, lengths),
            (inputs.document, document_of_row),
            (inputs.slots, every),
            (inputs.first_row, belongs.int().argmax(1)),
            (inputs.row_count, belongs.sum(1)),
        ):
            mine.copy_(given)
        step(inputs, states, outputs)
        return Step(outputs.evidence, lengths.float(), states)

    return take


class Stream:
    """A step that leaves its state in place for the next, so that it can be a CUDA graph."""

    def __init__(
        self, advance: Callable[[], object], tokens: Tensor, state: Sequence[Tensor]
    ) -> None:
        """``advance`` reads ``tokens`` on top of ``state``, and leaves there the state after."""
        self.eager, self.tokens, self.state = advance, tokens, state
        self.replay: timing.Call | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that stay between steps."""
        return sum(x.untyped_storage().nbytes() for x in (self.tokens, *self.state))

    def read(self, document: Tensor, *, eager: bool = False) -> list[Tensor]:
        """The state after a document (N,) on the host, N a multiple of the step's tokens."""
        advance = self.eager if eager else self.replay or self.eager
        for x in self.state:
            x.zero_()
        for piece in torch.split(document, self.tokens.numel()):
            self.tokens.copy_(piece.view_as(self.tokens), non_blocking=True)
            advance()
        return [x.clone() for x in self.state]

    def capture(self, document: Tensor) -> None:
        """Replay the step from now on, if that gives the same state."""
        if self.tokens.device.type != "cuda" or self.tokens.numel() > CAPTURED:
            return
        expected = self.read(document, eager=True)

        def advance() -> tuple[Tensor, ...]:
            self.eager()
            return ()

        self.replay = timing.captured(advance)
        pairs = zip(self.read(document), expected, strict=True)
        if not all(torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in pairs):
            self.replay = None


def stream_of_steps(take: TakeStep, classifier: Classifier, grid: Grid) -> Stream:
    """A stream of our model: all rows are the first document's, and the others have none."""
    device = classifier.embedding.weight.device
    tokens = torch.zeros(grid, dtype=torch.int32, device=device)
    lengths = torch.full((grid.rows,), grid.chunk, device=device)
    document_of_row = torch.zeros(grid.rows, dtype=torch.int64, device=device)
    states = classifier.new_states(grid.rows)
    mine = [x[:1] for _, x in states.tensors()]

    def advance() -> None:
        after = take(tokens, lengths, document_of_row, states).states
        for x, (_, new) in zip(mine, after.tensors(), strict=True):
            x.copy_(new[:1])

    return Stream(advance, tokens, mine)


def stream_of_backbone(
    model: Callable[..., Any], config: ModelConfig, tokens: int, device: torch.device
) -> Stream:
    """A stream of another backbone; with attention, ``tokens`` must be all of the document."""
    read = torch.zeros(tokens, dtype=torch.int32, device=device)
    shape = config.layers, config.tail, config.width
    tails = torch.zeros(shape, device=device, dtype=torch.bfloat16)
    scores = torch.zeros(len(config.labels), device=device)

    def advance() -> None:
        found, after = model(read, tails)
        scores.add_(found)
        tails.copy_(after)

    return Stream(advance, read, [tails, scores])


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of the tensors, by norms."""
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def errors(take: TakeStep, classifier: Classifier, chunk: int) -> tuple[float, float]:
    """Errors of the logits and the states (memory, mass, tail) of two documents after two steps."""
    device, vocabulary = classifier.embedding.weight.device, classifier.config.vocab_size
    exact = copy.deepcopy(classifier).double()
    which = torch.tensor([0, 0, 1, 3], device=device)
    mine, reference = classifier.new_states(4), exact.new_states(4)
    for _ in range(2):
        tokens = torch.randint(vocabulary, (4, chunk), device=device)
        lengths = torch.tensor([chunk, chunk // 3, chunk - 1, 0], device=device)
        mine = take(tokens.int(), lengths, which, mine).states
        reference = exact.step(tokens, lengths, which, reference).states
    logits = [classifier.logits(x.evidence[:2], x.weight[:2]) for x in (mine, reference)]
    parts = [(x.memory[:2], x.mass[:2], x.tail[:2]) for x in (mine, reference)]
    return error(logits[:1], logits[1:]), error(*parts)
