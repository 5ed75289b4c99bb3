"""Models that say which labels are there: several, or none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from gma.service.gateway.contract import Answer, Info, ProgressEvent, ResultEvent
from gma.service.settings import Settings
from tests.service.answers import NDJSON, PATH, PLAIN, check_evidence, logits, said, same
from tests.service.asgi import LABELS, TEXT, Service, save_checkpoint, serving
from tests.service.deciding import deciding

pytestmark = pytest.mark.anyio

SIZE = len(TEXT.encode())


def check(answer: dict[str, Any]) -> None:
    """Check that a multi-label answer, or a span of one, says what its scores do."""
    for each in answer["scores"]:
        assert each["score"] == pytest.approx(1 / (1 + np.exp(-each["logit"])))
    assert answer["labels"] == [
        each["label"] for each in answer["scores"] if each["score"] >= each["threshold"]
    ]
    assert "label" not in answer


async def check_described(service: Service, answer: dict[str, Any]) -> None:
    """Check that the OpenAPI page describes an answer, and every field of it."""
    description = (await service.http.get("/openapi.json")).json()
    schema = {"$ref": "#/components/schemas/Answer", "components": description["components"]}
    jsonschema.Draft202012Validator(schema).validate(answer)
    schemas = description["components"]["schemas"]
    assert answer.keys() <= schemas["Answer"]["properties"].keys()
    assert answer["scores"][0].keys() <= schemas["LabelScore"]["properties"].keys()


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A worker chooses how many threads its process computes with."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


async def events_of(service: Service, **parameters: Any) -> list[dict[str, Any]]:
    response = await service.http.post(PATH, content=TEXT, headers=NDJSON, params=parameters)
    return [json.loads(line) for line in response.text.splitlines()]


class TestMultiLabel:
    @pytest.mark.parametrize("there", [(), ("ann",), ("ann", "cyd"), LABELS])
    async def test_says_the_labels_that_reach_their_threshold(
        self, tmp_path: Path, there: tuple[str, ...]
    ) -> None:
        async with Service(deciding(tmp_path, there, multi_label=True)) as service:
            answer = await service.classify(TEXT, evidence=True)
            await check_described(service, answer)
        TypeAdapter(Answer).validate_python(answer, strict=True)
        assert set(answer["labels"]) == set(there)
        assert list(answer)[:3] == ["model", "labels", "scores"]
        check(answer)
        check_evidence(answer, SIZE)
        for span in answer["evidence"]:
            check(span)
        assert sum(each["score"] for each in answer["scores"]) != pytest.approx(1)

    @pytest.mark.parametrize("causal", [True, False])
    async def test_says_the_same_whole_and_in_events(self, tmp_path: Path, causal: bool) -> None:
        checkpoint = deciding(tmp_path, ("ann", "cyd"), multi_label=True, causal=causal)
        settings = Settings.load(
            checkpoint=checkpoint,
            device="cpu",
            rows=2,
            chunk_tokens=8,
            threads=1,
            progress_interval_s=1e-9,
        )
        async with serving(settings) as client:
            whole = (await client.post(PATH, content=TEXT, headers=PLAIN)).json()
            of_json = (await client.post(PATH, json={"text": TEXT})).json()
            lines = (await client.post(PATH, content=TEXT, headers=NDJSON)).text.splitlines()
            sse = {**PLAIN, "accept": "text/event-stream"}
            told = (await client.post(PATH, content=TEXT, headers=sse)).text
        *progress, result = map(json.loads, lines)
        assert progress
        for event in progress:
            TypeAdapter(ProgressEvent).validate_python(event, strict=True)
            assert event.keys() == {"event", "bytes", "tokens"} | ({"labels"} if causal else set())
            assert set(event.get("labels", ())) <= set(LABELS)
        TypeAdapter(ResultEvent).validate_python(result, strict=True)
        last = json.loads(told.strip().splitlines()[-1].removeprefix("data: "))
        for answer in (whole, of_json, result, last):
            assert set(answer["labels"]) == {"ann", "cyd"}
            assert same(answer, whole)

    async def test_progress_is_of_what_was_read(self, tmp_path: Path) -> None:
        checkpoint = deciding(tmp_path, ("ann", "cyd"), multi_label=True)
        async with Service(checkpoint, progress_interval_s=1e-9) as service:
            for event in (await events_of(service))[:-1]:
                so_far = await service.classify(TEXT, max_tokens=event["tokens"])
                assert event["labels"] == so_far["labels"]

    async def test_top_k_is_of_scores_and_labels_are_all_that_are_there(
        self, tmp_path: Path
    ) -> None:
        async with Service(deciding(tmp_path, LABELS, multi_label=True)) as service:
            whole = await service.classify(TEXT)
            best = await service.classify(TEXT, top_k=1, evidence=True)
        assert best["labels"] == whole["labels"] == list(logits(whole))
        assert best["scores"] == [pytest.approx(whole["scores"][0])]
        assert all(len(span["scores"]) == 1 for span in best["evidence"])

    @pytest.mark.parametrize(("threshold", "there"), [(0.0, True), (1.0, False)])
    async def test_thresholds_at_the_ends(
        self, tmp_path: Path, threshold: float, there: bool
    ) -> None:
        thresholds = (threshold,) * len(LABELS)
        checkpoint = save_checkpoint(tmp_path, multi_label=True, thresholds=thresholds)
        async with Service(checkpoint) as service:
            answer = await service.classify(TEXT)
        assert set(answer["labels"]) == (set(LABELS) if there else set())
        check(answer)

    async def test_without_thresholds_a_label_is_there_from_one_half(self, tmp_path: Path) -> None:
        async with Service(save_checkpoint(tmp_path, multi_label=True)) as service:
            answer = await service.classify(TEXT, evidence=True)
            info = (await service.http.get("/info")).json()
        for part in (answer, *answer["evidence"]):
            assert part["labels"] == [x for x, logit in logits(part).items() if logit >= 0]
            assert {each["threshold"] for each in part["scores"]} == {0.5}
        assert len({len(span["labels"]) for span in answer["evidence"]}) > 1
        TypeAdapter(Info).validate_python(info, strict=True)
        assert (info["multi_label"], info["thresholds"]) == (True, [0.5, 0.5, 0.5])


class TestThresholdsOfASingleLabel:
    async def test_reached(self, tmp_path: Path) -> None:
        checkpoint = deciding(tmp_path, LABELS, multi_label=False)
        async with Service(checkpoint, progress_interval_s=1e-9) as service:
            answer = await service.classify(TEXT, evidence=True)
            await check_described(service, answer)
        TypeAdapter(Answer).validate_python(answer, strict=True)
        best = answer["scores"][0]
        assert said(answer) == {"label": best["label"]}
        assert sum(each["score"] for each in answer["scores"]) == pytest.approx(1)
        check_evidence(answer, SIZE)
        for span in answer["evidence"]:
            best = span["scores"][0]
            there = best["score"] >= best["threshold"]
            assert said(span) == {"label": best["label"] if there else None}

    async def test_no_other_label_is_said_for_a_best_one_that_is_below_its_own(
        self, tmp_path: Path
    ) -> None:
        async with Service(save_checkpoint(tmp_path / "plain")) as service:
            best = (await service.classify(TEXT))["label"]
        others = set(LABELS) - {best}
        checkpoint = deciding(tmp_path / "deciding", others, multi_label=False)
        async with Service(checkpoint, progress_interval_s=1e-9) as service:
            answer = await service.classify(TEXT)
            info = (await service.http.get("/info")).json()
            *progress, result = await events_of(service)
            await check_described(service, answer)
        assert said(answer) == said(result) == {"label": None}
        TypeAdapter(ResultEvent).validate_python(result, strict=True)
        first, *rest = answer["scores"]
        assert (first["label"], first["score"] < first["threshold"]) == (best, True)
        assert all(each["score"] >= each["threshold"] for each in rest)
        assert progress
        for event in progress:
            TypeAdapter(ProgressEvent).validate_python(event, strict=True)
            assert 0 < event["score"] <= 1
        assert info["multi_label"] is False
        assert info["thresholds"] == [
            next(each["threshold"] for each in answer["scores"] if each["label"] == label)
            for label in LABELS
        ]


async def test_without_thresholds_the_best_label_is_said(service: Service) -> None:
    """And nothing of labels that are there."""
    answer = await service.classify(TEXT, evidence=True)
    info = (await service.http.get("/info")).json()
    assert (info["multi_label"], info["thresholds"]) == (False, None)
    for part in (answer, *answer["evidence"]):
        assert said(part) == {"label": part["scores"][0]["label"]}
        assert all(each.keys() == {"label", "score", "logit"} for each in part["scores"])


async def test_an_exported_model_says_the_same(tmp_path: Path, exported: Path) -> None:
    """Its weights are those of every tiny checkpoint."""
    checkpoint = deciding(tmp_path / "tiny", ("ann", "cyd"), multi_label=True)
    exported = shutil.copytree(exported, tmp_path / "exported")
    manifest = json.loads((exported / "manifest.json").read_text())
    manifest["config"] = json.loads((checkpoint / "config.json").read_text())
    (exported / "manifest.json").write_text(json.dumps(manifest))
    common = {"device": "cpu", "threads": 1, "rows": 2, "chunk_tokens": 16}
    answers, infos = [], []
    for folder, others in (
        (checkpoint, {"backend": "torch"}),
        (exported, {"backend": "onnx", "ops_library": "none"}),
    ):
        async with serving(Settings.load(checkpoint=folder, **common, **others)) as client:
            answers.append(await _answer(client))
            infos.append((await client.get("/info")).json())
    expected, found = answers
    assert said(found) == said(expected)
    assert same(found, expected)
    assert [said(span) for span in found["evidence"]] == [
        said(span) for span in expected["evidence"]
    ]
    thresholds = [{x["label"]: x["threshold"] for x in answer["scores"]} for answer in answers]
    assert thresholds[0] == thresholds[1]
    for name in ("labels", "multi_label", "thresholds"):
        assert infos[0][name] == infos[1][name]


async def _answer(client: httpx.AsyncClient) -> dict[str, Any]:
    response = await client.post(f"{PATH}?evidence=true", content=TEXT, headers=PLAIN)
    answer: dict[str, Any] = response.json()
    return answer
