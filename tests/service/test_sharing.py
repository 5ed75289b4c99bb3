"""Metrics of processes that come and go: nothing is lost or counted twice, and files stay few."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from gma.service.observe import metrics, sharing

COUNT = """
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from gma.service.observe import sharing
sharing.join(Path(sys.argv[1]))
from gma.service.observe import metrics
metrics.TOKENS.labels("a").inc(int(sys.argv[2]))
metrics.STEP_SECONDS.labels("a").observe(0.03)
metrics.SLOTS.labels("a").set(5)
print("counted", flush=True)
sys.stdin.read()
"""

KINDS = {"counter": ("x_total", {}), "histogram": ("x_bucket", {"le": "1.0"})}


@cache
def written(kind: str, value: float) -> bytes:
    """The file of a process with one number."""
    name, labels = KINDS[kind]
    with TemporaryDirectory() as folder:
        file: Any = MmapedDict(f"{folder}/x.db")  # type: ignore[no-untyped-call]
        file.write_value(mmap_key("x", name, list(labels), list(labels.values()), "X."), value, 0.0)
        file.close()
        return Path(f"{folder}/x.db").read_bytes()[:256]


def count(folder: Path, pid: int, value: float) -> None:
    """What a process that ended has left: `value` in a counter and in a bucket."""
    for kind in KINDS:
        (folder / f"{kind}_{pid}.db").write_bytes(written(kind, value))
    (folder / f"gauge_livesum_{pid}.db").touch()
    (folder / f"{pid}.alive").touch()


def told(folder: Path) -> dict[str, float]:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]
    with sharing.alone(folder):
        sharing.add_ended(folder)
        text = generate_latest(registry).decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


@pytest.mark.parametrize("restarts", [500, pytest.param(10_000, marks=pytest.mark.long)])
def test_many_restarts_leave_few_files_and_the_whole_sum(tmp_path: Path, restarts: int) -> None:
    for pid in range(1, restarts + 1):
        count(tmp_path, 100_000 + pid, 1.0)
        if pid % 100 == 0:
            told(tmp_path)
            assert len(list(tmp_path.iterdir())) == 3
    found = told(tmp_path)
    assert found["x_total"] == found['x_bucket{le="1.0"}'] == restarts


class Died(Exception):
    """Stands for the end of a process, at any point."""


def dying(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Have this process die at its so manieth change of a file."""
    left = iter(range(after))

    def mortal(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            if next(left, None) is None:
                raise Died
            return change(*arguments, **options)

        return changed

    for name in ("rename", "unlink"):
        monkeypatch.setattr(Path, name, mortal(getattr(Path, name)))


@pytest.mark.parametrize("after", range(25))
def test_whoever_adds_may_die_at_any_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    count(tmp_path, 900_001, 1.0)
    told(tmp_path)
    count(tmp_path, 900_002, 2.0)
    count(tmp_path, 900_003, 4.0)
    with monkeypatch.context() as patch:
        dying(patch, after)
        try:
            told(tmp_path)
        except Died:
            assert after < 24
    count(tmp_path, 900_004, 8.0)
    found = told(tmp_path)
    assert found["x_total"] == found['x_bucket{le="1.0"}'] == 15
    assert len(list(tmp_path.iterdir())) == 3


@pytest.fixture
def counting(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has counted 3 tokens, and lives."""
    command = [sys.executable, "-c", COUNT, str(tmp_path), "3"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "counted\n"
        yield process
        process.kill()


@pytest.fixture
def scraped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    monkeypatch.setenv(sharing.DIRECTORY, str(tmp_path))
    return lambda: metrics.scrape().decode().splitlines()


def test_a_process_that_lives_keeps_its_own_files(
    counting: subprocess.Popen[str], scraped: Callable[[], list[str]], tmp_path: Path
) -> None:
    told = {'gma_tokens_total{model="a"} 3.0', 'gma_slots{model="a"} 5.0'}
    assert told <= set(scraped())
    assert (tmp_path / f"counter_{counting.pid}.db").exists()


def test_what_a_killed_process_counted_stays_and_its_gauges_go(
    counting: subprocess.Popen[str], scraped: Callable[[], list[str]], tmp_path: Path
) -> None:
    counting.kill()
    counting.wait()
    for _ in range(2):
        lines = scraped()
        assert 'gma_tokens_total{model="a"} 3.0' in lines
        assert 'gma_step_seconds_count{model="a"} 1.0' in lines
        assert not any(line.startswith("gma_slots{") for line in lines)
    assert not list(tmp_path.glob(f"*{counting.pid}*"))


def test_an_id_that_is_anothers_by_now(tmp_path: Path) -> None:
    """Process 1 lives, and is root's, but never joined: the files are of one that ended."""
    count(tmp_path, 1, 7.0)
    assert told(tmp_path) == {"x_total": 7.0, 'x_bucket{le="1.0"}': 7.0, "x_count": 7.0}
    assert not (tmp_path / "gauge_livesum_1.db").exists()


def test_a_file_that_was_cut_short_costs_only_itself(tmp_path: Path) -> None:
    count(tmp_path, 900_001, 1.0)
    count(tmp_path, 900_002, 2.0)
    (tmp_path / "counter_900002.db").write_bytes(b"")
    (tmp_path / "histogram_900001.db").write_bytes(b"\x40\0\0\0\0\0\0\0\xff\0\0\0")
    assert told(tmp_path) == {"x_total": 1.0, 'x_bucket{le="1.0"}': 2.0, "x_count": 2.0}


def test_nobody_else_looks_meanwhile(tmp_path: Path) -> None:
    with sharing.alone(tmp_path):
        other = os.open(tmp_path / "lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)


def test_clearing_leaves_what_is_not_ours(tmp_path: Path) -> None:
    count(tmp_path, 900_001, 1.0)
    told(tmp_path)
    count(tmp_path, 900_002, 1.0)
    (tmp_path / "notes.db").touch()
    sharing.prepare(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"notes.db", "lock"}
