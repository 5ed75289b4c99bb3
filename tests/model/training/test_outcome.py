"""What a run tells at its end, beside a linear baseline, and that it tells of nothing learned."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gma.model.training.corpus import Corpus
from gma.model.training.crops import Crops
from gma.model.training.outcome import Outcome
from gma.model.training.train import train
from tests.model.training.documents import (
    COMMON,
    WORDS,
    Train,
    configuration,
    documents,
    log_of,
    write,
)

NOTHING = "the deep reading learned nothing"


def outcome(label_loss: float, guess: float, **baseline: Any) -> str:
    lines: list[dict[str, Any]] = [
        {"step": 0, "warnings": [], "guess": guess},
        {"step": 0, "baseline": baseline},
        {"step": 5, "label_loss": label_loss},
        {"step": 5, "valid": measured(0.8, 0.7), "kept": True},
        {"step": 9, "label_loss": label_loss},
        {"step": 9, "valid": measured(0.1, 0.1), "kept": False},
    ]
    return "\n".join(Outcome.of(lines).told())


def measured(accuracy: float, f1: float) -> dict[str, Any]:
    return {"documents": 1500, "views": [{}, {"accuracy": accuracy, "macro_f1": f1}]}


class TestTold:
    def test_the_weights_that_were_kept(self) -> None:
        told = outcome(0.3, 0.7)
        assert "the weights of step 5" in told
        assert "valid (1,500 documents)  this model       0.800  0.700" in told
        assert "test" not in told
        assert "warning" not in told

    @pytest.mark.parametrize("labels", [2, 20, 2000])
    def test_a_label_loss_of_guessing(self, labels: int) -> None:
        guess = math.log(labels)
        assert NOTHING in outcome(guess, guess)
        assert NOTHING in outcome(0.985 * guess, guess)
        assert NOTHING not in outcome(0.97 * guess, guess)

    def test_a_baseline(self) -> None:
        rival = {"documents": 1500, "accuracy": 0.9, "macro_f1": 0.85}
        told = outcome(0.3, 0.7, documents=10, of=20, valid=rival)
        assert "valid (1,500 documents)  linear baseline  0.900  0.850" in told
        assert "10 documents of 20" in told
        assert "the linear baseline is better than this model" in told
        worse = {"documents": 1500, "accuracy": 0.8, "macro_f1": 0.6}
        assert "better" not in outcome(0.3, 0.7, valid=worse)
        assert "lacks scikit-learn" in outcome(0.3, 0.7, missing="scikit-learn")


class TestRun:
    def test_ends_with_figures_of_valid_and_test(
        self, run: Train, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(data / "test.jsonl", documents(2, 3))
        checkpoint = run()
        said = capsys.readouterr().err
        assert "valid (6 documents)  this model       1.000  1.000" in said
        assert "test (9 documents)  this model       1.000  1.000" in said
        assert log_of(checkpoint)[-1]["test"]["documents"] == 9
        run(resume=True)
        assert "test (9 documents)  this model" in capsys.readouterr().err

    def test_says_that_the_deep_reading_learned_nothing(
        self, run: Train, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run("nothing", learning_rate=1e-9)
        assert NOTHING in capsys.readouterr().err
        run("something", steps=40, learning_rate=1e-2, evaluate_every=40)
        assert NOTHING not in capsys.readouterr().err

    def test_without_scikit_learn(
        self, run: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "sklearn", None)
        run()
        assert (
            "no linear baseline to compare with: it lacks scikit-learn" in capsys.readouterr().err
        )

    def test_a_baseline_is_fitted_beside_it(
        self, run: Train, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("sklearn")
        checkpoint = run()
        assert "valid (6 documents)  linear baseline  1.000  1.000" in capsys.readouterr().err
        (line,) = (line for line in log_of(checkpoint) if "baseline" in line)
        assert line["baseline"]["documents"] == 12

    def test_a_baseline_of_a_part_of_much(
        self, run: Train, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("sklearn")
        monkeypatch.setattr("gma.model.training.baseline.MOST_BYTES", 3000)
        (line,) = (line for line in log_of(run()) if "baseline" in line)
        assert 0 < line["baseline"]["documents"] < 12 == line["baseline"]["of"]

    def test_a_baseline_of_no_words(self, run: Train, data: Path) -> None:
        pytest.importorskip("sklearn")
        write(data / "train.jsonl", [{"text": x, "label": x} for x in "+-"])
        write(data / "valid.jsonl", [{"text": "+ +", "label": "+"}])
        (line,) = (line for line in log_of(run()) if "baseline" in line)
        assert line["baseline"] == {"missing": "words"}


class TestImbalance:
    def test_one_in_a_hundred_is_found(self, data: Path, tmp_path: Path) -> None:
        rng = random.Random(0)
        for split, each in (("train", 3), ("valid", 1), ("test", 2)):
            lines = [spotted(rng, rare=i < each) for i in range(101 * each)]
            write(data / f"{split}.jsonl", lines)
        config = configuration(
            tmp_path / "c.toml", steps=4, lengths=[[0.0, 32]], token_dropout=[0.0, 0.0]
        )
        config.write_text(config.read_text().replace("steps = 10\n", "steps = 60\n"))
        (line,) = (line for line in log_of(train(data, tmp_path / "run", config)) if "test" in line)
        assert line["test"]["documents"] == 202
        assert line["test"]["views"][-1]["macro_f1"] > 0.8

    @pytest.mark.parametrize(
        ("balance", "weight", "rare"),
        [(1.0, 1.0, 50), (0.0, 1.0, 1), (0.5, 1.0, 9), (1.0, 3.0, 75), (0.0, 11.0, 10)],
    )
    def test_how_often_a_label_is_drawn(self, balance: float, weight: float, rare: int) -> None:
        labels = np.array([1, *[0] * 99])
        train = Corpus(np.arange(100, dtype=np.uint16), np.arange(1, 101), labels)
        device, weights = torch.device("cpu"), {1: weight}
        crops = Crops(train, 0.0, device, balance=balance, label_weights=weights)
        tokens, _, drawn, _ = crops.draw(np.random.default_rng(0), 100, 1)
        assert abs(int(drawn.sum()) - rare) <= 1
        assert ((tokens[:, 0] == 0) == (drawn == 1)).all()
        share = crops.shares[1]
        expected = -share * math.log(share) - (1 - share) * math.log(1 - share)
        assert crops.guess == pytest.approx(expected)


def spotted(rng: random.Random, *, rare: bool) -> dict[str, Any]:
    """A text of words that all have, and, if it is a rare one, some of the sea's."""
    words = [*COMMON, *WORDS["farm"], *WORDS["court"]]
    text = [rng.choice(WORDS["sea"] if rare and i % 6 == 0 else words) for i in range(30)]
    return {"text": " ".join(text), "label": "rare" if rare else "common"}
