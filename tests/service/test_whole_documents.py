"""A bidirectional model, served: whole documents, exact evidence, no running answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from gma.model import weights
from gma.model.reading import read
from gma.service.gateway.contract import Info, ProgressEvent, ResultEvent
from gma.service.settings import Settings
from tests.service.answers import JSON, NDJSON, PATH, PLAIN, check_evidence, logits, same
from tests.service.asgi import LABELS, TEXT, save_checkpoint, serving

pytestmark = pytest.mark.anyio

CHUNK = 8
PAGE_BYTES = CHUNK * 16 * 4


@pytest.fixture(scope="module", params=["paper", "forgetting"])
def both_ways(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(
        tmp_path_factory.mktemp("both_ways"), causal=False, form=request.param, layers=3
    )


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A worker chooses how many threads its process computes with."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def settings(checkpoint: Path, *, pages: int = 500, **others: Any) -> Settings:
    return Settings.load(
        checkpoint=checkpoint,
        device="cpu",
        threads=1,
        **{
            "rows": 4,
            "chunk_tokens": CHUNK,
            "page_memory": pages * PAGE_BYTES,
            "progress_interval_s": 1e-9,
            **others,
        },
    )


def expected(checkpoint: Path, text: str) -> dict[str, float]:
    """The logits by label, in float64."""
    loaded = weights.load(checkpoint)
    tokens = torch.from_numpy(loaded.tokenizer.encode(text.encode()))
    (found,) = read(loaded.classifier.double(), [tokens])
    return dict(zip(LABELS, found.logits.tolist(), strict=True))


def check(answer: dict[str, Any], checkpoint: Path, text: str) -> None:
    assert logits(answer) == pytest.approx(expected(checkpoint, text), rel=1e-5, abs=1e-5)
    assert answer["usage"]["bytes"] == len(text.encode())
    assert answer["usage"]["chunks"] == -(-answer["usage"]["tokens"] // CHUNK)
    check_evidence(answer, len(text.encode()))


@pytest.mark.parametrize("headers", [PLAIN, JSON], ids=["text", "json"])
async def test_answers_are_exact_and_so_is_their_evidence(
    both_ways: Path, headers: dict[str, str]
) -> None:
    texts = [TEXT, "a", TEXT[:40], TEXT * 5, "\ufeff" + TEXT]
    async with serving(settings(both_ways)) as client:
        answers = await asyncio.gather(
            *(
                client.post(
                    f"{PATH}?evidence=true",
                    content=json.dumps({"text": text}) if headers is JSON else text,
                    headers=headers,
                )
                for text in texts
            )
        )
    for text, answer in zip(texts[:-1], answers, strict=False):
        check(answer.json(), both_ways, text)
    check_evidence(answers[-1].json(), len(texts[-1].encode()))
    assert logits(answers[-1].json()) == pytest.approx(logits(answers[0].json()), rel=1e-5)


@pytest.mark.parametrize("evidence", [True, False])
async def test_progress_tells_how_far_and_not_what(both_ways: Path, evidence: bool) -> None:
    async with serving(settings(both_ways)) as client:
        response = await client.post(
            PATH, content=TEXT * 3, headers=NDJSON, params={"evidence": evidence}
        )
        alone = await client.post(PATH, content=TEXT * 3, headers=PLAIN)
    *progress, result = map(json.loads, response.text.splitlines())
    assert progress
    for event in progress:
        TypeAdapter(ProgressEvent).validate_python(event, strict=True)
        assert event.keys() == {"event", "bytes", "tokens"}
    read_so_far = [(event["bytes"], event["tokens"]) for event in progress]
    assert read_so_far == sorted(read_so_far)
    TypeAdapter(ResultEvent).validate_python(result, strict=True)
    assert same(result, alone.json())
    assert ("evidence" in result) == evidence


async def test_what_runs_is_told(both_ways: Path) -> None:
    async with serving(settings(both_ways, pages=100)) as client:
        info = (await client.get("/info")).json()
    TypeAdapter(Info).validate_python(info, strict=True)
    assert info["causal"] is False
    assert info["max_document_tokens"] == 100 * CHUNK
    assert "4 passes" in info["kernels"]


async def test_a_causal_model_tells_no_limit(checkpoint: Path) -> None:
    async with serving(settings(checkpoint)) as client:
        info = (await client.get("/info")).json()
    assert (info["causal"], info["max_document_tokens"]) == (True, None)


@pytest.mark.parametrize("pieces", [1, 50])
@pytest.mark.parametrize("headers", [PLAIN, NDJSON], ids=["answer", "events"])
async def test_a_document_beyond_the_pages_is_told_the_limit_and_harms_no_other(
    both_ways: Path, pieces: int, headers: dict[str, str]
) -> None:
    text = (TEXT * 40).encode()
    size = -(-len(text) // pieces)

    async def body() -> Any:
        for start in range(0, len(text), size):
            yield text[start : start + size]

    async with serving(settings(both_ways, pages=100)) as client:
        refused, taken = await asyncio.gather(
            client.post(PATH, content=body(), headers=headers),
            client.post(f"{PATH}?evidence=true", content=TEXT, headers=PLAIN),
        )
        assert refused.status_code == 413
        error = refused.json()
        assert error["error_type"] == "TooLong"
        assert f"more than {100 * CHUNK} tokens" in error["error"]
        check(taken.json(), both_ways, TEXT)
        cut = await client.post(f"{PATH}?max_tokens={100 * CHUNK}", content=text, headers=PLAIN)
        assert cut.json()["truncated"]
        assert cut.json()["usage"]["tokens"] == 100 * CHUNK
