"""Training without a configuration: what is chosen, and how long it is said to take."""

from __future__ import annotations

import re
import time
import tomllib
from array import array
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from gma.model import weights
from gma.model.backbone import Backbone
from gma.model.tokenizer import Tokenizer
from gma.model.training import token_scores
from gma.model.training.chosen import CHOSEN, CPU, GPU, Chosen, Machine
from gma.model.training.config import read_config
from gma.model.training.errors import TrainingError
from gma.model.training.pace import Pace, spoken
from gma.model.training.schedule import Schedule
from gma.model.training.survey import Survey, Surveyed
from gma.model.training.token_scores import TokenScores
from gma.model.training.train import train
from tests.model.small import SMALL
from tests.model.training.documents import (
    Train,
    documents,
    evaluations,
    interrupted,
    log_of,
    write,
)

LITTLE = replace(CPU, step=512, least=4096)


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base that is the package's, on a machine that does little."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train((x["text"] for x in documents(0, 4)), 300)
    config = SMALL.backbone.model_copy(
        update={"form": "forgetting", "name": "base", "vocab_size": tokenizer.vocab_size}
    )
    weights.save(tmp_path / "base", Backbone(config), tokenizer, card="")
    monkeypatch.setattr("gma.model.training.train.DEFAULT_BASE", tmp_path / "base")
    monkeypatch.setattr("gma.model.training.train.CPU", LITTLE)
    monkeypatch.setattr("gma.model.training.train.GPU", LITTLE)
    fit: Any = token_scores.fit
    few = {"steps": 20, "crops": 16, "length": 128}

    def fit_little(*given: Any) -> TokenScores:
        *others, config, progress = given
        fitted: TokenScores = fit(*others, config.model_copy(update=few), progress)
        return fitted

    monkeypatch.setattr(token_scores, "fit", fit_little)
    return tmp_path / "base"


class TestRun:
    def test_begins_from_the_package_s_base_and_says_what_it_does(
        self, packaged: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        checkpoint = train(data, tmp_path / "my letters", None)
        said = capsys.readouterr().err
        assert "chosen by 12 documents of" in said
        assert "3 labels, for the CPU:" in said
        assert re.search(r"\d+ steps of 512 tokens, crops of \d+: each document is read", said)
        assert re.search(r"training: \d+ steps, about \d+ (seconds?|minutes)\n", said)
        assert re.search(
            r"step \d+ of \d+: macro-F1 on valid 1.000; about \d+ seconds? to go", said
        )
        loaded = weights.load(checkpoint)
        assert loaded.config.name == "my-letters"
        assert loaded.config.backbone == weights.load_base(packaged).config.model_copy(
            update={"name": "my-letters"}
        )
        assert evaluations(checkpoint)[-1]["valid"]["views"][-1]["accuracy"] == 1.0

    @pytest.mark.long
    def test_goes_on_without_the_data(self, packaged: Path, data: Path, tmp_path: Path) -> None:
        whole = train(data, tmp_path / "a", None)
        with interrupted():
            train(data, tmp_path / "b/a", None)
        for file in data.iterdir():
            file.unlink()
        parts = train(data, tmp_path / "b/a", None, resume=True)
        assert weights.load(whole).fingerprint == weights.load(parts).fingerprint

    @pytest.mark.long
    def test_any_number_of_labels(self, packaged: Path, data: Path, tmp_path: Path) -> None:
        for split, seed in (("train", 0), ("valid", 1)):
            lines = [
                {"text": line["text"], "labels": [line["label"]]} for line in documents(seed, 4)
            ]
            write(data / f"{split}.jsonl", lines)
        checkpoint = train(data, tmp_path / "run", None)
        assert evaluations(checkpoint)[-1]["valid"]["views"][-1]["average_precision"] > 0.9

    @pytest.mark.long
    def test_what_was_chosen_is_a_configuration(
        self, packaged: Path, data: Path, tmp_path: Path
    ) -> None:
        first = train(data, tmp_path / "first", None)
        again = train(data, tmp_path / "again", tmp_path / "first" / CHOSEN, base=packaged)
        assert weights.load(first).fingerprint == weights.load(again).fingerprint

    def test_without_a_base(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Train
    ) -> None:
        monkeypatch.setattr("gma.model.training.train.DEFAULT_BASE", tmp_path / "none")
        with pytest.raises(TrainingError, match="no base to begin from: say --from"):
            train(data, tmp_path / "run", None)
        assert not (tmp_path / "run").exists()
        run()  # which has a configuration, and needs none

    def test_one_that_began_with_a_configuration(
        self, packaged: Path, data: Path, tmp_path: Path, run: Train
    ) -> None:
        run()
        with pytest.raises(TrainingError, match="began with a configuration: say --config"):
            train(data, tmp_path / "run", None, resume=True)


class TestSizes:
    @pytest.mark.parametrize("machine", [CPU, GPU])
    @pytest.mark.parametrize(
        ("size", "count"),
        [(1, 2), (30, 100), (1000, 3000), (1400, 25_000), (500_000, 300), (100_000_000, 2)],
    )
    def test_are_within_what_the_machine_does(
        self, machine: Machine, size: int, count: int, tmp_path: Path
    ) -> None:
        chosen = self.of(machine, [size] * count)
        tokens = chosen.steps * chosen.tokens_per_step
        assert chosen.length <= machine.longest
        assert chosen.tokens_per_step >= machine.step
        assert chosen.steps >= 4
        assert (
            min(size / 4, chosen.length) * chosen.steps * (chosen.tokens_per_step / chosen.length)
            <= 1.01 * machine.most + 4 * chosen.tokens_per_step
        )
        assert tokens >= min(machine.least, machine.most)
        (tmp_path / CHOSEN).write_text(chosen.toml())
        assert read_config(tmp_path / CHOSEN, SMALL.backbone)[1].steps == chosen.steps

    def test_crops_hold_most_documents(self) -> None:
        assert self.of(CPU, [400] * 9 + [4000]).length == 128
        assert self.of(CPU, [400] + [1500] * 3).length == 512
        assert self.of(GPU, [16_000] * 4).length == 4096

    def test_a_name_that_is_none(self) -> None:
        assert tomllib.loads(self.of(CPU, [9], "\u00e9!").toml())["model"]["name"] == "mine"

    def of(self, machine: Machine, sizes: list[int], name: str = "x") -> Chosen:
        survey = SimpleNamespace(
            surveyed={"train": Surveyed(sizes=array("q", sizes))}, labels={"a": 1, "b": 1}
        )
        return Chosen.of(name, cast(Survey, survey), machine)


class TestPace:
    def test_steps_then_evaluations_are_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: now)

        def wait(seconds: float) -> None:
            nonlocal now
            now += seconds

        pace = Pace(Schedule(steps=100, evaluate_every=50), 0, tokens_of_evaluation=6000)
        for step, seconds in enumerate([60.0, 2.0, 2.0, 2.0], 1):  # the first one warms up
            wait(seconds)
            pace.stepped(step)
        assert step == pace.probed
        # 96 steps of 2 seconds and 100 tokens, and two evaluations of 40.
        assert pace.left(4, 100) == spoken(96 * 2 + 2 * 40)
        wait(2.0)
        pace.stepped(50)
        wait(10.0)
        pace.evaluated()
        assert pace.left(50, 100) == spoken(50 * 2 + 10)

    @pytest.mark.parametrize(
        ("seconds", "said"),
        [(0, "about 1 second"), (89, "about 89 seconds"), (300, "about 5 minutes")],
    )
    def test_in_words(self, seconds: float, said: str) -> None:
        assert spoken(seconds) == said
        assert spoken(7200) == "about 2.0 hours"


def test_the_log_says_what_the_tokens_scores_were_chosen_by(run: Train) -> None:
    (line,) = (line["token_scores"] for line in log_of(run()) if "token_scores" in line)
    assert line.keys() == {"presence", "share"}
    for part in line.values():
        tried = {float(decay): loss for decay, loss in part["tried"].items()}
        assert len(tried) > 1
        assert tried[part["decay"]] == min(tried.values())
