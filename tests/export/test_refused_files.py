"""What is refused of an exported folder's files, its manifest and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gma.export.artifact import Artifact, ArtifactError
from gma.model.tokenizer import Tokenizer
from tests.export.folders import resign


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "tokenizer.json"])
def test_files_that_are_missing(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"no file {name}"):
        Artifact.open(folder)


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "tokenizer.json"])
def test_files_that_are_links(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(ArtifactError, match=f"no file {name} of its own"):
        Artifact.open(folder)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_files_that_were_changed(folder: Path, name: str) -> None:
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
    folder: Path, changes: dict[str, object], message: str
) -> None:
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(folder)


def test_a_manifest_of_another_model(folder: Path) -> None:
    config = Artifact.open(folder).config.model_dump(mode="json")
    for changes in ({"layers": 3}, {"labels": ["a", "b"]}, {"width": 17}):
        resign(folder, config=config | changes)
        with pytest.raises(ArtifactError, match=r"model\.onnx: its input"):
            Artifact.open(folder)


def test_a_manifest_of_absurd_sizes(folder: Path) -> None:
    config = Artifact.open(folder).config.model_dump(mode="json")
    resign(folder, config=config | {"value_dim": 2**50})
    with pytest.raises(ArtifactError, match="state would take"):
        Artifact.open(folder)


def test_a_model_that_is_none(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\xff" * 100)
    resign(folder)
    with pytest.raises(ArtifactError, match="not an ONNX model"):
        Artifact.open(folder)


def test_a_tokenizer_of_another_size(folder: Path) -> None:
    Tokenizer.train(iter(["other"]), vocab_size=257).save(folder / "tokenizer.json")
    resign(folder)
    with pytest.raises(ArtifactError, match="tokens"):
        Artifact.open(folder)
