"""What browsers and proxies need: other origins, and a path in front."""

from __future__ import annotations

from pathlib import Path

import pytest

from gma.service.http.keys import hash_of
from gma.service.settings import Settings, SettingsError
from tests.service.answers import PATH, PLAIN
from tests.service.asgi import TEXT, Service

pytestmark = pytest.mark.anyio

ORIGIN = "https://app.example"
KEY = {"authorization": "Bearer gma_one"}
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(hash_of("gma_one"))
    return file


class TestOrigins:
    async def test_one_that_may(self, checkpoint: Path, keys: Path) -> None:
        origins = f"{ORIGIN}, http://localhost:3000"
        async with Service(checkpoint, api_keys_file=keys, cors_origins=origins) as service:
            asked = await service.http.options(PATH, headers={"origin": ORIGIN, **PREFLIGHT})
            assert asked.status_code == 200
            assert asked.headers["access-control-allow-origin"] == ORIGIN
            assert "authorization" in asked.headers["access-control-allow-headers"]
            for headers, status in ((KEY, 200), ({}, 401)):
                response = await service.http.post(
                    PATH, content=TEXT, headers={**PLAIN, **headers, "origin": ORIGIN}
                )
                assert response.status_code == status
                assert response.headers["access-control-allow-origin"] == ORIGIN
                assert "x-request-id" in response.headers["access-control-expose-headers"]
                assert response.headers["x-request-id"]

    async def test_one_that_may_not(self, checkpoint: Path) -> None:
        async with Service(checkpoint, cors_origins=ORIGIN) as service:
            headers = {"origin": "https://other.example"}
            asked = await service.http.options(PATH, headers={**headers, **PREFLIGHT})
            assert asked.status_code == 400
            response = await service.http.get("/info", headers=headers)
            for each in (asked, response):
                assert "access-control-allow-origin" not in each.headers

    async def test_none_by_default(self, service: Service) -> None:
        asked = await service.http.options(PATH, headers={"origin": ORIGIN, **PREFLIGHT})
        assert (asked.status_code, asked.headers["allow"]) == (204, "POST, OPTIONS")
        assert "access-control-allow-origin" not in asked.headers

    @pytest.mark.parametrize(
        "given",
        [
            "app.example",
            f"{ORIGIN}/",
            f"{ORIGIN} http://b",
            "https://App.example",
            "http://a@b",
            "http://a:b",
            "http://[a",
            "https://*.example",
        ],
    )
    async def test_one_that_is_none(self, checkpoint: Path, given: str) -> None:
        with pytest.raises(SettingsError, match="GMA_CORS_ORIGINS"):
            Settings.load(checkpoint=checkpoint, cors_origins=given)


class TestPrefix:
    async def test_may_be_in_front_of_every_path(self, checkpoint: Path, keys: Path) -> None:
        async with Service(checkpoint, api_keys_file=keys, path_prefix="/x/gma") as service:
            for front in ("/x/gma", ""):
                assert (await service.http.get(f"{front}/health")).status_code == 200
                assert (await service.http.get(f"{front}/info/")).status_code == 401
                response = await service.http.post(
                    f"{front}{PATH}", content=TEXT, headers={**PLAIN, **KEY}
                )
                assert response.status_code == 200
            for path in ("/x/gmahealth", "/x/health"):
                assert (await service.http.get(path, headers=KEY)).status_code == 404

    async def test_is_what_the_page_asks_with(self, checkpoint: Path) -> None:
        async with Service(checkpoint, path_prefix="/gma") as service:
            for path in ("/gma", "/gma/"):
                page = await service.http.get(path, follow_redirects=True)
                assert page.url.path == "/gma/docs"
                assert "'/gma/openapi.json'" in page.text
            described = (await service.http.get("/gma/openapi.json")).json()
            assert described["servers"] == [{"url": "/gma"}]
            assert PATH in described["paths"]

    @pytest.mark.parametrize("given", ["gma", "/gma/", "/", "/a//b", "/a b"])
    async def test_one_that_is_none(self, checkpoint: Path, given: str) -> None:
        with pytest.raises(SettingsError, match="GMA_PATH_PREFIX"):
            Settings.load(checkpoint=checkpoint, path_prefix=given)

    async def test_is_taken_off_once(self, checkpoint: Path) -> None:
        async with Service(checkpoint, path_prefix="/gma") as service:
            assert (await service.http.get("/gma/gma/health")).status_code == 404

    async def test_one_that_the_services_own_paths_begin_with(self, checkpoint: Path) -> None:
        with pytest.raises(SettingsError, match="GMA_PATH_PREFIX"):
            Settings.load(checkpoint=checkpoint, path_prefix="/v1")
