"""On a CUDA device: the step, the runner and the engine give the float64 model's answer."""

import asyncio
import copy

import numpy as np
import pytest
import torch

from model.classifier import Classifier
from model.config import ModelConfig
from service.engine import Engine
from service.runner import TorchRunner

pytestmark = pytest.mark.gpu

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
LENGTHS = (1, 63, 127, 128, 129, 1000)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier(CONFIG).requires_grad_(False).eval()
    classifier.pooling.token.weight.normal_()
    return classifier


@pytest.mark.parametrize("compile", [False, True])
def test_engine_on_gpu(classifier: Classifier, compile: bool) -> None:
    runner = TorchRunner(
        copy.deepcopy(classifier).cuda(), slots=4, rows=4, chunk=128, compile=compile
    )
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, CONFIG.vocab_size, n).astype(np.int32) for n in LENGTHS]

    async def logits(engine: Engine, index: int) -> np.ndarray:
        async for progress in engine.read(str(index), documents[index], True):
            last = progress
        assert last.done
        return last.logits

    async def run() -> list[np.ndarray]:
        engine = Engine(runner, max_waiting=16, inbox_tokens=1 << 16, idle_timeout_s=60.0)
        await engine.start()
        try:
            return await asyncio.gather(*(logits(engine, i) for i in range(len(documents))))
        finally:
            await engine.stop()

    got = asyncio.run(run())
    exact = (
        copy.deepcopy(classifier)
        .double()
        .read([torch.from_numpy(document) for document in documents])
    )
    for mine, reading in zip(got, exact, strict=True):
        error = np.linalg.norm(mine - reading.logits.numpy())
        assert error <= 1e-4 * np.linalg.norm(reading.logits.numpy())
    memory = runner.memory()
    assert 0 < memory.device <= memory.device_peak
