"""The exported folder: what is written, and what is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from gma.export import trace
from gma.export.artifact import Artifact, ArtifactError, export
from gma.export.verification import Model
from gma.model import weights
from gma.model.state import State
from gma.model.tokenizer import Tokenizer
from tests.export.conftest import CHUNK, Exported, checkpoint_of
from tests.export.folders import weight_of

BEFORE = Path(__file__).parents[1] / "data" / "exported"
"""An exported model of the paper's form, as it was made when there was no other."""

ANSWER = [-0.6845991081661649, 0.05912410153283013, -0.08398264778984918]
"""What it answered then, of the document in the test."""


@pytest.mark.parametrize("kernels", ["bodies", "library"])
def test_what_was_exported_before_answers_as_it_did(
    kernels: str, request: pytest.FixtureRequest
) -> None:
    artifact = Artifact.open(BEFORE)
    assert artifact.config.form == "paper"
    library = request.getfixturevalue("library") if kernels == "library" else None
    model = Model(artifact, library)
    tokens = np.random.default_rng(0).integers(0, artifact.config.vocab_size, 40)
    states = {name: x.numpy() for name, x in State.zeros(artifact.config, 1).tensors()}
    found = {}
    for start in range(0, 40, 16):
        found = model.step([(0, tokens[start : start + 16])], np.array([start == 0]), states)
        states = {name: found[f"{name}_after"] for name in states}
    np.testing.assert_allclose(found["logits"][0], ANSWER, rtol=1e-5)


def test_tells_what_it_is(exported: Exported, checkpoint: Path) -> None:
    artifact = Artifact.open(exported("float32").folder)
    loaded = weights.load(checkpoint)
    assert artifact.config == loaded.config
    assert artifact.manifest.checkpoint == loaded.fingerprint
    assert artifact.manifest.precision == "float32"
    assert artifact.manifest.chunk == CHUNK
    assert artifact.tokenizer.vocab_size == loaded.tokenizer.vocab_size
    assert sorted(x.name for x in artifact.folder.iterdir()) == [
        "manifest.json",
        "model.onnx",
        "tokenizer.json",
    ]


def test_tells_nothing_of_its_making(exported: Exported) -> None:
    here = str(Path(__file__).parents[2]).encode()
    assert here not in exported("float32").model.read_bytes()


def test_the_same_checkpoint_gives_the_same_model(exported: Exported, apart: Path) -> None:
    """Wherever its weights lie."""
    again = onnx.load(apart / "model.onnx")
    for tensor in again.graph.initializer:
        tensor.ClearField("data_location")
    assert again.SerializeToString(deterministic=True) == exported("float32").model.read_bytes()


def test_weights_that_are_equal_stay_apart(tmp_path: Path) -> None:
    """As norms' are before any training."""
    checkpoint = checkpoint_of(tmp_path / "checkpoint", layers=2)
    loaded = weights.load(checkpoint)
    first, second = loaded.classifier.layers
    second.load_state_dict(first.state_dict())
    weights.save(
        checkpoint, loaded.classifier, loaded.tokenizer, card="# equal", dtype=torch.float32
    )
    model = onnx.load(export(checkpoint, tmp_path / "model", chunk=CHUNK).folder / "model.onnx")
    for part in ("scale", "taps"):
        pair = [weight_of(model, f"layers.{index}.{part}").raw_data for index in (0, 1)]
        assert pair[0] == pair[1]


def test_large_weights_get_a_file_of_their_own(apart: Path) -> None:
    artifact = Artifact.open(apart)
    assert (artifact.folder / "model.onnx.data").stat().st_size > artifact.model.stat().st_size / 4
    onnx.checker.check_model(artifact.model)


def test_nothing_is_written_over(folder: Path, checkpoint: Path) -> None:
    with pytest.raises(ArtifactError, match="never written over"):
        export(checkpoint, folder)


def test_is_written_whole_or_not_at_all(
    exported: Exported, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "exported" / "model"

    def full(tokenizer: Tokenizer, file: Path) -> None:
        assert (file.parent / "model.onnx").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trace, "trace", lambda *_: onnx.load(exported("float32").model))
    monkeypatch.setattr(Tokenizer, "save", full)
    with pytest.raises(OSError, match="No space"):
        export(checkpoint, out, chunk=CHUNK)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("chunk", [0, 2, 10**6])
def test_refuses_rows_of_a_size_that_has_no_step(
    chunk: int, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="a row must hold"):
        export(checkpoint, tmp_path / "model", chunk=chunk)


def test_refuses_a_precision_that_activations_may_exceed(tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "checkpoint")
    loaded = weights.load(source)
    loaded.classifier.layers[1].get_parameter("mlp.up.weight").mul_(1e5)
    weights.save(source, loaded.classifier, loaded.tokenizer, card="", dtype=torch.float32)
    with pytest.raises(ArtifactError, match="another precision than float16"):
        export(source, tmp_path / "model", precision="float16")
