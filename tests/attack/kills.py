"""Kill gateways and workers at random under load, and count what clients see of it.

    python -m tests.attack.kills --kills 100

starts `gma serve` with two workers, and ends with status 1 unless no connection was refused, no
answer was wrong, at most one request in a hundred failed, and everything was replaced each time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest

from tests.service.running import PLAIN, free_port

ROLES = ("gateway", "worker")
PROCESSES = 2  # of each
PATIENCE_S = 300.0
CLIENTS = 4
QUIET_S = 5.0  # between one replacement and the next kill
MOST_ERRORS = 0.01

TEXTS = [f"{word} went down to the sea, and thought of {word}. " * 30 for word in ("He", "She")]


class Load:
    """Clients that send documents, each on a connection of its own, and know the right answers."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/v1/documents"
        self.outcomes: Counter[str] = Counter()
        self._right = [self._post(text).json() for text in TEXTS]
        self._stop = threading.Event()
        self._counting = threading.Lock()

    def _post(self, text: str) -> httpx.Response:
        with httpx.Client(trust_env=False, timeout=PATIENCE_S) as http:
            return http.post(self._url, content=text, headers=PLAIN)

    @contextmanager
    def running(self) -> Iterator[None]:
        clients = [threading.Thread(target=self._run, args=(n,)) for n in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            yield
        finally:
            self._stop.set()
            for client in clients:
                client.join()

    def _run(self, number: int) -> None:
        choice = random.Random(number)
        while not self._stop.is_set():
            outcome, wait_s = self._ask(choice.randrange(len(TEXTS)))
            with self._counting:
                self.outcomes[outcome] += 1
            self._stop.wait(wait_s)

    def _ask(self, which: int) -> tuple[str, float]:
        """What became of one document, and how long to wait before the next."""
        try:
            response = self._post(TEXTS[which])
        except httpx.ConnectError:
            return "refused", 0
        except httpx.TransportError:  # its gateway was killed with it
            return "lost", 0
        if response.status_code == 200:
            return "right" if _agree(response.json(), self._right[which]) else "wrong", 0
        if response.status_code == 503 and "retry-after" in response.headers:
            return "503", float(response.headers["retry-after"])
        return f"unexpected {response.status_code}", 0


def _agree(answer: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return all(
        answer.get(name) == right.get(name) for name in ("label", "labels", "usage")
    ) and all(
        now == pytest.approx(then, abs=1e-4)
        for now, then in zip(answer["scores"], right["scores"], strict=True)
    )


@contextmanager
def serving(temporary: Path, **settings: object) -> Iterator[str]:
    """The URL of a service of its own, with these settings besides."""
    port = free_port()
    settings = {"port": port, "workers": PROCESSES, "threads": 1, **settings}
    given = {f"GMA_{name.upper()}": str(value) for name, value in settings.items()}
    command = [str(Path(sys.executable).parent / "gma"), "serve"]
    environment = os.environ | given | {"TMPDIR": str(temporary)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline().startswith("Ready at"), "the service did not start"
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def processes(url: str) -> dict[str, list[int]]:
    """The ids of the processes of each role."""
    found: dict[str, list[int]] = {role: [] for role in ROLES}
    with suppress(httpx.TransportError):
        for line in httpx.get(
            f"{url}/metrics", timeout=PATIENCE_S, trust_env=False
        ).text.splitlines():
            if line.startswith("gma_resident_memory_bytes{"):
                for role in ROLES:
                    if f'role="{role}"' in line:
                        found[role].append(int(line.partition('pid="')[2].partition('"')[0]))
    return found


def kill_one(url: str, role: str, choice: random.Random) -> float:
    """Seconds until one of a role that is killed is replaced. Raises TimeoutError."""
    begun = time.monotonic()
    while not (there := processes(url)[role]):  # who was asked has just been killed
        if time.monotonic() - begun > PATIENCE_S:
            raise TimeoutError(f"nobody tells of a {role}")
    victim = choice.choice(there)
    os.kill(victim, signal.SIGKILL)
    begun = time.monotonic()
    while victim in (now := processes(url)[role]) or len(now) < PROCESSES:
        if time.monotonic() - begun > PATIENCE_S:
            raise TimeoutError(f"the {role} was not replaced")
        time.sleep(0.05)
    return time.monotonic() - begun


def summary(replaced: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Of the seconds that replacing took, by role."""
    return {
        role: {
            "count": len(all_s),
            "median": round(sorted(all_s)[len(all_s) // 2], 2),
            "most": round(max(all_s), 2),
        }
        for role, all_s in replaced.items()
        if all_s
    }


def run(kills: int, seed: int) -> dict[str, Any]:
    """What happened, as a report."""
    choice = random.Random(seed)
    replaced: dict[str, list[float]] = {role: [] for role in ROLES}
    with TemporaryDirectory(prefix="k-", dir="/tmp") as temporary, serving(Path(temporary)) as url:
        load = Load(url)
        with load.running():
            for _ in range(kills):
                time.sleep(QUIET_S)
                role = choice.choice(ROLES)
                replaced[role].append(kill_one(url, role, choice))
        files = len(list(Path(temporary).glob("*/metrics/*")))
    return {
        "requests": load.outcomes.total(),
        "outcomes": dict(load.outcomes),
        "replaced_s": summary(replaced),
        "metrics_files": files,
    }


def failures(report: Mapping[str, Any]) -> list[str]:
    """What must not be in a report, and is."""
    outcomes = report["outcomes"]
    allowed = ("right", "lost", "503")
    found = [f"{count} {name}" for name, count in outcomes.items() if name not in allowed]
    failed = report["requests"] - outcomes["right"]
    if failed > MOST_ERRORS * report["requests"]:
        found.append(f"{failed / report['requests']:.2%} of requests failed")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    report = run(options.kills, options.seed)
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    found = failures(report)
    sys.stderr.write("".join(f"{each}\n" for each in found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
