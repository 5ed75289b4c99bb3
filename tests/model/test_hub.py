"""Checkpoints on a hub: a small server that speaks as the Hugging Face hub does."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("huggingface_hub")

from huggingface_hub import constants

from gma.model import hub, weights
from gma.model.classifier import Classifier
from gma.model.tokenizer import Tokenizer
from gma.service.cli.main import main
from tests.model.small import SMALL

NAME = "me/reviews"
SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"  # noqa: S105  # of a hub of our own


class Hub(ThreadingHTTPServer):
    """Models by name; who has no token may only read, and not what is private."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.asked: list[str] = []  # files whose bytes were sent

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/").split("/")
        name = "/".join(path[2:4] if path[0] == "api" else path[:2])
        if name not in self.server.models or (name in self.server.private and not self._known):
            self._answer(404 if self._known else 401, {}, {"X-Error-Code": "RepoNotFound"})
            return
        files = self.server.models[name]
        if path[0] == "api":
            if path[4:] not in ([], ["revision", "main"]):
                self._answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = [{"rfilename": file} for file in files]
            self._answer(200, {"id": name, "sha": SHA, "siblings": siblings, "tags": []})
        elif path[-1] in files:
            data = files[path[-1]]
            if self.command == "GET":
                self.server.asked.append(path[-1])
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self._answer(200, data, {"ETag": etag, "X-Repo-Commit": SHA})
        else:
            self._answer(404, {}, {"X-Error-Code": "EntryNotFound"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if not self._known:
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made.get('organization') or 'me'}/{made['name']}"
            self.server.models.setdefault(name, {})
            if "private" in (made.get("visibility"), made.get("private") and "private"):
                self.server.private.add(name)
            self._answer(200, {"url": f"{self.server.address}/{name}"})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        else:
            files_of = self.server.models[NAME]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    files_of[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.address}/{NAME}/commit/{SHA}"
            self._answer(200, {"commitUrl": url, "commitOid": SHA, "success": True})

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the library knows as the only one, with a token and an empty cache."""
    with Hub() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        reach(server.address, tmp_path, monkeypatch)
        yield server
        server.shutdown()
        thread.join()


def reach(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(iter(["the best of times"]), vocab_size=260)
    config = SMALL.model_copy(update={"vocab_size": tokenizer.vocab_size})
    folder = tmp_path_factory.mktemp("checkpoint")
    weights.save(folder, Classifier(config), tokenizer, card="# small\n")
    (folder / "training.toml").write_text("[model]\n")
    (folder / "notes.txt").write_text("not to be pushed")
    return folder


def card_of(data: bytes) -> tuple[dict[str, Any], str]:
    """What a card's front matter says, and the text after it."""
    _, front, text = data.decode().split("---\n", 2)
    return yaml.safe_load(front), text


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gma(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gma", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        captured = capfd.readouterr()
        return int(exited.value.code or 0), captured.out, captured.err

    return run


def test_what_was_pushed_is_pulled(server: Hub, checkpoint: Path, tmp_path: Path, gma: Run) -> None:
    status, out, _ = gma("push", checkpoint, NAME, "--license", "mit", "--language", "en")
    assert (status, out.strip()) == (0, f"{server.address}/{NAME}/commit/{SHA}")
    assert server.models[NAME].keys() == set(hub.NAMES)
    status, out, _ = gma("pull", NAME, "--out", tmp_path / "pulled")
    assert (status, out.strip()) == (0, str(tmp_path / "pulled"))
    pulled = weights.load(tmp_path / "pulled")
    assert pulled.fingerprint == weights.load(checkpoint).fingerprint
    assert (tmp_path / "pulled/training.toml").read_text() == "[model]\n"
    told, text = card_of((tmp_path / "pulled/README.md").read_bytes())
    assert told == {**hub.METADATA, "license": "mit", "language": ["en"]}
    assert text.strip() == "# small"


def test_a_card_says_what_it_said_unless_told_otherwise(
    server: Hub, checkpoint: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# small\n")
    hub.push(copy, NAME, license="apache-2.0", datasets=["me/data"])
    told, _ = card_of(server.models[NAME]["README.md"])
    assert (told["license"], told["tags"], told["datasets"]) == (
        "apache-2.0",
        ["mine"],
        ["me/data"],
    )
    assert told["pipeline_tag"] == "text-classification"


def test_nothing_else_is_pulled(server: Hub, checkpoint: Path, tmp_path: Path) -> None:
    files = {name: (checkpoint / name).read_bytes() for name in hub.NAMES}
    files |= {"pytorch_model.bin": b"pickle", "modeling.py": b"import os", "sub/config.json": b"{}"}
    server.models[NAME] = files
    hub.pull(NAME, tmp_path / "pulled")
    assert {file.name for file in (tmp_path / "pulled").iterdir()} == set(hub.NAMES)
    assert sorted(server.asked) == sorted(hub.NAMES)


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"pytorch_model.bin": b"x"}, "holds no checkpoint of gma: it has no config.json, model"),
        ({"config.json": b"{}"}, "it has no model.safetensors, tokenizer.json"),
        ({"config.json": b"{}", "model.safetensors": b"x"}, "it has no tokenizer.json"),
        ({"config.json": b"{}", "model.safetensors": b"", "tokenizer.json": b""}, "config.json: "),
    ],
)
def test_what_is_no_checkpoint_leaves_nothing(
    server: Hub, tmp_path: Path, files: dict[str, bytes], error: str
) -> None:
    server.models[NAME] = files
    with pytest.raises(ValueError, match=error):
        hub.pull(NAME, tmp_path / "pulled")
    assert not [each for each in tmp_path.iterdir() if each.name.startswith("pulled")]


def test_what_is_there_is_not_written_over(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(hub.HubError, match="is there already"):
        hub.pull(NAME, tmp_path)


def test_a_model_that_is_not_there(server: Hub, tmp_path: Path, gma: Run) -> None:
    status, _, err = gma("pull", "me/nothing", "--out", tmp_path / "pulled")
    assert status == 1
    assert err == (
        "gma: the hub has no model me/nothing, or not for you: log in with `hf auth login`, or set "
        "HF_TOKEN\n"
    )


def test_a_revision_that_is_not_there(server: Hub, tmp_path: Path) -> None:
    server.models[NAME] = {}
    with pytest.raises(hub.HubError, match="me/reviews has no such revision"):
        hub.pull(NAME, tmp_path / "pulled", revision="old")


def test_a_private_model_needs_a_token(
    server: Hub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(checkpoint, NAME, private=True)
    hub.pull(NAME, tmp_path / "mine")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(hub.HubError, match="or not for you"):
        hub.pull(NAME, tmp_path / "others")


def test_pushing_needs_a_token(
    server: Hub, checkpoint: Path, gma: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    status, _, err = gma("push", checkpoint, NAME)
    assert status == 1
    assert err.splitlines() == [
        "gma: the hub wants a token that may do this: log in with `hf auth login`, or set HF_TOKEN"
    ]


@pytest.mark.parametrize("command", ["push", "pull"])
def test_no_network(
    command: str, checkpoint: Path, tmp_path: Path, gma: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    reach("http://127.0.0.1:9", tmp_path, monkeypatch)
    given = [checkpoint, NAME] if command == "push" else [NAME, "--out", tmp_path / "pulled"]
    status, _, err = gma(command, *given)
    assert status == 1
    assert err.startswith("gma: the hub can't be reached: ")
    assert err.count("\n") == 1


def test_offline(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reach("http://127.0.0.1:9", tmp_path, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(hub.HubError, match="HF_HUB_OFFLINE is set"):
        hub.pull(NAME, tmp_path / "pulled")


@pytest.mark.parametrize("name", ["a/b/c", "no spaces/x", "../x"])
def test_what_is_no_name(server: Hub, checkpoint: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(hub.HubError):
        hub.pull(name, tmp_path / "pulled")


def test_what_is_no_checkpoint_is_not_pushed(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(weights.CheckpointError):
        hub.push(tmp_path, NAME)
    assert server.models == {}


def test_without_the_library(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(hub.HubError, match=r"gma-service\[hub\] has it"):
        hub.pull(NAME, tmp_path / "pulled")
