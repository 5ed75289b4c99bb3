"""Seconds from starting the process to a service that is ready, without and with its kernels.

    python -m benchmarks.start
    python -m benchmarks.start --checkpoint PATH --warm 3

Prints Markdown. The first start finds an empty compile cache, the others what it left there. On the
CPU nothing is compiled, and all starts are alike.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.processes import free_port
from gma.model.config import DEFAULT_CHECKPOINT

LONGEST_S = 300


def start(cache: Path, checkpoint: Path) -> float:
    """Seconds until the service says that it is ready, upon which it is stopped."""
    environment = {
        **os.environ,
        "GMA_COMPILE_CACHE": str(cache),
        "GMA_CHECKPOINT": str(checkpoint),
        "GMA_PORT": str(free_port()),
    }
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", "from gma.service.cli.main import main; main()", "serve"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("Ready"):
                seconds = time.perf_counter() - began
                print(f"ready after {seconds:.1f} s", file=sys.stderr, flush=True)
                return seconds
        raise SystemExit("the service ended before it was ready")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(LONGEST_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--warm", type=int, default=2, help="starts with a warm cache")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gma-cache-") as folder:
        cache = Path(folder)
        cold = start(cache, arguments.checkpoint)
        warm = [start(cache, arguments.checkpoint) for _ in range(arguments.warm)]
        size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    print("| compile cache | seconds to ready |\n|---|---|")
    print(f"| empty | {cold:.1f} |")
    print(f"| warm (median of {len(warm)}) | {median(warm):.1f} |")
    print(f"\nThe cache holds {size / 2**20:.1f} MiB.")


if __name__ == "__main__":
    main()
