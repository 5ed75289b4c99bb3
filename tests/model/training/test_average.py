"""One classifier of several, by the mean of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

from gma.model import weights
from gma.model.tokenizer import Tokenizer
from gma.model.training.average import average
from gma.model.training.errors import CorpusError, TrainingError
from gma.model.weights import Checkpoint, CheckpointError
from tests.model.small import ANY, small
from tests.model.training.documents import LABELS, documents, passages_in_noise, write

CLAUSES: dict[str, Any] = {**ANY, "labels": LABELS}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "data/train.jsonl", passages_in_noise(0, 16))
    write(tmp_path / "data/valid.jsonl", passages_in_noise(1, 16))
    return tmp_path / "data"


def saved(folder: Path, seed: int, size: int = 300, **changes: Any) -> Checkpoint:
    """A checkpoint that is one seed's step away from what all such have in common."""
    text = " ".join(line["text"] for line in passages_in_noise(0, 16))
    tokenizer = Tokenizer.train(iter([text]), size)
    classifier = small(vocab_size=tokenizer.vocab_size, **changes)
    generator = torch.Generator().manual_seed(seed)
    for parameter in classifier.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    weights.save(folder, classifier, tokenizer, card="")
    return weights.load(folder)


def of_one_label(data: Path) -> None:
    for seed, split in enumerate(["train", "valid"]):
        write(data / f"{split}.jsonl", documents(seed, 8))


def averaged(checkpoints: list[Path], data: Path) -> Checkpoint:
    average(checkpoints, data, data.parent / "mean", Progress(disable=True))
    return weights.load(data.parent / "mean")


@pytest.mark.parametrize("count", [2, 3])
def test_weights_are_the_mean_and_the_rest_is_fitted_anew(data: Path, count: int) -> None:
    folders = [data.parent / str(seed) for seed in range(count)]
    each = [
        saved(folder, seed, **CLAUSES, name=f"run-{seed}", thresholds=(0.1,) * 3)
        for seed, folder in enumerate(folders)
    ]
    mean = averaged(folders, data)
    assert mean.config.thresholds is not None
    assert mean.config.thresholds != (0.1,) * 3
    assert mean.config.model_copy(update={"thresholds": (0.1,) * 3}) == each[0].config
    for name, found in mean.classifier.named_parameters():
        exact = torch.stack([x.classifier.get_parameter(name) for x in each]).mean(0)
        if name == "pooling.factor":  # of which valid decides
            assert not torch.allclose(found, exact, rtol=1e-3)
        else:
            torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)  # float16


def test_of_one_label(data: Path) -> None:
    of_one_label(data)
    folders = [data.parent / name for name in ("one", "other")]
    for seed, folder in enumerate(folders):
        saved(folder, seed, labels=LABELS, prior_tokens=float(seed))
    mean = averaged(folders, data)
    assert mean.config.thresholds is None
    assert "the mean of 2 trainings' weights" in (data.parent / "mean/README.md").read_text()


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"size": 280}, "different tokenizers"),
            ({"layers": 3}, "differ in layers"),
            ({"form": "forgetting"}, "differ in form"),
            ({"labels": ("court", "farm", "air")}, "differ in labels"),
        ],
    )
    def test_what_is_not_alike(self, data: Path, changes: dict[str, Any], message: str) -> None:
        one, other = data.parent / "one", data.parent / "other"
        saved(one, 0, **CLAUSES)
        saved(other, 1, **{**CLAUSES, **changes})
        with pytest.raises(TrainingError, match=message):
            averaged([one, other], data)
        assert not (data.parent / "mean").exists()

    def test_the_same_twice(self, data: Path) -> None:
        saved(data.parent / "one", 0, **CLAUSES)
        with pytest.raises(TrainingError, match="are the same"):
            averaged([data.parent / "one"] * 2, data)

    def test_one_label_with_thresholds(self, data: Path) -> None:
        folders = [data.parent / name for name in ("one", "other")]
        for seed, folder in enumerate(folders):
            saved(folder, seed, labels=LABELS, thresholds=(0.5,) * 3)
        with pytest.raises(TrainingError, match="one has a threshold"):
            averaged(folders, data)

    @pytest.mark.parametrize("kind", ["folder", "file", "input"])
    def test_a_place_that_is_taken(self, data: Path, kind: str) -> None:
        folders = [data.parent / name for name in ("one", "other")]
        for seed, folder in enumerate(folders):
            saved(folder, seed, **CLAUSES)
        out = {"folder": data, "file": data / "train.jsonl", "input": folders[0]}[kind]
        with pytest.raises(TrainingError, match="is there already"):
            average(folders, data, out, Progress(disable=True))

    def test_one_alone(self, data: Path) -> None:
        saved(data.parent / "one", 0, **CLAUSES)
        with pytest.raises(TrainingError, match="two checkpoints or more"):
            averaged([data.parent / "one"], data)

    def test_what_is_no_checkpoint(self, data: Path) -> None:
        saved(data.parent / "one", 0, **CLAUSES)
        with pytest.raises(CheckpointError, match="no such folder"):
            averaged([data.parent / "one", data.parent / "none"], data)

    def test_documents_of_another_kind(self, data: Path) -> None:
        folders = [data.parent / name for name in ("one", "other")]
        for seed, folder in enumerate(folders):
            saved(folder, seed, **CLAUSES)
        of_one_label(data)
        with pytest.raises(TrainingError, match="have one label, where the models give any number"):
            averaged(folders, data)

    def test_documents_of_other_labels(self, data: Path) -> None:
        folders = [data.parent / name for name in ("one", "other")]
        for seed, folder in enumerate(folders):
            saved(folder, seed, **{**CLAUSES, "labels": ("a", "b", "c")})
        with pytest.raises(CorpusError, match="is not among the model's"):
            averaged(folders, data)
