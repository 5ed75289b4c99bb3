"""Requests of other servers' clients, and what they get."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from struct import pack
from typing import Any

import numpy as np
import pytest
import torch
from httpx import Response

from gma.service.gateway.admission import Admission
from gma.service.gateway.allowance import Allowance, Key
from gma.service.gateway.scores import scores
from gma.service.gateway.spending import Spending
from gma.service.http.json_document import MOST_DEPTH, MOST_VALUES
from gma.service.http.keys import hash_of
from gma.service.observe.logs import JsonFormatter
from gma.service.settings import Settings
from tests.service.answers import JSON, PATH, logits
from tests.service.asgi import LABELS, TEXT, Exchange, Service, save_checkpoint, serving

pytestmark = pytest.mark.anyio


@pytest.fixture
def service(lasting: Service) -> Service:
    return lasting


SHORT = "nobody spoke"
INFER = "/v2/models/tiny/infer"

# For each path, a request with these texts.
ASKED: dict[str, Callable[[object], dict[str, Any]]] = {
    "/predict": lambda texts: {"inputs": texts},
    "/invocations": lambda texts: {"inputs": texts},
    "/": lambda texts: {"inputs": texts},
    "/classify": lambda texts: {"model": "tiny", "input": texts},
    "/v1/classify": lambda texts: {"input": texts},
    INFER: lambda texts: {"inputs": [tensor(texts)]},
}
LISTS = {"/predict": "inputs", "/": "inputs", "/classify": "input", INFER: "text"}

HOSTILE = [
    (b"", 400),
    (b"{", 400),
    (b"\xff", 400),
    (b'{"inputs": "a"} x', 400),
    (b'{"inputs": "\xff", "input": "\xff"}', 400),
    (b"[]", 422),
    (b"7", 422),
    (b"{}", 422),
    (b'{"inputs": null, "input": null}', 422),
    (b'{"inputs": {"a": 1}, "input": {"a": 1}}', 422),
    (b'{"inputs": [["a", ["b"]]], "input": [["a"], ["b", ["c"]]]}', 422),
    (b'{"inputs": [], "input": []}', 422),
    (b'{"x": 1, "x": 2, "inputs": "a", "input": "a"}', 422),
    (b'{"x": ' + b"[" * (MOST_DEPTH + 1), 422),
    (b'{"inputs": ' + b"[" * 10**5, 422),
    (b'{"x": ' + b'{"x":' * 10**5, 422),
    (b'{"x": ' + b"9" * 1000 + b"}", 422),
    (b'{"' + b"x" * 10**5 + b'": 1}', 422),
    (b'{"\\ud800": 1}', 400),
    (b'{"x": [' + b"1," * 10**6, 422),
]

every_path = pytest.mark.parametrize("path", ASKED)
every_list = pytest.mark.parametrize("path", LISTS)


def tensor(texts: object) -> dict[str, Any]:
    """The input of a V2 request."""
    data = texts if isinstance(texts, list) else [texts]
    return {"name": "text", "shape": [len(data)], "datatype": "BYTES", "data": data}


def message(response: Response) -> str:
    """Of an answer that is an error, whichever form it has."""
    error = response.json()["error"]
    told: str = error["message"] if isinstance(error, dict) else error
    return told


async def post(service: Service, path: str, body: object, **headers: str) -> Any:
    """The answer to a request."""
    response = await service.http.post(path, json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


async def ours(service: Service, text: str) -> dict[str, float]:
    """Logits of a text by label, as our own route tells them."""
    return logits(await service.classify(text))


def by_label(predictions: list[dict[str, Any]]) -> dict[str, float]:
    found = [each["score"] for each in predictions]
    assert found == sorted(found, reverse=True)
    return {each["label"]: each["score"] for each in predictions}


@pytest.fixture
async def multi_label(tmp_path: Path) -> AsyncIterator[Service]:
    thresholds = (0.0, 1.0, 0.0)  # the first and the last are always there
    checkpoint = save_checkpoint(tmp_path, multi_label=True, thresholds=thresholds)
    async with Service(checkpoint) as service:
        yield service


@pytest.fixture
async def abstaining(tmp_path: Path) -> AsyncIterator[Service]:
    async with Service(save_checkpoint(tmp_path, thresholds=(1.0, 1.0, 1.0))) as service:
        yield service


class TestTextEmbeddingsInference:
    @pytest.mark.parametrize("path", ["/predict", "/invocations"])
    async def test_a_text_is_answered_flat(self, service: Service, path: str) -> None:
        answer = await post(service, path, {"inputs": TEXT, "raw_scores": True})
        assert by_label(answer) == pytest.approx(await ours(service, TEXT), rel=1e-5, abs=1e-6)
        scored = by_label(await post(service, path, {"inputs": TEXT}))
        assert sum(scored.values()) == pytest.approx(1)

    @pytest.mark.parametrize("inputs", [[SHORT, TEXT], [[SHORT], [TEXT]]])
    async def test_a_list_is_answered_nested(self, service: Service, inputs: list[Any]) -> None:
        answer = await post(service, "/predict", {"inputs": inputs, "raw_scores": True})
        for text, each in zip((SHORT, TEXT), answer, strict=True):
            assert by_label(each) == pytest.approx(await ours(service, text), rel=1e-5, abs=1e-6)

    async def test_a_list_of_one_is_one_too(self, service: Service) -> None:
        assert len(await post(service, "/predict", {"inputs": [SHORT]})) == 1

    async def test_a_pair_is_refused(self, service: Service) -> None:
        response = await service.http.post("/predict", json={"inputs": [["a"], ["a", "b"]]})
        assert response.status_code == 422
        assert response.json()["error_type"] == "Validation"
        assert "input 1 of the list is a list of 2" in message(response)

    async def test_what_is_cut_is_what_the_model_cannot_read(self, tmp_path: Path) -> None:
        checkpoint = save_checkpoint(tmp_path, causal=False)
        settings = Settings.load(
            checkpoint=checkpoint,
            device="cpu",
            threads=1,
            rows=4,
            chunk_tokens=8,
            page_memory=10**5,
        )
        threads = torch.get_num_threads()
        async with serving(settings) as http:
            most = (await http.get("/info")).json()["max_document_tokens"]
            asked = {"inputs": "the sea " * most, "raw_scores": True}
            response = await http.post("/predict", json=asked)
            assert (response.status_code, response.json()["error_type"]) == (413, "Validation")
            cut = await http.post("/predict", json={**asked, "truncate": True})
            read = await http.post(f"{PATH}?max_tokens={most}", json={"text": asked["inputs"]})
        torch.set_num_threads(threads)
        assert by_label(cut.json()) == pytest.approx(logits(read.json()), rel=1e-5, abs=1e-6)

    async def test_errors_have_its_names(self, checkpoint: Path) -> None:
        async with Service(checkpoint) as service:
            service.runner.fails = True
            response = await service.http.post("/predict", json={"inputs": SHORT})
            assert (response.status_code, response.json()["error_type"]) == (424, "Backend")
            await service.worker.stop()
            response = await service.http.post("/predict", json={"inputs": SHORT})
            assert (response.status_code, response.json()["error_type"]) == (503, "Unhealthy")
            assert response.headers["retry-after"]
            response = await service.http.post("/predict", json={"inputs": ["a"] * MOST_VALUES})
            assert (response.status_code, response.json()["error_type"]) == (422, "Validation")


class TestHuggingFace:
    async def test_is_always_nested(self, service: Service) -> None:
        (one,) = await post(service, "/", {"inputs": TEXT})
        assert by_label(one).keys() == set(LABELS)
        for n, each in enumerate(await post(service, "/", {"inputs": [TEXT, SHORT]})):
            alone = await ours(service, (TEXT, SHORT)[n])
            assert [said["label"] for said in each] == [*alone]

    @pytest.mark.parametrize("function", ["sigmoid", "softmax", "none", None])
    async def test_parameters(self, service: Service, function: str | None) -> None:
        found = await ours(service, TEXT)
        values = np.array([*found.values()])
        expected = values if function == "none" else scores(values, function == "sigmoid")
        (answer,) = await post(
            service,
            "/",
            {"inputs": TEXT, "parameters": {"function_to_apply": function, "top_k": 2}},
        )
        best = dict(zip(found, expected.tolist(), strict=True))
        assert by_label(answer) == pytest.approx(
            {label: best[label] for label in [*best][:2]}, rel=1e-5
        )

    @pytest.mark.parametrize(
        "parameters", [{"top_k": 0}, {"top_k": "a"}, {"function_to_apply": "tanh"}, []]
    )
    async def test_wrong_ones(self, service: Service, parameters: object) -> None:
        response = await service.http.post("/", json={"inputs": "a", "parameters": parameters})
        assert response.status_code == 400
        assert message(response).startswith("parameters")

    async def test_who_gets_it_is_led_to_the_documentation(self, service: Service) -> None:
        response = await service.http.get("/")
        assert (response.status_code, response.headers["location"]) == (307, "/docs")


class TestVllm:
    async def test_a_list(self, service: Service) -> None:
        answer = await post(service, "/v1/classify", {"model": "tiny", "input": [SHORT, TEXT]})
        assert (answer["object"], answer["model"]) == ("list", "tiny")
        read = [await service.classify(text) for text in (SHORT, TEXT)]
        tokens = sum(each["usage"]["tokens"] for each in read)
        assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == tokens
        for n, (each, data) in enumerate(zip(read, answer["data"], strict=True)):
            assert (data["index"], data["label"], data["num_classes"]) == (n, each["label"], 3)
            scored = {score["label"]: score["score"] for score in each["scores"]}
            assert data["probs"] == pytest.approx([scored[label] for label in LABELS], rel=1e-5)

    async def test_logits_and_the_first_tokens_if_asked_for(self, service: Service) -> None:
        answer = await post(
            service,
            "/classify",
            {"input": TEXT, "truncate_prompt_tokens": 5, "use_activation": False},
        )
        found = logits(await service.classify(TEXT, max_tokens=5))
        assert answer["usage"]["prompt_tokens"] == 5
        assert answer["data"][0]["probs"] == pytest.approx([found[label] for label in LABELS])

    async def test_nothing_is_cut_else(self, service: Service) -> None:
        tokens = (await service.classify(TEXT))["usage"]["tokens"]
        for most in ({}, {"truncate_prompt_tokens": -1}, {"truncate_prompt_tokens": None}):
            answer = await post(service, "/classify", {"input": TEXT, **most})
            assert answer["usage"]["prompt_tokens"] == tokens

    @pytest.mark.parametrize(
        ("changed", "status", "error_type"),
        [
            ({"model": "other"}, 404, "NotFoundError"),
            ({"input": [1, 2]}, 400, "BadRequestError"),
            ({"truncate_prompt_tokens": 0}, 400, "BadRequestError"),
            ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, 400, "BadRequestError"),
        ],
    )
    async def test_errors_are_openais(
        self, service: Service, changed: dict[str, Any], status: int, error_type: str
    ) -> None:
        response = await service.http.post("/classify", json={"input": "a", **changed})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["type"]) == (status, status, error_type)
        assert error["message"]

    async def test_the_best_of_several_labels(self, multi_label: Service) -> None:
        (data,) = (await post(multi_label, "/classify", {"input": TEXT}))["data"]
        assert data["label"] == (await multi_label.classify(TEXT))["labels"][0]
        assert sum(data["probs"]) != pytest.approx(1)

    async def test_none_if_the_model_abstains(self, abstaining: Service) -> None:
        (data,) = (await post(abstaining, "/classify", {"input": TEXT}))["data"]
        assert data["label"] is None


class TestV2:
    async def test_what_there_is(self, service: Service) -> None:
        assert "binary_tensor_data" in (await service.http.get("/v2")).json()["extensions"]
        assert (await service.http.get("/v2/health/live")).json() == {"live": True}
        assert (await service.http.get("/v2/health/ready")).json() == {"ready": True}
        ready = await service.http.get("/v2/models/tiny/ready")
        assert ready.json() == {"name": "tiny", "ready": True}
        model = (await service.http.get("/v2/models/tiny")).json()
        assert [tensor["name"] for tensor in model["inputs"]] == ["text"]
        assert [tensor["name"] for tensor in model["outputs"]] == ["label", "scores"]
        assert model["parameters"]["labels"] == list(LABELS)

    @pytest.mark.parametrize("path", ["/v2/models/other", "/v2/models/other/ready", "/v2/nothing"])
    async def test_what_there_is_not(self, service: Service, path: str) -> None:
        response = await service.http.get(path)
        assert response.status_code == 404
        assert response.json().keys() == {"error"}

    async def test_ready_only_once_warm(self, checkpoint: Path) -> None:
        http = Service(checkpoint).http
        assert (await http.get("/v2/health/live")).status_code == 200
        for path in ("/v2/health/ready", "/v2/models/tiny/ready"):
            assert (await http.get(path)).status_code == 503

    async def test_tensors_in_json(self, service: Service) -> None:
        answer = await post(service, INFER, {"id": "7", "inputs": [tensor([SHORT, TEXT])]})
        label, scored = answer["outputs"]
        assert (answer["id"], answer["model_name"]) == ("7", "tiny")
        read = [await service.classify(text) for text in (SHORT, TEXT)]
        assert label == {
            "name": "label",
            "datatype": "BYTES",
            "shape": [2],
            "data": [each["label"] for each in read],
        }
        assert (scored["datatype"], scored["shape"]) == ("FP32", [2, 3])
        by_name = [{s["label"]: s["score"] for s in each["scores"]} for each in read]
        expected = [each[name] for each in by_name for name in LABELS]
        assert scored["data"] == pytest.approx(expected, rel=1e-5)

    async def test_a_column_comes_back_as_one(self, service: Service) -> None:
        column = {**tensor([[SHORT], [TEXT]]), "shape": [2, 1]}
        asked = {"inputs": [column], "outputs": [{"name": "label"}]}
        (label,) = (await post(service, INFER, asked))["outputs"]
        assert label["shape"] == [2, 1]

    async def test_binary_tensors(self, service: Service) -> None:
        texts = [each.encode() for each in (SHORT, TEXT)]
        behind = b"".join(pack("<I", len(each)) + each for each in texts)
        text = {**tensor([SHORT, TEXT]), "parameters": {"binary_data_size": len(behind)}}
        del text["data"]
        asked = json.dumps({"inputs": [text], "parameters": {"binary_data_output": True}}).encode()
        response = await service.http.post(
            INFER,
            content=asked + behind,  # and no content type, as Triton's client
            headers={"inference-header-content-length": str(len(asked))},
        )
        assert response.status_code == 200, response.text
        size = int(response.headers["inference-header-content-length"])
        label, scored = json.loads(response.content[:size])["outputs"]
        rest = response.content[size:]
        assert len(rest) == sum(x["parameters"]["binary_data_size"] for x in (label, scored))
        told = np.frombuffer(rest[label["parameters"]["binary_data_size"] :], "<f4")
        plain = await post(service, INFER, {"inputs": [tensor([SHORT, TEXT])]})
        assert told.tolist() == pytest.approx(plain["outputs"][1]["data"])
        for name in plain["outputs"][0]["data"]:
            assert pack("<I", len(name)) + name.encode() in rest

    @pytest.mark.parametrize(
        ("header", "behind", "size"),
        [
            ("9" * 30, b"", 0),
            ("-1", b"", 0),
            ("0", b"", 0),
            ("999999", b"", 0),
            (None, pack("<I", 5) + b"abc", 7),  # the text is cut
            (None, pack("<I", 2**32 - 1), 4),
            (None, b"ab", 2),  # its length is
            (None, pack("<I", 1) + b"a", 6),  # another size
            (None, pack("<I", 1) + b"\xff", 5),
            (None, pack("<I", 0) * (MOST_VALUES + 1), 4 * (MOST_VALUES + 1)),
        ],
    )
    async def test_binary_tensors_that_are_wrong(
        self, service: Service, header: str | None, behind: bytes, size: int
    ) -> None:
        text: dict[str, Any] = {"name": "text", "shape": [1], "datatype": "BYTES"}
        text["parameters"] = {"binary_data_size": size}
        asked = json.dumps({"inputs": [text]}).encode()
        length = str(len(asked)) if header is None else header
        response = await service.http.post(
            INFER, content=asked + behind, headers={"inference-header-content-length": length}
        )
        assert response.status_code == 400
        assert response.json().keys() == {"error"}

    @pytest.mark.parametrize(
        "changed",
        [
            {"inputs": []},
            {"inputs": [tensor("a"), tensor("b")]},
            {"inputs": [{**tensor("a"), "name": "other"}]},
            {"inputs": [{**tensor("a"), "datatype": "FP32"}]},
            {"inputs": [{**tensor("a"), "shape": [2]}]},
            {"inputs": [{**tensor("a"), "shape": [1, 2]}]},
            {"inputs": [{**tensor("a"), "shape": [-1]}]},
            {"inputs": [{**tensor("a"), "data": [1]}]},
            {"inputs": [{**tensor("a"), "data": None}]},
            {"inputs": [{**tensor([]), "shape": [0]}]},
            {"inputs": [{**tensor("a"), "parameters": {"shared_memory_region": "x"}}]},
            {"outputs": [{"name": "other"}]},
            {"outputs": [{"name": "label", "parameters": {"classification": 2}}]},
        ],
    )
    async def test_what_is_wrong(self, service: Service, changed: dict[str, Any]) -> None:
        response = await service.http.post(INFER, json={"inputs": [tensor("a")], **changed})
        assert response.status_code == 400
        assert response.json().keys() == {"error"}

    async def test_no_label_is_an_empty_string(self, abstaining: Service) -> None:
        answer = await post(abstaining, INFER, {"inputs": [tensor("a")]})
        assert answer["outputs"][0]["data"] == [""]


class TestAll:
    @every_path
    async def test_what_nobody_knows_is_passed_over(self, service: Service, path: str) -> None:
        asked = ASKED[path](SHORT)
        with_more = {**asked, "user": {"name": ["x", 1.5, None]}, "priority": 0}
        response = await service.http.post(f"{path}?x=1", json=with_more)
        assert response.status_code == 200

    @every_list
    async def test_one_bad_text_is_told_by_its_place(self, service: Service, path: str) -> None:
        response = await service.http.post(path, json=ASKED[path]([SHORT, "", SHORT]))
        assert response.status_code == 400
        assert message(response).startswith(f"{LISTS[path]}[1]: the document is empty")

    @every_list
    async def test_many_texts(self, service: Service, path: str) -> None:
        answer = await post(service, path, ASKED[path]([SHORT] * 100))
        if isinstance(answer, dict):
            answer = answer["data"] if "data" in answer else answer["outputs"][0]["data"]
        assert len(answer) == 100
        assert await service.metric("gma_documents_in_flight") == 0

    @every_list
    async def test_too_many(self, service: Service, path: str) -> None:
        response = await service.http.post(path, json=ASKED[path](["a"] * MOST_VALUES))
        assert response.status_code == (422 if path == "/predict" else 400)
        assert str(MOST_VALUES) in message(response)

    @every_path
    async def test_hostile_bodies(self, service: Service, path: str) -> None:
        wrong = 422 if path in ("/predict", "/invocations") else 400
        for body, status in HOSTILE:
            response = await service.http.post(path, content=body, headers=JSON)
            assert response.status_code == (wrong if status == 422 else status), body[:60]
            assert message(response)

    @every_path
    async def test_another_content_type(self, service: Service, path: str) -> None:
        asked = json.dumps(ASKED[path](SHORT)).encode()
        for headers in ({"content-type": "text/plain"}, {**JSON, "content-encoding": "gzip"}):
            response = await service.http.post(path, content=asked, headers=headers)
            assert response.status_code == 415
            assert message(response)

    @every_path
    async def test_a_body_is_bounded(self, checkpoint: Path, path: str) -> None:
        async with Service(checkpoint, max_document_bytes=100) as service:
            response = await service.http.post(path, json=ASKED[path](TEXT))
            assert response.status_code == 413
            assert "100 bytes" in message(response)

    @every_path
    async def test_needs_a_key(self, checkpoint: Path, tmp_path: Path, path: str) -> None:
        file = tmp_path / "keys"
        file.write_text(hash_of("gma_one"))
        async with Service(checkpoint, api_keys_file=file) as service:
            response = await service.http.post(path, json=ASKED[path](SHORT))
            assert response.status_code == 401
            assert "Authorization: Bearer" in message(response)
            await post(service, path, ASKED[path](SHORT), authorization="Bearer gma_one")
            for open_path in ("/v2/health/live", "/v2/health/ready"):
                assert (await service.http.get(open_path)).status_code == 200
            assert (await service.http.get("/v2/models/tiny")).status_code == 401

    @every_path
    async def test_a_deadline(self, service: Service, path: str) -> None:
        service.runner.go.clear()
        response = await service.http.post(
            path, json=ASKED[path](SHORT), headers={"x-deadline-ms": "50"}
        )
        service.runner.go.set()
        assert response.status_code == 504
        assert "x-deadline-ms" in message(response)

    @every_path
    async def test_is_counted_and_logged(
        self, service: Service, path: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="gma")
        asked = ASKED[path]([SHORT, SHORT])
        response = await service.http.post(path, json=asked)
        route = "/v2/models/{model}/infer" if path == INFER else path
        (line,) = (json.loads(JsonFormatter().format(record)) for record in caplog.records)
        assert (line["route"], line["status"]) == (route, 200)
        assert line["bytes"] == 2 * len(SHORT)
        assert f'gma_requests_total{{route="{route}"' in (await service.http.get("/metrics")).text
        assert float(response.headers["x-total-time"]) > 0
        assert float(response.headers["x-inference-time"]) > 0

    async def test_a_body_in_pieces_and_a_client_that_leaves(self, service: Service) -> None:
        service.runner.go.clear()
        async with Exchange(service.app, "/predict", JSON) as exchange:
            exchange.send(b'{"inputs": ["nobody sp')
            exchange.send(b'oke", "of the ships"]}', last=True)
            await service.runner.step_begun()
            assert await service.metric("gma_documents_in_flight") == 2
            exchange.leave()
            await exchange.finished()
            assert await service.metric("gma_documents_in_flight") == 0
        service.runner.go.set()

    async def test_what_is_wrong_is_told_before_the_rest_comes(self, service: Service) -> None:
        async with Exchange(service.app, "/classify", JSON) as exchange:
            exchange.send(b'{"input": "a", }')
            status, _ = await exchange.head()
            assert status == 400
            assert (await exchange.json())["error"]["type"] == "BadRequestError"

    async def test_the_description_has_all(self, service: Service) -> None:
        paths = (await service.http.get("/openapi.json")).json()["paths"]
        for path in ("/predict", "/invocations", "/", "/classify", "/v1/classify"):
            assert JSON["content-type"] in paths[path]["post"]["requestBody"]["content"]
        assert "post" in paths["/v2/models/{model}/infer"]


class TestPlaces:
    """A list has as many as it has texts that are read at once."""

    def admission(self, checkpoint: Path, spending: Spending | None = None) -> Admission:
        settings = Settings.load(checkpoint=checkpoint, max_documents_in_flight=4)
        return Admission(settings, spending)

    def test_as_many_as_there_are(self, checkpoint: Path) -> None:
        admission = self.admission(checkpoint)
        with admission.admit() as first, admission.admit() as other:
            assert (first.widen(1), admission.documents) == (2, 3)
            assert (other.widen(9), admission.documents) == (2, 4)
            first.leave()
            assert admission.documents == 2
        assert admission.documents == 0

    def test_every_text_is_spent_of_an_allowance(self, checkpoint: Path) -> None:
        key = Key("a" * 64, "team", Allowance(documents_per_minute=10))
        spending = Spending(clock=lambda: 0.0)
        admission = self.admission(checkpoint, spending)
        with admission.admit(key=key) as admitted:
            admitted.widen(19)
        with pytest.raises(Exception, match="10 documents_per_minute"):
            spending.check(key)


@pytest.mark.parametrize("path", ["/predict", "/", "/classify"])
async def test_a_list_of_too_many_texts(service: Service, path: str) -> None:
    response = await service.http.post(path, json=ASKED[path](["a"] * 201))
    assert response.status_code in (400, 422)
    assert "at most 200 texts, and this one 201" in message(response)
