"""What was measured of a classifier, and how it is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from gma.model.training.placing import Placing

TITLES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "micro_f1": "micro-F1",
    "average_precision": "average precision",
    "micro_average_precision": "micro average precision",
    "confidence": "confidence",
    "answered": "answered",
    "calibration_error": "calibration error",
}
"""What figures are called in tables."""


def prefix_name(size: int | None) -> str:
    """Name a prefix of so many bytes; None is the whole document."""
    return "whole" if size is None else f"{size >> 10} KB"


@dataclass(frozen=True)
class View:
    """What was measured on one prefix of every document."""

    prefix: int | None  # bytes
    figures: Mapping[str, float]

    @property
    def name(self) -> str:
        """What tables call it."""
        return prefix_name(self.prefix)


@dataclass(frozen=True)
class LabelView:
    """What was measured of one label on whole documents, where they have any number of labels."""

    label: str
    documents: int  # that have it
    said: int  # of how many the model says so
    f1: float | None  # none if the label is neither said nor there
    average_precision: float | None  # none if no document has it
    score: float  # mean over all documents: the share that has it, if scores can be trusted
    threshold: float


@dataclass(frozen=True)
class Measured:
    """What was measured on every prefix of a split's documents."""

    documents: int
    views: tuple[View, ...]
    components: NDArray[np.float64]  # (layers, heads): in use for the last view's documents
    num_components: int  # that there are, in each head
    thresholds: tuple[float, ...] | None  # that the answers come from: see ModelConfig
    scores: NDArray[np.float64]  # (documents, labels), of the last view
    labels: tuple[LabelView, ...] = ()
    placing: Placing | None = None  # none if documents have no spans

    def score(self, figure: str) -> float:
        """Return what training keeps the best of: the mean of one figure of the views."""
        return float(np.mean([view.figures[figure] for view in self.views]))

    def as_dict(self) -> dict[str, object]:
        """Return what JSON can hold, rounded."""
        found: dict[str, object] = {
            "documents": self.documents,
            "views": [
                {"prefix_bytes": view.prefix, **{k: round(x, 4) for k, x in view.figures.items()}}
                for view in self.views
            ],
            "components_in_use": self.components.round(1).tolist(),
        }
        if self.placing:
            placing = self.placing._asdict()
            found["placing"] = {name: round(figure, 4) for name, figure in placing.items()}
        if self.labels:
            found["labels"] = [
                {k: round(x, 4) if isinstance(x, float) else x for k, x in asdict(label).items()}
                for label in self.labels
            ]
        return found

    def table(self) -> str:
        """Write Markdown: the views, the labels if there are any number, the components in use."""
        names = list(self.views[0].figures)
        titles = " | ".join(TITLES[name] for name in names)
        lines = [
            f"| prefix ({self.documents} documents) | {titles} |",
            "|---" * (1 + len(names)) + "|",
        ]
        for view in self.views:
            figures = " | ".join(f"{view.figures[name]:.3f}" for name in names)
            lines.append(f"| {view.name} | {figures} |")
        lines += self._placing()
        lines += self._labels()
        used = [", ".join(f"{head:.1f}" for head in layer) for layer in self.components]
        lines += [
            "",
            f"Mixture components in use, of {self.num_components} a head (layer: head, head, ...): "
            + "; ".join(f"{layer}: {heads}" for layer, heads in enumerate(used, 1)),
        ]
        return "\n".join(lines)

    def _placing(self) -> Iterator[str]:
        if self.placing:
            pairs, *figures = self.placing
            yield ""
            yield f"| evidence ({pairs} pairs) | hit@1 | hit@3 | average precision |"
            yield "|---" * 4 + "|"
            yield "| windows of 1,000 bytes | " + " | ".join(f"{x:.3f}" for x in figures) + " |"

    def _labels(self) -> Iterator[str]:
        if self.labels:
            yield ""
            yield (
                "| label (whole documents) | have it | said | F1 | average precision | mean score "
                "| threshold |"
            )
            yield "|---" * 7 + "|"
        for x in self.labels:
            figures = x.f1, x.average_precision, x.score, x.threshold
            shown = " | ".join("-" if figure is None else f"{figure:.3f}" for figure in figures)
            yield f"| {x.label} | {x.documents} | {x.said} | {shown} |"
