"""The invariant: however a document was read, it is as if it was read at once, in float64."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gma.model.classifier import Classifier
from gma.model.config import ModelConfig
from gma.model.state import State
from tests.model.small import SMALL, ByHand, by_hand, error


class Share(NamedTuple):
    """What one row said about the document's next tokens."""

    tokens: int
    evidence: Tensor  # (labels,)
    weight: float
    usage: Tensor | None = None  # (L, H, K), if it was counted


class Read(NamedTuple):
    shares: list[list[Share]]  # of each document, in order
    states: State  # of the documents


def used_state(config: ModelConfig, documents: int, rng: np.random.Generator) -> State:
    """States as after some hundred tokens."""
    zeros = State.zeros(config, documents)
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 30)))

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    mass = normal(zeros.mass).abs() * 100 + 1
    evidence = normal(zeros.evidence).double()
    return State(
        memory=normal(zeros.memory) * mass[..., None],
        mass=mass,
        tail=normal(zeros.tail),
        evidence=evidence.abs() if config.pooling == "any" else evidence * 100,
        weight=torch.full_like(zeros.weight, 321.0),
    )


def documents_of(lengths: list[int], rng: np.random.Generator) -> list[Tensor]:
    return [torch.from_numpy(rng.integers(0, SMALL.vocab_size, n)) for n in lengths]


def as_double(state: State) -> State:
    return State(**{name: x.double() for name, x in state.tensors()})


def one_shot(classifier: Classifier, document: Tensor, before: State) -> ByHand:
    """In float64, from the definition."""
    return by_hand(copy.deepcopy(classifier).double(), document, as_double(before))


def assert_same(
    classifier: Classifier,
    documents: list[Tensor],
    before: State,
    read: Read,
    tolerance: float,
    of_states: float | None = None,
) -> None:
    """Hold evidence to `tolerance`, and states as well unless theirs is another."""
    of_states = of_states or tolerance
    for index, document in enumerate(documents):
        here = torch.tensor([index])
        expected = one_shot(classifier, document, before.gather(here))
        after = read.states.gather(here)
        assert error(after.memory[0], expected.memory) <= of_states
        assert error(after.mass[0], expected.mass) <= of_states
        assert error(after.tail[0], expected.tail) <= of_states
        total = before.evidence[index] + expected.scores.sum(0)
        assert error(after.evidence[0], total) <= tolerance
        assert float(after.weight[0]) == float(before.weight[index]) + len(document)
        # A row's share is relative to what its tokens say, which may cancel out, or to what as many
        # of the document's say: one token's score may be small by chance, its rounding is not.
        each = float(expected.scores.abs().mean(0).max()) if len(document) else 0.0
        sizes = [share.tokens for share in read.shares[index]]
        parts = torch.split(expected.scores, sizes)
        gammas = torch.split(expected.gamma, sizes, 1)
        for share, part, gamma in zip(read.shares[index], parts, gammas, strict=True):
            difference = (share.evidence.double() - part.sum(0)).abs().max()
            said = max(float(part.abs().sum(0).max()), share.tokens * each)
            assert float(difference) <= tolerance * said
            assert share.weight == share.tokens
            if share.usage is not None:
                assert error(share.usage, gamma.sum(1)) <= of_states
                # However inexact keys are, every token is shared out to the last bit.
                whole = share.usage.double().sum(-1)
                assert (whole / share.tokens - 1).abs().max() <= 1e-6


def assert_near(
    classifier: Classifier, documents: list[Tensor], before: State, read: Read, tolerance: float
) -> None:
    """Hold the rows' shares, memories and masses to `tolerance`, each by the norm of all of them.

    For what rounds so coarsely that one row's share, small by chance, says nothing.
    """
    found: list[list[Tensor]] = [[], [], []]
    expected: list[list[Tensor]] = [[], [], []]
    for index, document in enumerate(documents):
        here = torch.tensor([index])
        exact, after = one_shot(classifier, document, before.gather(here)), read.states.gather(here)
        sizes = [share.tokens for share in read.shares[index]]
        found[0] += [share.evidence for share in read.shares[index]]
        expected[0] += [scores.sum(0) for scores in torch.split(exact.scores, sizes)]
        # What a document brings along is exact, and would hide what was added.
        for part, mine, definition, old in (
            (1, after.memory[0], exact.memory, before.memory[index]),
            (2, after.mass[0], exact.mass, before.mass[index]),
        ):
            found[part].append(mine - old)
            expected[part].append(definition - old)
    for mine_, definition_ in zip(found, expected, strict=True):
        a, b = (torch.cat([x.flatten().double() for x in y]) for y in (mine_, definition_))
        assert float((a - b).norm() / b.norm()) <= tolerance
