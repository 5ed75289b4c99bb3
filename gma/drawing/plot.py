"""Line plots as inline SVG, which needs nothing from anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 490, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 120, 28, 40
GAP = 14  # between the names of two lines

COLOURS = 6
"""Classes c0, c1, ... of the page's style, near Okabe and Ito's colours, which colour-blind eyes
tell apart."""

Scale = Callable[[float], float]


class Line(NamedTuple):
    label: str
    points: Sequence[tuple[float, float | None]]  # None interrupts the line


class Axis(NamedTuple):
    label: str
    log: bool = False
    ticks: Sequence[tuple[float, str]] | None = None  # None: chosen


def svg(title: str, lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """A plot of the lines, each named at its end. Without any point it says that there is none."""
    points = [
        (a, b)
        for line in lines
        for a, b in line.points
        if b is not None and (b > 0 or not y.log) and (a > 0 or not x.log)
    ]
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>',
    ]
    if not points:
        return "".join([*parts, f'<text x="{LEFT}" y="60">nothing to show</text></svg>'])
    across, x_ticks = _scale(x, [a for a, _ in points], LEFT, WIDTH - RIGHT)
    up, y_ticks = _scale(y, [b for _, b in points], HEIGHT - BOTTOM, TOP)
    for value, name in y_ticks:
        parts.append(
            f'<path class="grid" d="M{LEFT} {up(value):.1f}H{WIDTH - RIGHT}"/>'
            f'<text class="y" x="{LEFT - 6}" y="{up(value) + 4:.1f}">{escape(name)}</text>'
        )
    parts += [
        f'<text class="x" x="{across(value):.1f}" y="{HEIGHT - BOTTOM + 16}">{escape(name)}</text>'
        for value, name in x_ticks
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="x" x="{middle}" y="{HEIGHT - 6}">{escape(x.label)}</text>'
        f'<text class="y" x="{LEFT - 6}" y="16">{escape(y.label)}</text>'
    )
    parts += _drawn(lines, across, up, x.log, y.log)
    return "".join([*parts, "</svg>"])


def _drawn(lines: Sequence[Line], across: Scale, up: Scale, x_log: bool, y_log: bool) -> list[str]:
    parts: list[str] = []
    ends: list[tuple[float, str, str]] = []
    for i, line in enumerate(lines):
        colour = f"c{i % COLOURS}"
        steps: list[str] = []
        last = None
        for a, b in line.points:
            if b is None or (y_log and b <= 0) or (x_log and a <= 0):
                last = None
                continue
            steps.append(f"{'M' if last is None else 'L'}{across(a):.1f} {up(b):.1f}")
            last = up(b)
            parts.append(f'<circle cx="{across(a):.1f}" cy="{last:.1f}" r="1.8" class="{colour}"/>')
            end = last
        if steps:
            parts.append(f'<path d="{"".join(steps)}" class="curve {colour}" fill="none"/>')
            ends.append((end, line.label, colour))
    floor = -math.inf
    for height, label, colour in sorted(ends):
        floor = max(height, floor + GAP)
        parts.append(
            f'<text x="{WIDTH - RIGHT + 8}" y="{floor + 4:.1f}" class="{colour}">{escape(label)}'
            "</text>"
        )
    return parts


def _scale(
    axis: Axis, values: Sequence[float], first: float, last: float
) -> tuple[Scale, Sequence[tuple[float, str]]]:
    """The scale that puts a value between two places, and its ticks."""
    if axis.log:
        lowest, highest = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        powers = range(lowest, max(highest, lowest + 1) + 1)
        decades = powers[-1] - lowest
        return (
            lambda v: first + (math.log10(v) - lowest) / decades * (last - first),
            [(10.0**power, f"{10.0**power:g}") for power in powers],
        )
    if axis.ticks is not None:
        chosen = axis.ticks
    else:
        step = _step(max(values))
        chosen = [(i * step, short(i * step)) for i in range(math.ceil(max(values) / step) + 1)]
    low = chosen[0][0]
    span = (chosen[-1][0] - low) or 1
    return lambda v: first + (v - low) / span * (last - first), chosen


def _step(most: float) -> float:
    """A round number that goes into `most` about four times."""
    if most <= 0:
        return 1.0
    size = 10.0 ** math.floor(math.log10(most / 4))
    return next(size * k for k in (1, 2, 2.5, 5, 10) if most / (size * k) <= 5)


def short(value: float) -> str:
    """A number in four or so characters: 1.5k, 20M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
