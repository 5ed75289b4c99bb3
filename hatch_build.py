"""Compiles the kernels for the CPU into every wheel, and in place for an editable install.

Where there is no C++ compiler the wheel has none, and reading is slower; whoever starts it is told.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = "gma/model/ops/cpu"
LIBRARY = "libgma_cpu.so"

COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"]

# kernels.cc is compiled for each set of instructions; which is used is decided where it runs.
# export/ops/CMakeLists.txt does the same.
KERNEL = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions"]
X86 = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mprefer-vector-width=512"],
}


class CompileKernels(BuildHookInterface):  # type: ignore[type-arg]
    """Hatchling's hook: it finds the class by its base."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        folder = Path(self.root, KERNELS)
        library = folder / LIBRARY
        if not is_newer(library, [Path(__file__), *folder.glob("*.cc"), *folder.glob("*.h")]):
            library.unlink(missing_ok=True)
            if why := compile_library(folder):
                sys.stderr.write(f"no kernels for the CPU, and reading is slower: {why}\n")
                return
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data |= {"pure_python": False, "tag": f"py3-none-{tag}"}
        build_data["artifacts"].append(f"{KERNELS}/{LIBRARY}")


def is_newer(file: Path, sources: Iterable[Path]) -> bool:
    return file.exists() and file.stat().st_mtime > max(x.stat().st_mtime for x in sources)


def compile_library(folder: Path) -> str | None:
    """Leave the library in the folder, or say why there is none. Raises ValueError for a CXX that
    is no program."""
    compiler = shlex.split(os.environ.get("CXX", ""))
    if compiler and which(compiler[0]) is None:
        raise ValueError(f"CXX is {os.environ['CXX']}, and there is no such program")
    compiler = compiler or [*filter(which, ["c++", "g++", "clang++"])][:1]
    if not compiler:
        return "there is no C++ compiler"
    try:
        _compile(compiler, folder)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        # Whoever has an old one is to have the service all the same.
        return f"GCC 12 or newer, or Clang, compiles them; {shlex.join(compiler)} did not: {error}"
    return None


def _compile(compiler: list[str], folder: Path) -> None:
    """Raises CalledProcessError, or FileNotFoundError if the compiler leaves nothing."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    with TemporaryDirectory() as made:
        commands, objects = [], []
        for source, name, flags in sources(folder, x86=x86):
            objects.append(f"{made}/{source.stem}-{name}.o")
            commands.append([*compiler, *COMMON, *flags, "-c", str(source), "-o", objects[-1]])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands))
        # It runs beside whatever C++ library PyTorch brings.
        static = ["-static-libgcc", "-static-libstdc++"]
        # At once: processes may have the one that was there before.
        partial = folder / f".{LIBRARY}.{os.getpid()}"
        run([*compiler, "-shared", *objects, *static, "-o", str(partial)])
        partial.rename(folder / LIBRARY)


def sources(folder: Path, *, x86: bool) -> Iterator[tuple[Path, str, list[str]]]:
    """Yield files, what each is compiled for, and how."""
    for source in sorted(folder.glob("*.cc")):
        if source.stem == "kernels":
            for name, flags in {"baseline": [], **(X86 if x86 else {})}.items():
                yield (
                    source,
                    name,
                    [*KERNEL, "-DGMA_FLOAT32_ALONE", *flags, f"-DGMA_INSTRUCTIONS={name}"],
                )
        else:
            yield source, "all", ["-DGMA_X86"] if x86 else []


def run(command: list[str]) -> None:
    subprocess.run(command, check=True)  # noqa: S603 (a compiler, and files of ours)
