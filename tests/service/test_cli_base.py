"""The commands that make a base and what it reads with, and what others say of a base."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gma.model.tokenizer import Tokenizer
from gma.service.cli.main import app

Gma = Callable[..., Result]

CONFIG = """
[model]
name = "base"
vocab_size = 300
width = 16
layers = 1
heads = 2
routing_dim = 4
value_dim = 8
num_components = 4
mlp_width = 16

[training]
steps = 2
tokens_per_step = 128
lengths = [[0.0, 64]]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    rng = random.Random(0)
    for number in range(12):
        file = folder / f"texts/{number}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(" ".join(rng.choices(["the", "ship", "of", "state", "at", "sea"], k=80)))
    (folder / "base.toml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def gma() -> Gma:
    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [*map(str, arguments)])

    return run


@pytest.fixture(scope="module")
def base(gma: Gma, folder: Path) -> Path:
    """A base with a tokenizer that was learned on its own."""
    mix = ["--data", f"{folder / 'texts'}=0.1", "--out", folder / "tokenizer.json"]
    learned = gma("tokenizer", *mix, "--vocab-size", 280)
    assert learned.stdout.strip() == str(folder / "tokenizer.json")
    made = gma(
        *("pretrain", "--data", folder / "texts", "--out", folder / "run"),
        *("--config", folder / "base.toml", "--tokenizer", folder / "tokenizer.json"),
    )
    assert made.stdout.strip() == str(folder / "run/checkpoint")
    return folder / "run/checkpoint"


def test_a_tokenizer_is_learned_from_as_much_as_is_said(base: Path, folder: Path) -> None:
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    assert 256 < tokenizer.vocab_size <= 280
    assert len(tokenizer.encode(" ship")) == 1
    assert (base / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("share", ["texts", "texts=", "texts=-1", "texts=nan", "=3"])
def test_a_share_that_is_none(gma: Gma, folder: Path, share: str) -> None:
    result = gma("tokenizer", "--data", share, "--out", folder / "t.json")
    assert result.exit_code == 2
    assert "is not DIR=MB" in result.stderr


def test_info_describes_a_base(gma: Gma, base: Path) -> None:
    told = gma("info", base, "--json").stdout
    assert '"name": "base"' in told
    assert "labels" not in told


@pytest.mark.parametrize("command", ["classify", "evaluate", "export", "serve"])
def test_nothing_else_takes_a_base(gma: Gma, base: Path, command: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a ship")
    arguments = {
        "classify": ["--checkpoint", base, tmp_path / "text.txt"],
        "evaluate": [base, "--data", tmp_path],
        "export": [base, "--out", tmp_path / "out"],
        "serve": ["--checkpoint", base],
    }
    result = gma(command, *arguments[command])
    assert result.exit_code == 1
    told = f"{result.exception} {result.stderr}"
    assert "a base without labels" in told
    assert "gma train --from" in told


def test_train_begins_from_it_without_a_configuration(
    gma: Gma, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def train(data: Path, out: Path, config: Path | None, **options: object) -> Path:
        assert (config, options["base"]) == (None, base)
        return out

    monkeypatch.setattr("gma.model.training.train.train", train)
    result = gma("train", "--data", tmp_path, "--out", tmp_path / "run", "--from", base)
    assert result.stdout.strip() == str(tmp_path / "run")
