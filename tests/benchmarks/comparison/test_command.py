"""The command on tiny tasks: resumed, shared, cut short, and told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.comparison import __main__ as command
from benchmarks.comparison.backbone import Backbone
from benchmarks.comparison.gaussian import MIXERS
from benchmarks.comparison.runs import TASKS, Folder, Run, Wanted
from benchmarks.comparison.texts import Texts

QUICK = "--quick", "--device", "cpu"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder with texts of two labels."""
    rng = np.random.default_rng(0)
    for name in ("books", "prose", "imdb", "grain"):
        for split in ("train", "valid", "test"):
            drawn = [rng.integers(256, size=700).astype(np.uint16) for _ in range(2)]
            Texts.of(drawn, [0, 1]).save(tmp_path / "texts" / f"{name}-{split}.npz")
    return tmp_path


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """So small products are no faster on several, and others use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(out: Path, *options: str) -> None:
    command.main(["--out", str(out), *QUICK, *options])


def test_every_task_is_run_and_told(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(out, "--only", "GMA (forgetting)", "--rates", "0.001")
    run(out, "--only", "softmax, both ways", "--tasks", "language", "imdb", "--rates", "0.001")
    assert len(Folder(out / "quick").results()) == len(TASKS) + 1
    assert not Folder(out / "quick").failures()
    run(out, "--report", "--rates", "0.001", "0.002")
    printed = capsys.readouterr().out
    assert printed.count("## ") == len(TASKS)
    assert printed.count("| 1 of 2 |") == len(TASKS)
    assert "| none | not run |" in printed


def test_prepared_texts_are_what_runs_read(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for split in ("train", "valid", "test"):
        lines = [{"text": f"{word} " * 300, "label": word} for word in ("good", "bad")]
        (data / "imdb").mkdir(parents=True, exist_ok=True)
        (data / "imdb" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run(out, "--data", str(data), "--prepare", "imdb")
    read = Texts.load(out / "texts/imdb-test.npz")
    assert bytes(read.tokens[: read.ends[0]]) == b"good " * 300
    assert read.labels.tolist() == [1, 0]
    run(out, "--tasks", "imdb", "--only", "none", "--rates", "0.001")
    assert len(Folder(out / "quick").results()) == 1


class TestFolder:
    options = "--tasks", "recall", "--only", "none", "softmax", "--rates", "0.001"

    def test_what_says_nothing_is_kept_apart(self, tmp_path: Path) -> None:
        run(tmp_path, *self.options)
        assert not Folder(tmp_path).results()

    def test_a_finished_run_is_not_repeated(self, tmp_path: Path) -> None:
        run(tmp_path, *self.options)
        times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("quick/*.json")}
        assert len(times) == 2
        run(tmp_path, *self.options)
        assert times == {file: file.stat().st_mtime_ns for file in tmp_path.glob("quick/*.json")}

    def test_one_that_is_cut_short_is_not_recorded(self, tmp_path: Path) -> None:
        run(tmp_path, *self.options, "--budget-seconds", "0")
        assert not [*tmp_path.glob("quick/*.json"), *tmp_path.glob("quick/*.failed")]

    def test_one_that_another_process_is_at_is_left_to_it(self, tmp_path: Path) -> None:
        wanted = Run("recall", "none", 0.001, 0, True)
        with Folder(tmp_path / "quick").claim(wanted) as ours:
            assert ours
            run(tmp_path, *self.options)
        assert [each["mixer"] for each in Folder(tmp_path / "quick").results()] == ["softmax"]

    def test_one_that_fails_is_told_and_tried_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with monkeypatch.context() as spoilt:
            spoilt.setattr(Backbone, "choose", lambda *_: 1 / 0)
            run(tmp_path, *self.options)
        run(tmp_path, *self.options, "--report")
        assert "failed: ZeroDivisionError" in capsys.readouterr().out
        run(tmp_path, *self.options)
        run(tmp_path, *self.options, "--report")
        assert "failed" not in capsys.readouterr().out

    def test_other_seeds_are_run_at_the_best_rate(self, tmp_path: Path) -> None:
        folder = Folder(tmp_path)
        wanted = Wanted(["language"], ["softmax"], [0.002, 0.004], [0, 1], True)
        first = list(wanted.runs(folder))
        assert [(each.rate, each.seed) for each in first] == [(0.002, 0), (0.004, 0)]
        for each, score in zip(first, (2.0, 1.9), strict=True):
            folder.write(each, {"score": score, "lower": True})
        assert [(each.rate, each.seed) for each in wanted.runs(folder)][2:] == [(0.004, 1)]


def test_a_row_without_its_kernels_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, *TestFolder.options)
    (file,) = tmp_path.glob("quick/recall-softmax-*.json")
    result = json.loads(file.read_text())
    result["kernels"]["why"] = "Disagreement: as told"
    file.write_text(json.dumps(result))
    run(tmp_path, *TestFolder.options, "--report")
    printed = capsys.readouterr().out
    assert "| softmax † |" in printed
    assert "† softmax in plain PyTorch: Disagreement: as told" in printed
    assert "| none |" in printed


def test_the_most_telling_comes_first(tmp_path: Path) -> None:
    wanted = Wanted(TASKS, list(MIXERS), [0.002], [0], True)
    found = [(each.task, each.mixer) for each in wanted.runs(Folder(tmp_path))]
    assert found[:3] == [("language", m) for m in ("GMA (forgetting)", "softmax", "Mamba-2")]
    assert ("language", "softmax, both ways") not in found
    assert ("imdb", "softmax, both ways") in found
