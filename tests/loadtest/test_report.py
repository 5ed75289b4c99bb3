"""What a trial is made into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gma.loadtest.client import Outcome
from gma.loadtest.page import page, sweep_page
from gma.loadtest.report import Report, report
from gma.loadtest.server import Reading, quantile, stages
from gma.loadtest.slo import Slo
from gma.loadtest.trial import Load, Sample, Trial
from tests.loadtest.server import METRICS

WARM_S = 10.0


def outcome(due: float, seconds: float, size: int = 1000, error: str | None = None) -> Outcome:
    return Outcome(
        due=WARM_S + due,
        bytes=size,
        sent=WARM_S + due + 0.001,
        first=WARM_S + due + seconds / 2,
        ended=WARM_S + due + seconds,
        tokens=0 if error else size // 4,
        timing_ms={} if error else {"queue": 20.0, "total": 1e3 * seconds},
        error=error,
    )


OUTCOMES = [
    outcome(-5.0, 60.0),  # of the warm-up
    *(outcome(i / 10, 0.1) for i in range(98)),
    outcome(5.0, 3.0),
    outcome(9.0, 0.2, error="429"),
    outcome(2.0, 8.0, size=10_000_000),
]


def trial(outcomes: list[Outcome] = OUTCOMES, **changes: Any) -> Trial:
    given: dict[str, Any] = {"url": "http://x", "lengths": "mixed", "seconds": 10.0}
    load = Load(**(given | {"warm_s": WARM_S, "rate": 10.0, "key": "secret"} | changes))
    early = Reading.parse(METRICS.format(count=100, sum=5.0))
    late = Reading.parse(METRICS.format(count=300, sum=45.0))
    samples = [Sample(at, 3.0, {"gateway": 1e8}) for at in (9.0, 11.0, 13.0)]
    return Trial(load, 0.0, outcomes, early, late, samples)


@pytest.fixture
def found() -> Report:
    return report(trial(), [Slo.parse("short:p98<=1s"), Slo.parse("p99<=1s")])


class TestReport:
    def test_rates(self, found: Report) -> None:
        assert found.seconds == 10.0
        assert found.offered.documents == pytest.approx(10.1)
        assert found.throughput.documents == pytest.approx(10.0)
        assert found.throughput.bytes == pytest.approx((99 * 1000 + 10_000_000) / 10)
        assert found.throughput.tokens == pytest.approx((99 * 250 + 2_500_000) / 10)

    def test_throughput_counts_the_time_until_the_last_answer(self) -> None:
        found = report(trial([outcome(0, 0.1), outcome(9.0, 11.0)]), [])
        assert found.seconds == pytest.approx(20.0)
        assert found.throughput.documents == pytest.approx(2 / 20)

    def test_goodput_is_of_documents_in_the_time_of_each_slo(self, found: Report) -> None:
        assert found.goodput == pytest.approx(98 / 10)
        assert found.good == pytest.approx(98 / 101)

    def test_slos(self, found: Report) -> None:
        assert [(kept.slo, kept.met) for kept in found.slos] == [
            ("short:p98<=1s", True),
            ("p99<=1s", False),
        ]
        assert [kept.seconds for kept in found.slos] == pytest.approx([0.1, 8.0])
        assert not found.met

    def test_latency_by_band(self, found: Report) -> None:
        assert list(found.latency) == ["short", "huge", "all"]
        short = found.latency["short"]
        assert short.documents == 99
        assert short.quantiles["p50"] == pytest.approx(0.1)
        assert short.quantiles["p99.9"] == short.max == pytest.approx(3.0)
        assert found.latency["huge"].quantiles["p50"] == pytest.approx(8.0)

    def test_errors(self, found: Report) -> None:
        assert found.errors == {"429": 1}

    def test_tells_how_late_the_client_was(self, found: Report) -> None:
        assert found.late_s == pytest.approx(0.001)

    def test_first_line_only_where_progress_was_asked_for(self, found: Report) -> None:
        assert found.first_line is None
        progress = report(trial(ndjson=True), []).first_line
        assert progress
        assert progress.quantiles["p50"] == pytest.approx(0.05)

    def test_the_servers_times_and_memory(self, found: Report) -> None:
        assert found.answers["queue"].quantiles["p99"] == pytest.approx(0.02)
        stage = found.stages["gma_queue_seconds"]
        assert stage.count == 200
        assert stage.mean == pytest.approx(0.2)
        assert found.peak_memory == {
            "gma_resident_memory_peak_bytes": {"gateway": 3e8, "worker": 4e8}
        }

    def test_timeline(self, found: Report) -> None:
        assert sum(each.offered for each in found.timeline) * 10 / 60 == pytest.approx(101)
        assert max(each.p99 or 0 for each in found.timeline) == pytest.approx(8.0)

    def test_json_has_no_key_and_nothing_that_is_not_json(self, found: Report) -> None:
        text = json.dumps(found.as_dict(), allow_nan=False)
        assert "secret" not in text
        assert json.loads(text)["latency"]["all"]["documents"] == 100

    def test_a_closed_loop_is_called_one(self, found: Report) -> None:
        assert found.as_dict()["load"]["profile"] == "poisson"
        load = report(trial(at_once=3), []).as_dict()["load"]
        assert (load["profile"], load["rate"], load["at_once"]) == ("closed", None, 3)

    def test_of_nothing_but_errors(self) -> None:
        found = report(trial([outcome(0, 0.1, error="503")]), [Slo.parse("p99<=1s")])
        assert (found.met, found.goodput, found.latency) == (False, 0.0, {})
        assert found.slos[0].seconds is None
        json.dumps(found.as_dict(), allow_nan=False)
        assert "nothing to show" in page(found)


class TestPage:
    def test_has_everything_in_itself(self, found: Report) -> None:
        html = page(found)
        assert html.count("<svg") == html.count("</svg>") == 5
        for outside in ("<script", "<link", "<img", "@import", "src=", "url("):
            assert outside not in html
        assert "http://" not in html.replace("http://x", "")

    def test_shows_what_was_found(self, found: Report) -> None:
        html = page(found)
        for shown in ("p99.9", "huge", "429", "missed", "gma_queue_seconds", "8.000", "worker"):
            assert shown in html
        assert "closed loop" not in html.lower()

    def test_warns_of_a_closed_loop(self) -> None:
        assert "A closed loop hides stalls" in page(report(trial(at_once=3), []))

    def test_escapes(self) -> None:
        corpus = Path("<b>.jsonl")
        assert "<b>.jsonl" not in page(report(trial(corpus=corpus), []))

    def test_of_a_sweep(self, found: Report) -> None:
        html = sweep_page([found, report(trial(rate=5.0), [])], 10.0)
        assert html.count("<svg") == 7
        assert "10 documents a second" in html
        assert "none of the rates tried" in sweep_page([found], None)


class TestServersText:
    def test_quantiles_lie_evenly_within_buckets(self) -> None:
        buckets = {0.1: 50.0, 0.2: 100.0, float("inf"): 110.0}
        assert quantile(buckets, 0.5) == pytest.approx(0.11)
        assert quantile(buckets, 0.99) == 0.2  # it is above, and nobody knows how far

    def test_sums_over_labels(self) -> None:
        text = (
            'a_seconds_bucket{route="x",le="1.0"} %d\na_seconds_bucket{route="y",le="1.0"} %d\n'
            'a_seconds_bucket{route="x",le="+Inf"} %d\na_seconds_sum %d\n'
        )
        early, late = Reading.parse(text % (0, 0, 0, 0)), Reading.parse(text % (3, 4, 7, 14))
        assert stages(early, late)["a_seconds"].mean == 2
        assert early.buckets["a_seconds"][1.0] == 0
        assert late.buckets["a_seconds"][1.0] == 7


class TestReading:
    def test_sums_over_labels_and_the_largest_process_of_a_role(self) -> None:
        found = Reading.parse(
            "# HELP gma_tokens_total Of documents.\n# TYPE gma_tokens_total counter\n"
            'gma_tokens_total{pid="1"} 2.0\ngma_tokens_total{pid="2"} 3.0\n'
            'gma_peak_bytes{role="a",why="\\"}"} 5 1700000000000\ngma_peak_bytes{role="a"} 7\n'
        )
        assert found.sums["gma_tokens_total"] == 5.0
        assert found.by_role["gma_peak_bytes"] == {"a": 7.0}

    def test_what_is_not_prometheus_text(self) -> None:
        with pytest.raises(ValueError, match="invalid metric name"):
            Reading.parse("<html>no metrics here</html>")
