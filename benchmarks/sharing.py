"""Two models that share one GPU (or the CPU) beside each of them alone, over HTTP.

    python -m benchmarks.sharing --data BOOKS
    python -m benchmarks.sharing --data BOOKS --models books=FOLDER contracts=FOLDER

Rounds in which each model is served alone, then both by one service that has half of the device for
each: alone while nobody asks for the other, then with books for both. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks import timing
from benchmarks.checkpoints import BOOKS
from benchmarks.clients import Clients, tokens_within
from benchmarks.processes import service
from gma.model.config import DEFAULT_CHECKPOINT
from gma.model.training.splits import Splits

ALONE, BESIDE, TOGETHER = "alone", "beside one that nobody asks for", "both at once"


class Rate(NamedTuple):
    """What a model reads in one of the cases."""

    model: str
    case: str
    tokens_per_s: float


def rates(
    clients: Mapping[str, Clients], url: str, case: str, arguments: argparse.Namespace
) -> Iterator[Rate]:
    """Keep books in flight for the models of all `clients` at the same time."""
    begin = time.monotonic() + arguments.warm
    end = begin + arguments.seconds
    loads = {
        model: own.books(f"{url}/v1/models/{model}", arguments.texts, arguments.books, end)
        for model, own in clients.items()
    }
    for model, load in loads.items():
        answers = [answer for part in load for answer in part.result()]
        yield Rate(model, case, tokens_within(answers, begin, end) / arguments.seconds)


def measure(arguments: argparse.Namespace) -> list[Rate]:
    """Serve the models in turns."""
    names = [model.partition("=")[0] for model in arguments.models]
    found: list[Rate] = []
    with ExitStack() as stack:
        clients = {name: stack.enter_context(Clients(arguments.clients)) for name in names}
        for number in range(arguments.rounds):
            log = arguments.out / f"service-{number}.log"
            for (name, own), model in zip(clients.items(), arguments.models, strict=True):
                with service(log, models=model) as running:
                    found += rates({name: own}, running.url, ALONE, arguments)
            share = 1 / len(names)
            with service(log, models=",".join(arguments.models), gpu_share=share) as running:
                for name, own in clients.items():
                    found += rates({name: own}, running.url, BESIDE, arguments)
                found += rates(clients, running.url, TOGETHER, arguments)
    return found


def table(found: Sequence[Rate]) -> str:
    """The report, as Markdown: medians of the rounds, and of what each has alone."""
    names = [*dict.fromkeys(rate.model for rate in found)]
    of = {
        (name, case): median(
            rate.tokens_per_s for rate in found if (rate.model, rate.case) == (name, case)
        )
        for name in names
        for case in (ALONE, BESIDE, TOGETHER)
    }
    lines = [("", *names), ("---",) * (1 + len(names))]
    for case in (ALONE, BESIDE, TOGETHER):
        cells = (
            f"{of[name, case]:,.0f} tokens/s ({of[name, case] / of[name, ALONE]:.2f})"
            for name in names
        )
        lines.append((case, *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--models", nargs="+", default=[f"books={BOOKS}", f"contracts={DEFAULT_CHECKPOINT}"]
    )
    parser.add_argument("--out", type=Path, default=Path("build/sharing"))
    parser.add_argument("--books", type=int, default=64, help="of each model in flight at a time")
    parser.add_argument("--book-bytes", type=int, help="of each, at most")
    parser.add_argument("--clients", type=int, default=3, help="processes for each model")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--warm", type=float, default=3.0, help="seconds of load before that")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    books = [document.text.encode() for document in Splits(arguments.data).read(arguments.split)]
    arguments.texts = [book[: arguments.book_bytes] for book in books]
    found = measure(arguments)
    cores = os.cpu_count()
    timing.save(arguments.out, "sharing", {"cores": cores, "rates": found}, table(found))
    print(table(found))


if __name__ == "__main__":
    main()
