"""The report of a run."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gma.drawing.page import STYLE
from gma.model.training.corpus import Corpus
from gma.model.training.errors import TrainingError
from gma.model.training.report import answers, page
from gma.model.training.report.hardest import MOST, hardest, loss
from gma.model.training.train import train
from gma.model.weights import load
from gma.service.cli.main import main
from tests.model.training.documents import Train, configuration, documents, interrupted, write

HOSTILE = "<script>alert(1)</script> & </blockquote> ship wave"
VOID = {"meta"}


class Parser(HTMLParser):
    """Checks that tags close in order, and keeps text and attributes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.values: list[str] = []
        self.text: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [value or "" for _, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def shown(self) -> str:
        return " ".join(self.text)


@pytest.fixture
def hostile(data: Path) -> Path:
    """Texts and a label that look like HTML."""
    lines = [line | {"text": f"{HOSTILE} {line['text']}"} for line in documents(0, 4)]
    valid = [line | {"text": f"{line['text']} {HOSTILE}"} for line in documents(1, 4)]
    for line in lines + valid:
        line["label"] = {"sea": "<b>sea</b>"}.get(line["label"], line["label"])
    write(data / "train.jsonl", lines)
    write(data / "valid.jsonl", valid)
    write(data / "test.jsonl", documents(2, 2)[2:])
    return data


def test_it_tells_what_came_of_a_run(hostile: Path, run: Train) -> None:
    checkpoint = run()
    file = checkpoint.parent / "report.html"
    parsed = Parser(file.read_text())
    shown = parsed.shown
    for expected in (
        "Training of tiny",
        "linear baseline",
        "Label loss, nats",
        "Valid's macro-F1, by prefix",
        "How often it is right, by score",
        "By how much of each document is read",
        "Confusion matrix",
        "Hardest documents of valid",
        "tokens_per_step",
        HOSTILE.partition(" ")[0],
        "<b>sea</b>",
    ):
        assert expected in shown, expected
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert not [value for value in parsed.values if re.search(r"(?i)https?:|javascript:|//", value)]
    assert "url(" not in file.read_text()


def test_the_same_run_has_the_same_report(
    hostile: Path, run: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run().parent
    first = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    monkeypatch.setattr(sys, "argv", ["gma", "report", str(folder)])
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code in (0, None)
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "report.html").read_bytes() == first


def test_a_run_that_was_interrupted_has_one(data: Path, tmp_path: Path, run: Train) -> None:
    with interrupted():
        run()
    assert "Confusion" in page.write(tmp_path / "run").read_text()


def test_any_number_of_labels(data: Path, tmp_path: Path) -> None:
    for split, seed in ("train", 0), ("valid", 1):
        lines = [
            {"text": line["text"], "labels": [line["label"]] if i % 3 else []}
            for i, line in enumerate(documents(seed, 4))
        ]
        write(data / f"{split}.jsonl", lines)
    config = configuration(tmp_path / "config.toml", choose_by="micro_f1")
    shown = Parser((train(data, tmp_path / "run", config).parent / "report.html").read_text()).shown
    assert "average precision" in shown
    assert "Labels, the worst first" in shown
    assert "Confusion matrix" not in shown


@pytest.mark.parametrize("there", [False, True])
def test_no_run(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "run").mkdir()
    with pytest.raises(TrainingError, match="holds no run that was evaluated"):
        page.write(tmp_path / "run")


def test_both_themes_name_the_same_colours() -> None:
    light, dark = re.findall(r":root\{(.*?)\}", STYLE, re.DOTALL)
    names = [set(re.findall(r"(--\w+):", theme)) for theme in (light, dark)]
    assert names[0] == names[1]
    assert set(re.findall(r"var\((--\w+)\)", STYLE + page.STYLE)) <= names[0] | {"--share"}


class TestAnswers:
    def arrays(self, labels: int, count: int = 400) -> tuple[Any, Any, Any]:
        rng = np.random.default_rng(0)
        actual = np.eye(labels, dtype=bool)[rng.integers(labels, size=count)]
        scores = rng.dirichlet(np.ones(labels), size=count)
        return np.eye(labels, dtype=bool)[scores.argmax(1)], scores, actual

    def test_a_matrix_counts_every_document(self) -> None:
        said, _, actual = self.arrays(3)
        said[:7] = False  # no answer
        parsed = Parser("".join(answers.confusion(("a", "b", "c"), said, actual)))
        counts = [int(text) for text in parsed.text if text.isdigit()]
        assert sum(counts) == 400
        assert answers.NONE in parsed.text

    def test_many_labels_have_a_table_of_confusions(self) -> None:
        labels = tuple(f"label {i}" for i in range(answers.MATRIX + 1))
        said, _, actual = self.arrays(len(labels))
        said[:], actual[:] = False, False
        actual[:, 0] = said[:, 0] = True
        said[:5, 0], said[:5, 3] = False, True
        parsed = Parser("".join(answers.confusion(labels, said, actual)))
        assert parsed.text[5:9] == ["label 0", "label 3", "5", "400"]

    @pytest.mark.parametrize("multi_label", [True, False])
    def test_scores_that_can_be_trusted(self, multi_label: bool) -> None:
        scores = np.tile([0.75, 0.25], (400, 1))
        actual = np.tile([[True, False]] * 3 + [[False, True]], (100, 1))
        shown = Parser("".join(answers.calibration(actual, scores, actual, multi_label))).shown
        assert "Scores differ by 0.000" in shown


class TestHardest:
    @pytest.fixture
    def found(self, run: Train) -> Any:
        checkpoint = load(run())
        texts = ["ship wave sail", "cow barn wheat", "judge law oath"] * 5 + ["ship " * 3000]
        tokens = [checkpoint.tokenizer.encode(text).astype(np.uint16) for text in texts]
        corpus = Corpus(
            np.concatenate(tokens), np.cumsum([len(x) for x in tokens]), np.zeros(16, np.int64)
        )
        return checkpoint, corpus

    def test_the_worst_first_with_what_misled(self, found: Any) -> None:
        checkpoint, corpus = found
        scores = np.full((16, 3), [0.2, 0.7, 0.1])
        scores[4], scores[9] = [1e-9, 1 - 1e-9, 0], [0.01, 0.99, 0]
        said, actual = np.eye(3, dtype=bool)[[1] * 16], np.eye(3, dtype=bool)[[0] * 16]
        hard = hardest(checkpoint, corpus, scores, said, actual)
        assert [each.index for each in hard[:3]] == [4, 9, 0]
        assert len(hard) == MOST
        assert {passage.label for passage in hard[0].passages} == {0, 1}
        assert hard[0].passages[0].text == "cow barn wheat"

    def test_a_label_that_is_not_there_counts_where_any_number_may_be(self) -> None:
        scores = np.array([[0.5, 0.5], [0.5, 0.9]])
        actual = np.array([[True, False], [True, False]])
        one, many = loss(scores, actual, False), loss(scores, actual, True)
        assert one[0] == one[1]
        assert many[1] > many[0]
