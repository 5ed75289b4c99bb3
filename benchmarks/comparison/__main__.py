"""Compare mixers on one backbone: see docs/comparison.md.

    python -m benchmarks.comparison --data DATA --out build/comparison

A run that is in the folder already is not repeated, and one that is cut short is not recorded;
several processes may share a folder. `--prepare` makes the texts that runs read, and nothing else.
`--report` prints the tables of what is there, and draws the plots.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from benchmarks.comparison import agreement, libraries, report, suite
from benchmarks.comparison.bench import Bench
from benchmarks.comparison.gaussian import MIXERS
from benchmarks.comparison.runs import RATES, SPEED, TASKS, Folder, Run, Wanted
from benchmarks.comparison.task import Task
from benchmarks.comparison.texts import SOURCES, prepare
from benchmarks.comparison.trainer import OutOfTime
from benchmarks.timing import first_line, progress

TEXTS = [*SOURCES, "listops"]


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with books, prose, imdb and order")
    parser.add_argument("--out", type=Path, default=Path("build/comparison"))
    parser.add_argument("--only", nargs="+", choices=MIXERS, default=list(MIXERS), metavar="MIXER")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--from-scratch", action="store_true", help="without self-pretraining")
    parser.add_argument("--budget-seconds", type=float, default=math.inf)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument(
        "--untuned", action="store_true", help="start fast: kernels not tuned, speed not measured"
    )
    parser.add_argument("--quick", action="store_true", help="so few steps that it says nothing")
    parser.add_argument("--prepare", nargs="*", choices=TEXTS, help="make texts; all by default")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--check", action="store_true", help="hold kernels to the definitions")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    # What says nothing is kept apart from what does.
    folder = Folder(args.out / "quick" if args.quick else args.out)
    texts = args.out / "texts"
    tasks = [task for task in args.tasks if task != SPEED or not args.untuned]
    wanted = Wanted(tasks, args.only, args.rates, args.seeds, not args.from_scratch)
    if args.prepare is not None:
        make(args.data, texts, args.prepare or TEXTS)
    elif args.report:
        print(report.tables(wanted, folder))
        report.plots(wanted, folder)
    elif args.check:
        for mixer in args.only:
            size = suite.RECIPES["language"].size
            progress(f"{mixer}: {agreement.check(MIXERS[mixer], size, torch.device(args.device))}")
    else:
        run_all(wanted, folder, texts, args)


def make(data: Path | None, texts: Path, names: Sequence[str]) -> None:
    """Make texts, of the data but for those of ListOps."""
    of_data = [name for name in names if name in SOURCES]
    if of_data and data is None:
        raise SystemExit(f"--data is needed to make the texts {', '.join(of_data)}")
    if data is not None:
        prepare(data, texts, of_data)
    if "listops" in names:
        suite.make_listops(texts)


def run_all(wanted: Wanted, folder: Folder, texts: Path, args: argparse.Namespace) -> None:
    """Do what is wanted and not done, until the budget ends."""
    began = time.monotonic()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    torch.set_float32_matmul_precision("high")
    if args.untuned:
        libraries.untune()
    missing = sorted({name for task in wanted.tasks for name in suite.NEEDS.get(task, ())})
    missing = [name for name in missing if not (texts / f"{name}-train.npz").exists()]
    if missing and not args.quick:
        make(args.data, texts, missing)
    bench = Bench(texts, device, began + args.budget_seconds, args.compile, args.quick)
    task = cache(lambda name: suite.build(name, texts, device, quick=args.quick))
    tried: set[Run] = set()
    while run := next((each for each in wanted.runs(folder) if each not in tried), None):
        tried.add(run)
        try:
            done(run, folder, bench, task)
        except OutOfTime:
            progress(f"{run.name}: cut short")
            return


def done(run: Run, folder: Folder, bench: Bench, task: Callable[[str], Task]) -> None:
    """Do a run that nobody has done or is at. One that fails is noted, and others go on.

    Raises OutOfTime.
    """
    with folder.claim(run) as ours:
        if not ours:
            return
        progress(run.name)
        try:
            result = bench.perform(run, task)
        except OutOfTime:
            raise
        except Exception as error:
            folder.fail(run, first_line(error))
            progress(f"{run.name}: {first_line(error)}")
            if "CUDA error" in str(error):  # nothing runs on the device after it
                raise
            return
        folder.write(run, result)
        progress(f"{run.name}: {json.dumps(result.get('test', {}))}, {result['seconds']} s")


if __name__ == "__main__":
    main()
