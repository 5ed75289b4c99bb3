"""The report of a run: one HTML page, the same bytes for the same run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path

import numpy as np
import torch

from gma.drawing.page import page, table
from gma.drawing.plot import Axis, svg
from gma.drawing.plot import Line as Curve
from gma.model.scores import labels_of
from gma.model.training.corpus import Corpus
from gma.model.training.figures import Labels
from gma.model.training.measured import TITLES, prefix_name
from gma.model.training.report import answers
from gma.model.training.report.ended import Ended
from gma.model.training.report.hardest import Hard, hardest

REPORT = "report.html"
"""The report's name in the run's folder."""

MOST_LABELS = 40
"""Labels whose documents are counted."""

STYLE = answers.STYLE + ".document{border-top:1px solid var(--line);margin-top:1.5em}"


def write(folder: Path) -> Path:
    """Write the report of the run in a folder, and return its file.

    Raises TrainingError if there is no run that was evaluated.
    """
    run = Ended.load(folder)
    file = folder / REPORT
    body = "".join(_parts(run))
    file.write_text(page(f"Training of {run.checkpoint.config.name}", body, STYLE), "utf-8")
    return file


def _parts(run: Ended) -> Iterator[str]:
    config = run.checkpoint.config
    said = labels_of(config, torch.from_numpy(run.scores)).numpy()
    yield from _outcome(run)
    yield '<h2>Learning</h2><div class="plots">'
    yield from _curves(run)
    yield "</div>"
    yield '<h2>Length and trust</h2><div class="plots">'
    yield f"<div>{_by_length(run)}</div><div>"
    yield from answers.calibration(said, run.scores, run.actual, config.multi_label)
    yield "</div></div>"
    if config.multi_label:
        yield from answers.by_label(
            config.labels, said, run.actual, run.scores, config.least_scores
        )
    else:
        yield from answers.confusion(config.labels, said, run.actual)
    yield from _hardest(run, said)
    yield from _data(run)
    yield "<h2>Configuration</h2>"
    for name, given in run.configuration.items():
        text = escape(json.dumps(given, indent=2, ensure_ascii=False))
        yield f"<details><summary>[{escape(name)}]</summary><pre>{text}</pre></details>"


def _outcome(run: Ended) -> Iterator[str]:
    """Yield the figures that training ends with, the baseline's beside, and what was warned of."""
    outcome = run.outcome
    names, baseline = outcome.names, outcome.baseline
    rows = []
    for split, found in (("valid", outcome.best), ("test", outcome.test)):
        measured = [("this model", found["documents"], found["views"][-1])] if found else []
        if rival := baseline.get(split):
            measured.append(("linear baseline", rival["documents"], rival))
        rows += [
            (split, who, f"{documents:,}", *(f"{shown[name]:.3f}" for name in names))
            for who, documents, shown in measured
        ]
    yield f"<p>On whole documents; the weights are those of step {outcome.step:,}.</p>"
    yield table(("", "", "documents", *(TITLES[name] for name in names)), rows)
    warned = [*run.warnings, *outcome.warnings()]
    yield "".join(f'<p class="bad">{escape(warning)}</p>' for warning in warned)


def _curves(run: Ended) -> Iterator[str]:
    steps = Axis("step")
    for name, title in (("label_loss", "Label loss"), ("language_loss", "Next-token loss")):
        points = [(line["step"], line[name]) for line in run.lines if name in line]
        if any(loss for _, loss in points):
            yield svg(f"{title}, nats", [Curve("train", points)], steps, Axis(""))
    baseline = run.outcome.baseline.get("valid", {})
    first, last = (run.evaluations[i]["step"] for i in (0, -1))
    for name in run.outcome.names:
        curves = [
            Curve(
                prefix_name(view["prefix_bytes"]),
                [(line["step"], line["valid"]["views"][i][name]) for line in run.evaluations],
            )
            for i, view in enumerate(run.outcome.best["views"])
        ]
        if name in baseline:
            curves.append(Curve("linear, whole", [(x, baseline[name]) for x in (first, last)]))
        yield svg(f"Valid's {TITLES[name]}, by prefix", curves, steps, Axis(""))


def _by_length(run: Ended) -> str:
    views = run.outcome.best["views"]
    if len(views) == 1:  # its figures are the table's
        return ""
    ticks = [(float(i), prefix_name(view["prefix_bytes"])) for i, view in enumerate(views)]
    curves = [
        Curve(TITLES[name], [(float(i), view[name]) for i, view in enumerate(views)])
        for name in run.outcome.names
    ]
    whole = Axis("", ticks=[(i / 5, f"{i / 5:g}") for i in range(6)])
    return svg("By how much of each document is read", curves, Axis("prefix", ticks=ticks), whole)


def _hardest(run: Ended, said: Labels) -> Iterator[str]:
    yield "<h2>Hardest documents of valid</h2>"
    yield (
        "<p>Those whose own labels have the worst scores. Passages are those that speak most for "
        "a label, each with its mean score; a document's logit is the mean over all of it.</p>"
    )
    found = hardest(run.checkpoint, run.prepared.valid, run.scores, said, run.actual)
    for hard in found:
        yield from _document(run, hard, said[hard.index])


def _document(run: Ended, hard: Hard, said: np.ndarray) -> Iterator[str]:
    labels, scores = run.prepared.labels, run.scores[hard.index]

    def named(which: np.ndarray) -> str:
        listed = [f"{escape(labels[i])} {scores[i]:.3f}" for i in np.flatnonzero(which)[:20]]
        return ", ".join(listed) or "none"

    yield (
        f'<div class="document"><h3>Document {hard.index + 1}</h3>'
        f"<p>is <b>{named(run.actual[hard.index])}</b>; the model says <b>{named(said)}</b> "
        f'<span class="quiet">({hard.size:,} tokens)</span></p>'
    )
    for passage in hard.passages:
        yield (
            f'<p class="quiet">{escape(labels[passage.label])} {passage.score:+.2f}</p>'
            f"<blockquote>{escape(passage.text)}</blockquote>"
        )
    yield "</div>"


def _data(run: Ended) -> Iterator[str]:
    prepared = run.prepared
    splits = (("train", prepared.train), ("valid", prepared.valid))
    sizes = prepared.tokenizer.byte_lengths
    yield "<h2>Data</h2>"
    yield table(
        ("split", "documents", "bytes", "tokens", "longest, tokens"),
        [
            (
                name,
                f"{len(corpus):,}",
                f"{int(sizes[corpus.tokens].sum(dtype=np.int64)):,}",
                f"{len(corpus.tokens):,}",
                f"{int(np.diff(corpus.ends, prepend=0).max()):,}",
            )
            for name, corpus in splits
        ],
    )
    counts = [_count(corpus, len(prepared.labels)) for _, corpus in splits]
    order = np.argsort(-counts[0], kind="stable")[:MOST_LABELS].tolist()
    yield table(
        ("label", "train", "valid"),
        [(prepared.labels[i], *(f"{count[i]:,}" for count in counts)) for i in order],
    )
    if len(prepared.labels) > MOST_LABELS:
        yield f"<p>{len(prepared.labels) - MOST_LABELS:,} more labels have fewer documents.</p>"


def _count(corpus: Corpus, labels: int) -> np.ndarray:
    """Count the documents that have each label, (labels,)."""
    if corpus.labels.ndim == 2:
        return np.asarray(corpus.labels.sum(0))
    return np.bincount(corpus.labels.astype(np.int64), minlength=labels)
