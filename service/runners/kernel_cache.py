"""Compiled GPU kernels, kept between starts: a folder that an image can carry.

Triton looks kernels up by their source, their constants, its own version and the GPU's
architecture, so a folder never gives a wrong kernel: one that does not fit is compiled again. What
the folder was made for is written beside them, so that a start can say which it will be. How Triton
reads it is `gma.service.runners.kernel_folder`.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

KERNELS, MANIFEST = "kernels", "manifest.json"


class Manifest(TypedDict):
    """What kernels were compiled for."""

    fingerprint: str  # of the checkpoint
    gpu: str
    torch: str
    triton: str
    dtype: str
    grids: list[str]


def use(folder: Path) -> None:
    """Let Triton keep its kernels there. To be called before it is imported."""
    os.environ["TRITON_CACHE_DIR"] = str(folder.absolute() / KERNELS)
    os.environ["TRITON_CACHE_MANAGER"] = "gma.service.runners.kernel_folder:KernelFolder"


def manifest(fingerprint: str, gpu: str, dtype: str, grids: list[str]) -> Manifest:
    """Of this process."""
    return Manifest(
        fingerprint=fingerprint,
        gpu=gpu,
        torch=version("torch"),
        triton=version("triton"),
        dtype=dtype,
        grids=grids,
    )


def verdict(folder: Path, wanted: Manifest) -> str:
    """Whether the kernels in `folder` are those that are wanted, for people."""
    try:
        found = dict(json.loads((folder / MANIFEST).read_text()))
    except FileNotFoundError:
        return f"{folder} has no kernels yet: they are compiled now"
    except (OSError, ValueError, TypeError) as error:
        return f"{folder / MANIFEST} can't be read ({error}): kernels are compiled if need be"
    other = [
        f"{name} {found.get(name)}, not {value}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if other:
        return f"{folder} was made for {'; '.join(other)}: what is missing is compiled now"
    return f"{folder} has the kernels"


def record(folder: Path, made: Manifest) -> None:
    """Write down what the kernels in `folder` are for."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(made, indent=2) + "\n")
