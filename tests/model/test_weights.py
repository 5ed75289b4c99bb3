"""Checkpoints: what is written is what is read, and what is wrong with one is said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gma.model import weights
from gma.model.classifier import Classifier
from gma.model.config import DEFAULT_CHECKPOINT, ModelConfig
from gma.model.reader import Reader
from gma.model.reading import read
from gma.model.tokenizer import Tokenizer
from gma.model.weights import CheckpointError
from tests.model.small import small

TEXT = "the quick brown fox jumps over the lazy dog, the dog does not mind. " * 5
SHIPPED = DEFAULT_CHECKPOINT.parent
EXCERPTS = Path(__file__).parent.parent / "data" / "excerpts.jsonl"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter([TEXT]), vocab_size=280)


@pytest.fixture
def classifier(tokenizer: Tokenizer) -> Classifier:
    return small(vocab_size=tokenizer.vocab_size)


@pytest.fixture
def folder(tmp_path: Path, classifier: Classifier, tokenizer: Tokenizer) -> Path:
    weights.save(tmp_path, classifier, tokenizer, card="# small\n", dtype=torch.float32)
    return tmp_path


def test_round_trip(folder: Path, classifier: Classifier, tokenizer: Tokenizer) -> None:
    loaded = weights.load(folder)
    assert loaded.config == classifier.config
    assert not loaded.classifier.training
    assert not any(parameter.requires_grad for parameter in loaded.classifier.parameters())
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(loaded.classifier.state_dict()[name], tensor), name
    np.testing.assert_array_equal(loaded.tokenizer.encode(TEXT), tokenizer.encode(TEXT))
    assert (folder / "README.md").read_text() == "# small\n"
    tokens = torch.from_numpy(tokenizer.encode(TEXT))
    classifier.choose_mixers()
    before, after = read(classifier, [tokens])[0], read(loaded.classifier, [tokens])[0]
    assert torch.equal(before.logits, after.logits)


def test_loading_draws_nothing(folder: Path) -> None:
    """Neither the generator nor the compiler, which drawing on the meta device would import."""
    code = f"""
import sys, torch
from gma.model import weights
before = torch.get_rng_state()
weights.load({str(folder)!r})
print(bool(torch.equal(before, torch.get_rng_state())), "torch._dynamo" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "False"]


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(
    folder: Path,
    classifier: Classifier,
    tokenizer: Tokenizer,
    stored: torch.dtype,
    wanted: torch.dtype,
) -> None:
    weights.save(folder, classifier, tokenizer, card="", dtype=stored)
    loaded = weights.load(folder, dtype=wanted).classifier
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(stored).to(wanted)), name
    tokens = torch.from_numpy(tokenizer.encode(TEXT))
    assert read(loaded, [tokens])[0].logits.isfinite().all()


def test_what_a_dtype_is_too_narrow_for_is_stored_whole(
    folder: Path, classifier: Classifier, tokenizer: Tokenizer
) -> None:
    classifier.pooling.token.weight[0, 0] = 1e6
    weights.save(folder, classifier, tokenizer, card="")
    loaded = weights.load(folder).classifier
    assert torch.equal(loaded.pooling.token.weight, classifier.pooling.token.weight)
    stored = load_file(folder / "model.safetensors")
    wide = {name for name, x in stored.items() if x.dtype != torch.float16}
    assert wide == {"pooling.token.weight"}


def test_everybody_may_read_the_files(folder: Path) -> None:
    modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
    assert set(modes) == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}


def test_fingerprint_is_of_the_files(
    folder: Path, classifier: Classifier, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    first = weights.load(folder).fingerprint
    assert first == weights.load(folder).fingerprint
    with torch.no_grad():
        classifier.pooling.token.weight[0, 0] += 1
    weights.save(tmp_path / "other", classifier, tokenizer, card="", dtype=torch.float32)
    assert first != weights.load(tmp_path / "other").fingerprint


def assert_wrong(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        weights.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert_wrong(folder, "is not a checkpoint", file)


def test_no_folder_at_all(tmp_path: Path) -> None:
    assert_wrong(tmp_path / "nowhere", "nowhere is not a checkpoint")


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"colour": "red"}, "colour"),
        ({"format_version": 3}, "format_version"),
        ({"format_version": 1, "form": "forgetting"}, "format_version"),
        ({"form": "new"}, "form"),
        ({"heads": 0}, "heads"),
        ({"heads": "two"}, "heads"),
        ({"labels": ["a", "a"]}, "distinct"),
        ({"conv_kernel": 1}, "conv_kernel"),
    ],
)
def test_a_config_that_says_what_it_must_not(
    folder: Path, changes: dict[str, Any], named: str
) -> None:
    change_config(folder, **changes)
    assert_wrong(folder, "config.json", named)


def test_a_config_of_more_layers_than_fit_into_memory(folder: Path) -> None:
    change_config(folder, layers=10**9)
    assert_wrong(folder, "model.safetensors", "1000000000 layers")


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_config_that_is_no_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert_wrong(folder, "config.json")


def test_a_config_that_lacks_a_field(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["width"]
    (folder / "config.json").write_text(json.dumps(config))
    assert_wrong(folder, "config.json", "width")


def test_a_tokenizer_of_another_size(folder: Path, tokenizer: Tokenizer) -> None:
    change_config(folder, vocab_size=16384)
    assert_wrong(folder, "tokenizer.json", str(tokenizer.vocab_size), "16384")


def test_a_tokenizer_of_another_kind(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert_wrong(folder, "tokenizer.json")


NAME = "layers.1.mixer.mixture.mu"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda x: x.pop(NAME), [f"no tensor {NAME}"]),
        (lambda x: x.update(extra=torch.zeros(1)), ["unknown tensor extra"]),
        (lambda x: x.update({NAME: x[NAME][:1].clone()}), [NAME, "(1, 4, 4)", "(2, 4, 4)"]),
        (lambda x: x.update({NAME: x[NAME].int()}), [NAME, "int32"]),
        (lambda x: x.update({NAME: x[NAME].double()}), [NAME, "float64"]),
        (lambda x: x.update({NAME: x[NAME] / 0}), [NAME, "finite"]),
        (lambda x: x.update({NAME: x[NAME] * torch.nan}), [NAME, "finite"]),
        (lambda x: [x.pop(name) for name in list(x)[:9]], ["no tensor", "..."]),
    ],
    ids=["missing", "unknown", "shape", "integers", "doubles", "infinite", "nan", "many"],
)
def test_tensors_that_do_not_fit(
    folder: Path, change: Callable[[dict[str, Tensor]], object], parts: list[str]
) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    assert_wrong(folder, "model.safetensors", *parts)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert_wrong(folder, "model.safetensors")


@pytest.mark.parametrize("name", ["base", "books", "contracts"])
def test_checkpoints_that_come_with_the_package_are_small(name: str) -> None:
    files = [file for file in (SHIPPED / name).iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 20_000_000
    assert {"README.md", "training.toml"} <= {file.name for file in files}


class TestBooks:
    def test_knows_who_wrote_an_excerpt(self) -> None:
        checkpoint = weights.load(SHIPPED / "books")
        for line in EXCERPTS.read_text().splitlines():
            excerpt = json.loads(line)
            reader = Reader(checkpoint)
            spans = [*reader.feed(excerpt["text"].encode()), *reader.finish()]
            logits = np.sum([span.evidence for span in spans], axis=0)
            assert checkpoint.config.labels[int(logits.argmax())] == excerpt["label"]

    def test_has_components_in_use(self) -> None:
        """Responsibilities that collapsed would leave one."""
        checkpoint = weights.load(SHIPPED / "books")
        text = "".join(json.loads(line)["text"] for line in EXCERPTS.read_text().splitlines())
        reading = read(checkpoint.classifier, [torch.from_numpy(checkpoint.tokenizer.encode(text))])
        share = reading[0].usage / reading[0].usage.sum(-1, keepdim=True)
        used = (-(share * share.clamp_min(1e-12).log()).sum(-1)).exp()
        assert (used >= 4).all()


def test_labels_from_json_are_a_tuple() -> None:
    text = small().config.model_dump_json()
    assert ModelConfig.model_validate_json(text) == small().config
