"""What requests for an answer look like, and when two answers are the same."""

from __future__ import annotations

from typing import Any

import pytest

from tests.service.asgi import LABELS

PATH = "/v1/documents"
PLAIN = {"content-type": "text/plain"}
JSON = {"content-type": "application/json"}
NDJSON = {**PLAIN, "accept": "application/x-ndjson"}


def logits(answer: dict[str, Any]) -> dict[str, float]:
    """The logits of an answer, or of a span of its evidence, by label."""
    return {score["label"]: score["logit"] for score in answer["scores"]}


def said(answer: dict[str, Any]) -> dict[str, Any]:
    """The label of an answer, an event or a span, or its labels; also that there is none."""
    return {name: answer[name] for name in ("label", "labels") if name in answer}


def same(answer: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two answers say the same of a document, but for rounding."""
    return (
        said(answer) == said(other)
        and answer["usage"] == other["usage"]
        and logits(answer) == pytest.approx(logits(other), rel=1e-5, abs=1e-5)
    )


def check_evidence(answer: dict[str, Any], size: int) -> None:
    """Check that the spans tile a document of `size` bytes, and sum to the answer's logits."""
    spans = answer["evidence"]
    assert [span["start"] for span in spans] == [0, *(span["end"] for span in spans[:-1])]
    assert spans[-1]["end"] == size
    assert sum(span["tokens"] for span in spans) == answer["usage"]["tokens"]
    assert sum(span["weight"] for span in spans) == pytest.approx(1)
    for label, logit in logits(answer).items():
        shares = [span["weight"] * logits(span)[label] for span in spans]
        assert sum(shares) == pytest.approx(logit, rel=1e-6, abs=1e-6)
    for span in spans:
        assert [s["score"] for s in span["scores"]] == sorted(
            (s["score"] for s in span["scores"]), reverse=True
        )
        if "label" in span and len(span["scores"]) == len(LABELS):
            assert span["label"] in (span["scores"][0]["label"], None)
