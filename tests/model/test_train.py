"""Training and evaluating, from labelled documents to a checkpoint, on very little."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import load_file

from gma.model import stacking, weights
from gma.model.classifier import Classifier
from gma.model.corpus import Corpus, CorpusError, LabelledText
from gma.model.evaluate import components_in_use, evaluate, macro_f1, measure_tokens
from gma.model.tokenizer import Tokenizer
from gma.model.train import TrainingError, train
from gma.model.weights import Checkpoint
from tests.model.small import small

Tables = dict[str, dict[str, Any]]

WORDS = {
    "sea": ["ship", "wave", "sail", "storm", "harbour", "anchor", "deck", "tide"],
    "farm": ["field", "cow", "barn", "wheat", "plough", "hay", "orchard", "goat"],
    "court": ["judge", "law", "oath", "plea", "jury", "clerk", "verdict", "bench"],
}
COMMON = ["the", "a", "of", "and", "to", "in", "it", "was", "he", "she", "that", "with"]


def document(rng: random.Random, label: str, words: int) -> dict[str, Any]:
    text = " ".join(
        rng.choice(COMMON if rng.random() < 0.6 else WORDS[label]) for _ in range(words)
    )
    return {"text": text, "label": label, "id": rng.random()}


def documents(seed: int, each: int, words: int = 150) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [document(rng, label, words) for label in WORDS for _ in range(each)]


def write(file: Path, lines: list[dict[str, Any]]) -> None:
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(zstandard.compress(data) if file.suffix == ".zst" else data)


def configuration(file: Path, **training: Any) -> Path:
    """A run of seconds; ``training`` overrides."""
    model = {
        "name": "tiny",
        "vocab_size": 300,
        "width": 16,
        "layers": 1,
        "heads": 2,
        "routing_dim": 4,
        "value_dim": 8,
        "num_components": 4,
        "mlp_width": 16,
        **training.pop("model", {}),
    }
    tables: Tables = {
        "model": model,
        "training": {
            "steps": 8,
            "tokens_per_step": 512,
            "lengths": [[0.0, 64], [0.5, 128]],
            "prefix": 32,
            "evaluate_every": 4,
            "dropout": 0.2,
            **training,
        },
        "training.token_scores": {"steps": 10, "crops": 16, "length": 128},
    }
    file.write_text(
        "\n".join(
            f"[{name}]\n"
            + "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items())
            for name, table in tables.items()
        )
    )
    return file


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "data/train.jsonl", documents(0, 4))
    write(tmp_path / "data/valid.jsonl", documents(1, 2))
    return tmp_path / "data"


Train = Callable[..., Path]


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Train:
    def run(out: str = "run", *, resume: bool = False, **training: Any) -> Path:
        config = configuration(tmp_path / "config.toml", **training)
        return train(data, tmp_path / out, config, resume=resume)

    return run


def log_of(checkpoint: Path) -> list[dict[str, Any]]:
    lines = (checkpoint.parent / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def evaluations(checkpoint: Path) -> list[dict[str, Any]]:
    return [line for line in log_of(checkpoint) if "valid" in line]


class TestTraining:
    def test_learns_and_leaves_a_checkpoint_and_a_log(self, run: Train, data: Path) -> None:
        checkpoint = weights.load(run())
        assert checkpoint.config.labels == ("court", "farm", "sea")
        measured = evaluate(checkpoint, data, "valid")
        assert [view.accuracy for view in measured.views] == [1.0] * 5

        lines = log_of(data.parent / "run/checkpoint")
        assert [line["step"] for line in lines if "label_loss" in line] == [4, 8]
        assert [line["length"] for line in lines if "label_loss" in line] == [64, 128]
        assert all(line["tokens_per_second"] > 0 for line in lines if "label_loss" in line)
        assert evaluations(data.parent / "run/checkpoint")[-1]["valid"]["documents"] == 6
        card = (data.parent / "run/checkpoint/README.md").read_text()
        assert "3 labels" in card
        assert "| whole | 1.000 | 1.000 |" in card

    def test_the_deep_part_learns_without_the_tokens_own_scores(
        self, run: Train, data: Path, tmp_path: Path
    ) -> None:
        config = configuration(
            tmp_path / "deep.toml", steps=60, learning_rate=1e-2, evaluate_every=60
        )
        config.write_text(config.read_text().replace("steps = 10", "steps = 0"))
        checkpoint = weights.load(train(data, tmp_path / "deep", config))
        assert not checkpoint.classifier.pooling.token.weight.any()
        assert evaluate(checkpoint, data, "valid").views[-1].accuracy == 1.0

    def test_bidirectional(self, run: Train, data: Path) -> None:
        checkpoint = weights.load(run(model={"causal": False}))
        assert not checkpoint.config.causal
        assert evaluate(checkpoint, data, "valid").views[-1].accuracy == 1.0

    def test_compressed_data_in_shards(self, run: Train, data: Path) -> None:
        plain = run("plain")
        lines = documents(0, 4)
        (data / "train.jsonl").unlink()
        write(data / "train-00.jsonl", lines[:5])
        write(data / "train-01.jsonl.zst", lines[5:8])
        write(data / "more.zst", lines[8:])
        # As `cat` joins compressed files: in two frames.
        with (data / "train-01.jsonl.zst").open("ab") as file:
            file.write((data / "more.zst").read_bytes())
        compressed = run("compressed")
        assert (compressed / "model.safetensors").read_bytes() == (
            plain / "model.safetensors"
        ).read_bytes()

    def test_prepared_data_is_made_again_when_the_data_is_other(
        self, run: Train, data: Path
    ) -> None:
        run("run")
        (data.parent / "run/resume.safetensors").unlink()
        write(data / "train.jsonl", [*documents(0, 4), {"text": "new", "label": "new"}])
        assert "new" in weights.load(run("run")).config.labels

    def test_stops_when_valid_no_longer_improves(self, run: Train) -> None:
        """Valid is perfect at once, so nothing can be better."""
        checkpoint = run(steps=40, evaluate_every=2, patience=3)
        assert [line["step"] for line in evaluations(checkpoint)] == [2, 4, 6, 8]
        assert "stopped" in log_of(checkpoint)[-1]
        run(steps=40, evaluate_every=2, patience=3, resume=True)
        assert [line["step"] for line in evaluations(checkpoint)] == [2, 4, 6, 8]

    def test_stops_when_the_loss_is_not_finite(self, run: Train, data: Path) -> None:
        with pytest.raises(TrainingError, match="no longer finite"):
            run(learning_rate=1e30, gradient_clip=1e30)
        assert not (data.parent / "run/checkpoint").exists()
        assert not (data.parent / "run/resume.safetensors").exists()


class TestMixer:
    """Which implementation of the operation a run trains with."""

    FITTING: ClassVar = {"routing_dim": 16, "value_dim": 16, "num_components": 16}

    def mixers_of(
        self, run: Train, monkeypatch: pytest.MonkeyPatch, out: str = "run", **training: Any
    ) -> set[str]:
        """What the training steps of a run use."""
        used: set[str] = set()
        hidden = Classifier.hidden_alone

        def watched(classifier: Classifier, *args: Any) -> torch.Tensor:
            used.add(classifier.mixers)
            return hidden(classifier, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Classifier, "hidden_alone", watched)
            run(out, model=self.FITTING, **training)
        return used

    @pytest.mark.skipif(torch.cuda.is_available(), reason="trains on the GPU")
    def test_on_the_cpu(self, run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.mixers_of(run, monkeypatch, steps=1) == {"chunked"}

    @pytest.mark.gpu
    def test_on_a_gpu(self, run: Train, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The losses are those of the exact form, as far as bfloat16 goes."""
        few = {"steps": 6, "evaluate_every": 1, "learning_rate": 1e-3}
        assert self.mixers_of(run, monkeypatch, "triton", **few) == {"triton"}
        monkeypatch.setattr(Classifier, "choose_mixers", lambda self: None)
        assert self.mixers_of(run, monkeypatch, "chunked", **few) == {"chunked"}
        found, expected = (
            [
                (line["label_loss"], line["language_loss"])
                for line in log_of(data.parent / out / "checkpoint")
                if "label_loss" in line
            ]
            for out in ("triton", "chunked")
        )
        assert len(expected) == 6
        np.testing.assert_allclose(found, expected, rtol=2e-2)


class TestLittleData:
    def test_one_token_documents_and_one_document_of_a_label(self, run: Train, data: Path) -> None:
        lines = documents(0, 2)
        write(
            data / "train.jsonl", [*lines, {"text": "x", "label": "x"}, {"text": "y", "label": 7}]
        )
        write(data / "valid.jsonl", [{"text": "x", "label": "x"}])
        checkpoint = weights.load(run())
        assert checkpoint.config.labels == ("7", "court", "farm", "sea", "x")

    def test_crops_longer_than_any_document(self, run: Train, data: Path) -> None:
        write(data / "train.jsonl", documents(0, 2, words=5))
        checkpoint = run(lengths=[[0.0, 4096]])
        assert {line["length"] for line in log_of(checkpoint) if "length" in line} <= {32, 64}

    def test_valid_that_lacks_labels(self, run: Train, data: Path) -> None:
        write(data / "valid.jsonl", documents(1, 1)[:1])
        assert evaluations(run())[-1]["valid"]["views"][-1]["accuracy"] == 1.0


class TestResume:
    def test_ends_where_an_uninterrupted_run_does(
        self, run: Train, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = run("whole", steps=12)
        calls = 0

        def interrupted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise KeyboardInterrupt
            return measure_tokens(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr("model.train.measure_tokens", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run("parts", steps=12)
        parts = run("parts", steps=12, resume=True)

        expected = load_file(whole.parent / "resume.safetensors")
        found = load_file(parts.parent / "resume.safetensors")
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
        timeless = [
            [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in log_of(folder)]
            for folder in (whole, parts)
        ]
        assert timeless[0] == timeless[1]
        assert weights.load(whole).fingerprint == weights.load(parts).fingerprint

    def test_needs_no_data(self, run: Train, data: Path) -> None:
        checkpoint = run()
        for file in data.iterdir():
            file.unlink()
        assert run(resume=True) == checkpoint

    def test_a_used_folder_is_refused(self, run: Train) -> None:
        run()
        with pytest.raises(TrainingError, match="holds a run"):
            run()

    def test_a_folder_without_a_run_is_refused(self, run: Train) -> None:
        with pytest.raises(TrainingError, match="no run to resume"):
            run(resume=True)

    @pytest.mark.parametrize("changes", [{"steps": 9}, {"model": {"width": 32}}])
    def test_another_configuration_is_refused(self, run: Train, changes: dict[str, Any]) -> None:
        run()
        with pytest.raises(TrainingError, match="another configuration"):
            run(resume=True, **changes)


class TestWrongInput:
    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"stepz": 3}, "stepz"),
            ({"steps": 0}, "steps"),
            ({"lengths": [[0.0, 65]]}, "no multiple of prefix"),
            ({"lengths": [[0.5, 64]]}, "begin at 0.0"),
            ({"token_dropout": [0.3, 0.1]}, "token_dropout"),
            ({"model": {"colour": 1}}, "colour"),
            ({"model": {"heads": -1}}, "heads"),
            ({"model": {"labels": ["a", "b"]}}, "labels"),
            ({"model": {"prior_tokens": 3.0}}, "prior_tokens"),
        ],
    )
    def test_configuration(
        self, run: Train, data: Path, changes: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(TrainingError, match=named) as caught:
            run(**changes)
        assert "config.toml" in str(caught.value)
        assert not (data.parent / "run").exists()

    @pytest.mark.parametrize("text", ["[model", "", "[training]", "[model]\n[extra]", "model = 3"])
    def test_no_configuration(self, data: Path, tmp_path: Path, text: str) -> None:
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
            (b'{"text": "a"}', "'label'"),
            (b'{"text": "a", "label": null}', "'label'"),
            (b'{"text": "a", "label": true}', "'label'"),
            (b'{"text": "\xff", "label": "sea"}', "not UTF-8"),
            (b'{"text": "\\ud800", "label": "sea"}', "not Unicode"),
        ],
    )
    @pytest.mark.parametrize("split", ["train", "valid"])
    def test_a_line_is_named(
        self, run: Train, data: Path, line: bytes, problem: str, split: str
    ) -> None:
        file = data / f"{split}.jsonl"
        lines = file.read_bytes().splitlines()
        file.write_bytes(b"\n".join([*lines[:2], b"", line, *lines[2:]]))
        with pytest.raises(CorpusError, match=problem) as caught:
            run()
        assert f"{split}.jsonl, line 4:" in str(caught.value)

    def test_a_label_that_only_valid_has(self, run: Train, data: Path) -> None:
        write(data / "valid.jsonl", [*documents(1, 1), {"text": "a", "label": "moon"}])
        with pytest.raises(CorpusError, match=r"valid\.jsonl, line 4: label 'moon'"):
            run()

    def test_one_label(self, run: Train, data: Path) -> None:
        write(data / "train.jsonl", documents(0, 1)[:1])
        with pytest.raises(TrainingError, match="no label but 'sea'"):
            run()

    @pytest.mark.parametrize("split", ["train", "valid"])
    def test_no_documents(self, run: Train, data: Path, split: str) -> None:
        (data / f"{split}.jsonl").write_text("\n\n")
        with pytest.raises(CorpusError, match=f"{split} split has no documents"):
            run()
        (data / f"{split}.jsonl").unlink()
        with pytest.raises(CorpusError, match=rf"no {split}\*\.jsonl"):
            run()

    def test_what_is_not_compressed(self, run: Train, data: Path) -> None:
        (data / "train.jsonl").rename(data / "train.jsonl.zst")
        with pytest.raises(CorpusError, match=r"train\.jsonl\.zst"):
            run()


class TestEvaluate:
    @pytest.fixture
    def checkpoint(self) -> Checkpoint:
        tokenizer = Tokenizer.train(iter([" ".join(COMMON)]), vocab_size=300)
        classifier = small(vocab_size=tokenizer.vocab_size)
        return Checkpoint(classifier.config, classifier, tokenizer, fingerprint="")

    def test_prefixes_are_bytes(self, tmp_path: Path) -> None:
        """A z outweighs all else; each text has one right behind the prefix it is made for."""
        tokenizer = Tokenizer.train(iter(["a"]), vocab_size=256)
        classifier = small(vocab_size=256)
        own = classifier.pooling.token.weight.zero_()
        own[:, 0] = 100.0
        own[tokenizer.encode("z"), 1] = 1e9
        # The first cut goes through an é.
        texts = [
            "a" + "é" * 511 + "éz",
            "é" * 2048 + "z",
            "a" * 16384 + "z",
            "é" * 32768 + "z",
            "z",
        ]
        write(tmp_path / "test.jsonl", [{"text": text, "label": "a"} for text in texts])
        checkpoint = Checkpoint(classifier.config, classifier, tokenizer, fingerprint="")
        measured = evaluate(checkpoint, tmp_path, "test")
        views = [(view.prefix, view.accuracy) for view in measured.views]
        # So loud that the prior changes nothing.
        assert all(view.confidence == pytest.approx(1.0) for view in measured.views)
        sizes = (1 << 10, 4 << 10, 16 << 10, 64 << 10, None)
        assert views == list(zip(sizes, (0.8, 0.6, 0.4, 0.2, 0.0), strict=True))

    def test_table_has_all_prefixes_and_the_components_in_use(
        self, checkpoint: Checkpoint, tmp_path: Path
    ) -> None:
        write(tmp_path / "test.jsonl.zst", [{"text": "it was", "label": "a"}])
        measured = evaluate(checkpoint, tmp_path, "test")
        rows = measured.table().splitlines()
        names = [row.split("|")[1].strip() for row in rows if row.startswith("| ")][1:]
        assert names == ["1 KB", "4 KB", "16 KB", "64 KB", "whole"]
        assert "in use, of 4 a head" in rows[-1]
        assert measured.components.shape == (2, 2)
        assert ((measured.components >= 1) & (measured.components <= 4)).all()
        assert json.loads(json.dumps(measured.as_dict()))["documents"] == 1

    def test_a_label_that_the_model_lacks(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        write(tmp_path / "test.jsonl", [{"text": "a", "label": "moon"}])
        with pytest.raises(CorpusError, match=r"test\.jsonl, line 1: .*'moon'"):
            evaluate(checkpoint, tmp_path, "test")


def test_macro_f1() -> None:
    actual, predicted = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 3])
    # 0: precision 1, recall 1/2; 1: precision 1/2, recall 1; 2 never found, 3 only predicted.
    assert macro_f1(predicted, actual) == pytest.approx((2 / 3 + 2 / 3 + 0 + 0) / 4)


def test_components_in_use() -> None:
    even, one = torch.full((4,), 5.0), torch.tensor([9.0, 0.0, 0.0, 0.0])
    mass = torch.stack([even, one])[None, None]  # one document, one layer, two heads
    np.testing.assert_allclose(components_in_use(mass), [[4.0, 1.0]], rtol=1e-6)


class TestStacking:
    @pytest.fixture
    def valid(self) -> Corpus:
        tokenizer = Tokenizer.train(iter(["a"]), vocab_size=256)
        texts = [("aaaa", "a"), ("bb", "b"), ("c" * 700, "c"), ("ab", "a")]
        lines = (LabelledText(text, label, "") for text, label in texts)
        return Corpus.encode(lines, tokenizer, ("a", "b", "c"))

    def test_perfect_scores_stay_bounded(self, valid: Corpus) -> None:
        """Every document told apart: the larger the factor, the better, without end."""
        classifier = small(vocab_size=256)
        classifier.pooling.deep.weight.zero_()
        classifier.pooling.deep.bias.zero_()
        byte = {chr(i): int(t) for i, t in enumerate(self.ids())}
        own = classifier.pooling.token.weight
        own.zero_()
        for label, character in enumerate("abc"):
            own[byte[character], label] = 1.0
        own[byte["b"], 1] = 0.5  # "ab" is an a
        stacked = stacking.fit(classifier, valid)
        assert stacked.deep == pytest.approx(1.0)
        assert 2.0 < stacked.token < 10.0
        assert stacked.prior_tokens < 10.0

    @staticmethod
    def ids() -> np.ndarray:
        return Tokenizer.train(iter(["a"]), vocab_size=256).encode(bytes(range(128)))

    def test_noise_is_quietened(self, valid: Corpus) -> None:
        classifier = small(vocab_size=256)
        classifier.pooling.token.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(50)
        stacked = stacking.fit(classifier, valid)
        assert 0.01 <= stacked.token < 0.5
        assert 0.01 <= stacked.deep <= 100.0

    @pytest.mark.parametrize("scale", [torch.nan, torch.inf])
    def test_what_is_not_finite_is_left_alone(self, valid: Corpus, scale: float) -> None:
        classifier = small(vocab_size=256)
        classifier.pooling.token.weight.mul_(scale)
        assert stacking.fit(classifier, valid) == stacking.Stacking(1.0, 1.0, 0.0)

    def test_what_is_absurdly_loud_is_quietened_as_far_as_may_be(self, valid: Corpus) -> None:
        classifier = small(vocab_size=256)
        classifier.pooling.token.weight.mul_(1e30)
        stacked = stacking.fit(classifier, valid)
        assert 0.01 <= stacked.deep <= 100.0
        assert 0.01 <= stacked.token <= 1.0

    def test_few_tokens_are_no_surer_than_they_are_right(self) -> None:
        """One token in ten is of its document's label: short views mislead."""
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 3, 60)
        told = rng.random((60, 512)) < 0.1
        tokens = np.where(told, labels[:, None], rng.integers(0, 3, told.shape))
        ends = np.arange(1, 61) * 512
        valid = Corpus(tokens.ravel().astype(np.uint16), ends, labels)
        classifier = small(vocab_size=3)
        classifier.pooling.deep.weight.zero_()
        classifier.pooling.deep.bias.zero_()
        classifier.pooling.token.weight.copy_(1000 * torch.eye(3))
        stacked = stacking.fit(classifier, valid)
        stacking.apply(classifier, stacked)
        assert classifier.config.prior_tokens == stacked.prior_tokens > 10
        for length in 4, 64, 512:
            views = [torch.from_numpy(row[:length]) for row in tokens]
            logits = torch.stack([reading.logits for reading in classifier.read(views)])
            sure = logits.softmax(1).max(1).values.mean().item()
            right = float(np.mean(logits.argmax(1).numpy() == labels))
            assert abs(sure - right) < 0.15, (length, sure, right)
