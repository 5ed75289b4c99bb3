"""How good a classifier is, at prefixes of what it is given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gma.model.tokenizer import Tokenizer
from gma.model.training.errors import CorpusError
from gma.model.training.evaluation import components_in_use, evaluate
from gma.model.weights import Checkpoint
from tests.model.small import small
from tests.model.training.documents import (
    COMMON,
    write,
)


@pytest.fixture
def checkpoint() -> Checkpoint:
    tokenizer = Tokenizer.train(iter([" ".join(COMMON)]), vocab_size=300)
    classifier = small(vocab_size=tokenizer.vocab_size)
    return Checkpoint(classifier.config, classifier, tokenizer, fingerprint="")


def test_prefixes_are_bytes(tmp_path: Path) -> None:
    """A z outweighs all else; each text has one right behind the prefix it is made for."""
    tokenizer = Tokenizer.train(iter(["a"]), vocab_size=256)
    classifier = small(vocab_size=256)
    own = classifier.pooling.token.weight.zero_()
    own[:, 0] = 100.0
    own[tokenizer.encode("z"), 1] = 1e9
    # The first cut goes through an é.
    texts = [
        "a" + "é" * 511 + "éz",
        "é" * 2048 + "z",
        "a" * 16384 + "z",
        "é" * 32768 + "z",
        "z",
    ]
    write(tmp_path / "test.jsonl", [{"text": text, "label": "a"} for text in texts])
    checkpoint = Checkpoint(classifier.config, classifier, tokenizer, fingerprint="")
    measured = evaluate(checkpoint, tmp_path, "test")
    views = [(view.prefix, view.figures["accuracy"]) for view in measured.views]
    # So loud that the prior changes nothing.
    assert all(view.figures["confidence"] == pytest.approx(1.0) for view in measured.views)
    sizes = (1 << 10, 4 << 10, 16 << 10, 64 << 10, None)
    assert views == list(zip(sizes, (0.8, 0.6, 0.4, 0.2, 0.0), strict=True))


def test_table_has_all_prefixes_and_the_components_in_use(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    write(tmp_path / "test.jsonl.zst", [{"text": "it was", "label": "a"}])
    measured = evaluate(checkpoint, tmp_path, "test")
    rows = measured.table().splitlines()
    names = [row.split("|")[1].strip() for row in rows if row.startswith("| ")][1:]
    assert names == ["1 KB", "4 KB", "16 KB", "64 KB", "whole"]
    assert "in use, of 4 a head" in rows[-1]
    assert measured.components.shape == (2, 2)
    assert ((measured.components >= 1) & (measured.components <= 4)).all()
    assert json.loads(json.dumps(measured.as_dict()))["documents"] == 1


def test_a_label_that_the_model_lacks(checkpoint: Checkpoint, tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", [{"text": "a", "label": "moon"}])
    with pytest.raises(CorpusError, match=r"test\.jsonl, line 1: .*'moon'"):
        evaluate(checkpoint, tmp_path, "test")


def test_components_in_use() -> None:
    even, one = torch.full((4,), 5.0), torch.tensor([9.0, 0.0, 0.0, 0.0])
    mass = torch.stack([even, one])[None, None]  # one document, one layer, two heads
    np.testing.assert_allclose(components_in_use(mass), [[4.0, 1.0]], rtol=1e-6)
