"""The command `gma`, from its arguments to its output."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
import zstandard
from rich.cells import cell_len

from gma.export import precision
from gma.model import weights
from gma.model.classifier import Classifier
from gma.model.config import ModelConfig
from gma.model.tokenizer import Tokenizer
from gma.service.cli.finding import LINES, PASSAGES
from gma.service.cli.main import main
from gma.service.cli.options import Device, Precision
from gma.service.settings import Settings

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom.\n"
LABELS = ("austen", "dickens", "poe", "twain")


class Result(NamedTuple):
    status: int
    out: str
    err: str

    def json(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


Gma = Callable[..., Result]


@pytest.fixture
def gma(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Gma:
    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["gma", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        captured = capsys.readouterr()
        return Result(int(exited.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="module", params=[True, False], ids=["causal", "bidirectional"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(iter([TEXT]), vocab_size=300)
    config = ModelConfig(
        name="tiny",
        labels=LABELS,
        vocab_size=tokenizer.vocab_size,
        width=16,
        layers=1,
        heads=2,
        routing_dim=4,
        value_dim=8,
        num_components=4,
        mlp_width=32,
        prior_tokens=20.0,
        causal=request.param,
    )
    classifier = Classifier(config)
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("checkpoint")
    weights.save(folder, classifier, tokenizer, card="# tiny")
    return folder


@pytest.fixture
def book(tmp_path: Path) -> Path:
    file = tmp_path / "book.txt"
    file.write_text(TEXT * 200)
    return file


class TestClassify:
    def test_prints_a_table(self, gma: Gma, checkpoint: Path, book: Path) -> None:
        result = gma("classify", "--checkpoint", checkpoint, book)
        lines = result.out.splitlines()
        assert result.status == 0
        assert lines[0].startswith(f"{book}: 15,800 bytes, ")
        assert lines[1].split() == ["label", "score"]
        assert len(lines) == 2 + 3

    def test_names_do_nothing_to_a_terminal(
        self, gma: Gma, checkpoint: Path, tmp_path: Path
    ) -> None:
        file, none = tmp_path / "a\x1b[2J.txt", tmp_path / "b\x1b[2J.txt"
        file.write_text("It was a dark night.")
        result = gma("classify", "--checkpoint", checkpoint, file, none)
        assert "a\N{REPLACEMENT CHARACTER}[2J.txt: " in result.out
        assert "b\N{REPLACEMENT CHARACTER}[2J.txt: " in result.err
        assert "\x1b" not in result.out + result.err

    def test_json_is_the_answer_of_the_service(
        self, gma: Gma, checkpoint: Path, book: Path
    ) -> None:
        (answer,) = gma("classify", "--json", "--checkpoint", checkpoint, book).json()
        assert answer["file"] == str(book)
        assert answer["model"] == "tiny"
        assert {score["label"] for score in answer["scores"]} == set(LABELS)
        assert sum(score["score"] for score in answer["scores"]) == pytest.approx(1)
        assert answer["label"] == answer["scores"][0]["label"]
        assert answer["usage"]["bytes"] == book.stat().st_size
        assert "truncated" not in answer
        assert "evidence" not in answer

    def test_evidence_tiles_the_text_and_sums_to_the_answer(
        self, gma: Gma, checkpoint: Path, book: Path
    ) -> None:
        (answer,) = gma("classify", "--json", "--evidence", "--checkpoint", checkpoint, book).json()
        spans = answer["evidence"]
        assert len(spans) > 1
        assert [span["start"] for span in spans] == [0, *(span["end"] for span in spans[:-1])]
        assert spans[-1]["end"] == book.stat().st_size
        for score in answer["scores"]:
            parts = [
                span["weight"] * each["logit"]
                for span in spans
                for each in span["scores"]
                if each["label"] == score["label"]
            ]
            assert sum(parts) == pytest.approx(score["logit"], abs=1e-5)

    def test_evidence_of_a_long_text_is_short(self, gma: Gma, checkpoint: Path, book: Path) -> None:
        book.write_text(TEXT * 2000)
        result = gma("classify", "--evidence", "--top-k", 1, "--checkpoint", checkpoint, book)
        assert len(result.out.splitlines()) <= 3 + 2 + PASSAGES * (1 + LINES)

    def test_passages_are_what_speaks_most(
        self, gma: Gma, checkpoint: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "text.txt"
        words = " ".join(str(number) for number in range(2000))
        file.write_text(words)
        options = ["classify", "--evidence", "--checkpoint", checkpoint]
        (answer,) = gma(*options, "--json", file).json()
        _, passages = gma(*options, file).out.split("\n\n")
        label, *lines = passages.splitlines()
        assert label == answer["label"]
        shares = {}
        for span in answer["evidence"]:
            logits = {each["label"]: each["logit"] for each in span["scores"]}
            share = span["weight"] * (logits[label] - sum(logits.values()) / len(logits))
            shares[f"bytes {span['start']:,} - {span['end']:,}"] = share
        best = sorted((share for share in shares.values() if share > 0), reverse=True)[:PASSAGES]
        told = [line.strip().split(", ", 1) for line in lines if not line.startswith("    ")]
        assert [shares[where] for _, where in told] == best
        total = sum(shares.values())
        assert [share for share, _ in told] == [f"{x:+.3g} of {total:.3g} logits" for x in best]
        quoted = " ".join(line.strip(" …") for line in lines[1 : 1 + LINES])
        assert quoted in words

    def test_passages_command_no_terminal(
        self, gma: Gma, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "40")
        file = tmp_path / "text.txt"
        hostile = "\x1b[31mred\x07 \u202eturned\u202c \x9b2J a\u2028b 漢字漢字 "
        file.write_text(hostile * 300)
        out = gma("classify", "--evidence", "--checkpoint", checkpoint, file).out
        quoted = [line for line in out.splitlines() if line.startswith("    ")]
        assert "[31mred turned 2J a b 漢字漢字" in " ".join(" ".join(quoted).split())
        assert not {"\x1b", "\x07", "\u202e", "\u202c", "\x9b", "\u2028"} & set(out)
        assert max(map(cell_len, quoted)) <= 40

    def test_passages_of_what_comes_through_a_pipe(
        self, gma: Gma, checkpoint: Path, book: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stdin = io.TextIOWrapper(io.BytesIO(book.read_bytes()))
        monkeypatch.setattr(sys, "stdin", stdin)
        options = ["classify", "--evidence", "--checkpoint", checkpoint]
        piped, read = gma(*options, "-").out, gma(*options, book).out
        assert piped.splitlines()[1:] == read.splitlines()[1:]
        assert "age of wisdom" in piped

    def test_components_share_out_the_tokens(self, gma: Gma, checkpoint: Path, book: Path) -> None:
        options = ["--components", "--checkpoint", checkpoint, book]
        (answer,) = gma("classify", "--json", *options).json()
        usage = answer["usage"]
        components = np.array(usage["components"])
        assert components.shape == (1, 2, 4)
        np.testing.assert_allclose(components.sum(-1), usage["tokens"], rtol=1e-6)
        assert np.ptp(components, axis=-1).min() > 1
        refused = gma("classify", *options)
        assert (refused.status, refused.out) == (2, "")
        assert "--json only" in refused.err

    def test_reads_standard_input(
        self, gma: Gma, checkpoint: Path, book: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stdin = io.TextIOWrapper(io.BytesIO(book.read_bytes()))
        monkeypatch.setattr(sys, "stdin", stdin)
        options = ["classify", "--json", "--checkpoint", checkpoint]
        (piped,) = gma(*options, "-").json()
        (read,) = gma(*options, book).json()
        assert piped == {**read, "file": "-"}

    def test_top_k(self, gma: Gma, checkpoint: Path, book: Path) -> None:
        (answer,) = gma("classify", "--json", "--top-k", 2, "--checkpoint", checkpoint, book).json()
        assert len(answer["scores"]) == 2

    def test_max_tokens(self, gma: Gma, checkpoint: Path, book: Path) -> None:
        options = ["--checkpoint", checkpoint, "--max-tokens", 10]
        (answer,) = gma("classify", "--json", *options, book).json()
        assert answer["usage"]["tokens"] == 10
        assert answer["truncated"] is True
        assert ": the first " in gma("classify", *options, book).out

    def test_what_cannot_be_read_is_a_line_each_and_the_rest_is_answered(
        self, gma: Gma, checkpoint: Path, book: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "empty").touch()
        (tmp_path / "latin1").write_bytes("naïve".encode("latin-1"))
        files = [tmp_path / "missing", tmp_path / "empty", tmp_path / "latin1", tmp_path, book]
        result = gma("classify", "--json", "--checkpoint", checkpoint, *files)
        assert result.status == 1
        assert [answer["file"] for answer in result.json()] == [str(book)]
        assert result.err.splitlines() == [
            f"gma: {tmp_path / 'missing'}: No such file or directory",
            f"gma: {tmp_path / 'empty'}: the document is empty",
            f"gma: {tmp_path / 'latin1'}: not UTF-8: invalid or unfinished character at byte 2",
            f"gma: {tmp_path}: Is a directory",
        ]


class TestClassifyLines:
    @pytest.fixture(params=["letters.jsonl", "letters.jsonl.gz", "letters.jsonl.zst"])
    def letters(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        lines = [{"text": TEXT, "label": 3}, {"text": TEXT * 2}]
        data = "\n\n".join(map(json.dumps, lines)).encode()
        file: Path = tmp_path / request.param
        match file.suffix:
            case ".gz":
                data = gzip.compress(data)
            case ".zst":
                data = zstandard.compress(data)
        file.write_bytes(data)
        return file

    def test_each_is_a_text(self, gma: Gma, checkpoint: Path, letters: Path, book: Path) -> None:
        options = ["classify", "--checkpoint", checkpoint]
        book.write_text(TEXT * 2)
        answers = gma(*options, "--json", letters, book).json()
        assert [(x["file"], x.get("line")) for x in answers] == [
            (str(letters), 1),
            (str(letters), 3),
            (str(book), None),
        ]
        assert {**answers[1], "file": ""} == {**answers[2], "file": "", "line": 3}
        assert f"{letters}, line 3: " in gma(*options, letters).out

    def test_a_field_of_another_name(self, gma: Gma, checkpoint: Path, tmp_path: Path) -> None:
        file = tmp_path / "letters.jsonl"
        file.write_text(json.dumps({"text": "", "body": TEXT}))
        options = ["--checkpoint", checkpoint, "--json", "--text", "body"]
        (answer,) = gma("classify", *options, file).json()
        assert answer["usage"]["bytes"] == len(TEXT)

    def test_as_text(self, gma: Gma, checkpoint: Path, tmp_path: Path) -> None:
        file = tmp_path / "letters.jsonl"
        file.write_text(json.dumps({"text": TEXT}))
        options = ["--checkpoint", checkpoint, "--json", "--as-text"]
        (answer,) = gma("classify", *options, file).json()
        assert answer["usage"]["bytes"] == file.stat().st_size
        assert "line" not in answer

    def test_what_cannot_be_read_is_a_line_each_and_the_rest_is_answered(
        self, gma: Gma, checkpoint: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "letters.jsonl"
        file.write_bytes(b'{"text": ""}\n{"txt": "a"}\n\xff\n{"text": "a"}\n{')
        missing, torn = tmp_path / "missing.jsonl", tmp_path / "torn.jsonl.zst"
        torn.write_text("none")
        result = gma("classify", "--json", "--checkpoint", checkpoint, missing, torn, file)
        assert result.status == 1
        assert [answer["line"] for answer in result.json()] == [4]
        wrong = result.err.splitlines()
        assert wrong[0] == f"gma: {missing}: No such file or directory"
        assert wrong[1].startswith(f"gma: {torn}: ")
        assert wrong[2] == f"gma: {file}, line 1: 'text' is blank"
        assert "the fields are 'txt'" in wrong[3]
        assert [text.partition(": ")[2].partition(":")[0] for text in wrong[4:]] == [
            f"{file}, line 3",
            f"{file}, line 5",
        ]


class TestInfo:
    def test_json(self, gma: Gma, checkpoint: Path) -> None:
        (description,) = gma("info", checkpoint, "--json").json()
        assert description["labels"] == list(LABELS)
        assert description["fingerprint"] == weights.load(checkpoint).fingerprint
        assert description["parameters"] > 0

    def test_table(self, gma: Gma, checkpoint: Path) -> None:
        assert "austen, dickens, poe, twain" in gma("info", checkpoint).out


class TestEvaluate:
    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        lines = [json.dumps({"text": TEXT, "label": label}) for label in LABELS]
        (tmp_path / "test.jsonl").write_text("\n".join(lines))
        return tmp_path

    def test_table(self, gma: Gma, checkpoint: Path, data: Path) -> None:
        assert "accuracy" in gma("evaluate", checkpoint, "--data", data).out

    def test_json(self, gma: Gma, checkpoint: Path, data: Path) -> None:
        (measured,) = gma("evaluate", checkpoint, "--data", data, "--json").json()
        assert measured["documents"] == len(LABELS)

    def test_fields_of_other_names(self, gma: Gma, checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "test.csv").write_text(f"review,who\nof the times,{LABELS[0]}\n")
        options = ["--data", tmp_path, "--text", "review", "--label", "who", "--json"]
        (measured,) = gma("evaluate", checkpoint, *options).json()
        assert measured["documents"] == 1

    def test_a_split_that_is_not_there(self, gma: Gma, checkpoint: Path, data: Path) -> None:
        assert_one_line(gma("evaluate", checkpoint, "--data", data, "--split", "valid"), "valid")


class TestErrors:
    def test_not_a_checkpoint(self, gma: Gma, tmp_path: Path, book: Path) -> None:
        assert_one_line(gma("info", tmp_path / "none"), "is not a checkpoint")
        result = gma("classify", "--checkpoint", tmp_path / "none", book)
        assert_one_line(result, "is not a checkpoint")

    @pytest.mark.parametrize("command", ["classify", "evaluate", "info"])
    def test_an_exported_model(self, gma: Gma, tmp_path: Path, book: Path, command: str) -> None:
        for name in ("model.onnx", "manifest.json", "tokenizer.json"):
            (tmp_path / name).touch()
        arguments: dict[str, list[object]] = {
            "classify": ["--checkpoint", tmp_path, book],
            "evaluate": [tmp_path, "--data", tmp_path],
            "info": [tmp_path],
        }
        result = gma(command, *arguments[command])
        assert_one_line(result, "is an exported model, not a checkpoint: give the checkpoint that")

    def test_a_run_s_folder(self, gma: Gma, checkpoint: Path, tmp_path: Path, book: Path) -> None:
        shutil.copytree(checkpoint, tmp_path / "run/checkpoint")
        hint = f"do you mean {tmp_path / 'run/checkpoint'}?"
        assert_one_line(gma("classify", "--checkpoint", tmp_path / "run", book), hint)
        assert_one_line(gma("serve", "--checkpoint", tmp_path / "run"), hint)

    def test_an_interrupted_training(
        self, gma: Gma, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("gma.model.training.train.train", interrupted)
        arguments = ["--data", "d", "--out", tmp_path, "--config", "c.toml"]
        result = gma("train", *arguments)
        assert result.status == 130
        assert "Traceback" not in result.err
        assert "--resume" not in result.err
        (tmp_path / "resume.safetensors").touch()
        result = gma("train", *arguments)
        assert result.status == 130
        again = f"gma train --data d --out {tmp_path} --config c.toml --resume\n"
        assert result.err.endswith(again)
        result = gma("train", *arguments, "--labels", "tags")
        assert result.err.endswith("--config c.toml --labels tags --resume\n")

    def test_a_damaged_checkpoint(self, gma: Gma, checkpoint: Path, tmp_path: Path) -> None:
        for file in checkpoint.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = tmp_path / "config.json"
        config.write_text(config.read_text().replace('"width"', '"girth"'))
        assert_one_line(gma("info", tmp_path), "config.json")

    def test_train_without_data(self, gma: Gma, tmp_path: Path) -> None:
        config = tmp_path / "small.toml"
        config.write_text("[model]\nvocab_size = 300\n")
        arguments = ["--data", tmp_path / "none", "--out", tmp_path / "out", "--config", config]
        assert_one_line(gma("train", *arguments), "none")

    def test_serve_with_a_setting_that_is_none(
        self, gma: Gma, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GMA_PROT", "9000")
        assert_one_line(gma("serve"), "GMA_PROT")

    @pytest.mark.parametrize(
        "arguments",
        [
            ["classify"],
            ["classify", "--top-k", "0", "a"],
            ["evaluate", "a"],
            ["nonsense"],
            ["--nil"],
        ],
    )
    def test_usage(self, gma: Gma, arguments: Sequence[str]) -> None:
        result = gma(*arguments)
        assert result.status == 2
        assert "Traceback" not in result.err


class TestOptions:
    """Words that the command says again, so as not to import what defines them."""

    def test_precisions_are_those_of_the_export(self) -> None:
        assert tuple(Precision) == get_args(precision.Precision)

    def test_devices_are_those_of_the_service(self) -> None:
        assert tuple(Device) == get_args(Settings.model_fields["device"].annotation)


class TestHelp:
    @pytest.mark.parametrize(
        "command",
        [
            "serve",
            "key",
            "metrics",
            "compile",
            "classify",
            "train",
            "pretrain",
            "tokenizer",
            "evaluate",
            "average",
            "export",
            "info",
        ],
    )
    def test_every_command_has_examples(self, gma: Gma, command: str) -> None:
        result = gma(command, "--help")
        assert result.status == 0
        assert f"\n    gma {command}" in result.out

    def test_version(self, gma: Gma) -> None:
        assert gma("--version").out.strip()

    def test_settings_are_listed_by_their_variables(self, gma: Gma) -> None:
        assert "GMA_MAX_DOCUMENT_BYTES" in gma("serve", "--list-settings").out

    def test_is_quick(self) -> None:
        """What takes seconds to import is imported by the commands that use it."""
        code = (
            "import sys, gma.service.cli.main;print({'torch', 'ray', 'numpy'} & sys.modules.keys())"
        )
        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert ran.stdout.strip() == "set()"


def assert_one_line(result: Result, part: str) -> None:
    assert result.status == 1
    assert result.out == ""
    assert result.err.startswith("gma: ")
    assert result.err.count("\n") == 1
    assert part in result.err
