"""Several processes train what one does with the same crops."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gma.model import weights
from gma.model.training.pretrain import pretrain
from gma.model.training.pretraining import Pretraining
from tests.model.training.documents import configuration, documents, log_of, write

BASE = """
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
steps = 4
tokens_per_step = 512
lengths = [[0.0, 64]]
evaluate_every = 2
"""


def in_two_processes(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = folder / "command.py"
    command.write_text("from gma.service.cli.main import main\nmain()\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2"]
    return subprocess.run(
        [*torchrun, str(command), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_make_the_base_that_one_makes_of_both_s_crops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data/train.jsonl", documents(0, 6))
    config = tmp_path / "base.toml"
    config.write_text(BASE)
    ran = in_two_processes(
        tmp_path,
        *("pretrain", "--data", tmp_path / "data", "--out", tmp_path / "two", "--config", config),
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(tmp_path / "two/checkpoint")]
    assert ran.stderr.count("On valid") == 1

    alone = Pretraining.losses_at

    def of_both(
        run: Pretraining, rng: np.random.Generator, rows: int, length: int
    ) -> tuple[Tensor, Tensor]:
        parts = []
        for rank in range(2):
            seeds = np.random.SeedSequence([run.config.seed, run.step, rank])
            parts.append(alone(run, np.random.default_rng(seeds), rows // 2, length))
        (first, read), (second, more) = parts
        return (first + second) / 2, read + more

    monkeypatch.setattr(Pretraining, "losses_at", of_both)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    one = pretrain(tmp_path / "data", tmp_path / "one", config)
    expected, found = (load_file(tmp_path / name / "resume.safetensors") for name in ("one", "two"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    steps, losses = zip(
        *((line["step"], line["language_loss"]) for line in log_of(one) if "length" in line),
        strict=True,
    )
    of_two = [line for line in log_of(tmp_path / "two/checkpoint") if "length" in line]
    assert [line["step"] for line in of_two] == [*steps]
    assert [line["language_loss"] for line in of_two] == pytest.approx([*losses], rel=1e-4)


@pytest.mark.long
def test_two_processes_make_a_classifier_and_one_log(tmp_path: Path) -> None:
    write(tmp_path / "data/train.jsonl", documents(0, 4))
    write(tmp_path / "data/valid.jsonl", documents(1, 2))
    config = configuration(tmp_path / "c.toml")
    ran = in_two_processes(
        tmp_path,
        *("train", "--data", tmp_path / "data", "--out", tmp_path / "two", "--config", config),
    )
    assert ran.returncode == 0, ran.stderr
    checkpoint = Path(ran.stdout.strip())
    assert weights.load(checkpoint).config.labels == ("court", "farm", "sea")
    lines = log_of(checkpoint)
    assert [line["step"] for line in lines if "valid" in line] == [4, 8]
    assert sum("baseline" in line for line in lines) == 1
