"""This process's memory, as the kernel counts it, and as the GPUs' driver does."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple


class Memory(NamedTuple):
    """Bytes in use now, and at most since the process started.

    The device's are 0 on the CPU, and what nobody can tell is 0 too.
    """

    resident: int
    resident_peak: int
    device: int = 0
    device_peak: int = 0
    device_reserved: int = 0
    """What torch holds of it, in use or not."""

    device_driver: int = 0
    """This process's by the driver, its CUDA context included."""

    device_total: int = 0
    """What the GPU has."""


def resident_memory() -> tuple[int, int]:
    """Bytes of this process in physical memory, now and at most; zeros where there is no /proc."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0, 0
    # Not getrusage: its peak is inherited from the process that started this one.
    fields = dict(re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB$", status, re.MULTILINE))
    return int(fields.get("VmRSS", 0)) * 1024, int(fields.get("VmHWM", 0)) * 1024


def driver_memory() -> tuple[int, int]:
    """`gpu_memory`, or zeros where the driver can't be asked."""
    try:
        return gpu_memory()
    except ValueError:
        return 0, 0


def gpu_memory() -> tuple[int, int]:
    """Bytes of GPU memory that this process holds, its CUDA context included, and all the GPU has.

    Where the driver can't tell processes apart, as in some containers, all that is in use on the
    process's first GPU. Raises ValueError if the driver can't be asked.
    """
    try:
        import pynvml  # of the extra gpu
    except ImportError as error:
        raise ValueError("to read GPU memory, install gma-service[gpu]") from error
    try:
        pynvml.nvmlInit()
        gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        running = [each for x in gpus for each in pynvml.nvmlDeviceGetComputeRunningProcesses(x)]
        own = sum(each.usedGpuMemory or 0 for each in running if each.pid == os.getpid())
        whole = pynvml.nvmlDeviceGetMemoryInfo(_first(gpus, pynvml))
        return own or int(whole.used), int(whole.total)
    except pynvml.NVMLError as error:
        raise ValueError(f"the GPU's driver does not tell its memory: {error}") from error


def _first(gpus: list[Any], pynvml: Any) -> Any:
    """The one of a machine's GPUs that CUDA calls 0 in this process."""
    name = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    return gpus[int(name)] if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)
