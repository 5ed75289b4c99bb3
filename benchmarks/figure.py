"""Plots of a quantity against the length of a document: both axes logarithmic, lines named at their
ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.timing import progress, tokens_name

# Okabe and Ito's, that colour-blind eyes tell apart.
BLUE, RED, GREEN, SKY = "#0072B2", "#D55E00", "#009E73", "#56B4E9"
QUIET = "#8C8C8C"
INK = "#333333"


class Line(NamedTuple):
    label: str
    points: Sequence[tuple[float, float]]
    colour: str | None = None  # None: in the background


class Panel(NamedTuple):
    title: str
    lines: Sequence[Line]


def draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Write an SVG of the panels side by side, on white."""
    if find_spec("matplotlib") is None:
        progress("no plot: pip install '.[benchmarks]'")
        return
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    style = {"font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "gma"}
    with mpl.rc_context(style):
        size = 5.6 * len(panels), 4.4
        sheet, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
        sheet.patch.set_facecolor("white")
        for axis, panel in zip(axes[0], panels, strict=True):
            _draw(axis, panel)
        sheet.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
        sheet.supxlabel("tokens in the document", fontsize=10, color=INK)
        sheet.tight_layout(w_pad=2.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.savefig(path, metadata={"Date": None})
        plt.close(sheet)


def _draw(axis: Any, panel: Panel) -> None:
    lines = [line for line in panel.lines if any(y > 0 for _, y in line.points)]
    axis.set_title(panel.title, loc="left", fontsize=10, color=INK)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    behind = [line for line in lines if line.colour is None]
    front = [line for line in lines if line.colour is not None]
    for line in behind + front[::-1]:  # the first on top of all
        strong = line.colour is not None
        axis.plot(
            *zip(*line.points, strict=True),
            color=line.colour or QUIET,
            linewidth=2.4 if strong else 1.0,
            alpha=1.0 if strong else 0.75,
            marker="o",
            markersize=4.5 if strong else 2.5,
            solid_capstyle="round",
        )
    places = sorted({x for line in lines for x, _ in line.points})
    axis.set_xticks(places, [tokens_name(int(x)) for x in places])
    axis.xaxis.set_minor_locator(_nowhere())
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axis.yaxis.set_minor_locator(_nowhere())
    axis.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, colors=INK)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color("#BBBBBB")
    if lines:
        _name(axis, lines, places[-1])


def _nowhere() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _name(axis: Any, lines: Sequence[Line], right: float) -> None:
    """Each line's name in a column to the right, as near to its end as the others allow."""
    low, high = (math.log(y) for y in axis.get_ylim())
    gap = (high - low) / 19
    ends = sorted(lines, key=lambda line: line.points[-1][1])
    heights = [math.log(line.points[-1][1]) for line in ends]
    places = spread(heights, gap)
    for line, place in zip(ends, places, strict=True):
        x, y = line.points[-1]
        colour = line.colour or "#6B6B6B"
        axis.annotate(
            line.label,
            (x, y),
            (right * 1.45, math.exp(place)),
            color=colour,
            fontsize=10 if line.colour else 8,
            fontweight="bold" if line.colour else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.5,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights as little as it takes for them to be a gap apart."""
    groups: list[list[float]] = []  # of heights that stand gap by gap around their mean
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            last = groups.pop()
            groups[-1] += last
    return [_bottom(group, gap) + i * gap for group in groups for i in range(len(group))]


def _bottom(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: Sequence[float], gap: float) -> float:
    return _bottom(group, gap) + gap * (len(group) - 1)
