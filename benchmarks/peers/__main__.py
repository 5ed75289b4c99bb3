"""This service beside servers of transformer classifiers, on this machine.

    python -m benchmarks.peers --book BOOK          installs what it needs in build/peers/venv
    python -m benchmarks.peers --book BOOK --python .venv-peers/bin/python

infinity and LitServe serve a BERT of as many parameters as `books`, with random weights and the
tokenizer of `books`. Each server runs alone, all of them in each round, so that ratios hold where
figures do not. Prints Markdown. docs/peers.md says what is not comparable.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import aiohttp

from benchmarks.checkpoints import BOOKS
from benchmarks.processes import STOP_S, family, free_port
from benchmarks.timing import markdown, progress

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"

TEXT = "The sea was calm, and nobody spoke of the ships that had left in the night. " * 3

BEGIN = 4096
"""Characters: more than 512 tokens."""

READY_S = 300.0
LOOK_S = 0.05
PATIENCE_S = 600.0


class Server(NamedTuple):
    """How one is started, and asked for the label of a text."""

    name: str
    command: Sequence[str]
    """Of the port, as {port}."""
    path: str
    body: str
    """What a text is sent as: its field."""
    inputs: type
    """How: as it is, or in a list."""
    environment: Mapping[str, str]

    def asked(self, text: str) -> bytes:
        return json.dumps({self.body: text if self.inputs is str else [text]}).encode()


@dataclass
class Figures:
    """Of one server, in one round each."""

    ready_s: list[float] = field(default_factory=list)
    texts_a_second: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    book_s: list[float] = field(default_factory=list)
    book: str = ""


def servers(python: Path, model: Path, threads: int) -> list[Server]:
    """Each with all cores, and told of nothing outside this machine."""
    alone = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    gma = [sys.executable, "-c", "from gma.service.cli.main import main; main()", "serve"]
    infinity = [
        str(python.parent / "infinity_emb"), "v2", "--model-id", str(model), "--engine", "torch",
        "--device", "cpu", "--host", "127.0.0.1", "--port", "{port}", "--no-bettertransformer",
        "--served-model-name", "peer", "--log-level", "warning",
    ]  # fmt: skip
    litserve = [str(python), str(HERE / "litserve_peer.py"), str(model), "{port}", str(threads)]
    return [
        Server(
            "this service", gma, "/v1/documents", "text", str,
            {"GMA_PORT": "{port}", "GMA_CHECKPOINT": str(BOOKS.absolute()),
             "GMA_LOG_LEVEL": "WARNING"},
        ),
        Server("infinity", infinity, "/classify", "input", list, alone),
        Server("LitServe", litserve, "/predict", "text", str, alone),
    ]  # fmt: skip


def made(folder: Path) -> Path:
    """A Python that has the other servers. Raises CalledProcessError."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        progress("installing the other servers")
        venv.create(folder / "venv", with_pip=True)
        # torch first: another package would pull in one of its own choice.
        for what in (["torch==2.13.0"], ["-r", str(REQUIREMENTS)]):
            subprocess.run([python, "-m", "pip", "install", "-q", *what], check=True)  # noqa: S603
    return python


@contextmanager
def running(server: Server, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes], float]]:
    """The server, its URL, and when it was started; ended with all below it."""
    port = str(free_port())
    environment = {name: value.format(port=port) for name, value in server.environment.items()}
    with log.open("w") as told:
        began = time.monotonic()
        process = subprocess.Popen(  # noqa: S603 (our own command)
            [part.replace("{port}", port) for part in server.command],
            env=os.environ | environment,
            stdout=told,
            stderr=told,
        )
        below: set[int] = set()
        try:
            yield f"http://127.0.0.1:{port}", process, began
        finally:
            below |= family(process.pid).keys()
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=STOP_S)
            for pid in below:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def proportional_megabytes(root: int) -> float:
    """Memory of a process and all below it, of which what several share counts once."""
    kilobytes = 0
    for pid in family(root):
        with suppress(OSError):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            if found := re.search(r"^Pss:\s*(\d+) kB", rollup, re.MULTILINE):
                kilobytes += int(found[1])
    return kilobytes / 1024


class Asking:
    """A client of one server."""

    def __init__(self, server: Server, http: aiohttp.ClientSession) -> None:
        self._server = server
        self._http = http

    async def answer(self, text: str) -> tuple[int, Any]:
        """The status, and what was said of the text."""
        asked = self._server.asked(text)
        headers = {"content-type": "application/json"}
        async with self._http.post(self._server.path, data=asked, headers=headers) as response:
            said = await response.read()
        try:
            return response.status, json.loads(said)
        except ValueError:
            return response.status, said.decode(errors="replace")

    async def until_ready(self, process: subprocess.Popen[bytes], began: float) -> float:
        """Seconds from its start until it answers."""
        while True:
            if process.poll() is not None or time.monotonic() - began > READY_S:
                raise SystemExit(f"{self._server.name} did not start: see its log")
            with suppress(aiohttp.ClientError):
                if (await self.answer(TEXT))[0] == 200:
                    return time.monotonic() - began
            await asyncio.sleep(LOOK_S)

    async def load(self, at_once: int, seconds: float) -> tuple[float, float]:
        """Texts a second of a closed loop, and the 99th percentile of their milliseconds."""
        took: list[float] = []
        end = time.monotonic() + seconds

        async def one_after_the_other() -> None:
            while (began := time.monotonic()) < end:
                status, said = await self.answer(TEXT)
                if status != 200:
                    raise SystemExit(f"{self._server.name}: {status} {said}")
                took.append(time.monotonic() - began)

        began = time.monotonic()
        await asyncio.gather(*(one_after_the_other() for _ in range(at_once)))
        return len(took) / (time.monotonic() - began), 1000 * sorted(took)[int(0.99 * len(took))]

    async def book(self, book: str) -> tuple[float, str]:
        """Seconds, and what became of the book: how far what it says changes the scores."""
        began = time.monotonic()
        status, said = await self.answer(book)
        seconds = time.monotonic() - began
        if status != 200 and len(book) > BEGIN:
            _, became = await self.book(book[: len(book) // 2])
            return seconds, f"{status}; its half: {became}"
        if status != 200:
            return seconds, f"{status}"
        _, half = await self.answer(book[: len(book) // 2])
        _, begin = await self.answer(book[:BEGIN])
        if scores_of(said) == scores_of(begin):
            return seconds, "read no further than 4 KB, unsaid"
        return seconds, "read to its middle" if scores_of(said) == scores_of(half) else "read whole"


def scores_of(said: Any) -> list[float]:
    """All scores of an answer, in its order, as far as two runs of one text agree."""
    if isinstance(said, Mapping):
        own = [round(float(said["score"]), 4)] if "score" in said else []
        return own + [
            x for name, each in said.items() if name != "score" for x in scores_of(each)
            if name in ("scores", "data", "label")
        ]  # fmt: skip
    return [x for each in said for x in scores_of(each)] if isinstance(said, list) else []


async def measure(
    server: Server, found: Figures, log: Path, book: str, *, at_once: int, seconds: float
) -> None:
    with running(server, log) as (url, process, began):
        limits = aiohttp.TCPConnector(limit=at_once)
        patience = aiohttp.ClientTimeout(total=PATIENCE_S)
        async with aiohttp.ClientSession(url, connector=limits, timeout=patience) as http:
            asking = Asking(server, http)
            found.ready_s.append(await asking.until_ready(process, began))
            await asking.load(at_once, seconds / 4)  # what is slow only once
            rate, p99 = await asking.load(at_once, seconds)
            found.texts_a_second.append(rate)
            found.p99_ms.append(p99)
            took, found.book = await asking.book(book)
            found.book_s.append(took)
            found.megabytes.append(proportional_megabytes(process.pid))
    progress(f"{server.name}: {found}")


def table(figures: Mapping[str, Figures]) -> str:
    """The report, as Markdown: medians of the rounds."""
    header = [
        "server", "ready after, s", "short texts a second", "p99, ms", "the book, s",
        "which was", "memory, MB",
    ]  # fmt: skip
    rows = [
        [
            name,
            f"{median(each.ready_s):.1f}",
            f"{median(each.texts_a_second):,.0f}",
            f"{median(each.p99_ms):,.0f}",
            f"{median(each.book_s):.2f}",
            each.book,
            f"{median(each.megabytes):,.0f}",
        ]
        for name, each in figures.items()
    ]
    return markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--book", type=Path, required=True, help="a text of 270 KB or so")
    parser.add_argument("--out", type=Path, default=Path("build/peers"))
    parser.add_argument("--python", type=Path, help="one that has infinity and LitServe")
    parser.add_argument("--at-once", type=int, default=16, help="connections")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a load")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    python = (arguments.python or made(arguments.out)).absolute()
    model = (arguments.out / "model").absolute()
    subprocess.run(  # noqa: S603 (our own command)
        [python, HERE / "random_bert.py", BOOKS.absolute(), model], check=True
    )
    book = arguments.book.read_text(encoding="utf-8")
    asked = servers(python, model, os.cpu_count() or 1)
    figures = {server.name: Figures() for server in asked}
    for turn in range(arguments.rounds):
        for server in asked:
            log = arguments.out / f"{server.name.replace(' ', '-')}-{turn}.log"
            asyncio.run(
                measure(
                    server,
                    figures[server.name],
                    log,
                    book,
                    at_once=arguments.at_once,
                    seconds=arguments.seconds,
                )
            )
    print(f"{os.cpu_count()} cores; a book of {len(book.encode()):,} bytes\n")
    print(table(figures))


if __name__ == "__main__":
    main()
