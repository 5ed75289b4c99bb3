"""The page's files as the gateway serves them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from gma.service.http.keys import hash_of
from gma.service.http.page import FOLDER, TYPES
from tests.service.asgi import Service

pytestmark = pytest.mark.anyio

BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
FILES = sorted(file.name for file in FOLDER.iterdir())
MOST_BYTES = 300_000


@pytest.fixture
def service(lasting: Service) -> Service:
    return lasting


def policy(value: str) -> dict[str, list[str]]:
    """A Content-Security-Policy's directives."""
    return {name: values for name, *values in map(str.split, value.split(";"))}


class TestRoot:
    async def test_is_the_page_for_browsers(self, service: Service) -> None:
        response = await service.http.get("/", headers=BROWSER)
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert response.headers["vary"] == "accept"
        assert response.content == (FOLDER / "index.html").read_bytes()

    @pytest.mark.parametrize("accept", ["*/*", "application/json"])
    async def test_is_the_documentation_for_others(self, service: Service, accept: str) -> None:
        response = await service.http.get("/", headers={"accept": accept})
        assert (response.status_code, response.headers["location"]) == (307, "/docs")
        assert response.headers["vary"] == "accept"

    async def test_has_a_head(self, service: Service) -> None:
        response = await service.http.head("/", headers=BROWSER)
        assert (response.status_code, response.content) == (200, b"")
        assert response.headers["content-length"] == str((FOLDER / "index.html").stat().st_size)

    async def test_names_only_files_that_there_are(self, service: Service) -> None:
        named = set(re.findall(r'(?:href|src)="([^"]+)"', (FOLDER / "index.html").read_text()))
        assert {"page/app.js", "page/style.css", "page/icon.svg"} <= named
        for path in named:
            assert (await service.http.get(f"/{path}")).status_code == 200

    async def test_behind_a_path(self, checkpoint: Path) -> None:
        async with Service(checkpoint, path_prefix="/x/gma") as service:
            led = await service.http.get("/x/gma", headers=BROWSER)
            assert (led.status_code, led.headers["location"]) == (307, "/x/gma/")
            page = await service.http.get("/x/gma/", headers=BROWSER)
            assert page.status_code == 200
            for path in re.findall(r'(?:href|src)="([^"]+)"', page.text):
                assert (await service.http.get(f"/x/gma/{path}")).status_code == 200


class TestFiles:
    @pytest.mark.parametrize("name", FILES)
    async def test_each(self, service: Service, name: str) -> None:
        response = await service.http.get(f"/page/{name}")
        assert response.status_code == 200
        assert response.content == (FOLDER / name).read_bytes()
        assert response.headers["content-type"].partition(";")[0] == TYPES[Path(name).suffix]
        assert response.headers["x-content-type-options"] == "nosniff"

    @pytest.mark.parametrize("name", FILES)
    async def test_each_has_a_head(self, service: Service, name: str) -> None:
        response = await service.http.head(f"/page/{name}")
        assert (response.status_code, response.content) == (200, b"")
        assert response.headers["content-length"] == str((FOLDER / name).stat().st_size)

    @pytest.mark.parametrize(
        "path", ["nothing.js", "../http/app.py", "..%2fhttp%2fapp.py", "%2e%2e/settings.py", "a/b"]
    )
    async def test_no_others(self, service: Service, path: str) -> None:
        assert (await service.http.get(f"/page/{path}")).status_code == 404

    async def test_are_read_only(self, service: Service) -> None:
        response = await service.http.post("/page/app.js")
        assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD, OPTIONS")

    def test_what_is_not_ours_is_as_it_was_published(self) -> None:
        """uPlot 1.6.32, from npm."""
        digests = {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in FOLDER.glob("uPlot.*")
        }
        assert digests == {
            "uPlot.LICENSE.txt": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
            "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
            "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
        }

    def test_are_small(self) -> None:
        assert sum((FOLDER / name).stat().st_size for name in FILES) < MOST_BYTES

    async def test_need_no_key(self, checkpoint: Path, tmp_path: Path) -> None:
        keys = tmp_path / "keys"
        keys.write_text(hash_of("gma_one"))
        async with Service(checkpoint, api_keys_file=keys, path_prefix="/gma") as service:
            for front in ("", "/gma"):
                page = await service.http.get(f"{front}/", headers=BROWSER)
                assert page.status_code == 200
                for name in FILES:
                    assert (await service.http.get(f"{front}/page/{name}")).status_code == 200
                assert (await service.http.get(f"{front}/info")).status_code == 401


class TestPolicy:
    async def test_allows_the_services_own_files_alone(self, service: Service) -> None:
        for path in ("/", "/page/app.js"):
            response = await service.http.get(path, headers=BROWSER)
            directives = policy(response.headers["content-security-policy"])
            assert directives["default-src"] == ["'none'"]
            for name in ("script-src", "style-src", "img-src", "connect-src"):
                assert directives[name] == ["'self'"]
            for name in ("base-uri", "form-action", "frame-ancestors"):
                assert directives[name] == ["'none'"]
            assert directives["require-trusted-types-for"] == ["'script'"]
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["referrer-policy"] == "no-referrer"

    def test_is_kept_by_the_files(self) -> None:
        page = (FOLDER / "index.html").read_text()
        assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*\ssrc=)", page)
        for name in FILES:
            if name.endswith((".js", ".html", ".css")):
                source = (FOLDER / name).read_text()
                # uPlot names its own in a comment.
                addresses = set(re.findall(r"https?://[^\s\"']+", source))
                assert addresses <= {"https://github.com/leeoniya/uPlot"}
                assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write", source)
