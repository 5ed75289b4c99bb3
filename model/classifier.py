"""The classifier: one step over a fixed grid of rows, or one in a pass over whole documents."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from gma.model.backbone import Backbone
from gma.model.config import ModelConfig
from gma.model.cpu import CpuPooling
from gma.model.layers import Layer, Pooling
from gma.model.ops.chunked import Rows
from gma.model.products import Precision
from gma.model.scores import log_odds
from gma.model.state import State


class Step(NamedTuple):
    """What a step of R rows answers, with the states of as many documents."""

    evidence: Tensor  # (R, labels) float32: sum of weight * score over the row's tokens
    weight: Tensor  # (R,) float32: sum of the weights
    states: State
    usage: Tensor | None = None  # (R, L, H, K) float32, if asked for: see `Mixer.usage`


class PassStep(NamedTuple):
    """What a step of R rows in one pass answers. Evidence is all zeros before the last pass."""

    hidden: Tensor  # (R, C, W): what the next pass reads of these rows
    evidence: Tensor  # (R, labels) float32
    weight: Tensor  # (R,) float32
    states: State
    usage: Tensor | None = None  # (R, H, K) float32 of the layer that was written, if asked for


class Classifier(Backbone):
    """Token ids in, evidence for each label out."""

    config: ModelConfig

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.pooling = Pooling(config)
        self._pools: CpuPooling | None = None

    def choose_mixers(self, precision: Precision = "float32") -> None:
        """See `Backbone.choose_mixers`."""
        super().choose_mixers(precision)
        self._pools = CpuPooling(self.pooling, self.kernels.library) if self.kernels else None

    def logits(self, evidence: Tensor, weight: Tensor) -> Tensor:
        """Turn sums of scores (..., labels) and of weights (...) into logits (..., labels).

        Pooling "mean" divides the one by the other. This mean score counts ``prior_tokens`` more
        that score 0 for every label, so that a few tokens, however clearly they speak, do not make
        an answer sure. Pooling "any" looks at the scores alone, see `gma.model.scores.log_odds`.
        """
        if self.config.pooling == "any":
            return log_odds(evidence)
        return evidence / (weight[..., None] + self.config.prior_tokens)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor,
        document_of_row: Tensor,
        states: State,
        count: bool = False,
    ) -> Step:
        """Do what ``step`` does, under the name that torch.compile and hooks want."""
        if not self.config.causal:
            raise ValueError("a bidirectional model has no step: it reads whole documents")
        if tokens.shape[1] < self.config.tail:
            raise ValueError(
                f"a row must hold at least conv_kernel - 1 = {self.config.tail} tokens"
            )
        rows = Rows.of(lengths, document_of_row, tokens.shape[1], self.dtype)
        # Whatever stands where no token is: from here on it is token 0.
        tokens = tokens.masked_fill(~rows.valid, 0)
        usage: list[Tensor] | None = [] if count else None
        x, memory, mass, tail = self.hidden(self.embedding(tokens), rows, states, usage)
        evidence, weight = self.pooled(x, tokens, rows)
        states = replace(states, memory=memory, mass=mass, tail=tail)
        states = self._pool(states, evidence, weight, rows)
        return Step(evidence, weight, states, None if usage is None else torch.stack(usage, 1))

    def _pool(self, states: State, evidence: Tensor, weight: Tensor, rows: Rows) -> State:
        """Add what the rows say to what their documents do, one after the other."""
        return replace(
            states,
            evidence=states.evidence.index_add(0, rows.document, evidence.double()),
            weight=states.weight.index_add(0, rows.document, weight.double()),
        )

    def step(
        self,
        tokens: Tensor,
        lengths: Tensor,
        document_of_row: Tensor,
        states: State,
        *,
        count: bool = False,
    ) -> Step:
        """Read one chunk in each row: tokens (R, C) ids, lengths (R,), document_of_row (R,).

        Rows of one document stand together and in order, and all but its last are full. A row that
        is not used has length 0 and the index of a document that has no rows. ``states`` are those
        of R documents; those without rows pass unchanged. Any mix of documents and any chunking
        give the same answer. With `count` the rows' usage of components is told too.

        Raises ValueError for a bidirectional model, and if C < conv_kernel - 1.
        """
        step: Step = self(tokens, lengths, document_of_row, states, count)
        return step

    def step_in_pass(
        self,
        number: int,
        tokens: Tensor,
        hidden: Tensor,
        lengths: Tensor,
        document_of_row: Tensor,
        begins: Tensor,
        states: State,
        *,
        count: bool = False,
    ) -> PassStep:
        """Read one chunk in each row, in pass `number` of ``passes`` of a bidirectional model.

        As `step`, but `hidden` (R, C, W) is what the pass before answered for these rows, and in
        the first the embedded tokens; `begins` (R,) bool tells documents whose pass begins here.
        A document's pass ends before its next begins.
        """
        return self.step_between(
            *self.layers_of(number),
            tokens,
            hidden,
            lengths,
            document_of_row,
            begins,
            states,
            count=count,
        )

    def step_between(
        self,
        reads: Layer | None,
        writes: Layer | None,
        tokens: Tensor,
        hidden: Tensor,
        lengths: Tensor,
        document_of_row: Tensor,
        begins: Tensor,
        states: State,
        *,
        count: bool = False,
    ) -> PassStep:
        """Do what `step_in_pass` does, in the pass between two layers of `layers_of`.

        All passes but the first and the last do the same with other weights, so a compiler that
        takes layers for inputs compiles them once.
        """
        rows = Rows.of(lengths, document_of_row, tokens.shape[1], self.dtype)
        tokens = tokens.masked_fill(~rows.valid, 0)
        # Zeros where no token is: what lies there is multiplied by zero later, and may be NaN.
        x = hidden.masked_fill(~rows.valid[..., None], 0)
        x, states = self.hidden_between(reads, writes, x, rows, states.turned(begins))
        if writes is not None:
            evidence = states.mass.new_zeros(len(tokens), len(self.config.labels))
            usage = writes.mixer.usage(x, rows) if count else None
            return PassStep(x, evidence, evidence[:, 0], states, usage)
        evidence, weight = self.pooled(x, tokens, rows)
        return PassStep(x, evidence, weight, self._pool(states, evidence, weight, rows))

    def pooled(self, x: Tensor, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Sum the scores of each row's tokens, of which each weighs one.

        Hidden x (R, C, W) and tokens (R, C) -> evidence (R, labels) and weight (R,).
        """
        there = rows.valid.to(x.dtype)
        if self._pools and self.kernels and self.kernels.take(x):
            return self._pools.evidence(x, tokens, rows), there.sum(1)
        scores: Tensor = self.pooling(x, tokens)
        there = there.to(scores.dtype)
        return (there[..., None] * scores).sum(1), there.sum(1)
