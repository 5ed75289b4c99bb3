"""The command, with client processes of its own, against a server in this one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gma.service.cli import main as cli
from tests.loadtest.server import Server


class Result(NamedTuple):
    status: int
    out: str
    err: str


class TestCommand:
    @pytest.fixture(autouse=True)
    def _here(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        self.patch = monkeypatch
        self.capture = capsys

    def gma(self, *arguments: object) -> Result:
        self.patch.setattr(sys, "argv", ["gma", "loadtest", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        return Result(int(exited.value.code or 0), *self.capture.readouterr())

    def test_several_processes_send_every_document_once(
        self, server: Server, tmp_path: Path
    ) -> None:
        texts = [f"This is the text of number {i}. " * 9 for i in range(500)]
        corpus = tmp_path / "texts.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        found = self.gma(
            server.url, "--corpus", corpus, "--arrivals", "constant", "--rate", 40, "--seconds", 1,
            "--warm-up", 0.5, "--processes", 2, "--slo", "p99<=30s", "--out", tmp_path / "out",
        )  # fmt: skip
        assert found.status == 0, found.err
        assert sorted(server.bodies) == sorted(text.encode() for text in texts[:60])
        report = json.loads((tmp_path / "out/report.json").read_text())
        assert report["latency"]["all"]["documents"] == 40
        assert report["slos"][0]["met"]
        assert report["peak_memory"]["gma_resident_memory_peak_bytes"]["worker"] == 4e8
        assert report["stages"]["gma_queue_seconds"]["mean"] == pytest.approx(0.05)
        assert report["samples"]
        assert "<svg" in (tmp_path / "out/report.html").read_text()

    def test_prints_json_and_fails_for_a_missed_slo(self, server: Server) -> None:
        server.status, server.metrics = 429, False
        found = self.gma(server.url, "--seconds", 1, "--warm-up", 0, "--rate", 20)
        assert found.status == 1
        report: dict[str, Any] = json.loads(found.out)
        assert set(report["errors"]) == {"429"}
        assert (report["stages"], report["samples"]) == ({}, [])

    def test_sweep_saves_every_trial(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gma.loadtest.sweep.MOST_STEPS", 2)
        found = self.gma(
            server.url, "--lengths", "fixed:100", "--arrivals", "constant", "--rate", 10,
            "--seconds", 1, "--warm-up", 0, "--slo", "p99<=30s", "--sweep", "--out", tmp_path,
        )  # fmt: skip
        assert found.status == 0, found.err
        assert "highest rate that meets the SLOs: 20 a second" in found.err
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["highest_rate"] == 20
        assert [each["load"]["rate"] for each in report["trials"]] == [10, 20]
        assert len(server.bodies) == 30

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--slo", "fast"), "an SLO is like"),
            (("--arrivals", "steady"), "arrivals are poisson"),
            (("--rate", "0"), "above 0"),
            (("--sweep", "--closed", "3"), "a sweep needs a rate"),
        ],
    )
    def test_says_what_is_wrong(
        self, server: Server, arguments: tuple[str, ...], message: str
    ) -> None:
        found = self.gma(server.url, *arguments)
        assert (found.status, found.out) == (1, "")
        assert message in found.err
        assert not server.bodies

    def test_says_what_a_url_is(self) -> None:
        found = self.gma("127.0.0.1:8000")
        assert found.status == 1
        assert "a URL is like http://127.0.0.1:8000" in found.err

    def test_says_that_a_corpus_is_missing(self, server: Server) -> None:
        found = self.gma(server.url, "--corpus", "nowhere.jsonl")
        assert found.status == 1
        assert "did not start" in found.err
