"""The classifier: one step over a fixed grid of rows, and whole documents in either direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gma.model.config import ModelConfig
from gma.model.layers import MLP, Layer, Pooling
from gma.model.ops.choice import choose
from gma.model.ops.chunked import Rows
from gma.model.state import State


class Step(NamedTuple):
    """What a step answers: R rows, as many documents."""

    evidence: Tensor  # (R, labels) float32: sum of weight * score over the row's tokens
    weight: Tensor  # (R,) float32: sum of the weights
    states: State


@dataclass(frozen=True)
class Reading:
    """What a whole document says."""

    logits: Tensor  # (labels,) float64
    evidence: Tensor  # (chunks, labels)
    weight: Tensor  # (chunks,)
    mass: Tensor  # (L, H, K): how much was written to each component of each head


class Classifier(nn.Module):
    """Token ids in, evidence for each label out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.pooling = Pooling(config)
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(parameter, std=0.5 * (parameter.shape[1] * config.layers) ** -0.5)

    @property
    def dtype(self) -> torch.dtype:
        """At least float32: what states and sums are kept in."""
        return torch.promote_types(self.embedding.weight.dtype, torch.float32)

    @property
    def mixers(self) -> str:
        """Which implementation of the operation the layers use: see `gma.model.ops.choice`."""
        layer = self.layers[0]
        assert isinstance(layer, Layer)
        return layer.mixer.operation.name

    def choose_mixers(self) -> None:
        """Use the fastest implementation where the weights are, in their dtype."""
        operation = choose(self.config, self.embedding.weight)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.mixer.operation = operation

    def hidden_reach(self) -> float:
        """What no hidden activation of any layer exceeds."""
        return max(module.reach() for module in self.modules() if isinstance(module, MLP))

    def logits(self, evidence: Tensor, weight: Tensor) -> Tensor:
        """Sums of scores (..., labels) and of weights (...) -> the mean score, (..., labels).

        It counts ``prior_tokens`` more that score 0 for every label, so that a few tokens, however
        clearly they speak, do not make an answer sure.
        """
        return evidence / (weight[..., None] + self.config.prior_tokens)

    def new_states(self, documents: int) -> State:
        """States of documents of which nothing was read yet, where the weights are."""
        device = self.embedding.weight.device
        return State.zeros(self.config, documents, device=device, dtype=self.dtype)

    def hidden(self, x: Tensor, rows: Rows, states: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embedded tokens (R, C, W) through causal layers.

        Returns hidden (R, C, W), and the states' memory, mass and tail after them.
        """
        memories, masses, tails = [], [], []
        for index, layer in enumerate(self.layers):
            x, memory, mass, tail = layer(
                x, states.memory[:, index], states.mass[:, index], states.tail[:, index], rows
            )
            memories.append(memory)
            masses.append(mass)
            tails.append(tail)
        return x, torch.stack(memories, 1), torch.stack(masses, 1), torch.stack(tails, 1)

    def hidden_bidirectional(
        self, pieces: Sequence[Tensor], rows: Sequence[Rows]
    ) -> tuple[list[Tensor], Tensor]:
        """Embedded documents, whole, in pieces (R, C, W) in order, through bidirectional layers.

        Each layer first writes all pieces into its memory, then lets all pieces read it. Row r of
        every piece is of document r. Returns the hidden pieces and the masses (R, L, H, K).
        """
        hidden = list(pieces)
        states = self.new_states(len(hidden[0]))
        masses = []
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            memory, mass = states.memory[:, index], states.mass[:, index]
            tail = states.tail[:, index]
            for i, x in enumerate(hidden):
                hidden[i], tail = layer.convolve(x, tail, rows[i])
                more_memory, more_mass = layer.mixer.write(hidden[i], rows[i])
                memory, mass = memory + more_memory, mass + more_mass
            for i, x in enumerate(hidden):
                hidden[i] = layer.recall(x, memory, mass, rows[i])
            masses.append(mass)
        return hidden, torch.stack(masses, 1)

    def hidden_alone(self, x: Tensor, rows: Rows) -> Tensor:
        """Embedded tokens, each row a whole document: x (R, C, W) -> hidden (R, C, W)."""
        if self.config.causal:
            return self.hidden(x, rows, self.new_states(len(x)))[0]
        return self.hidden_bidirectional([x], [rows])[0][0]

    def forward(
        self, tokens: Tensor, lengths: Tensor, document_of_row: Tensor, states: State
    ) -> Step:
        """``step``, as torch.compile and hooks want it named."""
        if not self.config.causal:
            raise ValueError("a bidirectional model has no step: read() takes whole documents")
        if tokens.shape[1] < self.config.tail:
            raise ValueError(
                f"a row must hold at least conv_kernel - 1 = {self.config.tail} tokens"
            )
        rows = Rows.of(lengths, document_of_row, tokens.shape[1], self.dtype)
        # Whatever stands where no token is: from here on it is token 0.
        tokens = tokens.masked_fill(~rows.valid, 0)
        x, memory, mass, tail = self.hidden(self.embedding(tokens), rows, states)
        evidence, weight = self._pooled(x, tokens, rows)
        belongs = rows.belongs.double()
        return Step(
            evidence,
            weight,
            State(
                memory=memory,
                mass=mass,
                tail=tail,
                evidence=states.evidence + belongs @ evidence.double(),
                weight=states.weight + belongs @ weight.double(),
            ),
        )

    def step(self, tokens: Tensor, lengths: Tensor, document_of_row: Tensor, states: State) -> Step:
        """Read one chunk in each row: tokens (R, C) ids, lengths (R,), document_of_row (R,).

        Rows of one document stand together and in order, and all but its last are full. A row that
        is not used has length 0 and the index of a document that has no rows. ``states`` are those
        of R documents; those without rows pass unchanged. Any mix of documents and any chunking
        give the same answer.

        Raises ValueError for a bidirectional model, and if C < conv_kernel - 1.
        """
        step: Step = self(tokens, lengths, document_of_row, states)
        return step

    @torch.inference_mode()
    def read(
        self, documents: Sequence[Tensor], *, chunk: int = 512, rows: int = 8
    ) -> list[Reading]:
        """Whole documents, (N,) ids each, in either direction; not differentiable.

        Causal: ``rows`` documents side by side, chunk by chunk, in memory that no length changes.
        Bidirectional: one document after the other, layer by layer, in memory linear in N.
        Raises ValueError for an empty document.
        """
        if any(len(document) == 0 for document in documents):
            raise ValueError("an empty document has no answer")
        if not self.config.causal:
            return [self._read_bidirectional(document, chunk) for document in documents]
        readings: list[Reading] = []
        for first in range(0, len(documents), rows):
            readings += self._read_causal(documents[first : first + rows], chunk)
        return readings

    def _read_causal(self, documents: Sequence[Tensor], chunk: int) -> list[Reading]:
        device = self.embedding.weight.device
        states = self.new_states(len(documents))
        which = torch.arange(len(documents), device=device)
        counts = [-(-len(document) // chunk) for document in documents]
        # Made once: a small tensor kept of each step would scatter over the heap.
        shape = len(documents), max(counts)
        evidence = torch.empty(*shape, len(self.config.labels), dtype=self.dtype, device=device)
        weight = torch.empty(shape, dtype=self.dtype, device=device)
        for index in range(max(counts)):
            step = self.step(*self._chunks(documents, index * chunk, chunk), which, states)
            states = step.states
            evidence[:, index] = step.evidence
            weight[:, index] = step.weight
        logits = self.logits(states.evidence, states.weight)
        return [
            Reading(logits[row], evidence[row, :count], weight[row, :count], states.mass[row])
            for row, count in enumerate(counts)
        ]

    def _read_bidirectional(self, document: Tensor, chunk: int) -> Reading:
        device = self.embedding.weight.device
        which = torch.zeros(1, dtype=torch.long, device=device)
        pieces = [
            self._chunks([document], start, chunk) for start in range(0, len(document), chunk)
        ]
        rows = [Rows.of(lengths, which, tokens.shape[1], self.dtype) for tokens, lengths in pieces]
        embedded = [self.embedding(tokens) for tokens, _ in pieces]
        hidden, mass = self.hidden_bidirectional(embedded, rows)
        pooled = [
            self._pooled(x, tokens, row)
            for x, (tokens, _), row in zip(hidden, pieces, rows, strict=True)
        ]
        evidence, weight = (torch.cat(parts) for parts in zip(*pooled, strict=True))
        logits = self.logits(evidence.double().sum(0), weight.double().sum())
        return Reading(logits, evidence, weight, mass[0])

    def _chunks(self, documents: Sequence[Tensor], start: int, chunk: int) -> tuple[Tensor, Tensor]:
        """The documents' next ``chunk`` tokens: tokens (R, C) padded with 0, lengths (R,)."""
        # Rows are no narrower than the convolution needs, however small the chunks.
        tokens = torch.zeros(len(documents), max(chunk, self.config.tail), dtype=torch.long)
        lengths = torch.zeros(len(documents), dtype=torch.long)
        for row, document in enumerate(documents):
            piece = document[start : start + chunk]
            tokens[row, : len(piece)] = piece
            lengths[row] = len(piece)
        device = self.embedding.weight.device
        return tokens.to(device), lengths.to(device)

    def _pooled(self, x: Tensor, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Every token weighs one: a row's evidence (R, labels) and weight (R,) are plain sums."""
        scores: Tensor = self.pooling(x, tokens)
        there = rows.valid.to(scores.dtype)
        return torch.einsum("rc,rcl->rl", there, scores), there.sum(1)
