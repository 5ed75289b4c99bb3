"""Whole documents through a bidirectional model: every token reads all of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from gma.model.classifier import Classifier
from gma.model.reading import read
from tests.model.small import SMALL, ByHand, by_hand, error, small


@pytest.fixture(
    scope="module",
    params=[{}, {"conv_kernel": 0}, {"form": "forgetting"}],
    ids=["paper", "no convolution", "forgetting"],
)
def classifier(request: pytest.FixtureRequest) -> Classifier:
    return small(causal=False, **request.param)


def expected_of(classifier: Classifier, document: Tensor) -> ByHand:
    exact = copy.deepcopy(classifier).double()
    return by_hand(exact, document, exact.new_states(1))


def document_of(tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(0, SMALL.vocab_size, (tokens,), generator=generator)


@pytest.mark.parametrize(
    ("tokens", "chunk"),
    [(1, 1), (1, 64), (2, 3), (63, 64), (64, 64), (65, 1), (65, 64), (500, 63), (500, 1000)],
)
def test_any_chunks_are_the_one_shot(classifier: Classifier, tokens: int, chunk: int) -> None:
    document = document_of(tokens)
    (found,) = read(classifier, [document], chunk=chunk)
    expected = expected_of(classifier, document)
    assert error(found.logits, expected.logits) <= 1e-5
    assert error(found.usage, expected.usage) <= 1e-5
    assert found.weight.tolist() == [len(piece) for piece in torch.split(document, chunk)]
    for share, part in zip(found.evidence, torch.split(expected.scores, chunk), strict=True):
        difference = (share.double() - part.sum(0)).abs().max()
        assert float(difference) <= 1e-5 * float(part.abs().sum(0).max())


def test_float64_is_exact(classifier: Classifier) -> None:
    document = document_of(300)
    exact = copy.deepcopy(classifier).double()
    (found,) = read(exact, [document], chunk=37)
    assert error(found.logits, expected_of(classifier, document).logits) <= 1e-12


def test_documents_do_not_see_each_other(classifier: Classifier) -> None:
    documents = [document_of(n) for n in (5, 100, 1)]
    for document, found in zip(documents, read(classifier, documents, chunk=16), strict=True):
        assert torch.equal(found.logits, read(classifier, [document], chunk=16)[0].logits)


def test_the_first_token_knows_the_last(classifier: Classifier) -> None:
    document = document_of(100)
    before = read(classifier, [document], chunk=10)[0].evidence
    document[-1] = (document[-1] + 1) % SMALL.vocab_size
    after = read(classifier, [document], chunk=10)[0].evidence
    assert (before != after).any(1).all()
