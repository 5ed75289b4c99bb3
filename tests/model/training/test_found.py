"""Where labels stand, found in documents that do not tell."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.progress import Progress

from gma.model.training import found
from gma.model.training.corpus import Corpus
from gma.model.training.errors import TrainingError
from gma.model.training.labelled import LabelledText
from gma.model.training.train import train
from tests.model.training.documents import (
    configuration,
    evaluations,
    log_of,
    passages_in_noise,
    write,
)

LEARNED = 48


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    """Documents of about ten windows each."""
    return passages_in_noise(0, LEARNED, words=2000)


def as_documents(lines: list[dict[str, Any]]) -> list[LabelledText]:
    return [LabelledText.of(line, f"line {i}") for i, line in enumerate(lines)]


def without_spans(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"text": line["text"], "labels": line["labels"]} for line in lines]


def hits(found: list[LabelledText], lines: list[dict[str, Any]]) -> float:
    """How many spans overlap one that the line tells of the same label."""
    return float(
        np.mean(
            [
                any(
                    told["start"] < span.end and span.start < told["end"]
                    for told in line["spans"]
                    if told["label"] == span.label
                )
                for document, line in zip(found, lines, strict=True)
                for span in document.spans
            ]
        )
    )


def test_passages_are_found_by_labels_alone(lines: list[dict[str, Any]]) -> None:
    documents = as_documents(without_spans(lines))
    by_documents, by_windows = (found.find(documents, rounds, Progress()) for rounds in (0, 2))
    for document, line in zip(by_windows, lines, strict=True):
        assert [span.label for span in document.spans] == line["labels"]
        text = document.text.encode()
        assert all(0 < span.end - span.start <= 1000 for span in document.spans)
        assert all(span.end <= len(text) for span in document.spans)
    assert hits(by_windows, lines) > 0.9
    assert hits(by_windows, lines) >= hits(by_documents, lines)


def words_that_tell_together(count: int) -> list[dict[str, Any]]:
    """Ten words stand in all documents, and near one another in those that have the label."""
    rng, telling, words = random.Random(0), [f"clause{i}" for i in range(10)], 900
    lines = []
    for number in range(count):
        text = [f"noise{rng.randrange(400)}" for _ in range(words)]
        for _ in range(5):
            for word in telling:
                text[rng.randrange(words)] = word
        spans = []
        if number % 2:
            at = slice(start := rng.randrange(words - 30), start + 30, 3)
            text[at] = rng.sample(telling, 10)
            start, end = len(" ".join(text[:start])) + 1, len(" ".join(text[: start + 30]))
            spans = [{"label": "a", "start": start, "end": end}]
        lines.append({"text": " ".join(text), "labels": ["a"] * len(spans), "spans": spans})
    return lines


def test_what_was_taken_wrongly_is_not_learned_by_heart() -> None:
    """A model that looks for windows where it learned keeps those that it took: .27."""
    lines = words_that_tell_together(150)
    documents = as_documents(without_spans(lines))
    first, last = (hits(found.find(documents, rounds, Progress()), lines) for rounds in (0, 3))
    assert first < 0.4
    assert last > 0.5


def test_spans_that_are_told_change_nothing(lines: list[dict[str, Any]]) -> None:
    told, untold = as_documents(lines), as_documents(without_spans(lines))
    progress = Progress()
    assert found.find(told, 1, progress) == found.find(untold, 1, progress)


def test_letters_of_several_bytes_are_not_cut(lines: list[dict[str, Any]]) -> None:
    lines = [{**line, "text": line["text"].replace("e", "é")} for line in without_spans(lines)]
    for document in found.find(as_documents(lines), 1, Progress()):
        for span in document.spans:
            document.text.encode()[span.start : span.end].decode()


def test_labels_that_all_or_few_documents_have(lines: list[dict[str, Any]]) -> None:
    lines = [{"text": line["text"], "labels": ["all"]} for line in lines]
    lines[5]["labels"] = ["all", "one"]
    spans = [document.spans for document in found.find(as_documents(lines), 1, Progress())]
    assert [len(own) for own in spans] == [1] * 5 + [2] + [1] * (LEARNED - 6)


def test_training_learns_from_what_it_finds(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    write(tmp_path / "data/train.jsonl", without_spans(lines))
    write(tmp_path / "data/valid.jsonl", passages_in_noise(1, 4))
    folder = trained(tmp_path, find_spans=1)
    spans = Corpus.load(tmp_path / "run/prepared/train.npz").spans
    expected = found.find(as_documents(lines), 1, Progress())
    assert spans.bytes.tolist() == [[*x[1:]] for document in expected for x in document.spans]
    assert next(line["span_loss"] for line in log_of(folder) if "span_loss" in line) > 0
    placed = evaluations(folder)[-1]["valid"]["placing"]
    assert placed["pairs"] == 4, "valid keeps the spans that it tells"


@pytest.mark.parametrize(
    "given", [{"model": {"pooling": "mean"}}, {"span_weight": 0.0}], ids=["mean", "no weight"]
)
def test_spans_that_nothing_learns_from_are_not_looked_for(
    given: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path / "data/train.jsonl", passages_in_noise(0, 8))
    with pytest.raises(TrainingError, match='find_spans is for pooling "any", and span_weight'):
        trained(tmp_path, find_spans=1, **given)


def trained(folder: Path, **training: Any) -> Path:
    given = {
        "steps": 2,
        "evaluate_every": 2,
        "tokens_per_step": 4096,
        "lengths": [[0.0, 1024]],
        "prefix": 256,
        "learning_rate": 2e-2,
        "label_smoothing": 0.0,
        "language_weight": [0.0, 0.0],
        "model": {"pooling": "any"},
    }
    config = configuration(folder / "any.toml", **{**given, **training})
    return train(folder / "data", folder / "run", config)
