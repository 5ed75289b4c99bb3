"""The evidence in a document's answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import TypeAdapter

from gma.service.gateway.contract import Answer
from tests.service.answers import check_evidence, logits
from tests.service.asgi import TEXT, Service

pytestmark = pytest.mark.anyio


async def test_evidence_tiles_the_document_and_sums_to_its_logits(service: Service) -> None:
    answer = await service.classify(TEXT, evidence=True)
    TypeAdapter(Answer).validate_python(answer, strict=True)
    assert len(answer["evidence"]) == answer["usage"]["chunks"] > 1
    check_evidence(answer, len(TEXT.encode()))


async def test_spans_differ(service: Service) -> None:
    spans = (await service.classify(TEXT, evidence=True))["evidence"]
    assert len({span["weight"] for span in spans}) > 1
    assert len({span["scores"][0]["logit"] for span in spans}) > 1


async def test_evidence_lists_the_labels_of_the_answer(service: Service) -> None:
    answer = await service.classify(TEXT, evidence=True, top_k=2)
    check_evidence(answer, len(TEXT.encode()))
    for span in answer["evidence"]:
        assert logits(span).keys() == logits(answer).keys()


@pytest.mark.parametrize("most", [2, 5])
async def test_evidence_is_bounded_by_merging(checkpoint: Path, most: int) -> None:
    async with Service(checkpoint, max_evidence_spans=most) as service:
        answer = await service.classify(TEXT * 3, evidence=True)
    assert answer["usage"]["chunks"] > 2 * most
    assert 1 < len(answer["evidence"]) <= most
    check_evidence(answer, len(TEXT.encode()) * 3)
    tokens = [span["tokens"] for span in answer["evidence"]]
    assert len(set(tokens[:-1])) <= 1
    assert tokens[-1] <= tokens[0]


async def test_evidence_covers_what_was_read_of_a_truncated_document(service: Service) -> None:
    answer = await service.classify(TEXT, evidence=True, max_tokens=21)
    check_evidence(answer, answer["usage"]["bytes"])
