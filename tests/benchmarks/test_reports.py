"""What the service's and the precisions' benchmarks make of measurements; no service is started."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import backends, engine, precision, sharing
from benchmarks import service as benchmark
from benchmarks.checkpoints import BOOKS
from benchmarks.clients import Answered, poisson_times, tokens_within
from benchmarks.processes import cpu_seconds
from gma.model.config import ModelConfig
from gma.model.tokenizer import Tokenizer
from tests.service.asgi import LABELS, save_checkpoint

CONFIG = ModelConfig.model_validate_json((BOOKS / "config.json").read_bytes())


def test_documents_count_for_the_part_that_lies_in_the_window() -> None:
    answers = [Answered(*x, {}) for x in ((0, 10, 100), (8, 12, 40), (20, 30, 7))]
    assert tokens_within(answers, 5, 10) == pytest.approx(50 + 20)


def test_arrivals_lie_in_their_time() -> None:
    times = poisson_times(3.0, 5.0, 100)
    assert times == sorted(times)
    assert len(times) == 100
    assert 3.0 <= times[0] < times[-1] <= 5.0


def test_short_texts_are_a_row_at_most() -> None:
    tokenizer = Tokenizer.load(BOOKS / "tokenizer.json")
    book = b"It was a dark and stormy night; the rain fell in torrents. " * 400
    for text in benchmark.short_texts([book], tokenizer, 5):
        assert 500 <= len(tokenizer.encode(text)) <= 512


def test_a_window_is_what_happened_between_two_readings() -> None:
    names = ("step_seconds_count", "step_seconds_sum", "step_grid_rows_total", "tokens_total")
    a, b = (
        benchmark.Reading(at, {f"gma_{n}": x for n, x in zip(names, given, strict=True)}, cpu)
        for at, given, cpu in (
            (10.0, (5.0, 1.0, 40.0, 0.0), {"Worker": 1.0}),
            (14.0, (15.0, 3.0, 120.0, 30_000.0), {"Worker": 7.0, "Gateway": 2.0}),
        )
    )
    found = benchmark.window(a, b, [Answered(8.0, 16.0, 800, {})], chunk=500)
    assert (found.seconds, found.tokens, found.steps) == (4.0, 400.0, 10.0)
    assert found.step_s == pytest.approx(0.2)
    assert found.fill == pytest.approx(0.75)
    assert found.cores == {"Worker": 1.5, "Gateway": 0.5}


def test_service_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = benchmark.Bare(64, 512, 0.010, "a GPU", "bfloat16")
    window = benchmark.Window(20.0, 60e6, 1800, 0.011, 0.97, {"Worker": 1.5, "idle": 0.0})
    results = benchmark.Results(bare, window, window, [0.02] * 9, [0.03] * 9, 508.0, {"queue": 3.0})
    benchmark.save(tmp_path, results, benchmark.table(results, 64))
    printed = capsys.readouterr().out
    assert "| HTTP, 64 books at once, 20 s | 3,000,000 tokens/s |" in printed
    assert "| HTTP / bare step | 0.916 |" in printed
    assert "| p99 in bare steps | 3.00 |" in printed
    assert "| of it queue, mean | 3.0 ms |" in printed
    assert "idle" not in printed
    saved = json.loads((tmp_path / "service.json").read_text())
    assert saved["ratio"] == pytest.approx(results.ratio)
    assert saved["load"]["fill"] == 0.97


def test_sharing_report() -> None:
    found = [
        sharing.Rate(model, case, rate * size)
        for model, size in (("a", 1000), ("b", 2000))
        for case, rate in ((sharing.ALONE, 2), (sharing.BESIDE, 2), (sharing.TOGETHER, 1))
    ]
    assert sharing.table(found).splitlines() == [
        "|  | a | b |",
        "| --- | --- | --- |",
        "| alone | 2,000 tokens/s (1.00) | 4,000 tokens/s (1.00) |",
        "| beside one that nobody asks for | 2,000 tokens/s (1.00) | 4,000 tokens/s (1.00) |",
        "| both at once | 1,000 tokens/s (0.50) | 2,000 tokens/s (0.50) |",
    ]


def test_cpu_time_of_this_process() -> None:
    assert sum(cpu_seconds(os.getpid()).values()) > 0


def test_precisions_are_compared_with_float32() -> None:
    exact, other = np.array([[0.9, 0.1], [0.4, 0.6]]), np.array([[0.8, 0.2], [0.55, 0.45]])
    config = CONFIG.model_copy(update={"labels": ("a", "b")})
    rows = precision.compared(
        {"float32": {None: exact}, "fp8": {None: other}}, np.eye(2, dtype=np.bool_), config
    )
    assert [row.precision for row in rows] == ["float32", "fp8"]
    assert (rows[0].figure, rows[0].agree, rows[0].difference) == (1.0, 2, 0.0)
    assert (rows[1].figure, rows[1].agree) == (0.5, 1)
    assert rows[1].difference == pytest.approx(0.15)
    assert "| whole | fp8 | 0.5000 | 1 of 2 | 0.15000 |" in precision.table(rows)


def test_speeds_of_precisions_are_told_against_float32() -> None:
    found = precision.speed_table({"float32": [100.0, 200.0, 50.0], "int8": [200.0, 500.0, 100.0]})
    assert "| float32 | 100 | 1.00 |" in found
    assert "| int8 | 200 | 2.00 |" in found


@pytest.fixture
def _all_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that is said to have what precisions need, and no time for turns."""
    monkeypatch.setattr(engine, "ROUND_S", 0)
    for name in ("_is_avx512_bf16_supported", "_is_vnni_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)


@pytest.mark.usefixtures("_all_instructions")
@pytest.mark.parametrize("multi_label", [False, True])
def test_precision_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], multi_label: bool
) -> None:
    checkpoint = save_checkpoint(tmp_path / "tiny", multi_label=multi_label)
    label = {"labels": LABELS[:1]} if multi_label else {"label": LABELS[0]}
    lines = [{"text": f"It was {word} night. ", **label} for word in ("a", "the")]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folders = ["--data", str(tmp_path), "--checkpoint", str(checkpoint), "--out", str(tmp_path)]
    precision.main([*folders, "--device", "cpu", "--rounds", "2", "--bytes", "1024"])
    printed = capsys.readouterr().out
    for name in ("float32", "bfloat16", "int8"):
        assert f"| 1 KB | {name} |" in printed
    assert ("micro-F1" in printed) == multi_label
    found = json.loads((tmp_path / "precision.json").read_text())
    assert [row["documents"] for row in found["rows"]] == [2] * 3
    assert list(found["tokens_per_second"]) == ["float32", "bfloat16", "int8"]


def test_precision_is_of_what_the_processor_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert precision.precisions(torch.device("cpu")) == ["float32"]
    assert "no int8: this processor has not the instructions AVX512-VNNI" in capsys.readouterr().err


def test_backends_are_compared() -> None:
    torch_, onnx = np.array([[0.9, 0.1], [0.4, 0.6]]), np.array([[0.8, 0.2], [0.55, 0.45]])
    found = backends.agreement({"torch": torch_, "onnx": onnx}, labels=[0, 1])
    assert (found.documents, found.labels, found.accuracy) == (2, 1, {"torch": 1.0, "onnx": 0.5})
    assert found.difference == pytest.approx(0.15)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles on a GPU")
def test_backends_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"text": f"It was {word} night. ", "label": LABELS[0]} for word in ("a", "the")]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    checkpoint = save_checkpoint(tmp_path / "tiny")
    options = ["--rows", "1", "--chunk", "16", "--rounds", "1", "--library", "none"]
    options += ["--checkpoint", str(checkpoint), "--threads", "1"]
    backends.main(["--data", str(tmp_path), "--out", str(tmp_path), *options])
    assert "function bodies, float32 |" in capsys.readouterr().out
    found = json.loads((tmp_path / "backends.json").read_text())
    assert found["agreement"]["labels"] == 2
    assert found["agreement"]["difference"] < 1e-5
    assert found["speed"]["ratio"] > 0
