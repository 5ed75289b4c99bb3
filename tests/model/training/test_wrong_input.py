"""What stops a run before it begins, and that it says why."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gma.model.training.errors import CorpusError, TrainingError
from gma.model.training.train import train
from tests.model.training.documents import (
    Train,
    configuration,
    documents,
    write,
)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"lengths": [[0.0, 65]]}, "no multiple of prefix"),
        ({"lengths": [[0.5, 64]]}, "begin at 0.0"),
        ({"token_dropout": [0.3, 0.1]}, "token_dropout"),
        ({"model": {"colour": 1}}, "colour"),
        ({"stepz": 3}, "stepz is unknown: did you mean steps?"),
        ({"model": {"widht": 3}}, "widht is unknown: did you mean width?"),
        ({"steps": "150"}, "steps: input should be a valid integer, not '150'"),
        ({"steps": 150.0}, "steps"),
        ({"learning_rate": "1e-3"}, "learning_rate"),
        ({"compile": 1}, "compile"),
        ({"lengths": [["0.0", 64]]}, "lengths.0.0"),
        ({"lengths": [[0.0, "64"]]}, "lengths.0.1"),
        ({"token_dropout": [0, "1"]}, "token_dropout.1"),
        ({"model": {"width": "64"}}, "width: input should be a valid integer, not '64'"),
        ({"balance": 1.5}, "balance"),
        ({"label_weights": 2.0}, "label_weights"),
        ({"choose_by": "loss"}, "choose_by: input should be 'accuracy', 'macro_f1', 'micro_f1' or"),
        ({"model": {"heads": -1}}, "heads"),
        ({"model": {"labels": ["a", "b"]}}, "labels"),
        ({"model": {"prior_tokens": 3.0}}, "prior_tokens"),
    ],
)
def test_configuration(run: Train, data: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(TrainingError, match=re.escape(named)) as caught:
        run(**changes)
    assert "config.toml" in str(caught.value)
    assert not (data.parent / "run").exists()


def test_a_field_of_the_token_scores(data: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path / "config.toml")
    for wrong, named in (
        ("lenght = 3", "token_scores.lenght is unknown: did you mean token_scores.length?"),
        ('seed = "3"', "token_scores.seed: input should be a valid integer, not '3'"),
    ):
        wrongly = tmp_path / "wrong.toml"
        wrongly.write_text(f"{config.read_text()}\n{wrong}\n")
        with pytest.raises(TrainingError, match=re.escape(named)):
            train(data, tmp_path / "run", wrongly)


def test_weights_of_labels(data: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path / "config.toml")
    for weights, named in (("sea = 0.0", "label_weights.sea"), ("moon = 2", "the label 'moon'")):
        wrong = tmp_path / "wrong.toml"
        wrong.write_text(f"{config.read_text()}\n[training.label_weights]\n{weights}\n")
        with pytest.raises(TrainingError, match=named):
            train(data, tmp_path / "run", wrong)


@pytest.mark.parametrize("text", ["[model", "", "[training]", "[model]\n[extra]", "model = 3"])
def test_no_configuration(data: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(TrainingError, match=r"bad\.toml"):
        train(data, tmp_path / "run", tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "not JSON"),
        (b"[]", "not an object"),
        (b'"text"', "not an object"),
        (b'{"label": "sea"}', "'text'"),
        (b'{"text": "", "label": "sea"}', "'text'"),
        (b'{"text": 3, "label": "sea"}', "'text'"),
        (b'{"text": " \\n\\u2003", "label": "sea"}', "'text' is blank"),
        (b'{"text": "a"}', "'label'"),
        (
            b'{"txt": "a", "label": "b"}',
            "'text' is missing, or no string; the fields are 'txt', 'label'",
        ),
        (b'{"text": "a", "label": ""}', "'label' is blank"),
        (b'{"text": "a", "label": " "}', "'label' is blank"),
        (b'{"text": "a", "label": null}', "'label'"),
        (b'{"text": "a", "label": true}', "'label'"),
        (b'{"text": "\xff", "label": "sea"}', "not UTF-8"),
        (b'{"text": "\\ud800", "label": "sea"}', "not Unicode"),
    ],
)
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_line_is_named(run: Train, data: Path, line: bytes, problem: str, split: str) -> None:
    file = data / f"{split}.jsonl"
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([*lines[:2], b"", line, *lines[2:]]))
    with pytest.raises(CorpusError, match=problem) as caught:
        run()
    assert f"{split}.jsonl, line 4:" in str(caught.value)


def test_a_label_that_only_valid_has(run: Train, data: Path) -> None:
    write(data / "valid.jsonl", [*documents(1, 1), {"text": "a", "label": "moon"}])
    with pytest.raises(CorpusError, match=r"valid\.jsonl, line 4: label 'moon'"):
        run()


def test_one_label(run: Train, data: Path) -> None:
    write(data / "train.jsonl", documents(0, 1)[:1])
    with pytest.raises(TrainingError, match="no label but 'sea'"):
        run()


@pytest.mark.parametrize("split", ["train", "valid"])
def test_no_documents(run: Train, data: Path, split: str) -> None:
    (data / f"{split}.jsonl").write_text("\n\n")
    with pytest.raises(CorpusError, match=f"{split} split has no documents"):
        run()


def test_no_train_split(run: Train, data: Path) -> None:
    (data / "train.jsonl").unlink()
    with pytest.raises(CorpusError, match="holds no train split"):
        run()


def test_what_is_not_compressed(run: Train, data: Path) -> None:
    (data / "train.jsonl").rename(data / "train.jsonl.zst")
    with pytest.raises(CorpusError, match=r"train\.jsonl\.zst"):
        run()
