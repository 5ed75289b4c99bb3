"""A busy service that is offered many large bodies at once: what it refuses, and its memory.

    python -m benchmarks.busy --bodies 20 60

To a service with a tiny model and default settings so many bodies of 50 MB come within a tenth of a
second, beside short documents at their own times; each number to a service of its own. What it has
no room for is to be answered with 429, and the short ones are to be answered. Memory is what /proc
says. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import Service, resident_bytes, service
from benchmarks.random_models import tiny_checkpoint
from gma.loadtest.report import Report, report
from gma.loadtest.trial import Load, run
from gma.service.settings import Settings

SHOWN = ("Gateway", "Worker")


@dataclass(frozen=True)
class Found:
    """What one service did with so many bodies."""

    bodies: int
    large: Report
    short: Report
    before: dict[str, int]  # bytes resident at most, by role
    after: dict[str, int]


def measure(running: Service, bodies: int, size: int, seconds: float, patience_s: float) -> Found:
    """Send large bodies all at once in the midst of short ones; look at memory before and after."""
    warm_up = Load(running.url, lengths="fixed:2000", at_once=4, seconds=3.0)
    run(warm_up)
    before = resident_bytes(running.pid, peak=True)
    short = Load(running.url, lengths="fixed:2000", rate=4.0, seconds=seconds)
    # A constant rate that has them all due within a tenth of a second.
    large = Load(
        running.url,
        lengths=f"fixed:{size}",
        profile="constant",
        rate=10.0 * bodies,
        seconds=0.1,
        processes=2,
        timeout_s=patience_s,
    )
    with ThreadPoolExecutor(2) as pool:
        shorts, larges = (report(trial, []) for trial in pool.map(run, (short, large)))
    return Found(bodies, larges, shorts, before, resident_bytes(running.pid, peak=True))


def table(found: Sequence[Found]) -> str:
    """The report, as Markdown."""
    rows: list[list[str]] = [
        ["bodies", "answered", "refused or failed", "short: answered / failed"],
    ]
    rows[0] += ["their p50 / p99", *(f"peak of {role}, before / after" for role in SHOWN)]
    rows.append(["---"] * len(rows[0]))
    for each in found:
        answered = each.large.latency["all"].documents if each.large.latency else 0
        refused = ", ".join(f"{n} {kind}" for kind, n in Counter(each.large.errors).items())
        waited = each.short.latency["all"]
        failed = sum(each.short.errors.values())
        quantiles = waited.quantiles
        rows.append([str(each.bodies), str(answered), refused or "0"])
        rows[-1] += [f"{waited.documents} / {failed}"]
        rows[-1] += [f"{quantiles['p50']:.2f} / {quantiles['p99']:.2f} s"]
        for role in SHOWN:
            peaks = (f"{peaks[role] / 1e6:,.0f}" for peaks in (each.before, each.after))
            rows[-1].append(f"{' / '.join(peaks)} MB" if role in each.after else "")
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bodies", type=int, nargs="+", default=[20, 60])
    parser.add_argument("--bytes", type=int, default=50_000_000, help="of each body")
    parser.add_argument("--seconds", type=float, default=20.0, help="of short documents")
    parser.add_argument("--patience", type=float, default=1800.0, help="seconds for each body")
    arguments = parser.parse_args(argv)
    found: list[Found] = []
    with tempfile.TemporaryDirectory(prefix="gma-") as folder:
        checkpoint = Path(folder)
        tiny_checkpoint(checkpoint)
        for bodies in arguments.bodies:
            with service(checkpoint=checkpoint, log_level="WARNING") as running:
                limits = arguments.bytes, arguments.seconds, arguments.patience
                found.append(measure(running, bodies, *limits))
    most = Settings.model_fields["max_bytes_in_flight"].default
    print(f"{os.cpu_count()} cores, {most / 2**20:g} MiB may be in flight at once\n")
    print(table(found))


if __name__ == "__main__":
    main()
