"""Which runner a worker gets for its model, its device and its settings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gma.model import weights
from gma.model.classifier import Classifier
from gma.service.engine.step import Runner
from gma.service.runners.loading import torch_runner
from gma.service.settings import Settings
from gma.service.worker import Worker
from tests.model.small import SMALL
from tests.service.asgi import save_checkpoint

NARROW = {
    "bfloat16": ("_is_avx512_bf16_supported", "AVX512-BF16"),
    "int8": ("_is_vnni_supported", "AVX512-VNNI"),
}
"""What asks for the instructions that a precision needs on a CPU, and their names."""

FITTING: dict[str, Any] = {"routing_dim": 16, "value_dim": 16, "num_components": 16}


def runner_of(checkpoint: Path, device: str, **settings: Any) -> Runner:
    loaded = weights.load(checkpoint, device=device)
    return torch_runner(loaded.classifier, Settings.load(checkpoint=checkpoint, **settings))


class TestOnTheCpu:
    @pytest.mark.parametrize("dtype", ["auto", "float32"])
    def test_pytorch_in_float32(self, checkpoint: Path, dtype: str) -> None:
        runner = runner_of(checkpoint, "cpu", dtype=dtype, slots=3)
        assert (runner.device, runner.dtype) == ("cpu", "float32")
        assert runner.kernels.startswith("C++ for ")
        assert (runner.grids[-1], runner.slots) == ((8, 256), 3)

    @pytest.mark.parametrize("dtype", NARROW)
    def test_what_a_processor_has_instructions_for(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
    ) -> None:
        monkeypatch.setattr(torch.cpu, NARROW[dtype][0], lambda: True)
        runner = runner_of(checkpoint, "cpu", dtype=dtype)
        assert runner.dtype == dtype
        assert runner.kernels.startswith("C++ for ")
        runner.warm_up()

    @pytest.mark.parametrize("dtype", NARROW)
    def test_what_it_has_none_for(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
    ) -> None:
        supported, instructions = NARROW[dtype]
        monkeypatch.setattr(torch.cpu, supported, lambda: False)
        threads = torch.get_num_threads()
        settings = Settings.load(checkpoint=checkpoint, device="cpu", dtype=dtype, threads=threads)
        with pytest.raises(ValueError, match=f"is {dtype}, but .* instructions {instructions}"):
            Worker.load(settings)

    @pytest.mark.parametrize("dtype", NARROW)
    def test_a_bidirectional_model_is_read_in_float32(self, tmp_path: Path, dtype: str) -> None:
        both = save_checkpoint(tmp_path, causal=False)
        with pytest.raises(ValueError, match=f"is {dtype}, but a bidirectional model is read in"):
            runner_of(both, "cpu", dtype=dtype)

    def test_fp8_is_for_gpus(self, checkpoint: Path) -> None:
        with pytest.raises(ValueError, match="GMA_DTYPE=fp8 needs a GPU"):
            runner_of(checkpoint, "cpu", dtype="fp8")

    def test_nothing_to_compile_ahead(
        self, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        threads = torch.get_num_threads()
        settings = Settings.load(
            checkpoint=checkpoint,
            device="cpu",
            threads=threads,
            rows=1,
            chunk_tokens=8,
            compile_cache=tmp_path / "kernels",
        )
        worker = Worker.load(settings)
        with pytest.raises(ValueError, match=r"nothing to compile ahead for C\+\+ for "):
            worker.compile()

        async def start() -> None:
            await worker.start()
            await worker.stop()

        with caplog.at_level(logging.INFO):
            asyncio.run(start())
        assert "compile cache: not used by C++ for " in caplog.text
        assert not (tmp_path / "kernels").exists()

    def test_a_grid_that_was_asked_for(self, checkpoint: Path) -> None:
        assert runner_of(checkpoint, "cpu", rows=3, chunk_tokens=9).grids[-1] == (3, 9)


class TestOnAnOldGpu:
    """Nothing is computed: weights that say they are on a GPU are enough."""

    @pytest.fixture
    def classifier(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Classifier]:
        gpu = SimpleNamespace(name="an A100", major=8, minor=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
        classifier = Classifier(SMALL.model_copy(update={**FITTING, "mlp_width": 32}))
        with FakeTensorMode():
            classifier.embedding.weight = torch.nn.Parameter(torch.empty(1, device="cuda"))
            yield classifier

    def test_pytorch_if_nothing_else_was_asked_for(
        self, classifier: Classifier, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            runner = torch_runner(classifier, Settings.load())
        assert runner.dtype == "float32"
        assert runner.kernels.startswith("compiled PyTorch")
        assert "no fused kernels: an A100 has compute capability 8.0, less than 9.0" in caplog.text

    @pytest.mark.parametrize(("compiler", "how"), [("cc", "compiled"), ("", "eager")])
    def test_passes_are_compiled_if_a_compiler_is_there(
        self,
        classifier: Classifier,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        compiler: str,
        how: str,
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("CC", compiler)
        if compiler:
            (tmp_path / compiler).touch(mode=0o755)
        classifier.config = classifier.config.model_copy(update={"causal": False})
        with caplog.at_level(logging.WARNING):
            runner = torch_runner(classifier, Settings.load())
        assert runner.kernels.startswith(f"{how} PyTorch in")
        assert ("no C compiler" in caplog.text) == (not compiler)

    def test_no_inbox_that_its_chunks_would_not_fit_in(self, classifier: Classifier) -> None:
        """A chunk is longer than on the CPU, which is known only now."""
        settings = Settings.load(inbox_tokens=300)
        with pytest.raises(ValueError, match=r"GMA_INBOX_TOKENS is less .* which is 512"):
            torch_runner(classifier, settings)

    def test_int8_is_for_cpus(self, classifier: Classifier) -> None:
        with pytest.raises(ValueError, match="GMA_DTYPE=int8 is for the CPU"):
            torch_runner(classifier, Settings.load(dtype="int8"))

    @pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
    def test_no_precision_that_it_cannot_be_read_in(
        self, classifier: Classifier, dtype: str
    ) -> None:
        pytest.importorskip("triton")
        with pytest.raises(ValueError, match=f"no fused step in {dtype}: an A100 has"):
            torch_runner(classifier, Settings.load(dtype=dtype))


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.fixture(scope="class")
    def fitting(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return save_checkpoint(tmp_path_factory.mktemp("fitting"), **FITTING)

    @pytest.mark.parametrize(
        ("asked", "dtype", "kernels"),
        [
            ("auto", "bfloat16", "fused Triton kernels, CUDA graphs"),
            ("bfloat16", "bfloat16", "fused Triton kernels, CUDA graphs"),
            ("fp8", "fp8", "fused Triton kernels, CUDA graphs"),
            ("float32", "float32", "fused Triton kernels, CUDA graphs"),
        ],
    )
    def test_what_was_asked_for(self, fitting: Path, asked: str, dtype: str, kernels: str) -> None:
        runner = runner_of(fitting, "cuda", dtype=asked)
        assert (runner.device, runner.dtype) == ("cuda:0", dtype)
        assert runner.kernels == kernels
        assert runner.grids[-1] == (64, 512)

    def test_pytorch_for_a_model_that_does_not_fit(
        self, checkpoint: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            runner = runner_of(checkpoint, "cuda")
        assert (runner.dtype, runner.kernels) == ("float32", "compiled PyTorch, chunked mixer")
        assert "no fused kernels: routing_dim" in caplog.text

    @pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
    def test_a_precision_that_does_not_fit(self, checkpoint: Path, dtype: str) -> None:
        with pytest.raises(ValueError, match=f"tiny has no fused step in {dtype}: "):
            runner_of(checkpoint, "cuda", dtype=dtype)
