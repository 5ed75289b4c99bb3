from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gma.model.tokenizer import NotUtf8, Tokenizer, TokenStream

# One of every class that the words distinguish, and the characters where definitions of a class
# differ: Python calls \x1c a space, the words do not; \x85 and \u3000 are spaces of several bytes.
CHARACTERS = "aZé你👩\u0301\u200d1٣½.,—\x00\x1c \n\r\t\x85\u00a0\u3000"
RUNS = (1, 1, 1, 2, 2, 3, 4, 8, 9, 31, 32, 33, 34, 70)
WORDS = "a rose is a rose, isn't it? Нет! 1234 numbers\r\nand\ttabs\n\n\n  你好。"

HOSTILE = {
    "empty": "",
    "one byte": "a",
    "shorter than a window": "no. 12",
    "nul": "\x00" * 50 + "a\x00b \x00",
    "line ends": "one\r\ntwo\r\n\r\n\r\nthree\r\r\n \n" * 20,
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈 👍🏽" * 50,
    "combining": "e" + "\u0301" * 200 + " n\u0303o",
    "no spaces": "".join(map(chr, range(0x4E00, 0x4E00 + 2000))),
    "mixed scripts": "Καλημέρα мир שלום नमस्ते ไทย 한국어 日本 abc١٢٣" * 20,
    "spaces before a word": "".join("\n" * n + "a" * n + " " * n + "." * n for n in range(70)),
    "leading and trailing": "   a   ",
    "other spaces": "a\u00a0\u2003\u3000b\x85\x1c\x1d c\u200b" * 20,
}


def texts() -> Iterator[str]:
    generator = random.Random(1)
    for _ in range(400):
        yield " ".join(generator.choices(WORDS.split(" "), k=20))
        # Merges of every pair of neighbours, so that a word that ends elsewhere has other tokens.
        yield "".join(generator.choices(CHARACTERS, k=50))
    yield from HOSTILE.values()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(texts(), vocab_size=1000)


def stream(tokenizer: Tokenizer, pieces: list[bytes]) -> np.ndarray:
    """The tokens of the pieces; checks the bound on what is held back at every one."""
    reader = tokenizer.stream()
    tokens = []
    for piece in pieces:
        tokens.append(reader.feed(piece))
        assert len(reader.pending) <= TokenStream.MAX_PENDING
    return np.concatenate([*tokens, reader.finish()])


def cut(data: bytes, generator: random.Random, longest: int) -> list[bytes]:
    pieces = []
    while data:
        size = generator.randint(0, longest)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def every(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


class TestEncode:
    @pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
    def test_is_lossless(self, tokenizer: Tokenizer, text: str) -> None:
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.int32
        assert tokenizer.byte_lengths[tokens].sum() == len(text.encode())

    def test_text_and_its_bytes_are_the_same_document(self, tokenizer: Tokenizer) -> None:
        np.testing.assert_array_equal(tokenizer.encode(WORDS), tokenizer.encode(WORDS.encode()))

    def test_a_surrogate_is_not_utf8(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(NotUtf8) as caught:
            tokenizer.encode("é\ud800")
        assert caught.value.offset == 2

    def test_learned_words_are_single_tokens(self, tokenizer: Tokenizer) -> None:
        assert len(tokenizer.encode(" rose")) == 1

    def test_is_the_same_from_many_threads(self, tokenizer: Tokenizer) -> None:
        expected = tokenizer.encode(WORDS * 100)
        with ThreadPoolExecutor(4) as pool:
            for tokens in pool.map(tokenizer.encode, [WORDS * 100] * 8):
                np.testing.assert_array_equal(tokens, expected)


class TestRuns:
    """One character again and again is few tokens, though no text ever had it so."""

    @pytest.fixture(scope="class")
    def plain(self) -> Tokenizer:
        return Tokenizer.train(iter([WORDS * 3]), vocab_size=2000)

    @pytest.mark.parametrize(
        ("character", "together"), [(" ", 32), ("\n", 32), ("-", 8), ("_", 8), ("=", 8), (".", 8)]
    )
    def test_are_as_long_as_words(self, plain: Tokenizer, character: str, together: int) -> None:
        assert len(plain.encode(character * 3200)) == 3200 // together

    def test_of_letters_where_the_vocabulary_is_large(self) -> None:
        tokenizer = Tokenizer.train(iter([WORDS]), vocab_size=16384)
        for character in "axZ\u2014\u3000":
            data = (character * 3200).encode()
            assert len(tokenizer.encode(data)) <= 3200 // 8

    @pytest.mark.parametrize("vocab_size", [256, 257, 260, 300, 512])
    def test_take_no_more_than_their_places(self, vocab_size: int) -> None:
        tokenizer = Tokenizer.train(texts(), vocab_size)
        assert tokenizer.vocab_size <= vocab_size

    def test_leave_other_tokens_as_they_were(self, plain: Tokenizer) -> None:
        """What is learned last counts last: words have the tokens of a smaller vocabulary."""
        assert [plain.byte_lengths[t] for t in plain.encode(" rose")] == [5]
        assert len(plain.encode(WORDS)) < len(WORDS) / 2


class TestStream:
    @pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
    @pytest.mark.parametrize("size", [1, 2, 7, 64, 1 << 20])
    def test_equals_encode_however_cut(self, tokenizer: Tokenizer, text: str, size: int) -> None:
        data = text.encode()
        np.testing.assert_array_equal(stream(tokenizer, every(data, size)), tokenizer.encode(data))

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(
        runs=st.lists(st.tuples(st.sampled_from(CHARACTERS), st.sampled_from(RUNS)), max_size=12),
        longest=st.sampled_from([1, 3, 40, 200]),
        seed=st.integers(0, 1 << 16),
    )
    def test_equals_encode_for_any_runs(
        self, tokenizer: Tokenizer, runs: list[tuple[str, int]], longest: int, seed: int
    ) -> None:
        data = "".join(character * count for character, count in runs).encode()
        pieces = cut(data, random.Random(seed), longest)
        np.testing.assert_array_equal(stream(tokenizer, pieces), tokenizer.encode(data))

    @pytest.mark.parametrize("unit", ["a", " ", "\n", "a1", "你", "👍", "e\u0301", WORDS])
    def test_equals_encode_for_a_large_text(self, tokenizer: Tokenizer, unit: str) -> None:
        data = (unit * (300_000 // len(unit.encode()))).encode()
        expected = tokenizer.encode(data)
        for pieces in (every(data, 65_521), [data], [data[:1], data[1:]]):
            np.testing.assert_array_equal(stream(tokenizer, pieces), expected)

    @pytest.mark.parametrize("byte", [b"a", b" "])
    def test_holds_little_of_a_megabyte_without_words(
        self, tokenizer: Tokenizer, byte: bytes
    ) -> None:
        tokens = stream(tokenizer, every(byte * 1_000_000, 65_536))
        assert tokenizer.byte_lengths[tokens].sum() == 1_000_000

    def test_byte_by_byte_costs_the_same_from_first_to_last(self, tokenizer: Tokenizer) -> None:
        """Counts executed lines instead of seconds: twice the bytes are twice the work."""
        short, long = ("a" * 3_000).encode(), ("a" * 6_000).encode()
        work = [lines_executed(stream, tokenizer, every(data, 1)) for data in (short, long)]
        assert work[1] <= 2.1 * work[0]

    def test_continues_from_pending_bytes_alone(self, tokenizer: Tokenizer) -> None:
        data = (WORDS * 3 + "👍" * 20).encode()
        reader = tokenizer.stream()
        tokens = []
        for piece in every(data, 5):
            tokens.append(reader.feed(piece))
            reader = tokenizer.stream(reader.pending)
        tokens.append(reader.finish())
        np.testing.assert_array_equal(np.concatenate(tokens), tokenizer.encode(data))

    def test_pending_are_the_bytes_without_tokens(self, tokenizer: Tokenizer) -> None:
        data = (WORDS * 3).encode()
        reader = tokenizer.stream()
        taken = 0
        for end, piece in enumerate(every(data, 1), start=1):
            taken += int(tokenizer.byte_lengths[reader.feed(piece)].sum())
            assert data[taken:end] == reader.pending


class TestNotUtf8:
    INVALID = (
        (b"\xff", 0),
        ("é 你".encode() + b"\x80 more", 6),
        (b"a" * 500 + b"\xe4\xbd" + b"a", 500),
        (b"surrogate \xed\xa0\x80", 10),
        (b"overlong \xc0\xaf", 9),
    )

    @pytest.mark.parametrize(("data", "offset"), INVALID)
    @pytest.mark.parametrize("size", [1, 2, 3, 1000])
    def test_names_the_offset(
        self, tokenizer: Tokenizer, data: bytes, offset: int, size: int
    ) -> None:
        with pytest.raises(NotUtf8, match=f"byte {offset}") as caught:
            stream(tokenizer, every(data, size))
        assert caught.value.offset == offset

    @pytest.mark.parametrize("size", [1, 1000])
    def test_unfinished_character_at_the_end(self, tokenizer: Tokenizer, size: int) -> None:
        data = b"word " * 100 + "👍".encode()[:3]
        with pytest.raises(NotUtf8) as caught:
            stream(tokenizer, every(data, size))
        assert caught.value.offset == 500

    def test_refused_bytes_leave_the_stream_as_it_was(self, tokenizer: Tokenizer) -> None:
        reader = tokenizer.stream()
        tokens = [reader.feed(b"one two thr")]
        with pytest.raises(NotUtf8):
            reader.feed(b"ee \xff")
        tokens += [reader.feed(b"ee four"), reader.finish()]
        expected = tokenizer.encode(b"one two three four")
        np.testing.assert_array_equal(np.concatenate(tokens), expected)

    def test_offset_of_a_continued_stream(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(NotUtf8) as caught:
            tokenizer.stream(b"ab", offset=1000).feed(b"c\xff")
        assert caught.value.offset == 1003


class TestFile:
    def test_round_trip(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = Tokenizer.load(tmp_path / "tokenizer.json")
        assert loaded.vocab_size == tokenizer.vocab_size
        np.testing.assert_array_equal(loaded.byte_lengths, tokenizer.byte_lengths)
        np.testing.assert_array_equal(loaded.encode(WORDS), tokenizer.encode(WORDS))

    def test_training_is_deterministic(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        tokenizer.save(tmp_path / "first.json")
        Tokenizer.train(texts(), vocab_size=1000).save(tmp_path / "second.json")
        assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            Tokenizer.load(tmp_path / "tokenizer.json")

    @pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff"])
    def test_not_a_tokenizer(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "tokenizer.json"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            Tokenizer.load(path)

    @staticmethod
    def _add_token(spec: dict[str, Any]) -> None:
        spec["added_tokens"] = [
            {
                "id": len(spec["model"]["vocab"]),
                "content": "<end>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ]

    @staticmethod
    def _leave_a_gap(spec: dict[str, Any]) -> None:
        vocabulary = spec["model"]["vocab"]
        last = max(vocabulary, key=vocabulary.get)
        vocabulary[last] += 1

    @staticmethod
    def _lose_a_byte(spec: dict[str, Any]) -> None:
        spec["model"]["merges"] = []
        spec["model"]["vocab"] = {"b": 0, "c": 1}

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda spec: spec.update(normalizer={"type": "NFC"}), "normalizer must be None"),
            (lambda spec: spec["model"].update(dropout=0.1), "dropout must be None"),
            (
                lambda spec: spec["pre_tokenizer"]["pretokenizers"].pop(0),
                "pre_tokenizer must be",
            ),
            (lambda spec: spec.update(decoder=None), "decoder must be"),
            (_add_token, "added_tokens must be"),
            (_leave_a_gap, "without gaps"),
            (_lose_a_byte, "lacks 254 of the 256 single bytes"),
        ],
    )
    def test_another_form(
        self,
        tokenizer: Tokenizer,
        tmp_path: Path,
        damage: Callable[[dict[str, Any]], object],
        message: str,
    ) -> None:
        path = tmp_path / "tokenizer.json"
        tokenizer.save(path)
        spec = json.loads(path.read_text())
        damage(spec)
        path.write_text(json.dumps(spec))
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(path)


def lines_executed(call: Callable[..., object], *arguments: object) -> int:
    lines = 0

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal lines
        lines += event == "line"
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        call(*arguments)
    finally:
        sys.settrace(previous)
    return lines
