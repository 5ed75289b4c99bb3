"""GPU memory as the driver tells it: of this process alone where it can tell."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from gma.service.observe.memory import gpu_memory


class NVMLError(Exception):
    pass


def driver(*gpus: dict[int, int | None], fails: bool = False) -> Any:
    """One whose GPUs hold so many bytes of these processes, and 100 more on GPU 0, 101 on GPU 1."""

    def init() -> None:
        if fails:
            raise NVMLError("Driver Not Loaded")

    def running(gpu: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in gpus[gpu].items()]

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlDeviceGetCount=lambda: len(gpus),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=lambda name: int(name.removeprefix("GPU-")),
        nvmlDeviceGetComputeRunningProcesses=running,
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=100 + gpu, total=1000),
    )


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"),
    [
        ([{os.getpid(): 7, 1: 50}, {1: 60}], None, 7),
        ([{1: 50}, {os.getpid(): 9}], "1", 9),
        ([{1: 50}, {1: 60}], None, 100),
        ([{1: 50}, {1: 60}], "1,0", 101),
        ([{1: 50}, {1: 60}], "GPU-1", 101),
        ([{os.getpid(): None}], "0", 100),
    ],
)
def test_what_the_driver_tells(
    monkeypatch: pytest.MonkeyPatch,
    gpus: list[dict[int, int | None]],
    visible: str | None,
    expected: int,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver(*gpus))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_memory() == (expected, 1000)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver(fails=True))
    with pytest.raises(ValueError, match="does not tell its memory: Driver Not Loaded"):
        gpu_memory()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ValueError, match=r"install gma-service\[gpu\]"):
        gpu_memory()
