"""Reports as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from gma.drawing.page import Marked, table
from gma.drawing.page import page as html
from gma.drawing.plot import Axis, Line, short, svg
from gma.loadtest.report import QUANTILES, Latency, Report


def page(report: Report) -> str:
    """The page of one trial."""
    return html(f"Load test of {report.load.url}", _trial(report))


def sweep_page(reports: Sequence[Report], highest: float | None) -> str:
    """The page of a sweep, with the trial at the highest rate that met the SLOs, if one did."""
    ordered = sorted(reports, key=lambda report: report.load.rate)
    slos = ", ".join(kept.slo for kept in ordered[0].slos)
    found = f"{highest:.3g} documents a second" if highest else "none of the rates tried"
    parts = [
        f"<p>Highest rate that meets {escape(slos)}: <b>{found}</b>.</p>",
        table(
            ("offered a second", "answered", "good", "p50", "p99", "errors", ""),
            [
                (
                    f"{report.load.rate:.3g}",
                    f"{report.throughput.documents:.3g}",
                    f"{report.good:.1%}",
                    *(_all(report, name) for name in ("p50", "p99")),
                    sum(report.errors.values()),
                    _kept(report.met),
                )
                for report in ordered
            ],
        ),
        '<div class="plots">',
        svg(
            "Latency by offered rate, seconds",
            [
                Line(name, [(r.load.rate, _quantile(r.latency.get("all"), name)) for r in ordered])
                for name in ("p50", "p99")
            ],
            Axis("documents offered a second"),
            Axis("s", log=True),
        ),
        svg(
            "Documents a second by offered rate",
            [
                Line("answered", [(r.load.rate, r.throughput.documents) for r in ordered]),
                Line("good", [(r.load.rate, r.goodput) for r in ordered]),
            ],
            Axis("documents offered a second"),
            Axis("1/s"),
        ),
        "</div>",
    ]
    best = [report for report in ordered if report.load.rate == highest]
    if best:
        parts += [f"<h1>At {highest:.3g} a second</h1>", _trial(best[-1])]
    return html(f"Sweep of {ordered[0].load.url}", "".join(parts))


def _trial(report: Report) -> str:
    load = report.load
    kind = (
        f"closed loop of {load.at_once}"
        if load.at_once
        else f"{load.profile} arrivals, {load.rate:g} a second"
    )
    source = load.corpus.name if load.corpus else "made-up text"
    answer = "NDJSON" if load.ndjson else "plain answers"
    what = (
        f"{kind}; {source}, {load.lengths or 'whole documents'}; {answer}; {load.processes} client "
        f"processes; {load.seconds:g} s after {load.warm_s:g} s of warm-up, from {report.began}."
    )
    late = (
        f"Answered documents. The client began to send 99% of them within {report.late_s:.3f} s of "
        "their time: where that is much, the client is too slow, and more processes are needed."
    )
    parts = [
        f"<p>{escape(what)}</p>",
        _hides(report),
        table(
            ("a second", "documents", "bytes", "tokens"),
            [
                ("offered", *_rates(report.offered.documents, report.offered.bytes), ""),
                (
                    "answered",
                    *_rates(
                        report.throughput.documents,
                        report.throughput.bytes,
                        report.throughput.tokens,
                    ),
                ),
                ("good", *_rates(report.goodput), "", ""),
            ],
        ),
        "<h2>Objectives</h2>",
        table(
            ("SLO", "measured", ""),
            [
                (
                    kept.slo,
                    "-" if kept.seconds is None else f"{kept.seconds:.3f} s",
                    _kept(kept.met),
                )
                for kept in report.slos
            ],
        ),
        "<h2>Latency from when a document was due, seconds</h2>",
        _latencies(report.latency.items()),
        f"<p>{late}</p>",
        "<h2>Errors</h2>",
        table(("kind", "documents"), report.errors.items()) if report.errors else "<p>None.</p>",
        '<div class="plots">',
        *_plots(report),
        "</div>",
        "<h2>The server's own times, seconds</h2>",
        _latencies(report.answers.items()) if report.answers else "",
        table(
            ("metric", "count", "mean", "p50", "p99"),
            [
                (name, f"{s.count:g}", f"{s.mean:.4f}", f"{s.p50:.4f}", f"{s.p99:.4f}")
                for name, s in report.stages.items()
            ],
        )
        if report.stages
        else "<p>It told none at /metrics.</p>",
        "<h2>The server's peak memory</h2>",
        table(
            ("metric", "role", "MB"),
            [
                (name, role, f"{size / 1e6:,.0f}")
                for name, roles in report.peak_memory.items()
                for role, size in roles.items()
            ],
        ),
    ]
    return "".join(parts)


def _hides(report: Report) -> str:
    if not report.load.at_once:
        return ""
    return (
        "<p><b>A closed loop hides stalls</b>: while the server stalls, nothing is sent that could "
        "have waited. Take its throughput, not its quantiles.</p>"
    )


def _plots(report: Report) -> list[str]:
    time = Axis("seconds from the end of the warm-up")
    seconds = Axis("s", log=True)
    warm = report.load.warm_s
    quantiles = Axis("quantile", ticks=list(enumerate(QUANTILES)))
    roles = sorted({role for sample in report.samples for role in sample.resident})
    samples = [sample for sample in report.samples if sample.at >= warm]
    return [
        svg(
            "Latency by document size, seconds",
            [
                Line(name, list(enumerate(latency.quantiles.values())))
                for name, latency in report.latency.items()
            ],
            quantiles,
            seconds,
        ),
        svg(
            "Latency over time, seconds",
            [
                Line("p50", [(each.at, each.p50) for each in report.timeline]),
                Line("p99", [(each.at, each.p99) for each in report.timeline]),
            ],
            time,
            seconds,
        ),
        svg(
            "Documents due a second, and answered of them",
            [
                Line("due", [(each.at, each.offered) for each in report.timeline]),
                Line("answered", [(each.at, each.answered) for each in report.timeline]),
            ],
            time,
            Axis("1/s"),
        ),
        svg(
            "Documents in flight, as the server tells",
            [Line("in flight", [(each.at - warm, each.in_flight) for each in samples])],
            time,
            Axis(""),
        ),
        svg(
            "Resident memory, MB, as the server tells",
            [
                Line(
                    role,
                    [
                        (each.at - warm, each.resident[role] / 1e6)
                        for each in samples
                        if role in each.resident
                    ],
                )
                for role in roles
            ],
            time,
            Axis("MB"),
        ),
    ]


def _latencies(rows: Iterable[tuple[str, Latency]]) -> str:
    return table(
        ("", "documents", "mean", *QUANTILES, "max"),
        [
            (
                name,
                latency.documents,
                f"{latency.mean:.3f}",
                *(f"{value:.3f}" for value in latency.quantiles.values()),
                f"{latency.max:.3f}",
            )
            for name, latency in rows
        ],
    )


def _kept(met: bool) -> Marked:
    return Marked("met", "good") if met else Marked("missed", "bad")


def _quantile(latency: Latency | None, name: str) -> float | None:
    return latency.quantiles[name] if latency else None


def _all(report: Report, name: str) -> str:
    value = _quantile(report.latency.get("all"), name)
    return "-" if value is None else f"{value:.3f} s"


def _rates(*values: float) -> tuple[str, ...]:
    return tuple(map(short, values))
