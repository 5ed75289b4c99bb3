"""`gma classify --url` and `gma session`: the command, by a service."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.service.asgi import TEXT
from tests.service.client.served import FINDING, Scripted, Step, refused, served
from tests.service.client.sessions import Sessions
from tests.service.running import free_port
from tests.service.test_cli import Gma
from tests.service.test_cli import gma as gma

LONG = TEXT * 40


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "long.txt"
    file.write_text(LONG)
    return file


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Standard input."""

    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


class TestClassify:
    def test_it_says_what_it_says_without_a_service(
        self,
        gma: Gma,
        given: Callable[[bytes], None],
        checkpoint: Path,
        url: str,
        file: Path,
        tmp_path: Path,
    ) -> None:
        lines = tmp_path / "lines.jsonl.gz"
        lines.write_bytes(gzip.compress(b'{"text": "one"}\n\n{"text": "two"}\n{"txt": ""}\n'))
        common = ["classify", file, "-", lines, tmp_path / "missing", tmp_path]
        for options in [], ["--evidence", "--top-k", 2, "--max-tokens", 100]:
            given(b"abc")
            here = gma(*common, *options, "--checkpoint", checkpoint)
            given(b"abc")
            assert gma(*common, *options, "--url", url) == here
        assert len(here.err.splitlines()) == 3

    def test_json(self, gma: Gma, checkpoint: Path, url: str, file: Path) -> None:
        common = ["classify", "--json", "--evidence", "--components", file]
        (here,) = gma(*common, "--checkpoint", checkpoint).json()
        (there,) = gma(*common, "--url", url).json()
        assert list(there) == list(here)
        assert there["usage"]["tokens"] == here["usage"]["tokens"]
        assert there["evidence"][-1]["end"] == file.stat().st_size

    def test_what_the_service_refuses(self, gma: Gma, url: str, tmp_path: Path) -> None:
        bad, lines = tmp_path / "bad", tmp_path / "lines.jsonl"
        bad.write_bytes(b"abc\xff")
        lines.write_text(json.dumps({"text": "x" * 2**21}))
        result = gma("classify", "--url", url, bad, lines)
        assert (result.status, result.out) == (1, "")
        wrong = result.err.splitlines()
        assert wrong[0].startswith(f"gma: {bad}: the text is not UTF-8 at byte 3")
        assert wrong[1].startswith(f"gma: {lines}, line 1: the document is larger than the limit")

    def test_it_is_not_there(self, gma: Gma, file: Path) -> None:
        url = f"http://127.0.0.1:{free_port()}"
        result = gma("classify", "--url", url, file, file)
        assert (result.status, result.out) == (1, "")
        assert result.err.startswith(f"gma: {url}: ")
        assert len(result.err.splitlines()) == 1

    def test_keys(
        self, gma: Gma, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "key").write_text("from-a-file\n")
        monkeypatch.setenv("GMA_API_KEY", "from-the-environment")
        application = Scripted(Step(), Step(), refused(401, "Unauthorized"))
        with served(application) as url:
            gma("classify", "--url", url, file)
            gma("classify", "--url", url, "--key-file", tmp_path / "key", file)
            monkeypatch.delenv("GMA_API_KEY")
            assert "it is Unauthorized" in gma("classify", "--url", url, file).err
        sent = [headers.get("authorization") for headers in application.headers]
        assert sent == ["Bearer from-the-environment", "Bearer from-a-file", None]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--url", "http://127.0.0.1", "--checkpoint", "books"], "the service has its own"),
            (["--url", "http://127.0.0.1", "--device", "cpu"], "the service has its own"),
            (["--key-file", "x"], "needs --url"),
            (["--model", "x"], "needs --url"),
            (["--url", "127.0.0.1:8000"], "a URL is like"),
        ],
    )
    def test_usage(self, gma: Gma, file: Path, options: list[str], message: str) -> None:
        assert message in gma("classify", *options, file).err

    def test_a_model_that_the_service_has_and_one_that_it_has_not(
        self, gma: Gma, url: str, file: Path
    ) -> None:
        assert gma("classify", "--url", url, "--model", "tiny", file).status == 0
        assert (
            "there is no model x: this service has tiny"
            in gma("classify", "--url", url, "--model", "x", file).err
        )

    def test_what_is_no_key(self, gma: Gma, file: Path) -> None:
        result = gma("classify", "--url", "http://127.0.0.1", "--key-file", file, file)
        assert "a file of one API key" in result.err


class TestSession:
    @pytest.fixture
    def url(self) -> Iterator[str]:
        with served(Sessions()) as url:
            yield url

    def test_from_begin_to_end(
        self, gma: Gma, given: Callable[[bytes], None], url: str, file: Path, tmp_path: Path
    ) -> None:
        def session(command: str, *arguments: object) -> list[str]:
            result = gma("session", command, "--url", url, *arguments)
            assert (result.status, result.err) == (0, "")
            return result.out.splitlines()

        (name,) = session("create")
        assert session("answer", name) == [f"{name}: 0 bytes, 0 tokens"]
        size = file.stat().st_size
        assert session("append", name, file) == [f"{size:,} bytes, 1 tokens: ann"]
        given(b"one\ntwo\n")
        assert session("append", name) == [
            f"{size + 4:,} bytes, 1 tokens: ann",
            f"{size + 8:,} bytes, 1 tokens: ann",
        ]
        assert session("answer", name)[0] == f"{name}: {size + 8:,} bytes, 1 tokens"
        (told,) = session("answer", "--json", name)
        assert json.loads(told)["scores"] == FINDING["scores"]
        (fork,) = session("fork", name)
        session("snapshot", name, tmp_path / "snapshot")
        session("delete", name)
        (resumed,) = session("resume", tmp_path / "snapshot")
        for each in fork, resumed:
            assert session("answer", each)[0].startswith(f"{each}: {size + 8:,} bytes")
        refused = gma("session", "answer", "--url", url, name)
        assert (refused.status, refused.err) == (1, f"gma: there is no session {name}\n")
