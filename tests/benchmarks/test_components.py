"""Which components follow which tokens: what is counted, and the command on a model that was never
trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import components
from benchmarks.components import KINDS, Counts, best, marks, routed
from benchmarks.random_models import tiny_checkpoint
from gma.model import weights
from gma.model.reading import read


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(folder)
    return folder


def found(text: str) -> dict[str, list[str]]:
    """The one-byte tokens of each kind, as runs."""
    kinds = marks(text.encode(), np.ones(len(text), np.int32))
    runs = {}
    for name, row in zip(KINDS, kinds, strict=True):
        taken = "".join(x if there else "\0" for x, there in zip(text, row, strict=True))
        runs[name] = [run for run in taken.split("\0") if run]
    return runs


def test_kinds() -> None:
    kinds = found('ARTICLE II\n\n2.1 "Sure," he said, and the Buyer\nshall pay $5 (a).\n')
    assert kinds["lines in capitals"] == ["ARTICLE II"]
    assert kinds["words in capitals"] == ["ARTICLE", "II"]
    assert kinds["line breaks"] == ["\n\n", "\n", "\n"]
    assert kinds["section numbers"] == ["2.1", "(a)"]
    assert kinds["within quotation marks"] == ["Sure,"]
    assert kinds["digits"] == ["2", "1", "5"]
    assert kinds["capitalised words"] == ["Sure", "Buyer"]
    assert kinds["*shall*"] == ["shall"]
    assert kinds["*he, she, him, his, her, they, them, their*"] == ["he"]


def test_a_token_is_of_a_kind_that_it_overlaps() -> None:
    kinds = marks(b"ab 12 cd", np.array([2, 2, 1, 3]))
    assert kinds[list(KINDS).index("digits")].tolist() == [0, 1, 1, 0]


def test_each_token_is_shared_out_as_it_is_read(checkpoint: Path) -> None:
    classifier = weights.load(checkpoint).classifier
    tokens = torch.arange(700) % classifier.config.vocab_size
    taken = routed(classifier, tokens)
    heads = classifier.config.layers * classifier.config.heads
    torch.testing.assert_close(taken.sum(1), torch.full((700,), float(heads)))
    (usage,) = (each.usage for each in read(classifier, [tokens]))
    torch.testing.assert_close(taken.double().sum(0), usage.flatten(), rtol=1e-5, atol=1e-4)


def test_the_best_in_one_half_is_told_by_the_other() -> None:
    def counts(both: list[float]) -> Counts:
        return Counts(np.array([both]), np.array([10.0, 10.0]), np.array([10.0]), 20)

    assert best(counts([8, 2]), counts([4, 6])) == pytest.approx([0.4])


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"text": f"He has {n} of the BOOKS.\n" * 40, "label": "a"} for n in range(4)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    components.main([str(checkpoint), "--data", str(tmp_path), "--documents", "3"])
    printed = capsys.readouterr().out
    assert "3 documents of test" in printed
    assert "| digits |" in printed
    assert "| *shall* |" not in printed  # there is none
