"""What is sent: lengths, and the texts that are cut to them."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest
import zstandard

from gma.loadtest.corpus import Corpus
from gma.loadtest.lengths import HUGE_BYTES, band, lengths

TEXTS = ["Der Fluß ist breit, 漢字 🚢 sagt man." + " Ja doch." * 200, "A text of plain words." * 50]


def write(file: Path) -> Path:
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS))
    data = lines.encode()
    file.write_bytes(zstandard.compress(data) if file.suffix == ".zst" else data)
    return file


def draw(form: str, number: int) -> list[int]:
    rng = random.Random(0)
    drawn = lengths(form)
    return [drawn(rng) for _ in range(number)]


class TestLengths:
    def test_fixed(self) -> None:
        assert set(draw("fixed:1200", 20)) == {1200}

    def test_lognormal(self) -> None:
        drawn = draw("lognormal:2000,1", 4000)
        assert statistics.median(drawn) == pytest.approx(2000, rel=0.1)
        spread = statistics.quantiles(drawn, n=100)  # e**2.326 from the median to p99
        assert spread[98] / spread[49] == pytest.approx(10.24, rel=0.25)

    def test_mixed_is_one_in_a_hundred_of_10_mb(self) -> None:
        drawn = draw("mixed", 20_000)
        assert drawn.count(HUGE_BYTES) / len(drawn) == pytest.approx(0.01, rel=0.2)
        assert statistics.median(drawn) == pytest.approx(2000, rel=0.1)

    @pytest.mark.parametrize(
        "form",
        ["", "fixed", "fixed:0", "fixed:x", "fixed:1,2", "lognormal:2000", "mixed:1", "fixed:inf"],
    )
    def test_says_what_it_takes(self, form: str) -> None:
        with pytest.raises(ValueError, match="lengths are fixed:BYTES, lognormal"):
            lengths(form)

    def test_bands(self) -> None:
        sizes = (1, 16_383, 16_384, 262_144, 4_194_304)
        assert [band(size) for size in sizes] == ["short", "short", "medium", "long", "huge"]


class TestCorpus:
    @pytest.mark.parametrize("name", ["texts.jsonl", "texts.jsonl.zst"])
    def test_whole_documents_in_turn(self, tmp_path: Path, name: str) -> None:
        corpus = Corpus.load(write(tmp_path / name), None)
        assert [corpus.document(i).decode() for i in range(3)] == [*TEXTS, TEXTS[0]]

    @pytest.mark.parametrize("size", [1, 2, 100, 5_000, 20_000])
    def test_excerpts_are_utf8_of_the_length(self, tmp_path: Path, size: int) -> None:
        corpus = Corpus.load(write(tmp_path / "texts.jsonl"), f"fixed:{size}")
        around = "\n\n".join([*TEXTS, ""]) * (size // 2000 + 3)
        for i in range(50):
            document = corpus.document(i)
            assert size <= len(document) <= size + 3
            assert document.decode() in around

    def test_excerpts_begin_with_a_word(self, tmp_path: Path) -> None:
        corpus = Corpus.load(write(tmp_path / "texts.jsonl"), "fixed:50")
        words = {word[:1] for text in TEXTS for word in text.split()}
        assert {corpus.document(i).decode()[:1] for i in range(200)} <= words

    def test_the_same_number_is_the_same_document_in_every_process(self) -> None:
        first, second = (Corpus.load(None, "lognormal:500,1", seed=3) for _ in range(2))
        other = Corpus.load(None, "lognormal:500,1", seed=4)
        documents = [first.document(i) for i in range(20)]
        assert [second.document(i) for i in reversed(range(20))] == documents[::-1]
        assert [other.document(i) for i in range(20)] != documents
        assert len(set(documents)) == 20

    def test_made_up_text_is_long_enough_for_any_length(self) -> None:
        assert len(Corpus.load(None, "fixed:10000000").document(0)) == 10_000_000

    @pytest.mark.parametrize("line", ["{", "[]", '{"label": "x"}', '{"text": 3}'])
    def test_names_the_line_that_is_wrong(self, tmp_path: Path, line: str) -> None:
        file = tmp_path / "wrong.jsonl"
        file.write_text(f'{{"text": "right"}}\n{line}\n')
        with pytest.raises(ValueError, match=r'wrong\.jsonl, line 2: no JSON object with a "text"'):
            Corpus.load(file, None)

    @pytest.mark.parametrize("name", ["latin.jsonl", "torn.jsonl.zst"])
    def test_names_the_file_that_is_none(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes('{"text": "Ça va"}'.encode("latin-1"))
        with pytest.raises(ValueError, match=name):
            Corpus.load(tmp_path / name, None)

    def test_needs_text(self, tmp_path: Path) -> None:
        (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
        with pytest.raises(ValueError, match="no text"):
            Corpus.load(tmp_path / "empty.jsonl", None)
        with pytest.raises(ValueError, match="need lengths"):
            Corpus.load(None, None)
