from __future__ import annotations

import os

# Set before torch and Ray are imported, for their processes too: no more threads than a small
# machine has cores, and not a word to anybody outside.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"

# Triton decides when it is imported, by torch too, whether its kernels are compiled or interpreted.
# This is the NVIDIA driver's device: asking torch would take every selection of tests a second.
if not os.path.exists("/dev/nvidiactl"):  # noqa: PTH110
    os.environ["TRITON_INTERPRET"] = "1"

import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Connections reach this machine only: a test that needs another fails, with its address."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.type == socket.SOCK_STREAM and self.family != socket.AF_UNIX:
            host = ipaddress.ip_address("127.0.0.1" if address[0] == "localhost" else address[0])
            if not (host.is_loopback or str(host) in own):
                raise OSError(f"tests have no network: {address}")
        connect(self, address)

    own = _own_addresses()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


def _own_addresses() -> set[str]:
    try:
        infos = socket.getaddrinfo(socket.gethostname(), None)
    except socket.gaierror:
        return set()
    return {str(info[4][0]) for info in infos}


@pytest.fixture(scope="module")
def _rounding() -> Iterator[None]:
    """Triton's interpreter cuts a float32 to fewer bits; a device rounds it."""
    import torch
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    narrow = {
        "bf16": (torch.bfloat16, torch.uint16),
        "fp8e4nv": (torch.float8_e4m3fn, torch.uint8),
    }

    def rounding(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if source.name != "fp32" or target.name not in narrow:
            return convert(x, source, target, mode)
        dtype, bits = narrow[target.name]
        return torch.tensor(x).to(dtype).view(bits).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounding)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch  # takes a second that most selections of tests need not spend

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
