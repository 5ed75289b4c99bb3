"""The benchmark of `gma batch` reads every text of each round, and reports it all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import batch
from tests.service.batch.archive import write_jsonl


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner chooses how many threads its process computes with."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


def test_quick(capsys: pytest.CaptureFixture[str]) -> None:
    batch.main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| texts | MB | tokens | bare step, tokens/s |")
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["12", "12", "median"]
    for line in lines[4:6]:
        bare, read, ratio = (float(x.replace(",", "")) for x in line.split("|")[4:7])
        assert ratio == pytest.approx(read / bare, abs=0.01)


def test_rounds_have_books_of_their_own_and_pieces_of_them(tmp_path: Path) -> None:
    books = [f"{n} " * 3000 for n in range(6)]
    write_jsonl(tmp_path / "test.jsonl", [{"text": x, "label": "a"} for x in books])
    rounds = batch.books(tmp_path, count=2, rounds=3, shorts=5)
    assert [len(texts) for texts in rounds] == [7, 7, 7]
    whole = [text for texts in rounds for text in texts if text in books]
    assert sorted(whole) == sorted(books)
    for texts in rounds:
        own = [text for text in texts if text in books]
        pieces = [text for text in texts if text not in books]
        assert {len(piece) for piece in pieces} == {batch.SHORT_CHARACTERS}
        assert all(any(piece in text for text in own) for piece in pieces)


def test_the_table_has_the_medians() -> None:
    rounds = [batch.Round(2, 2_000_000, 500, 100.0, speed, 0.99) for speed in (90.0, 97.0, 95.0)]
    assert batch.table(rounds).splitlines()[-1] == ("| median | | | 100 | 95 | 0.950 | 0.990 |")
