"""`gma batch`: every text of an archive has one answer, whatever it is in."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from gma import Classifier
from gma.model.config import ModelConfig
from gma.service.batch.output import OWN
from gma.service.cli.batch import Format
from tests.service.asgi import TEXT, save_checkpoint
from tests.service.batch.archive import (
    PART_BYTES,
    answers,
    by_id,
    texts,
    write_csv,
    write_jsonl,
)
from tests.service.batch.conftest import Run
from tests.service.test_cli import Gma

OUT = Path("out")
SMALL = ("--out", OUT, "--part-bytes", PART_BYTES)


def check(checkpoint: Path, found: dict[str, dict[str, Any]], expected: dict[str, str]) -> None:
    """Check that there is the answer of a `Classifier` to each text."""
    assert found.keys() == expected.keys()
    answered = Classifier.load(checkpoint, device="cpu").classify(expected.values())
    for (name, text), answer in zip(expected.items(), answered, strict=True):
        row = found[name]
        assert row["error"] is None
        assert (row["label"], row["labels"]) == (answer.label, [*answer.labels])
        assert (row["bytes"], row["tokens"]) == (len(text.encode()), answer.tokens)
        scores = {each["label"]: each["score"] for each in row["scores"]}
        assert scores == pytest.approx({each.label: each.score for each in answer.scores}, abs=1e-5)


def test_the_models_of_a_service_are_not_its_own(
    gma: Gma, batch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would read with another than is served."""
    monkeypatch.setenv("GMA_MODELS", "a=books,b=contracts")
    write_jsonl(Path("a.jsonl"), [{"text": text} for text in texts(1)])
    refused = gma("batch", "a.jsonl", *SMALL)
    assert (refused.status, refused.out) == (1, "")
    assert "GMA_MODELS is for gma serve: --checkpoint says which" in refused.err
    assert batch("a.jsonl", *SMALL).status == 0


def test_json_lines(batch: Run, checkpoint: Path) -> None:
    """In several parts, long and short mixed, blank lines being none."""
    given = texts(40)
    rows: list[object] = [{"text": text} for text in given]
    write_jsonl(Path("a.jsonl"), [*rows[:3], b"", *rows[3:]])
    result = batch("a.jsonl", *SMALL)
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("out: 40 texts; ")
    assert len([*OUT.glob("part-*.parquet")]) > 5
    lines = [n for n in range(1, 42) if n != 4]
    check(checkpoint, by_id(OUT), {f"a.jsonl:{n}": x for n, x in zip(lines, given, strict=True)})
    assert [row["id"] for row in answers(OUT)] == [f"a.jsonl:{n}" for n in lines]


@pytest.mark.parametrize("end", ["csv", "tsv", "csv.gz"])
def test_tables(batch: Run, checkpoint: Path, end: str) -> None:
    """With cells of several lines, and quotes that open none."""
    given = {f"k{n}": f'5" wide,\t"so"\n{text}' for n, text in enumerate(texts(30))}
    rows = [[key, "6 ft 2", text] for key, text in given.items()]
    plain = write_csv(Path(f"a.{end[:3]}"), ["key", "odd", "body"], rows)
    # As nobody's program writes it, and people do: the quote is the cell's own.
    plain.write_bytes(plain.read_bytes().replace(b"6 ft 2", b'6 ft 2"'))
    if end.endswith(".gz"):
        Path(f"a.{end}").write_bytes(gzip.compress(plain.read_bytes()))
    assert batch(f"a.{end}", "--text", "body", "--id", "key", *SMALL).status == 0
    assert (len([*OUT.glob("part-*")]) == 1) == end.endswith(".gz")
    check(checkpoint, by_id(OUT), given)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet(batch: Run, checkpoint: Path, kind: pa.DataType) -> None:
    given = {str(n): text for n, text in enumerate(texts(30))}
    array = pa.array([*given.values()], pa.string())
    column = array.dictionary_encode() if pa.types.is_dictionary(kind) else array.cast(kind)
    table = pa.table({"text": column, "n": [int(key) for key in given]})
    parquet.write_table(table, "a.parquet", row_group_size=4, use_dictionary=False)
    assert batch("a.parquet", "--id", "n", *SMALL).status == 0
    assert len([*OUT.glob("part-*")]) > 3
    check(checkpoint, by_id(OUT), given)


def test_a_folder_of_everything(batch: Run, checkpoint: Path) -> None:
    """Also a folder deeper in; what is hidden is passed over."""
    one, two, three, four, five, long = *texts(5), TEXT * 300
    inner = Path("data") / "x" / "y"
    inner.mkdir(parents=True)
    (inner / "a.txt").write_text(one)
    (inner / "b.eml").write_bytes(b"\xef\xbb\xbf" + two.encode())
    (inner / "long").write_text(long)
    (inner / "_SUCCESS").write_text("no text")
    (inner / ".hidden").write_text("no text")
    write_jsonl(inner / "c.jsonl", [{"text": three}])
    packed = zstandard.compress(json.dumps({"text": four}).encode())
    (Path("data") / "d.jsonl.zst").write_bytes(packed)
    write_csv(Path("data") / "e.csv", ["text"], [[five]])
    assert batch("data", *SMALL).status == 0
    found = by_id(OUT)
    names = ["x/y/a.txt", "x/y/b.eml", "x/y/long", "x/y/c.jsonl:1", "d.jsonl.zst:1", "e.csv:2"]
    given = [one, "\ufeff" + two, long, three, four, five]
    check(checkpoint, found, {f"data/{n}": x for n, x in zip(names, given, strict=True)})


def test_patterns_and_several_inputs(batch: Run) -> None:
    for name in ("a-1", "a-2", "b-1"):
        write_jsonl(Path(f"{name}.jsonl"), [{"text": TEXT}])
    Path("c.txt").write_text(TEXT)
    assert batch("a-*.jsonl", "c.txt", "--out", OUT).status == 0
    found = {Path(name).name for name in by_id(OUT)}
    assert found == {"a-1.jsonl:1", "a-2.jsonl:1", "c.txt"}


def test_names_and_links_of_any_kind(batch: Run) -> None:
    """Names that URLs read otherwise; links to files are followed, also from a pattern. Links to
    folders, and what is no file, are passed over."""
    folder = Path("in")
    folder.mkdir()
    names = ["std::string", "a[1]", "a*?", "~", "50%20#", "two\nlines"]
    for name in names:
        (folder / name).write_text(TEXT)
    (folder / "link").symlink_to("std::string")
    (folder / "loop").symlink_to(".")
    (folder / "broken").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    assert batch("in", "--out", OUT).status == 0
    errors = {name: row["error"] for name, row in by_id(OUT).items()}
    assert errors.pop("in/broken") == "in/broken: No such file or directory"
    assert errors == dict.fromkeys(f"in/{name}" for name in [*names, "link"])
    assert batch("in/l*", "--out", "other").status == 0
    assert [Path(name).name for name in by_id(Path("other"))] == ["link"]


def test_a_name_that_is_not_utf_8_is_refused(batch: Run) -> None:
    Path("in").mkdir()
    Path(os.fsdecode(b"in/caf\xe9.txt")).write_text(TEXT)
    result = batch("in", "--out", OUT)
    assert result.status == 1
    assert result.err == "gma: in/caf?.txt: the name of this file is not UTF-8: rename it\n"
    assert not OUT.exists()


def test_a_folder_that_cannot_be_listed_is_refused(
    batch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its texts would be lost without a word. One that is hidden is not looked into."""
    Path("in/x/y").mkdir(parents=True)
    Path("in/.z").mkdir()
    Path("in/a").write_text(TEXT)
    scandir, shut = os.scandir, ["in/.z"]

    def refusing(path: str) -> Any:
        if any(str(path).endswith(name) for name in shut):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert batch("in", "--out", "first").status == 0
    shut.append("in/x/y")
    result = batch("in", "--out", OUT)
    assert result.status == 1
    assert "in/x/y: Permission denied" in result.err
    assert not OUT.exists()


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_urls(batch: Run, checkpoint: Path, scheme: str, tmp_path: Path) -> None:
    given = texts(12)
    root = f"file://{tmp_path}" if scheme == "file" else "memory://archive"
    with fsspec.open(f"{root}/in/a.jsonl", "wb") as file:
        file.write(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in given))
    out = ("--out", f"{root}/out", "--part-bytes", PART_BYTES)
    assert batch(f"{root}/in", *out).status == 0
    system, folder = fsspec.core.url_to_fs(f"{root}/out")
    copy = tmp_path / "copy"
    system.get(folder, str(copy), recursive=True)
    assert (copy / "_SUCCESS").exists()
    check(
        checkpoint,
        by_id(copy),
        {f"{root}/in/a.jsonl:{n}": text for n, text in enumerate(given, 1)},
    )
    assert "nothing left to do" in batch(f"{root}/in", *out).out


class TestBadRows:
    """Each fails alone, and says why."""

    def test_of_json_lines(self, batch: Run) -> None:
        rows: list[object] = [
            {"text": TEXT, "id": 1},
            b'{"text": "\xff", "id": 2}',
            {"text": "", "id": 3},
            {"text": " \n", "id": 4},
            {"text": None, "id": 5},
            {"id": 6},
            b"no JSON",
            b"[]",
            {"text": TEXT},
            {"text": "\ud800", "id": "\udfff"},
            {"text": TEXT, "id": "last"},
        ]
        write_jsonl(
            Path("a.jsonl"), [x if isinstance(x, bytes) else json.dumps(x).encode() for x in rows]
        )
        result = batch("a.jsonl", "--id", "id", "--out", OUT)
        assert result.status == 0
        assert "11 texts, 9 of them with an error; " in result.out
        found = by_id(OUT)
        assert [name for name, row in found.items() if row["error"] is None] == ["1", "last"]
        for name, line, why in (
            ("a.jsonl:2", 2, "not UTF-8"),
            ("3", 3, "'text' is blank"),
            ("4", 4, "'text' is blank"),
            ("5", 5, "'text' is missing, or no string"),
            ("6", 6, "'text' is missing, or no string; the fields are 'id'"),
            ("a.jsonl:7", 7, "not JSON"),
            ("a.jsonl:8", 8, "not an object"),
            ("a.jsonl:9", 9, "'id' is missing"),
            ("?", 10, "'text' is not Unicode"),
        ):
            row = found[name]
            assert row["error"].startswith(f"a.jsonl, line {line}: {why}")
            assert {row[each] for each in ("label", "labels", "scores", "bytes", "tokens")} == {
                None
            }

    def test_of_tables(self, batch: Run) -> None:
        lines = [b"text,n", b"sea,1", b"\xff,2", b"one cell", b'"a"b,4', b",5", b"last,6"]
        Path("a.csv").write_bytes(b"\n".join(lines) + b"\n")
        batch("a.csv", "--keep", "n", "--out", OUT)
        rows = answers(OUT)
        assert [row["id"] for row in rows] == [f"a.csv:{n}" for n in range(2, 8)]
        assert [row["n"] for row in rows] == ["1", "2", None, None, "5", "6"]
        assert [row["error"] and row["error"].split(": ", 1)[1][:15] for row in rows] == [
            None,
            "'text': not UTF",
            "1 cells, where ",
            "',' expected af",
            "'text' is blank",
            None,
        ]

    def test_of_parquet(self, batch: Run) -> None:
        spoilt = pa.array([b"sea", b"\xff", None, b" ", b"last"], pa.binary())
        text = pa.Array.from_buffers(pa.string(), 5, spoilt.buffers())
        parquet.write_table(pa.table({"text": text}), "a.parquet")
        batch("a.parquet", "--out", OUT)
        errors = {name: row["error"] for name, row in by_id(OUT).items()}
        assert [name for name, error in errors.items() if error is None] == [
            "a.parquet:1",
            "a.parquet:5",
        ]
        assert errors["a.parquet:2"].startswith("a.parquet, row 2: 'text': not UTF-8")
        assert errors["a.parquet:3"].startswith("a.parquet, row 3: 'text' is missing")
        assert errors["a.parquet:4"] == "a.parquet, row 4: 'text' is blank"

    def test_of_text_files(self, batch: Run) -> None:
        folder = Path("in")
        folder.mkdir()
        (folder / "empty").touch()
        (folder / "blank").write_text(" \n" * 100_000)
        (folder / "latin").write_bytes(TEXT.encode() * 900 + b"\xff")
        (folder / "good").write_text(TEXT)
        batch("in", "--out", OUT)
        found = {name: row["error"] for name, row in by_id(OUT).items()}
        assert found == {
            "in/empty": "in/empty: the text is empty",
            "in/blank": "in/blank: the text is blank",
            "in/latin": f"in/latin: not UTF-8: byte {900 * len(TEXT.encode())}",
            "in/good": None,
        }

    def test_a_compressed_file_that_breaks_off(self, batch: Run) -> None:
        """Its lines up to there are read; a row stands for the rest."""
        lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts(300))
        Path("a.jsonl.gz").write_bytes(gzip.compress(lines)[:-400])
        assert batch("a.jsonl.gz", "--out", OUT).status == 0
        *read, last = answers(OUT)
        assert read
        assert {row["error"] for row in read} == {None}
        assert last["id"] == f"a.jsonl.gz:{len(read) + 1}"
        assert "the file can't be read further" in last["error"]


class TestAnswers:
    def test_evidence_tiles_each_text(self, batch: Run) -> None:
        given = texts(8)
        write_jsonl(Path("a.jsonl"), [{"text": text} for text in given])
        assert batch("a.jsonl", "--evidence", "--top-k", 2, "--out", OUT).status == 0
        for row, text in zip(answers(OUT), given, strict=True):
            spans = row["evidence"]
            edges = [0, *(span["end"] for span in spans)]
            assert [span["start"] for span in spans] == edges[:-1]
            assert edges[-1] == row["bytes"] == len(text.encode())
            assert sum(span["weight"] for span in spans) == pytest.approx(1)
            assert {len(row["scores"]), *(len(span["scores"]) for span in spans)} == {2}
        assert max(len(row["evidence"]) for row in answers(OUT)) > 4

    def test_a_multi_label_model(self, batch: Run, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        save_checkpoint(folder, multi_label=True, thresholds=(0.0, 0.5, 1.0))
        write_jsonl(Path("a.jsonl"), [{"text": text} for text in texts(5)])
        assert batch("--checkpoint", folder, "a.jsonl", "--evidence", "--out", OUT).status == 0
        for row in answers(OUT):
            there = [x["label"] for x in row["scores"] if x["score"] >= x["threshold"]]
            assert row["labels"] == there
            assert row["label"] == there[0]
            assert all("ann" in span["labels"] for span in row["evidence"])

    def test_json_lines_out(self, batch: Run) -> None:
        kept = {"day": 3, "who": {"name": "ß"}, "none": None}
        write_jsonl(Path("a.jsonl"), [{"text": TEXT, **kept}, {"text": "", "day": 4}])
        keep = [word for name in kept for word in ("--keep", name)]
        assert batch("a.jsonl", *keep, "--format", "jsonl", "--out", OUT).status == 0
        first, second = answers(OUT)
        assert {name: first[name] for name in kept} == kept
        assert (second["day"], second["who"]) == (4, None)
        assert set(first) == {*OWN, *kept} - {"evidence"}

    def test_kept_columns_of_parquet_are_texts(self, batch: Run) -> None:
        write_jsonl(Path("a.jsonl"), [{"text": TEXT, "n": n} for n in (3, "ß", [1, "x"], None)])
        assert batch("a.jsonl", "--keep", "n", "--out", OUT).status == 0
        assert [row["n"] for row in answers(OUT)] == ["3", "ß", '[1, "x"]', None]

    def test_nothing_to_read_is_no_answer(self, batch: Run) -> None:
        Path("a.jsonl").touch()
        result = batch("a.jsonl", "--out", OUT)
        assert (result.status, result.out[:13]) == (0, "out: 0 texts;")
        assert (OUT / "_SUCCESS").exists()

    def test_formats_are_those_of_the_work(self) -> None:
        assert {each.value for each in Format} == {"parquet", "jsonl"}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["empty"], "empty: there is no file to read in it"),
        (["nowhere-*.jsonl"], "nowhere-*.jsonl: there is no file"),
        (["gopher://x/y"], "gopher://x/y: Protocol not known"),
        (["a.jsonl", "--text", "body"], "no line has a field 'body', of the first 100 at most: "),
        (["a.csv", "--text", "body"], "a.csv, line 1: no column is named 'body': they are text, n"),
        (["a.csv", "--id", "key"], "no column is named 'key'"),
        (["a.parquet", "--keep", "key"], "no column is named 'key'"),
        (["a.parquet", "--text", "n"], "column 'n' holds int64, and no texts"),
        (["broken.parquet"], "broken.parquet: "),
        (["empty.csv"], "empty.csv, line 1: the names of the columns are expected"),
        (["a.jsonl", "--keep", "label"], "--keep label: the answers have a column of their own"),
        (["a.jsonl", "--checkpoint", "empty"], "empty"),
        (["full", "--out", "full"], "full lies in full: answers can't be among what is read"),
        (["full/../full/x", "--out", "full"], "full/../full/x lies in full"),
        ([".", "--out", "full"], "full holds other files"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_read(
    batch: Run, arguments: list[str], why: str
) -> None:
    Path("empty").mkdir()
    Path("empty.csv").touch()
    Path("full").mkdir()
    Path("full/x").touch()
    write_jsonl(Path("a.jsonl"), [{"text": TEXT, "n": 1}])
    write_csv(Path("a.csv"), ["text", "n"], [[TEXT, 1]])
    parquet.write_table(pa.table({"text": [TEXT], "n": [1]}), "a.parquet")
    Path("broken.parquet").write_bytes(b"PAR1 it is not")
    result = batch(*arguments, *([] if "--out" in arguments else ["--out", OUT]))
    assert result.status == 1
    assert why in result.err
    assert not OUT.exists()


def test_an_output_of_others_is_left_alone(batch: Run) -> None:
    write_jsonl(Path("a.jsonl"), [{"text": TEXT}])
    OUT.mkdir()
    (OUT / "thesis.doc").touch()
    result = batch("a.jsonl", "--out", OUT)
    assert (result.status, result.err) == (
        1,
        "gma: out holds other files: give a folder that is empty, or not there\n",
    )
    assert [each.name for each in OUT.iterdir()] == ["thesis.doc"]


@pytest.mark.parametrize(
    ("missing", "arguments", "what"),
    [
        ("pyarrow", [], "Parquet needs pyarrow"),
        ("pyarrow", ["--format", "jsonl", "a.parquet"], "a.parquet: Parquet needs pyarrow"),
        ("pandas", ["--address", "auto"], "--address auto needs pandas"),
    ],
)
def test_what_is_not_installed_is_named(
    batch: Run, monkeypatch: pytest.MonkeyPatch, missing: str, arguments: list[str], what: str
) -> None:
    write_jsonl(Path("a.jsonl"), [{"text": TEXT}])
    parquet.write_table(pa.table({"text": [TEXT]}), "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    result = batch("a.jsonl", "--out", OUT, *arguments)
    assert result.status == 1
    assert f"{what}, which is not installed: gma-service[batch] has it" in result.err


def test_workers_are_a_clusters(batch: Run) -> None:
    result = batch("a.jsonl", "--out", OUT, "--workers", 2)
    assert result.status == 2
    assert "needs --address" in result.err


def test_help_names_every_option_and_what_it_is_without(batch: Run) -> None:
    text = " ".join(batch("--help").out.split())
    for name in ("--out", "--text", "--id", "--keep", "--top-k", "--evidence", "--format"):
        assert f" {name}" in text
    for said in ("[default: FILE:LINE, or FILE of a text]", "[default: parquet]", "--address auto"):
        assert said in text


def test_thresholds_may_say_that_there_is_nothing(batch: Run, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", thresholds=(1.0, 1.0, 1.0))
    assert ModelConfig.model_validate_json((folder / "config.json").read_bytes()).thresholds
    write_jsonl(Path("a.jsonl"), [{"text": TEXT}])
    assert batch("--checkpoint", folder, "a.jsonl", "--out", OUT).status == 0
    (row,) = answers(OUT)
    assert (row["label"], row["labels"], row["error"]) == (None, [], None)
