"""Exported models: what a start with one checks, and that answers are PyTorch's."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("onnxruntime")

import onnxruntime

from gma.service.app import local
from gma.service.app.start import StartError
from gma.service.runners import loading
from gma.service.settings import Settings
from gma.service.worker import Worker
from tests.service.asgi import TEXT, serving

CHUNK = 16


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A worker chooses how many threads its process computes with."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def settings(folder: Path, backend: str = "auto", **others: Any) -> Settings:
    return Settings.load(
        checkpoint=folder,
        backend=backend,
        **{"device": "cpu", "threads": 1, "rows": 2, "slots": 3, **others},
    )


async def answer(client: httpx.AsyncClient, text: str) -> dict[str, Any]:
    response = await client.post(
        "/v1/documents?evidence=true", content=text, headers={"content-type": "text/plain"}
    )
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.anyio
@pytest.mark.parametrize("kernels", ["function bodies", "ai.gma library"])
async def test_both_backends_give_the_same_answers(
    checkpoint: Path, exported: Path, kernels: str, request: pytest.FixtureRequest
) -> None:
    library = "none" if kernels == "function bodies" else request.getfixturevalue("library")
    texts = ["I", TEXT, "nobody spoke " * 50]
    async with (
        serving(settings(checkpoint, "torch", chunk_tokens=CHUNK)) as torch_client,
        serving(settings(exported, ops_library=library)) as onnx_client,
    ):
        for text in texts:
            expected, found = await answer(torch_client, text), await answer(onnx_client, text)
            assert (found["label"], found["usage"]) == (expected["label"], expected["usage"])
            pairs = zip(expected["scores"], found["scores"], strict=True)
            assert all(
                (a["label"], a["score"]) == (b["label"], pytest.approx(b["score"], abs=1e-5))
                for a, b in pairs
            )
            spans = zip(expected["evidence"], found["evidence"], strict=True)
            assert all(
                (a["start"], a["end"], a["weight"])
                == (b["start"], b["end"], pytest.approx(b["weight"], abs=1e-9))
                for a, b in spans
            )
        info = (await onnx_client.get("/info")).json()
        assert info["kernels"] == f"ONNX Runtime {onnxruntime.__version__} CPU, {kernels}"
        assert (info["backend"], info["device"], info["dtype"]) == ("onnx", "cpu", "float32")
        assert (info["model"], info["rows"], info["chunk_tokens"]) == ("tiny", 2, CHUNK)
        assert info["versions"]["onnxruntime"] == onnxruntime.__version__
        assert "onnxruntime" not in (await torch_client.get("/info")).json()["versions"]


def test_the_log_says_what_runs(exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Worker.load(settings(exported, ops_library="none"))
    assert f"tiny on cpu in float32: ONNX Runtime {onnxruntime.__version__} CPU" in caplog.text


@pytest.mark.parametrize("installed", [True, False])
def test_the_package_of_operators_is_used_if_it_is_installed(
    exported: Path, installed: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = request.getfixturevalue("library") if installed else None
    package = SimpleNamespace(library=lambda: library)
    monkeypatch.setattr(loading, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(loading, "import_module", lambda name: package)
    assert (loading.ops_library(settings(exported)) is not None) == installed
    loaded = loading.load(settings(exported))
    assert loaded.runner.kernels.endswith("ai.gma library" if installed else "function bodies")


class TestWhatStopsTheStart:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"chunk_tokens": 256}, "GMA_CHUNK_TOKENS is 256, but .* exported for chunks of 16: "),
            ({"dtype": "bfloat16"}, "GMA_DTYPE is bfloat16, but .* is in float32: "),
            ({"ops_library": Path("nowhere.so")}, r"the operators' library nowhere\.so: "),
            ({"inbox_tokens": 8}, "GMA_INBOX_TOKENS is less than GMA_CHUNK_TOKENS, which is 16"),
        ],
    )
    def test_settings_that_do_not_fit_the_model(
        self, exported: Path, given: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            Worker.load(settings(exported, **given))

    @pytest.mark.skipif(
        "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
        reason="this ONNX Runtime has CUDA",
    )
    def test_a_device_that_onnx_runtime_lacks(self, exported: Path) -> None:
        with pytest.raises(ValueError, match=r"no CUDAExecutionProvider: install .*GMA_DEVICE=cpu"):
            Worker.load(settings(exported, device="cuda"))

    @pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
    def test_a_package_that_is_not_installed(
        self, exported: Path, package: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in [
            name
            for name in sys.modules
            if name.startswith(("gma.service.runners.onnx", "gma.export."))
        ]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=rf"needs {package}, .* gma-service\[onnx\] has it"):
            Worker.load(settings(exported))

    def test_a_model_of_the_other_backend(self, checkpoint: Path, exported: Path) -> None:
        for folder, backend, message in (
            (
                exported,
                "torch",
                "is an exported model: leave GMA_BACKEND out, or let GMA_CHECKPOINT",
            ),
            (
                checkpoint,
                "onnx",
                "is a checkpoint, not an exported model: leave GMA_BACKEND out, or make",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                Worker.load(settings(folder, backend))
            with pytest.raises(StartError, match=message):
                local.serve_forever(settings(folder, backend))

    def test_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(StartError, match="is not an exported model: it has no file"):
            local.serve_forever(settings(tmp_path, "onnx"))
