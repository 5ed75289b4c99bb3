"""Which files belong to a split, and what is told of those that are odd."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gma.model.training.errors import CorpusError
from gma.model.training.splits import Splits
from gma.model.training.train import train
from tests.model.training.documents import Train, configuration, documents, evaluations, write


def texts(data: Path, split: str) -> list[str]:
    return [document.text for document in Splits(data).read(split)]


def line(text: str, label: str = "a") -> dict[str, Any]:
    return {"text": text, "label": label}


class TestFiles:
    def test_a_file_and_its_shards_and_no_other(
        self, run: Train, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(data / "train-07.jsonl.zst", documents(3, 1))
        for name in ("train_old_backup.jsonl", "train.json", "training.jsonl", "train-x.csv"):
            write(data / name, [line("never", "read")])
        assert len(texts(data, "train")) == 12 + 3
        run()
        said = capsys.readouterr().err
        for name in ("train_old_backup.jsonl", "train.json", "training.jsonl", "train-x.csv"):
            assert f"{name} is not read" in said
        assert "train.jsonl is not read" not in said

    def test_only_alike(self, tmp_path: Path) -> None:
        write(tmp_path / "Train.JSON", [line("a")])
        with pytest.raises(CorpusError, match="holds no train split"):
            texts(tmp_path, "train")
        write(tmp_path / "train_1.jsonl", [line("a")])
        with pytest.raises(CorpusError, match=r"train_1\.jsonl is not named so"):
            texts(tmp_path, "train")

    @pytest.mark.parametrize("other", ["train.csv", "train.jsonl.zst", "train/a/1.txt"])
    def test_the_same_split_twice(self, tmp_path: Path, other: str) -> None:
        write(tmp_path / "train.jsonl", [line("a")])
        write(tmp_path / other, [line("a")])
        with pytest.raises(CorpusError, match="the train split more than once"):
            texts(tmp_path, "train")

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CorpusError, match="no such file or folder"):
            texts(tmp_path / "none", "train")


class TestDrawn:
    """A valid split where there is none."""

    def test_is_drawn_from_train_whatever_the_order(self, tmp_path: Path) -> None:
        lines = [line(f"text {i}", "ab"[i < 50]) for i in range(250)]
        write(tmp_path / "train.jsonl", lines)
        valid = texts(tmp_path, "valid")
        assert len(valid) == 20 + 5
        assert sum(int(text.split()[1]) < 50 for text in valid) == 5
        assert {*valid} | {*texts(tmp_path, "train")} == {x["text"] for x in lines}
        random.Random(0).shuffle(lines)
        write(tmp_path / "train.jsonl", lines)
        assert {*texts(tmp_path, "valid")} == {*valid}

    def test_copies_stay_together(self, tmp_path: Path) -> None:
        write(tmp_path / "train.jsonl", [line(f"text {i % 20}") for i in range(60)])
        valid = texts(tmp_path, "valid")
        assert len(valid) == 3 * 2
        assert not {*valid} & {*texts(tmp_path, "train")}

    def test_too_few(self, tmp_path: Path) -> None:
        write(tmp_path / "train.jsonl", [line("one", "a"), line("two", "b")])
        with pytest.raises(CorpusError, match="no valid split can be drawn"):
            texts(tmp_path, "valid")

    def test_a_run_says_so(
        self, run: Train, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (data / "valid.jsonl").unlink()
        assert evaluations(run())[-1]["valid"]["documents"] == 3
        assert "there is no valid split: 3 documents were drawn" in capsys.readouterr().err


class TestContents:
    def test_labels_swapped_in_files_of_the_same_size_are_trained_on(
        self, data: Path, tmp_path: Path
    ) -> None:
        """A run that ended before its first evaluation left what it had prepared."""
        config = configuration(tmp_path / "config.toml")
        lines = [x for x in documents(0, 4) if x["label"] != "court"]
        found = []
        for names in ({"sea": "cat", "farm": "dog"}, {"sea": "dog", "farm": "cat"}):
            write(data / "train.jsonl", [{**x, "label": names[x["label"]]} for x in lines])
            write(data / "valid.jsonl", [line("a dog", "dog"), line("a cat", "cat")])
            train(data, tmp_path / "run", config)
            (tmp_path / "run/resume.safetensors").unlink()
            size = (data / "train.jsonl").stat().st_size
            with np.load(tmp_path / "run/prepared/train.npz") as arrays:
                found.append((size, arrays["labels"].tolist()))
        assert found == [(size, [0] * 4 + [1] * 4), (size, [1] * 4 + [0] * 4)]

    def test_the_same_documents_are_not_prepared_again(self, run: Train, data: Path) -> None:
        run()
        (data.parent / "run/resume.safetensors").unlink()
        file = data.parent / "run/prepared/train.npz"
        before = file.stat().st_mtime_ns
        (data / "train.jsonl").rename(data / "train-0.jsonl")
        run()
        assert file.stat().st_mtime_ns == before

    def test_what_train_has_too_is_told_and_left_out_of_valid(
        self, run: Train, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shared = documents(0, 4)[:2]
        write(data / "valid.jsonl", [*documents(1, 2), *shared])
        write(data / "test.jsonl", [*documents(2, 1), {**shared[0], "label": "farm"}])
        assert evaluations(run())[-1]["valid"]["documents"] == 6
        said = capsys.readouterr().err
        assert "2 of valid's 8 documents are in train too, so they are left out of it" in said
        assert f"{data}/valid.jsonl, line 7 ({data}/train.jsonl, line 1)" in said
        assert "1 of test's 4 documents are in train too, so its figures will flatter" in said
        assert f"test.jsonl, line 4 ({data}/train.jsonl, line 1, there 'sea')" in said

    def test_all_of_valid_in_train(self, run: Train, data: Path) -> None:
        write(data / "valid.jsonl", documents(0, 4))
        with pytest.raises(CorpusError, match="train has every document of the valid split"):
            run()

    def test_one_text_under_two_labels(
        self, run: Train, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = documents(0, 4)
        write(data / "train.jsonl", [*lines, {**lines[0], "label": "farm"}, lines[1]])
        run()
        assert (
            "1 documents of train have the text of another, under another label: 'sea' in "
            f"{data}/train.jsonl, line 1, 'farm' in {data}/train.jsonl, line 13"
        ) in capsys.readouterr().err

    def test_a_label_that_only_test_has_is_told_at_once(self, run: Train, data: Path) -> None:
        write(data / "test.jsonl", [line("a", "moon")])
        with pytest.raises(CorpusError, match=r"test\.jsonl, line 1: label 'moon'"):
            run()
        assert not (data.parent / "run").exists()
