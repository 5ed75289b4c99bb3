"""What the benchmarks of the overhead and of a busy service make of trials; none is started."""

from __future__ import annotations

import pytest

from benchmarks import busy, overhead
from loadtest.client import Outcome
from loadtest.report import Latency, Report, report
from loadtest.trial import Load, Trial


def found(*outcomes: Outcome) -> Report:
    load = Load("http://x", seconds=1.0)
    return report(Trial(load, 0.0, list(outcomes), None, None, []), [])


def test_overhead_table() -> None:
    latency = Latency.of([0.004, 0.005, 0.006])
    assert latency
    rows = [overhead.Row("HAProxy", name, 1, latency, 200.0, 0.002) for name in ("bare", "service")]
    lines = overhead.table(rows).splitlines()
    assert lines[2] == "| HAProxy | 1 | bare | 5.0 ms | 6.0 ms |  | 200 |"
    assert lines[3] == "| HAProxy | 1 | service | 5.0 ms | 6.0 ms | 2.0 ms | 200 |"


def test_the_bare_endpoint_answers_in_the_services_form() -> None:
    with overhead.bare() as url:
        rows = overhead.turns("none", {"bare": url}, at_once=2, seconds=0.5, rounds=1)
    assert [row.server for row in rows] == ["bare"]
    assert rows[0].latency.documents > 0


def test_overhead_stops_at_a_document_that_is_not_answered() -> None:
    with pytest.raises(SystemExit, match="gone: connection refused"):
        overhead.turns("none", {"gone": "http://127.0.0.1:9"}, at_once=1, seconds=0.2, rounds=1)


def test_busy_table() -> None:
    large = found(
        Outcome(0.0, 50, ended=3.0),
        *(Outcome(0.0, 50, ended=0.1, error="429") for _ in range(4)),
    )
    short = found(Outcome(0.0, 2, ended=0.5), Outcome(0.0, 2, ended=0.7))
    before, after = {"Worker": 500_000_000}, {"Worker": 600_000_000, "haproxy": 20_000_000}
    before["haproxy"] = 10_000_000
    table = busy.table([busy.Found("HAProxy", 5, large, short, before, after)])
    columns = "HAProxy | 5 | 1 | 4 429 | 2 / 0 | 0.50 / 0.70 s |  | 500 / 600 MB |  | 10 / 20 MB"
    assert table.splitlines()[2] == f"| {columns} |"
