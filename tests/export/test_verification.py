"""Exported models against their checkpoints in float64, as `gma export` verifies them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from gma.export import verification
from gma.export.artifact import Artifact, export
from gma.export.precision import PRECISIONS, Precision
from gma.export.verification import TOLERANCES, Check, Model, verify
from gma.model import weights
from gma.model.state import State
from gma.service.cli import main as cli
from tests.export.conftest import CHUNK, Exported, checkpoint_of
from tests.matrix import some
from tests.model.small import ANY


@pytest.mark.parametrize("precision", some(PRECISIONS, always=["float32", "int8"]))
def test_every_precision_answers_as_the_checkpoint(
    precision: Precision, checkpoint: Path, exported: Exported, library: Path
) -> None:
    source = weights.load(checkpoint, dtype=torch.float64)
    checks = list(verify(exported(precision), source, library))
    assert [check.operators for check in checks] == ["bodies"] * 6 + ["library"] * 6
    assert [check for check in checks if not check.holds] == []


@pytest.mark.parametrize("precision", some(PRECISIONS, always=["float32"]))
def test_a_model_that_forgets_answers_as_the_checkpoint(
    precision: Precision, forgetting: Path, library: Path, tmp_path: Path
) -> None:
    made = export(forgetting, tmp_path / "model", precision=precision, chunk=CHUNK)
    checks = list(verify(made, weights.load(forgetting, dtype=torch.float64), library))
    assert [check for check in checks if not check.holds] == []
    _check_usage(Model(made), Model(made, library))


def _check_usage(*models: Model) -> None:
    """Each layer's heads tell of every token, and cuts change nothing of the sums."""
    rng = np.random.default_rng(0)
    states = {name: x.numpy() for name, x in State.zeros(models[0].config, 1).tensors()}
    tokens = rng.integers(0, models[0].config.vocab_size, 2 * CHUNK)
    whole = [(0, tokens[:CHUNK]), (0, tokens[CHUNK:])]
    found = [model.step(whole, np.array([True]), states)["usage"] for model in models]
    np.testing.assert_allclose(found[0].sum(-1)[:2], CHUNK, rtol=1e-5)
    assert not found[0][2].any(), "a row that is not used"
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"form": "forgetting", "layers": 2, "heads": 1, "conv_kernel": 0},
        {"conv_kernel": 0, "layers": 1, "normalize_routing": False, "prior_tokens": 0.0},
        {"layers": 1, **ANY},
        {"conv_kernel": 2, "layers": 1, "heads": 1, "num_components": 1, "labels": ("a", "b")},
    ],
    ids=str,
)
def test_every_architecture_is_exported(changes: dict[str, object], tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "checkpoint", **changes)
    made = export(source, tmp_path / "out", chunk=8)
    checks = list(verify(made, weights.load(source, dtype=torch.float64)))
    assert [check for check in checks if not check.holds] == []


def test_rates_that_are_small_add_up(tmp_path: Path) -> None:
    """1e-5 a token and 1e-8: most of the one and all of the other is lost beside 1 in float32."""
    source = checkpoint_of(tmp_path / "checkpoint", layers=1, **ANY)
    loaded = weights.load(source)
    quiet = torch.tensor([-11.0, -18.0, -60.0])
    loaded.classifier.pooling.deep.weight.zero_()
    loaded.classifier.pooling.token.weight.zero_()
    loaded.classifier.pooling.deep.bias.copy_(quiet)
    weights.save(source, loaded.classifier, loaded.tokenizer, card="", dtype=torch.float32)
    made = export(source, tmp_path / "out", chunk=64)
    tokens = np.zeros(64, np.int64)
    states = {
        name: x.float().numpy() if name not in ("evidence", "weight") else x.numpy()
        for name, x in loaded.classifier.new_states(1).tensors()
    }
    found = Model(made).step([(0, tokens)], np.array([True]), states)
    expected = 64 * quiet.double().exp().log1p() * loaded.classifier.pooling.factor
    np.testing.assert_allclose(found["row_evidence"][0], expected, 2e-6)
    logits = torch.log(torch.expm1(expected))
    np.testing.assert_allclose(found["logits"][0], logits, 2e-6)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_an_answer_does_not_depend_on_the_documents_beside_it(
    precision: Precision, checkpoint: Path, exported: Exported
) -> None:
    model, config = Model(exported(precision)), exported(precision).config
    rng = np.random.default_rng(0)
    mine, other = rng.integers(0, config.vocab_size, (2, 16))
    states = {
        name: np.zeros([2, *x.shape[1:]], np.dtype(str(x.dtype).removeprefix("torch.")))
        for name, x in weights.load(checkpoint).classifier.new_states(1).tensors()
    }
    fresh = np.array([True, True])
    alone = model.step([(0, mine)], fresh, states)
    beside = model.step([(0, mine), (1, other)], fresh, states)
    np.testing.assert_allclose(beside["logits"][0], alone["logits"][0], rtol=1e-5, atol=1e-7)


def test_a_model_that_is_off_is_told(checkpoint: Path, exported: Exported, folder: Path) -> None:
    changed = replace(exported("float32"), folder=folder)
    model = onnx.load(changed.model)
    (bias,) = (x for x in model.graph.initializer if x.name == "deep_bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * 1.01, bias.name))
    onnx.save(model, changed.model)
    check = next(verify(changed, weights.load(checkpoint, dtype=torch.float64)))
    assert not check.holds


def test_another_checkpoint_is_told(exported: Exported, tmp_path: Path) -> None:
    other = checkpoint_of(tmp_path / "other", prior_tokens=1.0)
    with pytest.raises(ValueError, match="another checkpoint"):
        next(verify(exported("float32"), weights.load(other, dtype=torch.float64)))


class TestCommand:
    def run(self, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["gma", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        return int(exited.value.code or 0)

    def test_exports_and_verifies(
        self,
        checkpoint: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out = tmp_path / "out"
        assert self.run(monkeypatch, checkpoint, "--out", out, "--chunk", 16) == 0
        told = capsys.readouterr().out
        assert "16 tokens a step" in told
        assert "verified" in told
        assert "OFF" not in told
        assert Artifact.open(out).manifest.chunk == 16

    def test_leaves_nothing_when_a_check_is_off(
        self,
        checkpoint: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        off = Check("bodies", "new", "row by row", 1.0, 0.0, TOLERANCES["float32"])
        monkeypatch.setattr(verification, "verify", lambda *_: iter([off]))
        out = tmp_path / "off"
        assert self.run(monkeypatch, checkpoint, "--out", out) == 1
        assert not out.exists()
        told = capsys.readouterr()
        assert "OFF" in told.out
        assert "checks are off" in told.err

    def test_refuses_a_bidirectional_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = checkpoint_of(tmp_path / "checkpoint", causal=False)
        assert self.run(monkeypatch, source, "--out", tmp_path / "out") == 1
        assert "bidirectional model has no step" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
