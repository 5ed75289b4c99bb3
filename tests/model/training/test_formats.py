"""Each kind of file that documents come in, and that what is wrong is named."""

from __future__ import annotations

import csv
import gzip
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import zstandard

from gma.model.training.errors import CorpusError
from gma.model.training.labelled import TEXT_ALONE, Fields, Label
from gma.model.training.splits import Splits

ROWS = [('a ship,\nor "two"\tat sea', "sea"), ("hay " * 40_000, "farm"), ("naïve 船", "sea")]
Found = list[tuple[str, Label]]


def read(data: Path, split: str = "train") -> Found:
    """What the split's files hold, all of it."""
    return [(d.text, d.label) for source in Splits(data).sources(split) for d in source.read()]


def write_table(file: Path, rows: Sequence[tuple[str, str]], delimiter: str = ",") -> None:
    with file.open("w", newline="", encoding="utf-8-sig") as opened:
        writer = csv.writer(opened, delimiter=delimiter)
        writer.writerows([("id", "label", "text"), *((i, y, x) for i, (x, y) in enumerate(rows))])


def write_folders(folder: Path) -> None:
    for number, (text, label) in enumerate(ROWS):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{number}.txt").write_text(text)


def csv_file(data: Path) -> None:
    write_table(data / "train.csv", ROWS)


def tsv_file(data: Path) -> None:
    write_table(data / "train.tsv", ROWS, "\t")


def zipped_csv_file(data: Path) -> None:
    csv_file(data)
    (data / "train.csv.gz").write_bytes(gzip.compress((data / "train.csv").read_bytes()))
    (data / "train.csv").unlink()


def zst_csv_shards(data: Path) -> None:
    for number, row in enumerate(ROWS):
        file = data / f"train-{number}.csv"
        write_table(file, [row])
        (data / f"{file.name}.zst").write_bytes(zstandard.compress(file.read_bytes()))
        file.unlink()


def parquet_file(data: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": [x for x, _ in ROWS], "n": [1, 2, 3], "label": [1, 0, 1]})
    parquet.write_table(table, data / "train-00000-of-00001.parquet", row_group_size=1)


def saved_dataset(data: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(2, ["farm", "sea"])}
    rows = {"text": [x for x, _ in ROWS], "label": [1, 0, 1]}
    found = datasets.Dataset.from_dict(rows, datasets.Features(features))
    datasets.DatasetDict({"train": found, "validation": found}).save_to_disk(str(data))


@pytest.mark.parametrize(
    "write", [csv_file, tsv_file, zipped_csv_file, zst_csv_shards, saved_dataset]
)
def test_documents_come_as_they_are(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    assert read(tmp_path) == ROWS


def test_parquet(tmp_path: Path) -> None:
    parquet_file(tmp_path)
    assert read(tmp_path) == [(text, str(int(label == "sea"))) for text, label in ROWS]


def test_validation_of_a_saved_dataset_is_valid(tmp_path: Path) -> None:
    saved_dataset(tmp_path)
    assert read(tmp_path, "valid") == ROWS


@pytest.mark.parametrize("inside", [".", "train"])
def test_a_folder_for_each_label(tmp_path: Path, inside: str) -> None:
    write_folders(tmp_path / inside)
    (tmp_path / inside / "sea/.DS_Store").write_bytes(b"\xff")
    assert read(tmp_path) == sorted(ROWS, key=lambda row: (row[1], ROWS.index(row)))


def test_a_file_is_the_train_split(tmp_path: Path) -> None:
    write_table(tmp_path / "reviews.csv", [(f"text {i}", "ab"[i % 2]) for i in range(40)])
    file = tmp_path / "reviews.csv"
    assert len(read(file)) == 40
    with pytest.raises(CorpusError, match="holds no test split"):
        read(file, "test")


def test_fields_of_other_names(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("stars,text,review\n5,no,good\n")
    (tmp_path / "valid.jsonl").write_text('{"stars": 1, "review": "bad"}')
    splits = Splits(tmp_path, Fields("review", "stars"))
    found = [(d.text, d.label) for split in ("train", "valid") for d in splits.read(split)]
    assert found == [("good", "5"), ("bad", "1")]
    with pytest.raises(CorpusError, match="no column is named 'label': they are stars, text"):
        read(tmp_path)


class TestWrong:
    @pytest.mark.parametrize(
        ("rows", "line", "problem"),
        [
            ('text,label\na,b\n"two\nlines",c\n,d\n', 5, "'text' is blank"),
            ('text,label\na,b\n"two\nlines", \n', 3, "'label' is blank"),
            ("text,label\na,b,c\n", 2, "3 cells"),
            ('text,label\n"a\n', 2, "unexpected end"),
            ("review,label\na,b\n", 1, "no column is named 'text': they are review, label"),
            ("text,label,text\na,b\n", 1, "two columns are named 'text'"),
        ],
    )
    def test_table(self, tmp_path: Path, rows: str, line: int, problem: str) -> None:
        (tmp_path / "train.csv").write_text(rows)
        with pytest.raises(CorpusError, match=problem) as caught:
            read(tmp_path)
        assert f"train.csv, line {line}: " in str(caught.value)

    def test_parquet(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        file = tmp_path / "train.parquet"
        parquet.write_table(pyarrow.table({"text": ["a", None], "label": [1, 1]}), file)
        with pytest.raises(CorpusError, match=r"train\.parquet, row 2: 'text' is missing"):
            read(tmp_path)
        parquet.write_table(pyarrow.table({"text": ["a"], "y": [1]}), file)
        with pytest.raises(CorpusError, match="no column is named 'label': they are text, y"):
            read(tmp_path)
        file.write_bytes(b"PAR1")
        with pytest.raises(CorpusError, match=r"train\.parquet: "):
            read(tmp_path)

    def test_saved_dataset(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"text": ["a"], "y": [1]}).save_to_disk(str(tmp_path / "train"))
        with pytest.raises(CorpusError, match="no column is named 'label': they are text, y"):
            read(tmp_path)
        (tmp_path / "train/state.json").write_text("{}")
        with pytest.raises(CorpusError, match=r"train: "):
            read(tmp_path)

    @pytest.mark.parametrize(
        ("package", "name", "what"),
        [("pyarrow", "train.parquet", "Parquet"), ("datasets", "train/state.json", "data set")],
    )
    def test_without_the_package(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str, what: str
    ) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(CorpusError, match=what) as caught:
            read(tmp_path)
        assert package in str(caught.value)
        assert "gma-service[train]" in str(caught.value)

    def test_a_text_file(self, tmp_path: Path) -> None:
        write_folders(tmp_path / "train")
        (tmp_path / "train/sea/x.txt").write_bytes(b"\xff")
        with pytest.raises(CorpusError, match=r"x\.txt: not UTF-8"):
            read(tmp_path)
        (tmp_path / "train/sea/x.txt").write_text(" \n")
        with pytest.raises(CorpusError, match=r"x\.txt: 'text' is blank"):
            read(tmp_path)

    @pytest.mark.parametrize("name", ["train.jsonl.gz", "train.csv.gz", "train.csv.zst"])
    def test_what_is_not_compressed(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("text,label\na,b\n")
        with pytest.raises(CorpusError, match=name):
            read(tmp_path)


class TestWithoutLabels:
    """Where labels do not count, each kind of file gives its texts alone."""

    @staticmethod
    def texts_of(data: Path) -> list[str]:
        sources = Splits(data, TEXT_ALONE).sources("train")
        found = [document for source in sources for document in source.read()]
        assert {document.labels for document in found} == {()}
        return [document.text for document in found]

    @pytest.mark.parametrize("label", ["label", "labels", "other"])
    def test_of_tables(self, tmp_path: Path, label: str) -> None:
        (tmp_path / "train.csv").write_text(f"text,{label}\na ship,\nhay,|\n")
        assert self.texts_of(tmp_path) == ["a ship", "hay"]

    def test_of_parquet(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({"text": ["a ship", "hay"], "label": [None, [1]]})
        parquet.write_table(table, tmp_path / "train.parquet")
        assert self.texts_of(tmp_path) == ["a ship", "hay"]

    def test_of_a_saved_data_set(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"text": ["a ship", "hay"]}).save_to_disk(tmp_path / "train")
        assert self.texts_of(tmp_path) == ["a ship", "hay"]

    def test_of_folders(self, tmp_path: Path) -> None:
        for name in ("a.txt", "notes.md", "inner/b", "inner/.hidden", "c.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        assert self.texts_of(tmp_path) == ["a.txt", "c.txt", "inner/b"]
        (tmp_path / "train").mkdir()
        (tmp_path / "train/d.txt").write_text("d")
        assert self.texts_of(tmp_path) == ["d"]
