"""What is counted of what documents are said to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY

from gma.model.config import ModelConfig
from gma.service.gateway import predictions
from gma.service.gateway.predictions import NONE, OTHER, Predictions
from tests.service.asgi import LABELS, TEXT, Service, save_checkpoint

pytestmark = pytest.mark.anyio


def said(label: str, most: str | None = None) -> float:
    """How often a label was said, with a score of at most so much."""
    name, labels = "gma_prediction_score_count", {"label": label}
    if most:
        name, labels = "gma_prediction_score_bucket", {**labels, "le": most}
    return sum(
        REGISTRY.get_sample_value(name, {"model": model, **labels}) or 0.0
        for model in ("tiny", "x")
    )


def config(*labels: str, **changes: object) -> ModelConfig:
    sizes = dict.fromkeys(
        ("width", "layers", "heads", "routing_dim", "value_dim", "num_components", "mlp_width"), 4
    )
    return ModelConfig.model_validate(
        {"name": "x", "labels": labels, "vocab_size": 300, **sizes, **changes}
    )


async def test_the_label_of_an_answer(service: Service) -> None:
    before = {label: said(label) for label in LABELS}
    answer = await service.classify(TEXT, top_k=1)
    after = {label: said(label) - before[label] for label in LABELS}
    assert after == {label: float(label == answer["label"]) for label in LABELS}


async def test_the_labels_of_an_answer(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path, multi_label=True, thresholds=[0.0, 1.0, 0.0])
    async with Service(checkpoint) as service:
        before = {label: said(label) for label in LABELS}
        await service.classify(TEXT)
        after = [said(label) - before[label] for label in LABELS]
    assert after == [1, 0, 1]


async def test_nothing_is_counted_of_what_was_not_answered(service: Service) -> None:
    before = [said(label) for label in LABELS]
    await service.http.post(
        "/v1/documents", content=b"\xff", headers={"content-type": "text/plain"}
    )
    assert [said(label) for label in LABELS] == before


def test_scores_are_those_of_the_labels_said() -> None:
    told = Predictions(config("p", "q", multi_label=True))
    told.count(np.log([0.85 / 0.15, 0.45 / 0.55]))
    assert (said("p", "0.8"), said("p", "0.9"), said("p")) == (0, 1, 1)
    assert said("q") == 0


@pytest.mark.parametrize("multi_label", [True, False])
def test_none(multi_label: bool) -> None:
    told = Predictions(config("r", "s", multi_label=multi_label, thresholds=[0.9, 0.9]))
    before = said(NONE), said(NONE, "0.6")
    told.count(np.zeros(2))
    assert (said(NONE), said(NONE, "0.6")) == (before[0] + 1, before[1] + 1)
    assert said("r") == said("s") == 0


def test_of_many_labels_the_rest_have_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "MOST_LABELS", 2)
    told = Predictions(config("t", "u", "v", "w"))
    before = said(OTHER)
    for logits in ([9, 0, 0, 0], [0, 0, 9, 0], [0, 0, 0, 9]):
        told.count(np.array(logits, float))
    assert (said("t"), said("u"), said(OTHER)) == (1, 0, before + 2)
    labels = {"model": "x", "label": "w"}
    assert REGISTRY.get_sample_value("gma_prediction_score_count", labels) is None
