"""What Python programs are answered: the HTTP contract's findings as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Self

from gma.service.gateway import contract
from gma.service.gateway.contract import Finding, ProgressEvent

MOST_ROWS = 10
"""Labels that a notebook shows."""


@dataclass(frozen=True)
class LabelScore:
    """What is said about one label."""

    label: str
    score: float
    """From 0 to 1: its share among all labels, or by itself with a multi-label model."""
    logit: float
    threshold: float | None
    """The least score at which the label is there; None with a model that says the best label
    whatever its score."""


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a document in UTF-8, and their share in its answer. Labels and scores
    are of this span alone."""

    start: int
    end: int
    tokens: int
    weight: float
    """Share of the document: weights sum to 1, and the sum of weight * logit over all spans is the
    document's logit, for each label."""
    label: str | None
    labels: tuple[str, ...]
    scores: tuple[LabelScore, ...]
    """Those of the labels that the document's scores list; best first."""

    def of(self, text: str) -> str:
        """Return the span's part of its document; a character that it has half of is left out."""
        return text.encode()[self.start : self.end].decode(errors="ignore")


@dataclass(frozen=True)
class Answer:
    """What the model finds in a document."""

    model: str
    label: str | None
    """The best label that is there; None if none is."""
    labels: tuple[str, ...]
    """All labels that are there, best first: at most one unless the model is multi-label."""
    scores: tuple[LabelScore, ...]
    """Best first; of all labels unless ``top_k`` says otherwise."""
    bytes: int
    """Of UTF-8 text that was read."""
    tokens: int
    truncated: bool
    """Whether ``max_tokens`` cut something."""
    evidence: tuple[Span, ...]
    """Spans that tile the document; none unless they are asked for."""
    components: list[list[list[float]]] | None
    """Tokens that each mixture component took, by layer and head, if asked for."""

    @classmethod
    def of(cls, finding: Finding) -> Self:
        """Take what the HTTP service would answer."""
        labels, usage = _labels(finding), finding["usage"]
        return cls(
            model=finding["model"],
            label=labels[0] if labels else None,
            labels=labels,
            scores=_scores(finding["scores"]),
            bytes=usage["bytes"],
            tokens=usage["tokens"],
            truncated=finding.get("truncated", False),
            evidence=tuple(map(_span, finding.get("evidence", ()))),
            components=usage.get("components"),
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the best scores, and span by span where there is evidence."""
        rows = "".join(
            f"<tr><td>{escape(each.label)}</td><td>{each.score:.3f}</td>"
            f"<td>{'' if each.threshold is None else f'{each.threshold:.3f}'}</td>"
            f"<td>{self._strip(each.label)}</td></tr>"
            for each in self.scores[:MOST_ROWS]
        )
        said = ", ".join(self.labels) or "none of the labels"
        return (
            f"<p>{escape(said)} ({self.bytes:,} bytes, {self.tokens:,} tokens)</p>"
            "<table><tr><th>label</th><th>score</th><th>threshold</th><th>by span</th></tr>"
            f"{rows}</table>"
        )

    def _strip(self, label: str) -> str:
        """The document from left to right as SVG: a bar a span, as high as its score."""
        bars = []
        for span in self.evidence:
            score = next((each.score for each in span.scores if each.label == label), 0.0)
            x, width = 300 * span.start / self.bytes, 300 * (span.end - span.start) / self.bytes
            tall = 16 * score
            bars.append(
                f'<rect x="{x:.2f}" width="{width:.2f}" y="{16 - tall:.2f}" height="{tall:.2f}"/>'
            )
        if not bars:
            return ""
        return f'<svg width="300" height="16" fill="#4a7fb5">{"".join(bars)}</svg>'


@dataclass(frozen=True)
class Progress:
    """How far a service has read a document, and what it looks like so far.

    Of a bidirectional model there is nothing to say of labels yet, and ``bytes`` and ``tokens`` are
    how much of the reading is done.
    """

    bytes: int
    tokens: int
    label: str | None
    """The best label that is there so far; None if none is."""
    labels: tuple[str, ...]
    score: float | None
    """Of the best label; None of a multi-label model."""

    @classmethod
    def of(cls, event: ProgressEvent) -> Self:
        """Take what the HTTP service tells."""
        labels = _labels(event)
        return cls(
            event["bytes"],
            event["tokens"],
            labels[0] if labels else None,
            labels,
            event.get("score"),
        )


def _labels(said: Finding | contract.EvidenceSpan | ProgressEvent) -> tuple[str, ...]:
    if "labels" in said:
        return tuple(said["labels"])
    label = said.get("label")
    return () if label is None else (label,)


def _scores(scores: Sequence[contract.LabelScore]) -> tuple[LabelScore, ...]:
    return tuple(
        LabelScore(each["label"], each["score"], each["logit"], each.get("threshold"))
        for each in scores
    )


def _span(span: contract.EvidenceSpan) -> Span:
    labels = _labels(span)
    return Span(
        span["start"],
        span["end"],
        span["tokens"],
        span["weight"],
        labels[0] if labels else None,
        labels,
        _scores(span["scores"]),
    )
