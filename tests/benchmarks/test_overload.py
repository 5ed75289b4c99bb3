"""What the benchmarks of a service that is loaded make of trials; none is started."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import busy, overhead, soak
from benchmarks.processes import resident_bytes
from gma.loadtest.client import Outcome
from gma.loadtest.report import Latency, Report, report
from gma.loadtest.trial import Load, Trial


def found(*outcomes: Outcome) -> Report:
    load = Load("http://x", seconds=1.0)
    return report(Trial(load, 0.0, list(outcomes), None, None, []), [])


def test_overhead_table() -> None:
    latency = Latency.of([0.004, 0.005, 0.006])
    assert latency
    rows = [overhead.Row(name, 1, latency, 200.0, 0.002) for name in ("bare", "service")]
    lines = overhead.table(rows).splitlines()
    assert lines[2] == "| 1 | bare | 5.0 ms | 6.0 ms |  | 200 |"
    assert lines[3] == "| 1 | service | 5.0 ms | 6.0 ms | 2.0 ms | 200 |"


def test_the_bare_endpoint_answers_in_the_services_form() -> None:
    with overhead.bare() as url:
        rows = overhead.turns({"bare": url}, at_once=2, seconds=0.2, rounds=1)
    assert [row.server for row in rows] == ["bare"]
    assert rows[0].latency.documents > 0


def test_overhead_stops_at_a_document_that_is_not_answered() -> None:
    with pytest.raises(SystemExit, match="gone: connection refused"):
        overhead.turns({"gone": "http://127.0.0.1:9"}, at_once=1, seconds=0.2, rounds=1)


def test_busy_table() -> None:
    large = found(
        Outcome(0.0, 50, ended=3.0),
        *(Outcome(0.0, 50, ended=0.1, error="429") for _ in range(4)),
    )
    short = found(Outcome(0.0, 2, ended=0.5), Outcome(0.0, 2, ended=0.7))
    before, after = {"Worker": 500_000_000}, {"Worker": 600_000_000}
    table = busy.table([busy.Found(5, large, short, before, after)])
    columns = "5 | 1 | 4 429 | 2 / 0 | 0.50 / 0.70 s |  | 500 / 600 MB"
    assert table.splitlines()[2] == f"| {columns} |"


def test_soak_table() -> None:
    """Each row is a tenth of the time: here a second, after one of warm-up."""
    load = Load("http://x", seconds=10.0, warm_s=1.0)
    outcomes = [
        Outcome(0.5, 9, ended=9.0),  # in the warm-up
        Outcome(1.0, 9, ended=1.2),
        Outcome(1.9, 9, ended=2.3),
        Outcome(10.5, 9, ended=10.6, error="429"),
    ]
    trial = Trial(load, 1000.0, outcomes, None, None, [])
    samples = [(1001.0, {"Worker": 10**8}), (1001.5, {"Worker": 3 * 10**8, "python": 1})]
    lines = soak.table(trial, soak.Watch(samples=samples)).splitlines()
    assert lines[0] == "| from, s | documents | failed | p50 | p99 | Worker, MB |"
    assert lines[2] == "| 0 | 2 | 0 | 0.20 s | 0.40 s | 200 |"
    assert lines[11] == "| 9 | 1 | 1 | 0.00 s | 0.00 s | 0 |"


def test_a_watch_sees_the_processes_below_one() -> None:
    code = "import time; x = bytearray(50_000_000); print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        now = resident_bytes(process.pid, peak=False)
        most = resident_bytes(process.pid, peak=True)
        process.kill()
    assert 50e6 < now["other"] <= most["other"] < 200e6
