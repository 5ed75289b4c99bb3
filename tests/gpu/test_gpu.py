"""On a CUDA device: every runner gives the float64 model's answer through the engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from gma.model import weights
from gma.model.classifier import Classifier
from gma.model.config import ModelConfig
from gma.service.runners.torch import TorchRunner
from gma.service.settings import Settings
from tests.service.asgi import save_checkpoint
from tests.service.conformance import Tested, check_all, check_bits, poison

if TYPE_CHECKING:
    from gma.export.precision import Precision
    from gma.model.fused.obstacles import FusedPrecision

pytestmark = pytest.mark.gpu

ROWS, CHUNK, SLOTS = 4, 128, 5
FP8_TOLERANCE = 0.1
"""A random model's scores nearly cancel in some documents: of 96, of four such models, one was off
by .08, half of them by less than .013."""
CONFIG = ModelConfig(
    name="tiny",
    labels=("a", "b", "c"),
    vocab_size=500,
    width=64,
    layers=3,
    heads=2,
    routing_dim=16,
    value_dim=32,
    num_components=16,
    mlp_width=128,
)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier(CONFIG).requires_grad_(False).eval()
    classifier.pooling.token.weight.normal_()
    return classifier.cuda()


def eager(classifier: Classifier) -> Tested:
    return TorchRunner(classifier, slots=SLOTS, rows=ROWS, chunk=CHUNK)


def compiled(classifier: Classifier) -> Tested:
    return TorchRunner(classifier, slots=SLOTS, rows=ROWS, chunk=CHUNK, compile=True)


def fused(classifier: Classifier, precision: FusedPrecision) -> Tested:
    from gma.service.runners.fused import FusedRunner

    return FusedRunner(classifier, slots=SLOTS, rows=ROWS, chunk=CHUNK, precision=precision)


@pytest.mark.parametrize(
    ("make", "kernels", "tolerance"),
    [
        (eager, "eager PyTorch, triton mixer", 1e-4),
        (compiled, "compiled PyTorch, triton mixer", 1e-4),
        (partial(fused, precision="float32"), "fused Triton kernels, CUDA graphs", 1e-4),
        (partial(fused, precision="bfloat16"), "fused Triton kernels, CUDA graphs", 1e-2),
        (partial(fused, precision="fp8"), "fused Triton kernels, CUDA graphs", FP8_TOLERANCE),
    ],
)
def test_engine_on_gpu(
    classifier: Classifier, make: Callable[[Classifier], Tested], kernels: str, tolerance: float
) -> None:
    classifier.choose_mixers()
    runner = make(classifier)
    assert runner.kernels == kernels
    runner.warm_up()
    poison(runner)
    check_all(runner, classifier, seed=0, tolerance=tolerance)
    if kernels.startswith("fused"):
        check_bits(runner)
    memory = runner.memory()
    assert 0 < memory.device <= memory.device_peak


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 1e-4), ("float16", 1e-2), ("bfloat16", 2e-2)]
)
def test_onnx_runtime_on_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision, tolerance: float
) -> None:
    """With the library that GMA_OPS_LIBRARY names or that is installed, or with function bodies."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA")
    from gma.export.artifact import export
    from gma.service.runners.loading import load
    from gma.service.runners.onnx import OnnxRunner

    sizes = CONFIG.model_dump(include={"width", "layers", "heads", "routing_dim", "mlp_width"})
    sizes |= CONFIG.model_dump(include={"value_dim", "num_components"})
    checkpoint = save_checkpoint(tmp_path / "checkpoint", **sizes)
    exported = export(checkpoint, tmp_path / "exported", precision=precision, chunk=CHUNK)
    monkeypatch.setenv("GMA_BACKEND", "onnx")  # beside GMA_OPS_LIBRARY, if that is set
    settings = Settings.load(checkpoint=exported.folder, device="cuda", rows=ROWS, slots=SLOTS)
    runner = load(settings).runner
    assert isinstance(runner, OnnxRunner)
    assert (runner.device, runner.dtype) == ("cuda:0", precision)
    assert f"ONNX Runtime {onnxruntime.__version__} CUDA" in runner.kernels
    runner.warm_up()
    poison(runner)
    check_all(runner, weights.load(checkpoint).classifier, seed=0, tolerance=tolerance)
    memory = runner.memory()
    assert 0 < memory.device <= memory.device_peak
