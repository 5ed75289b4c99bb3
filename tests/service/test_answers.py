"""How a document's logits and shares become an answer."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from gma.model.config import ModelConfig
from gma.model.scores import log_odds
from gma.service.gateway.answers import answered
from gma.service.gateway.contract import Timing, Usage
from gma.service.gateway.evidence import Evidence

CONFIG = ModelConfig(
    name="tiny",
    labels=("ann", "bob", "cyd"),
    vocab_size=300,
    width=16,
    layers=1,
    heads=2,
    routing_dim=4,
    value_dim=8,
    num_components=4,
    mlp_width=16,
    prior_tokens=8.0,
)
USAGE = Usage(bytes=50, tokens=20, chunks=5)
TIMING = Timing(queue=1.0, tokenize=2.0, compute=3.0, total=4.0)
LOGITS = np.array([0.5, 2.0, 2.0])


def gathered(most: int) -> Evidence:
    """Five rows of 4 tokens and 10 bytes, of which the first speaks for cyd alone."""
    evidence = Evidence(most)
    for row in range(5):
        scores = np.array([0, 0, 9] if row == 0 else [1, row, 0], np.float32)
        evidence.add(4, 10, 1.0 + row, scores)
    return evidence


def test_what_may_be_long_comes_last() -> None:
    shares = gathered(9).shares
    answer = answered(CONFIG, LOGITS, USAGE, shares, timing=TIMING, evidence=True, truncated=True)
    keys = "model label scores usage timing_ms truncated evidence"
    assert list(answer) == keys.split()


def test_what_was_not_asked_for_is_absent() -> None:
    assert list(answered(CONFIG, LOGITS, USAGE, [])) == ["model", "label", "scores", "usage"]


@pytest.mark.parametrize(
    ("top_k", "labels"), [(None, "bob cyd ann"), (2, "bob cyd"), (9, "bob cyd ann")]
)
def test_lists_the_best_labels_of_equals_the_first(top_k: int | None, labels: str) -> None:
    finding = answered(CONFIG, LOGITS, USAGE, [], top_k=top_k)
    listed = [each["label"] for each in finding["scores"]]
    assert listed == labels.split()
    assert finding["label"] == listed[0]
    # Scores are among all labels, also those not listed.
    assert finding["scores"][0]["score"] == pytest.approx(1 / (2 + np.exp(-1.5)))


@pytest.mark.parametrize("most", [2, 3, 5])
def test_spans_of_pooling_any_say_what_of_the_document_each_says(most: int) -> None:
    changes = {"pooling": "any", "multi_label": True, "prior_tokens": 0.0, "labels": ("a", "b")}
    config = CONFIG.model_copy(update=changes)
    rows = np.array([[0.0, 1e-9], [3.0, 1e-5], [1e-4, 0.0], [0.2, 0.0], [0.0, 60.0]])
    gathered = Evidence(most)
    for row in rows:
        gathered.add(4, 10, 4.0, row)
    logits = log_odds(torch.from_numpy(rows.sum(0))).numpy()
    answer = answered(config, logits, USAGE, gathered.shares, evidence=True)
    spans = answer["evidence"]
    assert sum(span["weight"] for span in spans) == pytest.approx(1.0)
    for each in answer["scores"]:
        own = [x for span in spans for x in span["scores"] if x["label"] == each["label"]]
        evidence = [np.logaddexp(0.0, x["logit"]) for x in own]
        expected = rows[:, config.labels.index(each["label"])]
        assert sum(evidence) == pytest.approx(expected.sum())
        assert np.prod([1 - x["score"] for x in own]) == pytest.approx(1 - each["score"])
    assert answer["labels"] == ["b", "a"]
    assert [label for span in spans for label in span["labels"]].count("b") == 1


class TestAScoreAtItsThreshold:
    """It reaches it."""

    def test_of_a_multi_label_model(self) -> None:
        changes = {"multi_label": True, "thresholds": (0.5, 1.0, 0.0)}
        config = CONFIG.model_copy(update=changes)
        finding = answered(config, np.array([0.0, 40.0, -2000.0]), USAGE, [])
        assert [each["score"] for each in finding["scores"]] == [1.0, 0.5, 0.0]
        assert finding["labels"] == ["bob", "ann", "cyd"]

    @pytest.mark.parametrize(("threshold", "label"), [(0.5, "ann"), (0.5000001, None)])
    def test_of_another(self, threshold: float, label: str | None) -> None:
        config = CONFIG.model_copy(update={"thresholds": (threshold, 0.0, 0.0)})
        finding = answered(config, np.array([0.0, 0.0, -2000.0]), USAGE, [])
        assert finding["label"] == label


@pytest.mark.parametrize("most", [2, 3, 5])
def test_spans_tile_the_document_and_their_weighted_mean_is_its_logits(most: int) -> None:
    shares = gathered(most).shares
    total = sum(share.weight for share in shares)
    logits = np.sum([share.evidence for share in shares], axis=0) / (total + CONFIG.prior_tokens)
    spans = answered(CONFIG, logits, USAGE, shares, top_k=2, evidence=True)["evidence"]
    assert len(spans) <= most
    assert (spans[0]["start"], spans[-1]["end"]) == (0, 50)
    assert all(left["end"] == right["start"] for left, right in pairwise(spans))
    assert sum(span["tokens"] for span in spans) == 20
    for label in ("bob", "cyd"):
        mean = sum(
            span["weight"] * each["logit"]
            for span in spans
            for each in span["scores"]
            if each["label"] == label
        )
        assert mean == pytest.approx(logits[CONFIG.labels.index(label)])
    assert max(spans, key=lambda span: span["scores"][0]["logit"])["label"] == "cyd"
