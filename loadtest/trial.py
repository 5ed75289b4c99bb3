"""One load on a service, from several client processes, while its metrics are watched."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gma.loadtest import server
from gma.loadtest.arrivals import arrivals
from gma.loadtest.client import Outcome, Plan

HEAD_START_S = 0.5
"""Seconds from when all clients are ready to the beginning."""

SAMPLE_PERIOD_S = 2.0
IN_FLIGHT = "gma_documents_in_flight"
RESIDENT = "gma_resident_memory_bytes"


class TrialError(OSError):
    """The load could not be made, whatever the server."""


@dataclass(frozen=True)
class Load:
    """What is sent, and when."""

    url: str
    corpus: Path | None = None  # None: made-up text
    lengths: str | None = None  # None: whole documents
    profile: str = "poisson"
    rate: float = 1.0  # documents a second; of a ramp, at its end
    at_once: int = 0  # not 0: a closed loop of so many, whatever profile and rate
    seconds: float = 30.0
    warm_s: float = 0.0  # before these, and not reported
    ndjson: bool = False
    timeout_s: float = 600.0
    processes: int = 1
    seed: int = 0
    key: str | None = field(default=None, repr=False)

    def plans(self) -> list[Plan]:
        """A plan for each client process; the documents go to them in turn. Raises ValueError."""
        total = self.warm_s + self.seconds
        dues = [] if self.at_once else arrivals(self.profile, self.rate, total, self.seed)
        shares = [
            self.at_once // self.processes + (i < self.at_once % self.processes)
            for i in range(self.processes)
        ]
        return [
            Plan(
                url=self.url,
                corpus=None if self.corpus is None else str(self.corpus),
                lengths=self.lengths,
                seed=self.seed,
                first=i,
                step=self.processes,
                dues=dues[i :: self.processes],
                at_once=share,
                seconds=total,
                ndjson=self.ndjson,
                timeout_s=self.timeout_s,
                key=self.key,
            )
            for i, share in enumerate(shares)
        ]


@dataclass(frozen=True)
class Sample:
    """The server at one moment of the trial."""

    at: float  # seconds from the beginning
    in_flight: float | None
    resident: dict[str, float]  # bytes, by role


@dataclass(frozen=True)
class Trial:
    """A load, and all that came of it. Times count from the beginning of the warm-up."""

    load: Load
    began: float  # seconds since 1970
    outcomes: list[Outcome]
    before: server.Reading | None  # at the end of the warm-up
    after: server.Reading | None
    samples: list[Sample]


def run(load: Load) -> Trial:
    """Send the whole load and wait for every answer. Raises ValueError, OSError or TrialError."""
    with tempfile.TemporaryDirectory(prefix="loadtest-") as folder, ExitStack() as stack:
        outs = [Path(folder) / f"{i}.jsonl" for i in range(load.processes)]
        clients = [
            stack.enter_context(_client(plan, out))
            for plan, out in zip(load.plans(), outs, strict=True)
        ]
        for client in clients:
            _await_ready(client)
        begin, began = time.monotonic() + HEAD_START_S, time.time() + HEAD_START_S
        for client in clients:
            assert client.stdin
            client.stdin.write(f"{begin}\n")
            client.stdin.flush()
        _sleep_until(begin + load.warm_s)
        before = server.scrape(load.url)
        samples = list(_samples(load.url, begin, clients)) if before else []
        if any(client.wait() for client in clients):
            raise TrialError("a client process failed: see above")
        after = server.scrape(load.url)
        outcomes = [Outcome(**json.loads(line)) for out in outs for line in _lines(out)]
    outcomes.sort(key=lambda outcome: outcome.due)
    return Trial(load, began, outcomes, before, after, samples)


@contextmanager
def _client(plan: Plan, out: Path) -> Iterator[subprocess.Popen[str]]:
    plan_file = out.with_suffix(".plan.json")
    plan_file.write_text(json.dumps(asdict(plan)), encoding="utf-8")
    command = [sys.executable, "-m", "gma.loadtest.client", str(plan_file), str(out)]
    with subprocess.Popen(  # noqa: S603 (our own command)
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def _await_ready(client: subprocess.Popen[str]) -> None:
    assert client.stdout
    if client.stdout.readline() != "ready\n":
        raise TrialError("a client process did not start: see above")


def _samples(url: str, begin: float, clients: list[subprocess.Popen[str]]) -> Iterator[Sample]:
    """The server every two seconds, until all clients have ended."""
    while any(client.poll() is None for client in clients):
        due = time.monotonic() + SAMPLE_PERIOD_S
        if reading := server.scrape(url):
            resident = dict(reading.by_role.get(RESIDENT, {}))
            yield Sample(time.monotonic() - begin, reading.sums.get(IN_FLIGHT), resident)
        while time.monotonic() < due and any(client.poll() is None for client in clients):
            time.sleep(0.05)


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()
