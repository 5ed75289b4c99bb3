"""Kill workers, gateways and Redis at random while clients append, and count what was lost.

    python -m tests.attack.sessions --kills 100 --store redis

starts `gma serve` with two workers, a tiny model and a store of sessions, and prints a table. Ends
with status 1 unless every byte that was acknowledged is in its session, every answer is the right
one, at most one request in a hundred was answered by an error, each of those may be sent again, no
client gave up, and everything was replaced each time.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import pytest
import torch

from gma import Answer, Classifier, Client, ServiceError, Session
from gma.model.reader import CHUNK
from gma.service.client import client as asking
from gma.service.client.error import ConnectionLost
from gma.service.client.exchange import Exchange, Request
from tests.attack.kills import CLIENTS, MOST_ERRORS, PATIENCE_S, ROLES, kill_one, serving, summary
from tests.service.asgi import TEXT, save_checkpoint
from tests.service.sessions.client import whole
from tests.service.sessions.redis import RedisServer

STORES = "directory", "redis"
QUIET_S = 2.0  # between two kills at most, unless the one killed before has to be replaced first
PAUSE_S = 0.05  # of a client, or nothing would be left of the cores for what is replaced
KEPT = 8  # sessions of a client
MOST_BYTES = 8_000  # of a session

SETTINGS = {"chunk_tokens": CHUNK, "log_level": "WARNING"}

CONTINUING = bytes(range(0x80, 0xC0))
"""Bytes that are in the middle of a character."""

SOURCES = [
    TEXT.encode(),
    "All of it — né à Brest, 漢字 and 🚢 — went down to the sea.\r\n".encode(),
    b"Neither party may assign this agreement. It ends on 1 May.\n\n    ",
]


@dataclass
class Written:
    """A session, what of its text was acknowledged, and what comes next."""

    session: Session
    data: bytes = b""
    rest: bytes = b""
    unsure: int = 0
    """Bytes of `rest` that may be there too: their append was given up."""

    def piece(self, size: int, choice: random.Random) -> bytes:
        """The next so many bytes."""
        while len(self.rest) < size:
            self.rest += choice.choice(SOURCES)
        return self.rest[:size]

    def take(self, offset: int) -> None:
        """It has so many bytes now."""
        size = offset - len(self.data)
        self.data, self.rest = self.data + self.rest[:size], self.rest[size:]
        self.unsure = 0

    def other(self, session: Session) -> Written:
        """One with the same past, whose text goes on otherwise at the next character."""
        after = self.rest.lstrip(CONTINUING)
        return Written(session, self.data, self.rest[: len(self.rest) - len(after)])


@dataclass
class Seen:
    """What clients have seen."""

    requests: Counter[str] = field(default_factory=Counter)
    """Each attempt, by what came of it."""

    done: Counter[str] = field(default_factory=Counter)
    """What clients did, by its name."""

    acknowledged: int = 0
    lost: int = 0
    compared: int = 0
    wrong: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)


class Clients:
    """Some, each with sessions of its own, that know what is right."""

    def __init__(self, url: str, checkpoint: Path) -> None:
        self._url = url
        self._right = Classifier.load(checkpoint, device="cpu")
        self._stop = threading.Event()
        self._counting = threading.Condition()
        self.seen = Seen()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Meanwhile they append. In the end each looks for all that it was acknowledged."""
        clients = [threading.Thread(target=self._run, args=(n,)) for n in range(CLIENTS)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asking, "Exchange", self._watched())
            for client in clients:
                client.start()
            try:
                yield
            finally:
                self._stop.set()
                for client in clients:
                    client.join()

    def compared(self, answers: int) -> None:
        """Return once so many were compared. Raises TimeoutError."""
        with self._counting:
            if not self._counting.wait_for(lambda: self.seen.compared >= answers, PATIENCE_S):
                raise TimeoutError(f"{self.seen.compared} answers, not {answers}")

    def _watched(self) -> type[Exchange]:
        """Exchanges whose outcomes are counted."""
        clients = self

        class Watched(Exchange):
            async def begin(self, request: Request, deadline_s: float | None = None) -> None:
                try:
                    await super().begin(request, deadline_s)
                    await self.read()
                except (ServiceError, ConnectionLost) as error:
                    clients.count(outcome(request.method, error))
                    raise
                clients.count("answered")

        return Watched

    def count(self, what: str) -> None:
        with self._counting:
            self.seen.requests[what] += 1

    def _run(self, number: int) -> None:
        choice, kept = random.Random(number), list[Written]()
        with Client(self._url) as client:
            while not self._stop.is_set():
                self._try(partial(self._act, client, kept, choice))
                self._stop.wait(PAUSE_S)
            for each in kept:
                self._try(partial(self.look, client, each))

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except (ServiceError, OSError) as error:
            with self._counting:
                self.seen.given_up.append(f"{type(error).__name__}: {error}")

    def _act(self, client: Client, kept: list[Written], choice: random.Random) -> None:
        """One thing that a client does."""
        acts: dict[Callable[[Client, Written, random.Random], Written | None], int] = {
            self._append: 16, self._answer: 2, self._return: 1, self._fork: 1, self._resume: 1
        }  # fmt: skip
        if not kept or choice.random() < 1 / 32:
            kept.append(Written(client.session()))
            return
        written = choice.choice(kept)
        (act,) = choice.choices([*acts], [*acts.values()])
        if new := act(client, written, choice):
            kept.append(new)
        with self._counting:
            self.seen.done[act.__name__.strip("_")] += 1
        if len(kept) > KEPT or len(written.data) > MOST_BYTES:
            kept.remove(written)
            self.look(client, written)
            written.session.delete()

    def _append(self, client: Client, written: Written, choice: random.Random) -> None:
        piece = written.piece(int(2 ** choice.uniform(0, 11)), choice)
        before = written.session.offset
        try:
            answer = written.session.append(piece)
        except (ServiceError, OSError):
            written.take(written.session.offset)
            written.unsure = before + len(piece) - written.session.offset
            written.session = client.session(written.session.id)
            self._check_offset(written)
            raise
        written.take(before + len(piece))
        with self._counting:
            self.seen.acknowledged += len(piece)
        self._compare(answer, written)

    def _answer(self, _client: Client, written: Written, _choice: random.Random) -> None:
        self._compare(written.session.answer(), written)

    def _return(self, client: Client, written: Written, _choice: random.Random) -> None:
        written.session = client.session(written.session.id)
        self._check_offset(written)

    def _fork(self, _client: Client, written: Written, _choice: random.Random) -> Written:
        return written.other(written.session.fork())

    def _resume(self, client: Client, written: Written, _choice: random.Random) -> Written:
        return written.other(client.resume(written.session.snapshot()))

    def look(self, client: Client, written: Written) -> None:
        """Look for all of a session."""
        self._return(client, written, random.Random())
        self._answer(client, written, random.Random())

    def _check_offset(self, written: Written) -> None:
        offset = written.session.offset
        with self._counting:
            self.seen.lost += max(0, len(written.data) - offset)
            if offset > len(written.data) + written.unsure:
                self.seen.wrong.append(f"offset {offset}, not {len(written.data)}")
        written.take(max(offset, len(written.data)))

    def _compare(self, found: Answer, written: Written) -> None:
        """Compare an answer with the one that all of the text has in one piece, here, to the last
        bit."""
        text = whole(written.data).decode()
        if text:
            right = self._right.classify(text)
            same = (found.label, found.bytes, found.tokens, found.scores) == (
                right.label,
                right.bytes,
                right.tokens,
                right.scores,
            )
        else:
            same = not found.scores
        with self._counting:
            self.seen.compared += 1
            self._counting.notify_all()
            if not same:
                self.seen.wrong.append(f"{found.label} after {len(written.data)} bytes")


def outcome(method: str, error: ServiceError | ConnectionLost) -> str:
    """What is counted of an attempt that was not answered as it should be."""
    if isinstance(error, ConnectionLost):
        refused = isinstance(error.__cause__, aiohttp.ClientConnectorError)
        return "refused" if refused else "lost"
    if error.status == 409 or (error.status >= 500 and error.retry_after_s is not None):
        return str(error.status)
    if (method, error.status) == ("DELETE", 404):
        return "deleted before"  # and the answer was lost; what is deleted was there
    return f"unexpected {error.status} {error.error_type}"


def kill(
    url: str, redis: RedisServer | None, kills: int, most_s: float, choice: random.Random
) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds until each that was killed was replaced, by role, and what was not. One of a role is
    killed when all of it are there, whatever becomes of the others meanwhile; nobody is after
    `most_s` seconds."""
    roles = [*ROLES, *(["redis"] if redis else [])]
    killed: dict[str, list[Future[float]]] = {role: [] for role in roles}
    ends = time.monotonic() + most_s

    def kill_redis() -> float:
        assert redis
        begun = time.monotonic()
        redis.kill()
        return time.monotonic() - begun

    with ThreadPoolExecutor(len(roles)) as pool:
        for number in range(kills):
            time.sleep(choice.uniform(0, QUIET_S))
            role = choice.choice(roles)
            if killed[role]:
                wait(killed[role][-1:])
            if time.monotonic() > ends:
                break
            sys.stderr.write(f"{number + 1} of {kills}: {role}\n")
            act = kill_redis if role == "redis" else partial(kill_one, url, role, choice)
            killed[role].append(pool.submit(act))
    replaced = {
        role: [each.result() for each in all_ if not each.exception()]
        for role, all_ in killed.items()
    }
    ended = [each.exception() for all_ in killed.values() for each in all_]
    return replaced, [str(error) for error in ended if error]


def run(kills: int, seed: int, store: str, minutes: float = math.inf) -> dict[str, Any]:
    """What happened, as a report."""
    torch.set_num_threads(1)
    choice = random.Random(seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="s-", dir="/tmp")))
        where, redis = str(folder / "sessions"), None
        if store == "redis":
            redis = RedisServer(folder / "redis")
            stack.callback(redis.stop)
            where = redis.url
        checkpoint = save_checkpoint(folder / "checkpoint")
        settings = {**SETTINGS, "checkpoint": checkpoint, "sessions": where}
        url = stack.enter_context(serving(folder, **settings))
        clients = Clients(url, checkpoint)
        with clients.running():
            replaced, not_replaced = kill(url, redis, kills, 60 * minutes, choice)
        seen = clients.seen
    return {
        "store": store,
        "requests": seen.requests.total(),
        "outcomes": dict(seen.requests),
        "done": dict(seen.done),
        "acknowledged bytes": seen.acknowledged,
        "acknowledged bytes lost": seen.lost,
        "answers compared": seen.compared,
        "wrong": seen.wrong,
        "given up": seen.given_up,
        "not replaced": not_replaced,
        "replaced, s": summary(replaced),
    }


def failures(report: Mapping[str, Any]) -> list[str]:
    """What must not be in a report, and is."""
    outcomes: Mapping[str, int] = report["outcomes"]
    errors = {name: count for name, count in outcomes.items() if name.isdigit() and name != "409"}
    again = sum(errors.values()) + outcomes.get("lost", 0)
    found = [f"{count} {name}" for name, count in outcomes.items() if name.startswith("unexpected")]
    if outcomes.get("409", 0) > again:
        found.append("409 without a reason")
    if sum(errors.values()) > MOST_ERRORS * report["requests"]:
        found.append(f"{sum(errors.values()) / report['requests']:.2%} of requests failed")
    if lost := report["acknowledged bytes lost"]:
        found.append(f"{lost} acknowledged bytes lost")
    return [*found, *report["wrong"], *report["given up"], *report["not replaced"]]


def table(report: Mapping[str, Any]) -> str:
    """A report as Markdown."""

    def shown(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {shown(each)}" for name, each in value.items())
        if isinstance(value, list):
            return str(len(value))
        return f"{value:,}" if isinstance(value, int | float) else str(value)

    rows = [f"| {name} | {shown(value)} |" for name, value in report.items()]
    return "\n".join(["| | |", "|---|---|", *rows]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=math.inf, help="kill nobody after these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", choices=STORES, default="directory")
    options = parser.parse_args(arguments)
    report = run(options.kills, options.seed, options.store, options.minutes)
    sys.stdout.write(table(report))
    found = failures(report)
    told = Counter(found)
    sys.stderr.write("".join(f"{count}: {each}\n" for each, count in told.most_common()))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
