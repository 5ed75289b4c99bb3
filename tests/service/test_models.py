"""Several models in one service: how one is chosen, told of, and replaced."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from pydantic import TypeAdapter

from gma.service.engine.opening import Opening
from gma.service.errors import NotReady
from gma.service.gateway.contract import Info, ModelList, SeveralInfo
from gma.service.gateway.gateway import Gateway
from gma.service.gateway.model import Model, Models
from gma.service.http.app import create_app
from gma.service.link.client import OpenDocument, WorkerInfo
from tests.service.asgi import LABELS, PATIENCE_S, TEXT, Exchange, LocalWorkers, Service
from tests.service.asgi import save_checkpoint as saved

pytestmark = pytest.mark.anyio

PLAIN = {"content-type": "text/plain"}
NDJSON = {"content-type": "application/x-ndjson"}
DOCUMENTS = "/v1/documents"
TENSOR = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXT]}


class NoWorkers:
    """Those of a model whose last worker is lost."""

    count = 0

    async def open(self, opening: Opening) -> OpenDocument:
        raise NotReady("no worker is ready")

    async def info(self) -> WorkerInfo:
        raise NotReady("no worker is ready")


class Several:
    """A gateway of the models one and two; three is a checkpoint that may take a name."""

    def __init__(self, services: dict[str, Service]) -> None:
        self.services = services
        self.models = Models(self.model("one"), self.model("two"))
        gateway = Gateway(services["one"].settings, self.models)
        self.app = create_app(gateway)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://service", timeout=PATIENCE_S
        )

    def model(self, service: str, name: str | None = None) -> Model:
        """What runs in a service, by that name or another."""
        of = self.services[service]
        config = of.model.config.model_copy(update={"name": name or service})
        return Model(config, of.tokenizer, LocalWorkers(of.worker))

    async def post(self, path: str, body: object, status: int = 200) -> Any:
        response = await self.http.post(path, json=body)
        assert response.status_code == status, response.text
        return response.json()

    async def classify(self, path: str = DOCUMENTS, status: int = 200, **query: str) -> Any:
        response = await self.http.post(path, content=TEXT, headers=PLAIN, params=query)
        assert response.status_code == status, response.text
        return response.json()

    async def right(self, service: str) -> list[float]:
        """The scores, best first, that the only model of a service gives the text."""
        answer = await self.services[service].classify(TEXT)
        return [each["score"] for each in answer["scores"]]


@pytest.fixture(scope="module")
async def begun(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, Service]]:
    folder = tmp_path_factory.mktemp("models")
    options: dict[str, dict[str, Any]] = {
        "one": {},
        "two": {"multi_label": True, "thresholds": (0.0, 1.0, 0.0)},
        "three": {"layers": 1},
    }
    async with AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(
                Service(saved(folder / name, **changes), sessions=folder / "sessions")
            )
            for name, changes in options.items()
        }


@pytest.fixture
async def several(begun: dict[str, Service]) -> AsyncIterator[Several]:
    several = Several(begun)
    async with several.http:
        yield several


def scores(answer: Any) -> list[float]:
    """Of an answer in our own form."""
    return [each["score"] for each in answer["scores"]]


class TestChoice:
    @pytest.mark.parametrize("name", ["one", "two"])
    async def test_each_way_names_the_same(self, several: Several, name: str) -> None:
        right = pytest.approx(await several.right(name), abs=1e-6)
        lines = json.dumps({"text": TEXT, "model": name})
        text = json.dumps({"text": TEXT})
        in_batches = [
            await several.http.post(path, content=line, headers=NDJSON)
            for path, line in (
                (f"{DOCUMENTS}:batch", lines),
                (f"{DOCUMENTS}:batch?model={name}", text),
                (f"/v1/models/{name}/documents:batch", text),
            )
        ]
        answers = [
            await several.classify(model=name),
            await several.classify(f"/v1/models/{name}/documents"),
            await several.post(DOCUMENTS, {"model": name, "text": TEXT}),
            await several.post(DOCUMENTS, {"text": TEXT, "model": name}),
            await several.post(f"/v1/models/{name}/documents", {"text": TEXT}),
            *(each.json() for each in in_batches),
        ]
        assert [each["model"] for each in answers] == [name] * len(answers)
        assert all(scores(each) == right for each in answers)

    @pytest.mark.parametrize("name", ["one", "two"])
    async def test_by_other_servers_clients(self, several: Several, name: str) -> None:
        right = pytest.approx(await several.right(name), abs=1e-6)
        for path in (
            f"/models/{name}/predict",
            f"/models/{name}/invocations",
            f"/predict?model={name}",
        ):
            assert [x["score"] for x in await several.post(path, {"inputs": TEXT})] == right
        for path in (f"/models/{name}", f"/models/{name}/", f"/?model={name}"):
            (found,) = await several.post(path, {"inputs": TEXT})
            assert [each["score"] for each in found] == right
        for path in ("/classify", "/v1/classify"):
            answer = await several.post(path, {"model": name, "input": TEXT})
            assert answer["model"] == name
            assert sorted(answer["data"][0]["probs"], reverse=True) == right
        answer = await several.post(f"/v2/models/{name}/infer", {"inputs": [TENSOR]})
        assert answer["model_name"] == name
        assert sorted(answer["outputs"][1]["data"], reverse=True) == right

    async def test_lines_of_one_batch_name_their_own(self, several: Several) -> None:
        names = ["two", "one", None, "nobody"]
        members = [{"model": name} if name else {} for name in names]
        lines = "\n".join(json.dumps({**each, "text": TEXT}) for each in members)
        response = await several.http.post(f"{DOCUMENTS}:batch", content=lines, headers=NDJSON)
        told = {each["line"]: each for each in map(json.loads, response.text.splitlines())}
        assert [told[n].get("model") for n in (1, 2)] == ["two", "one"]
        assert [told[n]["status"] for n in (3, 4)] == [422, 404]

    async def test_who_names_none_is_told_which_there_are(self, several: Several) -> None:
        wrong = await several.classify(status=422)
        assert wrong == {
            "error": "model is missing: this service has one, two",
            "error_type": "Validation",
        }
        told = [
            await several.post("/predict", {"inputs": TEXT}, 422),
            await several.post("/", {"inputs": TEXT}, 400),
            (await several.post("/classify", {"input": TEXT}, 400))["error"],
            await several.post("/v1/sessions", None, 422),
        ]
        assert all("one, two" in (each.get("message") or each["error"]) for each in told)

    async def test_a_name_that_there_is_not_is_404_as_each_tells_it(self, several: Several) -> None:
        message = "there is no model x: this service has one, two"
        ours = {"error": message, "error_type": "UnknownModel"}
        assert await several.classify(model="x", status=404) == ours
        assert await several.classify("/v1/models/x/documents", status=404) == ours
        assert await several.post(DOCUMENTS, {"text": TEXT, "model": "x"}, 404) == ours
        assert await several.post("/models/x/predict", {"inputs": TEXT}, 404) == ours
        assert await several.post("/models/x", {"inputs": TEXT}, 404) == ours
        assert await several.post("/v1/sessions?model=x", None, 404) == ours
        openai = await several.post("/classify", {"input": TEXT, "model": "x"}, 404)
        assert openai["error"] == {
            "message": message,
            "type": "NotFoundError",
            "param": None,
            "code": 404,
        }
        infer = await several.post("/v2/models/x/infer", {"inputs": [TENSOR]}, 404)
        assert infer == {"error": message}

    async def test_long_names_are_not_repeated(self, several: Several) -> None:
        wrong = await several.classify(model="x" * 256, status=404)
        assert len(wrong["error"]) < 120
        assert (await several.classify(model="x" * 257, status=422))["error_type"] == "Validation"

    async def test_a_path_and_a_body_that_differ(self, several: Several) -> None:
        wrong = await several.post("/v1/models/one/documents", {"text": TEXT, "model": "two"}, 404)
        assert wrong["error"] == "model: the path says one, and the request two"
        assert wrong["error_type"] == "UnknownModel"
        await several.classify("/v1/models/one/documents", status=404, model="two")

    @pytest.mark.parametrize("given", ["7", "null, null", "[]", '"a" 1', '"' + "x" * 5000 + '"'])
    async def test_what_is_no_name(self, several: Several, given: str) -> None:
        body = f'{{"model": {given}, "text": "a"}}'
        headers = {"content-type": "application/json"}
        response = await several.http.post(DOCUMENTS, content=body, headers=headers)
        assert response.status_code in (400, 422)
        assert len(response.json()["error"]) < 200

    async def test_one_alone_may_be_named(self, several: Several) -> None:
        service = several.services["one"]
        assert (await service.classify(TEXT, model="tiny"))["model"] == "tiny"
        response = await service.http.post(
            DOCUMENTS, content=TEXT, headers=PLAIN, params={"model": "two"}
        )
        assert response.status_code == 404


class TestTelling:
    async def test_models_are_listed(self, several: Several) -> None:
        told = (await several.http.get("/v1/models")).json()
        TypeAdapter(ModelList).validate_python(told, strict=True)
        one, two = told["data"]
        assert (one["id"], two["id"]) == ("one", "two")
        assert (one["labels"], one["multi_label"], two["multi_label"]) == ([*LABELS], False, True)
        assert one["limits"]["max_document_bytes"] == 64 * 2**20
        assert (await several.http.get("/v1/models/two")).json() == two
        assert (await several.http.get("/v1/models/x")).status_code == 404

    async def test_info(self, several: Several) -> None:
        told = (await several.http.get("/info")).json()
        TypeAdapter(SeveralInfo).validate_python(told, strict=True)
        assert told["models"] == ["one", "two"]
        told = (await several.http.get("/info", params={"model": "two"})).json()
        TypeAdapter(Info).validate_python(told, strict=True)
        assert (told["model"], told["models"]) == ("two", ["one", "two"])
        assert (await several.http.get("/info", params={"model": "x"})).status_code == 404

    async def test_v2_tells_of_each(self, several: Several) -> None:
        for name in ("one", "two"):
            told = (await several.http.get(f"/v2/models/{name}")).json()
            assert told["name"] == name
            told = (await several.http.get(f"/v2/models/{name}/ready")).json()
            assert told == {"name": name, "ready": True}

    async def test_health_is_that_of_every_model(self, several: Several) -> None:
        assert (await several.http.get("/health")).status_code == 200
        lost = Model(several.model("two").config, several.services["two"].tokenizer, NoWorkers())
        several.models.replace([several.model("one"), lost])
        assert (await several.http.get("/health")).status_code == 503
        assert (await several.http.get("/v2/models/one/ready")).status_code == 200
        assert (await several.http.get("/v2/models/two/ready")).status_code == 503
        assert (await several.classify(model="one"))["model"] == "one"
        several.models.replace([])
        assert (await several.http.get("/health")).status_code == 503

    async def test_each_is_counted_by_itself(self, several: Several) -> None:
        def counted() -> list[float]:
            names = (
                "gma_document_bytes_total",
                "gma_tokenized_bytes_total",
                "gma_queue_seconds_count",
            )
            found = [
                REGISTRY.get_sample_value(name, {"model": model})
                for name in names
                for model in ("one", "two")
            ]
            return [x or 0 for x in found]

        before = counted()
        await several.classify(model="one")
        size = len(TEXT.encode())
        assert [x - y for x, y in zip(counted(), before, strict=True)] == [size, 0, size, 0, 1, 0]
        said = {"model": "one", "label": (await several.classify(model="one"))["label"]}
        assert REGISTRY.get_sample_value("gma_prediction_score_count", said)

    async def test_a_model_in_the_path_is_no_other_route(self, several: Several) -> None:
        def requests(route: str) -> float:
            labels = {"route": route, "status": "200"}
            return REGISTRY.get_sample_value("gma_requests_total", labels) or 0

        before = requests(DOCUMENTS), requests("/predict")
        await several.classify("/v1/models/one/documents")
        await several.post("/models/one/predict", {"inputs": TEXT})
        assert (requests(DOCUMENTS), requests("/predict")) == (before[0] + 1, before[1] + 1)


class TestReplacing:
    async def test_new_documents_are_read_by_the_new_one(self, several: Several) -> None:
        several.models.replace([several.model("three", "one"), several.model("two")])
        answer = await several.classify(model="one")
        assert answer["model"] == "one"
        assert scores(answer) == pytest.approx(await several.right("three"), abs=1e-6)

    async def test_one_that_has_begun_ends_where_it_began(self, several: Several) -> None:
        right = await several.right("one")
        headers = PLAIN | {"accept": "application/x-ndjson"}
        async with Exchange(several.app, f"{DOCUMENTS}?model=one", headers) as upload:
            data = TEXT.encode()
            upload.send(data[: len(data) // 2])
            assert (await upload.head())[0] == 200
            assert (await upload.event())["event"] == "progress"
            several.models.replace([several.model("three", "one")])
            upload.send(data[len(data) // 2 :], last=True)
            assert scores((await upload.events())[-1]) == pytest.approx(right, abs=1e-6)

    async def test_one_of_which_nothing_was_read_is_for_the_new_one(self, several: Several) -> None:
        async with Exchange(several.app, f"{DOCUMENTS}?model=one", PLAIN) as upload:
            upload.send(b"")
            several.models.replace([several.model("three", "one")])
            upload.send(TEXT.encode(), last=True)
            assert (await upload.head())[0] == 200
            right = await several.right("three")
            assert scores(await upload.json()) == pytest.approx(right, abs=1e-6)

    async def test_one_that_is_removed_is_404_and_the_other_needs_no_name(
        self, several: Several
    ) -> None:
        several.models.replace([several.model("two")])
        await several.classify(model="one", status=404)
        assert (await several.classify())["model"] == "two"

    async def test_one_that_is_to_come_is_503_and_has_its_name(self, several: Several) -> None:
        several.models.replace([several.model("two")], starting=["one", "two"])
        assert (await several.classify(model="one", status=503))["error_type"] == "NotReady"
        assert "one, two" in (await several.classify(model="x", status=404))["error"]
        assert (await several.http.get("/health")).status_code == 200

    async def test_one_that_is_to_come_changes_nothing_for_who_names_none(
        self, several: Several
    ) -> None:
        several.models.replace([several.model("two")], starting=["one"])
        assert (await several.classify())["model"] == "two"
        told = (await several.http.get("/info")).json()
        assert (told["model"], told["models"]) == ("two", ["one", "two"])
        several.models.replace([], starting=["one", "two"])
        assert (await several.classify(status=503))["error_type"] == "NotReady"


class TestSessions:
    async def begin(self, several: Several, name: str) -> str:
        session: str = (await several.post(f"/v1/sessions?model={name}", None, 201))["id"]
        answer = await self.append(several, session)
        assert answer["model"] == name
        assert scores(answer) == pytest.approx(await several.right(name), abs=1e-6)
        return f"/v1/sessions/{session}"

    async def append(self, several: Several, session: str, status: int = 200) -> Any:
        response = await several.http.patch(
            f"/v1/sessions/{session}", content=TEXT, headers=PLAIN | {"upload-offset": "0"}
        )
        assert response.status_code == status, response.text
        return response.json()

    async def test_each_is_read_by_its_own(self, several: Several) -> None:
        one, two = await self.begin(several, "one"), await self.begin(several, "two")
        for session, name in ((one, "one"), (two, "two")):
            assert (await several.http.get(session)).json()["model"] == name

    async def test_a_snapshot_is_of_its_model(self, several: Several) -> None:
        session = await self.begin(several, "two")
        data = (await several.http.get(f"{session}/snapshot")).content
        headers = {"content-type": "application/octet-stream"}
        statuses = [
            (await several.http.post(f"/v1/sessions{query}", content=data, headers=headers))
            for query in ("", "?model=two", "?model=one")
        ]
        assert [each.status_code for each in statuses] == [201, 201, 422]
        resumed = await several.http.get(f"/v1/sessions/{statuses[0].json()['id']}")
        assert resumed.json()["model"] == "two"

    async def test_of_a_model_that_was_replaced_it_is_gone(self, several: Several) -> None:
        session = await self.begin(several, "one")
        several.models.replace([several.model("three", "one"), several.model("two")])
        response = await several.http.get(session)
        assert (response.status_code, response.json()["error_type"]) == (410, "SessionGone")

    async def test_the_same_model_by_another_name_goes_on(self, several: Several) -> None:
        session = await self.begin(several, "one")
        several.models.replace([several.model("one", "other"), several.model("two")])
        assert (await several.http.get(session)).json()["model"] == "other"

    async def test_of_two_names_of_one_checkpoint_each_keeps_its_own(
        self, several: Several
    ) -> None:
        several.models.replace([several.model("one", "a"), several.model("one", "b")])
        for name in ("a", "b"):
            session = (await several.post(f"/v1/sessions?model={name}", None, 201))["id"]
            told = (await several.http.get(f"/v1/sessions/{session}")).json()
            assert told["model"] == name
