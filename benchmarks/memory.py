"""The Worker's peak memory with a long document beside that with a short one, over HTTP.

    python -m benchmarks.memory

Each size gets a service of its own, started afresh (a peak never falls), with a tiny model and the
tokenizer of `books`. The text is the licence's words in random order. Prints Markdown.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.processes import service
from benchmarks.random_models import tiny_checkpoint
from gma.loadtest import server
from gma.service.observe.metrics import PERIOD_S

ROOT = Path(__file__).parent.parent
SIZES = (200_000, 20_000_000)


def words(size: int) -> bytes:
    """English words in random order, at most ``size`` bytes."""
    vocabulary = (ROOT / "LICENSE").read_text().split()
    rng = random.Random(0)
    text = " ".join(rng.choices(vocabulary, k=size // 4))
    return text[:size].encode()


def peak(url: str, size: int) -> float:
    """The Worker's peak resident memory, in MB, once a document of ``size`` bytes is classified."""
    answer = httpx.post(
        f"{url}/v1/documents",
        content=words(size),
        headers={"content-type": "text/plain"},
        timeout=3600,
    )
    answer.raise_for_status()
    time.sleep(2 * PERIOD_S)  # the gauge is refreshed so often
    told = server.scrape(url)
    assert told
    return told.by_role["gma_resident_memory_peak_bytes"]["worker"] / 1e6


def main() -> None:
    print("| document | Worker's peak resident memory, MB |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        tiny_checkpoint(Path(folder))
        peaks = {}
        for size in SIZES:
            with service(checkpoint=folder) as running:
                peaks[size] = peak(running.url, size)
            print(f"| {size / 1e6:g} MB | {peaks[size]:.1f} |", flush=True)
    short, long = (peaks[size] for size in SIZES)
    print(f"\nRatio: {long / short:.3f}")


if __name__ == "__main__":
    main()
