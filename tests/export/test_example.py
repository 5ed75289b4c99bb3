"""The example that the documentation gives, run as a reader would run it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gma.export.artifact import Artifact, export
from gma.model.config import DEFAULT_CHECKPOINT
from gma.model.weights import load
from gma.service.cli import main as cli
from tests.service.answers import said
from tests.service.asgi import LABELS, TEXT
from tests.service.deciding import deciding

ROOT = Path(__file__).parents[2]
AGREEMENT = ROOT / "docs" / "examples" / "agreement.txt"
SCRIPT = ROOT / "docs" / "examples" / "classify.py"


@pytest.fixture(scope="module")
def contracts(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(DEFAULT_CHECKPOINT, tmp_path_factory.mktemp("contracts") / "model")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the weights that every tiny checkpoint has."""
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint = deciding(folder / "checkpoint", ("bob",), multi_label=True)
    artifact = export(checkpoint, folder / "exported", chunk=16)
    assert artifact.config == load(checkpoint).config
    return artifact.folder


def classify(*arguments: object) -> dict[str, object]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/").stdout
    answer: dict[str, object] = json.loads(out)
    return answer


def expected(
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *options: object,
) -> dict[str, object]:
    """Ask `gma classify`."""
    command = ["gma", "classify", "--json", "--device", "cpu", *map(str, options), str(file)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        cli.main()
    answer = json.loads(capsys.readouterr().out)
    scores = {each["label"]: pytest.approx(each["score"], abs=1e-5) for each in answer["scores"]}
    return {**said(answer), "scores": scores}


@pytest.fixture(scope="module")
def answer(contracts: Artifact) -> dict[str, object]:
    return classify(contracts.folder, AGREEMENT)


def test_answers_as_gma_classify(
    answer: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert answer == expected(AGREEMENT, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("multi_label", "there"), [(True, ()), (True, ("ann", "cyd")), (False, ()), (False, LABELS)]
)
def test_says_which_labels_are_there(
    multi_label: bool,
    there: tuple[str, ...],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = deciding(tmp_path / "tiny", there, multi_label=multi_label)
    manifest = json.loads((tiny / "manifest.json").read_text())
    manifest["config"] = json.loads((checkpoint / "config.json").read_text())
    (tiny / "manifest.json").write_text(json.dumps(manifest))
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    options = ("--checkpoint", checkpoint)
    assert classify(tiny, text) == expected(text, monkeypatch, capsys, *options)


def test_answers_the_same_with_the_library(
    answer: dict[str, object], contracts: Artifact, library: Path
) -> None:
    with_kernels = classify(contracts.folder, AGREEMENT, library)
    assert with_kernels["labels"] == answer["labels"]
    assert with_kernels["scores"] == pytest.approx(answer["scores"], abs=1e-5)


def test_is_short_and_needs_little() -> None:
    source = SCRIPT.read_text()
    assert len(source.splitlines()) <= 35
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert names == {"json", "sys", "numpy", "onnxruntime", "tokenizers"}
