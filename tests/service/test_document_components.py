"""How much of a document each component takes, in its answer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from gma.model import weights
from gma.model.reading import read
from gma.service.gateway.contract import Answer
from tests.service.answers import JSON, NDJSON, PATH, PLAIN
from tests.service.asgi import TEXT, Service, save_checkpoint

pytestmark = pytest.mark.anyio


def expected(checkpoint: Path, tokens: int | None = None) -> NDArray[np.float64]:
    """(L, H, K), of the text's first tokens, in float64."""
    loaded = weights.load(checkpoint)
    ids = torch.from_numpy(loaded.tokenizer.encode(TEXT.encode())[:tokens])
    return read(loaded.classifier.double(), [ids])[0].usage.numpy()


@pytest.mark.parametrize("form", ["paper", "forgetting"])
async def test_they_are_the_documents(tmp_path: Path, form: str) -> None:
    checkpoint = save_checkpoint(tmp_path, form=form)
    async with Service(checkpoint) as service:
        answer = await service.classify(TEXT, components=True)
        TypeAdapter(Answer).validate_python(answer, strict=True)
        components = np.array(answer["usage"]["components"])
        np.testing.assert_allclose(components, expected(checkpoint), rtol=1e-4)
        np.testing.assert_allclose(components.sum(-1), answer["usage"]["tokens"], rtol=1e-6)
        assert "components" not in (await service.classify(TEXT, evidence=True))["usage"]


async def test_of_what_was_read_of_a_truncated_document(service: Service, checkpoint: Path) -> None:
    answer = await service.classify(TEXT, components=True, max_tokens=21)
    found = np.array(answer["usage"]["components"])
    np.testing.assert_allclose(found, expected(checkpoint, 21), rtol=1e-4)


async def test_asked_for_in_json_and_told_in_the_result_alone(service: Service) -> None:
    given = json.dumps({"text": TEXT, "components": True, "evidence": True})
    response = await service.http.post(PATH, content=given, headers=JSON)
    components = response.json()["usage"]["components"]
    assert all(
        span.keys().isdisjoint({"components", "usage"}) for span in response.json()["evidence"]
    )
    response = await service.http.post(f"{PATH}?components=true", content=TEXT, headers=NDJSON)
    *progress, result = map(json.loads, response.text.splitlines())
    assert progress
    assert all("usage" not in event for event in progress)
    np.testing.assert_allclose(result["usage"]["components"], components, rtol=1e-6)


async def test_a_model_that_cannot_count_says_so(service: Service) -> None:
    assert (await service.http.get("/info")).json()["components"] is True
    service.runner.counts = False
    assert (await service.http.get("/info")).json()["components"] is False
    response = await service.http.post(f"{PATH}?components=true", content=TEXT, headers=PLAIN)
    error: dict[str, Any] = response.json()
    assert (response.status_code, error["error_type"]) == (422, "Validation")
    assert error["error"].startswith("components: the model")
    await service.classify(TEXT)


async def test_the_log_is_spared(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gma.service.http.middleware"):
        await service.classify(TEXT, components=True)
    (line,) = (record for record in caplog.records if record.getMessage() == "request")
    assert "components" not in str(vars(line))
