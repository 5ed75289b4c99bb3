"""Compiled GPU kernels, kept between starts: a folder that an image can carry.

Triton looks kernels up by their source, their constants, its own version and the GPU's
architecture, so a folder never gives a wrong kernel: one that does not fit is compiled again. What
the folder was made for is written beside them, so that a start can say which it will be. How Triton
reads it is `gma.service.runners.kernel_folder`.
"""

from __future__ import annotations

import json
import logging
import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from gma.service.engine.step import Runner

logger = logging.getLogger(__name__)

KERNELS, MANIFEST = "kernels", "manifest.json"


FUSED = "fused Triton kernels"
"""How runners call kernels that can be kept."""


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
    """What this process compiles kernels for."""
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


class KernelCache:
    """The folder for one runner's kernels, if there is to be one."""

    def __init__(self, folder: Path | None, runner: Runner, *, fingerprint: str) -> None:
        """`fingerprint`: of the checkpoint that the runner runs."""
        self._folder = folder
        self._runner = runner
        self._fingerprint = fingerprint

    @property
    def kept(self) -> bool:
        """Whether the runner's kernels can be kept: torch.compile has a cache of its own, and those
        of ONNX Runtime are compiled already."""
        return self._runner.kernels.startswith(FUSED)

    def tell(self) -> None:
        """Log whether the kernels are there; to be called before the warm-up."""
        if self._folder and self.kept:
            logger.info("compile cache: %s", verdict(self._folder, self._manifest()))
        elif self._folder:
            logger.info("compile cache: not used by %s", self._runner.kernels)

    def record(self) -> None:
        """Write down what the kernels are for, now that the warm-up has made them; one that can't
        be written is left as it is."""
        if not (self._folder and self.kept):
            return
        try:
            record(self._folder, self._manifest())
        except OSError as error:
            logger.info("compile cache: left as it is (%s)", error)

    def _manifest(self) -> Manifest:
        import torch  # gateways come here too, for `use`, and do without

        gpu = torch.cuda.get_device_name(self._runner.device)
        grids = [f"{grid.rows} x {grid.chunk}" for grid in self._runner.grids]
        return manifest(self._fingerprint, gpu, self._runner.dtype, grids)
