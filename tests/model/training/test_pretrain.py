"""Pretraining, from texts to a base; and training from one."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gma.model import weights
from gma.model.layers import Layer
from gma.model.mixers import INITIAL_VARIANCE
from gma.model.ops.chunked import Rows
from gma.model.tokenizer import Tokenizer
from gma.model.training.errors import CorpusError, TrainingError
from gma.model.training.pretrain import pretrain
from gma.model.training.pretraining import Pretraining
from gma.model.training.run import Run
from gma.model.training.texts import Texts
from gma.model.training.train import train
from gma.model.weights import CheckpointError
from tests.model.training.documents import (
    COMMON,
    Train,
    configuration,
    documents,
    interrupted,
    log_of,
    write,
)

MODEL = {
    "name": "tiny-base",
    "vocab_size": 300,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "routing_dim": 4,
    "value_dim": 8,
    "num_components": 4,
    "mlp_width": 16,
}
TRAINING = {
    "steps": 8,
    "tokens_per_step": 512,
    "lengths": [[0.0, 64], [0.5, 128]],
    "evaluate_every": 4,
}

Pretrain = Callable[..., Path]


def tables(file: Path, model: dict[str, Any], training: dict[str, Any]) -> Path:
    lines = []
    for name, table in (("model", model), ("training", training)):
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rng = random.Random(0)
    for number in range(20):
        file = tmp_path / f"texts/{'inner/' if number % 2 else ''}{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(" ".join(rng.choices(COMMON, k=rng.choice([3, 100, 300]))))
    return tmp_path / "texts"


@pytest.fixture
def base(texts: Path, tmp_path: Path) -> Pretrain:
    def run(
        out: str = "base",
        *,
        data: Path = texts,
        model: dict[str, Any] | None = None,
        tokenizer: Path | None = None,
        resume: bool = False,
        prepare_only: bool = False,
        **training: Any,
    ) -> Path:
        config = tables(tmp_path / "base.toml", MODEL | (model or {}), TRAINING | training)
        return pretrain(
            data,
            tmp_path / out,
            config,
            tokenizer=tokenizer,
            resume=resume,
            prepare_only=prepare_only,
        )

    return run


class TestPretrain:
    def test_mixtures_learn_at_a_rate_of_their_own(self, base: Pretrain) -> None:
        def mixture(name: str, rate: float) -> list[Tensor]:
            trained = base(name, mixture_learning_rate=rate, average=0.0)
            layer = weights.load_base(trained).backbone.layers[0]
            assert isinstance(layer, Layer)
            return list(layer.mixer.mixture.distribution())

        def moved(trained: list[Tensor]) -> float:
            return max((a - b).abs().max().item() for a, b in zip(trained, first, strict=True))

        first = mixture("first", 0.0)
        _, var, _ = first
        assert var.numpy() == pytest.approx(INITIAL_VARIANCE, rel=0.01)
        assert 5 < moved(mixture("fast", 1.0)) / moved(mixture("slow", 0.1)) < 20

    def test_learns_and_leaves_a_base_and_a_log(self, base: Pretrain) -> None:
        checkpoint = base(steps=60, learning_rate=1e-2, evaluate_every=30)
        lines = log_of(checkpoint)
        bits = [line["valid"]["bits_per_byte"] for line in lines if "valid" in line]
        assert bits == sorted(bits, reverse=True)
        # Words are drawn from 12: no text has less than log2(12) bits for each and its space.
        least = math.log2(12) / (1 + sum(map(len, COMMON)) / 12)
        assert least < bits[-1] < 0.9 * bits[0]
        assert {line["length"] for line in lines if "length" in line} == {64, 128}
        loaded = weights.load_base(checkpoint)
        assert loaded.config.name == "tiny-base"
        assert "labels" not in json.loads((checkpoint / "config.json").read_text())
        assert f"{bits[-1]:.4f} bits per byte" in (checkpoint / "README.md").read_text()

    def test_bits_per_byte_are_the_loss_of_every_token_but_the_first_of_a_window(
        self, base: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs: list[Pretraining] = []

        def untrained(run: Pretraining, _: object) -> None:
            run.best = 0.0
            runs.append(run)

        monkeypatch.setattr(Pretraining, "train", untrained)
        base(lengths=[[0.0, 64]])
        run = runs[0]
        backbone = run.average.double()
        nats, size, read = 0.0, 0, 0
        for index, end in enumerate(run.valid.ends):
            tokens = run.valid.tokens[run.valid.ends[index - 1] if index else 0 : end]
            for start in range(0, len(tokens) - 1, 64):
                window = torch.from_numpy(tokens[start : start + 64].astype(np.int64))
                x = backbone.embedding(window)[None]
                rows = _alone(len(window))
                hidden = backbone.hidden_alone(x, rows)[0]
                normed = hidden * (hidden.square().mean(1, keepdim=True) + 1e-6).rsqrt()
                logits = normed @ backbone.embedding.weight.T
                nats -= logits.log_softmax(1)[:-1].gather(1, window[1:, None]).sum().item()
                size += int(run.tokenizer.byte_lengths[window[1:].numpy()].sum())
                read += len(window)
        run.average.float()
        bits, tokens_read = run.bits_per_byte()
        assert tokens_read == read
        assert bits == pytest.approx(nats / math.log(2) / size, rel=1e-5)

    def test_labels_need_not_be_there_and_do_not_count(
        self, base: Pretrain, tmp_path: Path
    ) -> None:
        plain = [{"text": each["text"]} for each in documents(0, 4)]
        odd = [{**each, "label": None, "labels": 3} for each in plain]
        for name, lines in (("plain", plain), ("odd", odd)):
            write(tmp_path / name / "train.jsonl", lines)
        made = [weights.load_base(base(f"r-{x}", data=tmp_path / x)) for x in ("plain", "odd")]
        assert made[0].fingerprint == made[1].fingerprint

    def test_one_text_leaves_none_for_valid(self, base: Pretrain, tmp_path: Path) -> None:
        write(tmp_path / "one/train.jsonl", [{"text": "a ship"}])
        with pytest.raises(CorpusError, match="one text alone"):
            base(data=tmp_path / "one")

    def test_bidirectional_models_have_nothing_to_guess(self, base: Pretrain) -> None:
        with pytest.raises(TrainingError, match="leave causal out"):
            base(model={"causal": False})

    @pytest.mark.parametrize(
        ("model", "training", "named"),
        [
            ({"labels": ["a", "b"]}, {}, "labels is unknown"),
            ({"widht": 3}, {}, "did you mean width"),
            ({}, {"dropout": 0.1}, "dropout is unknown"),
            ({}, {"lengths": [[0.1, 64]]}, "must begin at 0.0"),
        ],
    )
    def test_unknown_settings_are_named(
        self, base: Pretrain, model: dict[str, Any], training: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(TrainingError, match=named):
            base(model=model, **training)

    def test_resumed_it_ends_where_an_uninterrupted_run_does(
        self, base: Pretrain, texts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = base("whole", steps=12)
        measure, calls = Pretraining.bits_per_byte, []

        def interrupted(run: Pretraining) -> tuple[float, int]:
            calls.append(run.step)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return measure(run)

        with monkeypatch.context() as patch:
            patch.setattr(Pretraining, "bits_per_byte", interrupted)
            with pytest.raises(KeyboardInterrupt):
                base("parts", steps=12)
        for file in texts.rglob("*.txt"):
            file.unlink()
        parts = base("parts", steps=12, resume=True)
        expected, found = (load_file(x.parent / "resume.safetensors") for x in (whole, parts))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
        assert weights.load_base(whole).fingerprint == weights.load_base(parts).fingerprint

    def test_what_was_prepared_is_data_elsewhere(
        self, base: Pretrain, texts: Path, tmp_path: Path
    ) -> None:
        prepared = base("first", prepare_only=True)
        assert not (tmp_path / "first/checkpoint").exists()
        expected = weights.load_base(base("first"))
        for file in texts.rglob("*.txt"):
            file.unlink()
        found = base("second", data=prepared)
        assert weights.load_base(found).fingerprint == expected.fingerprint
        assert base("second", data=prepared, resume=True) == found
        other = tmp_path / "other.json"
        Tokenizer.train(iter(["a"]), 256).save(other)
        with pytest.raises(TrainingError, match="another tokenizer"):
            base("third", data=prepared, tokenizer=other)

    def test_a_tokenizer_that_is_given_is_the_base_s(self, base: Pretrain, tmp_path: Path) -> None:
        given = tmp_path / "given.json"
        Tokenizer.train(iter(["the ship of state"]), 260).save(given)
        first = base("given", tokenizer=given)
        assert (first / "tokenizer.json").read_bytes() == given.read_bytes()
        assert weights.load_base(first).config.vocab_size == 260


class TestTexts:
    def test_wide_ids_and_all_texts(self, tmp_path: Path) -> None:
        tokenizer = Tokenizer.train(iter(["a b"]), 256)
        texts = ["one", "x", "three " * 400_000]
        made = Texts.encode(texts, tokenizer, tmp_path / "train.tokens")
        assert made.tokens.dtype == np.uint16
        for index, text in enumerate(texts):
            begin = made.ends[index - 1] if index else 0
            np.testing.assert_array_equal(
                made.tokens[begin : made.ends[index]], tokenizer.encode(text)
            )

    def test_crops_are_of_one_document(self) -> None:
        made = Texts(np.arange(1000, dtype=np.uint32), np.array([1, 300, 1000]))
        tokens, lengths = made.draw(np.random.default_rng(0), 500, 400, 0.2)
        of = np.searchsorted(made.ends, tokens[:, 0].numpy(), side="right")
        for row, size, document in zip(tokens, lengths, of, strict=True):
            begin = made.ends[document - 1] if document else 0
            assert size == min(400, made.ends[document] - begin)
            assert torch.equal(row[:size], row[0] + torch.arange(size))
            assert row[size - 1] < made.ends[document]
            assert not row[size:].any()
        # As many from each as it has tokens.
        assert (of == 2).mean() == pytest.approx(0.7, abs=0.06)

    def test_windows_hold_all_but_what_is_too_much(self) -> None:
        made = Texts(np.arange(1000, dtype=np.uint16), np.array([1, 300, 1000]))
        starts, lengths = made.windows(128, 10_000)
        assert [*zip(starts.tolist(), lengths.tolist(), strict=True)] == [
            *((1, 128), (129, 128), (257, 43)),
            *((300 + 128 * i, 128) for i in range(5)),
            (940, 60),
        ]
        assert made.windows(128, 500)[1].sum() <= 500


class TestFrom:
    """A classifier that begins from a base."""

    def test_has_its_tokenizer_and_its_backbone(
        self, base: Pretrain, data: Path, tmp_path: Path
    ) -> None:
        begun = weights.load_base(base())
        config = tmp_path / "fine.toml"
        config.write_text(
            "[training]\nsteps = 1\nlearning_rate = 1e-9\naverage = 0.0\n"
            "tokens_per_step = 512\nlengths = [[0.0, 128]]\nprefix = 32\n"
            "[training.token_scores]\nsteps = 0\n"
        )
        checkpoint = weights.load(
            train(data, tmp_path / "fine", config, base=tmp_path / "base/checkpoint")
        )
        assert checkpoint.config.backbone == begun.config
        assert checkpoint.config.labels == ("court", "farm", "sea")
        assert checkpoint.tokenizer.fingerprint == begun.tokenizer.fingerprint
        for name, tensor in begun.backbone.state_dict().items():
            found = checkpoint.classifier.state_dict()[name]
            torch.testing.assert_close(found, tensor, rtol=1e-3, atol=1e-5)

    def test_needs_no_configuration_and_takes_a_classifier_too(
        self, run: Train, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = run()
        seen: list[Run] = []

        def stopped(run: Run, _: object) -> None:
            seen.append(run)
            raise KeyboardInterrupt

        monkeypatch.setattr(Run, "fit_token_scores", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path / "second", None, base=first)
        begun = weights.load(first).config.backbone
        assert seen[0].trained.config.backbone == begun.model_copy(update={"name": "second"})

    def test_the_backbone_may_stand_still(self, base: Pretrain, data: Path, tmp_path: Path) -> None:
        checkpoint = base()
        config = configuration(tmp_path / "c.toml", backbone_learning_rate=0.0, average=0.0)
        found = weights.load(train(data, tmp_path / "still", config, base=checkpoint)).classifier
        begun = weights.load_base(checkpoint).backbone.state_dict()
        for name, tensor in begun.items():
            assert torch.equal(found.state_dict()[name], tensor), name
        assert found.pooling.deep.weight.any()

    def test_resumed_it_ends_where_an_uninterrupted_run_does(
        self, base: Pretrain, data: Path, tmp_path: Path
    ) -> None:
        begun, config = base(), configuration(tmp_path / "c.toml", steps=12)
        whole = train(data, tmp_path / "whole", config, base=begun)
        with interrupted():
            train(data, tmp_path / "parts", config, base=begun)
        with pytest.raises(TrainingError, match=r"base was .* not null"):
            train(data, tmp_path / "parts", config, resume=True)
        parts = train(data, tmp_path / "parts", config, base=begun, resume=True)
        assert weights.load(whole).fingerprint == weights.load(parts).fingerprint

    def test_what_the_weights_fix_can_t_be_changed(
        self, base: Pretrain, data: Path, tmp_path: Path
    ) -> None:
        config = configuration(tmp_path / "c.toml", model={"width": 32})
        with pytest.raises(TrainingError, match=r"width is 32, but .* it is 16"):
            train(data, tmp_path / "other", config, base=base())

    def test_tokens_are_prepared_again_for_another_base(
        self, run: Train, base: Pretrain, data: Path, tmp_path: Path
    ) -> None:
        begun = base()
        run("same")
        (tmp_path / "same/resume.safetensors").unlink()
        config = configuration(tmp_path / "c.toml")
        found = weights.load(train(data, tmp_path / "same", config, base=begun))
        assert found.tokenizer.fingerprint == weights.load_base(begun).tokenizer.fingerprint

    def test_a_base_is_no_classifier(self, base: Pretrain) -> None:
        with pytest.raises(CheckpointError, match=r"without labels.*gma train --from"):
            weights.load(base())


def _alone(length: int) -> Rows:
    return Rows.of(torch.tensor([length]), torch.tensor([0]), length, torch.float64)
