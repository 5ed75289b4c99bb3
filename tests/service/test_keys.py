"""API keys: who gets in, and what is open to all."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gma.service.http import keys_file
from gma.service.http.keys import Keys, hash_of, new_key
from gma.service.http.keys_file import LOOK_S, KeysFile
from gma.service.observe import metrics
from gma.service.observe.logs import JsonFormatter
from tests.service.asgi import TEXT, Exchange, Service

pytestmark = pytest.mark.anyio

PLAIN = {"content-type": "text/plain"}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


class TestFile:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return tmp_path / "keys"

    def test_several_keys_and_comments(self, file: Path) -> None:
        first, second = new_key(), new_key()
        file.write_text(f"# ours\n\n{hash_of(first)}  # Zoë\n  {hash_of(second)}\n")
        keys = Keys.load(file)
        assert keys.find(first)
        assert keys.find(second)
        assert not keys.find(new_key())
        assert not keys.find("")
        assert not keys.find(hash_of(first))

    def test_a_hash_is_what_other_programs_call_sha256(self) -> None:
        assert hash_of("a") == hashlib.sha256(b"a").hexdigest()

    def test_a_key_by_mistake_is_refused_and_not_told(self, file: Path) -> None:
        key = new_key()
        file.write_text(f"{hash_of('a')}\n{key}\n")
        with pytest.raises(ValueError, match=r"keys:2 is not a key's SHA-256") as raised:
            Keys.load(file)
        assert key not in str(raised.value)

    @pytest.mark.parametrize("text", ["", "# none yet\n", hash_of("a").upper(), "\xff"])
    def test_nothing_that_passes_nobody(self, file: Path, text: str) -> None:
        file.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="keys"):
            Keys.load(file)


class TestFileThatChanges:
    """As Kubernetes mounts a secret: a file that is two links away, of which one is swapped."""

    @pytest.fixture
    def mount(self, tmp_path: Path) -> Mount:
        return Mount(tmp_path)

    def test_a_new_key_passes_and_one_that_is_gone_does_not(self, mount: Mount) -> None:
        mount.put(f"{hash_of('a')}\n{hash_of('b')}\n")
        keys = KeysFile(mount.file, mount.clock)
        mount.put(f"{hash_of('b')}\n{hash_of('c')}\n")
        mount.now += LOOK_S
        assert [bool(keys.find(key)) for key in "abc"] == [False, True, True]

    def test_a_file_that_is_written_over(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text(hash_of("a"))
        keys = KeysFile(file, iter(range(9)).__next__)
        assert keys.find("a")
        file.write_text(f"{hash_of('b')}\n")
        assert not keys.find("a")
        assert keys.find("b")

    def test_is_looked_at_no_more_than_once_a_second(self, mount: Mount) -> None:
        mount.put(hash_of("a"))
        keys = KeysFile(mount.file, mount.clock)
        mount.put(hash_of("b"))
        mount.now += 0.9 * LOOK_S
        assert keys.find("a")
        mount.now += 0.1 * LOOK_S
        assert keys.find("b")

    @pytest.mark.parametrize("broken", ["", "gma_a-key-itself", None])
    def test_what_cannot_be_used_changes_nothing_and_is_told_once(
        self, mount: Mount, caplog: pytest.LogCaptureFixture, broken: str | None
    ) -> None:
        caplog.set_level(logging.INFO, logger="gma")
        taken, refused = reads()
        mount.put(hash_of("a"))
        keys = KeysFile(mount.file, mount.clock)
        if broken is None:
            (mount.file.parent / "..data").unlink()
        else:
            mount.put(broken)
        for _ in range(3):
            mount.now += LOOK_S
            assert keys.find("a")
        (told,) = caplog.records
        assert (told.levelname, "the old keys stay" in told.getMessage()) == ("ERROR", True)
        assert "gma_a-key-itself" not in told.getMessage()
        assert reads() == (taken, refused + 1)
        mount.put(hash_of("b"))
        mount.now += LOOK_S
        assert keys.find("b")
        assert not keys.find("a")
        assert reads() == (taken + 1, refused + 1)

    def test_has_to_be_there_at_the_start(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="can't be read"):
            KeysFile(tmp_path / "none")


class Mount:
    """A folder whose file `keys` is replaced as Kubernetes does it, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "keys"
        self.now = 0.0
        self._versions = 0

    def put(self, content: str) -> None:
        folder = self.file.parent
        version = f"..version-{self._versions}"
        self._versions += 1
        (folder / version).mkdir()
        (folder / version / "keys").write_text(content)
        (folder / "..next").symlink_to(version)
        (folder / "..next").rename(folder / "..data")
        if not self.file.is_symlink():
            self.file.symlink_to(Path("..data") / "keys")

    def clock(self) -> float:
        return self.now


def reads() -> tuple[float, float]:
    """How often the file was taken, and refused."""
    taken, refused = (
        sample.value
        for metric in metrics.KEYS_READS.collect()
        for sample in metric.samples
        if sample.name == "gma_keys_reads_total"
    )
    return taken, refused


def gma_key(*arguments: object) -> list[str]:
    run = "from gma.service.cli.main import main; main()"
    command = [sys.executable, "-c", run, "key", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


class TestCommand:
    def test_prints_a_key_and_its_hash(self) -> None:
        key, line = gma_key()
        assert hash_of(key) == line

    def test_adds_to_a_file_that_only_its_owner_reads(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        (first,), (second,) = gma_key(file, "--name", "search-team"), gma_key(file)
        keys = Keys.load(file)
        assert keys.find(first)
        assert keys.find(second)
        assert "# search-team" in file.read_text()
        assert first not in file.read_text()
        assert file.stat().st_mode & 0o077 == 0


KEYS = ("gma_one", "gma_two")


class TestRoutes:
    @pytest.fixture
    async def closed(self, checkpoint: Path, tmp_path: Path) -> AsyncIterator[Service]:
        file = tmp_path / "keys"
        one, two = map(hash_of, KEYS)
        file.write_text(f"{one}  # search-team\n{two}\n")
        async with Service(checkpoint, api_keys_file=file) as service:
            yield service

    @pytest.mark.parametrize("key", KEYS)
    async def test_every_key_passes(self, closed: Service, key: str) -> None:
        response = await closed.http.post(
            "/v1/documents", content=TEXT, headers={**PLAIN, **bearer(key)}
        )
        assert response.status_code == 200
        assert (await closed.http.get("/info", headers=bearer(key))).status_code == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            bearer("gma_three"),
            bearer(""),
            bearer("gma_one, gma_two"),
            {"authorization": "gma_one"},
            {"authorization": "Basic gma_one"},
            {"authorization": "Bearer gma_on\xe9"},
            {"x-api-key": "gma_one"},
        ],
    )
    async def test_nothing_else_does(self, closed: Service, headers: dict[str, str]) -> None:
        response = await closed.http.post(
            "/v1/documents",
            content=TEXT,
            headers=[(k.encode(), v.encode("latin-1")) for k, v in {**PLAIN, **headers}.items()],
        )
        assert response.status_code == 401
        assert response.json()["error_type"] == "Unauthorized"
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]
        assert "gma_one" not in response.text

    async def test_a_key_that_is_revoked_while_the_service_runs(
        self, closed: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(keys_file, "LOOK_S", 0.0)
        file = closed.settings.api_keys_file
        assert file
        assert (await closed.http.get("/info", headers=bearer("gma_one"))).status_code == 200
        file.write_text(hash_of("gma_two"))
        assert (await closed.http.get("/info", headers=bearer("gma_one"))).status_code == 401
        assert (await closed.http.get("/info", headers=bearer("gma_two"))).status_code == 200

    async def test_the_log_has_whose_key_it_was(
        self, closed: Service, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="gma")
        for key in (*KEYS, "gma_three"):
            await closed.http.get("/info", headers=bearer(key))
        lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
        assert [line.get("key") for line in lines] == ["search-team", hash_of("gma_two")[:8], None]
        assert not any("gma_" in json.dumps(line) for line in lines)

    async def test_the_scheme_is_read_in_any_case(self, closed: Service) -> None:
        headers = {"authorization": "bearer gma_one"}
        assert (await closed.http.get("/info", headers=headers)).status_code == 200

    @pytest.mark.parametrize(
        "path", ["/health", "/metrics", "/docs", "/openapi.json", "/page/app.js"]
    )
    async def test_operation_is_open(self, closed: Service, path: str) -> None:
        assert (await closed.http.get(path)).status_code == 200

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/info"),
            ("GET", "/nowhere"),
            ("POST", "/"),
            ("OPTIONS", "/v1/documents"),
            ("HEAD", "/info/"),
            ("GET", "/docs/oauth2-redirect"),
        ],
    )
    async def test_all_else_is_closed(self, closed: Service, method: str, path: str) -> None:
        assert (await closed.http.request(method, path)).status_code == 401

    @pytest.mark.parametrize(
        "path", ["/health", "/metrics", "/docs", "/openapi.json", "/page/app.js"]
    )
    async def test_what_is_open_has_no_other_method(self, closed: Service, path: str) -> None:
        response = await closed.http.post(path)
        assert response.status_code == 405
        assert response.headers["allow"] == "GET, HEAD, OPTIONS"

    async def test_every_route_that_takes_documents_says_that_it_is_closed(
        self, closed: Service
    ) -> None:
        paths = (await closed.http.get("/openapi.json")).json()["paths"]
        for path, methods in paths.items():
            for method, described in methods.items():
                response = await closed.http.request(method, path)
                assert (response.status_code == 401) == ("security" in described), path

    async def test_is_refused_before_its_body_comes(self, closed: Service) -> None:
        async with Exchange(closed.app, "/v1/documents", PLAIN) as exchange:
            status, _ = await exchange.head()
            assert status == 401
        assert await closed.metric("gma_documents_in_flight") == 0

    async def test_is_refused_in_one_answer_where_events_were_asked_for(
        self, closed: Service
    ) -> None:
        headers = {**PLAIN, "accept": "application/x-ndjson"}
        response = await closed.http.post("/v1/documents", content=TEXT, headers=headers)
        assert response.status_code == 401

    async def test_without_keys_all_is_open(self, service: Service) -> None:
        assert (await service.http.get("/info")).status_code == 200
        assert await service.classify(TEXT)

    def test_adds_to_a_file_whose_last_line_has_no_end(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text(f"{hash_of('other')}  # other")
        (key,) = gma_key(file, "--bytes-per-day", "1PB")
        found = Keys.load(file)
        assert found.find("other")
        assert found.find(key)
        assert "bytes_per_day=1000000000000000" in file.read_text()
