"""Tables and plots of how right answers are, as HTML."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import numpy as np

from gma.drawing.page import table
from gma.drawing.plot import Axis, Line, svg
from gma.model.training import figures
from gma.model.training.figures import BINS, Labels, Scores

MATRIX = 30
"""Labels that a confusion matrix has at most."""

MOST_LABELS = 100
"""Lines of a table of labels."""

MOST_CONFUSIONS = 20
"""Lines of a table of confusions."""

NONE = "(none)"
"""The answer where no label reached its threshold."""

STYLE = """
.matrix td,.matrix th{padding:.15em .4em;text-align:center;min-width:1.6em}
.matrix th:first-child{text-align:right;position:sticky;left:0;background:var(--back)}
.matrix thead th{vertical-align:bottom}
.matrix thead th span{writing-mode:vertical-rl;transform:rotate(180deg);font-weight:400}
.matrix td{background:color-mix(in srgb,var(--fill) calc(var(--share)*65%),transparent)}
"""


def confusion(labels: tuple[str, ...], said: Labels, actual: Labels) -> Iterator[str]:
    """Yield HTML of which label is taken for which: said (D, L) with at most one each, actual
    (D, L) with exactly one."""
    names = [*labels, NONE]
    answer = np.where(said.any(1), said.argmax(1), len(labels))
    counts = np.zeros((len(labels), len(names)), dtype=np.int64)
    np.add.at(counts, (actual.argmax(1), answer), 1)
    if not counts[:, -1].any():
        counts, names = counts[:, :-1], names[:-1]
    if len(labels) <= MATRIX:
        yield "<h2>Confusion matrix</h2><p>A line is a label, a column what the model answers.</p>"
        yield _matrix(labels, names, counts)
        return
    yield "<h2>Labels that are confused most</h2>"
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    worst = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS]
    pairs = [divmod(int(place), len(names)) for place in worst if wrong.flat[place]]
    yield table(
        ("label", "answer", "documents", "of"),
        [(labels[i], names[j], f"{wrong[i, j]:,}", f"{counts[i].sum():,}") for i, j in pairs],
    )
    yield from by_label(labels, said, actual)


def _matrix(labels: tuple[str, ...], names: list[str], counts: np.ndarray) -> str:
    head = "".join(f"<th><span>{escape(name)}</span></th>" for name in names)
    lines = []
    for label, line in zip(labels, counts, strict=True):
        cells = "".join(
            f'<td style="--share:{count / max(line.sum(), 1):.3f}">{count or ""}</td>'
            for count in line.tolist()
        )
        lines.append(f"<tr><th>{escape(label)}</th>{cells}</tr>")
    return (
        f'<div class="wide"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def by_label(
    labels: tuple[str, ...],
    said: Labels,
    actual: Labels,
    scores: Scores | None = None,
    thresholds: tuple[float, ...] | None = None,
) -> Iterator[str]:
    """Yield HTML of each label's figures, the worst F1 first; all arrays are (D, L).

    Average precision is told with scores, and thresholds if there are any.
    """
    f1 = figures.f1(said, actual)
    order = np.argsort(np.nan_to_num(f1, nan=2.0), kind="stable")
    head = ["label", "have it", "said", "right", "F1"]
    columns = [actual.sum(0), said.sum(0), (actual & said).sum(0)]
    numbers = [f1]
    if scores is not None:
        head.append("average precision")
        numbers.append(figures.average_precisions(scores, actual))
    if thresholds is not None:
        head.append("threshold")
        numbers.append(np.array(thresholds))
    yield "<h2>Labels, the worst first</h2>"
    yield table(
        head,
        [
            (
                labels[i],
                *(f"{column[i]:,}" for column in columns),
                *("-" if np.isnan(x[i]) else f"{x[i]:.3f}" for x in numbers),
            )
            for i in order[:MOST_LABELS].tolist()
        ],
    )
    if len(order) > MOST_LABELS:
        yield f"<p>The other {len(order) - MOST_LABELS:,} are no worse.</p>"


def calibration(said: Labels, scores: Scores, actual: Labels, multi_label: bool) -> Iterator[str]:
    """Yield HTML of whether scores can be trusted; all arrays are (D, L)."""
    if multi_label:
        given, right, what = scores.ravel(), actual.ravel(), "pairs of a document and a label"
    else:
        given, what = scores.max(1), "documents, by the best label's score"
        right = np.take_along_axis(actual, scores.argmax(1)[:, None], 1)[:, 0]
    which = np.minimum(given * BINS, BINS - 1).astype(np.int64)
    counts = np.bincount(which, minlength=BINS)
    filled = np.flatnonzero(counts)
    means = np.bincount(which, given, minlength=BINS)[filled] / counts[filled]
    rates = np.bincount(which, right, minlength=BINS)[filled] / counts[filled]
    off = float((np.abs(means - rates) * counts[filled]).sum() / counts.sum())
    ticks = [(i / 5, f"{i / 5:g}") for i in range(6)]
    yield svg(
        "How often it is right, by score",
        [
            Line("this model", [*zip(means.tolist(), rates.tolist(), strict=True)]),
            Line("ideal", [(0.0, 0.0), (1.0, 1.0)]),
        ],
        Axis("score", ticks=ticks),
        Axis("", ticks=ticks),
    )
    yield (
        f"<details><summary>Scores differ by {off:.3f} from how often they are right, on average"
        f"</summary><p>{len(given):,} {what}.</p>"
    )
    yield table(
        ("mean score", "right", "how many"),
        [
            (f"{mean:.3f}", f"{rate:.3f}", f"{count:,}")
            for mean, rate, count in zip(means, rates, counts[filled], strict=True)
        ],
    )
    yield "</details>"
