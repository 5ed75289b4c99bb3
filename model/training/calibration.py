"""What makes a classifier's scores mean something, fitted to documents that were not trained on."""

from __future__ import annotations

from gma.model.classifier import Classifier
from gma.model.training import factors, stacking
from gma.model.training.corpus import Corpus


def calibrate(classifier: Classifier, valid: Corpus) -> dict[str, object]:
    """Fit what the classifier's pooling has for it, in place; return what a log tells of it."""
    if classifier.config.pooling == "any":
        fitted = factors.fit(classifier, valid)
        factors.apply(classifier, fitted)
        return {"factors": fitted}
    stacked = stacking.fit(classifier, valid)
    stacking.apply(classifier, stacked)
    return {"stacking": stacked._asdict()}
