"""The command `gma loadtest`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gma.loadtest.report import Report
    from gma.loadtest.slo import Slo
    from gma.loadtest.trial import Load

DEFAULT_SLO = "p99<=1s"


def loadtest(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of the service: http://HOST:PORT")],
    corpus: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='.jsonl or .jsonl.zst, a {"text": "..."} a line. [default: made-up text]',
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="fixed:BYTES, lognormal:MEDIAN_BYTES,SIGMA or mixed: log-normal around 2 KB, and "
            "1% of 10 MB. [default: documents of the corpus as they are; without one, mixed]"
        ),
    ] = None,
    arrivals: Annotated[
        str, typer.Option(metavar="PROFILE", help="poisson, constant, bursts or ramp.")
    ] = "poisson",
    rate: Annotated[
        float, typer.Option(help="Documents a second; of a ramp, at its end; of a sweep, at first.")
    ] = 1.0,
    closed: Annotated[
        int,
        typer.Option(
            min=0, help="Instead of arrivals, a closed loop: always so many documents in flight."
        ),
    ] = 0,
    seconds: Annotated[float, typer.Option(min=1, help="Of load, for each rate.")] = 30.0,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds before that, not reported.")] = 5.0,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            help="Such as p99<=1s or short:p95<=0.5s; several may be given. Bands are short (below "
            f"16 KiB), medium (256 KiB), long (4 MiB) and huge. [default: {DEFAULT_SLO}]"
        ),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Find the highest rate that meets the SLOs.")
    ] = False,
    ndjson: Annotated[
        bool, typer.Option("--ndjson", help="Ask for progress, and time its first line too.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="Client processes.")] = 1,
    timeout: Annotated[
        float,
        typer.Option(
            min=1, help="Seconds from when a document is due until it counts as an error."
        ),
    ] = 600.0,
    seed: Annotated[int, typer.Option(help="Of lengths, texts and arrivals.")] = 0,
    key: Annotated[
        str | None,
        typer.Option(envvar="LOADTEST_KEY", show_envvar=True, help="Bearer key of the service."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for report.json and report.html."),
    ] = None,
) -> None:
    """Send documents to a service as its clients would, and report what they waited.

    Documents come at their own times, whether or not those before are answered, and their latency
    counts from then. The JSON report goes to --out, or else to standard output. The status is 1 if
    an SLO is missed; of a sweep, if no rate met them.

    \b
    Examples:
      gma loadtest http://127.0.0.1:8000 --lengths lognormal:2000,1 --rate 5 --out report
      gma loadtest http://127.0.0.1:8000 --corpus books.jsonl.zst --lengths mixed --rate 20
      gma loadtest http://127.0.0.1:8000 --lengths fixed:2000 --sweep --slo 'short:p99<=1s'
      gma loadtest http://127.0.0.1:8000 --corpus books.jsonl.zst --closed 16 --seconds 60
    """
    from gma.loadtest.slo import Slo
    from gma.loadtest.trial import Load

    slos = [Slo.parse(text) for text in slo or [DEFAULT_SLO]]
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"a URL is like http://127.0.0.1:8000, not {url!r}")
    if sweep and (closed or arrivals == "ramp"):
        raise ValueError("a sweep needs a rate that stays: no --closed, no --arrivals ramp")
    if out:
        out.mkdir(parents=True, exist_ok=True)
    load = Load(
        url=url.rstrip("/"),
        corpus=corpus,
        lengths=lengths or (None if corpus else "mixed"),
        profile=arrivals,
        rate=rate,
        at_once=closed,
        seconds=seconds,
        warm_s=warm_up,
        ndjson=ndjson,
        timeout_s=timeout,
        processes=processes,
        seed=seed,
        key=key,
    )
    met = _sweep(load, slos, out) if sweep else _once(load, slos, out)
    raise typer.Exit(int(not met))


def _once(load: Load, slos: list[Slo], out: Path | None) -> bool:
    from gma.loadtest.page import page

    found = _measure(load, slos)
    _save(out, found.as_dict(), page(found))
    return found.met


def _sweep(load: Load, slos: list[Slo], out: Path | None) -> bool:
    from dataclasses import replace

    from gma.loadtest.page import sweep_page
    from gma.loadtest.sweep import highest

    reports: list[Report] = []

    def meets(rate: float) -> bool:
        reports.append(_measure(replace(load, rate=rate), slos))
        return reports[-1].met

    found = highest(meets, load.rate)
    typer.echo(f"highest rate that meets the SLOs: {found and f'{found:.3g}'} a second", err=True)
    trials = [report.as_dict() for report in reports]
    _save(out, {"highest_rate": found, "trials": trials}, sweep_page(reports, found))
    return found is not None


def _measure(load: Load, slos: list[Slo]) -> Report:
    """One trial, and a line about it."""
    from gma.loadtest.report import report
    from gma.loadtest.trial import run

    found = report(run(load), slos)
    kept = ", ".join(
        f"{each.slo} {'met' if each.met else 'missed'}"
        f" ({'-' if each.seconds is None else f'{each.seconds:.3f} s'})"
        for each in found.slos
    )
    typer.echo(
        f"{found.offered.documents:.3g} documents a second offered, "
        f"{found.throughput.documents:.3g} answered, {found.goodput:.3g} good, "
        f"{sum(found.errors.values())} errors; {kept}",
        err=True,
    )
    return found


def _save(out: Path | None, found: dict[str, object], html: str) -> None:
    text = json.dumps(found, indent=1, allow_nan=False)
    if out is None:
        typer.echo(text)
        return
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    (out / "report.html").write_text(html, encoding="utf-8")
    typer.echo(f"{out / 'report.html'}", err=True)
