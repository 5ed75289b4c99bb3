"""What a trial showed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from gma.loadtest import server
from gma.loadtest.client import Outcome
from gma.loadtest.lengths import BANDS, band
from gma.loadtest.slo import Slo, quantile
from gma.loadtest.trial import Load, Sample, Trial

QUANTILES = {"p50": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
SLICES = 60


@dataclass(frozen=True)
class Latency:
    """How long answered documents took, in seconds from when each was due."""

    documents: int
    mean: float
    quantiles: dict[str, float]
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency | None:
        """The latency of such times; None if there are none."""
        if not seconds:
            return None
        quantiles = {name: quantile(seconds, q) or 0.0 for name, q in QUANTILES.items()}
        return cls(len(seconds), fmean(seconds), quantiles, max(seconds))


@dataclass(frozen=True)
class Rates:
    """How much there was a second."""

    documents: float
    bytes: float
    tokens: float


@dataclass(frozen=True)
class Kept:
    """An SLO, and its quantile in seconds: None if that is an error, or if there is none."""

    slo: str
    met: bool
    seconds: float | None


@dataclass(frozen=True)
class Slice:
    """Documents that were due in one part of the trial."""

    at: float  # seconds from the end of the warm-up to the slice's middle
    offered: float  # documents a second
    answered: float
    p50: float | None
    p99: float | None


@dataclass(frozen=True)
class Report:
    """A trial without its warm-up. Times are seconds."""

    began: str
    load: Load
    seconds: float  # until the last answer, or the load's end
    offered: Rates  # with the tokens of what was answered
    throughput: Rates  # answered
    slos: list[Kept]
    goodput: float  # documents a second that were answered in the time of each SLO
    good: float  # of those offered
    latency: dict[str, Latency]  # by band, and of all
    first_line: Latency | None  # when progress is asked for: to the first event
    errors: dict[str, int]
    late_s: float  # p99 of how long after its time the client began to send a document
    answers: dict[str, Latency]  # the times that answers tell, by stage
    stages: dict[str, server.Stage]  # by metric
    peak_memory: dict[str, dict[str, float]]  # bytes, by metric and role
    timeline: list[Slice]
    samples: list[Sample]

    @property
    def met(self) -> bool:
        """Whether every SLO is met."""
        return all(kept.met for kept in self.slos)

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON, without the key. A closed loop has no profile and no rate of its own
        and says so."""
        found = asdict(self)
        if self.load.at_once:
            found["load"] |= {"profile": "closed", "rate": None}
        found["load"] |= {"corpus": self.load.corpus and str(self.load.corpus)}
        del found["load"]["key"]
        return found


def report(trial: Trial, slos: Sequence[Slo]) -> Report:
    """What came of the documents that were due after the trial's warm-up."""
    load = trial.load
    outcomes = [outcome for outcome in trial.outcomes if outcome.due >= load.warm_s]
    answered = [outcome for outcome in outcomes if outcome.error is None]
    last = max((outcome.ended for outcome in outcomes), default=0.0) - load.warm_s
    seconds = max(load.seconds, last)
    values = [slo.value(outcomes) for slo in slos]
    good = sum(
        outcome.error is None and all(slo.kept_by(outcome) for slo in slos) for outcome in outcomes
    )
    watched = trial.before is not None and trial.after is not None
    return Report(
        began=datetime.fromtimestamp(trial.began, UTC).isoformat(timespec="seconds"),
        load=load,
        seconds=seconds,
        offered=_rates(outcomes, load.seconds),
        throughput=_rates(answered, seconds),
        slos=[
            Kept(
                str(slo),
                slo.met(outcomes),
                None if value is None or math.isinf(value) else value,
            )
            for slo, value in zip(slos, values, strict=True)
        ],
        goodput=good / seconds,
        good=good / max(1, len(outcomes)),
        latency=_by_band(answered),
        first_line=Latency.of(
            [outcome.first - outcome.due for outcome in answered if outcome.first is not None]
        )
        if load.ndjson
        else None,
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error).most_common()),
        late_s=quantile([outcome.sent - outcome.due for outcome in outcomes], 0.99) or 0.0,
        answers=_told(answered),
        stages=server.stages(trial.before, trial.after)
        if trial.before and trial.after and watched
        else {},
        peak_memory=server.peak_memory(trial.after) if trial.after else {},
        timeline=_timeline(outcomes, load),
        samples=trial.samples,
    )


def _rates(outcomes: Sequence[Outcome], seconds: float) -> Rates:
    return Rates(
        len(outcomes) / seconds,
        sum(outcome.bytes for outcome in outcomes) / seconds,
        sum(outcome.tokens for outcome in outcomes) / seconds,
    )


def _by_band(answered: Sequence[Outcome]) -> dict[str, Latency]:
    """The bands that documents are of, the shortest first, then all together."""
    sets = {
        each.name: [outcome.seconds for outcome in answered if band(outcome.bytes) == each.name]
        for each in BANDS
    }
    sets["all"] = [outcome.seconds for outcome in answered]
    return {name: found for name, seconds in sets.items() if (found := Latency.of(seconds))}


def _told(answered: Sequence[Outcome]) -> dict[str, Latency]:
    names = dict.fromkeys(name for outcome in answered for name in outcome.timing_ms)
    sets = {
        name: [o.timing_ms[name] / 1e3 for o in answered if name in o.timing_ms] for name in names
    }
    return {name: found for name, seconds in sets.items() if (found := Latency.of(seconds))}


def _timeline(outcomes: Sequence[Outcome], load: Load) -> list[Slice]:
    width = load.seconds / SLICES
    slices: list[list[Outcome]] = [[] for _ in range(SLICES)]
    for outcome in outcomes:
        slices[min(SLICES - 1, int((outcome.due - load.warm_s) / width))].append(outcome)
    found = []
    for i, due in enumerate(slices):
        seconds = [outcome.seconds for outcome in due if outcome.error is None]
        quantiles = quantile(seconds, 0.5), quantile(seconds, 0.99)
        rates = len(due) / width, len(seconds) / width
        found.append(Slice((i + 0.5) * width, *rates, *quantiles))
    return found
