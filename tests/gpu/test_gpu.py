"""On a CUDA device: every runner gives the float64 model's answer through the engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from model.classifier import Classifier
from model.config import ModelConfig
from service.runner import TorchRunner
from tests.service.conformance import Tested, check_all, poison

pytestmark = pytest.mark.gpu

ROWS, CHUNK, SLOTS = 4, 128, 5
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


def bfloat16(classifier: Classifier) -> Tested:
    from service.fused import FusedRunner

    return FusedRunner(classifier, slots=SLOTS, rows=ROWS, chunk=CHUNK, precision="bfloat16")


def fp8(classifier: Classifier) -> Tested:
    from service.fused import FusedRunner

    return FusedRunner(classifier, slots=SLOTS, rows=ROWS, chunk=CHUNK, precision="fp8")


@pytest.mark.parametrize(
    ("make", "kernels", "tolerance"),
    [
        (eager, "eager PyTorch, triton mixer", 1e-4),
        (compiled, "compiled PyTorch, triton mixer", 1e-4),
        (bfloat16, "fused Triton kernels, CUDA graphs", 1e-2),
        (fp8, "fused Triton kernels, CUDA graphs", 3e-2),
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
    memory = runner.memory()
    assert 0 < memory.device <= memory.device_peak
