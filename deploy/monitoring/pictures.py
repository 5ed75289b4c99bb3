"""The dashboards' panels as pictures, from what a Prometheus has seen of the last minutes:

    python deploy/monitoring/pictures.py http://127.0.0.1:9090 docs --minutes 5

writes docs/service.svg and docs/memory.svg. Needs matplotlib. Panels that would be empty, or show
nothing but zeros, are left out.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MultipleLocator

HERE = Path(__file__).parent
COLUMNS = 3
MAX_LINES = 6
RATE_INTERVAL = "20s"
POINTS = 60

# Okabe and Ito's, that colour-blind eyes tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#333333"

SUFFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


class Line(NamedTuple):
    legend: str
    points: Sequence[tuple[float, float]]  # seconds from the first, value


def lines(url: str, panel: Mapping[str, Any], start: float, end: float) -> list[Line]:
    """What a panel shows of the time from `start` to `end`, in seconds since the epoch."""
    found = []
    for target in panel["targets"]:
        parameters = {
            "query": _asked(target["expr"]),
            "start": start,
            "end": end,
            "step": (end - start) / POINTS,
        }
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{url}/api/v1/query_range?{query}") as answer:  # noqa: S310
            series = json.load(answer)["data"]["result"]
        for each in series:
            points = [(float(t) - start, float(value)) for t, value in each["values"]]
            points = [(t, value) for t, value in points if not math.isnan(value)]
            if points:
                found.append(Line(_legend(target["legendFormat"], each["metric"]), points))
    return found


def _asked(expression: str) -> str:
    """Of every machine: nothing is chosen above the panels."""
    expression = expression.replace("$__rate_interval", RATE_INTERVAL)
    return re.sub(r'"\$\w+"', '".*"', expression)


def _legend(template: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), template)


def draw(
    path: Path, title: str, panels: Sequence[tuple[Mapping[str, Any], Sequence[Line]]]
) -> None:
    """Write an SVG of the panels, three in a row, on white."""
    rows = -(-len(panels) // COLUMNS)
    style = {
        "font.size": 7,
        "font.sans-serif": ["DejaVu Sans"],
        "svg.hashsalt": "gma",
        "svg.fonttype": "none",
    }
    with mpl.rc_context(style):
        size = 3.6 * COLUMNS, 1.75 * rows + 0.4
        sheet, axes = plt.subplots(rows, COLUMNS, figsize=size, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, (panel, shown) in zip(axes.flat, panels, strict=False):
            axis.set_axis_on()
            _draw(axis, panel, shown)
        sheet.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold", color=INK)
        sheet.tight_layout(rect=(0, 0, 1, 0.99))
        text = io.StringIO()
        sheet.savefig(text, metadata={"Date": None})
        plt.close(sheet)
    # A hundredth of a point is finer than any screen, and half the file.
    path.write_text(re.sub(r"(\d\.\d\d)\d+", r"\1", text.getvalue()), encoding="utf-8")


def _draw(axis: Any, panel: Mapping[str, Any], shown: Sequence[Line]) -> None:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    axis.set_title(panel["title"], loc="left", fontsize=8, color=INK)
    for line, colour in zip(shown[:MAX_LINES], COLOURS, strict=False):
        axis.plot(*zip(*line.points, strict=True), color=colour, linewidth=1.2, label=line.legend)
    highest = max(value for line in shown for _, value in line.points)
    axis.set_ylim(0, 1.35 * highest)  # above the lines there is room for the legend
    axis.margins(x=0)
    axis.xaxis.set_major_formatter(lambda t, _: f"{t / 60:g} min")
    axis.yaxis.set_major_formatter(lambda value, _: readable(value, unit))
    axis.xaxis.set_major_locator(MultipleLocator(60))
    axis.locator_params(axis="y", nbins=4)
    axis.grid(axis="y", color="#E6E6E6", linewidth=0.6)
    axis.tick_params(length=0, colors=INK, labelsize=6)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.legend(fontsize=5.5, frameon=False, loc="upper left", labelcolor=INK, ncols=2)


def readable(value: float, unit: str) -> str:
    """A number as a person would write it: 1.2k, 250 ms, 40%, 3 GB."""
    if unit == "percentunit":
        return f"{100 * value:.0f}%"
    if unit == "s" and value < 1:
        return f"{1000 * value:g} ms"
    name = {"s": " s", "bytes": "B", "Bps": "B/s", "reqps": "/s", "ops": "/s"}.get(unit, "")
    scaled, suffix = next(
        ((value / size, suffix) for size, suffix in SUFFIXES if value >= size), (value, "")
    )
    return f"{scaled:g} {suffix}{name}".strip() if suffix else f"{value:g}{name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="of a Prometheus")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--minutes", type=float, default=5, help="how far back they go")
    arguments = parser.parse_args()
    end = time.time()
    start = end - 60 * arguments.minutes
    for file in sorted(HERE.glob("*.json")):
        dashboard = json.loads(file.read_text(encoding="utf-8"))
        panels = [(panel, lines(arguments.url, panel, start, end)) for panel in dashboard["panels"]]
        shown = [
            (panel, found)
            for panel, found in panels
            if any(value for line in found for _, value in line.points)
        ]
        draw(arguments.folder / file.with_suffix(".svg").name, dashboard["title"], shown)


if __name__ == "__main__":
    main()
