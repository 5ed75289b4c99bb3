"""The exported folder: how it is written, and what is refused before ONNX Runtime sees it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from gma.export import artifact as artifacts
from gma.export.artifact import Artifact, ArtifactError, export
from gma.export.operators import DOMAIN
from gma.model import weights
from gma.model.tokenizer import Tokenizer
from tests.export.conftest import CHUNK, Exported, checkpoint_of


@pytest.fixture
def folder(exported: Exported, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(exported("float32").folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def apart(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With weights in a file of their own."""
    out = tmp_path_factory.mktemp("apart") / "model"
    return export(checkpoint, out, chunk=CHUNK, inline=0).folder


def resign(folder: Path, **changes: object) -> None:
    """What anybody can do: a manifest that names the files as they are."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in manifest["files"]:
        if (folder / name).is_file():
            manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    file.write_text(json.dumps(manifest | changes))


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


def test_the_same_checkpoint_gives_the_same_files(
    exported: Exported, checkpoint: Path, tmp_path: Path
) -> None:
    again = export(checkpoint, tmp_path / "again", chunk=CHUNK)
    assert again.manifest == exported("float32").manifest


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
        pair = [_weight(model, f"layers.{index}.{part}").raw_data for index in (0, 1)]
        assert pair[0] == pair[1]


def test_large_weights_get_a_file_of_their_own(apart: Path) -> None:
    artifact = Artifact.open(apart)
    assert (artifact.folder / "model.onnx.data").stat().st_size > artifact.model.stat().st_size / 4
    onnx.checker.check_model(artifact.model)


def test_nothing_is_written_over(folder: Path, checkpoint: Path) -> None:
    with pytest.raises(ArtifactError, match="never written over"):
        export(checkpoint, folder)


def test_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint_of(tmp_path / "checkpoint", layers=1)
    out = tmp_path / "exported" / "model"

    def full(file: Path) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts, "_sha256", full)
    with pytest.raises(OSError, match="No space"):
        export(source, out, chunk=CHUNK)
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


class TestRefusesFiles:
    @pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "tokenizer.json"])
    def test_that_are_missing(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(ArtifactError, match=f"no file {name}"):
            Artifact.open(folder)

    @pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "tokenizer.json"])
    def test_that_are_links(self, folder: Path, tmp_path: Path, name: str) -> None:
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(ArtifactError, match=f"no file {name} of its own"):
            Artifact.open(folder)

    @pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
    def test_that_were_changed(self, folder: Path, name: str) -> None:
        with (folder / name).open("ab") as file:
            file.write(b" ")
        with pytest.raises(ArtifactError, match="is not the file that"):
            Artifact.open(folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format_version": 2}, "format_version"),
            ({"unknown": 1}, "unknown"),
            ({"precision": "float8"}, "precision"),
            ({"chunk": 0}, "chunk"),
            ({"chunk": 2**40}, "chunk"),
            ({"files": {"../model.onnx": "0" * 64}}, "files"),
            ({"files": {}}, "names no model.onnx"),
            ({"checkpoint": "?"}, "checkpoint"),
        ],
        ids=str,
    )
    def test_a_manifest_that_is_malformed(
        self, folder: Path, changes: dict[str, object], message: str
    ) -> None:
        manifest = json.loads((folder / "manifest.json").read_text()) | changes
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ArtifactError, match=message):
            Artifact.open(folder)

    def test_a_manifest_of_another_model(self, folder: Path) -> None:
        config = Artifact.open(folder).config.model_dump(mode="json")
        for changes in ({"layers": 3}, {"labels": ["a", "b"]}, {"width": 17}):
            resign(folder, config=config | changes)
            with pytest.raises(ArtifactError, match=r"model\.onnx: its input"):
                Artifact.open(folder)

    def test_a_manifest_of_absurd_sizes(self, folder: Path) -> None:
        config = Artifact.open(folder).config.model_dump(mode="json")
        resign(folder, config=config | {"value_dim": 2**50})
        with pytest.raises(ArtifactError, match="state would take"):
            Artifact.open(folder)

    def test_a_model_that_is_none(self, folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"\xff" * 100)
        resign(folder)
        with pytest.raises(ArtifactError, match="not an ONNX model"):
            Artifact.open(folder)

    def test_a_tokenizer_of_another_size(self, folder: Path) -> None:
        Tokenizer.train(iter(["other"]), vocab_size=257).save(folder / "tokenizer.json")
        resign(folder)
        with pytest.raises(ArtifactError, match="tokens"):
            Artifact.open(folder)


def _weight(model: ModelProto, name: str) -> TensorProto:
    (tensor,) = (x for x in model.graph.initializer if x.name == name)
    assert isinstance(tensor, TensorProto)
    return tensor


def _elsewhere(location: str, **entries: str) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        tensor = _weight(model, "embedding")
        length = str(len(tensor.raw_data))
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (
            {"location": location, "offset": "0", "length": length} | entries
        ).items():
            tensor.external_data.add(key=key, value=value)

    return change


def _absurd(model: ModelProto) -> None:
    tensor = _weight(model, "embedding")
    tensor.ClearField("raw_data")
    del tensor.dims[:]
    tensor.dims.extend([2**40, 2**20])


def _cut(model: ModelProto) -> None:
    tensor = _weight(model, "embedding")
    tensor.raw_data = tensor.raw_data[:-1]


def _more_weights(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(10**4, np.float32), "more"))


def _without_a_weight(model: ModelProto) -> None:
    _weight(model, "embedding").name = "renamed"


def _domain(model: ModelProto) -> None:
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def _operator(model: ModelProto) -> None:
    model.graph.node[0].op_type = "Loop"


def _own_operator(model: ModelProto) -> None:
    model.graph.node[0].domain, model.graph.node[0].op_type = DOMAIN, "Other"


def _body(model: ModelProto) -> None:
    model.functions[0].node[0].op_type = "ConstantOfShape"


def _function(model: ModelProto) -> None:
    model.functions.add(domain="", name="Add")


def _range(model: ModelProto) -> None:
    node = next(x for x in model.graph.node if x.op_type == "Range")
    model.graph.initializer.append(numpy_helper.from_array(np.array(2**60), "limit"))
    node.input[1] = "limit"


def _constant(model: ModelProto) -> None:
    node = helper.make_node("MatMul", ["embedding", "embedding"], ["large"])
    model.graph.node.insert(0, node)


def _tensor_attribute(model: ModelProto) -> None:
    value = numpy_helper.from_array(np.zeros(3, np.float32))
    model.graph.node[0].attribute.append(helper.make_attribute("value", value))


def _input(model: ModelProto) -> None:
    model.graph.input.pop()


def _shape(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2**50


def _output(model: ModelProto) -> None:
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def _opset(model: ModelProto) -> None:
    model.opset_import[0].version = 23


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_elsewhere("/etc/passwd"), "outside the folder"),
        (_elsewhere("../model.onnx.data"), "outside the folder"),
        (_elsewhere("model.onnx.data"), "outside the folder"),  # which the manifest doesn't name
        (_absurd, r"embedding is float \(1099511627776, 1048576\)"),
        (_cut, "embedding has .* bytes"),
        (_more_weights, "unknown weight more"),
        (_without_a_weight, "no weight embedding"),
        (_domain, r"unknown operator com\.example"),
        (_operator, "unknown operator Loop"),
        (_own_operator, r"unknown operator ai\.gma\.Other"),
        (_body, "definition of .* is not this version's"),
        (_function, "defines an operator Add"),
        (_range, "Range"),
        (_constant, "reads nothing of the step"),
        (_tensor_attribute, "attribute"),
        (_input, "its inputs are"),
        (_shape, "its input tokens is"),
        (_output, "its output row_evidence is"),
        (_opset, "it has the operators"),
    ],
)
def test_refuses_a_model_that_is_another(
    folder: Path, change: Callable[[ModelProto], None], message: str
) -> None:
    model = onnx.load(folder / "model.onnx")
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    resign(folder)
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"length": "99999999"}, "bytes at"),
        ({"length": "-1"}, "bytes at"),
        ({"offset": "99999999"}, "beyond the end"),
        ({"location": "/dev/zero"}, "outside the folder"),
        ({"location": "link"}, "outside the folder"),
    ],
    ids=str,
)
def test_refuses_weights_elsewhere(
    apart: Path, tmp_path: Path, entries: dict[str, str], message: str
) -> None:
    folder = Path(shutil.copytree(apart, tmp_path / "model"))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for entry in _weight(model, "embedding").external_data:
        entry.value = entries.get(entry.key, entry.value)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    resign(folder)
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(folder)
