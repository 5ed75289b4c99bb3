"""Two factors and a prior: how loudly scores speak."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gma.model.reading import read
from gma.model.tokenizer import Tokenizer
from gma.model.training import stacking
from gma.model.training.corpus import Corpus
from gma.model.training.labelled import LabelledText
from tests.model.small import small


@pytest.fixture
def valid() -> Corpus:
    tokenizer = Tokenizer.train(iter(["a"]), vocab_size=256)
    texts = [("aaaa", "a"), ("bb", "b"), ("c" * 700, "c"), ("ab", "a")]
    lines = (LabelledText(text, label, "") for text, label in texts)
    return Corpus.encode(lines, tokenizer, ("a", "b", "c"))


def test_perfect_scores_stay_bounded(valid: Corpus) -> None:
    """Every document told apart: the larger the factor, the better, without end."""
    classifier = small(vocab_size=256)
    classifier.pooling.deep.weight.zero_()
    classifier.pooling.deep.bias.zero_()
    byte = {chr(i): int(t) for i, t in enumerate(ids())}
    own = classifier.pooling.token.weight
    own.zero_()
    for label, character in enumerate("abc"):
        own[byte[character], label] = 1.0
    own[byte["b"], 1] = 0.5  # "ab" is an a
    stacked = stacking.fit(classifier, valid)
    assert stacked.deep == pytest.approx(1.0)
    assert 2.0 < stacked.token < 10.0
    assert stacked.prior_tokens < 10.0


def ids() -> np.ndarray:
    return Tokenizer.train(iter(["a"]), vocab_size=256).encode(bytes(range(128)))


def test_noise_is_quietened(valid: Corpus) -> None:
    classifier = small(vocab_size=256)
    classifier.pooling.token.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(50)
    stacked = stacking.fit(classifier, valid)
    assert 0.01 <= stacked.token < 0.5
    assert 0.01 <= stacked.deep <= 100.0


@pytest.mark.parametrize("scale", [torch.nan, torch.inf])
def test_what_is_not_finite_is_left_alone(valid: Corpus, scale: float) -> None:
    classifier = small(vocab_size=256)
    classifier.pooling.token.weight.mul_(scale)
    assert stacking.fit(classifier, valid) == stacking.Stacking(1.0, 1.0, 0.0)


def test_what_is_absurdly_loud_is_quietened_as_far_as_may_be(valid: Corpus) -> None:
    classifier = small(vocab_size=256)
    classifier.pooling.token.weight.mul_(1e30)
    stacked = stacking.fit(classifier, valid)
    assert 0.01 <= stacked.deep <= 100.0
    assert 0.01 <= stacked.token <= 1.0


def test_few_tokens_are_no_surer_than_they_are_right() -> None:
    """One token in ten is of its document's label: short views mislead."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    told = rng.random((60, 512)) < 0.1
    tokens = np.where(told, labels[:, None], rng.integers(0, 3, told.shape))
    ends = np.arange(1, 61) * 512
    valid = Corpus(tokens.ravel().astype(np.uint16), ends, labels)
    classifier = small(vocab_size=3)
    classifier.pooling.deep.weight.zero_()
    classifier.pooling.deep.bias.zero_()
    classifier.pooling.token.weight.copy_(1000 * torch.eye(3))
    stacked = stacking.fit(classifier, valid)
    stacking.apply(classifier, stacked)
    assert classifier.config.prior_tokens == stacked.prior_tokens > 10
    for length in 4, 64, 512:
        views = [torch.from_numpy(row[:length]) for row in tokens]
        logits = torch.stack([found.logits for found in read(classifier, views)])
        sure = logits.softmax(1).max(1).values.mean().item()
        right = float(np.mean(logits.argmax(1).numpy() == labels))
        assert abs(sure - right) < 0.15, (length, sure, right)


def test_one_length_needs_no_prior() -> None:
    """A prior and a factor undo each other where all documents are as long."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    told = rng.random((400, 180)) < 0.3
    tokens = np.where(told, labels[:, None], rng.integers(0, 3, told.shape))
    valid = Corpus(tokens.ravel().astype(np.uint16), np.arange(1, 401) * 180, labels)
    classifier = small(vocab_size=3)
    classifier.pooling.deep.weight.zero_()
    classifier.pooling.deep.bias.zero_()
    classifier.pooling.token.weight.copy_(10 * torch.eye(3))
    stacked = stacking.fit(classifier, valid)
    assert stacked.prior_tokens == 0
    assert 2 < stacked.token < 5
