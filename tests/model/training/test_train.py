"""Training, from labelled documents to a checkpoint, on very little."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gma.model import weights
from gma.model.classifier import Classifier
from gma.model.layers import Layer
from gma.model.training.errors import TrainingError
from gma.model.training.evaluation import evaluate, measure_tokens
from gma.model.training.train import train
from tests.model.training.documents import (
    Train,
    configuration,
    documents,
    evaluations,
    interrupted,
    log_of,
    write,
)


class TestTraining:
    def test_learns_and_leaves_a_checkpoint_and_a_log(self, run: Train, data: Path) -> None:
        checkpoint = weights.load(run())
        assert checkpoint.config.labels == ("court", "farm", "sea")
        measured = evaluate(checkpoint, data, "valid")
        assert [view.figures["accuracy"] for view in measured.views] == [1.0] * 5

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
        assert evaluate(checkpoint, data, "valid").views[-1].figures["accuracy"] == 1.0

    def test_bidirectional(self, run: Train, data: Path) -> None:
        checkpoint = weights.load(run(model={"causal": False}))
        assert not checkpoint.config.causal
        assert evaluate(checkpoint, data, "valid").views[-1].figures["accuracy"] == 1.0

    def test_the_paper_s_form(self, run: Train, data: Path) -> None:
        assert weights.load(run("forgetting")).config.form == "forgetting"
        checkpoint = weights.load(run(model={"form": "paper"}))
        assert (checkpoint.config.form, checkpoint.config.format_version) == ("paper", 2)
        assert evaluate(checkpoint, data, "valid").views[-1].figures["accuracy"] == 1.0

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
            for layer in classifier.layers:
                assert isinstance(layer, Layer)
                used.add(layer.mixer.operation.name)
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
        assert torch.get_float32_matmul_precision() == "highest"
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
        write(data / "valid.jsonl", [{"text": "z", "label": "x"}])
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
    def test_ends_where_an_uninterrupted_run_does(self, run: Train) -> None:
        whole = run("whole", steps=12)
        with interrupted():
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

    def test_another_configuration_is_refused_by_its_fields(self, run: Train) -> None:
        run()
        changes: list[tuple[dict[str, Any], str]] = [
            ({"steps": 9}, "training.steps was 8, not 9"),
            ({"model": {"width": 32}}, "model.width was 16, not 32"),
            ({"lengths": [[0.0, 96]]}, "training.lengths was [[0.0, 64], [0.5, 128]], not"),
        ]
        for changed, named in changes:
            with pytest.raises(TrainingError, match="another configuration: ") as caught:
                run(resume=True, **changed)
            assert named in str(caught.value)
            assert ";" not in str(caught.value)


class TestChoice:
    """Which weights are kept: valid's best by one figure or the other."""

    @pytest.mark.parametrize(("choose_by", "step"), [("accuracy", 4), ("macro_f1", 2)])
    def test_of_the_best_checkpoint(
        self, run: Train, monkeypatch: pytest.MonkeyPatch, choose_by: str, step: int
    ) -> None:
        figures = iter([(0.8, 0.9), (0.99, 0.5), (0.98, 0.6)])

        def figured(*arguments: Any) -> Any:
            measured = measure_tokens(*arguments)
            accuracy, f1 = next(figures)
            found = {"accuracy": accuracy, "macro_f1": f1}
            views = [replace(view, figures=found) for view in measured.views]
            return replace(measured, views=tuple(views))

        monkeypatch.setattr("gma.model.training.run.measure_tokens", figured)
        lines = evaluations(run(choose_by=choose_by, steps=6, evaluate_every=2))
        assert [line["step"] for line in lines if line["kept"]][-1] == step
