"""A busy service that is offered many large bodies at once: what it refuses, and its memory.

    python -m benchmarks.busy

To a service with a tiny model and default settings so many bodies of 50 MB come within a second,
beside short documents at their own times. What it has no room for is to be answered with 429, and
the short ones are to be answered. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.memory import tiny_checkpoint
from benchmarks.processes import service
from loadtest import server
from loadtest.report import Report, report
from loadtest.trial import Load, run
from service.metrics import PERIOD_S

PEAK = "gma_resident_memory_peak_bytes"

Peaks = dict[str, tuple[float, float]]
"""Bytes resident at most, by role: before and after."""


def measure(
    url: str, bodies: int, size: int, seconds: float, patience_s: float
) -> tuple[dict[str, Report], Peaks]:
    """Large bodies, all at once, in the midst of short ones; and the memory before and after."""
    time.sleep(2 * PERIOD_S)  # the gauge is refreshed so often
    before = server.scrape(url)
    loads = {
        "short": Load(url, lengths="fixed:2000", rate=4.0, seconds=seconds),
        # A constant rate that has them all due within a tenth of a second.
        "large": Load(
            url,
            lengths=f"fixed:{size}",
            profile="constant",
            rate=10.0 * bodies,
            seconds=0.1,
            processes=2,
            timeout_s=patience_s,
        ),
    }
    with ThreadPoolExecutor(len(loads)) as pool:
        found = dict(zip(loads, pool.map(run, loads.values()), strict=True))
    time.sleep(2 * PERIOD_S)
    after = server.scrape(url)
    assert before
    assert after
    peaks = {
        role: (before.by_role[PEAK].get(role, 0.0), peak)
        for role, peak in after.by_role[PEAK].items()
    }
    return {name: report(trial, []) for name, trial in found.items()}, peaks


def table(reports: dict[str, Report], peaks: Peaks, size: int) -> str:
    """Markdown."""
    large, short = reports["large"], reports["short"]
    answered = large.latency["all"].documents if large.latency else 0
    refused = Counter(large.errors)
    waited = short.latency["all"]
    lines = [
        ("figure", "value"),
        ("---", "---"),
        (f"bodies of {size / 1e6:g} MB at once", str(answered + refused.total())),
        ("answered", str(answered)),
        *((f"refused or failed: {kind}", str(number)) for kind, number in refused.items()),
        ("short documents beside them answered", str(waited.documents)),
        ("failed", str(sum(short.errors.values()))),
        ("their p50 / p99", f"{waited.quantiles['p50']:.2f} / {waited.quantiles['p99']:.2f} s"),
        *(
            (f"peak memory of the {role}, before / after", f"{a / 1e6:,.0f} / {b / 1e6:,.0f} MB")
            for role, (a, b) in sorted(peaks.items())
        ),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bodies", type=int, default=20)
    parser.add_argument("--bytes", type=int, default=50_000_000, help="of each body")
    parser.add_argument("--seconds", type=float, default=20.0, help="of short documents")
    parser.add_argument("--patience", type=float, default=1800.0, help="seconds for each body")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="gma-") as folder:
        checkpoint = Path(folder)
        tiny_checkpoint(checkpoint)
        with service(checkpoint=checkpoint, log_level="WARNING") as running:
            found = measure(
                running.url,
                arguments.bodies,
                arguments.bytes,
                arguments.seconds,
                arguments.patience,
            )
    print(f"{os.cpu_count()} cores\n")
    print(table(*found, arguments.bytes))


if __name__ == "__main__":
    main()
