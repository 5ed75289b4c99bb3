"""Documents that have any number of labels, from their files to an evaluated checkpoint."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gma.model import weights
from gma.model.training import stacking
from gma.model.training.corpus import Corpus
from gma.model.training.crops import Crops
from gma.model.training.errors import CorpusError, TrainingError
from gma.model.training.evaluation import evaluate, measure_tokens
from gma.model.training.labelled import Fields
from gma.model.training.splits import Splits
from gma.model.training.train import train
from tests.model.small import small
from tests.model.training.documents import (
    COMMON,
    WORDS,
    Train,
    configuration,
    documents,
    evaluations,
    interrupted,
    log_of,
    write,
)


def listed(seed: int, count: int, rare: int = 0, words: int = 60) -> list[dict[str, Any]]:
    """Texts with words of each of their labels; every fourth has none, so many have "rare"."""
    rng = random.Random(seed)
    lines = []
    for i in range(count):
        labels = [label for bit, label in enumerate(("sea", "farm")) if i >> bit & 1]
        if i < rare:
            labels.append("court")
        chosen = [
            rng.choice(WORDS[labels[j % len(labels)]]) for j in range(words // 3 * bool(labels))
        ]
        text = chosen + rng.choices(COMMON, k=words - len(chosen))
        rng.shuffle(text)
        spans = [{"label": label, "start": 0, "end": 3} for label in labels]
        lines.append({"text": " ".join(text), "labels": labels, "spans": spans})
    return lines


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "data/train.jsonl", listed(0, 40, rare=10))
    write(tmp_path / "data/valid.jsonl", listed(1, 24, rare=12))
    return tmp_path / "data"


def fitting(tmp_path: Path, **training: Any) -> Path:
    """A configuration whose token scores learn something."""
    config = configuration(tmp_path / "fitting.toml", **training)
    config.write_text(config.read_text().replace("steps = 10\n", "steps = 60\n"))
    return config


class TestTraining:
    def test_to_a_checkpoint_that_says_from_which_scores(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(data / "test.jsonl", listed(2, 20, rare=5))
        folder = train(data, tmp_path / "run", fitting(tmp_path))
        checkpoint = weights.load(folder)
        config = checkpoint.config
        assert config.labels == ("court", "farm", "sea")
        assert config.multi_label
        assert config.thresholds is not None
        assert len(config.thresholds) == 3

        measured = evaluate(checkpoint, data, "test")
        whole = measured.views[-1].figures
        assert whole["micro_f1"] > 0.8
        assert whole["average_precision"] > 0.9
        assert 0 <= whole["calibration_error"] < 0.3
        court = measured.labels[0]
        assert (court.label, court.documents) == ("court", 5)
        assert court.threshold == config.thresholds[0]
        assert "| court | 5 |" in measured.table()
        json.dumps(measured.as_dict(), allow_nan=False)

        # As written, so loaded and measured.
        assert log_of(folder)[-1]["test"] == measured.as_dict()
        assert "| whole | " in (folder / "README.md").read_text()
        said = capsys.readouterr().err
        assert "On whole documents, micro-F1, macro-F1 and average precision" in said
        assert re.search(
            r"test \(20 documents\)  this model +[01]\.\d{3}  [01]\.\d{3}  [01]\.\d{3}", said
        )

    def test_a_baseline_with_thresholds(self, run: Train, data: Path) -> None:
        pytest.importorskip("sklearn")
        (line,) = (line for line in log_of(run()) if "baseline" in line)
        assert line["baseline"]["valid"]["micro_f1"] > 0.8
        assert line["baseline"]["valid"]["average_precision"] > 0.8

    def test_the_deep_part_learns_without_the_tokens_own_scores(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = configuration(
            tmp_path / "deep.toml", steps=120, learning_rate=1e-2, evaluate_every=120
        )
        config.write_text(config.read_text().replace("steps = 10", "steps = 0"))
        folder = train(data, tmp_path / "deep", config)
        assert evaluations(folder)[-1]["valid"]["views"][-1]["average_precision"] > 0.7
        assert "learned nothing" not in capsys.readouterr().err

    def test_says_that_the_deep_reading_learned_nothing(
        self, run: Train, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run(steps=8, learning_rate=1e-9)
        assert "the deep reading learned nothing" in capsys.readouterr().err

    def test_one_in_a_hundred_is_found(self, data: Path, tmp_path: Path) -> None:
        write(data / "train.jsonl", listed(0, 400, rare=4, words=30))
        write(data / "valid.jsonl", listed(1, 200, rare=2, words=30))
        write(data / "test.jsonl", listed(2, 200, rare=2, words=30))
        config = fitting(tmp_path, steps=4, lengths=[[0.0, 32]], token_dropout=[0.0, 0.0])
        folder = train(data, tmp_path / "run", config)
        court = log_of(folder)[-1]["test"]["labels"][0]
        assert (court["label"], court["documents"]) == ("court", 2)
        assert court["average_precision"] > 0.5
        assert 1 <= court["said"] <= 6
        assert court["score"] < 0.1  # though drawn as often as the others

    def test_a_resumed_run_ends_where_an_uninterrupted_one_does(self, run: Train) -> None:
        whole = run("whole")
        with interrupted():
            run("parts")
        parts = run("parts", resume=True)
        expected = load_file(whole.parent / "resume.safetensors")
        found = load_file(parts.parent / "resume.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert weights.load(whole).fingerprint == weights.load(parts).fingerprint

    def test_is_chosen_by(self, run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
        values = iter((0.5, 0.9, 0.7))

        def figured(*arguments: Any) -> Any:
            measured = measure_tokens(*arguments)
            found = {
                **dict.fromkeys(measured.views[0].figures, 0.5),
                "average_precision": next(values),
            }
            return replace(
                measured, views=tuple(replace(view, figures=found) for view in measured.views)
            )

        monkeypatch.setattr("gma.model.training.run.measure_tokens", figured)
        lines = evaluations(run(choose_by="average_precision", steps=3, evaluate_every=1))
        assert [line["kept"] for line in lines] == [True, True, False]

    @pytest.mark.parametrize(
        ("training", "problem"),
        [
            ({"choose_by": "accuracy"}, "choose_by is accuracy, but of documents with lists"),
            ({"none_below": 0.1}, "none_below is for documents with one label"),
            ({"model": {"multi_label": True}}, "takes no multi_label: documents with lists"),
            ({"model": {"thresholds": [0.5]}}, "takes no thresholds"),
        ],
    )
    def test_what_does_not_go_with_it(
        self, run: Train, training: dict[str, Any], problem: str
    ) -> None:
        with pytest.raises(TrainingError, match=problem):
            run(**training)


class TestCrops:
    @pytest.mark.parametrize(
        ("balance", "weight", "rare"), [(1.0, 1.0, 33), (0.0, 1.0, 1), (1.0, 4.0, 67)]
    )
    def test_how_often_a_label_is_drawn(self, balance: float, weight: float, rare: int) -> None:
        """One document of 100 has the rare label, 49 the other, and 50 none."""
        labels = np.zeros((100, 2), np.bool_)
        labels[0, 1] = labels[1:50, 0] = True
        train = Corpus(np.arange(100, dtype=np.uint16), np.arange(1, 101), labels)
        crops = Crops(train, 0.0, torch.device("cpu"), balance=balance, label_weights={1: weight})
        tokens, _, drawn, _ = crops.draw(np.random.default_rng(0), 100, 1)
        assert drawn.shape == (100, 2)
        assert abs(int(drawn[:, 1].sum()) - rare) <= 1
        assert ((tokens[:, 0] == 0) == drawn[:, 1]).all()
        assert crops.rates is not None
        assert crops.rates[1] == pytest.approx(rare / 100, abs=0.01)
        expected = sum(-r * math.log(r) - (1 - r) * math.log(1 - r) for r in crops.rates.tolist())
        assert crops.guess == pytest.approx(expected)

    def test_all_have_a_label(self) -> None:
        train = Corpus(np.arange(4, dtype=np.uint16), np.arange(1, 5), np.ones((4, 2), np.bool_))
        assert Crops(train, 0.0, torch.device("cpu")).guess == pytest.approx(0.0, abs=1e-9)


def test_stacking_undoes_the_balance() -> None:
    """A label in ten that nothing tells: its score ends near one in ten."""
    rng = np.random.default_rng(0)
    labels = np.zeros((60, 2), np.bool_)
    labels[::10, 0] = True
    labels[:, 1] = rng.random(60) < 0.5
    tokens = np.where(labels[:, 1:], 1, 0).repeat(64, 1)
    valid = Corpus(tokens.ravel().astype(np.uint16), np.arange(1, 61) * 64, labels)
    classifier = small(vocab_size=3, labels=("a", "b"), multi_label=True)
    classifier.pooling.deep.weight.zero_()
    classifier.pooling.deep.bias.zero_()
    own = torch.tensor([[0.0, -1.0], [0.0, 1.0], [0.0, 0.0]])
    classifier.pooling.token.weight.copy_(own)
    stacked = stacking.fit(classifier, valid)
    stacking.apply(classifier, stacked)
    after = classifier.pooling.token.weight[:2, 0]
    rate = (after * 64 / (64 + stacked.prior_tokens)).sigmoid()
    torch.testing.assert_close(rate, torch.full((2,), 0.1), atol=0.05, rtol=0)
    assert stacked.token > 1.5  # "b" is told apart


class TestFiles:
    ROWS = (("a ship", ("farm", "sea")), ("nothing", ()), ("hay", ("farm",)))

    def read(self, data: Path, names: Fields = Fields()) -> list[tuple[str, Any]]:  # noqa: B008
        sources = Splits(data, names).sources("train")
        return [(d.text, d.label) for source in sources for d in source.read()]

    def test_json_lines(self, tmp_path: Path) -> None:
        write(tmp_path / "train.jsonl", [{"text": x, "labels": [*y]} for x, y in self.ROWS])
        assert self.read(tmp_path) == [*self.ROWS]
        write(tmp_path / "train.jsonl", [{"text": "a", "labels": ["b", 3, "b"]}])
        assert self.read(tmp_path) == [("a", ("3", "b"))]

    def test_tables(self, tmp_path: Path) -> None:
        rows = "text,labels\na ship, sea | farm\nnothing,\nhay,farm\n"
        (tmp_path / "train.csv").write_text(rows)
        assert self.read(tmp_path) == [*self.ROWS]

    def test_parquet(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        rows = {"text": [x for x, _ in self.ROWS], "labels": [[*y] for _, y in self.ROWS]}
        parquet.write_table(pyarrow.table(rows), tmp_path / "train.parquet")
        assert self.read(tmp_path) == [*self.ROWS]

    @pytest.mark.parametrize("classes", [True, False])
    def test_a_saved_dataset(self, tmp_path: Path, classes: bool) -> None:
        datasets = pytest.importorskip("datasets")
        names = ["farm", "sea"]
        label = datasets.ClassLabel(2, names) if classes else datasets.Value("string")
        features = {"text": datasets.Value("string"), "labels": datasets.Sequence(label)}
        labels = [[names.index(x) if classes else x for x in y] for _, y in self.ROWS]
        rows = {"text": [x for x, _ in self.ROWS], "labels": labels}
        found = datasets.Dataset.from_dict(rows, datasets.Features(features))
        found.save_to_disk(str(tmp_path / "train"))
        assert self.read(tmp_path) == [*self.ROWS]

    def test_fields_of_other_names(self, tmp_path: Path) -> None:
        write(tmp_path / "train.jsonl", [{"text": "a", "tags": ["b"], "labels": 3}])
        assert self.read(tmp_path, Fields(labels="tags")) == [("a", ("b",))]

    def test_valid_is_drawn_from_each_label_and_of_none(self, tmp_path: Path) -> None:
        write(tmp_path / "train.jsonl", listed(0, 80, rare=5))
        drawn = [*Splits(tmp_path).read("valid")]
        assert {label for d in drawn for label in d.labels} == {"sea", "farm", "court"}
        assert any(not d.labels for d in drawn)
        assert len(drawn) <= 20

    @pytest.mark.parametrize(
        ("labels", "problem"),
        [
            ('"sea"', "'labels' is no list"),
            ("null", "'labels' is no list"),
            ('["sea", null]', "'labels' is no list"),
            ('["sea", true]', "'labels' is no list"),
            ('[["sea"]]', "'labels' is no list"),
            ('["sea", " "]', "'labels' has a blank label"),
            ('["sea"], "label": "sea"', "'label' and 'labels' are both there"),
            ('["moon"]', "label 'moon' is not among"),
        ],
    )
    @pytest.mark.parametrize("split", ["train", "valid"])
    def test_a_line_is_named(
        self, run: Train, data: Path, split: str, labels: str, problem: str
    ) -> None:
        if "moon" in labels and split == "train":
            pytest.skip("train says which labels there are")
        with (data / f"{split}.jsonl").open("a") as file:
            file.write('{"text": "a", "labels": ' + labels + "}\n")
        line = 41 if split == "train" else 25
        with pytest.raises(CorpusError, match=problem) as caught:
            run()
        assert f"{split}.jsonl, line {line}: " in str(caught.value)

    @pytest.mark.parametrize("split", ["train", "valid"])
    def test_kinds_are_not_mixed(self, run: Train, data: Path, split: str) -> None:
        with (data / f"{split}.jsonl").open("a") as file:
            file.write('{"text": "a", "label": "sea"}\n')
        with pytest.raises(CorpusError, match=rf"{split}\.jsonl, line \d+: a label, where others"):
            run()

    def test_a_list_among_single_labels(self, run: Train, data: Path) -> None:
        write(data / "train.jsonl", [*documents(0, 1), {"text": "a", "labels": []}])
        with pytest.raises(CorpusError, match=r"train\.jsonl, line 4: a list of labels, where"):
            run()

    @pytest.mark.parametrize("header", ["text,label,labels", "text,labels,labels"])
    def test_columns(self, tmp_path: Path, header: str) -> None:
        (tmp_path / "train.csv").write_text(f"{header}\na,b,c\n")
        with pytest.raises(CorpusError, match=r"train\.csv, line 1: .*(both|two columns)"):
            self.read(tmp_path)

    def test_no_labels_at_all(self, run: Train, data: Path) -> None:
        write(data / "train.jsonl", [{"text": x, "labels": []} for x in "ab"])
        with pytest.raises(TrainingError, match=r"the train split has no label$"):
            run()


class TestEvaluation:
    def test_documents_of_the_other_kind(self, run: Train, data: Path, tmp_path: Path) -> None:
        checkpoint = weights.load(run())
        write(tmp_path / "test.jsonl", [{"text": "a", "label": "sea"}])
        with pytest.raises(CorpusError, match=r"line 1: has one label, where the model gives any"):
            evaluate(checkpoint, tmp_path, "test")

    def test_nothing_is_there(self, run: Train, tmp_path: Path) -> None:
        checkpoint = weights.load(run())
        write(tmp_path / "test.jsonl", [{"text": "a", "labels": []}])
        measured = evaluate(checkpoint, tmp_path, "test")
        json.dumps(measured.as_dict(), allow_nan=False)
        assert "| court | 0 |" in measured.table()


class TestNoneOfThese:
    """One label each, or none if its score is low."""

    def test_thresholds_are_fitted_to_valid(self, run: Train, data: Path) -> None:
        write(data / "train.jsonl", documents(0, 8))
        write(data / "valid.jsonl", documents(1, 12, words=12))
        checkpoint = weights.load(run(none_below=0.1))
        assert checkpoint.config.thresholds is not None
        assert not checkpoint.config.multi_label
        figures = evaluate(checkpoint, data, "valid").views[-1].figures
        assert 0.8 <= figures["answered"] < 1.0
        assert figures["accuracy"] <= figures["answered"]

    def test_needs_one_label(self, run: Train, data: Path) -> None:
        for split, seed in (("train", 0), ("valid", 1)):
            write(data / f"{split}.jsonl", documents(seed, 2))
        with pytest.raises(TrainingError, match="choose_by is micro_f1, but of documents with one"):
            run(choose_by="micro_f1")
