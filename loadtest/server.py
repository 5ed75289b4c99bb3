"""What the server says of itself in Prometheus text, before and after."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 10.0
QUANTILES = (0.5, 0.99)


@dataclass
class Reading:
    """All that one scrape says, summed over the labels that don't matter here."""

    buckets: dict[str, dict[float, float]] = field(default_factory=lambda: defaultdict(dict))
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    by_role: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))

    @classmethod
    def parse(cls, exposition: str) -> Reading:
        """Read an exposition. Raises ValueError if it is not Prometheus text."""
        reading = cls()
        families = text_string_to_metric_families(exposition)
        for name, labels, value, *_ in (sample for each in families for sample in each.samples):
            reading.sums[name] += value
            if name.endswith("_bucket") and "le" in labels:
                buckets = reading.buckets[name.removesuffix("_bucket")]
                bound = float(labels["le"])
                buckets[bound] = buckets.get(bound, 0) + value
            if name.endswith("_bytes"):
                role = labels.get("role", "")
                roles = reading.by_role[name]
                roles[role] = max(roles.get(role, 0), value)
        return reading


@dataclass(frozen=True)
class Stage:
    """One of the server's own times, in seconds. Quantiles are only as fine as its buckets."""

    count: float
    mean: float
    p50: float
    p99: float


def scrape(url: str) -> Reading | None:
    """Read `/metrics` now; None if there is nothing to read."""
    try:
        response = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S, trust_env=False)
        return Reading.parse(response.text) if response.status_code == 200 else None
    except (httpx.HTTPError, ValueError):
        return None


def stages(before: Reading, after: Reading) -> dict[str, Stage]:
    """The times that the server counted in between, by the name of their histogram."""
    found: dict[str, Stage] = {}
    for name, late in sorted(after.buckets.items()):
        early = before.buckets.get(name, {})
        buckets = {bound: value - early.get(bound, 0) for bound, value in sorted(late.items())}
        total = buckets.get(math.inf, 0)
        if not name.endswith("_seconds") or total <= 0:
            continue
        spent = after.sums[f"{name}_sum"] - before.sums.get(f"{name}_sum", 0)
        p50, p99 = (quantile(buckets, q) for q in QUANTILES)
        found[name] = Stage(total, spent / total, p50, p99)
    return found


def quantile(buckets: dict[float, float], q: float) -> float:
    """The quantile of cumulative counts by upper bound, which ascend.

    Within a bucket values lie evenly, as Prometheus has it; beyond the last finite bound a quantile
    is that bound.
    """
    wanted = q * list(buckets.values())[-1]
    below, low = 0.0, 0.0
    for bound, upto in buckets.items():
        if upto >= wanted:
            if math.isinf(bound) or upto == below:
                return low
            return low + (bound - low) * (wanted - below) / (upto - below)
        below, low = upto, bound
    return low


def peak_memory(after: Reading) -> dict[str, dict[str, float]]:
    """The most bytes since the start, by metric and then by role: those of its largest process."""
    return {name: dict(roles) for name, roles in sorted(after.by_role.items()) if "peak" in name}
