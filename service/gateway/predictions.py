"""What documents are said to be, told to Prometheus."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gma.model.config import ModelConfig
from gma.service.gateway.answers import verdict
from gma.service.gateway.scores import scores
from gma.service.observe import metrics

MOST_LABELS = 100
"""Of a model, that are told apart: each is a dozen series."""

NONE, OTHER = "(none)", "(other)"


class Predictions:
    """Counts the labels that answers say, with their scores, however few a client asked for."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._index = {label: index for index, label in enumerate(config.labels)}
        names = [*config.labels[:MOST_LABELS]]
        names += [OTHER] if len(config.labels) > MOST_LABELS else []
        names += [NONE] if config.least_scores is not None else []
        # From 0 on, or the first of a label is no increase.
        self._of = {name: metrics.PREDICTION_SCORE.labels(config.name, name) for name in names}

    def count(self, logits: NDArray[np.float64]) -> None:
        """Count an answered document, whose logits, (labels,), these are."""
        found = scores(logits, self._config.multi_label)
        said = verdict(self._config, logits, found)
        labels = said["labels"] if "labels" in said else [said["label"]]
        for label in labels:
            if label is not None:
                name = label if label in self._of else OTHER
                self._of[name].observe(float(found[self._index[label]]))
        if labels in ([], [None]):
            self._of[NONE].observe(float(found.max()))
